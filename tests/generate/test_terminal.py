"""The terminal with a scripted model: commands, Ctrl-C, error messages."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from ismdata.attention import attachment as attention
from ismdata.attention import model_folder
from ismdata.errors import DataError, UsageError
from ismdata.generate.session import Session
from ismdata.generate.terminal import COMMANDS, open_chat, run_terminal
from ismdata.generate.window import Window
from ismdata.rendering.encoding import SETTINGS_NAME
from tests.generate.test_session import TWO_TURNS, session_of
from tests.support.scripted import END, CharacterEncoder, ScriptedModel
from tests.support.tiny import tiny_model


def terminal(chat, lines):
    """What a terminal shows for these lines; a line that is an exception is raised."""
    written, lines = [], iter(lines)

    def read(prompt):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    run_terminal(chat, read=read, write=written.append)
    return "".join(written).split("\n", 1)[1]  # after the greeting


def test_the_terminal_loop():
    chat, _, _ = session_of([*TWO_TURNS, 4, END, 0])
    assert terminal(chat, ["ab", "  ", "c", "/new", "d", "/exit", "never read"]) == "hi\nj\nNew conversation.\ne\n"
    assert len(chat.messages) == 2


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_the_terminal_loop_ends_with_its_input(end):
    chat, _, _ = session_of(TWO_TURNS)
    assert terminal(chat, ["ab", end]) == "hi\n\n"


def test_the_terminal_continues_after_a_conversation_that_is_too_long():
    chat, _, _ = session_of(TWO_TURNS, max_positions=12)
    shown = terminal(chat, ["ab", "abc", "c"])
    assert "would have 12 tokens" in shown
    assert shown.endswith("j\n\n")


def test_ctrl_c_ends_the_answer_between_two_tokens():
    chat, model, _ = session_of([7, 8, 9, 10, 11, END])
    former = signal.getsignal(signal.SIGINT)
    forward = model.forward

    def interrupted_forward(**kwargs):
        output = forward(**kwargs)
        if len(model.calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return output

    model.forward = interrupted_forward
    assert terminal(chat, ["a"]) == "hi\n\n"
    assert chat.fed == [80, 0, 81, 7, 8, END]
    assert signal.getsignal(signal.SIGINT) is former


def test_commands(tmp_path):
    """A conversation with all of them: the output, and the remaining messages."""
    session, model, _ = session_of([*TWO_TURNS, 5, END, 0])
    path = tmp_path / "my talk.jsonl"
    shown = terminal(session, ["ab", f"/save {path}", "c", "/undo", "/undo", "/undo", f"/load '{path}'"])
    assert shown == (
        f"hi\nWrote 2 messages to {path}.\nj\n"
        "Removed 'c' and what followed.\nRemoved 'ab' and what followed.\nNothing to remove.\n"
        f"Read 2 messages from {path}.\n\n"
    )
    model.script = [0, 0, 5, END]
    assert terminal(session, ["d"]) == "f\n\n"
    assert [message["content"] for message in session.messages] == ["ab", "hi", "d", "f"]


def test_a_loaded_question_is_answered(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "ab"}]}')
    session, _, _ = session_of(TWO_TURNS)
    assert terminal(session, [f"/load {path}", "/exit"]) == f"Read 1 messages from {path}.\nhi\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/quit", "/quit: no such command; /help lists them. To send text that begins with /, type a space first"),
        ("/save", "/save: expected /save FILE"),
        ("/new now", "/new now: expected /new"),
        ("/load nowhere.jsonl", "nowhere.jsonl: No such file or directory; expected a file with one JSON line"),
        ("/load it's.jsonl", "it's.jsonl: No such file or directory"),
        ("/", "/: no such command"),
    ],
)
def test_the_terminal_continues_after_a_wrong_command(line, message):
    session, model, _ = session_of(TWO_TURNS)
    shown = terminal(session, ["ab", line, "c"])
    assert shown.startswith(f"hi\n{message}")
    assert shown.endswith("\nj\n\n")
    assert model.calls[4][1] == 7  # the cache was kept


def test_help_lists_every_command():
    session, _, _ = session_of([])
    shown = terminal(session, ["/help"])
    assert [line.split()[0] for line in shown.strip().splitlines()] == [command.split()[0] for command in COMMANDS]


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_does_nothing(line):
    session, model, _ = session_of(TWO_TURNS)
    assert terminal(session, [line]) == "\n"
    assert (model.calls, session.messages) == ([], [])


def test_a_line_may_begin_with_a_space_and_a_slash():
    session, _, encoder = session_of(TWO_TURNS)
    terminal(session, [" /etc"])
    assert encoder.asked[0][0]["content"] == "/etc"


def test_dropped_turns_are_reported():
    window = Window(when_full="drop-oldest", context=14)
    session = Session(ScriptedModel([7, END] * 20), CharacterEncoder(), mask="ism", window=window, max_new_tokens=2)
    assert "(The oldest 2 messages are no longer in the context.)" in terminal(session, ["ab", "cd", "ef"])


def test_another_mask_than_the_models_is_reported():
    written = []
    session, _, _ = session_of([], mask="causal")
    run_terminal(session, trained="ism", read=lambda prompt: "/exit", write=written.append)
    assert written[0].startswith("Mask causal (the model was trained under ism).")
    written.clear()
    run_terminal(session, trained="causal", read=lambda prompt: "/exit", write=written.append)
    assert written[0].startswith("Mask causal. ")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, smollm2):
    """A small saved model with a real tokenizer, without the settings file of ismdata."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def record(folder, mask):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ismdata_mask": mask}))


@pytest.mark.slow
def test_opening_a_model(folder):
    with pytest.raises(UsageError, match=r"config.json records no ismdata_mask.*--mask causal"):
        open_chat(folder)
    assert not (folder / SETTINGS_NAME).exists()
    session = open_chat(folder, mask="causal", max_new_tokens=3)  # with its tokenizer's own template
    assert session.mask == "causal"
    assert len(session.fed) == 0
    session.reply("Hello")
    assert session.encoder.decode(session.fed).startswith("<|im_start|>")
    record(folder, "ism")
    assert open_chat(folder).mask == "ism"
    assert open_chat(folder, mask="prefix").mask == "prefix"


def test_an_unknown_mask(folder):
    record(folder, "slanted")
    with pytest.raises(DataError, match=r"config.json: ismdata_mask is 'slanted'; expected one of ism, causal, prefix"):
        open_chat(folder)
    assert open_chat(folder, mask="ism").mask == "ism"


def test_a_question_longer_than_the_models_positions(folder):
    session = open_chat(folder, mask="ism")
    shown = terminal(session, ["word " * 100])
    assert "would have" in shown
    assert "the model has 64 positions, which must hold the answer too. Say less" in shown
    assert session.messages == []


@pytest.mark.slow
def test_the_command_line(folder):
    from typer.testing import CliRunner

    from ismdata.cli.main import app

    def run(*options, lines=""):
        return CliRunner().invoke(app, ["chat", str(folder), *options], input=lines)

    assert run().exit_code == 2
    record(folder, "ism")
    done = run("--max-new-tokens", "2", "--when-full", "drop-oldest", "--context", "60", lines="Hi\n/undo\n\n/exit\n")
    assert done.exit_code == 0, done.output
    assert "Mask ism. /help" in done.output
    assert "Removed 'Hi'" in done.output
    other = run("--mask", "causal", "--top-k", "3", "--min-p", "0.1", "--repetition-penalty", "1.1", lines="")
    assert "Mask causal (the model was trained under ism)" in other.output
    refused = run("--context", "65")
    assert refused.exit_code == 2
    assert "--context is 65; expected at most the model's 64 positions" in refused.output
    record(folder, "slanted")
    assert run().exit_code == 1


def test_a_python_session_with_a_tokenizer_of_transformers(folder):
    from transformers import AutoTokenizer

    import ismdata

    model = model_folder.load(folder, mask="ism")
    session = ismdata.Session(model.eval(), AutoTokenizer.from_pretrained(folder), max_new_tokens=3)
    pieces = list(session.ask("Hello"))
    assert "".join(pieces) == session.messages[-1]["content"]
    assert open_chat(folder, mask="ism", max_new_tokens=3).reply("Hello") == "".join(pieces)
    assert attention.detach(model) is None
    with pytest.raises(UsageError, match="not attached"):
        ismdata.Session(tiny_model(), CharacterEncoder())

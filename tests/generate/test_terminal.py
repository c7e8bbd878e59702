"""The terminal with a scripted model: commands, Ctrl-C, error messages."""

from __future__ import annotations

import signal

import pytest

from ismdata.generate.session import Session
from ismdata.generate.terminal import COMMANDS, run_terminal
from ismdata.generate.window import Window
from tests.generate.test_session import TWO_TURNS, session_of
from tests.support.scripted import END, CharacterEncoder, ScriptedModel


class ScriptedScreen:
    """Reads these lines, of which exceptions are raised, and keeps what is shown: answers, and other lines."""

    keys = "Keys."

    def __init__(self, lines, *, interactive=True):
        self.lines, self.interactive = iter(lines), interactive
        self.answers, self.said, self.errors, self.shown = "", [], [], ""

    def read(self):
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def answer(self, piece):
        self.answers += piece
        self.shown += piece

    def end_answer(self):
        self.answer("\n")

    def say(self, text, *, is_error=False):
        (self.errors if is_error else self.said).append(text)
        self.shown += text + "\n"


def terminal(chat, lines):
    """All that a terminal shows for these lines."""
    screen = ScriptedScreen(lines)
    run_terminal(chat, screen)
    return screen.shown.split("\n", 1)[1]  # after the greeting


def test_the_terminal_loop():
    chat, _, _ = session_of([*TWO_TURNS, 4, END, 0])
    assert terminal(chat, ["ab", "  ", "c", "/new", "d", "/exit", "never read"]) == "hi\nj\nNew conversation.\ne\n"
    assert len(chat.messages) == 2


def test_ctrl_c_at_the_prompt_says_how_to_leave():
    chat, _, _ = session_of(TWO_TURNS)
    assert terminal(chat, ["ab", KeyboardInterrupt(), "c"]) == "hi\nCtrl-D or /exit leaves.\nj\n"


def test_ctrl_c_ends_a_pipe():
    chat, _, _ = session_of(TWO_TURNS)
    screen = ScriptedScreen(["ab", KeyboardInterrupt(), "c"], interactive=False)
    with pytest.raises(KeyboardInterrupt):
        run_terminal(chat, screen)
    assert screen.answers == "hi\n"


def test_answers_are_apart_from_all_else_and_errors_are_counted():
    """What a pipe gets: the answers, one after the other, each with a line break."""
    chat, _, _ = session_of([7, 8, END, 0, 99, 0, 9, END, 0], max_positions=40)
    lines = ["ab", "", "c", "/undo", "/quit", "a" * 50, "d"]
    screen = ScriptedScreen(lines, interactive=False)
    assert run_terminal(chat, screen) == 2
    assert screen.answers == "hi\n\nj\n"
    assert screen.said == ["Mask ism. /help lists the commands, /exit leaves.", "Removed 'c' and what followed."]
    assert screen.errors[0].startswith("/quit: ")
    assert "would have" in screen.errors[1]


def test_the_terminal_continues_after_a_conversation_that_is_too_long():
    chat, _, _ = session_of(TWO_TURNS, max_positions=12)
    shown = terminal(chat, ["ab", "abc", "c"])
    assert "would have 12 tokens" in shown
    assert shown.endswith("j\n")


def test_ctrl_c_ends_the_answer_between_two_tokens():
    chat, model, _ = session_of([7, 8, 9, 10, 11, END])
    former = signal.getsignal(signal.SIGINT)
    forward = model.forward

    def interrupted_forward(**kwargs):
        output = forward(**kwargs)
        if len(model.calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return output

    model.forward = interrupted_forward
    assert terminal(chat, ["a"]) == "hi\n"
    assert chat.fed == [80, 0, 81, 7, 8, END]
    assert signal.getsignal(signal.SIGINT) is former


def press_in_call(model, number, times=1):
    """Press Ctrl-C during this forward of the model."""
    forward, presses = model.forward, [times]

    def pressed(**kwargs):
        if len(model.calls) == number and presses:
            for _ in range(presses.pop()):
                signal.raise_signal(signal.SIGINT)  # in this thread, so it is here now
        return forward(**kwargs)

    model.forward = pressed


def test_a_second_ctrl_c_stops_a_prefill():
    """The conversation is as before the question, and the next turn feeds it again."""
    chat, model, _ = session_of([*TWO_TURNS, 3, END, 0])
    press_in_call(model, 4, times=2)
    model.script = [7, 8, END, 0, 0, 0, 9, END]
    shown = terminal(chat, ["ab", "c", "d"])
    assert shown == "hi\nStopped. The question is not part of the conversation.\nj\n"
    assert [message["content"] for message in chat.messages] == ["ab", "hi", "d", "j"]
    assert chat.fed == [80, 0, 1, 81, 7, 8, END, 80, 3, 81, 9, END]


def test_a_second_ctrl_c_while_the_answer_is_being_ended():
    """The answer's end of turn is in a part of the layers then: the cache is fed again."""
    chat, model, _ = session_of([7, 8, 9, 10, END])
    press_in_call(model, 2)
    press_in_call(model, 3)
    assert terminal(chat, ["a"]) == "hi\nStopped. The question is not part of the conversation.\n"
    assert (chat.fed, chat.messages) == ([], [])


@pytest.fixture
def python_handles_ctrl_c():
    """As in the foreground: a process in the background of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_in_a_pipe_is_not_caught():
    chat, model, _ = session_of([7, 8, 9, END])
    press_in_call(model, 2)
    screen = ScriptedScreen(["a"], interactive=False)
    with pytest.raises(KeyboardInterrupt):
        run_terminal(chat, screen)
    assert screen.answers == "h\n"


def test_commands(tmp_path):
    """A conversation with all of them: the output, and the remaining messages."""
    session, model, _ = session_of([*TWO_TURNS, 5, END, 0])
    path = tmp_path / "my talk.jsonl"
    shown = terminal(session, ["ab", f"/save {path}", "c", "/undo", "/undo", "/undo", f"/load '{path}'"])
    assert shown == (
        f"hi\nWrote 2 messages to {path}.\nj\n"
        "Removed 'c' and what followed.\nRemoved 'ab' and what followed.\nNothing to remove.\n"
        f"Read 2 messages from {path}.\n"
    )
    model.script = [0, 0, 5, END]
    assert terminal(session, ["d"]) == "f\n"
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
    assert shown.endswith("\nj\n")
    assert model.calls[4][1] == 7  # the cache was kept


def test_help_lists_every_command():
    session, _, _ = session_of([])
    shown = terminal(session, ["/help"])
    expected = [*(command.split()[0] for command in COMMANDS), "Keys."]
    assert [line.split()[0] for line in shown.strip().splitlines()] == expected


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_does_nothing(line):
    session, model, _ = session_of(TWO_TURNS)
    assert terminal(session, [line]) == ""
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
    session, _, _ = session_of([], mask="causal")
    for trained, greeting in (("ism", "Mask causal (the model was trained under ism)."), ("causal", "Mask causal. ")):
        screen = ScriptedScreen(["/exit", "never read"])
        run_terminal(session, screen, trained=trained)
        assert screen.said[0].startswith(greeting)

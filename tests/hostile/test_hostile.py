"""Hostile text, templates and files: no text becomes a control token, no template hangs, no code runs."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

import ismdata
from ismdata.attention.model_folder import load
from ismdata.attention.models.loading import pretrained
from ismdata.errors import DataError
from ismdata.rendering import chat_template as templates
from ismdata.rendering.chat_template import ChatTemplate, built_in
from ismdata.rendering.control_tokens import ControlTokens
from ismdata.rendering.sandbox import limited
from ismdata.rendering.template_environment import template_environment
from ismdata.rendering.template_probe import probe_template
from ismdata.rendering.tokenizer import load_pretrained
from tests.support.tiny import tiny_model

# ---- templates ----

#: Each of these would run for hours, fill the memory, or print internals.
BOMBS = {
    "a loop in a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a writing loop": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "multiplied": "{{ 'x' * 10000000000 }}",
    "multiplied later": "{% set n = 10000000000 %}{{ 'x' * n }}",
    "a list multiplied": "{{ ([1] * 10000000000)|length }}",
    "squared again": "{% set n = namespace(n=7) %}{% for i in range(99) %}{% set n.n = n.n*n.n %}{% endfor %}",
    "doubled again": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s~n.s %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a power of names": "{% set n = 9 %}{% if (n)**n %}{% endif %}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent too wide to count": "{{ '%99999999999999999999d' % 1 }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "center": "{{ 'x'|center(10000000000) }}",
    "a long text": "{{ 'x' * 5000000 }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "a range": "{{ range(10000000000)|list }}",
    "a long refusal": "{{ raise_exception('x' * 1000000) }}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "a class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "itself": "{{ self.__init__.__globals__ }}",
    "a changed conversation": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_hostile_template_is_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    template = ChatTemplate(name="bad.jinja", source=source, special_tokens={}, arguments={})
    with pytest.raises(DataError, match=r"^chat template bad\.jinja: .*--chat-template FILE") as refusal:
        probe_template(template, ControlTokens([]))
    assert len(str(refusal.value)) < 1000
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_with_keyword_arguments_takes_no_power() -> None:
    source = "{% macro m(b, a) %}{% endmacro %}{{ m(**{'a': 1}) }}{{ m(1, ** {'a': 1}) }}" + built_in("chatml")
    template = ChatTemplate(name="t", source=source, special_tokens={}, arguments={})
    assert probe_template(template, ControlTokens([]))[1].prefix_stable


def test_a_long_conversation_has_more_time_and_text() -> None:
    template = ChatTemplate(name="t", source=built_in("chatml"), special_tokens={}, arguments={})
    talk = [{"role": ("user", "assistant")[k % 2], "content": ""} for k in range(50_000)]
    assert len(template.render(talk)) > templates._CHARACTERS
    assert len(template.render([{"role": "user", "content": "x" * (2 * templates._CHARACTERS)}])) > 2 << 20


def test_one_module_runs_templates_and_in_a_sandbox() -> None:
    """The others use jinja2 to parse templates, and for its errors."""
    taken, called = set(), set()
    for path in Path(ismdata.__file__).parent.rglob("*.py"):
        if path.name == "template_environment.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("jinja2") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jinja2"):
                taken |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("nvironment()"):
                called.add(node.attr)
    assert taken <= {"TemplateSyntaxError", "TemplateError", "nodes", "ImmutableSandboxedEnvironment"}
    assert called == {"lex", "parse"}
    assert isinstance(template_environment(), ImmutableSandboxedEnvironment)


# ---- limits ----


def spin() -> None:
    while True:
        pass


def test_work_within_the_limits_is_not_stopped() -> None:
    assert limited(lambda: 5, seconds=10, memory=1 << 30) == 5
    with pytest.raises(KeyError):
        limited(lambda: {}["x"], seconds=10, memory=1 << 30)


def test_out_of_time_in_any_thread() -> None:
    found: list[object] = []

    def run() -> None:
        try:
            limited(spin, seconds=0.05, memory=1 << 30)
        except TimeoutError as error:
            found.append(str(error))
        found.append(sum(range(100_000)))  # nothing arrives late

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["took more than 0.05 s", sum(range(100_000))] * 2


def test_code_that_catches_every_error_is_stopped_too() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):  # what a template engine does around attribute lookups
                spin()

    with pytest.raises(TimeoutError):
        limited(stubborn, seconds=0.05, memory=1 << 30)


def test_an_alarm_of_the_caller_still_fires() -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(TimeoutError):
            limited(spin, seconds=0.1, memory=1 << 30)
        for _ in range(500):
            if rung:
                break
            time.sleep(0.01)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits an address space")
def test_out_of_memory() -> None:
    with pytest.raises(MemoryError):
        limited(lambda: bytearray(1 << 32), seconds=10, memory=1 << 30)
    assert limited(lambda: len(bytearray(1 << 20)), seconds=10, memory=1 << 30) == 1 << 20


# ---- models and tokenizers bring no code ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


LOADERS = {
    "train": lambda folder: pretrained(str(folder)),
    "chat": lambda folder: load(folder, mask="ism"),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_model_that_is_a_pickle_is_not_opened(model_folder: Path, tmp_path: Path, load: Any, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")  # a pickle that would run a command
    with pytest.raises(DataError, match=rf"the weights are a pickle \({name}\).*expected model\.safetensors"):
        load(folder)


BROKEN = {
    "model.safetensors": b"\xff" * 100,
    "config.json": b"[" * 100_000,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("name", [*BROKEN, "auto_map", "a model of its own"])
def test_a_broken_or_foreign_model_is_an_error(model_folder: Path, tmp_path: Path, load: Any, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    if name in BROKEN:
        (folder / name).write_bytes(BROKEN[name])
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
        config["model_type"] = "llama" if name == "auto_map" else "evil"
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if name == "auto_map":
        load(folder)  # transformers has a class of its own for it
    else:
        with pytest.raises(DataError, match=f"^{re.escape(str(folder))}: "):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
    ],
    ids=range(6),
)
def test_a_hostile_tokenizer_is_an_error(smollm2: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(smollm2, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    if content is None:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
        content = json.dumps(config).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()

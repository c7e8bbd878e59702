"""README.md of a trained model: what it comes from, how to load it, its data, options and evaluation.

The card is meant to be published. It names models, corpora and folders by their names and holds no path of the machine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from ismdata import __version__
from ismdata.attention import PRESETS
from ismdata.data import PackedDataset, source_of
from ismdata.display import printable
from ismdata.train.metrics import CURVES_NAME
from ismdata.train.options import TrainOptions

CARD_NAME = "README.md"

#: A model's name on the hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: A folder of huggingface_hub's cache.
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")

#: A licence as the hub writes it.
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")

#: The quantization at the end of a GGUF file's name.
_QUANTIZATION = re.compile(r"[.-]((I?Q\d\w*)|BF16|F16|F32)$", re.IGNORECASE)

_HUB = "https://huggingface.co/"

#: Sources that the card lists.
_LISTED_SOURCES = 20

_COUNTED = ("conversations", "documents", "sequences", "tokens", "target_tokens")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What a run started from, as far as it can be told to others.

    Attributes:
        name: Its name, without a path.
        hub_name: Its name on the hub, if that is known.
        licence: Its licence as the hub writes it, if that is known.
    """

    name: str
    hub_name: str | None = None
    licence: str | None = None


def describe_base(model: str) -> BaseModel:
    """Describe the model that a run starts from.

    Args:
        model: A preset, a model folder, a GGUF file or a hub name.

    Returns:
        The name of a hub model or a preset; for a folder what its own card says, for a GGUF file what its metadata say.
    """
    path = Path(model)
    if model in PRESETS and not path.exists():
        return BaseModel(name=model)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if path.is_dir():
        return _of_folder(path.resolve())
    hub_name = model if _HUB_NAME.fullmatch(model) else None
    return BaseModel(name=_one_line(Path(model).name), hub_name=hub_name)


def _of_folder(folder: Path) -> BaseModel:
    cached = _CACHED.search(f"{folder.as_posix()}/")
    try:
        card = metadata_load(folder / CARD_NAME) or {}
    except (OSError, ValueError, YAMLError):  # no card, or one that is not YAML
        card = {}
    card = card if isinstance(card, dict) else {}
    licence = _licence(card.get("license"))
    if cached:
        return BaseModel(name=cached[2], hub_name=f"{cached[1]}/{cached[2]}", licence=licence)
    base = card.get("base_model")
    tags = card.get("tags")
    if isinstance(tags, list) and "ismdata" in tags and isinstance(base, str) and _HUB_NAME.fullmatch(base):
        return BaseModel(name=base.rpartition("/")[2], hub_name=base, licence=licence)
    return BaseModel(name=_one_line(folder.name), licence=licence)


def _of_gguf(path: Path) -> BaseModel:
    """From the metadata that llama.cpp's converter writes (`general.…`)."""
    name = _QUANTIZATION.sub("", _one_line(path.stem))
    try:
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        found = {key: fields[key].contents() for key in fields if key.startswith("general.")}
    except (ImportError, OSError, ValueError):  # the model could be loaded, so its metadata are of another version
        return BaseModel(name=name)
    texts = {key: value for key, value in found.items() if isinstance(value, str)}
    return BaseModel(name=name, hub_name=_gguf_hub_name(name, texts), licence=_licence(texts.get("general.license")))


def _gguf_hub_name(name: str, texts: Mapping[str, str]) -> str | None:
    """The model on the hub that a GGUF file was converted from.

    >>> _gguf_hub_name("x", {"general.source.huggingface.repository": "org/model"})
    'org/model'
    >>> facts = {"general.organization": "Org", "general.basename": "smol", "general.size_label": "135M"}
    >>> _gguf_hub_name("Smol-135M-Instruct", facts)
    'Org/Smol-135M-Instruct'
    >>> _gguf_hub_name("renamed", facts)
    """
    keys = ("source.huggingface.repository", "source.repo_url", "repo_url", "base_model.0.repo_url", "name")
    for key in keys:
        candidate = texts.get(f"general.{key}", "").removeprefix(_HUB).rstrip("/")
        if _HUB_NAME.fullmatch(candidate):
            return candidate
    # A file is named like its model by convention; the metadata must agree that it was not renamed.
    parts = (texts.get(f"general.{key}", "") for key in ("basename", "size_label"))
    candidate = f"{texts.get('general.organization', '')}/{name}"
    if _HUB_NAME.fullmatch(candidate) and all(part and part.lower() in name.lower() for part in parts):
        return candidate
    return None


def _licence(found: object) -> str | None:
    text = found.lower() if isinstance(found, str) else ""
    return text if _LICENCE.fullmatch(text) else None


def _one_line(text: str) -> str:
    """A name that may hold anything, as one line of Markdown that cannot mean anything else."""
    plain = " ".join(printable(text).split()) or "unnamed"
    return re.sub(r"[`|<>\[\]*]", "-", plain)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says.

    Attributes:
        output: The output folder, of which the card has the name.
        options: The run's options.
        dataset: The shards.
        mask: The mask that the model was trained under.
        global_batch: Sequences per step.
        facts: Rows of the first table, title to value.
        evaluation: Metrics on the evaluation set, name to value.
    """

    output: Path
    options: TrainOptions
    dataset: PackedDataset
    mask: str
    global_batch: int
    facts: Mapping[str, str]
    evaluation: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write README.md into `folder`."""
        base = describe_base(self.options.model)
        parts = [
            f"# {base.name} · {self.mask}",
            self._introduction(base),
            _table(self.facts),
            f"![Loss, gradient norm and learning rate]({CURVES_NAME})" if (folder / CURVES_NAME).exists() else "",
            self._loading(base),
            self._data(),
            self._evaluation(),
            self._options(base),
        ]
        text = f"---\n{self._metadata(base)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
        (folder / CARD_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")

    @property
    def name(self) -> str:
        """The output folder's name."""
        return self.output.resolve().name

    def _metadata(self, base: BaseModel) -> str:
        title = f"{base.name} · {self.mask}"
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="ismdata",
                dataset_name=self._evaluated_on(),
                metric_type=name,
                metric_value=round(value, 4),
            )
            for name, value in self.evaluation.items()
        ]
        data = ModelCardData(
            license=base.licence,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ismdata", self.mask],
            base_model=base.hub_name,
            model_name=title if results else None,
            eval_results=results or None,
        )
        return f"{data.to_yaml().strip()}\n"

    def _introduction(self, base: BaseModel) -> str:
        if base.name in PRESETS and base.hub_name is None:
            origin = f"A model of the shape `{base.name}`, trained from scratch"
        elif base.hub_name:
            origin = f"[{base.hub_name}]({_HUB}{base.hub_name}), trained further"
        else:
            origin = f"{base.name}, trained further"
        return (
            f"{origin} under the attention mask `{self.mask}` with ismdata {__version__}. **Load it through ismdata**: "
            "other programs ignore the mask in\n`config.json` and run the model under the causal one."
        )

    def _loading(self, base: BaseModel) -> str:
        name = json.dumps(self.name)
        text = f"""## Use

```python
from ismdata import Session
from ismdata.attention import load
from ismdata.rendering import ConversationEncoder

folder = {name}
model = load(folder)  # attached: it also takes the batches of ismdata's Collator
session = Session(model, ConversationEncoder.load(folder), max_new_tokens=64)
print(session.reply("Hello!"))
```

In the terminal: `ismdata chat FOLDER`."""
        if not self.options.lora:
            return text
        origin = json.dumps(base.hub_name or base.name)
        return f"""{text}

The adapters are merged into the model. `adapter/` has them alone, for the base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ismdata import attach

base = attach(AutoModelForCausalLM.from_pretrained({origin}), mask="{self.mask}")
model = PeftModel.from_pretrained(base, {name} + "/adapter")
```"""

    def _data(self) -> str:
        index = self.dataset.shards.index
        totals = index.get("totals", {})
        counts = ", ".join(f"{totals[name]:,} {name.replace('_', ' ')}" for name in _COUNTED if name in totals)
        template = index.get("chat_template", {}).get("name", "unknown")
        length = f"in sequences of {self.dataset.seq_len:,} tokens"
        text = (
            f"## Data\n\n{counts or 'Unknown totals'}, {length}.\nThe tokenizer, "
            f"`{_public(index['tokenizer'].get('name', 'unknown'))}`, is in this folder with the chat template "
            f"`{_public(template)}`. SHA-256 of the shards' index:\n`{index['sha256']}`."
        )
        sources = _conversations_by_source(self.dataset)
        rows = {_one_line(name): f"{count:,}" for name, count in sources.most_common(_LISTED_SOURCES)}
        if len(sources) > _LISTED_SOURCES:
            rest = sources.total() - sum(count for _, count in sources.most_common(_LISTED_SOURCES))
            rows[f"{len(sources) - _LISTED_SOURCES} more"] = f"{rest:,}"
        return text + ("\n\n" + _table(rows, "corpus", "conversations") if rows else "")

    def _evaluated_on(self) -> str:
        return _public(self.options.eval or "")

    def _evaluation(self) -> str:
        if not self.evaluation:
            return ""
        rows = {name.replace("_", " "): f"{value:,.4f}" for name, value in self.evaluation.items()}
        return f"## Evaluation\n\nOn `{self._evaluated_on()}`, after the last step:\n\n{_table(rows)}"

    def _options(self, base: BaseModel) -> str:
        shown = {name: value for name, value in self.options.as_dict().items() if value not in (None, False, (), {})}
        shown |= {"global_batch": self.global_batch, "mask": self.mask, "model": base.hub_name or base.name}
        unused = {"epochs"} if self.options.steps is not None else set()
        unused |= set() if self.options.lora else {"lora_rank", "lora_alpha"}
        sharding = shown.pop("fsdp_config", {})
        lines = [f"{name} = {_toml(value)}" for name, value in sorted(shown.items()) if name not in unused]
        if sharding:
            lines += ["", "[fsdp_config]", *(f"{name} = {_toml(value)}" for name, value in sorted(sharding.items()))]
        given = "\n".join(lines)
        return (
            "## Options\n\nA `--config` file for the same run, in which models and folders have their names only; "
            f"`run.json` records what its\nresult depends on.\n\n```toml\n{given}\n```"
        )


def _table(rows: Mapping[str, str], *head: str) -> str:
    lines = [
        f"| {' | '.join(head) or ' | '} |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines)


def _conversations_by_source(dataset: PackedDataset) -> Counter[str]:
    """Conversations of each corpus that their ids name."""
    import pyarrow.compute as pc

    shards = dataset.shards
    ids: set[str] = set()
    for number in range(len(shards.files)):
        ids.update(pc.unique(pc.list_flatten(shards.table(number).column("conversation_ids"))).to_pylist())
    conversations = {each.rpartition("#")[0] if re.search(r"#\d+$", each) else each for each in ids}
    found: Counter[str] = Counter(name for name in map(source_of, conversations) if name is not None)
    return Counter({name: count for name, count in found.items() if count > 1})


def _public(value: str) -> str:
    """A name without the folders of this machine: of a path its last part, a hub name whole."""
    if _HUB_NAME.fullmatch(value) and not Path(value).exists():
        return value
    return _one_line(Path(value).resolve().name if "/" in value or value in (".", "..") else value)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        value = _public(value)
    elif isinstance(value, Sequence):
        value = list(value)
    return json.dumps(value, ensure_ascii=False)

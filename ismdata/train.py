"""Train a model on packed shards with Hugging Face's Trainer. Read `train` top to bottom.

The output folder holds the model (safetensors, with the mask in config.json as `ismdata_mask`), the shards' tokenizer,
`metrics.csv` and `checkpoints/`. It is written as `.NAME.partial` beside its final name and renamed last; a run that
breaks off leaves that folder behind if it had reached a checkpoint, and nothing otherwise.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ismdata.attention import attach, attached_backend, refuse_pickles
from ismdata.canary import check_training
from ismdata.collate import IGNORE_INDEX, Collator, check_mask
from ismdata.dataset import PackedDataset
from ismdata.errors import DataError, UsageError
from ismdata.folders import check_output, make_partial, put_in_place
from ismdata.glm import check_layout
from ismdata.lock import locked
from ismdata.presets import PRESETS, preset_model

METRICS_NAME = "metrics.csv"
METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "seconds")
CHECKPOINTS_NAME = "checkpoints"
TOKENIZER_NAME = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did. The losses are that of the first step, and the mean over the last steps that were logged."""

    output: Path
    mask: str
    backend: str
    parameters: int
    steps: int
    first_loss: float
    last_loss: float
    tokens: int
    target_tokens: int
    seconds: float
    device: str
    dtype: str


def train(
    packed: Path,
    *,
    model: str,
    output: Path,
    mask: str | None = None,
    backend: str = "auto",
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 4,
    accumulation: int = 1,
    learning_rate: float = 3e-4,
    warmup: int = 20,
    seed: int = 0,
    log_every: int = 10,
    save_every: int = 500,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> TrainReport:
    """Train `model` on the sequences of `packed` and save it to `output`.

    model: a preset (`presets.py`), a local folder, a GGUF file or a hub name. mask: None for the one that the shards
    were packed for. backend: of attention (`backends.py`). steps: optimizer steps, else `epochs` over the data. One
    step sees batch_size x accumulation sequences. The loss is the mean over all targets of a step. float32 on a CPU,
    bfloat16 autocast on a GPU. Raises UsageError, DataError and UnsupportedModelError before any training,
    with nothing left behind.
    """
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _check_numbers(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        log_every=log_every,
        epochs=epochs,
        learning_rate=learning_rate,
        warmup=warmup,
    )
    dataset = PackedDataset(packed)
    mask = dataset.mask if mask is None else mask
    collator = Collator(mask)
    check_mask(mask, packed_mask=dataset.mask)
    if len(dataset) == 0:
        raise DataError(f"{packed}: no sequences; expected at least one to train on. Look at its quarantine.jsonl")
    tokenizer_files = _tokenizer_files(packed)
    with _training_folder(output, packed=packed, overwrite=overwrite) as folder:
        set_seed(seed)
        trained = open_model(model, dataset)
        check_layout(trained, model, layout=dataset.layout)
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        attach(trained, backend, mask, device=device, autocast=torch.bfloat16 if on_gpu else None)
        check_training(trained, device=device, autocast=torch.bfloat16 if on_gpu else None)
        backend = attached_backend(trained)
        log = _MetricsLog(folder / METRICS_NAME, say=None if on_terminal else say)
        trainer = _CountingTrainer(
            model=trained,
            args=TrainingArguments(
                output_dir=str(folder / CHECKPOINTS_NAME),
                max_steps=-1 if steps is None else steps,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=warmup,
                seed=seed,
                data_seed=seed,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                dataloader_pin_memory=on_gpu,
                remove_unused_columns=False,  # the intervals are no parameters of the model's forward
                logging_steps=log_every,
                save_steps=save_every,
                save_total_limit=2,
                disable_tqdm=not on_terminal,
                report_to=[],
            ),
            data_collator=replace(collator, tables=backend == "varlen"),
            train_dataset=dataset,
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        log.count = trainer.counts
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        trained.save_pretrained(folder)
        for file in tokenizer_files:
            shutil.copy2(file, folder / file.name)
        if not any((folder / CHECKPOINTS_NAME).glob("checkpoint-*")):
            shutil.rmtree(folder / CHECKPOINTS_NAME, ignore_errors=True)
    tokens, target_tokens = trainer.counts()
    return TrainReport(
        output=output,
        mask=mask,
        backend=backend,
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        steps=trainer.state.global_step,
        first_loss=log.losses[0],
        last_loss=log.losses[-1],
        tokens=tokens,
        target_tokens=target_tokens,
        seconds=seconds,
        device=str(trained.device),
        dtype="bfloat16" if on_gpu else "float32",
    )


def open_model(name: str, dataset: PackedDataset) -> PreTrainedModel:
    """The model to start from, in float32, checked to have room for the shards' tokens and documents.

    name: a preset, a local folder, a GGUF file or a hub name. Raises DataError with what to do.
    """
    index = dataset.shards.index["tokenizer"]
    vocab_size: int = index["vocab_size"]
    if name in PRESETS:
        return preset_model(
            name,
            vocab_size=vocab_size,
            seq_len=dataset.seq_len,
            pad_token_id=index.get("pad_id"),
            bos_token_id=None,
            eos_token_id=index.get("eos_id"),
        )
    model = _pretrained(name)
    room = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if vocab_size > room:
        raise DataError(
            f"{name}: the model knows {room} tokens and the shards' tokenizer has {vocab_size}. Pack with the model's "
            "own tokenizer, or resize the model's embeddings and save it"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = _longest_document(dataset)
    if positions is not None and longest > positions:
        raise DataError(
            f"{name}: the model has {positions} positions and the longest document {longest} tokens. "
            f"Pack again with --seq-len {positions // 128 * 128} or less"
        )
    return model


def _pretrained(name: str) -> PreTrainedModel:
    path = Path(name)
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"{name}: no such file; expected a GGUF file")
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif path.is_file():
        raise DataError(f"{name}: is a file; expected a preset, a model folder, a .gguf file or a hub name")
    else:
        source["use_safetensors"] = True
        refuse_pickles(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    except ImportError as error:
        raise DataError(f"{name}: cannot be loaded without another package ({error}). Try: pip install gguf") from error
    except Exception as error:  # broken files make the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: no model could be loaded ({first}). Expected a preset ({', '.join(PRESETS)}), a model folder "
            "with safetensors, a .gguf file, or a hub name that this machine can reach"
        ) from error
    return _plain(model) if path.suffix == ".gguf" else cast(PreTrainedModel, model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model as if it had never been a GGUF file: its weights are float32 by now, but it is marked as quantized."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain


def _longest_document(dataset: PackedDataset) -> int:
    """Tokens in the longest document, read off the columns."""
    import pyarrow.compute as pc

    shards = dataset.shards
    columns = (shards.table(number).column("seq_lens") for number in range(len(shards.files)))
    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)


def _tokenizer_files(packed: Path) -> list[Path]:
    folder = packed / TOKENIZER_NAME
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise DataError(
            f"{folder}: no tokenizer files; expected those that `ismdata pack` saves. Pack the corpus again"
        )
    return files


def _check_numbers(*, steps: int | None, epochs: float, learning_rate: float, warmup: int, **at_least_one: int) -> None:
    for option, count in (at_least_one | ({} if steps is None else {"steps": steps})).items():
        if count < 1:
            raise UsageError(f"--{option.replace('_', '-')} is {count}; expected 1 or more")
    for name, value in (("epochs", epochs), ("learning-rate", learning_rate)):
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} is {value}; expected a number above 0")
    if warmup < 0:
        raise UsageError(f"--warmup is {warmup}; expected 0 or more")


@contextmanager
def _training_folder(final: Path, *, packed: Path, overwrite: bool) -> Iterator[Path]:
    """Yield `.NAME.partial` to write into, renamed to `final` on success; on an error kept only for its checkpoints."""
    partial = final.parent / f".{final.name}.partial"
    with locked(final):
        check_output(final, overwrite=overwrite, marker=METRICS_NAME, inputs=[packed])
        if partial.exists() and any(partial.iterdir()) and not overwrite:
            raise UsageError(
                f"{partial}: holds the checkpoints of a run that broke off; name another output, or pass --overwrite "
                "to replace it"
            )
        make_partial(partial, final)
        try:
            yield partial
            put_in_place(partial, final)
        except BaseException as error:
            if not any(partial.glob(f"{CHECKPOINTS_NAME}/checkpoint-*")):
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"{final}: writing failed ({error.strerror or error})") from error
            raise


class _CountingTrainer(Trainer):
    """The Trainer, counting the tokens and targets it was fed on the device, so that counting waits for nothing."""

    _counted: Tensor | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        positions = inputs["position_ids"]
        tokens = (positions > 0).sum()
        if "position_ids_2" not in inputs:
            # Padding is at position 0, as first tokens are; a document has a second token: those stand for the first.
            tokens = tokens + (positions == 1).sum()
        batch = torch.stack([tokens, (inputs["labels"] != IGNORE_INDEX).sum()])
        self._counted = batch if self._counted is None else self._counted + batch
        return super().compute_loss(model, inputs, *args, **kwargs)

    def counts(self) -> tuple[int, int]:
        """Tokens of documents and targets so far, this process."""
        if self._counted is None:
            return 0, 0
        tokens, target_tokens = self._counted.tolist()
        return tokens, target_tokens


class _MetricsLog(TrainerCallback):
    """Writes `metrics.csv`, a line at a time, and says the same in plain lines where there is no progress bar."""

    def __init__(self, path: Path, say: Callable[[str], None] | None) -> None:
        self.path = path
        self.say = say
        self.losses: list[float] = []
        self.count: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        with self.path.open("w", encoding="utf-8", newline="") as file:
            _writer(file).writeheader()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Besides every `log_every` steps, the first and the last step are logged."""
        if state.global_step in (1, state.max_steps):
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        tokens, target_tokens = self.count()
        seconds = time.monotonic() - self.started
        row = {
            "step": state.global_step,
            "tokens": tokens,
            "target_tokens": target_tokens,
            "seconds": round(seconds, 3),
        }
        row |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        self.losses.append(logs["loss"])
        with self.path.open("a", encoding="utf-8", newline="") as file:
            _writer(file).writerow(row)
        if self.say is not None:
            self.say(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"learning rate {logs.get('learning_rate', 0):.2e}  {tokens / max(seconds, 1e-9):,.0f} tokens/s"
            )


def _writer(file: TextIO) -> csv.DictWriter[str]:
    return csv.DictWriter(file, METRICS, lineterminator="\n")

"""Loading the model that a run starts from, checked against the shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata.attention.library_bars import library_bars
from ismdata.attention.models.adapters import merge_adapter
from ismdata.attention.models.presets import PRESETS, preset_model
from ismdata.attention.models.source import check_source, is_adapter
from ismdata.data import PackedDataset
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError
from ismdata.rendering import Tokenizer, check_model_name, load_pretrained

#: The folder with the tokenizer inside a packed folder.
TOKENIZER_NAME = "tokenizer"


def open_model(name: str, dataset: PackedDataset, *, reporter: Reporter = LOGGED) -> PreTrainedModel:
    """Open the model to start from, and check that it fits the shards' tokens and documents.

    Args:
        name: A preset, a model folder, a GGUF file or a hub name.
        dataset: The shards.
        reporter: Receives the progress of loading.

    Returns:
        The model in float32.

    Raises:
        DataError: if no model can be loaded, or it has too few tokens or positions, or another tokenizer.
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
    model = pretrained(name, reporter=reporter)
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if vocab_size > embeddings:
        raise DataError(
            f"{name}: the model has {embeddings} token embeddings; the shards' tokenizer has {vocab_size} tokens. Pack "
            "with the model's own tokenizer, or resize the model's embeddings and save it"
        )
    _check_tokenizer(name, dataset)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = _longest_document(dataset)
    if positions is not None and longest > positions:
        fits = positions // 128 * 128
        advice = f"Pack again with --seq-len {fits} or less" if fits else "Use a model with more positions"
        raise DataError(
            f"{name}: the model has {positions} positions; the longest document has {longest} tokens. {advice}"
        )
    return model


def pretrained(name: str, *, reporter: Reporter = LOGGED, **options: Any) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name: A model folder, a folder of peft's adapters, which are merged, a GGUF file or a hub name.
        reporter: Receives the progress of loading.
        options: Passed to `from_pretrained`; the dtype is float32 unless it is among them.

    Returns:
        The model.

    Raises:
        DataError: if no model can be loaded, or its weights are a pickle.
        UnsupportedModelError: if the folder has virtual tokens of peft.
    """
    path = Path(name)
    check_source(name)
    if is_adapter(path):
        return merge_adapter(path, partial(pretrained, reporter=reporter, **options))
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        source["use_safetensors"] = True
        source["local_files_only"] = check_model_name(name)
    try:
        with library_bars(reporter):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, **{"dtype": torch.float32} | options, trust_remote_code=False, output_loading_info=True
            )
    except ImportError as error:
        raise DataError(f"{name}: cannot be loaded without another package ({error}). Try: pip install gguf") from error
    except Exception as error:  # for a broken file the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: no model could be loaded ({first}). Expected a preset ({', '.join(PRESETS)}), a model folder "
            "with safetensors, a .gguf file, or a hub name that this machine can reach"
        ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise DataError(
            f"{name}: the weights lack {len(missing)} parameters of a {type(model).__name__} ({missing[0]}, …), which "
            "would be random. Save the whole model again, or name another one"
        )
    return _plain(model) if path.suffix == ".gguf" else cast(PreTrainedModel, model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that is not marked as quantized. Loading a GGUF file turns its weights into plain ones."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    nn.Module.to(plain, model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def _check_tokenizer(name: str, dataset: PackedDataset) -> None:
    """Raise DataError if the model has a tokenizer, and it tokenizes differently from the shards'.

    The same tokenizer may have other special tokens in its configuration; only the tokens that it makes count.
    """
    expected = dataset.shards.index["tokenizer"].get("sha256")
    try:
        pretrained = load_pretrained(name)
    except DataError:
        return  # the model has none
    own = Tokenizer(pretrained, name=name, template="")
    if own.sha256 == expected:
        return
    packed = dataset.shards.folder / TOKENIZER_NAME
    shards = Tokenizer(load_pretrained(str(packed)), name=str(packed), template="")
    if own.serialized == shards.serialized:
        return
    raise DataError(
        f"{name}: the model's tokenizer differs from the shards' (SHA-256 {own.sha256[:12]}…, expected "
        f"{str(expected)[:12]}…{_first_difference(own, shards)}). Pack the corpus with --tokenizer {name}"
    )


def _first_difference(own: Tokenizer, shards: Tokenizer) -> str:
    """Name the first token with different ids, for the message; empty if there is none."""
    ours, theirs = own.pretrained.get_vocab(), shards.pretrained.get_vocab()
    for token, id in sorted(theirs.items(), key=lambda each: each[1]):
        if ours.get(token) != id:
            return f"; {token!r} has the id {ours.get(token, 'none')} in the model's and {id} in the shards'"
    return ""


def _longest_document(dataset: PackedDataset) -> int:
    """Tokens of the longest document, from the shards' seq_lens columns."""
    import pyarrow.compute as pc

    shards = dataset.shards
    columns = (shards.table(number).column("seq_lens") for number in range(len(shards.files)))
    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)


def tokenizer_files(packed: Path) -> list[Path]:
    """List the files of the shards' tokenizer, which are saved with a model.

    Args:
        packed: A folder that `ismdata pack` wrote.

    Returns:
        The files, sorted.

    Raises:
        DataError: if there are none.
    """
    folder = packed / TOKENIZER_NAME
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise DataError(
            f"{folder}: no tokenizer files; expected those that `ismdata pack` saves. Pack the corpus again"
        )
    return files


def weights_digest(model: nn.Module) -> str:
    """Hash all parameters and buffers that a model is saved with: names, dtypes, shapes and values.

    Args:
        model: The model, on any device.

    Returns:
        XXH3-128 in hexadecimal.
    """
    digest = xxhash.xxh3_128()
    tensor: Tensor
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(dtype=torch.uint8).numpy().data)
    return digest.hexdigest()

"""The model that a run starts from: opened, checked against the shards, and made ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata.attention.models.presets import PRESETS, preset_model
from ismdata.data import PackedDataset
from ismdata.errors import DataError
from ismdata.rendering import Tokenizer, load_pretrained

TOKENIZER_NAME = "tokenizer"


def open_model(name: str, dataset: PackedDataset) -> PreTrainedModel:
    """The model to start from, in float32, checked to have the shards' tokens and room for their documents.

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
    model = pretrained(name)
    room = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if vocab_size > room:
        raise DataError(
            f"{name}: the model knows {room} tokens and the shards' tokenizer has {vocab_size}. Pack with the model's "
            "own tokenizer, or resize the model's embeddings and save it"
        )
    _check_tokenizer(name, dataset)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = _longest_document(dataset)
    if positions is not None and longest > positions:
        fits = positions // 128 * 128
        advice = f"Pack again with --seq-len {fits} or less" if fits else "Take a model with more positions"
        raise DataError(
            f"{name}: the model has {positions} positions and the longest document {longest} tokens. {advice}"
        )
    return model


def pretrained(name: str) -> PreTrainedModel:
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


def _check_tokenizer(name: str, dataset: PackedDataset) -> None:
    """Raise DataError where a model comes with a tokenizer and the shards were made with another one.

    The same tokenizer may have been loaded from another place or name other special tokens: what counts is that it
    makes the same tokens.
    """
    expected = dataset.shards.index["tokenizer"].get("sha256")
    try:
        pretrained = load_pretrained(name)
    except DataError:
        return  # the model comes without one
    own = Tokenizer(pretrained, name=name, template="")
    if own.sha256 == expected:
        return
    packed = dataset.shards.folder / TOKENIZER_NAME
    shards = Tokenizer(load_pretrained(str(packed)), name=str(packed), template="")
    if own.serialized == shards.serialized:
        return
    raise DataError(
        f"{name}: the model's tokenizer is another one than the shards' (SHA-256 {own.sha256[:12]}…, expected "
        f"{str(expected)[:12]}…{_first_difference(own, shards)}). Pack the corpus with --tokenizer {name}"
    )


def _first_difference(own: Tokenizer, shards: Tokenizer) -> str:
    ours, theirs = own.pretrained.get_vocab(), shards.pretrained.get_vocab()
    for token, id in sorted(theirs.items(), key=lambda each: each[1]):
        if ours.get(token) != id:
            return f"; {token!r} is {ours.get(token, 'unknown')} in the model's and {id} in the shards'"
    return ""


def _longest_document(dataset: PackedDataset) -> int:
    """Tokens in the longest document, read off the columns."""
    import pyarrow.compute as pc

    shards = dataset.shards
    columns = (shards.table(number).column("seq_lens") for number in range(len(shards.files)))
    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)


def tokenizer_files(packed: Path) -> list[Path]:
    """The files of the shards' tokenizer, which go with the model. Raises DataError where there are none."""
    folder = packed / TOKENIZER_NAME
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise DataError(
            f"{folder}: no tokenizer files; expected those that `ismdata pack` saves. Pack the corpus again"
        )
    return files


def refuse_pickles(folder: Path) -> None:
    """Raise DataError where a folder has weights as pickles only, which could run any code when they are loaded."""
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(kind))
    if pickles and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder}: the weights are a pickle ({pickles[0]}), which may run any code and is not loaded; expected "
            "model.safetensors. If you trust it, load it with transformers; its save_pretrained writes safetensors"
        )


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

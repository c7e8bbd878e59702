"""A tokenizer of a corpus's own, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable

from ismdata.errors import UsageError
from ismdata.rendering.chat_template import built_in
from ismdata.rendering.saved_tokenizer import SavedTokenizer

#: The control tokens, in the order of their ids 0, 1 and 2: padding, and ChatML's begin and end of a turn.
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

#: The smallest vocabulary: the control tokens, and one token per byte.
SMALLEST_VOCABULARY = 3 + 256


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> SavedTokenizer:
    """Train a byte-level BPE tokenizer with the template and the control tokens of ChatML. It can encode any text.

    The same texts give the same tokenizer, in any order.

    Args:
        texts: The corpus.
        vocab_size: Tokens of the vocabulary. There are fewer if the corpus has fewer pairs to merge.

    Returns:
        The tokenizer; `save_pretrained` writes a folder that transformers loads too.

    Raises:
        UsageError: If the vocabulary is smaller than one token per byte.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"] * 2, vocab_size=300)
        >>> tokenizer.backend_tokenizer.encode("to be").tokens
        ['to', 'Ġbe']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"--vocab-size {vocab_size}: expected at least {SMALLEST_VOCABULARY}: one token per byte, and three "
            "control tokens"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {"eos_token": TURN_END, "pad_token": END_OF_TEXT, "extra_special_tokens": [TURN_START]}
    return SavedTokenizer(backend, settings, built_in("chatml"))

"""A conversation and a chat template to tokens with spans.

The path of one conversation, in the order in which to read the files:

- `messages`: a canonical conversation to the messages that templates take.
- `chat_template`: renders messages, within the limits of `sandbox`. `template_probe` finds out how a template works.
- `renderer`: cuts a rendering into chunks, contexts and answers, with `answer_boundaries`.
- `tracing`: locates each text in a rendering. `conservation` checks that none is lost or misplaced.
- `pieces`: chunks to tokens, with `control_tokens` and `tokenizer`.
- `skeleton`: the pieces of all conversations with the same roles, rendered once; `sensitivity` finds the exceptions.
- `encoding`: a tokenizer with its template. `conversation_encoder`: the same for chat, turn by turn.

The names that other packages use are listed in `__init__.pyi` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

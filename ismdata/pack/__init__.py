"""Conversations to packed shards: render and tokenize, split what is too long, plan the sequences, write them.

The path of a batch of conversations, in the order in which to read the files:

- `pipeline`: the stages of `pack`, called one after another; `options` and `job` are what they share.
- `tokenize`: the first stage, batch by batch. `conversation_batch`: the columns of a batch.
- `requests`: which messages each document consists of. `documents`: makes the documents of a batch.
- `skeleton_cache`: pieces of documents by their roles, shared by the corpus. `individual`: those without a skeleton.
- `texts`: contents with what the template writes around them: the strings that the tokenizer gets.
- `batch_encoder`: texts to tokens, pieces to documents. `pieces` and `token_runs` are its tables.
- `splitting`: documents that are longer than a sequence. `template_check`: compares samples with the reference.
- `spool`: documents on disk until the plan is known. `planning/`: which documents share a sequence.
- `sequences`, `shard_writer`: documents to padded rows, rows to shards. `report`: the index and what is counted.
- `text_verification`: looks for each text of the conversations in the packed shards.

The names that other packages use are listed in `__init__.pyi` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

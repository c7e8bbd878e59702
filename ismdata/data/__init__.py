"""The folders that commands write and read: output folders, their index and journal, converted conversations, packed
shards, their verification, and the dataset and collator for training.

`__init__.pyi` lists the names that other packages import; they load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

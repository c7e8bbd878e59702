"""What lies on disk between the commands: folders written whole or not at all, their index, both shard formats, and the
dataset and collator that read them.

The names that other packages use are listed in `__init__.pyi` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

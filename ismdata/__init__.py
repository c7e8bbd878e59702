"""ismdata: multi-turn conversations to packed Arrow shards, and models trained with the Intermittent Semi-working Mask.

The public names are listed in `__init__.pyi` and load on first use, so that importing the package (and
`ismdata --help`) imports no torch.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

try:
    __version__ = version("ismdata")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+uninstalled"


def __dir__() -> list[str]:
    return sorted(__all__)

"""ismdata: multi-turn conversations to packed Arrow shards, and models trained with the Intermittent Semi-working Mask.

The public names are listed in `__init__.pyi` and load on first use, so that importing the package (and
`ismdata --help`) imports no torch.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

#: As in pyproject.toml. Asking the installed package for it would take 0.03 s at each start.
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted(__all__)

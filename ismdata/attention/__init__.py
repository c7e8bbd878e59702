"""The mask inside decoders of Hugging Face: `attach`, its backends, the checks that it works, models and presets.

The names that other packages use are listed in `__init__.pyi` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

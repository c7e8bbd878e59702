from .attention import attach as attach
from .data import Collator as Collator
from .data import PackedDataset as PackedDataset
from .generate import Session as Session
from .generate import answer_many as answer_many

__version__: str

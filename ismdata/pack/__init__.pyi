from .options import PackOptions as PackOptions
from .pipeline import pack as pack
from .planning.plan import lower_bound as lower_bound
from .planning.plan import plan as plan
from .report import PackReport as PackReport
from .text_verification import verify_conversations as verify_conversations
from .tokenize import tokenizer_texts as tokenizer_texts

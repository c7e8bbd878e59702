from .options import PackOptions as PackOptions
from .pipeline import PackReport as PackReport
from .pipeline import pack as pack
from .planning.plan import lower_bound as lower_bound
from .planning.plan import plan as plan
from .verify_texts import with_texts as with_texts

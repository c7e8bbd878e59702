from .pipeline import EvalOptions as EvalOptions
from .pipeline import run_eval as run_eval

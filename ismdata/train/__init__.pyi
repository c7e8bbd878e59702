from .options import TrainOptions as TrainOptions
from .options import read_options as read_options
from .pipeline import TrainReport as TrainReport
from .pipeline import train as train

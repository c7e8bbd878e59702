from .chunked_loss import TargetLoss as TargetLoss
from .chunked_loss import target_loss as target_loss
from .options import TrainOptions as TrainOptions
from .options import read_options as read_options
from .pipeline import TrainReport as TrainReport
from .pipeline import train as train

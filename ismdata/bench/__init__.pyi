from .attention.report import attention_table as attention_table
from .attention.run import run_attention_bench as run_attention_bench
from .data.run import DataBenchOptions as DataBenchOptions
from .data.run import run_data_bench as run_data_bench
from .latency.report import latency_table as latency_table
from .latency.run import LatencyOptions as LatencyOptions
from .latency.run import run_latency_bench as run_latency_bench
from .report import table as table

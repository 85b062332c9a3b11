from .bootstrap import Interval, interval_of_mean, mcnemar_exact
from .compare import Comparison, compare_files
from .records import read_records, write_records

__all__ = [
    "Comparison",
    "Interval",
    "compare_files",
    "interval_of_mean",
    "mcnemar_exact",
    "read_records",
    "write_records",
]

"""Predictions of an evaluation on disk, their intervals, and the comparison of two. Needs neither torch nor a model."""

from lightning_pmss.evaluation.bootstrap import Interval, interval_of_mean, mcnemar_exact
from lightning_pmss.evaluation.compare import Comparison, compare_files
from lightning_pmss.evaluation.records import read_records, write_records

__all__ = [
    "Comparison",
    "Interval",
    "compare_files",
    "interval_of_mean",
    "mcnemar_exact",
    "read_records",
    "write_records",
]

"""Official scores as torchmetrics classes."""

from lightning_pmss.metrics.base import TextAccuracy, TextMetric
from lightning_pmss.metrics.commonsense import CommonsenseAccuracy
from lightning_pmss.metrics.drop import DROPScore
from lightning_pmss.metrics.gsm8k import GSM8KAccuracy
from lightning_pmss.metrics.math import MATHAccuracy
from lightning_pmss.metrics.metamath import MetaMathAccuracy

__all__ = [
    "CommonsenseAccuracy",
    "DROPScore",
    "GSM8KAccuracy",
    "MATHAccuracy",
    "MetaMathAccuracy",
    "TextAccuracy",
    "TextMetric",
]

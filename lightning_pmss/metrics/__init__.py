"""Official scores as torchmetrics classes."""

from lightning_pmss.metrics.gsm8k import GSM8KAccuracy

__all__ = ["GSM8KAccuracy"]

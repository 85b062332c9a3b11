"""Optimizers that look for flat minima. They wrap another optimizer and know nothing of adapters."""

from lightning_pmss.optimizers.sharpness import BSAM, SAM, SharpnessAware

__all__ = ["BSAM", "SAM", "SharpnessAware"]

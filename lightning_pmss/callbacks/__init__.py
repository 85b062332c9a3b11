"""Lightning callbacks."""

from lightning_pmss.callbacks.adapter import AdapterCallback
from lightning_pmss.callbacks.pmss import PMSSCallback

__all__ = ["AdapterCallback", "PMSSCallback"]

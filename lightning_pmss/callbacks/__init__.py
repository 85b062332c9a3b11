"""Lightning callbacks."""

from lightning_pmss.callbacks.adapter import AdapterCallback
from lightning_pmss.callbacks.flat_lora import FlatLoRA
from lightning_pmss.callbacks.pmss import PMSSCallback
from lightning_pmss.callbacks.sharpness import SharpnessPasses

__all__ = ["AdapterCallback", "FlatLoRA", "PMSSCallback", "SharpnessPasses"]

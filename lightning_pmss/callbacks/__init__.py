"""Lightning callbacks."""

from lightning_pmss.callbacks.pmss import PMSSCallback

__all__ = ["PMSSCallback"]

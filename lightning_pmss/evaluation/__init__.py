"""Predictions of an evaluation on disk, their intervals, and the comparison of two. Needs neither torch nor a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Read and write an evaluation's predictions, compute intervals, and compare two runs, without torch and without a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

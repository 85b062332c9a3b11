"""Estimate the memory of a run before it is started, from a model's ``config.json`` alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

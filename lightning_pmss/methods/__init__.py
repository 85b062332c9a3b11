"""The methods, side by side: each is one small file of mathematics behind `Method`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""PMSS (arXiv 2409.16722) for PyTorch Lightning: high-rank fine-tuning with rows and columns of the frozen weight itself.

The public names stand in ``__init__.pyi``. Each is imported when it is first asked for, so that a tool of the command line does
not wait for Lightning.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

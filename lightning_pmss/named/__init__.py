"""Several adapters on one base, by name: the base is in memory once, and switching copies small tensors.

Switching changes no shape and no object, so a compiled model is not compiled again. Each named adapter takes the memory of
its V and the factors of its coordinates (three ``r x r`` tensors per layer), and of its copies of modules trained in full.
"""

from lightning_pmss.named.combine_files import CombinedFiles, combine_files
from lightning_pmss.named.combining import Combination, combine_adapters
from lightning_pmss.named.named import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapter,
    load_adapters,
    set_adapter,
)

__all__ = [
    "Combination",
    "CombinedFiles",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "combine_adapters",
    "combine_files",
    "delete_adapter",
    "disable_adapter",
    "load_adapters",
    "set_adapter",
]

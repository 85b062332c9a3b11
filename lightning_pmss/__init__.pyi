from .built import model_built
from .callbacks import PMSSCallback
from .config import PMSSConfig
from .conversion import convert
from .files import export_lora, load_adapter, save_adapter
from .layers import PMSSLinear
from .merging import merge, merged, unmerge
from .report import ConversionReport
from .sharding import PMSSWrapPolicy
from .version import __version__

__all__ = [
    "ConversionReport",
    "PMSSCallback",
    "PMSSConfig",
    "PMSSLinear",
    "PMSSWrapPolicy",
    "__version__",
    "convert",
    "export_lora",
    "load_adapter",
    "merge",
    "merged",
    "model_built",
    "save_adapter",
    "unmerge",
]

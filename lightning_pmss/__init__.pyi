from .callbacks import PMSSCallback
from .conversion.convert import convert
from .conversion.report import ConversionReport
from .distributed.model_built import model_built
from .distributed.sharding import PMSSWrapPolicy
from .files import export_lora, load_adapter, save_adapter
from .merging import merge, merged, unmerge
from .methods.pmss.config import PMSSConfig
from .methods.pmss.layer import PMSSLinear
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

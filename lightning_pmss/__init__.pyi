from .callbacks import AdapterCallback, PMSSCallback
from .conversion.convert import convert
from .conversion.report import ConversionReport
from .distributed.model_built import model_built
from .distributed.sharding import PMSSWrapPolicy
from .files import export_lora, export_peft, load_adapter, save_adapter
from .layers.adapted import AdaptedLinear
from .merging import merge, merged, unmerge
from .methods import METHODS
from .methods.bat import BATConfig
from .methods.config import AdapterConfig
from .methods.curlora import CURLoRAConfig
from .methods.hira import HiRAConfig
from .methods.hut import HUTConfig
from .methods.lora import LoRAConfig
from .methods.lora_xs import LoRAXSConfig
from .methods.miss import MiSSConfig
from .methods.pmss.config import PMSSConfig
from .methods.pmss.layer import PMSSLinear
from .version import __version__

__all__ = [
    "METHODS",
    "AdaptedLinear",
    "AdapterCallback",
    "AdapterConfig",
    "BATConfig",
    "ConversionReport",
    "CURLoRAConfig",
    "HUTConfig",
    "HiRAConfig",
    "LoRAConfig",
    "MiSSConfig",
    "LoRAXSConfig",
    "PMSSCallback",
    "PMSSConfig",
    "PMSSLinear",
    "PMSSWrapPolicy",
    "__version__",
    "convert",
    "export_lora",
    "export_peft",
    "load_adapter",
    "merge",
    "merged",
    "model_built",
    "save_adapter",
    "unmerge",
]

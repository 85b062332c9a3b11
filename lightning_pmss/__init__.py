"""PMSS (arXiv 2409.16722) for PyTorch Lightning: high-rank fine-tuning with rows and columns of the frozen weight itself."""

from lightning_pmss.built import model_built
from lightning_pmss.callbacks import PMSSCallback
from lightning_pmss.config import PMSSConfig
from lightning_pmss.conversion import convert
from lightning_pmss.files import export_lora, load_adapter, save_adapter
from lightning_pmss.layers import PMSSLinear
from lightning_pmss.merging import merge, merged, unmerge
from lightning_pmss.report import ConversionReport
from lightning_pmss.sharding import PMSSWrapPolicy
from lightning_pmss.version import __version__

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

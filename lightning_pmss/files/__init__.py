"""Read and write adapter folders, merged models, LoRA exports and skeleton files."""

from lightning_pmss.files.adapter import AdapterFile, AdapterModule, load_adapter, read_adapter, save_adapter
from lightning_pmss.files.lora import export_files, export_lora, export_peft
from lightning_pmss.files.lora_report import LoraReport
from lightning_pmss.files.merged import merge_files, write_merged
from lightning_pmss.files.model_folder import FileMergeReport
from lightning_pmss.files.skeleton_file import save_skeleton

__all__ = [
    "AdapterFile",
    "AdapterModule",
    "FileMergeReport",
    "LoraReport",
    "export_files",
    "export_lora",
    "export_peft",
    "load_adapter",
    "merge_files",
    "read_adapter",
    "save_adapter",
    "save_skeleton",
    "write_merged",
]

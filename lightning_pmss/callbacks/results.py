"""What a run leaves behind: the adapter folder and the merged model, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_pmss.callbacks.facts import run_facts
from lightning_pmss.callbacks.processing import processing_of
from lightning_pmss.files import merge_files, save_adapter, write_merged
from lightning_pmss.files.atomic import remove_folder
from lightning_pmss.files.base import base_of
from lightning_pmss.files.kinds import ADAPTER, MERGED
from lightning_pmss.whole import is_fsdp1, is_sharded


def write_results(trainer: L.Trainer, module: L.LightningModule, adapter: Path | None, merged: Path | None) -> Any:
    """Write the adapter and the merged model; call it on every rank, rank 0 writes. Earlier ones of ours are replaced.

    A sharded base is never gathered where its checkpoint lies on disk: the adapter is merged into that, tensor by tensor.

    Returns:
        The merge report on the rank that merged, else None.
    """
    report: Any = None
    sharded, first = is_sharded(module), trainer.is_global_zero
    if adapter is not None and (sharded or first):
        save_adapter(module, adapter, overwrite=True, run=run_facts(trainer, module))
    if merged is not None:
        base = base_folder(module) if sharded and adapter is not None else None
        if base is not None:
            if first:
                tokenizer = processing_of(trainer, module)
                report = merge_files(base, adapter, merged, overwrite=True, tokenizer=tokenizer)  # type: ignore[arg-type]
        elif sharded or first:
            if sharded:
                rank_zero_info("PMSS: no checkpoint of the base on disk; gathering it on rank 0, one matrix at a time.")
            # FSDP1's root owns what is in no unit of its own.
            model: Any = trainer.strategy.model if is_fsdp1(module) else module
            report = write_merged(model, merged, tokenizer=processing_of(trainer, module), overwrite=True)
    trainer.strategy.barrier("PMSS.results")
    return report


def merge_beside(trainer: L.Trainer, module: L.LightningModule, checkpoint: Path) -> None:
    """Write the merged model beside a checkpoint (all ranks)."""
    folder = beside(checkpoint)
    if not is_sharded(module):
        write_results(trainer, module, None, folder)
        return
    adapter = folder.with_name(f"{folder.name}-adapter")
    write_results(trainer, module, adapter, folder)
    if trainer.is_global_zero:
        remove_folder(adapter, ADAPTER)


def remove_beside(trainer: L.Trainer, checkpoint: Path) -> None:
    """Remove what `merge_beside` wrote for this checkpoint."""
    folder = beside(checkpoint)
    if trainer.is_global_zero and folder.exists():
        remove_folder(folder, MERGED)


def beside(checkpoint: Path) -> Path:
    """Where the merged model of a checkpoint goes."""
    return checkpoint.with_name(f"{checkpoint.stem}-merged")


def base_folder(module: L.LightningModule) -> Path | None:
    """The folder that the Hugging Face model was loaded from, or its snapshot in the hub's cache, if it has safetensors."""
    folder = base_of(module).folder
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None

"""Write the adapter folder and the merged model of a run, under every strategy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_pmss.callbacks.facts import run_facts
from lightning_pmss.callbacks.places import STOPPED_CHECKPOINT
from lightning_pmss.callbacks.processing import processing_of, report_template
from lightning_pmss.distributed.ranks import together
from lightning_pmss.files import merge_files, save_adapter, write_merged
from lightning_pmss.files.base import base_of
from lightning_pmss.layers.parts import is_fsdp1, is_sharded
from lightning_pmss.store.atomic import remove_folder
from lightning_pmss.store.kinds import MERGED


def write_adapter(
    trainer: L.Trainer,
    module: L.LightningModule,
    folder: Path,
    *,
    earlier: Mapping[str, float] | None = None,
    stopped: str | None = None,
) -> None:
    """Write the adapter on rank 0, replacing an earlier one; call it on every rank if the model is sharded.

    Args:
        trainer: Trainer of this run.
        module: The converted LightningModule.
        folder: Adapter folder to write.
        earlier: See `run_facts`.
        stopped: See `run_facts`.
    """
    if is_sharded(module) or trainer.is_global_zero:
        model, facts = _root(trainer, module), run_facts(trainer, module, earlier or {}, stopped)
        parts, rendered = processing_of(trainer, module), report_template(trainer, module, folder)
        save_adapter(model, folder, overwrite=True, run=facts, tokenizer=parts, keep_tokenizer=rendered)


def write_merged_model(trainer: L.Trainer, module: L.LightningModule, adapter: Path | None, folder: Path) -> Any:
    """Write the merged model on rank 0, replacing an earlier one; call it on every rank.

    A sharded base is not gathered if its checkpoint is on disk: the adapter is merged into that, tensor by tensor.

    Args:
        trainer: Trainer of this run.
        module: The converted LightningModule.
        adapter: Folder of the present adapter; only needed if the model is sharded.
        folder: Folder to write.

    Returns:
        The merge report on the rank that merged, else None.
    """
    sharded = is_sharded(module)
    base = streamed_base(module) if adapter is not None else None
    if base is not None:
        if not trainer.is_global_zero:
            return None
        assert adapter is not None
        report_template(trainer, module, folder)
        return merge_files(base, adapter, folder, overwrite=True, tokenizer=processing_of(trainer, module))
    if not sharded and not trainer.is_global_zero:
        return None
    if sharded:
        rank_zero_info("No checkpoint of the base on disk; gathering it on rank 0, one matrix at a time.")
    report_template(trainer, module, folder)
    return write_merged(_root(trainer, module), folder, tokenizer=processing_of(trainer, module), overwrite=True)


def _root(trainer: L.Trainer, module: L.LightningModule) -> Any:
    """The module or, under FSDP1, its wrapper, which owns the parameters outside of the wrapped submodules."""
    return trainer.strategy.model if is_fsdp1(module) else module


def streamed_base(module: L.LightningModule) -> Path | None:
    """Folder of the base's safetensors to merge a sharded model into; None if not sharded, or without such a folder."""
    folder = base_of(module).folder if is_sharded(module) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def merge_beside(trainer: L.Trainer, module: L.LightningModule, checkpoint: Path) -> None:
    """Write the merged model beside a checkpoint; call it on all ranks. A failure gives only a warning.

    The checkpoint of a run that is being stopped is skipped: a scheduler allows it only seconds.
    """
    folder = beside(checkpoint)
    if checkpoint.name == STOPPED_CHECKPOINT:
        return

    def write() -> None:
        if not is_sharded(module):
            write_merged_model(trainer, module, None, folder)
            return
        with tempfile.TemporaryDirectory(prefix="pmss-") as temporary:
            adapter = Path(temporary) / "adapter"
            write_adapter(trainer, module, adapter)
            write_merged_model(trainer, module, adapter, folder)

    try:
        together(trainer.strategy, write)
    except (OSError, ValueError) as error:
        rank_zero_warn(f"No merged model was written beside {checkpoint}, which is complete: {error}")


def remove_beside(trainer: L.Trainer, checkpoint: Path) -> None:
    """Remove the merged model of a removed checkpoint; warn if its folder contains other files."""
    folder = beside(checkpoint)
    if not trainer.is_global_zero or not folder.exists():
        return
    try:
        remove_folder(folder, MERGED)
    except OSError as error:
        rank_zero_warn(f"{folder} stays, although its checkpoint is gone: {error}")


def beside(checkpoint: Path) -> Path:
    """Path of the merged model of a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.stem}-merged")

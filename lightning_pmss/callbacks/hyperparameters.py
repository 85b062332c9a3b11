"""Log the options and figures of a conversion as hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_pmss.conversion.report import ConversionReport

_OWN = ("merge_on_save", "on_nonfinite", "output_dir", "log_throughput", "log_u_norm")


def own_options(callback: L.Callback) -> dict[str, Any]:
    """Options of the callback that are not in its config, as plain values."""
    values = {name: getattr(callback, name) for name in _OWN}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def log_hyperparameters(
    trainer: L.Trainer,
    module: L.LightningModule,
    report: ConversionReport | None,
    more: Mapping[str, Any],
    *,
    again: bool = False,
) -> None:
    """Log the options as ``pmss/<name>``, together with the hyper-parameters that the module and the DataModule saved.

    Lightning logs the saved ones between ``on_fit_start`` and ``on_train_start``. Some loggers keep their first call
    (TensorBoard's page of hyper-parameters), others their last.

    Args:
        trainer: Trainer of the fit.
        module: The LightningModule.
        report: Report of the conversion.
        more: Options besides those of the config.
        again: Whether this call comes after Lightning's; without saved hyper-parameters it logs nothing.
    """
    if report is None or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return
    saved = _saved(module) | _saved(getattr(trainer, "datamodule", None))
    figures = {
        "trainable_parameters": report.trainable,
        "total_parameters": report.total,
        "converted_layers": len(report.layers),
        "adapter_bytes": report.adapter_bytes,
    }
    options = {f"pmss/{name}": value for name, value in {**report.config.to_dict(), **more, **figures}.items()}
    for logger in trainer.loggers:
        if trainer.enable_autolog_hparams and (saved or not again):
            logger.log_hyperparams({**options, **saved})
        if not again:
            logger.log_metrics({"pmss/trainable_parameters": report.trainable}, step=trainer.global_step)


def _saved(holder: Any) -> dict[str, Any]:
    """Hyper-parameters that a module or DataModule saved to be logged."""
    if holder is None or not holder._log_hyperparams:
        return {}
    return {k: v for k, v in holder.hparams_initial.items() if k != "_class_path"}  # LightningCLI's own

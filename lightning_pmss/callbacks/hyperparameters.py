"""The options and figures of a conversion among the hyper-parameters that loggers keep of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_pmss.conversion.report import ConversionReport

_OWN = ("merge_on_save", "on_nonfinite", "output_dir", "log_throughput", "log_u_norm")


def own_options(callback: L.Callback) -> dict[str, Any]:
    """The options of `PMSSCallback` that the config of the conversion does not have, as plain values."""
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
    """Give every logger the options as ``pmss/<name>``, with the hyper-parameters that the module and its data have saved.

    Lightning logs the latter between ``on_fit_start`` and ``on_train_start``. Some loggers keep what they are given first
    (TensorBoard's page of hyper-parameters), some what they are given last.

    Args:
        trainer: Of the fit.
        module: The LightningModule.
        report: Of the conversion.
        more: Options beside those of the config.
        again: Whether Lightning has logged its part by now; if it had none, there is nothing to do.
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
    """What ``save_hyperparameters`` of a module or DataModule is to be logged with."""
    if holder is None or not holder._log_hyperparams:
        return {}
    return {k: v for k, v in holder.hparams_initial.items() if k != "_class_path"}  # LightningCLI's own

"""
PMSS callback
^^^^^^^^^^^^^

Fine-tunes the model of any LightningModule by PMSS (arXiv 2409.16722).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_pmss.callbacks.adapter import AdapterCallback
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.pmss.config import PMSSConfig


@inherit_options(AdapterCallback, PMSSConfig)
class PMSSCallback(AdapterCallback):
    """Convert the targeted linear layers to PMSS, train only U, keep checkpoints small, and merge on save.

    Equals ``AdapterCallback(PMSSConfig(...))``, with the options of both as arguments.

    Raises:
        ValueError: See `AdapterCallback`.
        TypeError: An option that `PMSSConfig` does not have.

    Example::

        >>> from lightning_pmss import PMSSCallback
        >>> trainer = L.Trainer(callbacks=[PMSSCallback(target_modules=["q_proj", "v_proj"], rank=128)])

    """

    def __init__(
        self,
        target_modules: str | Sequence[str] = "all-linear",  # the only positional option
        *,
        output_dir: str | Path | None = None,
        merge_on_save: str | None = "end",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        log_throughput: bool = True,
        log_u_norm: bool = False,
        **options: Any,
    ) -> None:
        config = PMSSConfig(target_modules=target_modules, **options)
        super().__init__(config, output_dir, merge_on_save, on_nonfinite, log_throughput, log_u_norm)

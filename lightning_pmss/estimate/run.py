"""The options of an estimate: `Run`, checked when it is made. It needs no torch, so that a command's help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lightning_pmss.methods.pmss.config import PMSSConfig

STRATEGIES = ("single", "ddp", "fsdp", "fsdp2", "zero2", "zero3", "zero3_offload")
# Optimizer states per trained element; each has the parameter's dtype (DeepSpeed: float32).
OPTIMIZERS: dict[str, float] = {"adamw": 2, "adam": 2, "lion": 1, "sgd-momentum": 1, "sgd": 0}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
WEIGHTS_DTYPES = ("auto", "float32", "bfloat16")
QUANTISATIONS = ("nf4", "fp4")
WHOLE_STRATEGIES = ("single", "ddp")  # quantised weights cannot be sharded


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of DeepSpeed that affect memory. Defaults are DeepSpeed's, except ``bucket`` and ``overlap``.

    Attributes:
        bucket: ``reduce_bucket_size`` in elements; the default is that of ``configs/strategy``, a tenth of DeepSpeed's.
        overlap: ``overlap_comm``; ZeRO-2 then fills a second bucket meanwhile. The default is that of ``configs/strategy``.
        persistence: ``stage3_param_persistence_threshold`` in elements; smaller parameters stay whole.
        live: ``stage3_max_live_parameters``, the most elements gathered at once.
    """

    bucket: int = 50_000_000
    overlap: bool = True
    persistence: int = 100_000
    live: int = 1_000_000_000


@dataclass(frozen=True)
class Run:
    """Options of the run to estimate.

    Args:
        model: Folder with ``config.json``, or the file.
        strategy: One of `STRATEGIES`.
        devices: Devices per node.
        nodes: Number of nodes.
        config: Options of the conversion.
        micro_batch: Sequences per device and pass.
        sequence_length: Tokens of the longest sequence.
        precision: Precision of the Trainer, one of `PRECISIONS`.
        weights_dtype: Dtype of the loaded weights: ``"auto"`` (the configuration's), ``"float32"``, ``"bfloat16"``.
        gradient_checkpointing: Whether decoder layers are recomputed in the backward pass.
        optimizer: One of `OPTIMIZERS`.
        zero: DeepSpeed's settings.
        quantisation: None, or the 4-bit type of the linear layers: one of `QUANTISATIONS`. Full fine-tuning is then omitted.

    Raises:
        ValueError: A value is out of its range; the message says what to type.
    """

    model: str
    strategy: str = "single"
    devices: int = 1
    nodes: int = 1
    config: PMSSConfig = field(default_factory=PMSSConfig)
    micro_batch: int = 1
    sequence_length: int = 2048
    precision: str = "bf16-true"
    weights_dtype: str = "auto"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    quantisation: str | None = None

    def __post_init__(self) -> None:
        allowed = {
            "strategy": STRATEGIES,
            "precision": PRECISIONS,
            "weights_dtype": WEIGHTS_DTYPES,
            "optimizer": tuple(OPTIMIZERS),
            "quantisation": (None, *QUANTISATIONS),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {list(values)}.")
        for name in ("devices", "nodes", "micro_batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.zero.bucket < 0:
            raise ValueError(f"bucket={self.zero.bucket} must not be negative; it is a number of elements.")
        if self.quantisation is not None and self.strategy not in WHOLE_STRATEGIES:
            raise ValueError(
                f"quantisation={self.quantisation!r} cannot be kept in parts, as {self.strategy!r} would; choose one of"
                f" {list(WHOLE_STRATEGIES)}."
            )
        if self.strategy == "single" and self.world > 1:
            raise ValueError(f"strategy 'single' has one device, not {self.world}; choose 'ddp', 'fsdp2' or 'zero3'.")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes


def with_options(run: Run, **changes: Any) -> Run:
    """Return the run with other options; ``rank`` also limits the ranks of ``rank_pattern``."""
    rank = changes.pop("rank", None)
    if rank is not None:
        pattern = {key: min(value, rank) for key, value in run.config.rank_pattern.items()}
        changes["config"] = replace(run.config, rank=rank, rank_pattern=pattern)
    return replace(run, **changes)

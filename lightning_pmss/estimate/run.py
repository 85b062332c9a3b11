"""The options of an estimate: `Run`, checked when it is made. It needs no torch, so that a command's help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lightning_pmss.methods.choices import check_choices, one_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.pmss.config import PMSSConfig

STRATEGIES = ("single", "ddp", "fsdp", "fsdp2", "zero2", "zero3", "zero3_offload")
# Optimizer states per trained element; each has the parameter's dtype (DeepSpeed: float32).
OPTIMIZERS: dict[str, float] = {"adamw": 2, "adam": 2, "lion": 1, "sgd-momentum": 1, "sgd": 0}
WHOLE_STRATEGIES = ("single", "ddp")  # quantised weights cannot be sharded


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of DeepSpeed that affect memory. Defaults are DeepSpeed's, except ``bucket`` and ``overlap``.

    Args:
        bucket: DeepSpeed's ``reduce_bucket_size`` in elements. The default is that of ``configs/strategy``, a tenth of
            DeepSpeed's own.
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
        strategy: Strategy of the Trainer. ``"auto"`` means single on one device and fsdp2 (quantised: ddp) on several.
        devices: Devices per node.
        nodes: Number of nodes.
        config: Options of the conversion, of any method.
        micro_batch: Sequences per device and pass.
        sequence_length: Tokens of the longest sequence.
        precision: Precision of the Trainer.
        weights_dtype: Dtype of the loaded weights. ``"auto"`` means the one that ``config.json`` names.
        gradient_checkpointing: Whether decoder layers are recomputed in the backward pass.
        optimizer: Optimizer, which defines the size of the states.
        zero: DeepSpeed's settings.
        quantisation: 4-bit type of the linear layers, by bitsandbytes; full fine-tuning is then omitted. Default: the layers
            are not quantised.

    Raises:
        ValueError: A value is out of its range; the message says what to type.
    """

    model: str
    strategy: str = field(default="auto", metadata=one_of("auto", *STRATEGIES))
    devices: int = 1
    nodes: int = 1
    config: AdapterConfig = field(default_factory=PMSSConfig)
    micro_batch: int = 1
    sequence_length: int = 2048
    precision: str = field(default="bf16-true", metadata=one_of("32-true", "bf16-mixed", "bf16-true"))
    weights_dtype: str = field(default="auto", metadata=one_of("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = False
    optimizer: str = field(default="adamw", metadata=one_of(*OPTIMIZERS))
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    quantisation: str | None = field(default=None, metadata=one_of(None, "nf4", "fp4"))

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("devices", "nodes", "micro_batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.zero.bucket < 0:
            raise ValueError(f"bucket={self.zero.bucket} must not be negative; it is a number of elements.")
        if self.strategy == "auto":
            several = "fsdp2" if self.quantisation is None else "ddp"
            object.__setattr__(self, "strategy", several if self.world > 1 else "single")
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

"""Estimate a run's memory for its method, for LoRA with about as many trained parameters, and for full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.conversion.roots import canonical_modules
from lightning_pmss.conversion.targets import match_modules
from lightning_pmss.estimate.depth import estimate_step
from lightning_pmss.estimate.model import (
    Architecture,
    Piece,
    count,
    inventory,
    read_config,
    weights_dtype,
)
from lightning_pmss.estimate.quantised import largest_matrix, quantised_pieces
from lightning_pmss.estimate.run import Run
from lightning_pmss.estimate.simulate import StepBytes
from lightning_pmss.estimate.strategies import (
    engine_dtype,
    host_bytes,
    place,
    reserve,
)
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import file_bytes


@dataclass(frozen=True)
class MethodEstimate:
    """Memory of one method in bytes; `strategies.Placement` explains the columns that are not listed here.

    Attributes:
        method: Name of a method, such as ``"pmss"``, or ``"full"``.
        rank: Rank of the adapters (PMSS: before it is clipped to a layer); None in full fine-tuning.
        trainable: Number of trained parameters.
        activations: Activations that the decoder layers keep from the forward to the backward pass.
        logits: The most that head and loss add to them.
        work: The most that the rest of the step (a recomputed layer) adds beyond that.
        reserve: Set aside, not estimated.
        total: Sum of the columns, the memory that one device needs.
        activations_other: ``activations`` + ``logits`` + ``work`` with gradient checkpointing toggled.
        host: Peak of one node's host memory.
        checkpoint: Size of one checkpoint's files.
        adapter: Size of the adapter file (full fine-tuning: of the model).
    """

    method: str
    rank: int | None
    trainable: int
    base: int
    trained: int
    factors: int
    gradients: int
    optimizer: int
    gathered: int
    buckets: int
    activations: int
    logits: int
    work: int
    reserve: int
    activations_other: int | None
    host: int
    checkpoint: int
    adapter: int

    @property
    def columns(self) -> dict[str, int]:
        """The terms of the total, by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def total(self) -> int:
        """Bytes that one device needs."""
        return sum(self.columns.values())


COLUMNS = (
    "base",
    "trained",
    "factors",
    "gradients",
    "optimizer",
    "gathered",
    "buckets",
    "activations",
    "logits",
    "work",
    "reserve",
)


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of a run.

    Attributes:
        run: The options of the run.
        architecture: Name of the model's class.
        parameters: Number of parameters of the base.
        dtype: Dtype of the weights, as loaded.
        methods: Estimates by method.
    """

    run: Run
    architecture: str
    parameters: int
    dtype: str
    methods: Mapping[str, MethodEstimate]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        about = asdict(self.run) | {"config": self.run.config.to_dict(), "world": self.run.world}
        methods = {n: asdict(m) | {"total": m.total} for n, m in self.methods.items()}
        return {
            "run": about,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "methods": methods,
        }


def estimate(run: Run, methods: tuple[str, ...] | None = None, *, both: bool = True) -> Estimate:
    """Estimate a run from its model's ``config.json``.

    Args:
        run: Options of the run.
        methods: What to estimate: the name of the run's own method, ``"lora"`` (if that is another one: of about as many
            trained parameters), ``"full"``; None: all of these.
        both: Also estimate the activations with gradient checkpointing toggled.

    Raises:
        FileNotFoundError: ``config.json`` is missing.
        ValueError: The model cannot be built, or not be converted with these options.
    """
    config = read_config(run.model)
    loaded = weights_dtype(config, run.weights_dtype)
    return _estimate(run, config, loaded, methods or (*dict.fromkeys((run.config.method, "lora")), "full"), both)


def _estimate(run: Run, config: Any, loaded: torch.dtype, methods: tuple[str, ...], both: bool) -> Estimate:
    deepspeed = run.strategy.startswith("zero")
    low = run.precision.startswith("bf16")
    if deepspeed:
        trains = torch.bfloat16 if low else torch.float32
    else:
        trains = torch.bfloat16 if run.precision == "bf16-true" else loaded
    architecture = Architecture(config, trains)
    base = architecture.base()
    parameters = sum(p.numel() for p in base.parameters())
    results = {}
    for method in methods:
        if method == "full" and run.quantisation is not None:
            continue  # quantised weights are not trained
        rank: int | None = None
        if method == run.config.method:
            model, rank = architecture.adapted(run.config), run.config.rank
        elif method == "lora":
            model, rank = architecture.lora(run.config)
        else:
            model = architecture.full()
        pieces = engine_dtype(inventory(model), run.strategy, run.precision)
        made_whole = 0
        if run.quantisation is not None:
            pieces, made_whole = quantised_pieces(pieces, model), largest_matrix(model, trains.itemsize)
        steps = {
            checkpointing: _step(
                (config.to_json_string(), method, "" if method == "full" else repr(run.config)),
                architecture,
                model,
                micro_batch=run.micro_batch,
                sequence_length=run.sequence_length,
                gradient_checkpointing=checkpointing,
                autocast=torch.bfloat16 if run.precision == "bf16-mixed" and not deepspeed else None,
            )
            # False first, because checkpointing stays enabled on the model.
            for checkpointing in (False, True)
            if both or checkpointing == run.gradient_checkpointing
        }
        step = steps[run.gradient_checkpointing]
        other = steps.get(not run.gradient_checkpointing)
        where = place(pieces, run.strategy, run.world, run.optimizer, run.zero)
        of_base = parameters * loaded.itemsize
        results[method] = MethodEstimate(
            method=method,
            rank=rank,
            trainable=count(pieces)["trained"],
            base=where.base + (where.trained if method == "full" else 0),
            trained=0 if method == "full" else where.trained,
            factors=where.factors,
            gradients=where.gradients,
            optimizer=where.optimizer,
            gathered=where.gathered + made_whole,
            buckets=where.buckets,
            activations=step.kept,
            logits=step.head - step.kept,
            work=step.peak - step.head,
            reserve=reserve(run.world),
            activations_other=None if other is None else other.peak,
            host=host_bytes(of_base, where, run.strategy, run.devices),
            checkpoint=_checkpoint_bytes(pieces, run),
            adapter=_trained_bytes(pieces) if method == "full" else _adapter_bytes(model, run.config),
        )
    return Estimate(run, type(base).__name__, parameters, str(loaded).removeprefix("torch."), results)


_STEPS: dict[tuple[Any, ...], StepBytes] = {}
"""Steps already simulated: `remedies` needs the same ones for other numbers of devices and strategies."""


def _step(origin: tuple[str, ...], architecture: Architecture, model: nn.Module, **options: Any) -> StepBytes:
    """Call `estimate_step` once per process for equal models; ``origin`` identifies how the model was made."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    key = (*origin, architecture.dtype, frozenset(dtypes), *sorted(options.items()))
    if key not in _STEPS:
        _STEPS[key] = estimate_step(architecture, model, **options)
    return _STEPS[key]


def _checkpoint_bytes(pieces: list[Piece], run: Run) -> int:
    """Return the size of one checkpoint's tensors, without headers."""
    trained = [replace(p, block="") for p in pieces if p.kind == "trained" and not p.buffer]
    kind = "zero2" if run.strategy.startswith("zero") else "single"
    alone = place(trained, kind, 1, run.optimizer)
    return alone.trained + alone.optimizer + sum(p.nbytes for p in pieces if p.buffer)


def _trained_bytes(pieces: list[Piece]) -> int:
    return sum(p.nbytes for p in pieces if p.kind == "trained" and not p.buffer)


def _adapter_bytes(model: nn.Module, config: AdapterConfig) -> int:
    """Return the size of the adapter's tensors: those of each layer, and the modules trained in full."""
    modules = canonical_modules(model)
    full = (modules[name] for name in match_modules(config.also_train, modules, "also_train"))
    extra = sum(value.nbytes for module in full for value in module.state_dict().values())
    return extra + sum(map(_file_bytes, adapted_layers(model).values()))


def _file_bytes(layer: AdaptedLinear) -> int:
    return file_bytes(layer.method, canonical_shape(layer), layer.rank, core_dtype(layer.weight.dtype))

"""Compute, by strategy, the bytes of a model's tensors on one device and one node's host, without activations.

FSDP: PyTorch's per-parameter (2) and flat (1) sharding, one unit per decoder layer and one for the rest, which stays whole
from the forward to the backward pass. ZeRO: DeepSpeed's optimizers. The tests measure each on two processes; the fixed reserve
includes memory that only a GPU needs (streams, communication buffers of NCCL).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_pmss.estimate.model import Piece
from lightning_pmss.estimate.run import OPTIMIZERS, ZeroSettings

PROCESS_BYTES = 2_000_000_000  # Python, PyTorch, transformers and CUDA's libraries in host memory
RESERVE_ALONE = 1_000_000_000  # CUDA context, workspaces of cuBLAS, a little fragmentation
RESERVE_AMONG_SEVERAL = 2_000_000_000  # and NCCL's buffers


@dataclass(frozen=True)
class Placement:
    """Bytes per device, by purpose.

    Attributes:
        base: Frozen weights and the model's buffers.
        trained: Trained parameters (PMSS: V) and indices.
        factors: Frozen factors of PMSS's coordinates.
        gradients: Gradients of the trained parameters.
        optimizer: Optimizer states (DeepSpeed: also its float32 copies).
        gathered: Weights that are gathered temporarily, and their gradients before they are reduced.
        buckets: Communication buffers that the strategy itself allocates.
        offloaded: Bytes per process in host memory.
    """

    base: int = 0
    trained: int = 0
    factors: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    buckets: int = 0
    offloaded: int = 0


def place(
    pieces: list[Piece], strategy: str, world: int, optimizer: str = "adamw", settings: ZeroSettings | None = None
) -> Placement:
    """Compute the bytes per device of a model's tensors.

    Args:
        pieces: Tensors of the model, with the dtypes of the run (see `engine_dtype`).
        strategy: One of `run.STRATEGIES`.
        world: Number of processes.
        optimizer: One of `run.OPTIMIZERS`.
        settings: Settings of DeepSpeed.
    """
    zero = settings or ZeroSettings()
    held = dict.fromkeys(("base", "trained", "factor", "index"), 0)
    gradients = states = master = 0
    sharded = strategy in ("fsdp", "fsdp2", "zero3", "zero3_offload")
    split_optimizer = sharded or strategy == "zero2"
    stage3 = strategy.startswith("zero3")
    persistent = live = offloaded = 0
    for piece in pieces:
        if piece.buffer:
            held[piece.kind] += piece.nbytes
            continue
        part = _part(piece, world, by_rows=strategy == "fsdp2")
        here = (part if sharded else piece.numel) * piece.itemsize
        held[piece.kind] += here
        if stage3:
            whole = piece.numel <= zero.persistence
            persistent += piece.nbytes if whole else 0
            live += 0 if whole else piece.numel
        if piece.kind == "trained":
            mine = part if split_optimizer else piece.numel
            gradients += mine * piece.itemsize
            states += int(mine * OPTIMIZERS[optimizer] * (4 if strategy.startswith("zero") else piece.itemsize))
            master += mine * 4 if strategy.startswith("zero") else 0
    itemsize = max((p.itemsize for p in pieces if p.kind == "trained" and not p.buffer), default=0)
    gathered = buckets = 0
    if strategy in ("fsdp", "fsdp2") and world > 1:
        gathered = _gathered_by_fsdp(pieces, flat=strategy == "fsdp")
    elif strategy == "ddp" and world > 1:
        buckets = gradients  # DDP copies every gradient into its buckets
    elif strategy == "zero2":
        buckets = zero.bucket * itemsize * (2 if zero.overlap else 1)
    elif stage3:
        widest = max(p.itemsize for p in pieces if not p.buffer)
        gathered = persistent + min(live, zero.live) * widest
        buckets = zero.bucket * itemsize
    optimizer_bytes = states + master
    if strategy == "zero3_offload":
        offloaded = sum(held[k] for k in ("base", "trained", "factor")) + optimizer_bytes + gradients
        held = dict.fromkeys(held, 0) | {"index": held["index"]}
        optimizer_bytes = gradients = 0
    return Placement(
        held["base"],
        held["trained"] + held["index"],
        held["factor"],
        gradients,
        optimizer_bytes,
        gathered,
        buckets,
        offloaded,
    )


def engine_dtype(pieces: list[Piece], strategy: str, precision: str) -> list[Piece]:
    """Cast every parameter to the engine's dtype, as DeepSpeed does; other strategies leave the dtypes unchanged."""
    if not strategy.startswith("zero"):
        return pieces
    size = 2 if precision.startswith("bf16") else 4
    return [p if p.buffer else replace(p, itemsize=size) for p in pieces]


def host_bytes(base: int, placement: Placement, strategy: str, devices: int) -> int:
    """Peak of one node's host memory: processes, the checkpoint while it is loaded, and offloaded tensors.

    Args:
        base: Bytes of the base's weights as loaded.
        placement: Bytes of one process.
        strategy: One of `run.STRATEGIES`.
        devices: Processes on the node.
    """
    # With FSDP2 and ZeRO-3, rank 0 loads and broadcasts; with the others every process loads.
    copies = 1 if strategy in ("fsdp2", "zero3", "zero3_offload") else devices
    return devices * (PROCESS_BYTES + placement.offloaded) + copies * base


def reserve(world: int) -> int:
    """Bytes per device that are set aside without an estimate."""
    return RESERVE_AMONG_SEVERAL if world > 1 else RESERVE_ALONE


def _part(piece: Piece, world: int, *, by_rows: bool) -> int:
    """Number of elements in the largest shard of one parameter."""
    if not by_rows:
        return math.ceil(piece.numel / world)
    rows = piece.shape[0] if piece.shape else 1
    return math.ceil(rows / world) * (piece.numel // rows if rows else 0)


def _gathered_by_fsdp(pieces: list[Piece], *, flat: bool) -> int:
    """Size of the root unit, the unit at work and the unit that is prefetched.

    FSDP1 (``flat``) wraps each adapter as its own unit, which is whole only while it is called.
    """
    units: dict[str, int] = {}
    gradients: dict[str, int] = {}
    adapters: dict[str, int] = {}
    for piece in pieces:
        if piece.buffer:
            continue
        if flat and piece.adapter:
            adapters[piece.adapter] = adapters.get(piece.adapter, 0) + piece.nbytes * (
                2 if piece.kind == "trained" else 1
            )
            continue
        units[piece.block] = units.get(piece.block, 0) + piece.nbytes
        if piece.kind == "trained":
            gradients[piece.block] = gradients.get(piece.block, 0) + piece.nbytes
    root = units.pop("", 0)
    largest = [max(sizes.values(), default=0) for sizes in (units, gradients, adapters)]
    return root + 2 * sum(largest)

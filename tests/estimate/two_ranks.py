"""Script of the two-process tests: ``torchrun ... two_ranks.py STRATEGY FOLDER OPTIONS``; each rank writes what it holds.

OPTIONS is JSON, a list of runs: dtype, memory, coordinates, gradient_checkpointing, method. One process does them all,
since starting takes longer than they do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_pmss.layers.indices import index_tensors
from tests.estimate.small import (
    allocator_peak,
    checkpoint_activations,
    forward_backward,
    kept_at_the_head,
    local,
    loss_of,
    pmss_config,
    small_batch,
    small_model,
    state_bytes,
)
from tests.leaving import leave


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of this rank's parts of the parameters by kind, with the replicated buffers as the estimate counts them."""
    sizes = {"base": 0, "trained": 0, "factors": 0}
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "factors" if ".core." in name else "base"
        sizes[kind] += part(parameter)
    sizes["base"] += sum(buffer.nbytes for buffer in model.buffers())
    sizes["trained"] += sum(indices.nbytes for indices in index_tensors(model).values())
    return sizes


def part(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):
        return int(parameter.ds_tensor.nbytes)
    return local(parameter).nbytes


def plain(strategy: str, options: dict[str, Any]) -> dict[str, int]:
    """DDP, FSDP1 and FSDP2."""
    dtype = getattr(torch, options["dtype"])
    full = options["method"] == "full"
    config = None if full else pmss_config(memory=options["memory"], coordinates=options["coordinates"])
    model: Any = small_model(dtype, config)
    if options["gradient_checkpointing"]:
        checkpoint_activations(model)
    if strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        loss = loss_of(model)
    elif strategy == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        from lightning_pmss import PMSSWrapPolicy

        wrap: Any = PMSSWrapPolicy(layers=["LlamaDecoderLayer"])
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=cpu, use_orig_params=True)
        loss = loss_of(model)
    else:
        inner = loss_of(model)

        # DDP prepares its reducer in its own forward: call the loss through it.
        class Through(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> torch.Tensor:
                return inner()

        loss = nn.parallel.DistributedDataParallel(Through())
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    loss().backward()
    sizes = held(model) | {"gradients": sum(local(p.grad).nbytes for p in trained)}
    optimizer.step()
    sizes["optimizer"] = state_bytes(optimizer)
    optimizer.zero_grad()
    if not options["gradient_checkpointing"]:
        sizes["activations"] = kept_at_the_head(model, loss)
        optimizer.zero_grad()
    # gloo's threads let go of what they sent when they come to it, on a busy machine late: so the smallest of five.
    step = forward_backward(loss, trained)
    sizes["peak"] = min(allocator_peak(step) for _ in range(5))
    return sizes


def zero(strategy: str, options: dict[str, Any]) -> dict[str, int]:
    """DeepSpeed on the CPU, with the settings of the estimate that it is compared to."""
    import deepspeed

    low = options["dtype"] == "bfloat16"
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": low},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": int(strategy.removeprefix("zero")),
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 100_000,
            "overlap_comm": False,
        },
    }
    model: Any = small_model(getattr(torch, options["dtype"]), pmss_config(coordinates=options["coordinates"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    engine, zero_optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=settings
    )
    batch = small_batch()
    for _ in range(2):
        engine.backward(engine(**batch, use_cache=False).loss)
        engine.step()
    sizes = held(model)
    masters = getattr(zero_optimizer, "fp32_partitioned_groups_flat", None)
    masters = zero_optimizer.single_partition_of_fp32_groups if masters is None else masters
    sizes["optimizer"] = state_bytes(zero_optimizer.optimizer) + sum(t.nbytes for t in masters)
    if strategy == "zero3":
        sizes["gradients"] = zero_optimizer.grad_partitions_flat_buffer.nbytes
        sizes["buckets"] = sum(bucket.buffer.nbytes for bucket in zero_optimizer.ipg_buckets.values())
    return sizes


if __name__ == "__main__":
    strategy, folder, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
        found = [zero(strategy, options) for options in runs]
    else:
        dist.init_process_group("gloo")
        found = [plain(strategy, options) for options in runs]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()

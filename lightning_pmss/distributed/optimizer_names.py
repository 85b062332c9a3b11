"""Where a strategy looks for the optimizer's states by names that ``torch.compile`` changes, and cannot find them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lightning_pmss.distributed.sharding import Engine
from lightning_pmss.layers.parts import clean_name


@contextmanager
def finding_states(engine: Engine, module: nn.Module, path: Path, *, fitting: bool) -> Iterator[None]:
    """While a strategy loads a checkpoint.

    Raises:
        ValueError: The optimizer's states would not be found; with the remedy.
    """
    compiled = [n for n, p in module.named_parameters() if p.requires_grad and clean_name(n) != n]
    if engine == "fsdp2" and path.is_file() and compiled and fitting:
        raise ValueError(
            f"Lightning does not find the optimizer's states of `{compiled[0]}` in the file {path}, and would begin with new"
            " ones. Compile in place (module.compile() instead of torch.compile(module)), or save folders:"
            " ModelParallelStrategy(save_distributed_checkpoint=True)."
        )
    try:
        yield
    except KeyError as error:
        if engine != "fsdp1":
            raise
        raise ValueError(
            f"the checkpoint {path} has optimizer states of {error}, a name that this module does not have. FSDP1 finds them"
            " by full names: where the run that made it used torch.compile, use it here, and the other way round."
        ) from error

"""Strategies under which a model cannot be loaded in codes; none of the libraries is needed to be told."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from lightning_pmss.modules.hub import quantised_options


class DeepSpeed(DeepSpeedStrategy):
    """DeepSpeed's strategy without what its constructor asks of the machine."""

    def __init__(self) -> None: ...


@pytest.mark.parametrize("strategy", [FSDPStrategy(), DeepSpeed()])
def test_strategies_that_keep_weights_in_parts_are_refused(tiny_llama: str, strategy: Strategy) -> None:
    with pytest.raises(ValueError, match=rf"as {type(strategy).__name__} would: use one device or DDP"):
        quantised_options("nf4", tiny_llama, "auto", strategy)

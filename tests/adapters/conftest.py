"""Adapters of one tiny base, with skeletons, ranks and layers that agree or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import save_adapter
from lightning_pmss.methods.pmss.config import PMSSConfig

Save = Callable[..., Path]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(1, 21).reshape(2, 10)).logits
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer GPT-2 with biases, which rounds in another place where the adapter's path is taken."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fresh(base: str) -> Callable[..., Any]:
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()

    return load


@pytest.fixture
def save(fresh: Callable[..., Any], tmp_path: Path) -> Save:
    """Write an adapter with a random update, and remember the logits it must give."""

    def write(
        name: str, *, seed: int = 1, dtype: torch.dtype = torch.float32, full: float = 1.0, **config: Any
    ) -> Path:
        model = fresh(dtype)
        report = convert(model, PMSSConfig(**{"rank": 6, **config}))
        generator = torch.Generator().manual_seed(seed)
        for layer in adapted_layers(model).values():
            v = torch.randn(layer.core.weight.shape, generator=generator)
            layer.core.weight.data.copy_(v)
            rows, columns = (part.float() for part in layer.slices())
            size = (columns @ layer.core_update().detach() @ rows).norm()
            layer.core.weight.data.mul_(0.3 * layer.base_weight().float().norm() / size)
        for module in report.also_train:
            for parameter in model.get_submodule(module).parameters():
                parameter.data.mul_(full)
        torch.save(logits(model), tmp_path / f"{name}.logits")
        return save_adapter(model, tmp_path / name)

    return write


@pytest.fixture
def expected(tmp_path: Path) -> Callable[[str], Tensor]:
    return lambda name: torch.load(tmp_path / f"{name}.logits", weights_only=True)

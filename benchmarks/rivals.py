"""The methods that are timed side by side: a small registry, shared by `benchmarks.step` and `benchmarks.gpu`.

Every rival is built from the same Llama blocks and shares the storage of their weights; only what it adds is its own. An
entry takes blocks with parameters of their own (frozen) and returns the module to call with ``inputs_embeds``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import (
    AdapterConfig,
    BATConfig,
    CURLoRAConfig,
    HiRAConfig,
    HUTConfig,
    LoRAConfig,
    LoRAXSConfig,
    MiSSConfig,
    PMSSConfig,
    convert,
)
from lightning_pmss.callbacks.flat_lora import StepNoise
from lightning_pmss.conversion.convert import adapted_layers

# Heads and width of the MLP by hidden size; 4096 and 5120 are LLaMA-2-7B's and 13B's.
INTERMEDIATE = {64: 176, 1024: 2816, 2048: 5632, 4096: 11008, 5120: 13824}


@dataclass(frozen=True)
class Case:
    """One comparison: Llama blocks of a width, and the ranks compared on them."""

    hidden: int
    rank: int
    layers: int = 2
    batch: int = 2
    length: int = 256
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.hidden}/{self.rank}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def lora_rank(self) -> int:
        """The rank at which LoRA trains as many parameters on a square layer: ``rank^2 / (in + out)``."""
        return max(1, self.rank**2 // (2 * self.hidden))

    @property
    def wide_rank(self) -> int:
        """The rank at which methods with one trained side, MiSS and the one-sided form, train as many there."""
        return 2 * self.lora_rank

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(out, in)`` of the seven linear layers of one block."""
        wide = INTERMEDIATE[self.hidden]
        return [(self.hidden, self.hidden)] * 4 + [(wide, self.hidden)] * 2 + [(self.hidden, wide)]


def blocks(case: Case, device: str = "cpu") -> nn.Module:
    """Frozen Llama blocks with random weights, without a vocabulary to speak of."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=case.hidden,
        intermediate_size=INTERMEDIATE[case.hidden],
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 128) if case.hidden >= 4096 else case.hidden // 64,
        attn_implementation="sdpa",
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        with torch.device(device):
            model: nn.Module = LlamaModel(config)
    finally:
        torch.set_default_dtype(before)
    return model.train().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own over the same storage."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


class ThinProducts(nn.Module):
    """``y = W x + C (U (R x))`` written down as it stands: three products, plain autograd, slices kept as copies."""

    def __init__(self, base: nn.Linear, rows: Tensor, cols: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("r", base.weight.detach()[rows])
        self.register_buffer("c", base.weight.detach()[:, cols])
        self.u = nn.Parameter(torch.zeros(len(cols), len(rows), device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + ((x @ self.r.T) @ self.u.to(x.dtype).T) @ self.c.T
        return y


def _naive(model: nn.Module, case: Case) -> nn.Module:
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                device = layer.weight.device
                rows = torch.randperm(layer.out_features, device=device)[: case.rank]
                cols = torch.randperm(layer.in_features, device=device)[: case.rank]
                setattr(module, name, ThinProducts(layer, rows, cols))
    return model


def _ours(make: Callable[[Case], AdapterConfig]) -> Callable[[nn.Module, Case], nn.Module]:
    def build(model: nn.Module, case: Case) -> nn.Module:
        convert(model, make(case))
        return model

    return build


def _pmss(**options: Any) -> Callable[[nn.Module, Case], nn.Module]:
    # Which rows and columns does not change a step's time; the random ones are drawn at once.
    return _ours(lambda case: PMSSConfig(rank=case.rank, selection="random", **options))


def _noisy(model: nn.Module, case: Case) -> nn.Module:
    """PMSS under `FlatLoRA`, in the middle of a training."""
    convert(model, PMSSConfig(rank=case.rank, selection="random"))
    noise = StepNoise()
    for name, layer in adapted_layers(model).items():
        noise.disturb(layer, name)
    noise.begin(0.05, (0, 1, 0))
    return model


def _full(model: nn.Module, case: Case) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.requires_grad_(True)
    return model


def _peft(make: Callable[[Any, Case], Any], **options: Any) -> Callable[[nn.Module, Case], nn.Module]:
    def build(model: nn.Module, case: Case) -> nn.Module:
        import peft

        wrapped: nn.Module = peft.get_peft_model(model, make(peft, case), **options)
        return wrapped

    return build


def _lora(rank: int, **options: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **options}


def _miss(peft: Any, rank: int, **options: Any) -> Any:
    return peft.MissConfig(r=rank, target_modules="all-linear", **options)


def _psoft(peft: Any, case: Case) -> Any:
    # The quick decomposition: how the frozen pair was found does not change a step's time.
    return peft.PsoftConfig(r=case.rank, target_modules="all-linear", psoft_svd="lowrank", psoft_svd_lowrank_niter=0)


# The order is the tables'. In brackets: with the adapter in the base's dtype, instead of peft's default of float32.
RIVALS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "frozen": lambda model, case: model,
    "pmss keep": _pmss(memory="keep"),
    "pmss regather": _pmss(memory="regather"),
    "pmss spectral": _pmss(coordinates="spectral"),
    "pmss regather, FlatLoRA": _noisy,
    "pmss weight edit": _pmss(edit="weight"),
    "one-sided equal parameters": _ours(
        lambda case: PMSSConfig(columns="all", rank=case.wide_rank, selection="random")
    ),
    "our lora equal parameters": _ours(lambda case: LoRAConfig(rank=case.lora_rank, alpha=2.0 * case.lora_rank)),
    "naive": _naive,
    "lora equal rank": _peft(lambda peft, case: peft.LoraConfig(**_lora(case.rank))),
    "lora equal parameters": _peft(lambda peft, case: peft.LoraConfig(**_lora(case.lora_rank))),
    "lora equal parameters (base dtype)": _peft(
        lambda peft, case: peft.LoraConfig(**_lora(case.lora_rank)), autocast_adapter_dtype=False
    ),
    "dora equal rank": _peft(lambda peft, case: peft.LoraConfig(**_lora(case.rank, use_dora=True))),
    "dora equal parameters": _peft(lambda peft, case: peft.LoraConfig(**_lora(case.lora_rank, use_dora=True))),
    "psoft equal rank": _peft(_psoft),
    "miss equal rank": _peft(lambda peft, case: _miss(peft, case.rank)),
    "miss equal parameters": _peft(lambda peft, case: _miss(peft, case.wide_rank)),
    "our miss equal parameters": _ours(lambda case: MiSSConfig(rank=case.wide_rank)),
    "bat equal parameters": _peft(lambda peft, case: _miss(peft, case.wide_rank, init_weights="bat")),
    "our bat, column equal parameters": _ours(lambda case: BATConfig(rank=case.wide_rank, form="column")),
    "our bat, row equal parameters": _ours(lambda case: BATConfig(rank=case.wide_rank, form="row")),
    "hira equal parameters": _peft(lambda peft, case: peft.HiraConfig(r=case.lora_rank, target_modules="all-linear")),
    "our hira equal parameters": _ours(lambda case: HiRAConfig(rank=case.lora_rank)),
    "our hut, tiled equal parameters": _ours(lambda case: HUTConfig(rank=case.lora_rank)),
    "our hut, diagonal": _ours(lambda case: HUTConfig(form="diagonal")),
    "our lora-xs equal parameters": _ours(lambda case: LoRAXSConfig(rank=case.rank)),
    "our curlora equal parameters": _ours(lambda case: CURLoRAConfig(rank=case.rank)),
    "full": _full,
}
# Ours and peft's of the same method.
PAIRS = {
    f"our {name} equal parameters": f"{peft} equal parameters"
    for name, peft in {"lora": "lora", "miss": "miss", "bat, column": "bat", "hira": "hira"}.items()
}


def build(name: str, base: nn.Module, case: Case) -> nn.Module:
    """One rival over the weights of ``base``."""
    return RIVALS[name](twin(base), case).train()


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The blocks' output ``[batch, length, hidden]``."""
    y: Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
    return y


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

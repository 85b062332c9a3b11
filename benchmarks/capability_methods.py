"""Our methods and some of peft's behind one interface, for the probes of `benchmarks.capabilities`."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import METHODS as OURS
from lightning_pmss import AdapterConfig, convert, load_adapter, merge, save_adapter, unmerge
from lightning_pmss.named import disable_adapter, load_adapters, set_adapter


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Toy(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class One(nn.Module):
    """A single layer to adapt, by the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


class Method(ABC):
    """What a probe may ask of a method."""

    @abstractmethod
    def adapt(self, model: nn.Module, targets: list[str]) -> nn.Module:
        """The adapted model, its update not zero."""

    @abstractmethod
    def adapt_parameters(self, model: nn.Module, names: list[str]) -> nn.Module:
        """The same of parameters that are no module's weight."""

    @abstractmethod
    def merge(self, model: nn.Module) -> None: ...

    @abstractmethod
    def unmerge(self, model: nn.Module) -> None: ...

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> Path:
        """Write the adapter and return its safetensors file."""

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> nn.Module: ...

    @abstractmethod
    def several(self, model: nn.Module, folders: list[Path]) -> nn.Module:
        """The model with all of these adapters, by number."""

    @abstractmethod
    def switch(self, model: nn.Module, number: int) -> nn.Module: ...

    @abstractmethod
    def disabled(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]: ...


def stir(model: nn.Module) -> nn.Module:
    """Give what is trained other values, as training would; else the update is zero and hides what is wrong."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    return model


class Ours(Method):
    """One of our methods."""

    def __init__(self, config: Callable[..., AdapterConfig]) -> None:
        self.config = config

    def adapt(self, model: nn.Module, targets: list[str]) -> nn.Module:
        convert(model, self.config(target_modules=targets, rank=8))
        return stir(model)

    def adapt_parameters(self, model: nn.Module, names: list[str]) -> nn.Module:
        convert(model, self.config(target_modules=[], target_parameters=names, rank=8))
        return stir(model)

    def merge(self, model: nn.Module) -> None:
        merge(model)

    def unmerge(self, model: nn.Module) -> None:
        unmerge(model)

    def save(self, model: nn.Module, folder: Path) -> Path:
        save_adapter(model, folder)
        return folder / "adapter_model.safetensors"

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        load_adapter(model, folder)
        return model

    def several(self, model: nn.Module, folders: list[Path]) -> nn.Module:
        load_adapters(model, {str(number): folder for number, folder in enumerate(folders)})
        return model

    def switch(self, model: nn.Module, number: int) -> nn.Module:
        set_adapter(model, str(number))
        return model

    def disabled(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return disable_adapter(model)


class Peft(Method):
    """One of peft's methods."""

    def __init__(self, make: Callable[[Any, list[str]], Any]) -> None:
        self.make = make

    def adapt(self, model: nn.Module, targets: list[str]) -> nn.Module:
        import peft

        return stir(peft.get_peft_model(model, self.make(peft, targets)))  # type: ignore[arg-type]

    def adapt_parameters(self, model: nn.Module, names: list[str]) -> nn.Module:
        import peft

        config = self.make(peft, [])
        if not hasattr(config, "target_parameters"):
            raise ValueError(f"{type(config).__name__} has no target_parameters.")
        config.target_parameters = names
        return stir(peft.get_peft_model(model, config))  # type: ignore[arg-type]

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter(safe_merge=True)  # type: ignore[operator]

    def unmerge(self, model: nn.Module) -> None:
        model.unmerge_adapter()  # type: ignore[operator]

    def save(self, model: nn.Module, folder: Path) -> Path:
        model.save_pretrained(str(folder))  # type: ignore[operator]
        return folder / "adapter_model.safetensors"

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        import peft

        loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
        return loaded

    def several(self, model: nn.Module, folders: list[Path]) -> nn.Module:
        import peft

        both: Any = peft.PeftModel.from_pretrained(model, str(folders[0]), adapter_name="0")  # type: ignore[arg-type]
        for number, folder in enumerate(folders[1:], start=1):
            both.load_adapter(str(folder), adapter_name=str(number))
        result: nn.Module = both
        return result

    def switch(self, model: nn.Module, number: int) -> nn.Module:
        model.set_adapter(str(number))  # type: ignore[operator]
        return model

    def disabled(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = model.disable_adapter()  # type: ignore[operator]
        return context


METHODS: dict[str, Method] = {
    **{method.config_class.label(): Ours(method.config_class) for method in OURS.values()},
    "peft LoRA": Peft(lambda peft, targets: peft.LoraConfig(r=8, target_modules=targets)),
    "peft DoRA": Peft(lambda peft, targets: peft.LoraConfig(r=8, target_modules=targets, use_dora=True)),
    "peft MiSS": Peft(lambda peft, targets: peft.MissConfig(r=8, target_modules=targets)),
    "peft HiRA": Peft(lambda peft, targets: peft.HiraConfig(r=8, target_modules=targets)),
    "peft PSOFT": Peft(lambda peft, targets: peft.PsoftConfig(r=8, target_modules=targets)),
}

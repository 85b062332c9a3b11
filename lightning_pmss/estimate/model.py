"""Build the model of a ``config.json`` without weights, and convert it for each method of fine-tuning.

Its tensors are *fake* tensors: they have a shape, a dtype and a device, but no memory. Unlike tensors on the meta device they
behave as if they were on the CPU, so a whole training step can be simulated (see `simulate`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_pmss.conversion.experts import experts_by_parameter, matrices_in, without_experts
from lightning_pmss.conversion.matrices import modules_for
from lightning_pmss.conversion.targets import find_targets, match_modules, ranks_of
from lightning_pmss.conversion.unconvertible import refuse_unconvertible
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.experts import adopt_experts
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.matrices import adopt_matrix
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.messages import reason
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.lora import LoRAConfig
from lightning_pmss.methods.method import Kind, Method, Spec
from lightning_pmss.store.model_config import read_model_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Piece:
    """One parameter, buffer or index tensor.

    Attributes:
        name: Full name in the model.
        shape: Its shape.
        itemsize: Bytes of one element.
        kind: ``"base"``, ``"trained"``, ``"factor"`` (frozen and derived by the method) or ``"index"`` (rows and columns).
        block: Name of the decoder layer that contains it; "" outside of the decoder layers.
        buffer: Whether it is not a parameter; every strategy replicates it.
        adapter: Name of the `Adapter` that owns it; "" if none does.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    kind: str
    block: str
    buffer: bool = False
    adapter: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.itemsize


def read_config(model: str | os.PathLike[str]) -> Any:
    """Read the Hugging Face configuration from a folder with ``config.json``, or from the file itself.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: transformers does not know this configuration.
    """
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a folder with config.json, or the file itself.")
    read_model_config(file, f"{file} is not a model configuration: it")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{file} is not a model configuration that transformers reads: {reason(error)}") from error


def weights_dtype(config: Any, asked: str) -> torch.dtype:
    """Return the dtype asked for; ``"auto"`` is the configuration's (float32 if it names none)."""
    if asked != "auto":
        return DTYPES[asked]
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else DTYPES.get(str(named), torch.float32)


class Architecture:
    """Builder of models of one configuration, a new model for each method.

    Args:
        config: Hugging Face configuration.
        dtype: Dtype of the weights.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def base(self) -> nn.Module:
        """Build the model as it would be loaded.

        Raises:
            ValueError: transformers has no causal language model for the configuration.
        """
        from transformers import AutoModelForCausalLM

        try:
            with self.mode, _quietly():
                model: nn.Module = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        except Exception as error:
            kind = getattr(self.config, "model_type", type(self.config).__name__)
            raise ValueError(f"no causal language model can be built of this {kind} config: {reason(error)}") from error
        return model.train()

    def adapted(self, config: AdapterConfig) -> nn.Module:
        """Build the converted model, with tensors of the right size and no values.

        Raises:
            ValueError: As in `lightning_pmss.convert`: patterns that match nothing, layers that cannot be converted.
        """
        model, ranks, also_train = self._targets(config)
        method, modules = method_of(config), modules_for(model, config)
        model.requires_grad_(False)
        with self.mode:
            for name in without_experts({n: modules[n] for n in ranks}):
                layer, rank, shape = modules[name], ranks[name], canonical_shape(modules[name])
                start, derived = _made(method, shape, rank, layer)
                AdaptedLinear.adopt(layer, method, rank, start, derived, config.scale_of(rank, shape))
            for name, matrix in matrices_in(ranks, modules).items():
                rank, shape = ranks[name], canonical_shape(matrix)
                start, derived = _made(method, shape, rank, matrix)
                adopt_matrix(matrix, method, rank, start, derived, config.scale_of(rank, shape))
            for group in experts_by_parameter(ranks, modules).values():
                layer, rank, shape = modules[group[0]], ranks[group[0]], canonical_shape(modules[group[0]])
                start, derived = _made(method, shape, rank, layer)
                experts: Any = [modules[name] for name in group]
                many = len(experts)
                adopt_experts(experts, method, rank, [start] * many, [derived] * many, config.scale_of(rank, shape))
            for name in ranks:
                for parameter in modules[name].core.parameters(recurse=False):  # type: ignore[union-attr, operator]
                    parameter.requires_grad_(True)
        for name in also_train:
            modules[name].requires_grad_(True)
        return model

    def lora(self, config: AdapterConfig, rank: int | None = None) -> tuple[nn.Module, int]:
        """Build the model with LoRA on the same layers, by default of about as many parameters; return it and the rank."""
        model, ranks, _ = self._targets(config)
        modules, method = modules_for(model, config), method_of(config)
        shapes = {name: canonical_shape(modules[name]) for name in ranks}
        specs = [spec for n, r in ranks.items() for spec in method.specs(shapes[n], r).values()]
        wanted = sum(math.prod(spec.shape) for spec in specs if spec.kind is Kind.TRAINED) / sum(
            map(sum, shapes.values())
        )
        rank = rank or max(1, round(wanted))
        kept = {f.name: getattr(config, f.name) for f in fields(AdapterConfig)} | {"rank": rank, "rank_pattern": {}}
        return self.adapted(LoRAConfig(**kept)), rank

    def full(self) -> nn.Module:
        """Build the model with every parameter trained."""
        return self.base().requires_grad_(True)

    def _targets(self, config: AdapterConfig) -> tuple[nn.Module, dict[str, int], list[str]]:
        model = self.base()
        modules = modules_for(model, config)
        also_train = match_modules(config.also_train, without_experts(modules), "also_train")
        targets, _ = find_targets(model, config, modules, also_train)
        method = method_of(config)
        refuse_unconvertible(targets, modules, method, None)
        ranks = ranks_of(config, targets, modules)
        return model, {n: method.rank_of(canonical_shape(modules[n]), r) for n, r in ranks.items()}, also_train


def inventory(model: nn.Module) -> list[Piece]:
    """List every parameter, buffer and index tensor once."""
    blocks = decoder_blocks(model)

    def block_of(name: str) -> str:
        return next((block for block in blocks if name.startswith(f"{block}.")), "")

    owners = {id(p): n for n, m in model.named_modules() if isinstance(m, Adapter) for p in m.parameters()}
    pieces = []
    for name, parameter in model.named_parameters():
        adapter = owners.get(id(parameter), "")
        kind = "trained" if parameter.requires_grad else "factor" if adapter else "base"
        shape = tuple(parameter.shape)
        pieces.append(Piece(name, shape, parameter.element_size(), kind, block_of(name), adapter=adapter))
    for name, buffer in model.named_buffers():
        pieces.append(Piece(name, tuple(buffer.shape), buffer.element_size(), "base", block_of(name), buffer=True))
    for name, index in index_tensors(model).items():
        pieces.append(Piece(name, tuple(index.shape), index.element_size(), "index", block_of(name), buffer=True))
    return pieces


def decoder_blocks(model: nn.Module) -> list[str]:
    """Names of the units that FSDP shards and checkpointing recomputes: `_no_split_modules`, else the largest ModuleList."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    named = [name for name, module in model.named_modules() if type(module).__name__ in kinds and name]
    outer = [n for n in named if not any(n != o and n.startswith(f"{o}.") for o in named)]
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name, module in lists:  # the whole list, because a model may list only some of the classes in it
        children = [f"{name}.{i}" for i in range(len(module))]
        if set(children) & set(outer):
            outer += [c for c in children if c not in outer]
    if outer or not lists:
        return outer
    name, module = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [f"{name}.{i}" for i in range(len(module))]


def count(pieces: list[Piece]) -> Counter[str]:
    """Count the parameters by kind."""
    numbers: Counter[str] = Counter()
    for piece in pieces:
        if not piece.buffer:
            numbers[piece.kind] += piece.numel
    return numbers


def _made(
    method: Method[Any], shape: tuple[int, int], rank: int, layer: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained tensors of a layer, and the others, without values."""
    specs, dtype = method.specs(shape, rank), core_dtype(layer.weight.dtype)  # type: ignore[arg-type, union-attr]
    made = {name: _empty(spec, dtype) for name, spec in specs.items()}
    trained = {name for name, spec in specs.items() if spec.kind is Kind.TRAINED}
    return {n: t for n, t in made.items() if n in trained}, {n: t for n, t in made.items() if n not in trained}


def _empty(spec: Spec, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor of this kind; indices have values, because they must be distinct."""
    return torch.arange(spec.shape[0]) if spec.kind is Kind.INDEX else torch.empty(spec.shape, dtype=dtype)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' warnings on generation and attention, which do not apply to a model without weights."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

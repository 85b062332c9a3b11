"""The matrices of fused experts in a checkpoint on disk, under the names that they have in a model.

transformers fuses experts when it loads a model, and takes most of them apart when it saves one. On disk they are therefore
one 3-D tensor, ``X.experts.down_proj``, or the matrices of each expert, ``X.experts.0.w2.weight``. In a model the matrix of
expert 0 is ``X.experts.down_proj.0``, and its ``gate_up_proj`` has the rows of gate and up below each other.

A matrix that is a parameter of its module, ``X.in_proj_weight``, is a layer of this very name, whose weight is found here, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_APART = re.compile(
    r"(?P<owner>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_FUSED = re.compile(r"(?P<owner>(?:.*\.)?experts)\.(?P<part>gate_up_proj|up_proj|down_proj)")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_RENAMED = ("block_sparse_moe.", "mlp.")  # on disk, in the model


class Info(Protocol):
    """A tensor in a file."""

    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> str: ...


@dataclass(frozen=True)
class ExpertTensor:
    """One expert's W ``[out, in]``.

    Attributes:
        key: Its name as that of a layer's weight.
        dtype: As stored.
        shape: ``(out, in)``.
        file: Where it is, or its first part.
        parts: Names of the tensors whose rows it has, below each other.
        index: Place of the expert in a 3-D tensor, which is the only part; None where each expert has tensors of its own.
        transposed: Whether that one keeps W^T.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    parts: tuple[str, ...]
    index: int | None = None
    transposed: bool = False

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        """W from its parts as they are stored."""
        if self.index is None:
            return torch.cat([stored[part] for part in self.parts])
        matrix = stored[self.parts[0]][self.index]
        return matrix.T if self.transposed else matrix

    def back(self, weight: Tensor) -> Tensor:
        """A matrix ``[out, in]`` as the 3-D tensor keeps it."""
        return weight.T if self.transposed else weight


def expert_tensors(tensors: Mapping[str, Info]) -> dict[str, ExpertTensor]:
    """The matrices of all experts and all parameters, as weights of layers; names that transformers changes are there twice."""
    found: dict[str, ExpertTensor] = {}
    apart: dict[tuple[str, str], dict[str, Info]] = {}
    for key, info in tensors.items():
        if (match := _APART.fullmatch(key)) and len(info.shape) == 2:
            part = _PARTS.get(match["part"], match["part"])
            apart.setdefault((match["owner"], match["index"]), {})[part] = info
        elif (match := _FUSED.fullmatch(key)) and len(info.shape) == 3:
            transposed = _keeps_transposed(tensors, match["owner"])
            _, first, second = info.shape
            shape = (second, first) if transposed else (first, second)
            for i in range(info.shape[0]):
                name = f"{key}.{i}.weight"
                found[name] = ExpertTensor(name, info.dtype, shape, info.file, (key,), i, transposed)
    for (owner, index), parts in apart.items():
        gated = "gate_proj" in parts and "up_proj" in parts
        for name, wanted in (
            ("gate_up_proj" if gated else "up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            infos = [parts[part] for part in wanted if part in parts]
            if infos and len({(info.dtype, info.shape[1]) for info in infos}) == 1:
                full = f"{owner}.{name}.{index}.weight"
                shape = (sum(info.shape[0] for info in infos), infos[0].shape[1])
                keys = tuple(info.key for info in infos)
                found[full] = ExpertTensor(full, infos[0].dtype, shape, infos[0].file, keys)
    for key, info in tensors.items():  # a matrix that is a parameter of a module which is no linear layer
        if len(info.shape) == 2:
            shape = (info.shape[0], info.shape[1])
            found.setdefault(f"{key}.weight", ExpertTensor(f"{key}.weight", info.dtype, shape, info.file, (key,)))
    on_disk, in_model = _RENAMED
    for name, tensor in list(found.items()):
        if on_disk in name:
            found[name.replace(on_disk, in_model)] = tensor
    return found


def _keeps_transposed(tensors: Mapping[str, Info], owner: str) -> bool:
    """Whether 3-D tensors are ``[experts, in, out]``, by their sides: gate and up together are twice the inner one."""
    up, down = tensors.get(f"{owner}.gate_up_proj"), tensors.get(f"{owner}.down_proj")
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3:
        return False
    return up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]

"""PMSS (arXiv 2409.16722) as a `Method`: what its tensors are, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.layers.layout import picked
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Factors, Kind, Method, Shape, Spec, Update
from lightning_pmss.methods.pmss import sums
from lightning_pmss.methods.pmss.applied import applied_edit, why_not_applied
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.coordinates import Frame, PMSSCore, coordinate_frame, trained_shape
from lightning_pmss.methods.pmss.experts import grouped_edit, stacked_update, why_no_expert_options
from lightning_pmss.methods.pmss.layer import PMSSLinear, can_output_edit, choose_edit, why_no_weight_edit
from lightning_pmss.methods.pmss.merged_twice import is_merged
from lightning_pmss.methods.pmss.number_range import why_out_of_range
from lightning_pmss.methods.pmss.one_sided import OneSided
from lightning_pmss.methods.pmss.rounding import LIMIT, LOW_PRECISION, fitting_rank, rounding_error
from lightning_pmss.methods.pmss.selection import projection_residual, select_skeleton
from lightning_pmss.methods.pmss.skeleton import read_skeleton, why_no_skeleton
from lightning_pmss.store import why_no_index


@dataclass(frozen=True)
class PMSSUpdate(Update):
    """``W' = W + W[:, cols] U W[rows]``.

    Attributes:
        U: ``s U [c, r]``, float32 (float64 on a float64 base).
        rows: int64 ``[r]``, rows of W in the canonical layout ``[out, in]``.
        cols: int64 ``[c]``, columns.
    """

    bound_to_base = True

    U: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def rank(self) -> int:
        return min(self.U.shape)

    @property
    def ranks(self) -> int | list[int]:
        columns, rows = self.U.shape
        return rows if rows == columns else [columns, rows]

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        for name, size in (("rows", shape[0]), ("cols", shape[1])):
            if reason := why_no_index(tensors[name], size):
                return f"{name} {reason}. W is {list(shape)}"
        u, expected = tensors["U"], [len(tensors["cols"]), len(tensors["rows"])]
        if u.dtype not in (torch.float32, torch.float64) or list(u.shape) != expected:
            return f"U is {u.dtype} {list(u.shape)}; by its indices it must be float32 or float64 {expected}"
        return None

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        rows, cols = (indices[name].to(weight.device) for name in ("rows", "cols"))
        return picked(weight, rows, 0), picked(weight, cols, 1)

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, PMSSUpdate]]) -> PMSSUpdate:
        return cls(*sums.weighted([(weight, (u.U, u.rows, u.cols)) for weight, u in updates]))

    def trimmed(self) -> PMSSUpdate:
        return PMSSUpdate(*sums.trimmed(self.U, self.rows, self.cols))

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors:
        r, c = (part.to(dtype) for part in self.reads(weight, {"rows": self.rows, "cols": self.cols}))
        u = self.U.to(dtype)
        # R and C themselves where they are the thinner side: that factor is then a copy of the base's own numbers.
        return Factors(r, c @ u) if len(self.rows) <= len(self.cols) else Factors(u @ r, c)

    def bound(self, weight: Tensor) -> float:
        parts = [self.U, *self.reads(weight, {"rows": self.rows, "cols": self.cols})]
        return float(torch.stack([torch.linalg.vector_norm(p.double()).cpu() for p in parts]).prod())


class PMSS(Method[PMSSConfig]):
    """``W' = W + s C U R`` with columns and rows of W."""

    config_class = PMSSConfig
    update_class = PMSSUpdate
    layer_class = PMSSLinear
    doing = "selecting rows and columns"
    derived = "rows and columns"
    trained = "U"
    variants: ClassVar[Sequence[Mapping[str, Any]]] = ({"columns": "all"},)

    @classmethod
    def of(cls, config: PMSSConfig) -> Method[PMSSConfig]:
        """With all columns the mathematics is that of `one_sided`."""
        return OneSided(config) if config.columns == "all" else cls(config)

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """V, the parts of the `Frame`, rows and columns."""
        coordinates = self.config.coordinates
        found = {
            "weight": Spec(trained_shape(coordinates, rank), Kind.TRAINED),
            "rows": Spec((rank,), Kind.INDEX, shape[0]),
            "cols": Spec((rank,), Kind.INDEX, shape[1]),
        }
        square, one = Spec((rank, rank), Kind.FROZEN), Spec((1, 1), Kind.FROZEN)
        if coordinates in ("orthonormal", "rotation"):
            found |= {"left": square, "right": square}
        if coordinates in ("spectral", "rotation"):
            found["gain"] = one
        return found | ({"core": square} if coordinates == "rotation" else {})

    def derive(self, weight: Tensor | None, rank: int, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows and columns by ``config.selection``, and the factors of the coordinates."""
        config, found = self.config, dict(given)
        if "rows" not in found:
            assert weight is not None
            rows, cols = select_skeleton(
                weight,
                rank,
                selection=config.selection,
                row_mode=config.row_mode,
                oversample=config.oversample,
                seed=config.seed,
                name=name,
            )
            # Ascending: gathers of every pass read memory in order, two to five times faster.
            found |= {"rows": rows.sort().values, "cols": cols.sort().values}
        if weight is not None and not any(part in found for part in Frame._fields):
            r, c = PMSSUpdate.reads(weight, found)
            found |= coordinate_frame(c, r, config.coordinates, name, weight=weight).present()
        return found

    def read_given(self) -> Given | None:
        """``skeleton_file``."""
        config = self.config
        file = config.skeleton_file
        return None if file is None else read_skeleton(file, config.coordinates, config.columns)

    def why_underived(self, given: Given | None, name: str) -> str | None:
        """Rows and columns, and coordinates other than raw, need W, or a skeleton file that has them."""
        return why_no_skeleton(given, self.config.coordinates)

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """``s U`` from V."""
        return PMSSCore.values_of(tensors, scale)

    def numbers(self, update: PMSSUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """V from ``s U``."""
        frame = Frame(**frozen)
        dtype = next(iter(frozen.values())).dtype if frozen else update.U.dtype
        columns, rows = update.U.shape
        core = PMSSCore(columns, rows, frame, dtype, update.U.device)
        return {"weight": core.numbers_of(update.U, scale, name)}

    def fitted(self, weight: Tensor, update: PMSSUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Filled up with indices that are not in use, for which U is zero."""
        triple = update.U, update.rows, update.cols
        return sums.padded(weight, triple, rank, self.config.coordinates, scale, name)

    def for_several(self) -> PMSSConfig:
        """Each adapter has a rotation of its own part of W, so together they are kept in orthonormal coordinates."""
        kept = "orthonormal" if self.config.coordinates == "rotation" else self.config.coordinates
        return replace(self.config, coordinates=kept, skeleton_file=None)

    def make_adapter(
        self,
        start: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        device: torch.device,
        indices: Mapping[str, Tensor],
    ) -> Adapter:
        """A `PMSSCore`."""
        weight = start["weight"]
        core = PMSSCore(len(indices["cols"]), len(indices["rows"]), Frame(**frozen), weight.dtype, device)
        if device.type != "meta":
            core.weight.data.copy_(weight)
        return core

    def refuse(self, layer: nn.Module, name: str) -> None:
        """Edits that the layer's class or dtype does not allow."""
        if self.config.edit == "output" and not can_output_edit(layer):
            raise ValueError(
                f"`{name}`: edit='output' needs the product without its bias, which {type(layer).__name__} hides; use"
                " edit='auto'."
            )
        if self.config.edit == "weight" and (reason := why_no_weight_edit(layer, self.config.dropout)):
            raise ValueError(f"`{name}`: edit='weight' {reason}")

    def why_untrainable(
        self, weight: Tensor, tensors: Mapping[str, Tensor], scale: float, dtype: torch.dtype
    ) -> str | None:
        """See `number_range`."""
        r, c = PMSSUpdate.reads(weight, tensors)
        return why_out_of_range(weight, (c, r), _frame(tensors), self.config.coordinates, scale, dtype)

    def looks_merged(self, base: Tensor, loaded: Tensor, indices: Mapping[str, Tensor]) -> bool:
        """See `merged_twice`."""
        return is_merged(base, loaded, indices["rows"], indices["cols"])

    def why_no_matrix(self) -> str | None:
        """Rotations are no matrices."""
        if self.config.coordinates != "rotation":
            return None
        return "trains a packed triangle in rotation coordinates; take coordinates='orthonormal', or another optimizer."

    def describe(self, layer: PMSSLinear) -> str:
        """Rank, edit and coordinates."""
        ranks = f"rank={layer.cols.shape[0]}x{layer.rows.shape[0]}"
        return f"pmss({ranks}, edit={layer.edit}, coordinates={layer.coordinates})"

    def prepare(self, layer: PMSSLinear) -> None:
        """The options that the products read."""
        config = self.config
        if config.edit == "weight" and (reason := why_no_weight_edit(layer, config.dropout)):
            raise ValueError(f"edit='weight' {reason}")
        layer.coordinates, layer.dropout, layer.memory = config.coordinates, float(config.dropout), config.memory
        layer.edit = choose_edit(layer, canonical_shape(layer)) if config.edit == "auto" else config.edit

    def forward(self, layer: PMSSLinear, x: Tensor) -> Tensor:
        """By one of the edits."""
        return layer.edited(x)

    def why_no_experts(self) -> str | None:
        """See `why_no_expert_options`."""
        return why_no_expert_options(self.config)

    def stacked_values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """``s U`` of each expert."""
        return {"U": stacked_update(tensors, scale)}

    def grouped(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """The same of all experts, by the cheaper of both edits."""
        return grouped_edit(layer, x, layer.values()["U"], self.config)

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """See `lightning_pmss.methods.pmss.applied`."""
        return why_not_applied(layer, self.config)

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """See `lightning_pmss.methods.pmss.applied`."""
        return applied_edit(layer, x, self.config)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """h ``[r]``."""
        return rank

    def figures(self, weight: Tensor | None, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The residual of the columns, and what rounding takes of an update."""
        low = dtype if dtype in LOW_PRECISION else torch.bfloat16  # in which autocast may compute
        frame = _frame(tensors)
        error = rounding_error(frame, low)
        found = {"rounding_error": error, "fitting_rank": fitting_rank(frame, low) if error > LIMIT else None}
        if weight is not None:
            found["residual"] = projection_residual(weight, tensors["cols"].to(weight.device))
        return found


def _frame(tensors: Mapping[str, Tensor]) -> Frame:
    return Frame(*(tensors.get(part) for part in Frame._fields))

"""Find the target layers of a model, convert them in place, freeze the rest, and report what was done."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.config import PMSSConfig
from lightning_pmss.layers import Frame, PMSSLinear, canonical_shape, coordinate_frame, core_dtype, is_transposed
from lightning_pmss.report import ConversionReport, LayerReport
from lightning_pmss.selection import projection_residual, select_skeleton
from lightning_pmss.targets import (
    Skeleton,
    canonical_modules,
    find_targets,
    hugging_face_root,
    match_modules,
    ranks_of,
    refuse_unconvertible,
)


def convert(model: nn.Module, config: PMSSConfig, *, skeleton: Skeleton | None = None) -> ConversionReport:
    """Convert the targeted linear layers of a model in place and freeze everything but U and ``also_train``.

    Everything is checked and computed before the first layer is touched: after an error the model is as it was.

    Args:
        model: Any module. Names are taken relative to the Hugging Face model inside it, where there is exactly one.
        config: What to convert and how.
        skeleton: Rows and columns per module, used instead of selecting (as when an adapter is loaded).

    Returns:
        The report; converting again with an equal config changes nothing and returns the first one's report.

    Raises:
        ValueError: A pattern matches nothing, a matched layer cannot be converted (unsupported type, tied weight, meta
            tensor without a skeleton, already sharded, called past its ``forward``), or the model was converted with
            another config.
    """
    if (done := conversion_of(model)) is not None:
        if done.config == config and skeleton is None:
            return done
        changed = [k for k, v in config.to_dict().items() if done.config.to_dict()[k] != v]
        what = f"another config (differs in {', '.join(changed)})" if changed else "its own selection"
        raise ValueError(f"the model is already converted with {what}; build a fresh model and convert that one.")
    modules = canonical_modules(model)
    if config.skeleton_file is not None and skeleton is None:
        skeleton = read_skeleton(config.skeleton_file)
    also_train = match_modules(config.also_train, modules, "also_train")
    targets, left_out = find_targets(model, config, modules, also_train)
    refuse_unconvertible(targets, modules, config, skeleton)
    ranks = ranks_of(config, targets, modules)

    plans: dict[str, tuple[Tensor, Tensor, Frame]] = {}
    layers: list[LayerReport] = []
    for name in tqdm(targets, desc="selecting rows and columns", unit="layer", disable=None):
        layer = modules[name]
        weight = layer.weight.detach()  # type: ignore[union-attr, operator]
        weight = weight.T if is_transposed(layer) else weight
        shape = canonical_shape(layer)
        if skeleton is not None:
            rows, cols = _checked(skeleton[name], shape, name)
        else:
            rank = min(ranks[name], *shape)
            rows, cols = select_skeleton(
                weight,
                rank,
                selection=config.selection,
                row_mode=config.row_mode,
                oversample=config.oversample,
                seed=config.seed,
                name=name,
            )
        frame, residual = Frame(), None
        if not weight.is_meta:
            rows, cols = rows.to(weight.device), cols.to(weight.device)
            frame = coordinate_frame(weight[:, cols], weight[rows], config.coordinates, name)
            residual = projection_residual(weight, cols)
        plans[name] = rows, cols, frame
        layers.append(
            LayerReport(
                name=name,
                shape=shape,
                rank=len(cols),
                requested_rank=ranks[name] if skeleton is None else len(cols),
                edit="",
                trainable=len(cols) * len(rows),
                residual=residual,
                kept_bytes_per_token=len(rows) * weight.element_size(),
                file_bytes=len(cols) * len(rows) * core_dtype(weight.dtype).itemsize + 4 * (len(cols) + len(rows)),
            )
        )

    for report in layers:
        rows, cols, frame = plans[report.name]
        layer = PMSSLinear.adopt(
            modules[report.name],
            rows,
            cols,
            frame,
            scale=config.scale,
            coordinates=config.coordinates,
            dropout=config.dropout,
            edit=config.edit,
            memory=config.memory,
        )
        report.edit = layer.edit
    notes = _leave_fast_paths(model)
    model.requires_grad_(False)
    for name in targets:
        modules[name].core.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    for name in also_train:
        modules[name].requires_grad_(True)
    done = ConversionReport(
        config=config,
        layers=layers,
        left_out=left_out,
        also_train=sorted(also_train),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for n, p in model.named_parameters() if not n.endswith((".core.left", ".core.right"))),
        also_train_bytes=sum(t.nbytes for name in also_train for t in modules[name].state_dict().values()),
        notes=notes,
    )
    hugging_face_root(model)[0].pmss_report = done  # type: ignore[assignment]
    return done


def conversion_of(model: nn.Module) -> ConversionReport | None:
    """The report of the conversion that this model went through, or None."""
    for module in model.modules():
        if isinstance(report := module.__dict__.get("pmss_report"), ConversionReport):
            return report
    return None


def pmss_layers(model: nn.Module) -> dict[str, PMSSLinear]:
    """The converted layers under their canonical names."""
    return {name: m for name, m in canonical_modules(model).items() if isinstance(m, PMSSLinear)}


def read_skeleton(path: str | Path) -> Skeleton:
    """Read ``<module>.rows`` and ``<module>.cols`` from a safetensors file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"skeleton_file={str(path)!r} does not exist.")
    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
        names = sorted(key.removesuffix(".rows") for key in keys if key.endswith(".rows"))
        if not names or any(f"{n}.cols" not in keys for n in names):
            raise ValueError(f"skeleton_file={str(path)!r} does not hold `<module>.rows` and `<module>.cols` in pairs.")
        return {n: (file.get_tensor(f"{n}.rows").long(), file.get_tensor(f"{n}.cols").long()) for n in names}


def _leave_fast_paths(model: nn.Module) -> list[str]:
    """Keep torch's fused encoder kernel from running on the bare weights of converted layers in evaluation."""
    notes = []
    for name, module in model.named_modules():
        if not any(isinstance(m, PMSSLinear) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own switch: without a known activation the plain path runs
            notes.append(
                f"`{name}`: the fused inference path of nn.TransformerEncoderLayer reads weights directly; off"
            )
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return notes


def _checked(indices: tuple[Tensor, Tensor], shape: tuple[int, int], name: str) -> tuple[Tensor, Tensor]:
    for what, index, size in (("rows", indices[0], shape[0]), ("cols", indices[1], shape[1])):
        if (
            index.dim() != 1
            or len(index) == 0
            or len(index.unique()) != len(index)
            or not 0 <= int(index.min()) <= int(index.max()) < size
        ):
            raise ValueError(
                f"`{name}`: the stored {what} are not distinct indices below {size}; the file is for another model."
            )
    return indices[0].long(), indices[1].long()

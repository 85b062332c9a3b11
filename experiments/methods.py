"""The methods that are compared, as callbacks of the same Trainer: those of this library, and peft's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from experiments.calibrated import RULES, calibrate, choose
from experiments.frozen_a import FrozenA
from experiments.layer_scales import LayerScales
from experiments.rectangular import RectangularCore
from experiments.rotating import RotatingCore
from lightning_pmss import METHODS as OUR_METHODS
from lightning_pmss import AdapterCallback, PMSSCallback, PMSSConfig
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.conversion.roots import canonical_modules
from lightning_pmss.conversion.targets import find_targets
from lightning_pmss.methods.pmss.coordinates import Frame
from lightning_pmss.methods.pmss.layer import pmss_layers
from lightning_pmss.methods.pmss.selection import SELECTORS, select_rows, select_skeleton

TARGETS: dict[str, str | list[str]] = {
    "all": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def _lora(peft: Any, rank: int, **more: Any) -> Any:
    return peft.LoraConfig(r=rank, **({"lora_alpha": 2 * rank} | more))


PEFT: dict[str, Callable[..., Any]] = {
    "lora": _lora,
    "rslora": functools.partial(_lora, use_rslora=True, lora_alpha=16),
    "dora": functools.partial(_lora, use_dora=True),
    "miss": lambda peft, rank, **more: peft.MissConfig(r=rank, **more),
    "psoft": lambda peft, rank, **more: peft.PsoftConfig(r=rank, psoft_alpha=rank, **more),
}
OURS = {f"our {name}": method.config_class for name, method in OUR_METHODS.items() if name != "pmss"}
METHODS = ("pmss", *OURS, *PEFT, "frozen_a", "full", "base")


def callbacks(method: Mapping[str, Any], seed: int, folder: Path, calibration: Any) -> list[Callback]:
    """What turns the base into the method.

    Args:
        method: ``name``, ``rank`` and further arguments of the method.
        seed: Of what the method draws.
        folder: Where files of the run may lie; it is deleted afterwards.
        calibration: ``() -> list of batches`` of the training set, for skeletons chosen with them.
    """
    options = dict(method)
    name = options.pop("name")
    targets = TARGETS[options.pop("targets", "all")]
    if name in ("full", "base"):
        return []
    quiet: dict[str, Any] = {"merge_on_save": None, "log_throughput": False, "output_dir": folder}
    if name in OURS:
        chosen: Any = OURS[name]
        drawn = {"seed": seed} if any(option.name == "seed" for option in fields(chosen)) else {}
        return [AdapterCallback(chosen(target_modules=targets, **drawn, **options), **quiet)]
    if name == "frozen_a":
        return [FrozenA(target_modules=targets, calibration=calibration, seed=seed, **{"batches": 4} | options)]
    if name in PEFT:
        return [PeftCallback(name, target_modules=targets, **options)]
    skeleton, reselect, frame = (options.pop(key, None) for key in ("skeleton", "reselect", "frame"))
    core, sides, layer_scales = (options.pop(key, None) for key in ("core", "sides", "layer_scales"))
    whitened = options.pop("whitened", None)
    options.setdefault("scale", 1.0)  # a run is what its file says, whatever the library's defaults become
    options.setdefault("coordinates", "orthonormal")
    found: list[Callback] = [PMSSCallback(target_modules=targets, seed=seed, **quiet, **options)]
    if skeleton is not None:
        file = folder / "skeleton.safetensors"
        found = [
            CalibratedSkeleton(
                PMSSConfig(target_modules=targets, columns=options.get("columns", "selected"), rank=options["rank"]),
                file,
                calibration,
                **skeleton,
            ),
            PMSSCallback(target_modules=targets, seed=seed, skeleton_file=file, **quiet, **options),
        ]
    if core is not None:
        found.append(RotatingCore(core))
    if sides is not None:
        found.append(RectangularCore(**sides))
    if frame is not None:
        found.append(WeightedFrame(**frame))
    if whitened is not None:
        found.append(WhitenedFeatures(calibration, whitened))
    if layer_scales is not None:
        found.append(LayerScales(layer_scales))
    return found if reselect is None else [*found, Reselection(seed=seed, **reselect)]


class PeftCallback(Callback):
    """Wraps the model in a peft adapter as soon as it is built; the rival of `PMSSCallback`."""

    def __init__(self, name: str, rank: int, **options: Any) -> None:
        self.name, self.rank, self.options = name, rank, options

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        import peft

        if getattr(pl_module, "model", None) is None:
            pl_module.configure_model()
        if not isinstance(pl_module.model, peft.PeftModel):
            pl_module.model = peft.get_peft_model(pl_module.model, PEFT[self.name](peft, self.rank, **self.options))  # type: ignore[arg-type]


class CalibratedSkeleton(Callback):
    """Chooses rows and columns with a few batches, before `PMSSCallback` reads them from ``file``."""

    def __init__(self, config: PMSSConfig, file: Path, calibration: Any, by: str, batches: int = 4) -> None:
        if by not in RULES:
            raise ValueError(f"skeleton.by={by!r} is not known; choose one of {list(RULES)}.")
        self.config, self.file, self.calibration, self.by, self.batches = config, file, calibration, by, batches

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.file.exists():
            return
        pl_module.configure_model()
        model: Any = pl_module.model
        modules = canonical_modules(pl_module)
        names, _ = find_targets(pl_module, self.config, modules, [])
        layers: dict[str, nn.Module] = {name: modules[name] for name in names}
        model.requires_grad_(False)
        moments = calibrate(
            layers, model.get_input_embeddings(), _loss(pl_module), (self.calibration()[: self.batches])
        )
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weight: Any = layer.weight
            rows, cols = choose(weight, moments[name], min(self.config.rank, *weight.shape), self.by)
            tensors |= {f"{name}.rows": rows.int()}
            if self.config.columns == "selected":
                tensors |= {f"{name}.cols": cols.int()}
        save_file(tensors, self.file)


class WeightedFrame(Callback):
    """Coordinates between orthonormal (powers 0) and raw (powers 1), of mean square 1 on both sides.

    With ``C = P S Z^T`` the trained V acts through ``P S^left`` in place of P, and so R on its side: directions that W
    itself is large in learn faster. Left 0 and right 1 is the shape of PSOFT's update ``P (rotation - 1) S Z^T``.
    """

    def __init__(self, left: float, right: float) -> None:
        self.left, self.right = left, right

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in pmss_layers(pl_module).values():
            rows, columns = layer.slices()
            left, right = _factor(columns, self.left), _factor(rows.T, self.right).T.contiguous()
            layer.core.set_frozen(Frame(left, right).present())


class WhitenedFeatures(Callback):
    """Coordinates of a one-sided skeleton whose features have equal second moments and no correlation, over a few batches.

    With ``E[h h^T] = L L^T`` of ``h = W[rows] x`` the features are ``L^-1 h``, times the root mean square that those of
    orthonormal rows have.
    """

    def __init__(self, calibration: Any, batches: int) -> None:
        self.calibration, self.batches = calibration, batches

    @override
    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers: dict[str, Any] = adapted_layers(pl_module)
        moments: dict[str, Tensor] = {}
        handles = []
        for name, layer in layers.items():

            def add(_: nn.Module, __: Any, output: Tensor, name: str = name, rows: Tensor = layer.rows) -> None:
                h = output[..., rows].flatten(0, -2).double()  # the update is zero, and these layers have no bias
                moments[name] = moments.get(name, 0) + h.T @ h / len(h)

            handles.append(layer.register_forward_hook(add))
        for batch in self.calibration()[: self.batches]:
            _loss(pl_module)(batch)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            right = layer.core.frozen()["right"].double()
            size = ((right @ moments[name] @ right.T).trace() / len(right) / self.batches).sqrt()
            lower = torch.linalg.cholesky(moments[name] / self.batches)
            eye = torch.eye(len(right), dtype=torch.float64, device=right.device)
            layer.core.set_frozen({"right": (size * torch.linalg.solve_triangular(lower, eye, upper=False)).float()})


def _factor(columns: Tensor, power: float) -> Tensor:
    """F with ``columns @ F = P S^power`` over its root mean square, for ``columns = P S Z^T``."""
    _, s, right = torch.linalg.svd(columns.double(), full_matrices=False)
    weights = s**power
    return (right.T * (weights / s / weights.square().mean().sqrt())).float()


def _loss(module: Any) -> Callable[[Any], Tensor]:
    return lambda batch: module.response_loss({k: v.to(module.device) for k, v in batch.items()})[0]


class Reselection(Callback):
    """Every ``every`` steps: merge U into W, choose a fresh skeleton, go on from U = 0 with fresh Adam moments.

    The rank of the whole update and its subspace grow at constant trainable memory (as ReLoRA, arXiv 2307.05695, does for
    LoRA and GaLore, arXiv 2403.03507, for gradients). W must be float32: in bfloat16 merging rounds.

    Args:
        every: Steps between selections.
        by: A rule of `lightning_pmss.methods.pmss.selection`, or of `experiments.calibrated` with the last batches trained on.
        batches: How many of those.
        seed: Of the selection.
        until: No selection after this share of the steps.
    """

    def __init__(self, every: int, by: str, batches: int = 4, seed: int = 0, until: float = 0.85) -> None:
        if by not in (*RULES, *SELECTORS):
            raise ValueError(f"reselect.by={by!r} is not known; choose one of {[*RULES, *SELECTORS]}.")
        self.every, self.by, self.batches, self.seed, self.until = every, by, batches, seed, until
        self.last: list[Any] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # PMSSCallback refuses a W that was changed, since its adapter then fits no base. The studies drop that adapter.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PMSSCallback):
                assert callback._ending is not None
                callback._ending.watch = None

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = [*self.last, batch][-self.batches :]
        step = trainer.global_step
        if step % self.every or step > self.until * trainer.max_steps:
            return
        layers: dict[str, Any] = adapted_layers(pl_module)
        moments = {}
        if self.by in RULES:
            modules: dict[str, nn.Module] = dict(layers)
            moments = calibrate(modules, pl_module.model.get_input_embeddings(), _loss(pl_module), self.last)
        state = trainer.optimizers[0].state
        with torch.no_grad():
            for name, layer in layers.items():
                if layer.weight.dtype != torch.float32:
                    raise ValueError("reselection merges into W, which must be float32; set dtype: float32.")
                two_sided, rank = hasattr(layer, "cols"), len(layer.rows)
                change = layer.core_update() @ layer.weight_rows()
                layer.weight.add_(layer.weight_columns() @ change if two_sided else change)
                if name in moments:
                    rows, cols = choose(layer.weight, moments[name], rank, self.by)
                elif two_sided:
                    rows, cols = select_skeleton(
                        layer.weight, rank, selection=self.by, name=f"{self.seed}:{step}:{name}"
                    )
                else:
                    rows = select_rows(layer.weight, rank, selection=self.by, seed=self.seed + step, name=name)
                layer.rows.copy_(rows.sort().values)
                if two_sided:
                    layer.cols.copy_(cols.sort().values)
                layer.core.weight.zero_()
                layer.rederive(name)
                for value in state[layer.core.weight].values():
                    value.zero_()

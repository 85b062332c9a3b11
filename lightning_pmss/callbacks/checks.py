"""Checks before the first training step, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.conversion.roots import canonical_modules, hugging_face_models
from lightning_pmss.distributed.sharding import Engine
from lightning_pmss.files.fresh import fresh_tensors, fresh_warnings, frozen_beside, untrained
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.expert_layer import ExpertLinear, holder, one_by_one, parameter_name
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.parts import clean_name, is_zero_partitioned
from lightning_pmss.messages import some
from lightning_pmss.store import not_finite


def agree_on_weights(trainer: L.Trainer, module: L.LightningModule, engine: Engine) -> None:
    """Warn if ranks start with different weights: FSDP would combine shards of different models."""
    if trainer.world_size == 1 or engine not in ("fsdp1", "fsdp2"):
        return
    if getattr(trainer.strategy, "kwargs", {}).get("sync_module_states"):
        return
    sums = {clean_name(n): float(p.detach().double().sum()) for n, p in module.named_parameters() if not p.is_meta}
    others: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(others, sums)
    if differ := [n for n in sums if any(o.get(n, sums[n]) != sums[n] for o in others)]:
        rank_zero_warn(
            f"{len(differ)} parameters differ between the ranks before sharding ({some(differ)}), and each rank keeps a"
            " shard of its own weights. Load the same weights everywhere, or call `seed_everything` with one seed on all ranks."
        )


def agree_on_indices(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Use rank 0's rows and columns on all ranks: freshly initialised weights may still differ between ranks here."""
    if trainer.world_size == 1:
        return
    layers = adapted_layers(module)
    chosen = {
        name: {part: index.cpu() for part, index in layer.indices().items()}
        for name, layer in layers.items()
        if not any(index.is_meta for index in layer.indices().values())
    }
    first: dict[str, dict[str, Tensor]] = trainer.strategy.broadcast(chosen)
    moved = {
        name: any(not torch.equal(index.cpu(), first[name][part]) for part, index in layers[name].indices().items())
        for name in first
        if name in chosen
    }
    if any(is_zero_partitioned(p) for layer in layers.values() for p in layer.parameters()):
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, moved)
        moved = {name: any(other[name] for other in found) for name in moved}  # gathering needs all ranks
    for name, layer in one_by_one((name, layers[name]) for name in moved if moved[name]):
        for part, index in layer.indices().items():
            index.copy_(first[name][part])
        layer.rederive(name)


def say_what_was_converted(report: ConversionReport, precision: str) -> None:
    """Print the report, and warn about rounding under mixed precision; `convert` warns for a low-precision base."""
    rank_zero_info(f"{report.config.label()}:\n{report}")
    if "mixed" in precision and (warning := report.rounding_warning(precision)):
        rank_zero_warn(warning)


def refuse_merged(layers: Mapping[str, AdaptedLinear]) -> None:
    """Refuse to train merged layers, whose adapter has no effect.

    Raises:
        MisconfigurationException: A layer is merged.
    """
    if merged := [layer for layer in layers.values() if layer.merged]:
        raise MisconfigurationException(
            f"The model is merged, so {merged[0].method.trained} has no effect; call `unmerge(model)` before `fit`."
        )


def check_bases(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Compare weights that were loaded after the conversion with the skeleton file that it used.

    Raises:
        MisconfigurationException: The skeleton file was made from other weights.
    """
    unproven = {n: layer for n, layer in adapted_layers(module).items() if layer.on_trust}
    proven = {n: x for n, x in unproven.items() if x.fingerprint}
    if strangers := [n for n, x in one_by_one(proven.items()) if not same_base(x.fingerprint or {}, *x.reads())]:
        raise MisconfigurationException(
            f"The skeleton file belongs to another base model: the weights of {some(strangers)} are not those it was made"
            " from, or the weights were not loaded after the model got its memory."
        )
    for layer in unproven.values():
        layer.on_trust = False


def check_optimizers(trainer: L.Trainer, pl_module: L.LightningModule, also_train: Sequence[str]) -> None:
    """Check that exactly the adapter and ``also_train`` are going to be trained.

    Raises:
        MisconfigurationException: A trained tensor is in no optimizer, the optimizer does not suit the coordinates, or other
            parameters require gradients.
    """
    layers = adapted_layers(pl_module)
    trained = {clean_name(n): p for n, p in pl_module.named_parameters() if p.requires_grad}
    allowed = {id(p) for layer in layers.values() for p in layer.core.owned()}
    for name, module in pl_module.named_modules():
        clean = clean_name(name)
        if any(clean == a or clean.endswith(f".{a}") for a in also_train):
            allowed |= {id(p) for p in module.parameters()}
    if strangers := [n for n, p in trained.items() if id(p) not in allowed]:
        own = next((layer.method.trained for layer in layers.values()), "the adapter")
        raise MisconfigurationException(
            f"{len(strangers)} parameters train although only {own} should: {', '.join(f'`{n}`' for n in strangers[:5])}."
            " Something unfroze them after the conversion; to train a module on purpose, name it in `also_train`."
        )
    held = _held(trainer)
    if missing := [n for n, p in trained.items() if id(p) not in held]:
        raise MisconfigurationException(
            f"{len(missing)} of {len(trained)} trainable tensors are in no optimizer and would never learn:"
            f" {', '.join(f'`{n}`' for n in missing[:5])}. The optimizer was made before the model was converted: make it in"
            " `configure_optimizers` from `[p for p in self.parameters() if p.requires_grad]`; with LightningCLI pass"
            " `auto_configure_optimizers=False`."
        )
    if any(type(getattr(o, "base_optimizer", o)).__name__ == "Muon" for o in trainer.optimizers):
        for name, layer in layers.items():
            if reason := layer.method.why_no_matrix():
                raise MisconfigurationException(f"Muon orthogonalises matrices, and `{name}` {reason}")
            if isinstance(layer, ExpertLinear):
                raise MisconfigurationException(
                    f"Muon orthogonalises matrices, and the adapters of `{parameter_name(name)}` are stacked, one for each"
                    " expert. Take another optimizer, or leave experts out: exclude_modules=['experts']."
                )


def _held(trainer: L.Trainer) -> set[int]:
    """Ids of the optimizers' parameters; ZeRO flattens these, but lists the originals elsewhere."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    engine_optimizer = getattr(trainer.strategy.model, "optimizer", None)
    for name in ("bit16_groups", "fp16_groups"):
        for group in getattr(engine_optimizer, name, None) or ():
            held |= {id(p) for p in group}
    return held


def look_for_fresh(pl_module: L.LightningModule, report: ConversionReport, engine: Engine) -> list[str]:
    """Record in the report which tensors the base's files lack, unless it is known; call it before sharding.

    Returns:
        Warnings about frozen tensors that may be freshly initialised.
    """
    if report.fresh is None:
        report.fresh = fresh_tensors(pl_module)
    advice = fresh_warnings(pl_module, report)
    if engine in ("fsdp1", "zero") and (lost := list(untrained(report.fresh or {}, report))):
        advice.append(
            f"{some(lost)} are freshly initialised and frozen, and checkpoints under {engine} contain only trained"
            " tensors: a run resumed in another process would have other values there. Train them (also_train), or use one"
            " device, 'ddp' or FSDP2."
        )
    if beside := frozen_beside(pl_module, report):
        listed = ", ".join(repr(name) for name in beside[:8])
        advice.append(
            f"{some(beside)} stay frozen as they are, and no adapter file contains them. If they are freshly initialised, type"
            f" also_train=[{listed}]; if they were loaded, do nothing."
        )
    return advice


def refuse_infinite(module: nn.Module, also_train: Sequence[str], engine: Engine) -> None:
    """Refuse NaN or infinite constants in the modules of ``also_train``, which the adapter file contains.

    Raises:
        MisconfigurationException: A module has such a constant.
    """
    if engine != "plain":  # tensors may be sharded
        return
    kept = {clean_name(n): m for n, m in module.named_modules()}
    kept = {n: m for n, m in kept.items() if any(n == a or n.endswith(f".{a}") for a in also_train)}
    if broken := not_finite({f"{n}.{key}": value for n, m in kept.items() for key, value in m.state_dict().items()}):
        raise MisconfigurationException(
            f"{some(broken)} have NaN or infinite values before the training, and adapter files contain none. If it is a mask,"
            " type `self.register_buffer(name, mask, persistent=False)`: the module makes it again."
        )


def warn(advice: Sequence[str]) -> None:
    """Issue these warnings on rank 0."""
    for text in advice:
        rank_zero_warn(text)


def wake(pl_module: L.LightningModule) -> None:
    """Set converted Hugging Face models to training mode, except modules left out as frozen and in eval mode.

    `from_pretrained` leaves eval mode, in which dropout and transformers' activation checkpointing are off.
    """
    report, ours = conversion_of(pl_module), {id(holder(x)) for x in adapted_layers(pl_module).values()}
    named = canonical_modules(pl_module)
    asleep = [named[name] for name in (report.asleep if report else ()) if name in named]
    asleep = [module for module in asleep if not module.training]
    for model in hugging_face_models(pl_module):
        if model is not pl_module and not model.training and any(id(m) in ours for m in model.modules()):
            model.train()
    for module in asleep:
        module.eval()


def warn_about_batch_norm(pl_module: L.LightningModule, also_train: Sequence[str]) -> None:
    """Warn about running statistics, which change in training and are not in the adapter file."""
    kept = [m for n, m in pl_module.named_modules() if any(clean_name(n).endswith(a) for a in also_train)]
    inside = {id(m) for k in kept for m in k.modules()}
    moving = [
        clean_name(name)
        for name, m in pl_module.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
        and m.track_running_stats
        and m.training
        and id(m) not in inside
    ]
    if moving:
        rank_zero_warn(
            f"`{moving[0]}` ({len(moving)} such) updates its running statistics while training, which the adapter file"
            " does not contain: name it in also_train, or put it into eval mode."
        )

"""Build a model folder's architecture without weights, and find the layers to convert in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_pmss.conversion.experts import matrices_in, without_experts
from lightning_pmss.conversion.matrices import modules_for
from lightning_pmss.conversion.targets import find_targets, match_modules, ranks_of
from lightning_pmss.conversion.unconvertible import refuse_unconvertible
from lightning_pmss.files.naming import Wording, match_names
from lightning_pmss.layers.convertible import canonical_shape, layout_of
from lightning_pmss.layers.expert_layer import ExpertLinear
from lightning_pmss.layers.layout import Layout
from lightning_pmss.messages import reason
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.store.model_config import read_model_config
from lightning_pmss.store.shards import ShardReader, few

_IN_PYTHON = "load the model in Python and convert it there: convert(model, config)."


@dataclass(frozen=True)
class Target:
    """One matrix on disk to select from.

    Attributes:
        name: Canonical module name.
        key: Name of the tensor in the checkpoint.
        shape: (out, in) of W.
        layout: How the checkpoint stores W.
        rank: Number of rows and columns to select.
        requested_rank: The rank before it was clipped to the smaller side.
    """

    name: str
    key: str
    shape: tuple[int, int]
    layout: Layout
    rank: int
    requested_rank: int


def model_on_meta(folder: Path, architecture: str | None = None) -> nn.Module:
    """Build the model of a folder's ``config.json`` on the meta device: modules and shapes, no weights.

    Args:
        folder: Model folder.
        architecture: A class of transformers, such as ``LlamaForSequenceClassification``. Default: the class that
            ``config.json`` names. If it names none, or a body without head, the causal language model (which
            `CausalLMModule` trains), else the body.

    Raises:
        FileNotFoundError: No ``config.json``.
        ValueError: transformers does not know the model, or the class asked for.
    """
    import transformers  # an optional dependency
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, PreTrainedModel

    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, which describes the model's layers. Give the folder that "
            "`save_pretrained` or `hf download MODEL --local-dir FOLDER` wrote."
        )
    read_model_config(file)
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken file can raise anything
        raise ValueError(
            f"{file}: transformers {transformers.__version__} cannot read it ({reason(error)}). Upgrade transformers; if the "
            f"model comes with its own code, {_IN_PYTHON}"
        ) from error

    def known(name: str) -> type[nn.Module] | None:
        found = getattr(transformers, name, None)
        return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None

    causal: type[nn.Module] | None = _first(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    body = _first(MODEL_MAPPING.get(type(config), None))
    if architecture is not None:
        cls = known(architecture)
        if cls is None:
            raise ValueError(
                f"architecture={architecture!r} is not a model class of transformers {transformers.__version__}; "
                f"{file.name} names {few(list(config.architectures or ['none']))}."
            )
    else:
        named = next(filter(None, map(known, config.architectures or ())), None)
        cls = (causal or named) if named in (None, body) else named
        cls = cls or body
    if cls is None:
        raise ValueError(
            f"{file} names no model class that transformers {transformers.__version__} knows; upgrade transformers, or "
            f"{_IN_PYTHON}"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as error:
        raise ValueError(f"{cls.__name__} cannot be built from {file} ({reason(error)}).") from error
    return model


def _first(found: Any) -> type[nn.Module] | None:
    """Return the first class, because the mapping has several for a few models."""
    one: type[nn.Module] | None = found[0] if isinstance(found, tuple) else found
    return one


def find_matrices(model: nn.Module, config: AdapterConfig, reader: ShardReader) -> tuple[list[Target], dict[str, str]]:
    """Find in the checkpoint the matrices that `convert` would convert with this config.

    Args:
        model: Result of `model_on_meta`.
        config: Targets and ranks.
        reader: The checkpoint.

    Returns:
        The targets in the order of the files, and the linear layers left out with the reason.

    Raises:
        ValueError: A pattern or layer that `convert` refuses; a weight that is missing, quantised, of another shape, or changed
            by transformers when it is loaded.
    """
    modules = modules_for(model, config)
    also_train = match_modules(config.also_train, without_experts(modules), "also_train")
    names, left_out = find_targets(model, config, modules, also_train)
    method = method_of(config)
    refuse_unconvertible(names, modules, method, None, derived_later=True)
    ranks = ranks_of(config, names, modules)
    shapes = {name: canonical_shape(modules[name]) for name in names}
    stored = {name: (shape, layout_of(modules[name])) for name, shape in shapes.items()}
    as_loaded, changed = names_in_the_model(model, reader)
    experts = {name: stored.pop(name) for name in names if isinstance(modules[name], ExpertLinear)}
    matrices = {name: stored.pop(name) for name in matrices_in(names, modules)}
    rename = match_names(stored, as_loaded, reader.folder, _wording(model))
    keys = {name: as_loaded.tensors[f"{rename(name)}.weight"].key for name in stored}
    fused = match_names(experts, reader, reader.folder, _wording(model))
    keys |= {name: f"{fused(name)}.weight" for name in experts}
    own = match_names(matrices, as_loaded, reader.folder, _wording(model))
    keys |= {name: as_loaded.tensors[own(name)].key for name in matrices}
    if strange := [name for name, key in keys.items() if key in changed]:
        raise ValueError(
            f"transformers changes the weights of {few(strange)} when it loads a {type(model).__name__}, so the weights "
            f"on disk are not the model's; list them in exclude_modules, or {_IN_PYTHON}"
        )
    place = {key: number for number, key in enumerate(reader.tensors)}
    place |= {key: place[reader.experts[key].parts[0]] for key in keys.values() if key not in place}
    targets = [
        Target(name, keys[name], shape, layout_of(modules[name]), method.rank_of(shape, ranks[name]), ranks[name])
        for name, shape in shapes.items()
    ]
    return sorted(targets, key=lambda target: place[target.key]), left_out.reasons


def _wording(model: nn.Module) -> Wording:
    quantised = "a quantised form, from which nothing can be selected. Give the unquantised model."
    missing = f"Config and weights belong to different models, or transformers renames these layers: then {_IN_PYTHON}"
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        missing = "By its config.json the model is quantised: give the unquantised one."
    return Wording(
        whose="the model's",
        owner=f"{type(model).__name__} (config.json)",
        expects="has",
        missing=missing,
        ambiguous=f"So {_IN_PYTHON}",
        mismatch="Config and weights belong to different models; copy the folder again.",
        quantised=quantised,
    )


def names_in_the_model(model: nn.Module, reader: ShardReader) -> tuple[ShardReader, set[str]]:
    """View the checkpoint under the names that transformers gives its tensors when loading; each keeps its own key.

    Returns:
        The renamed view, and the keys of the tensors that loading also splits, joins, permutes or transposes, so that the
        model's values differ from the file's.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return reader, set()  # an older transformers, which loads tensors unchanged
    loaded: Any = model  # a PreTrainedModel, as `model_on_meta` builds it
    steps = get_model_conversion_mapping(loaded)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    tensors, changed = {}, set()
    for key in sorted(reader.tensors, key=dot_natural_key):  # some renamings depend on the loader's order
        name, converted = rename_source_key(key, renamings, converters)
        tensors[name] = reader.tensors[key]
        if converted is not None:
            changed.add(key)
    return ShardReader(reader.folder, tensors), changed

"""The model card of an adapter folder, in the hub's format: contents, training, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_pmss.methods.config import AdapterConfig

CARD_FILE = "README.md"


def adapter_card(
    config: Mapping[str, Any],
    options: AdapterConfig,
    run: Mapping[str, Any] | None = None,
    base_folder: Path | None = None,
) -> str:
    """Return the card's text.

    Args:
        config: Contents of ``adapter_config.json``.
        options: Options of the conversion.
        run: Facts about the training, in the order to print: section -> text, or name -> number or text.
        base_folder: Folder of the base's files if it is not its name (a snapshot in the hub's cache).
    """
    from huggingface_hub import ModelCardData

    base = config["base_model_name_or_path"]
    revision = config["revision"]
    kinds = ", ".join(config.get("quantisation") or ())
    licence = _licence(base_folder or base)
    hub_id = base if base and is_hub_id(base) else None  # the hub refuses a card with a path as base_model
    tags = [options.method, "lightning", *([f"base_model:adapter:{hub_id}"] if hub_id else [])]
    head = ModelCardData(library_name="lightning-pmss", base_model=hub_id, tags=tags, license=licence)
    lines = ["---", head.to_yaml(), "---", "", f"# {options.label()} adapter", ""]
    lines += [
        options.card(),
        "",
        f"- Base: {base or 'not recorded'}{f', revision {revision}' if revision else ''}, unmerged"
        f"{f', quantised ({kinds})' if kinds else ''}.",
        f"- Licence of the base: {licence or 'not found in its folder; see its page'}.",
        f"- {_options(config, options)}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in config['versions'].items())}.",
        "",
        "## Load",
        "",
        "```python",
        *_load(config),
        "```",
        "",
        '`write_merged(model, "MERGED")` (from `lightning_pmss.files`) then writes a plain, dense model;'
        ' `export_lora(model, "LORA")` a LoRA for peft and vLLM.'
        if kinds
        else "`python -m lightning_pmss merge --base BASE --adapter THIS_FOLDER --output MERGED` writes a plain model;"
        " `export --format peft` writes a folder for peft; with `--as lora` a LoRA, which vLLM reads, too.",
    ]
    for title, facts in (run or {}).items():
        lines += ["", f"## {title}", ""]
        lines += (
            [f"- {name}: {_value(value)}" for name, value in facts.items()] if isinstance(facts, Mapping) else [facts]
        )
    return "\n".join([*lines, ""])


def _options(config: Mapping[str, Any], options: AdapterConfig) -> str:
    modules = config["modules"]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in modules})
    ranks = sorted({str(module["rank"]) for module in modules.values()}, key=lambda rank: (len(rank), rank))
    trained = f"; trained in full: {', '.join(config['also_train'])}" if config["also_train"] else ""
    return f"{len(modules)} layers ({', '.join(kinds)}), rank {', '.join(ranks)}, {options.summary()}{trained}."


def _load(config: Mapping[str, Any]) -> list[str]:
    module, name = class_of(config.get("model_class"))
    quoted = json.dumps(config["base_model_name_or_path"] or "BASE")
    settings = config.get("settings") or {}
    if module.startswith("transformers.") and "quantization_config" in config:
        revision = f", revision={config['revision']!r}" if config["revision"] else ""
        made = ["import json", f"from transformers import {name}"]
        made += [
            "from transformers.quantizers import AutoQuantizationConfig",
            "from lightning_pmss import load_adapter",
            "",
        ]
        made.append('settings = json.load(open("THIS_FOLDER/adapter_config.json"))')
        made.append('codes = AutoQuantizationConfig.from_dict(settings["quantization_config"])')
        made.append(
            f'model = {name}.from_pretrained({quoted}{revision}, quantization_config=codes, dtype=settings["base_dtype"])'
        )
    elif module.startswith("transformers."):
        revision = f", revision={config['revision']!r}" if config["revision"] else ""
        made = [f"from transformers import {name}", "from lightning_pmss import load_adapter", ""]
        labels = f", num_labels={len(settings['id2label'])}" if isinstance(settings.get("id2label"), dict) else ""
        made.append(f"model = {name}.from_pretrained({quoted}{revision}{labels})")
    else:
        made = [
            "from lightning_pmss import load_adapter",
            "",
            f"model = ...  # the {name or 'model'} it was trained on",
        ]
    if isinstance(settings.get("vocab_size"), int):
        made.append(f"model.resize_token_embeddings({settings['vocab_size']})")
    return [*made, 'load_adapter(model, "THIS_FOLDER")']


def class_of(path: str | None) -> tuple[str, str]:
    """Split a dotted path into module and class for a line of code; empty if it is no dotted path (it may come from a file)."""
    module, _, name = (path or "").rpartition(".")
    return (module, name) if all(part.isidentifier() for part in (path or "").split(".")) else ("", "")


def _licence(base: str | Path | None) -> str | None:
    """Return the licence in the front matter of the base's own card, if the base is a folder on this machine."""
    from huggingface_hub import metadata_load

    card = Path(base).expanduser() / CARD_FILE if base else None
    if card is None or not card.is_file():
        return None
    try:
        head = metadata_load(card)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a broken card must not prevent saving an adapter
        return None
    found = head.get("license") if head else None
    return found if isinstance(found, str) else None


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_hub_id(name: str) -> bool:
    """Whether a base's name is an id of the model hub instead of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()

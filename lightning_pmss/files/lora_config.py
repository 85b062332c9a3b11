"""peft's ``adapter_config.json`` of an exported adapter.

It is written as peft 0.21 writes it, without importing peft, so the export needs no peft and does not depend on the installed
version. Of a LoRA, ``lora_alpha`` equals the rank in every layer, in the general fields and in both patterns: each layer's
factor ``lora_alpha / r`` is then exactly 1, also for a server that ignores patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pmss.messages import some

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"  # the format written here; peft reads it only to explain unknown fields
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of `--max-lora-rank`
_HEADS = {  # task type: endings of the class names, and modules that peft then treats as trained in full
    "CAUSAL_LM": (("ForCausalLM", "LMHeadModel"), ()),
    "SEQ_CLS": (("ForSequenceClassification",), ("classifier", "score")),
    "TOKEN_CLS": (("ForTokenClassification",), ("classifier", "score")),
    "QUESTION_ANS": (("ForQuestionAnswering",), ("qa_outputs",)),
}


def peft_config(
    names: Collection[str],
    fields: Mapping[str, Any],
    *,
    modules: Collection[str],
    modules_to_save: Sequence[str],
    base_model: str | None,
    revision: str | None,
    model_class: str | None,
) -> dict[str, Any]:
    """Return the config of an adapter, with patterns that match exactly the given layers.

    Args:
        names: Full names of the layers.
        fields: Those of the adapter's type, such as `lora_fields`.
        modules: Full names of the model's modules, for checking the patterns.
        modules_to_save: Full names of the modules trained in full.
        base_model: Id or path of the base.
        revision: Commit of the base.
        model_class: Dotted path of the model's class, if it is known.

    Raises:
        ValueError: peft would confuse a converted layer with one of ``modules_to_save``.
    """
    # peft compares endings without a dot here: "proj" also matches "q_proj".
    if clash := [name for name in names if name.endswith(tuple(modules_to_save))]:
        raise ValueError(
            f"peft would take {some(clash)} for modules trained in full, since their names end as {some(modules_to_save)}. "
            "Merge instead: `python -m lightning_pmss merge`."
        )
    task = task_type(model_class, modules_to_save)
    place, _, name = (model_class or "").rpartition(".")
    return {
        "auto_mapping": {"base_model_class": name, "parent_library": place} if model_class and task is None else None,
        "base_model_name_or_path": base_model,
        "exclude_modules": None,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": list(modules_to_save) or None,
        "peft_version": PEFT_VERSION,
        "revision": revision,
        "target_modules": target_modules(names, modules),
        "task_type": task,
        **fields,
    }


def lora_fields(ranks: Mapping[str, int], *, transposed: bool) -> dict[str, Any]:
    """Return the fields that only a LoRA has.

    Args:
        ranks: Rank of each layer by its full name.
        transposed: Whether layers store their weight as W^T (``Conv1D``).
    """
    usual = max(ranks.values())
    pattern = rank_pattern(ranks, usual)
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": pattern,
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_alpha": usual,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": usual,
        "rank_pattern": pattern,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }


def write_peft_config(config: Mapping[str, Any], file: Path) -> None:
    """Write the config as peft does: sorted keys, an indent of 2, no newline at the end."""
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def target_modules(names: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Return a list of name endings by which peft finds exactly these modules, else a regular expression.

    An item t of peft's list matches a module named t, or whose name ends with "." + t.
    """
    wanted = set(names)
    ends: set[str] = set()
    for last in {name.rpartition(".")[2] for name in wanted}:
        named = {name for name in modules if _ends(name, last)}
        ends |= {last} if named <= wanted else {name for name in wanted if _ends(name, last)}
    if all(name in wanted for name in modules if any(_ends(name, end) for end in ends)):
        return sorted(ends)
    return "|".join(re.escape(name) for name in sorted(wanted))


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Return peft's ``rank_pattern`` for the layers whose rank is not ``usual``.

    peft uses the first key, in the order of the file (sorted), with ``re.match(r"(.*\\.)?(KEY)$", name)``.
    """
    pattern: dict[str, int] = {}
    for last in {name.rpartition(".")[2] for name in ranks}:
        group = {name: rank for name, rank in ranks.items() if _ends(name, last)}
        if len(set(group.values())) == 1 and re.escape(last) == last:
            group = {last: max(group.values())}
        else:
            group = {f"^{re.escape(name)}": rank for name, rank in group.items()}
        pattern |= {key: rank for key, rank in group.items() if rank != usual}
    pattern = dict(sorted(pattern.items()))
    if any(pattern.get(_key(pattern, name), usual) != rank for name, rank in ranks.items()):
        pattern = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != usual}
    return pattern


def task_type(model_class: str | None, modules_to_save: Sequence[str]) -> str | None:
    """Return peft's task type; None if peft would treat a frozen head as trained in full."""
    ends = {name.rpartition(".")[2] for name in modules_to_save}
    for task, (endings, heads) in _HEADS.items():
        if model_class is not None and model_class.endswith(endings):
            return task if not heads or ends & set(heads) else None
    return None


def vllm_rank(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` of vLLM that allows this rank, or None."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _key(pattern: Mapping[str, int], name: str) -> str:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), name)

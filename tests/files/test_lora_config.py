"""The patterns of ``adapter_config.json`` mean the given layers by peft's own rules, and the factor is 1 everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_pmss.files.lora_config import (
    lora_fields,
    peft_config,
    rank_pattern,
    target_modules,
    task_type,
    vllm_rank,
    write_peft_config,
)

peft = pytest.importorskip("peft")

LAYERS = [
    f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
MODULES = [*LAYERS, "lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp" for i in range(12)), "vision.up_proj"]


def _targeted(modules: list[str], targets: list[str] | str) -> set[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(target_modules=targets, target_parameters=None)
    return {name for name in modules if check_target_module_exists(config, name)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([n for n in LAYERS if n.endswith("q_proj")], ["q_proj"]),
        ([n for n in LAYERS if not n.endswith("up_proj")], ["q_proj", "v_proj"]),
        # vision.up_proj is not meant, so its namesakes need their full names.
        (LAYERS, ["q_proj", "v_proj", *(n for n in LAYERS if n.endswith("up_proj"))]),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_target_modules(names: list[str], expected: list[str]) -> None:
    found = target_modules(names, MODULES)
    assert found == sorted(expected)
    assert _targeted(MODULES, found) == set(names)


def test_a_name_that_ends_another() -> None:
    """A list cannot tell ``a.x`` from ``b.a.x``; a regular expression can."""
    modules = ["a.x", "b.a.x", "c.x"]
    found = target_modules(["a.x"], modules)
    assert isinstance(found, str)
    assert _targeted(modules, found) == {"a.x"}
    assert _targeted([*modules, "aax"], found) == {"a.x"}


CASES: dict[str, dict[str, int]] = {
    "equal": dict.fromkeys(LAYERS, 8),
    "by kind": {n: 4 if n.endswith("v_proj") else 8 for n in LAYERS},
    "by layer": {n: 2 + int(n.split(".")[2]) for n in LAYERS},
    "one": {n: 3 if n == "model.layers.1.mlp.up_proj" else 8 for n in LAYERS},
    "ends of names": {"a.x": 2, "b.a.x": 4, "c.x": 8, "x": 6},
    "dots": {"a.b": 2, "a_b": 4, "aab": 8, "z.a.b": 6},
    "numbers": {"0": 2, "2": 4, "10": 8, "5.0": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_rank_pattern(case: str) -> None:
    from peft.utils.other import get_pattern_key

    ranks = CASES[case]
    usual = max(ranks.values())
    pattern = json.loads(json.dumps(rank_pattern(ranks, usual), sort_keys=True))
    for name, rank in ranks.items():
        assert pattern.get(get_pattern_key(pattern.keys(), name), usual) == rank, name
    assert len(pattern) <= sum(rank != usual for rank in ranks.values())
    assert pattern == ({} if case == "equal" else {"v_proj": 4} if case == "by kind" else pattern)


def test_text_is_pefts_own(tmp_path: Path) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 8, "model.layers.0.self_attn.v_proj": 4}
    config = peft_config(
        ranks, lora_fields(ranks, transposed=False),
        modules=MODULES, modules_to_save=["lm_head"], base_model="org/name", revision="abc",
        model_class="transformers.models.llama.modeling_llama.LlamaForCausalLM",
    )  # fmt: skip
    write_peft_config(config, tmp_path / "adapter_config.json")
    ours = (tmp_path / "adapter_config.json").read_text()
    peft.PeftConfig.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))
    theirs = (tmp_path / "adapter_config.json").read_text()

    def in_order(text: str) -> str:  # peft keeps targets as a set and writes them in any order
        return json.dumps(json.loads(text) | {"target_modules": sorted(json.loads(text)["target_modules"])}, indent=2)

    assert in_order(ours) == in_order(theirs)
    assert ours.splitlines()[0] == theirs.splitlines()[0]
    assert len(ours) == len(theirs)


def test_task_types() -> None:
    def of(name: str, *saved: str) -> str | None:
        return task_type(f"transformers.models.x.{name}", saved)

    assert of("LlamaForCausalLM") == of("GPT2LMHeadModel") == "CAUSAL_LM"
    assert of("BertForSequenceClassification", "classifier") == "SEQ_CLS"
    assert of("LlamaForTokenClassification", "score") == "TOKEN_CLS"
    assert of("BertForQuestionAnswering", "qa_outputs") == "QUESTION_ANS"
    # A frozen head is not in the file, and peft would look for it there.
    assert of("BertForSequenceClassification") is None
    assert of("BertModel") is task_type(None, []) is None


def test_names_that_peft_would_confuse() -> None:
    with pytest.raises(ValueError, match=r"peft would take `a.q_proj` for modules trained in full.*merge"):
        peft_config(
            ["a.q_proj"], {}, modules=["a.q_proj", "proj"], modules_to_save=["proj"], base_model=None,
            revision=None, model_class=None,
        )  # fmt: skip


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (16, 16), (300, 320), (512, 512), (513, None)])
def test_vllm_rank(rank: int, flag: int | None) -> None:
    assert vllm_rank(rank) == flag

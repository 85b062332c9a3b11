"""lm-evaluation-harness itself, offline, on tasks of our own: it computes our numbers, with an adapter and merged."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_pmss import harness
from lightning_pmss.cli import main
from lightning_pmss.evaluation.generation import Generation
from lightning_pmss.evaluation.likelihood import choose, log_likelihoods
from lightning_pmss.files import load_adapter
from lightning_pmss.metrics import GSM8KAccuracy
from tests.chat.conftest import adapters

__all__ = ["adapters"]  # a fixture

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra eval)")

QUESTIONS = [
    {"q": "Which weighs more?", "choices": ["a pen", "an egg", "a train of 3 boxes"], "gold": 2},
    {"q": "How many eggs are left?", "choices": ["12", "5", "17 eggs"], "gold": 0},
    {"q": "How far does it go?", "choices": ["60 miles", "180", "one hour"], "gold": 1},
    {"q": "Ann has 3 boxes.", "choices": ["Does she?", "Answer: 3", "How many pens?"], "gold": 1},
]
PROMPT = "Question: {q}\nAnswer:"
# Texts as models write them, with the score by the harness's strict filter.
ANSWERS = {
    "3 * 4 = 12\n#### 12": 1,
    "#### 12\n#### 13": 1,
    "#### 13\n#### 12": 0,
    "#### 1,2": 1,
    "It is 12.": 0,
    "####12": 0,
    "#### $12": 0,
    "#### 12.0": 0,
    "#### -12": 0,
    "#### 12.": 1,
}


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """A manager that knows two tasks: choices by likelihood, and generated texts."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Question: {{q}}\nAnswer:",
    }
    choice = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {
        "task": "own_text",
        "output_type": "generate_until",
        "doc_to_target": "{{q}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: Any, *names: str, **model: str) -> dict[str, Any]:
    import lm_eval

    harness.register()
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=harness.NAME,
        model_args={**model, "device": "cpu", "batch_size": 3},
        tasks=list(names),
        task_manager=tasks,
        bootstrap_iters=0,
    )
    return found


@pytest.fixture
def ours(tiny_llama: str, adapters: dict[str, str]) -> tuple[list[dict[str, tuple[float, int]]], list[str]]:
    """Likelihoods of the choices and generated texts by our evaluation, with the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    load_adapter(model, adapters["red"])
    batch = tokenizer([PROMPT.format(**row) for row in QUESTIONS], return_tensors="pt", padding=True)
    turns = [[tokenizer(f" {row['choices'][n]}")["input_ids"] for row in QUESTIONS] for n in range(3)]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    sums = log_likelihoods(model, ids, mask, turns, tokenizer.pad_token_id)
    choices = [
        {name: (float(sums[n, row]), len(turns[n][row])) for n, name in enumerate(QUESTIONS[row]["choices"])}
        for row in range(len(QUESTIONS))
    ]
    return choices, Generation(8, stop=["Question:"]).texts(model, tokenizer, ids, mask)


@pytest.mark.parametrize("way", ["adapter", "merged"])
def test_it_computes_our_likelihoods_texts_and_scores(
    way: str, tiny_llama: str, adapters: dict[str, str], tasks: Any, ours: Any, tmp_path: Path
) -> None:
    model = {"pretrained": tiny_llama, "adapter": adapters["red"]}
    if way == "merged":
        model = {"pretrained": str(tmp_path / "merged")}
        main(["merge", "--base", tiny_llama, "--adapter", adapters["red"], "--output", model["pretrained"]])
    found = evaluate(tasks, "own_choice", "own_text", **model)
    choices, texts = ours
    samples = sorted(found["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    for sample, values in zip(samples, choices, strict=True):
        theirs = [float(one[0][0] if isinstance(one[0], tuple | list) else one[0]) for one in sample["resps"]]
        torch.testing.assert_close(theirs, [value for value, _ in values.values()], rtol=1e-4, atol=1e-4)
    gold = [row["choices"][row["gold"]] for row in QUESTIONS]
    right = [choose(values)[0] == label for values, label in zip(choices, gold, strict=True)]
    assert found["results"]["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    # Theirs divides by the characters of a choice, our score_normalised by its tokens.
    per_character = [max(v, key=lambda k: v[k][0] / len(k)) == label for v, label in zip(choices, gold, strict=True)]
    assert found["results"]["own_choice"]["acc_norm,none"] == pytest.approx(sum(per_character) / len(right))
    samples = sorted(found["samples"]["own_text"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == texts
    assert len(set(texts)) > 1


def test_the_adapter_matters(tiny_llama: str, adapters: dict[str, str], tasks: Any) -> None:
    said = [
        [
            sample["resps"]
            for sample in evaluate(tasks, "own_choice", pretrained=tiny_llama, **more)["samples"]["own_choice"]
        ]
        for more in ({}, {"adapter": adapters["red"]})
    ]
    assert said[0] != said[1]


def test_gsm8k_scores_agree_but_for_a_full_stop() -> None:
    """The harness's own task definition, on texts; its metric forgives a full stop behind the number."""
    import lm_eval
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(file.read_text())
    (strict,) = [entry["filter"][0] for entry in task["filter_list"] if entry["name"] == "strict-match"]
    options = {key: task["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    read = RegexFilter(regex_pattern=strict["regex_pattern"]).apply([[text] for text in ANSWERS], [{}] * len(ANSWERS))
    gold = "3 * 4 = 12\n#### 12"
    theirs = [float(exact_match_fn(predictions=one, references=[gold], **options)["exact_match"]) for one in read]
    assert theirs == list(map(float, ANSWERS.values()))
    ours = [GSM8KAccuracy.score(text, gold) for text in ANSWERS]
    differ = [text for text, one, other in zip(ANSWERS, theirs, ours, strict=True) if one != other]
    assert differ == ["#### 12."]
    # The corrected rule forgives it too, and reads more notations.
    lenient = GSM8KAccuracy(strict=False)
    assert lenient.score("#### 12.", gold) == 1
    assert [text for text in ANSWERS if lenient.score(text, gold) and not ANSWERS[text]] == [
        "####12",
        "#### $12",
        "#### 12.0",
    ]


def test_the_command_runs_the_harness(
    tiny_llama: str,
    adapters: dict[str, str],
    tasks: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = type(tasks)  # without the thousands of tasks that the harness brings
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(manager, include_defaults=False))
    before = sys.argv
    options = (
        f"--model lightning_pmss --model_args pretrained={tiny_llama},adapter={adapters['red']} --tasks own_choice"
    )
    main(["lm_eval", *options.split(), "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--limit", "2"])
    assert "|own_choice|" in capsys.readouterr().out
    assert sys.argv is before


def test_refusals(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness.register()
    assert harness.register() is made
    with pytest.raises(ValueError, match="peft= is for the model class hf"):
        made(tiny_llama, peft="x")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        made(tiny_llama, adapter=str(tmp_path / "nowhere"))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["lm_eval", "--tasks", "x"])
    assert stop.value.code == 2

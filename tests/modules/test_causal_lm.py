"""CausalLMModule: loss on responses only, greedy texts, schedule, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from handmade import EXAMPLES, EqualTexts, HandMade
from torch import Tensor

from lightning_pmss.modules import CausalLMModule

Trainers = Callable[..., L.Trainer]


def built(folder: str, **options: Any) -> CausalLMModule:
    module = CausalLMModule(folder, **options)
    module.configure_model()
    return module.eval()


def loss_by_hand(module: CausalLMModule, data: HandMade, numbers: tuple[int, ...]) -> tuple[float, int]:
    """Sum of -log p over the response tokens, example by example, without padding or masks; and their number."""
    total, count = 0.0, 0
    for number in numbers:
        row = data.rows[number]
        ids = row["prompt_ids"] + row["response_ids"]
        with torch.no_grad():
            log_p = module.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(len(row["prompt_ids"]), len(ids)):
            total -= log_p[place - 1, ids[place]].item()
            count += 1
    return total, count


def test_loss_counts_response_tokens_only(tiny_llama: str) -> None:
    module, data = built(tiny_llama), HandMade(tiny_llama)
    total, count = loss_by_hand(module, data, (0, 1, 2))
    loss, tokens = module.response_loss(data.batch(0, 1, 2))
    assert tokens.item() == count
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_final_eos_is_learned_although_it_is_also_the_padding(tiny_llama: str) -> None:
    module, data = built(tiny_llama), HandMade(tiny_llama)
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id
    batch = data.batch(0, 3)  # the first is padded with eos
    _, tokens = module.response_loss(batch)
    assert tokens.item() == len(data.rows[0]["response_ids"]) + len(data.rows[3]["response_ids"])
    assert batch["input_ids"][0, -1] == module.tokenizer.eos_token_id
    assert batch["labels"][0, -1] == -100


def test_loss_equals_that_of_transformers(tiny_llama: str) -> None:
    module, data = built(tiny_llama), HandMade(tiny_llama)
    batch = data.batch(1, 3)
    theirs = module.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(module.response_loss(batch)[0], theirs)


def test_batch_without_response_has_loss_zero_and_no_weight(tiny_llama: str) -> None:
    module, data = built(tiny_llama), HandMade(tiny_llama)
    batch = data.batch(0)
    batch["labels"].fill_(-100)
    loss, tokens = module.response_loss(batch)
    assert (loss.item(), tokens.item()) == (0.0, 0)


def test_evaluation_loss_is_the_mean_over_tokens_not_over_batches(tiny_llama: str, trainer: Trainers) -> None:
    module, data = CausalLMModule(tiny_llama, generate_in=[]), HandMade(tiny_llama)
    logged = trainer().test(module, data, verbose=False)[0]
    total, count = loss_by_hand(module, data, tuple(range(len(EXAMPLES))))
    assert logged == {"test/loss": pytest.approx(total / count, rel=1e-5)}
    batches = [loss_by_hand(module, data, numbers) for numbers in ((0, 1), (2, 3), (4,))]
    assert sum(t / c for t, c in batches) / 3 != pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("texts", [False, True])
def test_evaluation_loss_is_summed_in_float32_under_bf16_true(
    tiny_llama: str, trainer: Trainers, texts: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"generate_in": ["test"] if texts else [], "max_new_tokens": 2, "dtype": "bfloat16"}
    module, data = CausalLMModule(tiny_llama, **options), HandMade(tiny_llama)
    logged = trainer(precision="bf16-true").test(module, data, verbose=False)[0]
    with torch.no_grad():
        sums = [module.example_losses(batch) for batch in data.test_dataloader()]
    total, count = (float(torch.cat(parts).double().sum()) for parts in zip(*sums, strict=True))
    assert logged["test/loss"] == pytest.approx(total / count, rel=1e-6)


def test_validation_logs_under_val(tiny_llama: str, trainer: Trainers) -> None:
    module = CausalLMModule(tiny_llama, metric=EqualTexts(), generate_in=["validate"], max_new_tokens=3)
    logged = trainer().validate(module, HandMade(tiny_llama), verbose=False)[0]
    assert set(logged) == {"val/loss", "val/exact_match"}


def greedy_alone(module: CausalLMModule, ids: list[int], limit: int) -> str:
    """transformers' own greedy text of one prompt without padding, cut at the first eos."""
    prompt = torch.tensor([ids])
    tokens = module.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False
    )
    return module.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True).strip()


def test_batched_greedy_texts_equal_those_of_single_prompts(tiny_llama: str) -> None:
    module, data = built(tiny_llama, max_new_tokens=12), HandMade(tiny_llama)
    with torch.no_grad():  # a random model repeats one token whatever the prompt; larger weights make it vary
        for parameter in module.model.parameters():
            parameter.mul_(4)
    batch = data.batch(*range(len(EXAMPLES)))
    assert (batch["prompt_mask"] == 0).any(), "no padding, nothing is tested"
    expected = [greedy_alone(module, row["prompt_ids"], 12) for row in data.rows]
    assert len(set(expected)) > 1
    assert module.generate(batch["prompt_ids"], batch["prompt_mask"]) == expected


def test_greedy_texts_on_real_weights(shared: Path) -> None:
    from transformers import AutoTokenizer

    folder = str(shared / "models" / "stories260K")
    module = built(folder, max_new_tokens=24)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time, there was a", "Tom", "The big dog and a cat")]
    width = max(map(len, prompts))
    pad = module.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    texts = module.generate(ids, mask)
    assert texts == [greedy_alone(module, prompt, 24) for prompt in prompts]
    assert all(len(text) > 20 for text in texts)


def test_text_ends_at_the_first_eos_and_ignores_sampling_defaults(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = built(tiny_llama), HandMade(tiny_llama)
    eos = module.tokenizer.eos_token_id
    word = module.tokenizer("12 eggs", add_special_tokens=False).input_ids
    seen: dict[str, Any] = {}

    def generate(input_ids: Tensor, generation_config: Any, **_: Any) -> Tensor:
        seen.update(generation_config.to_dict())
        return torch.cat([input_ids, torch.tensor([[*word, eos, *word]])], dim=1)

    monkeypatch.setattr(module.model, "generate", generate)
    batch = data.batch(0)
    assert module.generate(batch["prompt_ids"], batch["prompt_mask"]) == ["12 eggs"]
    assert seen["do_sample"] is False
    assert (seen["repetition_penalty"], seen["temperature"], seen["num_beams"]) == (1.0, 1.0, 1)


def test_generation_stops_at_the_tokenizers_eos_too(tiny_llama: str) -> None:
    module, data = built(tiny_llama, max_new_tokens=12), HandMade(tiny_llama)
    batch = data.batch(1)
    first = module.model.generate(batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=1)[0, -1]
    module.model.generation_config.eos_token_id = None
    module.tokenizer.eos_token = module.tokenizer.convert_ids_to_tokens(int(first))
    assert module.generate(batch["prompt_ids"], batch["prompt_mask"]) == [""]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_test_writes_predictions_and_logs_the_metric(tiny_llama: str, tmp_path: Path, trainer: Trainers) -> None:
    texts, plain = built(tiny_llama, max_new_tokens=6), HandMade(tiny_llama)
    outputs = [greedy_alone(texts, row["prompt_ids"], 6) for row in plain.rows]
    data = HandMade(tiny_llama, targets=[outputs[0], "no", outputs[2], "no", "no"])
    module = CausalLMModule(tiny_llama, metric=EqualTexts(), max_new_tokens=6)
    logged = trainer().test(module, data, verbose=False)[0]
    assert logged["test/exact_match"] == pytest.approx(2 / 5)
    rows = read(tmp_path / "predictions-test.jsonl")
    assert [row["output"] for row in rows] == outputs
    assert [row["correct"] for row in rows] == [True, False, True, False, False]
    assert [row["id"] for row in rows] == list(range(5))
    loss, tokens = loss_by_hand(texts, data, (1,))
    assert rows[1] == {
        "id": 1,
        "prompt": EXAMPLES[1][0],
        "target": "no",
        "prompt_tokens": len(data.rows[1]["prompt_ids"]),
        "output": outputs[1],
        "extracted": outputs[1],  # the metric has no rule of its own: the text is the answer
        "gold": "no",
        "score": 0.0,
        "correct": False,
        "loss": pytest.approx(loss / tokens, rel=1e-4),
        "tokens": tokens,
        "run": rows[0]["run"],
    }
    # The second evaluation starts from nothing: neither rows nor scores of the first are counted.
    assert trainer().test(module, data, verbose=False)[0] == logged
    assert len(read(tmp_path / "predictions-test.jsonl")) == 5


def test_predict_returns_and_writes_texts(tiny_llama: str, tmp_path: Path, trainer: Trainers) -> None:
    module = CausalLMModule(tiny_llama, max_new_tokens=4, predictions_dir=str(tmp_path / "here"))
    returned = trainer().predict(module, HandMade(tiny_llama))
    assert returned is not None
    texts = [text for batch in returned for text in batch]
    assert [row["output"] for row in read(tmp_path / "here" / "predictions-predict.jsonl")] == texts
    assert len(texts) == 5


def test_batches_without_prompts_give_the_loss_alone(tiny_llama: str, tmp_path: Path, trainer: Trainers) -> None:
    module = CausalLMModule(tiny_llama, metric=EqualTexts())
    assert set(trainer().test(module, HandMade(tiny_llama, prompts=False), verbose=False)[0]) == {"test/loss"}
    assert not list(tmp_path.glob("predictions-*"))
    with pytest.raises(ValueError, match="predict needs batches with `prompt_ids`"):
        trainer().predict(module, HandMade(tiny_llama, prompts=False))


def test_fit_learns_and_follows_the_schedule(tiny_llama: str, trainer: Trainers) -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)

    data = HandMade(tiny_llama)
    module = CausalLMModule(tiny_llama, optimizer=optimizer, warmup_ratio=0.25, generate_in=[])
    before = trainer().validate(module, data, verbose=False)[0]["val/loss"]
    fit = trainer(max_epochs=4, callbacks=[Rates()])
    fit.fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]["val/loss"]
    assert after < before - 0.5
    assert "train/loss" in fit.callback_metrics
    # 12 steps, 3 of warm-up; then half a cosine over the 9 that are left.
    expected = [(step + 1) / 3 for step in range(3)]
    expected += [0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])


def test_only_parameters_that_require_grad_are_optimized(tiny_llama: str, trainer: Trainers) -> None:
    class Freeze(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert [id(p) for p in held] == [id(pl_module.model.model.norm.weight)]

    module = CausalLMModule(tiny_llama, generate_in=[])
    module.configure_model()
    module.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="No parameter of .* requires grad"):
        trainer().fit(module, HandMade(tiny_llama))
    module.model.model.norm.weight.requires_grad_(True)
    trainer(callbacks=[Freeze()]).fit(module, HandMade(tiny_llama))


def test_model_is_built_once_and_in_the_checkpoints_dtype(tiny_llama: str, tmp_path: Path) -> None:
    module = built(tiny_llama)
    first = module.model
    module.configure_model()
    assert module.model is first
    assert first.dtype == torch.float32
    half = built(tiny_llama, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    assert built(str(tmp_path)).model.dtype == torch.bfloat16
    assert built(str(tmp_path), dtype="float32").model.dtype == torch.float32


def test_gradient_checkpointing_recomputes_without_reentry(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = HandMade(tiny_llama).batch(0, 1)
    gradients = []
    for checkpointing in (False, True):
        module = built(tiny_llama, gradient_checkpointing=checkpointing)
        module.train()
        assert module.model.is_activation_checkpointing is checkpointing
        # Only an inner weight trains, as with an adapter: reentrant checkpointing would leave it without gradient.
        module.model.requires_grad_(False)
        weight = module.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        module.response_loss(batch)[0].backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pad_token_falls_back_to_eos(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from lightning_pmss.modules.hub import load_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["models/not-there", "a/b/c/d", "/nowhere/at all", "org/unknown-model"])
def test_missing_model_says_what_to_type(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*--model\.model_name_or_path"):
        CausalLMModule(name).configure_model()


def test_folder_without_a_model_says_so(tiny_tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer that can be loaded"):
        CausalLMModule(str(tmp_path)).configure_model()
    with pytest.raises(FileNotFoundError, match="holds no model that can be loaded"):
        CausalLMModule(tiny_tokenizer).configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0"),
        ({"lr_schedule": "cosin"}, "choose one of"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"generate_in": ["tset"]}, "tset"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMModule("anything", **options)


def test_unknown_dtype_is_refused(tiny_llama: str) -> None:
    with pytest.raises(ValueError, match="dtype='float8' is not known"):
        CausalLMModule(tiny_llama, dtype="float8").configure_model()


def test_endless_training_needs_a_constant_rate(tiny_llama: str, trainer: Trainers) -> None:
    module = CausalLMModule(tiny_llama)
    with pytest.raises(ValueError, match="needs the number of steps"):
        trainer(max_epochs=-1, max_steps=-1).fit(module, HandMade(tiny_llama))

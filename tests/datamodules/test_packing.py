"""Packed rows: nothing lost, nothing leaks, loss and gradients are those of the unpacked examples, exact resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_pmss.datamodules import ArithmeticDataModule, Example, InstructionCollator, InstructionDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.datamodules.packing import PackedCollator, PackingReport, pack, padding_share
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.modules.packed import check_packing


def _rows(seed: int = 0, count: int = 6) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt_ids": [rng.randrange(2, 300) for _ in range(rng.randint(1, 9))],
            "response_ids": [rng.randrange(2, 300) for _ in range(rng.randint(1, 7))],
        }
        for _ in range(count)
    ]


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA computes softmax and norms in float32 whatever the weights are: here in their own type."""

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: torch.softmax(scores, dim))
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


def _model(folder: str, attention: str) -> CausalLMModule:
    module = CausalLMModule(folder)
    module.configure_model()
    module.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(4)  # a random model hardly attends
    return module


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_row_and_no_row_is_too_long(seed: int) -> None:
    rng = random.Random(seed)
    room = rng.randint(5, 60)
    lengths = [rng.randint(1, room) for _ in range(rng.randint(1, 200))]
    packs = pack(lengths, room, seed)
    assert sorted(index for row in packs for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in packs]
    assert max(sums) <= room
    # At most one row can be half empty: the last one's examples would have gone into another such.
    assert sum(2 * total <= room for total in sums) <= 1
    assert packs == pack(lengths, room, seed)


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="An example has 9 tokens and a packed row 8"):
        pack([1, 9], 8)
    assert pack([], 8) == []


def test_a_batch_by_hand() -> None:
    one = {"prompt_ids": [5, 6], "response_ids": [7, 8]}
    other = {"prompt_ids": [9], "response_ids": [3]}
    batch = PackedCollator(InstructionCollator(pad_id=0))([[one, other], [other]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3], [9, 3, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, 3], [-100, 3, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    # With the loss on all, each example's first token still is nobody's next token.
    batch = PackedCollator(InstructionCollator(pad_id=0, loss_on_prompt=True))([[one, other]])
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, -100, 3]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("loss_on_prompt", [False, True])
@pytest.mark.usefixtures("float64")
def test_loss_logits_and_gradients_equal_those_unpacked(tiny_llama: str, attention: str, loss_on_prompt: bool) -> None:
    module, rows = _model(tiny_llama, attention), _rows()
    single = InstructionCollator(0, loss_on_prompt=loss_on_prompt)
    alone, packed = single(rows), PackedCollator(single)([rows[:3], rows[3:5], rows[5:]])
    assert packed["input_ids"].shape[1] > alone["input_ids"].shape[1]
    results = []
    for batch in (alone, packed):
        module.zero_grad()
        options = {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch}
        logits = module(batch["input_ids"], **options)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        results.append((loss.item(), {name: p.grad.clone() for name, p in module.named_parameters()}))
        told, tokens = module.response_loss(batch)  # which computes in float32
        assert told.item() == pytest.approx(loss.item(), rel=1e-6)
        assert tokens == (alone["labels"][:, 1:] != IGNORED).sum()
    (loss, grads), (packed_loss, packed_grads) = results
    assert packed_loss == pytest.approx(loss, rel=1e-13)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-10, atol=1e-12, msg=name)
    with torch.no_grad():
        got = module(packed["input_ids"], position_ids=packed["position_ids"])
        start, place = 0, 0
        for number, row in enumerate(rows):
            if number in (3, 5):
                start, place = start + 1, 0
            ids = row["prompt_ids"] + row["response_ids"]
            wanted = module(torch.tensor([ids]))[0]
            torch.testing.assert_close(got[start, place : place + len(ids)], wanted, rtol=1e-11, atol=1e-11)
            place += len(ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.usefixtures("float64")
def test_what_stands_before_changes_nothing_behind(tiny_llama: str, attention: str) -> None:
    module, (one, other, third, *_) = _model(tiny_llama, attention), _rows()
    collate = PackedCollator(InstructionCollator(0))
    changed = {**one, "prompt_ids": [(token + 7) % 300 for token in one["prompt_ids"]]}
    length = len(one["prompt_ids"] + one["response_ids"])
    with torch.no_grad():
        batches = [collate([[first, other, third]]) for first in (one, changed)]
        logits = [module(batch["input_ids"], position_ids=batch["position_ids"])[0] for batch in batches]
        assert torch.equal(logits[0][length:], logits[1][length:])
        # The test can fail: without the positions everything leaks.
        leaking = [module(batch["input_ids"])[0] for batch in batches]
        assert not torch.allclose(leaking[0][length:], leaking[1][length:], rtol=1e-3)
        # A mask of 4 dimensions says the same.
        number = (batches[0]["position_ids"] == 0).cumsum(1)
        block = (number[:, None, :] == number[:, :, None]).tril()[:, None]
        if attention == "sdpa":
            masked = module(batches[0]["input_ids"], block, position_ids=batches[0]["position_ids"])[0]
            torch.testing.assert_close(masked, logits[0], rtol=1e-11, atol=1e-11)


def test_models_that_would_mix_examples_are_refused(tiny_llama: str) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM would let packed examples see each other.*packing false"):
        check_packing(mamba)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    check_packing(llama)
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attention 'flash_attention_2'.*'eager' or 'sdpa'"):
        check_packing(llama)


class Texts(InstructionDataModule):
    """Sixty sums whose lengths vary, ten to validate on."""

    def load_examples(self, split: Split) -> list[Example] | None:
        count = {"train": 60, "val": 10, "test": 10}[split]
        return [Example("sum " * (number * 7 % 11) + f"{number}?", f"#### {number}") for number in range(count)]


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def build(kind: type[InstructionDataModule] = Texts, **kwargs: Any) -> InstructionDataModule:
        options: dict[str, Any] = {"batch_size": 2, "max_length": 128, "packing": True, **kwargs}
        return kind(tiny_tokenizer, cache_dir=str(tmp_path / "cache"), **options)

    return build


def _texts(module: InstructionDataModule, batch: dict[str, torch.Tensor]) -> list[str]:
    """The examples of a batch as texts."""
    texts: list[str] = []
    for ids, labels, places in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            if (labels[start:end] != IGNORED).any():
                texts.append(module.encoder.tokenizer.decode(ids[start:end]))
    return texts


def test_training_batches_hold_every_example_once(build: Any) -> None:
    module, plain = build(), build(packing=False)
    for each in (module, plain):
        each.setup("fit")
    batches = list(module.train_dataloader())
    assert set(batches[0]) == {"input_ids", "labels", "position_ids"}  # no mask that could be used without positions
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 128
    wanted = sorted(
        module.encoder.tokenizer.decode(row["prompt_ids"] + row["response_ids"]) for row in plain.data["train"]
    )
    assert sorted(text for batch in batches for text in _texts(module, batch)) == wanted
    assert "attention_mask" in next(iter(module.val_dataloader()))  # evaluation is unpacked
    report = module.packing_report
    assert isinstance(report, PackingReport)
    slots = sum(batch["input_ids"].numel() for batch in batches)
    assert report.after == pytest.approx(1 - sum(plain.data["train"]["length"]) / slots)
    slots = sum(batch["input_ids"].numel() for batch in plain.train_dataloader())
    assert report.before == pytest.approx(1 - sum(plain.data["train"]["length"]) / slots)
    assert (report.examples, report.rows, report.room) == (60, len(module.train_dataloader().dataset), 128)
    assert f"Packed 60 examples into {report.rows} rows of at most 128 tokens" in str(report)


def test_padding_share() -> None:
    assert padding_share([2, 0, 1], [1, 3, 5], 2) == pytest.approx(1 - 9 / 13)
    assert padding_share([], [], 2) == 0


def test_cut_prompts_are_packed_too(build: Any) -> None:
    module = build(max_length=24, too_long="cut_prompt")
    with pytest.warns(UserWarning, match="lose their beginning"):
        module.setup("fit")
    batches = list(module.train_dataloader())
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 24
    assert sum(len(_texts(module, batch)) for batch in batches) == 60


def test_packed_training_resumes_exactly(build: Any, tiny_llama: str, tmp_path: Path) -> None:
    def train(folder: Path, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        L.seed_everything(0)
        data = build(ArithmeticDataModule, train_size=40, val_size=0, max_length=200)
        module = CausalLMModule(tiny_llama, generate_in=[], lr_schedule="constant", warmup_ratio=0)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            max_steps=15, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[keep],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt)
        assert 2 < len(data.train_dataloader()) < 14  # the middle of an epoch, and a second epoch
        return {name: value.clone() for name, value in module.state_dict().items()}

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", tmp_path / "whole" / "step=2.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name

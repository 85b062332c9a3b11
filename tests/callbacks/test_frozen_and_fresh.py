"""What stays random and frozen is said before training, with what to type, and is in checkpoints and the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.checkpoints.extract import extract_files, merge_checkpoint
from tests.callbacks.toys import Toy, inputs, plain_loader, trainer

ADVICE = r"in no file of the base|missing in the base's files|stay frozen as they are"


def ids_of(batch: Any) -> Tensor:
    return batch[0].abs().mul(50).long().clamp(max=300)


class Classifier(L.LightningModule):
    """A pretrained body with a fresh head on it."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = ids_of(batch)
        loss: Tensor = self.model(ids, labels=ids.sum(1) % 3).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class Extended(Classifier):
    """A language model with three more tokens."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__(folder, seed)
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.model.resize_token_embeddings(self.model.config.vocab_size + 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = ids_of(batch)
        ids[:, 0] = self.model.config.vocab_size - 1  # one of them
        loss: Tensor = self.model(ids, labels=ids).loss
        return loss


def answers(module: Any) -> Tensor:
    ids = ids_of([inputs()[:4][0]])
    ids[:, 0] = module.model.config.vocab_size - 1
    with torch.no_grad():
        found: Tensor = module.model.eval()(ids).logits
    return found


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Classifier, r"score: in no file of the base, so freshly initialised, and frozen.*type also_train=\['score'\]"),
        (
            Extended,
            r"model\.embed_tokens\.weight \(3 rows\): missing in the base.*type also_train=\['model\.embed_tokens'\]",
        ),
    ],
)
def test_warned_about_before_training_and_kept_everywhere(
    kind: type[Classifier], message: str, tiny_llama: str, tmp_path: Path
) -> None:
    module = kind(tiny_llama, seed=1)
    saver = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, callback, saver, max_epochs=2).fit(module, plain_loader())
    expected = answers(module)

    fresh = kind(tiny_llama, seed=2)  # another process: other random values
    load_adapter(fresh.model, tmp_path / "out" / "adapter")
    torch.testing.assert_close(answers(fresh), expected, rtol=1e-3, atol=1e-4)

    last = tmp_path / "checkpoints" / "epoch=1.ckpt"
    extract_files(last, tiny_llama, tmp_path / "extracted", progress=False)
    extracted = kind(tiny_llama, seed=4)
    load_adapter(extracted.model, tmp_path / "extracted")
    torch.testing.assert_close(answers(extracted), expected, rtol=1e-3, atol=1e-4)
    merge_checkpoint(last, tiny_llama, tmp_path / "merged", progress=False)
    extracted.model = type(extracted.model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(extracted), expected, rtol=1e-3, atol=1e-4)

    resumed = kind(tiny_llama, seed=3)
    again = PMSSCallback(rank=4, output_dir=tmp_path / "again", merge_on_save=None)
    first = tmp_path / "checkpoints" / "epoch=0.ckpt"
    trainer(tmp_path, again, max_epochs=2).fit(resumed, plain_loader(), ckpt_path=first)
    torch.testing.assert_close(answers(resumed), expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_said_of_what_is_trained_or_in_the_files(tiny_llama: str, tmp_path: Path) -> None:
    for module, also in ((Classifier(tiny_llama, 1), ["score"]), (Extended(tiny_llama, 1), ["embed_tokens"])):
        callback = PMSSCallback(rank=4, also_train=also, output_dir=tmp_path / "out", merge_on_save=None)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=f".*({ADVICE})")
            trainer(tmp_path, callback, max_epochs=1).fit(module, plain_loader())


def test_a_checkpoint_of_an_early_version_says_what_it_does_not_hold(tiny_llama: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "last")
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    trainer(tmp_path, callback, saver, max_epochs=1).fit(Classifier(tiny_llama, 1), plain_loader())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["state_dict"]["model.score.weight"]
    torch.save(content, tmp_path / "early.ckpt")
    again = PMSSCallback(rank=4, output_dir=tmp_path / "again", merge_on_save=None)
    with pytest.warns(UserWarning, match=r"does not contain `model\.score\.weight`.*an earlier version made it"):
        trainer(tmp_path, again, max_epochs=2).fit(
            Classifier(tiny_llama, 2), plain_loader(), ckpt_path=tmp_path / "early.ckpt"
        )


class WithHead(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"body": self.net, "head": nn.Linear(16, 2)})

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.net["head"](self.net["body"](batch[0])).square().mean()
        return loss


class Around(Classifier):
    """The head is the LightningModule's own."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__(folder, seed)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.judge = nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.model.model(ids_of(batch)).last_hidden_state
        loss: Tensor = self.judge(hidden).square().mean()
        return loss


def test_heads_of_which_no_file_is_known_are_said(tiny_llama: str, tmp_path: Path) -> None:
    for module, name in ((WithHead(), "net.head"), (Around(tiny_llama, 1), "judge")):
        callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
        with pytest.warns(UserWarning, match=rf"`{name}` stay frozen as they are.*type also_train=\['{name}'\]"):
            trainer(tmp_path, callback, max_epochs=1).fit(module, plain_loader())
        assert f"also_train=['{name}']" in str(callback.report)

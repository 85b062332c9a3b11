"""The model card beside an adapter: what it says is so, and its lines load the adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSCallback, PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.files.adapter_card import adapter_card
from lightning_pmss.modules import CausalLMModule
from tests.callbacks.toys import Numbers, Toy


def quiet_trainer(callback: PMSSCallback, **options: Any) -> L.Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", callbacks=[callback], **dict.fromkeys(silent, False), **options)


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---")[1])


def test_written_from_the_run(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(PMSSCallback(rank=8, rank_pattern={"k_proj": 4}, output_dir=tmp_path), max_steps=3)
    data = ArithmeticDataModule(tiny_llama, train_size=24, val_size=4, test_size=4, batch_size=8)
    optimizer = lambda params: torch.optim.AdamW(params, lr=0.0125)  # noqa: E731
    trainer.fit(CausalLMModule(tiny_llama, optimizer=optimizer), data)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["library_name"] == "lightning-pmss"
    assert "base_model" not in front_matter(card)  # a path is no id of the hub
    for line in (
        f"- Base: {tiny_llama}, unmerged.",
        "- data: ArithmeticDataModule",
        "- optimizer steps: 3",
        "- optimizer: AdamW",
        "- learning rate: 0.0125",
        "- strategy: SingleDeviceStrategy, 1 processes",
    ):
        assert line in card.splitlines()
    assert f"- val/loss: {float(trainer.callback_metrics['val/loss']):.4g}" in card.splitlines()
    assert re.search(
        r"14 layers \(.*q_proj.*\), rank 4, 8, selection lupp, orthonormal coordinates, scale auto\.", card
    )

    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1].replace("THIS_FOLDER", str(tmp_path / "adapter")), names)  # noqa: S102
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(expected, tmp_path / "adapter")
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(names["model"](tokens).logits, expected(tokens).logits)


def test_any_module_has_a_card_and_a_second_run_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        quiet_trainer(PMSSCallback(rank=4, output_dir=tmp_path), max_epochs=1).fit(Toy(), Numbers())
    assert "model = ...  # the Toy it was trained on" in (tmp_path / "adapter" / "README.md").read_text()


def test_hub_id_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, PMSSConfig(rank=2))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    save_adapter(model, tmp_path / "one", base=str(tmp_path / "base"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0"
    assert "Licence of the base: apache-2.0" in card
    save_adapter(model, tmp_path / "two", base="org/name", revision="abc")
    card = (tmp_path / "two" / "README.md").read_text()
    assert front_matter(card)["base_model"] == "org/name"
    assert "- Base: org/name, revision abc, unmerged." in card
    assert "license" not in front_matter(card)


def test_without_a_run_there_is_no_figure() -> None:
    options = PMSSConfig().to_dict()
    described = {"base_model_name_or_path": None, "revision": None, "config": options, "modules": {}}
    card = adapter_card(described | {"also_train": {"head.weight": {}}, "versions": {"torch": "2"}}, PMSSConfig())
    assert "not recorded" in card
    assert "trained in full: head.weight" in card
    assert "## Training" not in card


@pytest.mark.parametrize(
    "front",
    [
        "license: " + "[" * 3000,
        "license: 2024-99-99",
        "a: &a [*a]\nlicense: [",
        "license: {x: 1}",
        "\x00",
        "- " * 40000,
    ],
)
def test_a_base_s_card_that_is_none_costs_no_adapter(tmp_path: Path, front: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, PMSSConfig(rank=4))
    folder = save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    assert "Licence of the base: not found" in (folder / "README.md").read_text(encoding="utf-8")


def test_names_from_a_file_are_no_code() -> None:
    """An adapter of others is exported: its base and class stand in lines that people paste."""
    about: dict[str, Any] = {
        "base_model_name_or_path": '"); import os; ("',
        "revision": None,
        "model_class": "transformers.x import y; import os",
        "config": {"selection": "lupp", "coordinates": "raw", "scale": 1.0},
        "modules": {},
        "also_train": {},
        "versions": {},
    }
    for model_class in (about["model_class"], "transformers.models.llama.LlamaForCausalLM"):
        code = re.search(
            r"```python\n(.*?)```", adapter_card(about | {"model_class": model_class}, PMSSConfig()), re.DOTALL
        )
        assert code
        assert not re.search(r"^[^\"#]*import os", code[1], re.MULTILINE)
        compile(code[1], "card", "exec")

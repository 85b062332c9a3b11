"""LoRA through our callback against peft's: losses, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_pmss import AdapterCallback, LoRAConfig, convert, load_adapter, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files.lora_import import import_files
from tests.callbacks import toys

peft = pytest.importorskip("peft")
TARGETS, RANK, ALPHA, STEPS = ["q_proj", "v_proj", "down_proj"], 8, 16, 20


class Language(L.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        order = sorted(trained, key=lambda n: n.replace("lora_", "").replace("base_model.model.", ""))
        return torch.optim.AdamW([trained[n] for n in order], lr=1e-2)


def batches() -> DataLoader[Any]:
    ids = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0)).repeat(STEPS // 2, 1)
    return DataLoader(ids, batch_size=2)  # type: ignore[arg-type]


def fit(module: Language, *callbacks: L.Callback) -> list[float]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", enable_checkpointing=False, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module, batches())
    return module.losses


def peft_model(base: str, **options: Any) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **options)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


def test_twenty_steps_are_pefts(tiny_llama: str, tmp_path: Path) -> None:
    rival = Language(peft_model(tiny_llama))
    ours = Language(AutoModelForCausalLM.from_pretrained(tiny_llama))
    config = LoRAConfig(target_modules=TARGETS, rank=RANK, alpha=ALPHA)
    convert(ours, config)
    start = rival.model.state_dict()
    for name, layer in adapted_layers(ours).items():
        layer.core.A.data.copy_(start[f"base_model.model.{name}.lora_A.default.weight"])  # type: ignore[operator, union-attr]
    found, expected = fit(ours, AdapterCallback(config, output_dir=tmp_path)), fit(rival)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, abs=1e-6)
    end = rival.model.state_dict()
    for name, layer in adapted_layers(ours).items():
        a, b = (end[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
        torch.testing.assert_close(layer.core.A, a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.core.B, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_becomes_ours(tiny_llama: str, tmp_path: Path, rslora: bool) -> None:
    model = peft_model(
        tiny_llama,
        use_rslora=rslora,
        rank_pattern={"down_proj": 4},
        alpha_pattern={"v_proj": 5},
        modules_to_save=["norm"],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "lora")
    run_tool(
        "import", "--format", "peft", "--input", str(tmp_path / "lora"), "--base", tiny_llama, "--output",
        str(tmp_path / "ours"),
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama)
    report = load_adapter(loaded, tmp_path / "ours")
    assert isinstance(report.config, LoRAConfig)
    assert report.config.rank_stabilized is rslora
    assert report.config.alpha == pytest.approx(ALPHA)  # so that training goes on with peft's factor
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
def test_the_factor_of_the_update(stabilised: bool) -> None:
    model, alpha = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False)).double(), 3.0
    convert(model, LoRAConfig(target_modules=["0"], rank=9, alpha=alpha, rank_stabilized=stabilised))
    layer = adapted_layers(model)["0"]
    torch.nn.init.normal_(layer.core.B)  # type: ignore[arg-type]
    x = torch.randn(5, 12, dtype=torch.float64)
    a, b = layer.core.A, layer.core.B
    weight = layer.weight + alpha / (3 if stabilised else 9) * (b @ a)  # type: ignore[operator]
    torch.testing.assert_close(model(x), x @ weight.T)


def test_a_checkpoint_of_the_other_factor_is_refused(tmp_path: Path) -> None:
    def run(name: str, checkpoint: Path | None = None, **options: Any) -> Path:
        trainer = L.Trainer(
            max_steps=1 if checkpoint is None else 2,
            accelerator="cpu",
            logger=False,
            callbacks=[
                AdapterCallback(LoRAConfig(target_modules=["0"], rank=4, **options), output_dir=tmp_path / name)
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(toys.Toy(), toys.Numbers(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return tmp_path / f"{name}.ckpt"

    checkpoint = run("plain")
    with pytest.raises(ValueError, match="was made with rank_stabilized=False, this run has True"):
        run("stabilised", checkpoint, rank_stabilized=True)
    content = torch.load(checkpoint)
    del content["pmss"]["config"]["rank_stabilized"]  # as versions without the option wrote it
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match="was made with rank_stabilized=False, this run has True"):
        run("stabilised", checkpoint, rank_stabilized=True)
    run("again", checkpoint)


@pytest.mark.parametrize("alpha", [0, 1e-45, float("inf"), float("nan"), 1e39, True, "16"])
def test_an_alpha_with_which_nothing_can_be_trained(alpha: Any) -> None:
    with pytest.raises(ValueError, match="alpha=.* (must be finite and not zero|is no number)"):
        LoRAConfig(alpha=alpha)


def test_the_range_of_a_factor_is_float32s() -> None:
    numbers = torch.finfo(torch.float32)
    for last in (numbers.tiny, numbers.max):
        assert LoRAConfig(alpha=last).alpha == last
    for beyond in (numbers.tiny * (1 - 1e-9), numbers.max * (1 + 1e-9)):
        with pytest.raises(ValueError, match="must be finite and not zero"):
            LoRAConfig(alpha=beyond)


def test_an_update_that_the_trained_numbers_cannot_hold_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    def plain() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(4, 4))

    model = plain()
    convert(model, LoRAConfig(target_modules=["0"], rank=2))
    torch.nn.init.normal_(adapted_layers(model)["0"].core.B)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter")
    other = plain()
    convert(other, LoRAConfig(target_modules=["0"], rank=2, alpha=2e-38))
    with pytest.raises(
        ValueError, match="`0`: with scale 1e-38 its update needs trained numbers that float32 cannot hold"
    ):
        load_adapter(other, tmp_path / "adapter")
    assert not adapted_layers(other)["0"].core.B.any()  # type: ignore[operator, union-attr]


def test_loading_weights_derives_nothing_where_the_method_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    convert(model, LoRAConfig(target_modules=["0"], rank=2))
    monkeypatch.setattr("lightning_pmss.layers.adapted.whole_weight", None)  # gathering would call it
    model.load_state_dict(model.state_dict())


def test_refusals(tiny_llama: str, tmp_path: Path) -> None:
    peft_model(tiny_llama, use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"use_dora.*cannot express"):
        import_files(tmp_path / "dora", tiny_llama, tmp_path / "ours")
    peft_model(tiny_llama).save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"alpha_pattern": {"(a|aa)+$": 3.0}}))
    with pytest.raises(ValueError, match="alpha_pattern has .* not a plain name"):
        import_files(tmp_path / "lora", tiny_llama, tmp_path / "ours")
    config.write_text(json.dumps(content))
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    half = dict(list(tensors.items())[1:])
    save_file(half, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks one of the two factors"):
        import_files(tmp_path / "lora", tiny_llama, tmp_path / "ours")
    peft_model(tiny_llama, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="lm_head.weight trained in full.*it is tied to another one"):
        import_files(tmp_path / "head", tiny_llama, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

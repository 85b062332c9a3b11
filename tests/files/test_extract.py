"""A checkpoint and the base on disk give the adapter that `fit` wrote at that step, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss import PMSSCallback
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import load_adapter, merge_files, read_adapter, save_skeleton
from lightning_pmss.merging import merge
from tests.callbacks.toys import Toy, make_net, plain_loader, trainer
from tests.compatibility import run

FORMAT_1 = Path(__file__).parent.parent / "compatibility" / "format1"


class Wrapped(L.LightningModule):
    """A Hugging Face model in someone's module, beside a head of its own."""

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32, classes: int = 0) -> None:
        super().__init__()
        if classes:
            torch.manual_seed(3)
            self.inner: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=classes, dtype=dtype
            )
        else:
            self.inner = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        labels = ids[:, 0] % 3 if hasattr(self.inner, "score") else ids
        loss: Tensor = self.inner(input_ids=ids, labels=labels).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def _ids() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randint(1, 40, (12, 9), generator=draw)), batch_size=2)


def _run(
    folder: Path, module: L.LightningModule, loader: Any, steps: int, of_trainer: Any = None, **options: Any
) -> Path:
    """A run whose checkpoint of each step is in ``saved`` and whose adapter is in ``adapter``; returns its folder."""
    callback = PMSSCallback(output_dir=folder, **{"rank": 5, "merge_on_save": None, **options})
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, callback, saver, max_steps=steps, **(of_trainer or {})).fit(module, loader)
    return folder


def _same(first: Path, second: Path) -> None:
    """Both folders hold the same adapter: every tensor bit for bit, and all that the config says."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert set(one) == set(other)
    assert all(torch.equal(value, other[key]) and value.dtype == other[key].dtype for key, value in one.items())
    assert max(float(value.abs().max()) for key, value in one.items() if key.endswith(".U")) > 1e-3  # it was trained
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("coordinates", ["orthonormal", "rotation", "spectral", "raw"])
def test_any_step_of_any_module(tmp_path: Path, coordinates: str) -> None:
    """Not the last one alone: the best checkpoint is mostly an earlier one."""
    options = {"coordinates": coordinates, "scale": 0.7, "also_train": ["2"], "target_modules": ["0"]}
    long = _run(tmp_path / "long", Toy(), plain_loader(), 4, **options)
    short = _run(tmp_path / "short", Toy(), plain_loader(), 2, **options)
    save_file(make_net().state_dict(), tmp_path / "base.safetensors")
    report = extract_files(
        long / "saved" / "step=2.ckpt", tmp_path / "base.safetensors", tmp_path / "a", progress=False
    )
    assert (report.step, report.layers) == (2, 1)
    _same(tmp_path / "a", short / "adapter")
    net = nn.ModuleDict({"net": make_net()})
    load_adapter(net, tmp_path / "a")
    assert set(adapted_layers(net)) == {"net.0"}


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "32-true"), ("float32", "bf16-true")]
)
def test_a_hugging_face_model_inside_a_module(tiny_llama: str, tmp_path: Path, dtype: str, precision: str) -> None:
    """Canonical names, and coordinates of the weights in the dtype that they had when the model was converted."""
    done = _run(tmp_path / "run", Wrapped(tiny_llama, getattr(torch, dtype)), _ids(), 3, {"precision": precision})
    extract_files(done / "saved" / "step=3.ckpt", tiny_llama, tmp_path / "a", progress=False)
    _same(tmp_path / "a", done / "adapter")
    assert read_adapter(tmp_path / "a").base_model == tiny_llama


def test_conv1d_and_a_tied_embedding(tiny_gpt2: str, tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_proj"], "also_train": ["lm_head"]}
    done = _run(tmp_path / "run", Wrapped(tiny_gpt2), _ids(), 2, **options)
    extract_files(done / "saved" / "step=2.ckpt", tiny_gpt2, tmp_path / "a", progress=False)
    _same(tmp_path / "a", done / "adapter")
    assert read_adapter(tmp_path / "a").tied == {"lm_head.weight": ["transformer.wte.weight"]}


def test_a_fresh_head(tiny_llama: str, tmp_path: Path) -> None:
    done = _run(tmp_path / "run", Wrapped(tiny_llama, classes=3), _ids(), 2, also_train=["score"])
    extract_files(done / "saved" / "step=2.ckpt", tiny_llama, tmp_path / "a", progress=False)
    _same(tmp_path / "a", done / "adapter")


def test_indices_and_coordinates_of_a_skeleton_file(tmp_path: Path) -> None:
    chosen = Toy()
    trainer(tmp_path, PMSSCallback(rank=5, selection="norm", output_dir=tmp_path), fast_dev_run=1).fit(
        chosen, plain_loader()
    )
    skeleton = save_skeleton(chosen, tmp_path / "s.safetensors")
    done = _run(tmp_path / "run", Toy(), plain_loader(), 2, skeleton_file=skeleton)
    save_file(Toy().state_dict(), tmp_path / "base.safetensors")
    extract_files(done / "saved" / "step=2.ckpt", tmp_path / "base.safetensors", tmp_path / "a", progress=False)
    _same(tmp_path / "a", done / "adapter")


def test_the_commands(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = _run(tmp_path / "run", Wrapped(tiny_llama), _ids(), 2)
    ckpt, adapter, merged = done / "saved" / "step=2.ckpt", tmp_path / "adapter", tmp_path / "merged"
    main(["extract", "--ckpt", str(ckpt), "--base", tiny_llama, "--output", str(adapter)])
    printed = capsys.readouterr()
    assert f"adapter of {ckpt} at step 2: 14 layers, written to {adapter}" in printed.out
    assert "extracting" in printed.err  # the bar
    main(["merge", "--ckpt", str(ckpt), "--base", tiny_llama, "--output", str(merged)])
    expected = merge_files(tiny_llama, adapter, tmp_path / "expected", progress=False)
    one, other = (load_file(folder / "model.safetensors") for folder in (merged, Path(expected.output)))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert "optimizer steps: 2" in (adapter / "README.md").read_text()
    for refused, message in (
        (["--ckpt", str(ckpt), "--adapter", str(adapter)], "not allowed with argument"),
        ([], "one of the arguments --adapter --ckpt is required"),
        (["--ckpt", str(ckpt)], f"{merged} exists and is not empty"),
        (["--ckpt", str(tmp_path / "none.ckpt"), "--overwrite"], "none.ckpt does not exist"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["merge", *refused, "--base", tiny_llama, "--output", str(merged)])
        assert left.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_refusals_write_nothing(tiny_llama: str, tiny_gpt2: str, tmp_path: Path) -> None:
    done = _run(tmp_path / "run", Wrapped(tiny_llama), _ids(), 1)
    ckpt = done / "saved" / "step=1.ckpt"
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    model.save_pretrained(other)
    content = torch.load(ckpt)
    cases: dict[str, tuple[Any, Any, str]] = {
        "other base": (None, other, "belongs to another base: the weights of model.layers.1.mlp.down_proj"),
        "other model": (None, tiny_gpt2, "has no weights for 14 of the 14 modules of the checkpoint"),
        "plain": ({"state_dict": model.state_dict()}, tiny_llama, "contains no PMSS adapter"),
        "weights": (model.state_dict(), tiny_llama, "is no checkpoint of Lightning"),
        "quantised": (
            content | {"pmss": content["pmss"] | {"base": content["pmss"]["base"] | {"quantisation": ["x nf4"]}}},
            tiny_llama,
            "was trained on quantised weights",
        ),
        "inside": (None, None, "lies inside the base"),
    }
    for changed, base, message in cases.values():
        if changed is not None:
            torch.save(changed, tmp_path / "bad.ckpt")
        output = other / "a" if base is None else tmp_path / "a"
        with pytest.raises(ValueError, match=message):
            extract_files(tmp_path / "bad.ckpt" if changed else ckpt, base or other, output, progress=False)
        assert not output.exists()


def test_format_1_is_read_from_its_keys(tmp_path: Path) -> None:
    """Against the module itself, with the checkpoint's tensors loaded and merged."""
    module = run.Module()
    save_file(module.net.state_dict(), tmp_path / "base.safetensors")
    extract_files(FORMAT_1 / "checkpoint.ckpt", tmp_path / "base.safetensors", tmp_path / "a", progress=False)
    assert set(read_adapter(tmp_path / "a").also_train) == {"net.head.weight", "net.head.bias"}
    load_adapter(module, tmp_path / "a")
    state = torch.load(FORMAT_1 / "checkpoint.ckpt")["state_dict"]
    for name, layer in adapted_layers(module).items():
        torch.testing.assert_close(layer.core.weight, state[f"{name}.core.weight"], rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.rows, state[f"{name}.rows"].long())
    assert torch.equal(module.net.head.weight, state["net.head.weight"])
    merge(module)

"""Selecting from files gives what `convert` selects from the loaded model, and says what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files.architecture import model_on_meta
from lightning_pmss.files.select import select_files
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.selection import SELECTORS
from lightning_pmss.methods.pmss.skeleton import METADATA, read_skeleton


def loaded(folder: str, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    return model


def check_equal(folder: str, config: PMSSConfig, output: Path) -> None:
    """The file holds the indices, frames, residuals and fingerprints of a conversion with the same config, and no more."""
    report = select_files(folder, output, config, progress=False)
    converted = loaded(folder)
    conversion = convert(converted, config)
    layers = adapted_layers(converted)
    skeleton = read_skeleton(output)
    assert skeleton.coordinates == config.coordinates
    assert skeleton.layers.keys() == layers.keys()
    for name, layer in layers.items():
        stored = skeleton.layers[name]
        indices = layer.indices()
        assert all(torch.equal(stored.tensors[part], index) for part, index in indices.items())
        assert stored.fingerprint == fingerprint(*layer.reads())
        frame = layer.core.frozen()
        assert stored.tensors.keys() == {*indices, *frame}
        for part, ours in frame.items():
            kept = stored.tensors[part]
            torch.testing.assert_close(kept, ours.reshape(kept.shape), rtol=1e-5, atol=1e-6)
    for one in conversion.layers:
        stored = skeleton.layers[one.name]
        assert stored.shape == one.shape
        assert stored.figures["residual"] == pytest.approx(one.residual, rel=1e-4, abs=1e-6)
    assert {(one.name, one.rank, one.requested_rank) for one in report.layers} == {
        (one.name, one.rank, one.requested_rank) for one in conversion.layers
    }
    assert report.left_out == conversion.left_out


@pytest.mark.parametrize("coordinates", ["orthonormal", "rotation", "spectral", "raw"])
def test_equals_convert_on_llama(tiny_llama: str, tmp_path: Path, coordinates: str) -> None:
    # Rank 24 is clipped to 16 in the key and value projections; the tied head is left out.
    check_equal(tiny_llama, PMSSConfig(rank=24, seed=3, coordinates=coordinates), tmp_path / "s.safetensors")


@pytest.mark.parametrize("coordinates", ["orthonormal", "spectral", "raw"])
@pytest.mark.parametrize("selection", ["lupp", "random", "leverage"])
def test_equals_convert_of_a_one_sided_skeleton(
    tiny_llama: str, tmp_path: Path, coordinates: str, selection: str
) -> None:
    config = PMSSConfig(columns="all", rank=5, seed=3, coordinates=coordinates, selection=selection)
    check_equal(tiny_llama, config, tmp_path / "s.safetensors")


def test_equals_convert_on_a_sharded_bfloat16_checkpoint(sharded_llama: str, tmp_path: Path) -> None:
    assert len(list(Path(sharded_llama).glob("*.safetensors"))) > 1
    check_equal(sharded_llama, PMSSConfig(rank=8), tmp_path / "s.safetensors")


def test_equals_convert_on_conv1d(tiny_gpt2: str, tmp_path: Path) -> None:
    check_equal(tiny_gpt2, PMSSConfig(rank=8), tmp_path / "s.safetensors")
    layer = read_skeleton(tmp_path / "s.safetensors").layers["transformer.h.0.mlp.c_fc"]
    assert layer.shape == (96, 24)  # canonical, although the file has [24, 96]


@pytest.mark.parametrize("selection", SELECTORS)
@pytest.mark.parametrize("row_mode", ["independent", "nested"])
def test_equals_convert_for_every_rule(tiny_llama: str, tmp_path: Path, selection: str, row_mode: str) -> None:
    config = PMSSConfig(
        target_modules=r".*\.1\.(self_attn\.q|self_attn\.v|mlp\.up)_proj",
        exclude_modules=["v_proj"],
        rank=6,
        rank_pattern={"up_proj": 4},
        selection=selection,
        row_mode=row_mode,
        oversample=3,
        coordinates="spectral",
    )
    check_equal(tiny_llama, config, tmp_path / "s.safetensors")


def test_a_base_stored_without_its_prefix(tiny_gpt2: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_gpt2, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()}, bare / "model.safetensors", {"format": "pt"}
    )
    select_files(tiny_gpt2, tmp_path / "one.safetensors", PMSSConfig(rank=4), progress=False)
    select_files(bare, tmp_path / "other.safetensors", PMSSConfig(rank=4), progress=False)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_workers_do_not_change_the_file(tiny_llama: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 4):
        select_files(tiny_llama, tmp_path / f"{workers}", PMSSConfig(rank=8), workers=workers, progress=False)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()
    assert torch.get_num_threads() == threads


def test_the_global_random_state_is_left_alone(tiny_llama: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    select_files(tiny_llama, tmp_path / "s", PMSSConfig(rank=8), progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_report_and_metadata(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    report = select_files(tiny_llama, output, PMSSConfig(rank=24), workers=2, progress=False)
    assert (report.selected, report.resumed, report.workers) == (14, 0, 2)
    assert report.bytes == output.stat().st_size
    assert 0 < report.mean_residual < 1
    assert report.matrices_per_second > 0
    assert json.loads(json.dumps(report.to_dict()))["selected"] == 14
    for words in ("16 (asked 24)", "14 matrices of LlamaForCausalLM", "matrices per second", "lm_head"):
        assert words in str(report)
    from safetensors import safe_open

    with safe_open(output, framework="pt") as opened:
        about = json.loads(opened.metadata()[METADATA])
    assert about["options"]["rank"] == 24
    assert about["base"]["architecture"] == "LlamaForCausalLM"
    assert str(Path(tiny_llama).parent) not in json.dumps(about)  # no path of the machine it was made on


def test_skeleton_file_converts_a_fresh_model_to_the_same(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    select_files(tiny_llama, output, PMSSConfig(rank=8), progress=False)
    selected, given = loaded(tiny_llama), loaded(tiny_llama)
    convert(selected, PMSSConfig(rank=8))
    convert(given, PMSSConfig(rank=8, skeleton_file=str(output)))
    assert adapted_layers(selected).keys() == adapted_layers(given).keys()
    for name, layer in adapted_layers(given).items():
        assert torch.equal(layer.rows, adapted_layers(selected)[name].rows)
        assert torch.equal(layer.cols, adapted_layers(selected)[name].cols)


def test_skeleton_file_of_another_base_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    select_files(tiny_llama, output, PMSSConfig(rank=8), progress=False)
    model = loaded(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # type: ignore[index, operator, union-attr]
    with pytest.raises(ValueError, match=r"another base.*model\.layers\.1\.mlp\.up_proj"):
        convert(model, PMSSConfig(rank=8, skeleton_file=str(output)))


def test_skeleton_file_converts_on_the_meta_device(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    select_files(tiny_llama, output, PMSSConfig(rank=8), progress=False)
    report = convert(model_on_meta(Path(tiny_llama)), PMSSConfig(rank=8, skeleton_file=str(output)))
    assert len(report.layers) == 14
    assert report.trainable == 14 * 64


# -- what a model folder may be ------------------------------------------------------------------------------------


def edited(folder: str, target: Path, **changes: Any) -> Path:
    """A copy of a model folder with another config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("named", "asked", "built"),
    [
        (["LlamaForSequenceClassification"], None, "LlamaForSequenceClassification"),
        (["LlamaModel"], None, "LlamaForCausalLM"),  # what CausalLMModule loads from a bare body
        (None, None, "LlamaForCausalLM"),
        (["SomebodysLlama"], None, "LlamaForCausalLM"),
        (["LlamaForCausalLM"], "LlamaModel", "LlamaModel"),
    ],
)
def test_which_class_is_built(
    tiny_llama: str, tmp_path: Path, named: list[str] | None, asked: str | None, built: str
) -> None:
    folder = edited(tiny_llama, tmp_path / "model", architectures=named)
    assert type(model_on_meta(folder, asked)).__name__ == built


def test_a_vision_model(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    # transformers stores this model's layers under other names than its modules have.
    assert "vit.layers.0.mlp.fc1.weight" not in load_file(tmp_path / "vit" / "model.safetensors")
    select_files(tmp_path / "vit", tmp_path / "s", PMSSConfig(rank=4), progress=False)
    convert(model, PMSSConfig(rank=4))
    stored = read_skeleton(tmp_path / "s").layers
    assert stored.keys() == adapted_layers(model).keys()
    assert all(torch.equal(stored[name].tensors["cols"], layer.cols) for name, layer in adapted_layers(model).items())


def rewrite(folder: str, target: Path, change: Any) -> Path:
    """A copy of a single-file model folder with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


Q = "model.layers.0.self_attn.q_proj.weight"


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q][0, 0] = float("nan")


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q].zero_()


def _deficient(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = tensors[Q][:, :2] @ tensors[Q][:2]


def _packed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = torch.zeros(16, 1, dtype=torch.uint8)


def _float8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = tensors[Q][:16].contiguous()


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, r"layers\.0\.self_attn\.q_proj`: the weight holds NaN"),
        (_zero, r"layers\.0\.self_attn\.q_proj`: the weight is all zeros"),
        (_deficient, r"layers\.0\.self_attn\.q_proj`: the 8 selected columns .* numerical rank 2 .*rank_pattern"),
        (_packed, r"q_proj\.weight is stored as torch\.uint8, a quantised form.*unquantised model"),
        (_float8, r"q_proj\.weight is stored as torch\.float8_e4m3fn, a quantised form"),
        (_other_shape, r"q_proj\.weight is stored as \[16, 32\], LlamaForCausalLM \(config\.json\) has \[32, 32\]"),
        (_missing, r"no weights for 1 of the 14 modules of LlamaForCausalLM .*q_proj"),
    ],
)
def test_bad_weights(tiny_llama: str, tmp_path: Path, change: Any, message: str) -> None:
    model = rewrite(tiny_llama, tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        select_files(model, tmp_path / "s.safetensors", PMSSConfig(rank=8), workers=1, progress=False)
    assert not (tmp_path / "s.safetensors").exists()


def test_a_quantised_config_is_named(tiny_llama: str, tmp_path: Path) -> None:
    folder = edited(tiny_llama, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    tensors = load_file(folder / "model.safetensors")
    save_file({k.replace("proj.weight", "proj.qweight"): v for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the model is quantised: give the unquantised one"):
        select_files(folder, tmp_path / "s.safetensors", PMSSConfig(rank=8), progress=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["query"]}, r"target_modules: 'query' matches no module; closest names"),
        ({"exclude_modules": ["nowhere"]}, r"exclude_modules: 'nowhere' matches no module"),
        ({"target_modules": ["lm_head"]}, r"`lm_head` shares its weight with `model\.embed_tokens`"),
        ({"rank_pattern": {"nowhere": 3}}, r"rank_pattern: 'nowhere'"),
        ({"skeleton_file": "x"}, "selecting makes such a file"),
    ],
)
def test_bad_options(tiny_llama: str, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_files(tiny_llama, tmp_path / "s.safetensors", PMSSConfig(**{"rank": 8, **config}), progress=False)
    assert not list(tmp_path.iterdir())


def test_tensors_that_transformers_changes_on_loading_are_refused(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping, core_model_loading

    converter = conversion_mapping.WeightConverter(
        source_patterns=["self_attn.q_proj.weight"],
        target_patterns=["self_attn.q_proj.weight"],
        operations=[core_model_loading.Transpose(0, 1)],
    )
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(ValueError, match=r"transformers changes the weights of model\.layers\.0\.self_attn\.q_proj"):
        select_files(tiny_llama, tmp_path / "s.safetensors", PMSSConfig(rank=8), progress=False)


def test_folders_and_outputs(tiny_llama: str, sharded_llama: str, tmp_path: Path) -> None:
    config = PMSSConfig(rank=8)
    output = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        select_files(tmp_path / "nowhere", output, config, progress=False)
    folder = edited(tiny_llama, tmp_path / "no-config")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        select_files(folder, output, config, progress=False)
    unknown = edited(tiny_llama, tmp_path / "unknown", model_type="of-tomorrow")
    with pytest.raises(ValueError, match="cannot read it"):
        select_files(unknown, output, config, progress=False)
    with pytest.raises(ValueError, match="'NoSuchClass' is not a model class"):
        select_files(tiny_llama, output, config, architecture="NoSuchClass", progress=False)
    lacking = tmp_path / "lacking"
    shutil.copytree(sharded_llama, lacking)
    next(lacking.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="shards named in .* are missing"):
        select_files(lacking, output, config, progress=False)
    with pytest.raises(FileExistsError, match="is a folder; name a file in it"):
        select_files(tiny_llama, tmp_path, config, progress=False)
    with pytest.raises(ValueError, match="workers=0"):
        select_files(tiny_llama, output, config, workers=0, progress=False)
    assert not output.exists()
    assert not output.with_name("s.safetensors.partial").exists()

    select_files(tiny_llama, output, config, progress=False)
    first = output.read_bytes()
    with pytest.raises(FileExistsError, match="exists. To replace it give --overwrite"):
        select_files(tiny_llama, output, PMSSConfig(rank=4), progress=False)
    assert output.read_bytes() == first
    select_files(tiny_llama, output, PMSSConfig(rank=4), overwrite=True, progress=False)
    assert len(read_skeleton(output).layers["model.layers.0.mlp.up_proj"].tensors["rows"]) == 4
    weights = folder / "model.safetensors"
    with pytest.raises(FileExistsError, match="is not a skeleton file"):
        select_files(tiny_llama, weights, config, overwrite=True, progress=False)
    assert weights.stat().st_size == (Path(tiny_llama) / "model.safetensors").stat().st_size

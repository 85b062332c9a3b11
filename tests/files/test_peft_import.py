"""Folders that peft wrote, read as ours and exported back; variants that ours cannot express are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lightning_pmss import load_adapter, merge
from lightning_pmss.files import export_files, merge_files, read_adapter
from lightning_pmss.files.lora_import import import_files
from tests.files.test_peft_native import base, in_peft, logits

peft = pytest.importorskip("peft")
LLAMA, GPT2, BERT, PHI3 = (
    ["q_proj", "down_proj"],
    ["c_attn", "mlp.c_proj"],
    ["query", "dense"],
    ["qkv_proj", "down_proj"],
)


def made(model: Any, folder: Path, config: Any) -> Any:
    """A trained adapter of peft, saved, and its model."""
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": LLAMA} | options)


def miss(**options: Any) -> Any:
    return peft.MissConfig(**{"r": 8, "target_modules": LLAMA} | options)


def hira(**options: Any) -> Any:
    return peft.HiraConfig(**{"r": 4, "target_modules": LLAMA} | options)


READ: dict[str, tuple[str, Any]] = {
    "LoRA, GPT-2": ("gpt2", lambda: lora(target_modules=GPT2, fan_in_fan_out=True)),
    "LoRA, BERT with its head": ("bert", lambda: lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "LoRA, Phi-3": ("phi3", lambda: lora(target_modules=PHI3)),
    "LoRA, patterns": ("llama", lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})),
    "LoRA of some layers": ("llama", lambda: lora(layers_to_transform=[1], layers_pattern="layers")),
    "LoRA, LLaMA with its output head": ("llama", lambda: lora(target_modules=["q_proj", "lm_head"])),
    "LoRA, MiCA's start": ("llama", lambda: lora(init_lora_weights="mica")),
    "MiSS, BERT with its head": ("bert", lambda: miss(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "MiSS, LLaMA with its output head": ("llama", lambda: miss(target_modules=["q_proj", "lm_head"])),
    "MiSS, Phi-3": ("phi3", lambda: miss(target_modules=PHI3)),
    "MiSS of some layers": ("llama", lambda: miss(layers_to_transform=0)),
    "BAT, Phi-3": ("phi3", lambda: miss(target_modules=PHI3, init_weights="bat")),
    "HiRA, LLaMA": ("llama", lambda: hira(hira_dropout=0.1, modules_to_save=["lm_head"])),
    "HiRA, GPT-2": ("gpt2", lambda: hira(target_modules=GPT2, fan_in_fan_out=True)),
    "HiRA, LLaMA with its output head": ("llama", lambda: hira(target_modules=["q_proj", "lm_head"])),
    "HiRA, BERT with its head": ("bert", lambda: hira(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "HiRA, Phi-3": ("phi3", lambda: hira(target_modules=PHI3, layers_to_transform=[0])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", READ)
def test_a_folder_of_peft_and_back(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config = READ[case]
    model = made(base(bases[name]), tmp_path / "theirs", config())
    expected = logits(model)
    assert (expected - logits(base(bases[name]))).abs().max() > 0.01
    assert case.split(",")[0].split()[0] in import_files(tmp_path / "theirs", bases[name], tmp_path / "ours")
    loaded = base(bases[name])
    load_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    merge(loaded)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    merge_files(bases[name], tmp_path / "ours", tmp_path / "merged", progress=False)
    torch.testing.assert_close(logits(base(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    export_files(bases[name], tmp_path / "ours", tmp_path / "back", native=True, progress=False)
    kinds = [json.loads((tmp_path / f / "adapter_config.json").read_text())["peft_type"] for f in ("theirs", "back")]
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(logits(in_peft(base(bases[name]), tmp_path / "back")), expected, rtol=1e-4, atol=1e-4)


class Mixed(nn.Module):
    """A Conv1D beside nn.Linear: peft's `fan_in_fan_out` is that of the last of them."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = Conv1D(inner, 16), nn.Linear(inner, 12)
            self.square = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.square(self.last(torch.relu(self.first(x))))
        return found


def mixed(tmp_path: Path, inner: int) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(Mixed(inner).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [lora, hira])
def test_conv1d_beside_linear(config: Any, tmp_path: Path) -> None:
    folder, x = mixed(tmp_path, 24), torch.randn(5, 16)
    expected = made(Mixed(24), tmp_path / "theirs", config(target_modules=["first", "last"]))(x)
    assert (expected - Mixed(24)(x)).abs().max() > 0.001
    import_files(tmp_path / "theirs", folder, tmp_path / "ours")
    loaded = Mixed(24)
    load_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    merge_files(folder, tmp_path / "ours", tmp_path / "merged", progress=False)
    merged = Mixed(24)
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [lora, hira])
def test_a_square_layer_beside_both_is_refused(config: Any, tmp_path: Path) -> None:
    folder = mixed(tmp_path, 24)
    made(Mixed(24), tmp_path / "theirs", config(target_modules=["first", "last", "square"]))
    with pytest.raises(
        ValueError, match=r"does not say which of them the square ones are: square\. Merge it with peft"
    ):
        import_files(tmp_path / "theirs", folder, tmp_path / "ours")


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_the_base_lacks_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=3)
    made(model, tmp_path / "theirs", lora(task_type="SEQ_CLS"))
    with pytest.raises(
        ValueError, match=r"has score\.weight trained in full, which .* such as a new head, or it is tied"
    ):
        import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")


@pytest.mark.filterwarnings("ignore")
def test_a_copy_that_is_not_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    made(base(bases["llama"]), tmp_path / "theirs", lora(target_modules=["q_proj", "lm_head"]))
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][1, 2] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="has a weight of lm_head that is not the base's"):
        import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")


def test_an_imported_hira_is_bound_to_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    made(base(bases["llama"]), tmp_path / "theirs", hira())
    import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")
    assert read_adapter(tmp_path / "ours").options.rank == 4
    other = base(bases["llama"])
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[3, 5] += 0.1
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(other, tmp_path / "ours")


REFUSED: dict[str, tuple[Any, str]] = {
    "biases of all": (lambda: lora(bias="all"), "has bias=all"),
    "biases of the layers": (lambda: lora(bias="lora_only"), "has bias=lora_only"),
    "biases of MiSS": (lambda: miss(bias="all"), "has bias=all"),
    "DoRA": (lambda: lora(use_dora=True), "has use_dora=True"),
    "a bias of B": (lambda: lora(lora_bias=True), "has lora_bias=True"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa': peft takes a part out of W"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "init_lora_weights='olora': peft takes a part out of W"),
    "tokens": (lambda: lora(trainable_token_indices=[3]), "has trainable_token_indices="),
    "layers twice": (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "has layer_replication="),
    "LoHa": (
        lambda: peft.LoHaConfig(r=4, target_modules=LLAMA),
        "has the peft_type 'LOHA'; LORA, MISS, BONE, HIRA are read",
    ),
    "IA3": (
        lambda: peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]),
        "has the peft_type 'IA3'; LORA, MISS, BONE, HIRA are read",
    ),
    "a HiRA of embeddings": (lambda: hira(target_modules=["embed_tokens"]), "hira_embedding_A is not a tensor of HiRA"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_variants_are_refused_by_name(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config, message = REFUSED[case]
    made(base(bases["llama"]), tmp_path / "theirs", config())
    with pytest.raises(ValueError, match=f"{message}.*(with peft|peft's own)"):
        import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("config", [lora, miss, hira])
def test_fields_of_later_versions_are_refused_unless_they_are_off(
    config: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    made(base(bases["llama"]), tmp_path / "theirs", config())
    file = tmp_path / "theirs" / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"use_later": True}))
    with pytest.raises(ValueError, match="has use_later=True, which .* here cannot express"):
        import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")
    file.write_text(json.dumps(content | {"use_later": False, "later_config": None}))
    import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")


@pytest.mark.parametrize("kind", [None, 3, "a" * 5000, ["LORA"]])
def test_a_type_that_is_none(kind: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    made(base(bases["llama"]), tmp_path / "theirs", lora())
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": kind}))
    with pytest.raises(ValueError, match="has the peft_type .{1,300}; LORA") as error:
        import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")
    assert len(str(error.value)) < 1000


def test_damaged_hira(bases: dict[str, Path], tmp_path: Path) -> None:
    made(base(bases["llama"]), tmp_path / "theirs", hira())
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("hira_A"))
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != key}, "lacks one of the two factors"),
        (tensors | {key: tensors[key][:, :5].contiguous()}, r"A is torch.float32 \[4, 5\]; it must be"),
        (tensors | {key: tensors[key] * float("nan")}, "NaN or infinite"),
        (tensors | {f"{key}.more": tensors[key].clone()}, "is not a tensor of HiRA"),
    ):
        save_file(broken, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            import_files(tmp_path / "theirs", bases["llama"], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

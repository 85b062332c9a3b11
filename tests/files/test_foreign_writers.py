"""Writers of other libraries on a converted model: what they write is read back as the merged model, or they refuse."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_pmss import PMSSConfig, convert, merged
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import export_lora, load_adapter, save_adapter, write_merged
from lightning_pmss.merging import merge, merged_state_dict, unmerge
from lightning_pmss.named import disable_adapter

IDS = torch.arange(1, 25).view(2, 12)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def train(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def base(tiny_llama: str) -> Callable[[], Any]:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def model(base: Callable[[], Any]) -> Any:
    made = base()
    convert(made, PMSSConfig(rank=6))
    train(made)
    return made


def read(folder: Path, cls: Any = None) -> Any:
    """The model in a folder; every key of the file must be one of the model's, and the other way around."""
    from transformers import AutoModelForCausalLM

    found, report = (cls or AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    return found


def keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("in_memory", [False, True])
def test_save_pretrained_writes_the_merged_model(
    model: Any, base: Callable[[], Any], tmp_path: Path, in_memory: bool, shards: int
) -> None:
    expected = logits(model)
    assert float((logits(base()) - expected).abs().max()) > 0.1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if in_memory:
        merge(model)
    model.save_pretrained(tmp_path, **({} if shards == 1 else {"max_shard_size": "20KB"}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shards > 1)
    torch.testing.assert_close(logits(read(tmp_path)), expected, rtol=1e-4, atol=1e-5)
    assert keys(tmp_path) == {k for k in base().state_dict() if k != "lm_head.weight"}  # tied
    if in_memory:
        unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_conv1d_a_head_and_a_lightning_module_around(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2, pad_token_id=0, num_labels=3)
    module = L.LightningModule()
    module.model = GPT2ForSequenceClassification(config)
    convert(module, PMSSConfig(rank=6, also_train=["score"]))
    train(module)
    expected = logits(module.model)
    module.model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(read(tmp_path, GPT2ForSequenceClassification)), expected, rtol=1e-4, atol=1e-5)


def test_a_submodule_and_a_model_around_the_converted_part(base: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import AutoModel

    part = base()
    convert(part.model, PMSSConfig(rank=6))
    train(part.model)
    part.save_pretrained(tmp_path / "outer")
    torch.testing.assert_close(logits(read(tmp_path / "outer")), logits(part), rtol=1e-4, atol=1e-5)
    part.model.save_pretrained(tmp_path / "inner")
    inner = read(tmp_path / "inner", AutoModel)
    with torch.no_grad():
        expected = part.model(input_ids=IDS).last_hidden_state
        # Normalised states are of size 1; their last float32 bits depend on the processor.
        torch.testing.assert_close(inner(input_ids=IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_given_state_dict_is_merged_itself(model: Any, base: Callable[[], Any], tmp_path: Path) -> None:
    """As transformers' Trainer gives one that it has gathered, or an average."""
    expected = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    train(model)  # the live model has moved on
    assert float((logits(model) - expected).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "raw", state_dict=state)
    torch.testing.assert_close(logits(read(tmp_path / "raw")), expected, rtol=1e-4, atol=1e-5)
    with merged(model):
        model.save_pretrained(tmp_path / "merged", state_dict=dict(model.state_dict()))
    torch.testing.assert_close(logits(read(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-5)
    for name, given in (("plain", merged_state_dict(model)), ("base", base().state_dict())):  # nothing to merge
        model.save_pretrained(tmp_path / name, state_dict=dict(given))
    torch.testing.assert_close(logits(read(tmp_path / "plain")), logits(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(read(tmp_path / "base")), logits(base()))
    del state["model.layers.0.mlp.up_proj.rows"]
    with pytest.raises(ValueError, match="the adapter of `model.layers.0.mlp.up_proj`, but lacks `rows`"):
        model.save_pretrained(tmp_path / "lacking", state_dict=state)


def test_push_to_hub(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    sent: list[Path] = []

    def upload(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        sent.append(tmp_path / "sent")
        safetensors.torch.save_file(safetensors.torch.load_file(Path(folder) / "model.safetensors"), tmp_path / "sent")

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **o: type("Repo", (), {"repo_id": "a/b"}))
    model.push_to_hub("a/b")
    assert sent
    expected, found = merged_state_dict(model), safetensors.torch.load_file(sent[0])
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


class Hubbed(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """No transformers model: its mixin writes the state dict without asking for one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_mixin_of_huggingface_hub(tmp_path: Path, in_memory: bool) -> None:
    model, x = Hubbed(), torch.randn(5, 16)
    model.save_pretrained(tmp_path / "base")
    convert(model, PMSSConfig(rank=6))
    train(model)
    expected = model(x)
    assert float((Hubbed.from_pretrained(tmp_path / "base")(x) - expected).abs().max()) > 0.1
    if in_memory:
        merge(model)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(Hubbed.from_pretrained(tmp_path / "out", strict=True)(x), expected, rtol=1e-4, atol=1e-5)


def test_copies_and_models_from_a_pickle(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained.__wrapped__
    )  # a new process
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded.save_pretrained(tmp_path / "pickle")
    for name in ("copy", "pickle"):
        torch.testing.assert_close(logits(read(tmp_path / name)), expected, rtol=1e-4, atol=1e-5)


def test_safetensors_save_model_is_the_state_of_the_training(
    model: Any, base: Callable[[], Any], tmp_path: Path
) -> None:
    expected, file = logits(model), tmp_path / "model.safetensors"
    for in_memory in (False, True):
        if in_memory:
            merge(model)
        safetensors.torch.save_model(model, str(file))
        again = base()
        convert(again, PMSSConfig(rank=6))
        safetensors.torch.load_model(again, str(file))
        assert torch.equal(logits(again), expected)
        with pytest.raises(RuntimeError, match="Unexpected key.*core.weight"):
            safetensors.torch.load_model(base(), str(file))


def test_what_cannot_be_merged_is_refused_before_anything_is_written(model: Any, tmp_path: Path) -> None:
    with (
        disable_adapter(model),
        pytest.raises(ValueError, match="no adapter can be written or merged; leave the block"),
    ):
        model.save_pretrained(tmp_path / "out")
    next(iter(adapted_layers(model).values())).core.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="q_proj`: the merged weight is not finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_written_dense(tiny_llama: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings, dtype=torch.float32)
    convert(model, PMSSConfig(rank=6))
    train(model)
    expected = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, given in (("live", None), ("given", state)):
        model.save_pretrained(tmp_path / name, state_dict=given)
        found = read(tmp_path / name)
        assert getattr(found, "hf_quantizer", None) is None
        torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-4)
    assert model.hf_quantizer is not None
    assert torch.equal(logits(model), expected)


def test_unconverted_models_are_written_as_ever(model: Any, base: Callable[[], Any], tmp_path: Path) -> None:
    plain = base()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path)), logits(plain))


def test_inside_disable_adapter_nothing_of_the_adapter_is_used(model: Any, tmp_path: Path) -> None:
    """Merging there brought the adapter back, and what was saved held the base's modules in place of the trained ones."""
    base_logits = None
    save_adapter(model, tmp_path / "adapter")
    acts: dict[str, Callable[[], Any]] = {
        "merged": lambda: merge(model),
        "written or merged": lambda: merged_state_dict(model),
        "saved": lambda: save_adapter(model, tmp_path / "new"),
        "loaded": lambda: load_adapter(model, tmp_path / "adapter"),
        "exported": lambda: export_lora(model, tmp_path / "new", progress=False),
    }
    with disable_adapter(model):
        base_logits = logits(model)
        for what, act in acts.items():
            with pytest.raises(
                ValueError, match=rf"inside `with disable_adapter\(model\)` no adapter can be {what}; leave"
            ):
                act()
        with pytest.raises(ValueError, match="no adapter can be written or merged"):
            write_merged(model, tmp_path / "new")
        assert torch.equal(logits(model), base_logits)
    assert not (tmp_path / "new").exists()
    assert float((logits(model) - base_logits).abs().max()) > 0.1
    with merged(model), pytest.raises(ValueError, match="the model is merged"), disable_adapter(model):
        pass

"""Embeddings of a language model and the convolutions of a vision model: files that transformers and peft load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_pmss import convert, export_lora, export_peft, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.estimate import Run, estimate
from lightning_pmss.files import merge_files, write_merged
from lightning_pmss.files.lora import export_files
from lightning_pmss.files.lora_import import import_files
from lightning_pmss.files.select import select_files
from tests.applied.toys import can, config_of, train
from tests.methods.cases import CASES

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 4,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False, pad_token_id=1))


def gpt2() -> Any:
    """Positions are an embedding, and linear layers are stored transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=16))


def resnet() -> Any:
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(**VISION)).eval()


MODELS: dict[str, tuple[Any, list[str]]] = {
    "llama": (llama, ["embed_tokens", "q_proj", "down_proj"]),
    "gpt2": (gpt2, ["wpe", "c_attn"]),
    "resnet": (resnet, ["convolution", "classifier.1"]),
}


def is_vision(name: str) -> bool:
    return name == "resnet"


def logits(name: str, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    if is_vision(name):
        found: Tensor = model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)).logits
        return found
    of_words: Tensor = model(input_ids=torch.randint(0, 40, (2, 9), generator=generator)).logits
    return of_words


def plain(name: str, folder: Path) -> Any:
    kind = ResNetForImageClassification if is_vision(name) else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def trained(name: str, method: str, folder: Path) -> Any:
    make, names = MODELS[name]
    make().save_pretrained(folder)
    model = plain(name, folder)
    convert(model, config_of(method, *names, **({"mini_rank": 4} if "mini_rank" in method else {})))
    return train(model)


CASES_HERE = [(m, name) for name in MODELS for m in CASES if name == "resnet" or can(m, "embedding")]


@pytest.mark.parametrize(("method", "name"), CASES_HERE)
def test_merged_models_load_with_transformers(method: str, name: str, tmp_path: Path) -> None:
    model = trained(name, method, tmp_path / "base")
    wanted = logits(name, model)
    save_adapter(model, tmp_path / "adapter")
    again = plain(name, tmp_path / "base")
    assert (logits(name, again) - wanted).abs().max() > 1e-3
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(name, again), wanted, rtol=1e-4, atol=1e-5)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    write_merged(model, tmp_path / "live")
    model.save_pretrained(tmp_path / "own")
    for folder in ("merged", "live", "own"):
        torch.testing.assert_close(logits(name, plain(name, tmp_path / folder)), wanted, rtol=1e-3, atol=1e-4)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {key: value.shape for key, value in base.items()} == {key: value.shape for key, value in merged.items()}


@pytest.mark.parametrize(("method", "name"), CASES_HERE)
def test_peft_loads_the_export(method: str, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(name, method, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    layer = next(iter(adapted_layers(model).values()))
    exact = type(layer.update()).has_factors()
    cut: dict[str, Any] = {} if exact else {"rank": 32}
    if not exact:
        with pytest.raises(ValueError, match=r"no product of two thin matrices"):
            export_lora(model, tmp_path / "none", progress=False)
    export_lora(model, tmp_path / "lora", progress=False, **cut)
    export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files", native=False, progress=False, **cut)
    wanted = logits(name, model)
    for folder in ("lora", "files"):
        loaded = peft.PeftModel.from_pretrained(plain(name, tmp_path / "base"), str(tmp_path / folder))
        torch.testing.assert_close(logits(name, loaded), wanted, rtol=1e-3, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(name, merged), wanted, rtol=1e-3, atol=1e-4)


def test_other_types_of_peft_are_refused_or_become_a_lora(tmp_path: Path) -> None:
    model = trained("resnet", "miss", tmp_path / "base")
    with pytest.raises(ValueError, match=r"is a convolution or an embedding, written for peft as a LoRA only"):
        export_peft(model, tmp_path / "native", native=True, progress=False)
    report = export_peft(model, tmp_path / "lora", progress=False)
    assert report.form == "LoRA"
    assert not report.served
    model = trained("resnet", "hira", tmp_path / "other")
    with pytest.raises(ValueError, match=r"is a convolution or an embedding.*with a rank"):
        export_peft(model, tmp_path / "hira", progress=False)


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all", "lora_xs"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_a_skeleton_file_has_what_a_conversion_derives(method: str, name: str, tmp_path: Path) -> None:
    make, names = MODELS[name]
    make().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"architecture": "ResNetForImageClassification"} if is_vision(name) else {}
    file = tmp_path / "file.safetensors"
    select_files(tmp_path / "base", file, config_of(method, *names), progress=False, **options)
    direct, model = plain(name, tmp_path / "base"), plain(name, tmp_path / "base")
    convert(direct, config_of(method, *names))
    convert(model, config_of(method, *names, skeleton_file=file))
    layers = adapted_layers(model)
    for key, layer in adapted_layers(direct).items():
        for part, tensor in layer.tensors().items():
            torch.testing.assert_close(layers[key].tensors()[part], tensor, msg=f"{key}.{part}")


def test_estimate(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = config_of("pmss", "embed_tokens", "q_proj")
    run = Run(str(tmp_path / "base"), config=config, micro_batch=2, sequence_length=16)
    made = estimate(run, ("pmss", "lora"))
    assert made.methods["pmss"].trainable == convert(plain("llama", tmp_path / "base"), config).trainable


def grown(folder: Path) -> Any:
    """The base with three more tokens, which no file of it has."""
    model = plain("llama", folder)
    model.resize_token_embeddings(43)
    return model


@pytest.mark.parametrize("method", ["pmss", "lora", "hira"])
def test_rows_of_added_tokens(method: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = grown(tmp_path / "base")
    convert(model, config_of(method, "embed_tokens", "q_proj"))
    train(model)
    ids = torch.tensor([[1, 42, 41, 7, 3]])
    wanted = model(ids).logits
    save_adapter(model, tmp_path / "adapter")
    again = grown(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    torch.testing.assert_close(plain("llama", tmp_path / "merged")(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"model.embed_tokens: the weight is in no file of the base"):
        export_lora(model, tmp_path / "lora", progress=False)


@pytest.mark.parametrize("method", ["pmss", "lora"])
def test_gradient_checkpointing_of_transformers(method: str) -> None:
    model = llama().train()
    convert(model, config_of(method, *MODELS["llama"][1]))
    train(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits("llama", model).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for key, value in gradients().items():
        torch.testing.assert_close(value, wanted[key])


@pytest.mark.parametrize("name", list(MODELS))
def test_a_lora_that_peft_trained_is_imported(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, names = MODELS[name]
    make().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(
        plain(name, tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    import_files(tmp_path / "theirs", tmp_path / "base", tmp_path / "adapter")
    model = plain(name, tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert set(adapted_layers(model)) >= {n for n, _ in model.named_modules() if n.endswith(names[0])}
    torch.testing.assert_close(logits(name, model), logits(name, theirs.eval()), rtol=1e-3, atol=1e-4)


def test_an_embedding_that_peft_changed_is_refused(tmp_path: Path) -> None:
    """peft saves the weight of an embedding with a LoRA. Where it is not the base's, tokens were added."""
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(
        plain("llama", tmp_path / "base"), peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    )
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    (key,) = [key for key in tensors if key.endswith("embed_tokens.base_layer.weight")]
    tensors[key][3] += 1
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"a weight of model.embed_tokens that is not the base's.*with peft instead"):
        import_files(tmp_path / "theirs", tmp_path / "base", tmp_path / "adapter")

"""The loss in chunks is the plain loss: values, gradients, every kind of head; and what it keeps in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import HandMade
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.modules.chunked_loss import chunked_losses

VOCABULARY = 50
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype)


def batch(rows: int = 3, tokens: int = 11) -> tuple[Tensor, Tensor]:
    """Token numbers and labels with ignored stretches; row 1 has no label at all."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, tokens))
    labels = ids.roll(-1, 1)
    labels[:, :4] = -100
    labels[:, -1] = -100
    labels[1] = -100
    return ids, labels


def losses(model: Any, ids: Tensor, labels: Tensor, chunk: int | None) -> Tensor:
    if chunk is not None:
        return chunked_losses(lambda: model(input_ids=ids).logits, model, labels, -100, chunk)
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def gradients(model: Any, ids: Tensor, labels: Tensor, chunk: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and the gradients of a sum in which every position counts differently."""
    model.zero_grad()
    found = losses(model, ids, labels, chunk)
    (found * torch.linspace(0.5, 2, found.numel()).view_as(found)).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["frozen", "trained", "tied and frozen", "tied and trained", "converted"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_equals_the_plain_loss_and_its_gradients(head: str, chunk: int) -> None:
    model = llama(tied="tied" in head)
    if head == "converted":
        convert(model, PMSSConfig(rank=4, target_modules=["q_proj", "lm_head"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "core" in name:
                    parameter.normal_(std=0.1)
    elif "frozen" in head:
        model.get_output_embeddings().requires_grad_(False)
    expected, wanted = gradients(model, *batch(), None)
    found, got = gradients(model, *batch(), chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert got.keys() == wanted.keys()
    assert got
    assert ("lm_head.weight" in got) is (head == "trained")
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_bfloat16_is_as_near_to_float32_as_the_plain_loss() -> None:
    model = llama(dtype=torch.float32)
    model.get_output_embeddings().requires_grad_(False)
    exact, exact_gradients = gradients(model, *batch(), None)
    model = model.to(torch.bfloat16)
    plain = gradients(model, *batch(), None)
    chunked = gradients(model, *batch(), 4)
    assert chunked[0].dtype == torch.float32
    assert (chunked[0] - exact).abs().max() <= 1.5 * (plain[0].float() - exact).abs().max()
    for name, gradient in exact_gradients.items():
        far = (plain[1][name].float() - gradient).norm()
        assert (chunked[1][name].float() - gradient).norm() <= 1.5 * far + 1e-6, name


@pytest.mark.parametrize("trained", [False, True])
def test_a_batch_without_labels_still_reaches_every_parameter(trained: bool) -> None:
    """Ranks of a sharded model whose batch has no label must take part in the same gradients."""
    model = llama()
    model.get_output_embeddings().requires_grad_(trained)
    ids, labels = batch()
    found, got = gradients(model, ids, torch.full_like(labels, -100), 4)
    assert torch.equal(found, torch.zeros_like(found))
    assert got.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in got.values())


@pytest.mark.parametrize("trained", [False, True])
def test_never_more_logits_than_a_chunk(trained: bool) -> None:
    model = llama()
    model.get_output_embeddings().requires_grad_(trained)
    ids, labels = batch(rows=8, tokens=40)
    sizes: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (VOCABULARY,) and result.requires_grad:
                sizes.append(result.numel())
            return result

    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,):
            saved.append(tensor.numel())
        return tensor

    with Sizes(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = losses(model, ids, labels, 16)
    assert max(sizes) == 16 * VOCABULARY
    assert len(sizes) > 10
    del sizes[:]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found.sum().backward()
    # Outside of the chunks nothing of the logits' size is kept for the backward pass.
    assert all(size <= 16 * VOCABULARY for size in saved)


def test_dropout_in_the_head_is_drawn_once() -> None:
    """A head with dropout that is trained: the second computation draws what the first drew."""
    model = llama()
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head  # type: ignore[method-assign]
    model.train()
    ids, labels = batch()
    torch.manual_seed(5)
    found, got = gradients(model, ids, labels, 1000)
    weight, step = model.lm_head[1].weight, 1e-6
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight += step * direction
    torch.manual_seed(5)
    moved = losses(model, ids, labels, 1000).detach()
    slope = ((moved - found) * torch.linspace(0.5, 2, found.numel()).view_as(found)).sum() / step
    torch.testing.assert_close(slope, (got["lm_head.1.weight"] * direction).sum(), rtol=1e-4, atol=1e-6)


def test_the_head_is_itself_again_afterwards() -> None:
    model = llama()
    ids, labels = batch()
    losses(model, ids, labels, 4)
    assert "forward" not in model.lm_head.__dict__
    with pytest.raises(RuntimeError, match="on purpose"):
        chunked_losses(lambda: _fail("on purpose"), model, labels, -100, 4)
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=ids).logits.shape == (*ids.shape, VOCABULARY)


def _fail(message: str) -> Tensor:
    raise RuntimeError(message)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    ids, labels = batch()
    torch.manual_seed(0)
    scaled = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5))
    with pytest.raises(ValueError, match=r"CohereForCausalLM changes what its head returns.*loss_chunk out"):
        losses(scaled, ids, labels, 4)
    model = llama()
    model.config.vocab_size = VOCABULARY - 1
    with pytest.raises(ValueError, match="vocabulary of 49, and a head that returns 50 numbers"):
        losses(model, ids, labels, 4)
    model = llama()
    with pytest.raises(ValueError, match="does not call its head once"):
        chunked_losses(lambda: model(input_ids=ids, logits_to_keep=1).logits, model, labels, -100, 4)


def test_softcapping_is_refused_before_the_training(tmp_path: Any, tiny_tokenizer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), loss_chunk=8)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM .*final_logit_softcapping = 30.0.*--model.loss_chunk"):
        module.configure_model()


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_chunk_is_a_number_of_tokens(chunk: Any) -> None:
    with pytest.raises(ValueError, match=r"loss_chunk=.*whole number of at least 1"):
        CausalLMModule("anywhere", loss_chunk=chunk)


@pytest.mark.parametrize("grad", [True, False])
def test_the_module_gives_the_same_losses(tiny_llama: str, grad: bool) -> None:
    """Padded batches, and the sums of each row."""
    plain, chunked = CausalLMModule(tiny_llama), CausalLMModule(tiny_llama, loss_chunk=3)
    rows = HandMade(tiny_llama).batch(0, 1, 2, 3)
    for module in (plain, chunked):
        module.configure_model()
        module.eval()
    with torch.set_grad_enabled(grad):
        expected, found = plain.example_losses(rows), chunked.example_losses(rows)
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(chunked.response_loss(rows)[0], plain.response_loss(rows)[0])


def test_training_gives_the_same_weights(tiny_llama: str, trainer: Any) -> None:
    data = HandMade(tiny_llama)
    ends = []
    for chunk in (None, 5):
        module = CausalLMModule(tiny_llama, loss_chunk=chunk, gradient_checkpointing=True, generate_in=())
        trainer(max_epochs=2, limit_val_batches=0).fit(module, data)
        ends.append({name: value.clone() for name, value in module.model.state_dict().items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5, msg=name)

"""Models beside causal language models: vision-language ones, whose towers stay frozen, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import trainer

IMAGE, LENGTH = 60, 12
Batch = dict[str, Tensor]


class Seen(L.LightningModule):
    """Any model of transformers that computes its loss itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)


def qwen() -> tuple[Any, Batch]:
    """A random Qwen2.5-VL, and two rows with an image of four tokens each."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "fullatt_block_indexes": [1], "window_size": 16,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61)
    ids = _ids(4, start=61)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    return Qwen2_5_VLForConditionalGeneration(config), batch


def gemma() -> tuple[Any, Batch]:
    """A random Gemma 3 with a SigLIP tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE)
    ids = _ids(4)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros in a fresh model
    return model, batch


def t5() -> tuple[Any, Batch]:
    """A random T5 (gated, as 1.1), an encoder-decoder with tied embeddings."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    ids = _ids(0)
    batch = {"input_ids": ids, "labels": ids.flip(1)[:, :6].contiguous(), "attention_mask": torch.ones_like(ids)}
    return T5ForConditionalGeneration(config), batch


def _ids(image: int, start: int | None = None) -> Tensor:
    ids = torch.randint(3, 50, (2, LENGTH))
    if start is not None:
        ids[:, 1] = start
    ids[:, 2 : 2 + image] = IMAGE
    return ids


# Patterns over full names: the decoder of the language model alone; the tower and the projector stay as they are.
TEXT_LAYERS = r".*language_model\.layers\..*_proj"
DECODER = r"decoder\..*\.(q|k|v|o|wi_0|wi_1|wo)"


@pytest.mark.parametrize(
    ("build", "pattern", "layers", "frozen"),
    [(qwen, TEXT_LAYERS, 14, "visual"), (gemma, TEXT_LAYERS, 14, "vision_tower"), (t5, DECODER, 22, "encoder")],
    ids=["qwen2.5-vl", "gemma3", "t5"],
)
def test_a_part_is_trained_saved_merged_and_reloaded(
    build: Callable[[], tuple[Any, Batch]], pattern: str, layers: int, frozen: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    kind = type(model)
    with torch.no_grad():  # rows and columns of the size that trained models have
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    module = Seen(kind.from_pretrained(tmp_path / "base"))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    rows: Any = [dict(batch)] * 16
    callback = PMSSCallback(target_modules=pattern, rank=6, output_dir=tmp_path / "out")
    trainer(tmp_path, callback, max_steps=16).fit(module, DataLoader(rows, batch_size=None))
    assert module.losses[-1] < module.losses[0] - 0.3

    found = adapted_layers(module.model)
    assert len(found) == layers
    assert not [name for name in found if frozen in name.split(".")]
    after = module.model.state_dict()
    towers = [name for name in before if frozen in name.split(".")]
    assert towers
    assert all(torch.equal(before[name], after[name]) for name in towers)

    def logits(one: Any) -> Tensor:
        with torch.no_grad():
            said: Tensor = one.eval()(**batch).logits
        return said

    trained, base = logits(module.model), logits(kind.from_pretrained(tmp_path / "base"))
    assert (trained - base).abs().max() > 0.1
    merged, loading = kind.from_pretrained(tmp_path / "out" / "merged", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-4)
    fresh = kind.from_pretrained(tmp_path / "base")
    load_adapter(fresh, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(fresh), trained, rtol=1e-3, atol=1e-4)
    if "pixel_values" in batch:  # the image still reaches the text
        batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
        assert (logits(merged) - trained).abs().max() > 1e-4

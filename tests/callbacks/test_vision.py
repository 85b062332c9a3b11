"""A LightningModule that is no language model: a small vision transformer with a fresh head, by the callback alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback, PMSSLinear
from tests.callbacks.toys import trainer

CLASSES, SIZE, PATCH, WIDTH = 4, 16, 4, 48


class VisionTransformer(nn.Module):
    """torch's own encoder, whose fused inference path reads weights without calling the linear layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))


class Classifier(L.LightningModule):
    """Somebody else's module: it knows nothing of PMSS."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.model = VisionTransformer(classes)
        self.accuracies: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def images(count: int, seed: int) -> DataLoader[Any]:
    """One of four textures in noise; the label says which."""
    textures = torch.randn(CLASSES, 1, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    data = noise + 0.7 * textures[labels].repeat(1, 1, SIZE // PATCH, SIZE // PATCH)
    return DataLoader(TensorDataset(data, labels), batch_size=32)


# Lightning evaluates under inference_mode, where torch's fused encoder path would run.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_vision_transformer_with_a_fresh_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classifier()
    callback = PMSSCallback(rank=24, also_train=["head"], output_dir=tmp_path / "out")
    runner = trainer(tmp_path, callback, max_epochs=6)
    before = runner.validate(module, images(256, 2), verbose=False)[0]["accuracy"]
    runner.fit(module, images(512, 1))
    after = runner.validate(module, images(256, 2), verbose=False)[0]["accuracy"]
    assert before < 0.5
    assert after > 0.9

    report = callback.report
    assert report is not None
    assert {n for n, m in module.model.named_modules() if isinstance(m, PMSSLinear)} == {
        f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)
    }
    assert (
        report.left_out["model.encoder.layers.0.self_attn.out_proj"] == "nn.MultiheadAttention never calls its forward"
    )
    assert any("fused inference path" in note for note in report.notes)

    # Train mode without dropout, evaluation with gradients, and evaluation under inference_mode agree.
    batch = next(iter(images(64, 3)))[0]
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    trained = module.model.train()(batch)
    assert torch.allclose(module.model.eval()(batch), trained, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(module.model(batch), trained, atol=1e-5)

    # The merged file serves the plain, unconverted model (where the fused path is on again).
    from safetensors.torch import load_file

    plain = Classifier()
    plain.load_state_dict(load_file(tmp_path / "out" / "merged" / "model.safetensors"))
    with torch.inference_mode():
        assert torch.allclose(plain.model.eval()(batch), trained, atol=1e-4)
        for part in module.modules():
            if isinstance(part, PMSSLinear):
                part.core.weight.zero_()
        assert not torch.allclose(module.model(batch), trained, atol=1e-2)  # U is what was learned

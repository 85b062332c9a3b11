"""LightningModules that hold several models: a policy to adapt, and a reference, a teacher, a loss network beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSCallback, PMSSConfig, PMSSLinear, convert, export_lora, load_adapter, save_adapter
from lightning_pmss.cli import PMSSCLI
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.files import merge_files, read_adapter
from lightning_pmss.named import load_adapters
from tests.callbacks.toys import Toy, inputs, make_net, plain_loader, trainer


class Preference(L.LightningModule):
    """A policy that is kept near a reference, as in preference optimisation."""

    def __init__(self, folder: str, rest: bool = True, late: bool = False) -> None:
        super().__init__()
        self.folder, self.rest, self.policy = folder, rest, None
        if not late:
            self.build()

    def build(self) -> None:
        self.policy: Any = AutoModelForCausalLM.from_pretrained(self.folder)
        self.reference: Any = AutoModelForCausalLM.from_pretrained(self.folder)
        if self.rest:
            self.reference.requires_grad_(False).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch[0].abs().mul(50).long().clamp(max=300)
        with torch.no_grad():
            old = self.reference(ids).logits
        return self.policy(ids, labels=ids).loss + (self.policy(ids).logits - old).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class LatePreference(Preference):
    def __init__(self, folder: str) -> None:
        super().__init__(folder, late=True)

    def configure_model(self) -> None:
        if self.policy is None:
            self.build()


IDS = torch.arange(40, 56)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("root", [None, "policy"])
def test_adapter_merged_model_and_checkpoint_are_the_policys(
    root: str | None, late: bool, tiny_llama: str, tmp_path: Path
) -> None:
    module = LatePreference(tiny_llama) if late else Preference(tiny_llama)
    callback = PMSSCallback(rank=4, root=root, output_dir=tmp_path / "out")
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer(tmp_path, callback, saver, max_epochs=1).fit(module, plain_loader())
    assert callback.report is not None
    assert callback.report.children == {"policy": 14}
    assert "converted in: policy (14)" in str(callback.report)
    assert not any(isinstance(m, PMSSLinear) for m in module.reference.modules())
    assert module.policy.training
    assert not any(m.training for m in module.reference.modules())
    expected = logits(module.policy)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert float((expected - logits(base)).abs().max()) > 1e-3

    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert adapter.base_model == tiny_llama
    assert set(adapter.modules) == {n for n in adapter.modules if n.startswith("model.layers.")}
    load_adapter(base, tmp_path / "out" / "adapter")  # into the plain model
    torch.testing.assert_close(logits(base), expected)
    again = Preference(tiny_llama)  # and into the module that holds several
    load_adapter(again, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(again.policy), expected)
    torch.testing.assert_close(logits(again.reference), logits(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    named = Preference(tiny_llama)
    load_adapters(named, {"a": tmp_path / "out" / "adapter"})
    torch.testing.assert_close(logits(named.policy), expected)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    torch.testing.assert_close(logits(merged), expected)
    if root is not None:  # without it, all that the module holds is written, the reference beside the policy
        assert not (tmp_path / "out" / "merged" / "other_modules.safetensors").exists()
    merge_files(tiny_llama, tmp_path / "out" / "adapter", tmp_path / "streamed")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")), expected)
    export_lora(module, tmp_path / "lora", progress=False)

    resumed = Preference(tiny_llama)
    second = PMSSCallback(rank=4, root=root, output_dir=tmp_path / "again", merge_on_save=None)
    trainer(tmp_path, second, max_epochs=1).fit(
        resumed, plain_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    torch.testing.assert_close(logits(resumed.policy), expected)


def test_a_reference_that_runs_without_gradients_is_no_expert(tiny_llama: str, tmp_path: Path) -> None:
    """It is neither frozen nor in training mode: `from_pretrained` leaves eval mode. So it is converted, and this is said."""
    module = Preference(tiny_llama, rest=False)

    class Sleeping(Preference):
        def on_train_start(self) -> None:
            self.reference.eval()

    module.__class__ = Sleeping
    with pytest.warns(UserWarning, match=r"in evaluation mode or without gradients only: `reference\.model") as found:
        trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path), max_epochs=1).fit(module, plain_loader())
    assert not any("expert" in str(w.message) for w in found)


def test_several_awake_models_are_pointed_out(tiny_llama: str) -> None:
    report = convert(Preference(tiny_llama, rest=False), PMSSConfig(rank=4))
    assert report.children == {"policy": 14, "reference": 14}
    assert "`policy`, `reference` are separate Hugging Face models: root='policy' limits" in str(report)
    for options in ({"rest": True}, {}):
        alone = Preference(tiny_llama, **options)
        config = PMSSConfig(rank=4, root=None if options else "policy")
        assert "separate Hugging Face models" not in str(convert(alone, config))


def test_root_of_a_module_whose_models_are_all_awake(tiny_llama: str, tmp_path: Path) -> None:
    module = Preference(tiny_llama, rest=False)
    callback = PMSSCallback(rank=4, root="policy", output_dir=tmp_path / "out")
    trainer(tmp_path, callback, max_epochs=1).fit(module, plain_loader())
    assert set(adapted_layers(module)) == set(adapted_layers(module.policy))
    report = conversion_of(module)
    assert report is not None
    assert report.left_out["reference.model.layers.0.mlp.up_proj"] == "outside of root='policy'"
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(plain, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(plain), logits(module.policy))
    awake = Preference(tiny_llama, rest=False)
    load_adapter(awake, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(awake.policy), logits(module.policy))
    assert not any(isinstance(m, PMSSLinear) for m in awake.reference.modules())


class Tower(Toy):
    """A Hugging Face model in eval mode, as loaded, of which one part is frozen and to stay in eval mode."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net = None
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.model.model.layers[0].requires_grad_(False).eval()

    def loss(self, batch: Any) -> Tensor:
        ids = batch[0].abs().mul(50).long().clamp(max=300)
        loss: Tensor = self.model(ids, labels=ids).loss
        return loss


def test_what_was_left_out_stays_in_eval_mode(tiny_llama: str, tmp_path: Path) -> None:
    module = Tower(tiny_llama)
    trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path / "out"), max_epochs=1).fit(module, plain_loader())
    assert module.model.training
    assert module.model.model.layers[1].training
    assert not any(m.training for m in module.model.model.layers[0].modules())
    assert {n.split(".")[2] for n in adapted_layers(module)} == {"1"}
    # The adapter names its layers: it does not depend on what is frozen where it is loaded.
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(plain, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(plain), logits(module.model))


class Critic(Toy):
    """A plain policy and a critic that is trained in full beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.policy, self.critic, self.old = make_net(), nn.Linear(16, 1), make_net()

    def loss(self, batch: Any) -> Tensor:
        out = self.policy(batch[0])
        return (out - batch[0].flip(-1)).square().mean() + (self.critic(out) - 1).square().mean()


def test_root_of_a_plain_module_and_a_critic_beside_it(tmp_path: Path) -> None:
    module = Critic()
    callback = PMSSCallback(rank=4, root="policy", also_train=["critic"], output_dir=tmp_path / "out")
    trainer(tmp_path, callback, max_epochs=3).fit(module, plain_loader())
    assert set(adapted_layers(module)) == {"0", "2"}
    x = inputs()[:4][0]
    expected, judged = module.policy(x), module.critic(module.policy(x))
    again = Critic()
    load_adapter(again, tmp_path / "out" / "adapter")
    torch.testing.assert_close(again.critic(again.policy(x)), judged)
    merged = make_net()
    merged.load_state_dict(load_file(tmp_path / "out" / "merged" / "model.safetensors"))
    torch.testing.assert_close(merged(x), expected)
    beside = load_file(tmp_path / "out" / "merged" / "other_modules.safetensors")
    torch.testing.assert_close(beside, {f"critic.{k}": v for k, v in module.critic.state_dict().items()})


def test_root_alone_loads_into_the_plain_policy(tmp_path: Path) -> None:
    module = Critic()
    convert(module, PMSSConfig(rank=4, root="policy"))
    for layer in adapted_layers(module).values():
        nn.init.normal_(layer.core.weight)
    save_adapter(module, tmp_path / "adapter")
    save_adapter(module.policy, tmp_path / "same")
    x = inputs()[:4][0]
    for folder in ("adapter", "same"):
        plain = make_net()
        load_adapter(plain, tmp_path / folder)
        torch.testing.assert_close(plain(x), module.policy(x), rtol=1e-4, atol=1e-4)
        around = Critic()
        load_adapter(around, tmp_path / folder)
        torch.testing.assert_close(around.policy(x), module.policy(x), rtol=1e-4, atol=1e-4)


def test_a_root_that_was_converted_before_by_itself(tmp_path: Path) -> None:
    module = Critic()
    report = convert(module.policy, PMSSConfig(rank=4))
    assert convert(module, PMSSConfig(rank=4, root="policy")) is report
    assert set(adapted_layers(module)) == {"0", "2"}
    save_adapter(module, tmp_path / "adapter")
    load_adapter(make_net(), tmp_path / "adapter")


def test_a_copy_of_the_policy_made_after_the_conversion_is_not_part_of_the_adapter(tmp_path: Path) -> None:
    module = Critic()
    convert(module, PMSSConfig(rank=4, root="policy"))
    module.old = copy.deepcopy(module.policy)
    assert set(adapted_layers(module)) == {"0", "2"}
    save_adapter(module, tmp_path / "adapter")
    load_adapter(make_net(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"root": "policy"}, {}, r"already converted with another config \(differs in root\)"),
        ({"root": "policy"}, {"root": "old"}, r"root"),
        ({}, {"root": "policy"}, r"another config \(differs in root\)"),
    ],
)
def test_another_root_is_refused(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    module = Critic()
    convert(module, PMSSConfig(rank=4, **first))
    before = set(adapted_layers(module))
    if second == {"root": "old"}:  # another model in the same module: a conversion of its own
        assert set(convert(module, PMSSConfig(rank=4, **second)).children) == {"old"}
        return
    with pytest.raises(ValueError, match=message):
        convert(module, PMSSConfig(rank=4, **second))
    assert set(adapted_layers(module)) == before


def test_a_root_that_is_no_module_is_refused(tmp_path: Path) -> None:
    for root in ("polcy", ""):
        with pytest.raises(ValueError, match=rf"root='{root}' is no module of this Critic; closest names: .*policy"):
            trainer(tmp_path, PMSSCallback(rank=4, root=root)).fit(Critic(), plain_loader())


def test_root_on_the_command_line() -> None:
    options = ["--model", "tests.callbacks.toys.Toy", "--pmss.root", "net", "--trainer.logger", "false"]
    cli = PMSSCLI([*options, "--data", "tests.callbacks.toys.Numbers"], run=False)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, PMSSCallback))
    assert callback.config.root == "net"


class NoGradients(Toy):
    """A reference in training mode, under no_grad, that nobody froze."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = make_net()

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            old = self.reference(batch[0])
        return super().loss(batch) + 0 * old.mean()


def test_a_reference_in_training_mode_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`reference\.0`.*left out if it is frozen and in eval mode"):
        trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path)).fit(NoGradients(), plain_loader())


class Experts(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def loss(self, batch: Any) -> Tensor:
        return (self.experts[0](self.net(batch[0])) - 1).square().mean()


def test_experts_without_tokens_are_called_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no token reached these experts.*`experts\.1`, `experts\.2`"):
        trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path), max_epochs=1).fit(Experts(), plain_loader())

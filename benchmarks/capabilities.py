"""What our methods and some of peft's can do, found out by trying: one small probe per line of docs/capabilities.md.

    python -m benchmarks.capabilities --output docs/capabilities.md

A probe either does the thing on a toy model and checks the result, or fails; nothing in the table was typed in by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.capability_methods import METHODS, Method, One, Ours, Toy


def toy(dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().to(dtype)


def refused(action: Callable[[], Any]) -> bool:
    """Whether the action raises."""
    try:
        action()
    except Exception:
        return True
    return False


def layer(make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> Callable[[Method, Path], bool]:
    """Probe: a layer of this kind is adapted, and its output changes."""

    def probe(method: Method, folder: Path) -> bool:
        torch.manual_seed(0)
        plain, given = One(make()), inputs()
        adapted = method.adapt(copy.deepcopy(plain), ["layer"])
        before, after = plain(*given), adapted(*given)
        before, after = (value[0] if isinstance(value, tuple) else value for value in (before, after))
        return not torch.allclose(before, after)

    return probe


def attention(method: Method, folder: Path) -> bool:
    """Queries, keys and values, which are one parameter, are adapted by the module's name or the parameter's."""
    torch.manual_seed(0)
    plain, given = One(nn.MultiheadAttention(32, 2)), (torch.randn(4, 1, 32),) * 3
    try:
        adapted = method.adapt(copy.deepcopy(plain), ["layer"])
    except Exception:
        adapted = method.adapt_parameters(copy.deepcopy(plain), ["layer.in_proj_weight"])
    changed = adapted(*given)[0]
    changed.sum().backward()
    return not torch.allclose(changed, plain(*given)[0])


def fused_experts(method: Method, folder: Path) -> bool:
    """Both parameters of a Mixtral's experts are adapted, and the output changes."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    sizes = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    sizes._experts_implementation = "eager"
    plain = One(MixtralExperts(sizes))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    given = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    adapted = method.adapt_parameters(copy.deepcopy(plain), ["layer.gate_up_proj", "layer.down_proj"])
    changed: Tensor = adapted(*given)
    changed.sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return not torch.allclose(changed, plain(*given)) and all(p.grad is not None for p in trained)


def dtype(kind: torch.dtype) -> Callable[[Method, Path], bool]:
    """Probe: trains on a base of this dtype; every trained tensor gets a finite gradient."""

    def probe(method: Method, folder: Path) -> bool:
        model = method.adapt(toy(kind), ["up", "down"])
        model(torch.randn(4, 32, dtype=kind)).float().square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return all(g is not None and bool(g.isfinite().all()) for g in gradients)

    return probe


def trained_in_float32(method: Method, folder: Path) -> bool:
    model = method.adapt(toy(torch.bfloat16), ["up"])
    return {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def merge_is_equal(method: Method, folder: Path) -> bool:
    model, x = method.adapt(toy(), ["up", "down"]), torch.randn(4, 32)
    before = model(x)
    method.merge(model)
    with torch.no_grad():
        return torch.allclose(model(x), before, atol=1e-5)


def unmerge_is_exact(method: Method, folder: Path) -> bool:
    base = toy(torch.bfloat16)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = method.adapt(base, ["up", "down"])
    method.merge(model)
    method.unmerge(model)
    after = {k.replace("base_model.model.", "").replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    return all(torch.equal(after[k], v) for k, v in before.items())


def round_trip(method: Method, folder: Path) -> bool:
    model, x = method.adapt(toy(), ["up", "down"]), torch.randn(4, 32)
    method.save(model, folder)
    return torch.allclose(method.load(toy(), folder)(x), model(x), atol=1e-5)


def nan_refused_in_merge(method: Method, folder: Path) -> bool:
    model = method.adapt(toy(), ["up"])
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    return refused(lambda: method.merge(model))


def other_base_refused(method: Method, folder: Path) -> bool:
    method.save(method.adapt(toy(), ["up"]), folder)
    return refused(lambda: method.load(toy(seed=1), folder))


def typo_refused(method: Method, folder: Path) -> bool:
    return refused(lambda: method.adapt(toy(), ["up", "donw"]))


def missing_tensor_refused(method: Method, folder: Path) -> bool:
    file = method.save(method.adapt(toy(), ["up", "down"]), folder)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata=metadata)
    return refused(lambda: method.load(toy(), folder))


def compiles_whole(method: Method, folder: Path) -> bool:
    torch._dynamo.reset()
    model, x = method.adapt(toy(), ["up", "down"]), torch.randn(4, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    return torch.allclose(compiled(x), model(x), atol=1e-5)


def checkpointing(method: Method, folder: Path) -> bool:
    from torch.utils.checkpoint import checkpoint

    model, x = method.adapt(toy(), ["up", "down"]), torch.randn(4, 32)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


def input_not_kept(method: Method, folder: Path) -> bool:
    """The layer's input [tokens, in], or a copy of it, is not saved for the backward pass."""
    torch.manual_seed(0)
    model = method.adapt(One(nn.Linear(64, 48)), ["layer"])
    x = torch.randn(512, 64, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        model(x)
    return max(sizes) < x.numel()


def exact_lora(method: Method, folder: Path) -> bool:
    """As a LoRA in peft the outputs are equal within rounding."""
    import peft

    from lightning_pmss import export_lora

    torch.manual_seed(0)
    x, model = torch.randn(4, 32), method.adapt(toy(), ["up", "down"])
    expected = model(x)
    if isinstance(method, Ours):
        export_lora(model, folder)
    else:
        convert_to_lora: Any = peft.save_as_lora  # type: ignore[attr-defined]
        convert_to_lora(folder, model, rank=8)
    found: Any = peft.PeftModel.from_pretrained(toy(), str(folder))  # type: ignore[arg-type]
    return torch.allclose(found(x), expected, atol=1e-5)


def own_type_of_peft(method: Method, folder: Path) -> bool:
    """As a type of peft that has the trained numbers themselves, loaded by peft, the outputs are equal within rounding."""
    import peft

    from lightning_pmss import export_peft

    if not isinstance(method, Ours):
        return round_trip(method, folder)
    torch.manual_seed(0)
    x, model = torch.randn(4, 32), method.adapt(toy(), ["up", "down"])
    export_peft(model, folder, native=True)
    found: Any = peft.PeftModel.from_pretrained(toy(), str(folder))  # type: ignore[arg-type]
    return torch.allclose(found(x), model(x), atol=1e-5)


def switched(method: Method, folder: Path) -> bool:
    """Two adapters on one base: each one's outputs are those it has alone."""
    x, expected = torch.randn(4, 32), []
    for number in range(2):
        model = method.adapt(toy(), ["up", "down"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(number + 1)
            expected.append(model(x))
        method.save(model, folder.with_name(f"adapter-{number}"))
    both = method.several(toy(), [folder.with_name(f"adapter-{number}") for number in range(2)])
    with torch.no_grad():
        return all(
            torch.allclose(method.switch(both, number)(x), y, atol=1e-5)
            for number, y in [*enumerate(expected), (0, expected[0])]
        )


def disabled_is_exact(method: Method, folder: Path) -> bool:
    """Switched off, a bfloat16 model answers as its base does, bit by bit."""
    base, x = toy(torch.bfloat16), torch.randn(4, 32, dtype=torch.bfloat16)
    plain = base(x)
    method.save(method.adapt(toy(torch.bfloat16), ["up", "down"]), folder)
    model = method.several(base, [folder])
    with method.disabled(model):
        return torch.equal(model(x), plain)


PROBES: dict[str, dict[str, Callable[[Method, Path], bool]]] = {
    "Layers": {
        "nn.Linear": layer(lambda: nn.Linear(32, 48), lambda: (torch.randn(4, 32),)),
        "Conv1D of transformers (GPT-2)": layer(lambda: Conv1D(48, 32), lambda: (torch.randn(4, 32),)),
        "nn.Embedding": layer(lambda: nn.Embedding(64, 32), lambda: (torch.arange(4),)),
        "nn.Conv2d": layer(lambda: nn.Conv2d(16, 16, 3), lambda: (torch.randn(1, 16, 8, 8),)),
        "nn.MultiheadAttention": attention,
        "fused experts of transformers (Mixtral)": fused_experts,
    },
    "Training": {
        "bfloat16 base": dtype(torch.bfloat16),
        "float64 base": dtype(torch.float64),
        "trained tensors are float32 on a bfloat16 base": trained_in_float32,
        "the layer's input is not kept for the backward pass": input_not_kept,
        "non-reentrant activation checkpointing": checkpointing,
        "`torch.compile(fullgraph=True)`": compiles_whole,
    },
    "Results": {
        "saved and loaded": round_trip,
        "merged weights give the same outputs": merge_is_equal,
        "unmerging a bfloat16 base is exact, bit by bit": unmerge_is_exact,
        "exact as a LoRA in peft": exact_lora,
        "exact as a type of its own in peft": own_type_of_peft,
    },
    "Several adapters": {
        "two on one base, switched": switched,
        "switched off: the bfloat16 base, bit by bit": disabled_is_exact,
    },
    "Refused, not ignored": {
        "a misspelt name among the targets": typo_refused,
        "an adapter of another base": other_base_refused,
        "an adapter file with a tensor missing": missing_tensor_refused,
        "NaN when merging": nan_refused_in_merge,
    },
}


def run(probe: Callable[[Method, Path], bool], method: Method) -> bool:
    """Whether a probe succeeds; whatever it raises counts as no."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                return bool(probe(method, Path(folder) / "adapter"))
            except Exception:
                return False


def page() -> str:
    """The page in Markdown."""
    version = importlib.metadata.version
    lines = [
        "# Tested capabilities",
        "",
        f"Made by `python -m benchmarks.capabilities` with peft {version('peft')} and torch {version('torch').split('+')[0]}"
        ' on a CPU: each cell is a probe that was run on a toy model, and "-" means that it failed or raised. peft can do'
        " much that is not probed here (quantised bases of nine kinds, mixed batches of adapters, dozens of methods).",
        "",
        'The first columns are the methods of this library with their defaults, at rank 8; those of "peft" are peft\'s own.',
    ]
    for title, probes in PROBES.items():
        lines += ["", f"| {title} | {' | '.join(METHODS)} |", "|---|" + ":-:|" * len(METHODS)]
        for name, probe in probes.items():
            cells = ["yes" if run(probe, method) else "-" for method in METHODS.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="file to write; printed by default")
    options = parser.parse_args(arguments)
    text = page()
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Format an estimate as text: a column per method, a row per kind of memory, and whether it fits."""

from __future__ import annotations

from lightning_pmss.estimate.advice import Remedy
from lightning_pmss.estimate.memory import Estimate, MethodEstimate
from lightning_pmss.methods import METHODS
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.pmss.config import PMSSConfig

GB = 1e9
CARDS = (24, 40, 48, 80, 141)  # GB of common devices
LABELS = {
    "base": "base weights",
    "trained": "trained, and indices",
    "factors": "frozen factors",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "weights gathered temporarily",
    "buckets": "communication buckets",
    "activations": "activations",
    "logits": "logits and loss",
    "work": "recomputed layer",
    "reserve": "reserve (not estimated)",
}


def table(estimate: Estimate, gpu: float | None = None, remedies: list[Remedy] | None = None) -> str:
    """Format the whole report.

    Args:
        estimate: The estimate to show.
        gpu: Memory of one device in bytes; None names the smallest common device that fits.
        remedies: Changes with which the run's method fits; None omits this section.
    """
    run = estimate.run
    checkpointing = "with" if run.gradient_checkpointing else "without"
    where = "1 device" if run.world == 1 else f"{run.world} devices"
    where += f" on {run.nodes} nodes" if run.nodes > 1 else ""
    kept = estimate.dtype if run.quantisation is None else f"{run.quantisation} ({estimate.dtype} beside it)"
    lines = [
        f"{estimate.architecture}, {estimate.parameters:,} parameters in {kept}; {run.strategy} on {where},"
        f" precision {run.precision}, {run.optimizer}",
        f"{run.micro_batch} x {run.sequence_length} tokens per device and pass, {checkpointing} gradient checkpointing;"
        f" {run.config.label()}{_options(run.config)}",
        "",
    ]
    methods = list(estimate.methods.values())
    rows = [["GB (10^9 bytes) per device", *(_title(m) for m in methods)]]
    rows += [[LABELS[name], *(_gb(m.columns[name]) for m in methods)] for name in LABELS if _any(methods, name)]
    rows.append(["total", *(_gb(m.total) for m in methods)])
    if all(m.activations_other is not None for m in methods):
        other = "without" if run.gradient_checkpointing else "with"
        label = f"total {other} checkpointing"
        rows.append([label, *(_gb(_other_total(m)) for m in methods)])
    rows.append(["host memory per node", *(_gb(m.host) for m in methods)])
    rows.append(["checkpoint", *(_gb(m.checkpoint) for m in methods)])
    rows.append(["adapter file (full: model)", *(_gb(m.adapter) for m in methods)])
    rows.append(["trained parameters", *(f"{m.trainable:,}" for m in methods)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "-" * len(text[0])
    total = 1 + next(i for i, row in enumerate(rows[1:]) if row[0] == "total")
    lines += [text[0], rule, *text[1:total], rule, *text[total:], ""]
    lines += [_verdict(m, gpu) for m in methods]
    if remedies is not None:
        name = run.config.label()
        lines.append(
            f"{name} fits with one of these changes:" if remedies else f"none of the changes tried makes {name} fit"
        )
        lines += [f"  {r.change}: {_gb(r.total)} GB" for r in remedies]
    return "\n".join(lines)


def _options(config: AdapterConfig) -> str:
    """Those that change the memory."""
    if isinstance(config, PMSSConfig):
        return f", columns={config.columns}, memory={config.memory}, coordinates={config.coordinates}"
    return f", {config.summary()}" if config.summary() else ""


def _label(method: str) -> str:
    return "full fine-tuning" if method == "full" else METHODS[method].config_class.label()


def _title(method: MethodEstimate) -> str:
    name = "full" if method.method == "full" else _label(method.method)
    return name + ("" if method.rank is None else f" r={method.rank}")


def _other_total(method: MethodEstimate) -> int:
    dynamic = method.activations + method.logits + method.work
    return method.total - dynamic + (method.activations_other or 0)


def _verdict(method: MethodEstimate, gpu: float | None) -> str:
    name = _label(method.method)
    if gpu is None:
        enough = [card for card in CARDS if card * GB >= method.total]
        return f"{name}: " + (f"fits devices of {enough[0]} GB" if enough else f"fits none of up to {CARDS[-1]} GB")
    left = gpu - method.total
    if left >= 0:
        return f"{name}: fits {gpu / GB:g} GB, {_gb(left)} GB of head room"
    return f"{name}: does not fit {gpu / GB:g} GB, {_gb(-left)} GB too much"


def _any(methods: list[MethodEstimate], name: str) -> bool:
    return any(method.columns[name] for method in methods)


def _gb(size: float) -> str:
    if size == 0:
        return "-"
    return f"{size / GB:.2f}" if size >= 0.005 * GB else f"{size / GB:.4f}"

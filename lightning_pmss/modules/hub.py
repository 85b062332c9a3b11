"""Load a causal language model and its tokenizer, with errors that say what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_pmss.files.hub_cache import snapshot_of
from lightning_pmss.modules.quantisation import quantised_options


def load_causal_lm(
    name_or_path: str,
    *,
    dtype: str = "auto",
    quantisation: str | None = None,
    strategy: Strategy | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Load a causal language model from a folder or the model hub.

    Args:
        name_or_path: Folder, or hub id such as ``org/name``.
        dtype: ``"auto"`` (the checkpoint's own), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        quantisation: None or one of `QUANTISATIONS`.
        strategy: Strategy of the Trainer, if there is one; only for `quantisation`.
        **options: Passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not have the model or is not reachable.
        ValueError: If `dtype` is unknown, or `quantisation` does not go with the strategy.
        ImportError: If `quantisation` needs a library that is not installed.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not known; choose 'auto', 'float32', 'bfloat16' or 'float16'.")
    if quantisation is not None:
        _load(AutoConfig, "model", name_or_path, **options)  # a wrong name is reported here
        options |= quantised_options(quantisation, name_or_path, dtype, strategy, **options)
    model = _load(AutoModelForCausalLM, "model", name_or_path, dtype=dtype, **options)
    snapshot = None if Path(name_or_path).expanduser().is_dir() else snapshot_of(name_or_path, options.get("revision"))
    if snapshot is not None:
        model.config._commit_hash = snapshot.commit  # transformers knew it up to its version 4
    return model


def load_tokenizer(name_or_path: str, **options: Any) -> Any:
    """Load the tokenizer of a model; one that has no pad token pads with its end-of-sequence token.

    Raises:
        FileNotFoundError: As `load_causal_lm`.
        ValueError: If the tokenizer has neither a pad nor an end-of-sequence token.
    """
    tokenizer = _load(AutoTokenizer, "tokenizer", name_or_path, **options)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {name_or_path!r} has neither a pad nor an eos token; give it one and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def announce_zero3(strategy: DeepSpeedStrategy) -> Any:
    """Tell transformers of ZeRO-3 before it loads; else the partitioned parameters look empty to it.

    Returns:
        An object that must be kept: transformers holds a weak reference to it.
    """
    from transformers.integrations import HfDeepSpeedConfig

    assert isinstance(strategy.config, dict)
    strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)
    return HfDeepSpeedConfig(strategy.config)


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant."""
    # Reentrant checkpointing would silently train nothing in a block whose input requires no grad.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # the name before it was changed within transformers 5
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _load(loader: Any, what: str, name_or_path: str, **options: Any) -> Any:
    folder = Path(name_or_path).expanduser()
    is_folder = folder.is_dir()
    try:
        return loader.from_pretrained(str(folder) if is_folder else name_or_path, **options)
    except (OSError, ValueError) as error:
        # transformers answers a mistyped folder with a page about hub tokens, or with the hub's naming rules, and a
        # folder without a tokenizer with advice to install others.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_folder:
            problem = f"The folder {name_or_path!r} holds no {what} that can be loaded ({reason})"
            remedy = "It needs config.json, the weights and the tokenizer, as `save_pretrained` writes them"
        else:
            problem = f"There is no folder {name_or_path!r}, and the model hub gave no {what} of that name ({reason})"
            remedy = (
                "Type the path of a model folder (`fit` has it in --model.model_name_or_path), or the id of a model on the hub "
                "while it is reachable (HF_HUB_OFFLINE not set). `python examples/smollm2.py` makes "
                "models/SmolLM2-135M-Instruct without the hub"
            )
        raise FileNotFoundError(f"{problem}. {remedy}.") from error

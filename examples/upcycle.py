"""Make a mixture of experts of a small LLaMA model: each expert begins as a copy of the dense feed-forward layer.

    python examples/upcycle.py [--model models/SmolLM2-135M-Instruct] [--experts 4] [--active 2] [--output FOLDER]
    python examples/quickstart.py --model.model_name_or_path models/SmolLM2-4x135M --pmss.rank 64

This is sparse upcycling (Komatsuzaki et al., arXiv 2212.05055). The experts are equal and their routing weights add up to 1, so
the mixture computes what the dense model does; the router is drawn at random. Adapters then train each expert in its own way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.store.atomic import atomic_folder
from lightning_pmss.store.kinds import BESIDE_WEIGHTS, SHARDS, FolderKind

COPY = FolderKind("an upcycled model", "config.json", (*SHARDS, *BESIDE_WEIGHTS))


def upcycled(dense: Any, experts: int, active: int) -> nn.Module:
    """Return a Mixtral with the tensors of a LLaMA.

    Args:
        dense: A ``LlamaForCausalLM``.
        experts: Experts of each layer.
        active: Experts that a token is given to.

    Raises:
        ValueError: The model is no LLaMA, has biases, or cannot have so many active experts.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = dense.config
    if config.model_type != "llama" or config.mlp_bias or config.attention_bias:
        raise ValueError(f"a {config.model_type} model cannot be upcycled here; give a LLaMA without biases.")
    if not 1 <= active <= experts:
        raise ValueError(f"--active {active}: a token can have 1 to {experts} of {experts} experts.")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    kept = {name: getattr(config, name) for name in names}
    sparse = MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=active)
    model: Any = MixtralForCausalLM(sparse).to(dense.dtype)
    old, new = dense.state_dict(), model.state_dict()
    new |= {name: old[name] for name in new if name in old}
    for i, layer in enumerate(dense.model.layers):
        fused = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        new[f"model.layers.{i}.mlp.experts.gate_up_proj"] = copies(fused, experts)
        new[f"model.layers.{i}.mlp.experts.down_proj"] = copies(layer.mlp.down_proj.weight, experts)
    model.load_state_dict(new)
    return model


def copies(weight: Tensor, experts: int) -> Tensor:
    """``[experts, out, in]``, each a copy of the weight."""
    return weight.detach().expand(experts, *weight.shape).clone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-4x135M"))
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--active", type=int, default=2)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not options.model.is_dir():
        print(f"error: no model in {str(options.model)!r}. Type: python examples/smollm2.py", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    try:
        if options.output.exists():
            raise FileExistsError(f"{str(options.output)!r} exists; give another --output, or remove it.")
        model: Any = upcycled(AutoModelForCausalLM.from_pretrained(options.model), options.experts, options.active)
        with atomic_folder(options.output, COPY) as scratch:
            model.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(options.model).save_pretrained(scratch)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output} is ready: {model.num_parameters() / 1e6:.0f} million parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())

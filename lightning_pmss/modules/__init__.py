"""LightningModules to train with; they know nothing of adapters."""

from lightning_pmss.modules.causal_lm import CausalLMModule

__all__ = ["CausalLMModule"]

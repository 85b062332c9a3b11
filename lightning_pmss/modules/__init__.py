"""LightningModules to train with; they know nothing of adapters."""

from lightning_pmss.modules.causal_lm import CausalLMModule
from lightning_pmss.modules.token_weighted import TokenWeighted

__all__ = ["CausalLMModule", "TokenWeighted"]

"""Estimate the memory of a run before it is started, from a model's ``config.json`` alone."""

from lightning_pmss.estimate.memory import Estimate, MethodEstimate, Run, estimate

__all__ = ["Estimate", "MethodEstimate", "Run", "estimate"]

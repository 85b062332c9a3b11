from .memory import Estimate, MethodEstimate, estimate
from .run import Run, ZeroSettings

__all__ = ["Estimate", "MethodEstimate", "Run", "ZeroSettings", "estimate"]

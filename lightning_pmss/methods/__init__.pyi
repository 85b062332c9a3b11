from .registry import METHODS, method_of

__all__ = ["METHODS", "method_of"]

"""Inspect adapters, and show a finished run as one self-contained page: ``python -m lightning_pmss report RUN_DIR``."""

from lightning_pmss.inspect.page import write_report
from lightning_pmss.inspect.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]

"""The methods, and those of their options that choose other mathematics, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lightning_pmss import METHODS, AdapterConfig

CASES: dict[str, Callable[..., AdapterConfig]] = {
    " ".join([name, *(f"{option}={value}" for option, value in options.items())]): partial(
        method.config_class, **options
    )
    for name, method in METHODS.items()
    for options in ({}, *method.variants)
}

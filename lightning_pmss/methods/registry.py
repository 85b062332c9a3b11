"""All methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_pmss.methods.bat import BAT
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.curlora import CURLoRA
from lightning_pmss.methods.hira import HiRA
from lightning_pmss.methods.hut import HUT
from lightning_pmss.methods.lora import LoRA
from lightning_pmss.methods.lora_xs import LoRAXS
from lightning_pmss.methods.method import Method
from lightning_pmss.methods.miss import MiSS
from lightning_pmss.methods.pmss.method import PMSS

METHODS: Mapping[str, type[Method[Any]]] = {
    m.config_class.method: m for m in (PMSS, LoRA, MiSS, BAT, LoRAXS, HiRA, HUT, CURLoRA)
}
"""The methods by name. A method that is added here passes tests/methods/test_contract.py as it is."""


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a configuration is for."""
    return METHODS[config.method].of(config)

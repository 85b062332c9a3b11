"""Data modules for instruction tuning, and the samplers and the resumable loader under them."""

from lightning_pmss.datamodules.arithmetic import ArithmeticDataModule
from lightning_pmss.datamodules.base import TokenisedDataModule
from lightning_pmss.datamodules.collate import InstructionCollator
from lightning_pmss.datamodules.commonsense import CommonsenseDataModule
from lightning_pmss.datamodules.conversations.module import ChatDataModule
from lightning_pmss.datamodules.drop import DROPDataModule
from lightning_pmss.datamodules.gsm8k import GSM8KDataModule
from lightning_pmss.datamodules.instruction import InstructionDataModule
from lightning_pmss.datamodules.packing import PackingReport
from lightning_pmss.datamodules.prompts import Example, PromptStyle
from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
)

__all__ = [
    "ArithmeticDataModule",
    "ChatDataModule",
    "CommonsenseDataModule",
    "DROPDataModule",
    "Example",
    "GSM8KDataModule",
    "InstructionCollator",
    "InstructionDataModule",
    "LengthGroupedSampler",
    "PackingReport",
    "PromptStyle",
    "ResumableDataLoader",
    "ShardSampler",
    "TokenisedDataModule",
    "TrainerProgress",
]

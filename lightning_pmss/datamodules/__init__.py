"""Data modules for instruction tuning, and the samplers and the resumable loader under them."""

from lightning_pmss.datamodules.arithmetic import ArithmeticDataModule
from lightning_pmss.datamodules.gsm8k import GSM8KDataModule
from lightning_pmss.datamodules.instruction import Example, InstructionCollator, InstructionDataModule
from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
)

__all__ = [
    "ArithmeticDataModule",
    "Example",
    "GSM8KDataModule",
    "InstructionCollator",
    "InstructionDataModule",
    "LengthGroupedSampler",
    "ResumableDataLoader",
    "ShardSampler",
    "TrainerProgress",
]

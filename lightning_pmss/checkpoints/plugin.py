"""Write checkpoint files atomically, so that a kill cannot destroy the last one.

Lightning writes a checkpoint to the temporary folder, moves it, which copies it over the last one on another file system, and
never flushes it. This plugin writes beside the target, flushes, and renames.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from lightning_pmss.store.disk import atomic_file

# Files of Lightning, torch and DeepSpeed, one of which is in every checkpoint folder.
_OF_FOLDERS = ("meta.pt", ".metadata", "latest", "checkpoint")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's ``TorchCheckpointIO`` with atomic writing of local files.

    Files on other file systems (``s3://``, ...) are written by Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        refuse_other_folders(local)
        try:
            # FSDP and DeepSpeed leave a folder of the same name.
            with atomic_file(local, over_folder=True) as new, new.open("wb") as stream:
                torch.save(checkpoint, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides why its stream could not be written
                raise error.__context__ from error
            raise


def use_atomic_files(strategy: Strategy) -> None:
    """Replace a strategy's default checkpoint plugin by `AtomicCheckpointIO`.

    Plugins of the user stay; one that wraps the default, such as ``AsyncCheckpointIO``, wraps the atomic one.
    """
    plugin: Any = strategy._checkpoint_io
    if isinstance(plugin, _WrappingCheckpointIO):
        while isinstance(plugin.checkpoint_io, _WrappingCheckpointIO):
            plugin = plugin.checkpoint_io
        if plugin.checkpoint_io is None or type(plugin.checkpoint_io) is TorchCheckpointIO:
            plugin._checkpoint_io = AtomicCheckpointIO()  # the property would refuse a second one
    elif plugin is None or type(plugin) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def refuse_other_folders(path: Path) -> None:
    """Refuse to replace a folder that is not a checkpoint.

    Raises:
        IsADirectoryError: ``path`` is a folder with other files than those of FSDP or DeepSpeed.
    """
    if path.is_dir() and not is_checkpoint(path) and any(path.iterdir()):
        raise IsADirectoryError(
            f"{path} is a folder without a checkpoint, and a checkpoint would replace it. Move it away."
        )


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, or a folder that looks like a checkpoint of FSDP or DeepSpeed."""
    return path.is_file() or any((path / name).exists() for name in _OF_FOLDERS)


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """A path or ``file:`` URL as a path; None for a URL of another file system."""
    if get_protocol(str(path)) not in ("file", "local"):
        return None
    return Path(LocalFileSystem._strip_protocol(str(path)))

"""`Reloading`: a LightningModule whose ``load_from_checkpoint`` needs no arguments; given ones replace the stored."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _load as load_anywhere

from lightning_pmss.checkpoints.plugin import local_path
from lightning_pmss.checkpoints.reading import check_content, read_checkpoint
from lightning_pmss.layers.parts import clean_name, is_sharded
from lightning_pmss.messages import some

_PLAIN = (str, int, float, bool, type(None))


class Reloading(L.LightningModule):
    """Stores its constructor arguments in its checkpoints, for `load_from_checkpoint` alone.

    It does not use ``save_hyperparameters``: LightningCLI would let those of a checkpoint silently override options typed
    beside ``--ckpt_path``.

    Attributes:
        checkpoint_entry: Name of their entry in a checkpoint.
    """

    checkpoint_entry: ClassVar[str] = "made_with"
    _arguments: Mapping[str, Any] = MappingProxyType({})  # of a class that does not call `keep_arguments`

    def keep_arguments(self, given: Mapping[str, Any]) -> None:
        """Store the arguments; call it first in ``__init__`` with ``locals()``. Objects such as optimizers are not stored."""
        names = inspect.signature(type(self).__init__).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
        own = {name: value for name, value in given.items() if takes_all and not name.startswith("_") or name in names}
        kept = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in own.items()}
        self._arguments = {
            name: value
            for name, value in kept.items()
            if isinstance(value, _PLAIN) or isinstance(value, list) and all(isinstance(item, _PLAIN) for item in value)
        }

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load the module with the trained tensors of a checkpoint, for inference or further training.

        Its arguments are those of the checkpoint's module, unless they are given here. Objects are in no checkpoint: give an
        optimizer and a metric again if they are needed.

        Args:
            checkpoint_path: File, also a URL, or a folder of FSDP or DeepSpeed.
            map_location: As Lightning's, as the next three.
            hparams_file: A YAML file with arguments, in place of the checkpoint's.
            strict: Whether every key must fit.
            weights_only: False for a checkpoint with more than plain values and tensors, if it can be trusted.
            **kwargs: Arguments of the class.

        Raises:
            FileNotFoundError: There is no such checkpoint, or not the model that it names.
            ValueError: An argument that the class does not have, a damaged checkpoint, one of another base model, or one that
                does not have the arguments of its module.
        """
        parameters = inspect.signature(cls.__init__).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if not takes_all and (unknown := [name for name in kwargs if name not in parameters]):  # Lightning drops them
            raise ValueError(
                f"{cls.__name__} has no argument {some(unknown)}; it has {', '.join(list(parameters)[1:])}."
            )
        path = local_path(checkpoint_path)
        source: Any = checkpoint_path
        if path is None:
            content: Any = load_anywhere(str(checkpoint_path), map_location="cpu", weights_only=weights_only)
            check_content(content, f"the checkpoint {checkpoint_path}")
        else:
            content = read_checkpoint(path, weights_only=weights_only is not False)
            if path.is_dir():
                source = io.BytesIO()
                torch.save(content, source)
                source.seek(0)
        stored = content.get(cls.checkpoint_entry, {}) if hparams_file is None else {}
        if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
            raise ValueError(
                f"the checkpoint {checkpoint_path} is damaged: `{cls.checkpoint_entry}`. Use an earlier one."
            )
        needed = [
            name
            for name, parameter in parameters.items()
            if name != "self"
            and parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if hparams_file is None and (missing := [name for name in needed if name not in stored | kwargs]):
            raise ValueError(
                f"the checkpoint {checkpoint_path} does not say what its module was made with; give {missing[0]}= too."
            )
        return super().load_from_checkpoint(
            source, map_location, hparams_file, strict, weights_only, **(stored | kwargs)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the arguments for `load_from_checkpoint`."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.checkpoint_entry] = dict(self._arguments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse tensors for which this module has no place, in one sentence.

        Raises:
            ValueError: A callback that changes the model made the checkpoint, and none has changed this one.
        """
        super().on_load_checkpoint(checkpoint)
        if is_sharded(self):
            return
        own = {clean_name(key) for key in self.state_dict()}
        if strange := [key for key in checkpoint.get("state_dict", {}) if clean_name(key) not in own]:
            raise ValueError(
                f"the checkpoint holds {some(strange)}, for which this module has no place: a callback has changed the model"
                " that it is of. Give the Trainer that callback (PMSSCallback with the options of the run), or write the"
                " adapter by `python -m lightning_pmss extract` and load that."
            )

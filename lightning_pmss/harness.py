"""A model class for lm-evaluation-harness (the extra ``eval``): a base with an adapter of this library, or a merged folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAME = "lightning_pmss"
"""The harness's name of the class."""


def register() -> type:
    """Make the harness know the model class ``lightning_pmss``, and return the class; a second call changes nothing.

    Its arguments are those of the harness's own class ``hf``, without the adapters of other libraries, and ``adapter``: an
    adapter folder of any method.

    Raises:
        ModuleNotFoundError: The harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "lm-evaluation-harness is not installed: pip install -c constraints.txt -e '.[eval]'.", name="lm_eval"
        )
    return _model_class()


def run(args: Sequence[str]) -> None:
    """Run the harness's own command line, with our model class known to it.

    Args:
        args: What follows ``lm_eval``.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *args]  # it reads nothing else
    try:
        cli_evaluate()
    finally:
        sys.argv = before


@functools.cache
def _model_class() -> type:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    from lightning_pmss.files.adapter import load_adapter, read_adapter

    @register_model(NAME)
    class AdaptedLM(HFLM):
        """The harness's class for models of transformers, with an adapter."""

        def __init__(self, pretrained: str, adapter: str | None = None, **options: Any) -> None:
            if others := [name for name in ("peft", "delta") if options.get(name)]:
                raise ValueError(f"{others[0]}= is for the model class hf; here give adapter=DIR, or merge first.")
            self._adapter = None if adapter is None else Path(adapter).expanduser()
            if self._adapter is not None:
                read_adapter(self._adapter)  # before the model, which takes longer
                if (self._adapter / "tokenizer_config.json").is_file():  # it was trained with added tokens
                    options.setdefault("tokenizer", str(self._adapter))
            super().__init__(pretrained=pretrained, **options)

        def _create_model(self, *args: Any, **options: Any) -> None:
            super()._create_model(*args, **options)
            if self._adapter is None:
                return
            model: Any = self._model
            if len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(self.tokenizer))
            load_adapter(model, self._adapter)

    return AdaptedLM

"""The tasks of `language` with the loss in chunks: ``python -m tests.distributed.chunked JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed import language
from tests.leaving import leave


class Chunked(language.Recording):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, loss_chunk=7, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    language.Recording = Chunked  # type: ignore[misc]
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        language.run(given)
    leave()

"""`merge` and `select` killed at any moment: what was there stays, the same command finishes, and nothing is left over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss.files import merge_files, save_adapter
from lightning_pmss.files.select import select_files
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.store.disk import clean_folder
from tests.killing import LIMIT, Moment, files, forks, moments, run

pytestmark = LIMIT


def _killed(work: Callable[[], Any], runs: Path, earlier: Path, output: Path, seed: int) -> None:
    """Kill the work at several moments; each begins with the earlier output in its place.

    Args:
        work: Writes `output`, which may be overwritten.
        runs: The folder that it writes into; holds nothing but the output.
        earlier: A copy of the earlier output.
        output: A file or a folder.
        seed: Of the moments.
    """

    def prepare() -> None:
        shutil.rmtree(runs)
        runs.mkdir()
        shutil.copytree(earlier, output) if earlier.is_dir() else shutil.copy(earlier, output)

    def present() -> Any:
        return files(output) if output.is_dir() else output.read_bytes()

    log = runs.with_name("log")
    before = files(earlier) if earlier.is_dir() else earlier.read_bytes()
    prepare()
    ending = run(work, runs, log)
    assert ending.status == 0, ending.output
    whole, names = present(), sorted(path.name for path in runs.iterdir())
    assert whole != before
    assert names == [output.name]
    chosen = [*moments(ending.changes, seed), Moment(ending.changes)]
    for moment in chosen:
        prepare()
        told = f"{moment} of {ending.changes}"
        killed = run(work, runs, log, moment)
        assert killed.status in (-9, 0), f"{told}: {killed.output}"  # a delay may reach beyond the end
        clean_folder(runs)  # as the next command does: a kill between two renames leaves the earlier folder aside
        assert present() in (before, whole), f"{told}: neither the earlier nor the new output is complete"
        again = run(work, runs, log)
        assert again.status == 0, f"{told}: {again.output}"
        assert present() == whole, told
        assert sorted(path.name for path in runs.iterdir()) == names, told


@forks
def test_merge(sharded_llama: str, tmp_path: Path, train: Callable[..., nn.Module]) -> None:
    def adapter(name: str, seed: int) -> Path:
        model = AutoModelForCausalLM.from_pretrained(sharded_llama, dtype=torch.bfloat16)
        return save_adapter(train(model, seed=seed), tmp_path / name)

    first, second = adapter("first", 1), adapter("second", 2)
    output = tmp_path / "runs" / "merged"
    merge_files(sharded_llama, first, tmp_path / "earlier", progress=False)
    output.parent.mkdir()

    def work() -> None:
        merge_files(sharded_llama, second, output, overwrite=True, progress=False)

    _killed(work, output.parent, tmp_path / "earlier", output, seed=1)


@forks
def test_select(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "s.safetensors"
    output.parent.mkdir()
    select_files(tiny_llama, tmp_path / "earlier", PMSSConfig(rank=4), progress=False)

    def work() -> None:
        select_files(tiny_llama, output, PMSSConfig(rank=8), workers=2, overwrite=True, progress=False)

    _killed(work, output.parent, tmp_path / "earlier", output, seed=2)

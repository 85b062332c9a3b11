"""A selection that was killed goes on where it stopped, and only with the same options and the same base."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pmss.files.select import select_files
from lightning_pmss.methods.pmss import method as module
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.skeleton import read_skeleton
from tests import forks

CONFIG = PMSSConfig(rank=8)
MATRICES = 14

# Stops for good inside its 6th matrix, with 5 kept: what a kill or a power cut finds.
_KILLED = """
import sys, time
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.files import select
from lightning_pmss.methods.pmss import method as module
whole, calls = module.select_skeleton, []
def stuck(*args, **kwargs):
    calls.append(kwargs["name"])
    if len(calls) > 5:
        print("stuck", flush=True)
        time.sleep(600)
    return whole(*args, **kwargs)
module.select_skeleton = stuck
select.select_files(*sys.argv[1:], PMSSConfig(rank=8), workers=1, progress=False)
"""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "s.safetensors"


@pytest.fixture
def partial(output: Path) -> Path:
    return output.with_name("s.safetensors.partial")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were selected from."""
    names: list[str] = []
    whole = module.select_skeleton

    def counted(*args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["name"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "select_skeleton", counted)
    return names


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch, output: Path) -> Callable[..., None]:
    """Run until `count` matrices are kept, then be interrupted."""

    def interrupted(model: str | Path, count: int = 4, config: PMSSConfig = CONFIG) -> None:
        whole, done = module.projection_residual, []

        def stop(*args: Any) -> float:
            if len(done) >= count:
                raise KeyboardInterrupt
            done.append(1)
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "projection_residual", stop)
            with pytest.raises(KeyboardInterrupt):
                select_files(model, output, config, workers=1, progress=False)
        assert not output.exists()

    return interrupted


def fresh(model: str | Path, tmp_path: Path, config: PMSSConfig = CONFIG) -> bytes:
    """The file of a run that was never stopped."""
    select_files(model, tmp_path / "fresh" / "s.safetensors", config, progress=False)
    return (tmp_path / "fresh" / "s.safetensors").read_bytes()


def test_after_a_kill(tiny_llama: str, tmp_path: Path, output: Path, partial: Path, calls: list[str]) -> None:
    with forks.Program(["-c", _KILLED, tiny_llama, output], stream=True) as child:
        assert child.stdout.readline() == "stuck\n"
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    assert child.returncode == -signal.SIGKILL
    assert not output.exists()
    assert len(list(partial.glob("*.safetensors"))) == 5

    report = select_files(tiny_llama, output, CONFIG, progress=False)
    assert report.resumed == 5
    assert len(calls) == len(set(calls)) == MATRICES - 5
    assert not partial.exists()
    assert output.read_bytes() == fresh(tiny_llama, tmp_path)


def test_after_an_interrupt(
    tiny_llama: str, tmp_path: Path, output: Path, interrupt: Callable[..., None], calls: list[str]
) -> None:
    interrupt(tiny_llama, 4)
    interrupt(tiny_llama, 3)
    calls.clear()
    report = select_files(tiny_llama, output, CONFIG, progress=False)
    assert (report.resumed, report.selected, len(calls)) == (7, MATRICES - 7, MATRICES - 7)
    assert "7 of them by an earlier run" in str(report)
    assert output.read_bytes() == fresh(tiny_llama, tmp_path)


def test_damaged_pieces_are_made_again(
    tiny_llama: str, tmp_path: Path, output: Path, partial: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(tiny_llama, 4)
    first, second, *_ = sorted(partial.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    second.write_bytes(b"")
    half = partial / ".model.layers.0.mlp.up_proj.safetensors.pmss-tmp-0123456789ab"
    half.mkdir()
    (half / "new").write_bytes(b"half")
    assert select_files(tiny_llama, output, CONFIG, progress=False).resumed == 2
    assert output.read_bytes() == fresh(tiny_llama, tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 4),
        ("selection", "norm"),
        ("row_mode", "nested"),
        ("oversample", 1),
        ("seed", 1),
        ("coordinates", "raw"),
    ],
)
def test_other_options_are_refused(
    tiny_llama: str,
    tmp_path: Path,
    output: Path,
    partial: Path,
    interrupt: Callable[..., None],
    calls: list[str],
    option: str,
    value: Any,
) -> None:
    interrupt(tiny_llama)
    kept = sorted(partial.iterdir())
    calls.clear()
    other = PMSSConfig(**{"rank": 8, option: value})
    with pytest.raises(ValueError, match=rf"other options \({option} .*, now {value!r}\).*--overwrite"):
        select_files(tiny_llama, output, other, progress=False)
    assert sorted(partial.iterdir()) == kept
    assert not calls
    report = select_files(tiny_llama, output, other, overwrite=True, progress=False)
    assert report.resumed == 0
    assert output.read_bytes() == fresh(tiny_llama, tmp_path, other)


def test_other_targets_and_ranks_of_some_keep_what_is_finished(
    tiny_llama: str, tmp_path: Path, output: Path, partial: Path, interrupt: Callable[..., None]
) -> None:
    """So a layer that is refused after an hour can be excluded, or given a smaller rank, without losing the hour."""
    interrupt(tiny_llama, 10)
    done = [path.stem for path in partial.glob("*.safetensors")]
    excluded, smaller = done[0], done[1]
    other = PMSSConfig(rank=8, exclude_modules=[excluded], rank_pattern={smaller: 5})
    report = select_files(tiny_llama, output, other, progress=False)
    assert report.resumed == 8
    layers = read_skeleton(output).layers
    assert excluded not in layers
    assert len(layers[smaller].tensors["rows"]) == 5
    assert output.read_bytes() == fresh(tiny_llama, tmp_path, other)


def test_a_copied_base_goes_on(tiny_llama: str, tmp_path: Path, output: Path, interrupt: Callable[..., None]) -> None:
    interrupt(tiny_llama)
    copied = tmp_path / Path(tiny_llama).name
    shutil.copytree(tiny_llama, copied, copy_function=shutil.copyfile)  # without its times
    assert select_files(copied, output, CONFIG, progress=False).resumed == 4
    assert output.read_bytes() == fresh(tiny_llama, tmp_path)


def test_another_base_is_refused(
    tiny_llama: str, tmp_path: Path, output: Path, partial: Path, interrupt: Callable[..., None], calls: list[str]
) -> None:
    interrupt(tiny_llama)
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    for value in tensors.values():
        value.mul_(1.01)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    calls.clear()
    for _ in range(2):  # refusing must not make it acceptable
        with pytest.raises(ValueError, match=r"unfinished selection from another base.*--overwrite"):
            select_files(other, output, CONFIG, progress=False)
    assert not calls
    assert select_files(other, output, CONFIG, overwrite=True, progress=False).resumed == 0
    assert output.read_bytes() == fresh(other, tmp_path)


def test_a_folder_of_others_is_left_alone(tiny_llama: str, output: Path, partial: Path) -> None:
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"contains something else \(thesis\.txt\)"):
            select_files(tiny_llama, output, CONFIG, overwrite=overwrite, progress=False)
    assert (partial / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["text", "weights", "link", "folder"])
def test_unfinished_work_that_claims_files_of_others(
    tiny_llama: str, output: Path, partial: Path, interrupt: Callable[..., None], kind: str
) -> None:
    """Finished matrices lie in the folder; their files are recognised by name and content, and all else is refused."""
    interrupt(tiny_llama, 4)
    mine = output.parent / "mine"
    save_file({"w": torch.ones(2)}, mine)
    name = {"text": "thesis.txt", "folder": "kept"}.get(kind, "model.safetensors")
    if kind == "folder":
        (partial / name).mkdir()
    elif kind == "link":
        (partial / name).symlink_to(next(partial.glob("*.safetensors")))
    else:
        shutil.copy(mine, partial / name)
    before = sorted(partial.iterdir())
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=rf"contains something else \({name}\)"):
            select_files(tiny_llama, output, CONFIG, overwrite=overwrite, progress=False)
    assert sorted(partial.iterdir()) == before
    (partial / name).rmdir() if kind == "folder" else (partial / name).unlink()
    assert select_files(tiny_llama, output, CONFIG, progress=False).resumed == 4


def test_a_link_in_the_place_of_the_side_folder(tiny_llama: str, tmp_path: Path, output: Path, partial: Path) -> None:
    (tmp_path / "thesis").mkdir()
    partial.parent.mkdir()
    partial.symlink_to(tmp_path / "thesis")
    with pytest.raises(FileExistsError, match="the folder for unfinished work, is a link"):
        select_files(tiny_llama, output, CONFIG, progress=False)
    assert not list((tmp_path / "thesis").iterdir())


@pytest.mark.parametrize("about", ["{}", "[]", "[" * 5000, '{"rank": 8, "layer": {"shape": "ab"}}'])
def test_a_piece_that_says_nonsense_is_made_again(
    tiny_llama: str, tmp_path: Path, output: Path, partial: Path, interrupt: Callable[..., None], about: str
) -> None:
    interrupt(tiny_llama, 4)
    piece = min(partial.glob("*.safetensors"))
    save_file(load_file(piece), piece, {"piece": about})
    assert select_files(tiny_llama, output, CONFIG, progress=False).resumed == 3
    assert output.read_bytes() == fresh(tiny_llama, tmp_path)


def test_two_runs_to_one_output(tiny_llama: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.projection_residual

    def meddling(weight: torch.Tensor, cols: torch.Tensor) -> float:
        with pytest.raises(FileExistsError, match="another run is writing"):
            select_files(tiny_llama, output, CONFIG, progress=False)
        return whole(weight, cols)

    monkeypatch.setattr(module, "projection_residual", meddling)
    assert select_files(tiny_llama, output, CONFIG, workers=1, progress=False).selected == MATRICES


def test_what_appears_at_the_output_meanwhile_is_kept(
    tiny_llama: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.projection_residual

    def meddling(weight: torch.Tensor, cols: torch.Tensor) -> float:
        output.write_text("mine")
        return whole(weight, cols)

    for overwrite in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(module, "projection_residual", meddling)
            with pytest.raises(FileExistsError, match=r"is not a skeleton file|exists. To replace it"):
                select_files(tiny_llama, output, CONFIG, overwrite=overwrite, progress=False)
        assert output.read_text() == "mine"
        output.unlink()
        assert select_files(tiny_llama, output, CONFIG, progress=False).resumed == MATRICES
        output.unlink()


def test_a_full_disk_keeps_what_is_finished(
    tiny_llama: str, output: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == output:
            raise OSError(28, "No space left on device", str(target))
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            select_files(tiny_llama, output, CONFIG, progress=False)
    assert not output.exists()
    assert select_files(tiny_llama, output, CONFIG, progress=False).resumed == MATRICES
    assert not partial.exists()

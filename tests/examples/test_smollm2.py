"""The script that makes a folder of SmolLM2: only its own copies are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import smollm2


@pytest.fixture(autouse=True)
def _no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "write_model", write)


def test_a_copy_is_made_once_and_replaced_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = smollm2.make_folder(tmp_path / "models" / "m")
    assert smollm2.is_complete(folder)
    smollm2.make_folder(folder)
    assert "nothing to do" in capsys.readouterr().out
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(FileExistsError, match="is no complete copy"):
        smollm2.make_folder(folder)
    assert smollm2.is_complete(smollm2.make_folder(folder, overwrite=True))
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("stamp", [None, '{"weight_bytes": 0}', "[]", "["])
def test_a_folder_of_others_is_never_replaced(tmp_path: Path, stamp: str | None) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if stamp is not None:
        (folder / smollm2.STAMP).write_text(stamp)
    with pytest.raises(FileExistsError, match=r"did not write \(.*thesis\.txt"):
        smollm2.make_folder(folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"

"""What may be replaced: a folder of the same kind that holds nothing else, whatever its manifest says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.store.atomic import check_target, remove_folder
from lightning_pmss.store.kinds import ADAPTER, KINDS, LORA, MERGED, FolderKind, files_below
from tests.killing import files

# Files of each kind, as the library writes them.
OURS = {
    ADAPTER: ["README.md", "adapter_model.safetensors", "adapter_config.json"],
    LORA: ["README.md", "adapter_config.json", "adapter_model.safetensors", "export_report.json"],
    MERGED: [
        "additional_chat_templates/tools.jinja", "config.json", "merges.txt", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "modeling_own.py", "README.md",
        "tokenizer.model", "vocab.json", "merge_report.json",
    ],
}  # fmt: skip


def make(folder: Path, kind: FolderKind, **manifest: Any) -> Path:
    for name in OURS[kind]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    (folder / kind.manifest).write_text(
        json.dumps({"written_by": "lightning-pmss", "files": files_below(folder)} | manifest)
    )
    return folder


def refused(folder: Path, kind: FolderKind, message: str) -> None:
    """By both, and nothing is touched."""
    before = files(folder)
    with pytest.raises(FileExistsError, match=message):
        check_target(folder, kind, overwrite=True)
    with pytest.raises(FileExistsError, match=message):
        remove_folder(folder, kind)
    assert files(folder) == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_own_folders_are_replaced_and_removed_whole(tmp_path: Path, kind: FolderKind) -> None:
    folder = make(tmp_path / "out", kind)
    (folder / ".DS_Store").touch()
    check_target(folder, kind, overwrite=True)
    remove_folder(folder, kind)
    assert not folder.exists()


@pytest.mark.parametrize("there", KINDS, ids=lambda kind: kind.what)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_another_kind_is_never_replaced(tmp_path: Path, there: FolderKind, kind: FolderKind) -> None:
    if there is kind:
        return
    folder = make(tmp_path / "out", there)
    refused(folder, kind, f"holds {there.what}, and {kind.what} replaces only {kind.what}. Name another folder")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ADAPTER, "thesis.txt"),
        (ADAPTER, "sub/README.md"),
        (ADAPTER, "config.json"),
        (MERGED, "thesis.txt"),
        (MERGED, "thesis.safetensors"),
        (MERGED, "runs/config.json"),
        (MERGED, "additional_chat_templates/thesis.txt"),
        (MERGED, "additional_chat_templates/deep/x.jinja"),
        (MERGED, "Merge_Report.json"),
        (MERGED, "vocab\n.json"),
        (LORA, "config.json"),
    ],
)
def test_a_manifest_that_claims_other_names_is_not_believed(tmp_path: Path, kind: FolderKind, name: str) -> None:
    folder = make(tmp_path / "out", kind)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    make(folder, kind)  # whose manifest lists it, too
    refused(folder, kind, "holds files that lightning-pmss did not write")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "train.py"])
def test_a_name_of_ours_that_the_manifest_lacks_is_somebody_else_s(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "out", MERGED, files=["config.json"])
    (folder / name).write_text("mine")
    refused(folder, MERGED, "did not write")


@pytest.mark.parametrize("manifest", ["{}", "[", '{"written_by": "lightning-pmss"}', "[" * 5000, "\xff", "[]", "null"])
def test_a_manifest_that_is_none_gives_no_right(tmp_path: Path, manifest: str) -> None:
    folder = make(tmp_path / "out", MERGED)
    (folder / "merge_report.json").write_text(manifest, encoding="latin-1")
    refused(folder, MERGED, "did not write")


@pytest.mark.parametrize("manifest", [{"files": {"a": 1}}, {"files": [1, None, ["x"]]}, {"files": ["../thesis"]}])
def test_wrong_types_in_a_manifest(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "thesis").write_text("mine")
    folder = make(tmp_path / "out", MERGED, **manifest)
    refused(folder, MERGED, "did not write")
    assert (tmp_path / "thesis").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "additional_chat_templates", "merge_report.json"])
@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "broken link"])
def test_links_and_pipes_are_never_ours(tmp_path: Path, name: str, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tools.jinja").write_text("mine")
    folder = make(tmp_path / "out", MERGED, files=[*OURS[MERGED], "additional_chat_templates"])
    place = folder / name
    if place.is_dir():
        (place / "tools.jinja").unlink()
        place.rmdir()
    else:
        place.rename(outside / name)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        target = {"link to a file": outside / "tools.jinja", "link to a folder": outside}.get(kind, tmp_path / "none")
        place.symlink_to(outside / name if name == "merge_report.json" and kind == "link to a file" else target)
    with pytest.raises(FileExistsError, match="did not write"):
        check_target(folder, MERGED, overwrite=True)
    with pytest.raises(FileExistsError, match="did not write"):
        remove_folder(folder, MERGED)
    assert (outside / "tools.jinja").read_text() == "mine"
    assert os.path.lexists(place)


def test_a_hard_link_loses_its_name_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", ADAPTER)
    os.link(folder / "README.md", tmp_path / "kept")
    remove_folder(folder, ADAPTER)
    assert (tmp_path / "kept").read_text() == "ours"


def test_file_in_place_of_a_folder_and_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="is a file, and a folder"):
        check_target(tmp_path / "out", ADAPTER, overwrite=True)
    (tmp_path / "disk").mkdir()
    check_target(tmp_path / "disk", ADAPTER, overwrite=False)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(FileExistsError, match="is a mount point, which cannot be replaced; name a folder in it"):
        check_target(tmp_path / "disk", ADAPTER, overwrite=False)


def test_a_name_with_a_line_break_does_not_break_the_message(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", ADAPTER)
    (folder / "a\nb").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        check_target(folder, ADAPTER, overwrite=True)
    assert "(a\\nb)" in str(caught.value)
    assert "\n" not in str(caught.value)

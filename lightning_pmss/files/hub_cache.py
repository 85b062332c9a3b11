"""Snapshots in the model hub's cache on this machine, found without network access."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


class Snapshot(NamedTuple):
    """One commit of a repository in the cache.

    Attributes:
        name: The repository's id, ``org/name``.
        commit: 40 hex digits.
        folder: Folder of its files.
    """

    name: str
    commit: str
    folder: Path


def snapshot_at(folder: Path) -> Snapshot | None:
    """Return the snapshot that a folder is, by its path; None for any other folder."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return None if found is None else Snapshot(found["name"].replace("--", "/"), found["commit"], folder)


def snapshots(name: str) -> list[Snapshot]:
    """List all snapshots of a repository, first the one that its branch ``main`` points to."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    main = repository / "refs" / "main"
    first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    folders = repository.glob("snapshots/*")
    found = [snapshot for folder in folders if folder.is_dir() and (snapshot := snapshot_at(folder)) is not None]
    return sorted(found, key=lambda snapshot: (snapshot.commit != first, snapshot.commit))


def snapshot_of(name: str, revision: str | None = None) -> Snapshot | None:
    """Return the cached snapshot of a branch, tag or commit of a repository; None if it was never downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # not a repository's id, such as a deleted folder
        return None
    return snapshot_at(Path(file).parent) if isinstance(file, str) else None

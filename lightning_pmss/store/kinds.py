"""The kinds of folders that this library writes, and the files in them that may be replaced or removed.

Each folder has a manifest: a JSON file with ``"written_by": "lightning-pmss"`` and the list of the files. A file is replaced or
removed only if its name is one that the library writes into such a folder *and* the manifest lists it. A
folder may come from anywhere, so a manifest alone proves nothing, and a user may have put a file of such a name there. Links
and special files are never the library's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from lightning_pmss.store import read_json

WRITTEN_BY = "lightning-pmss"
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # written by file managers, safe to remove

SHARDS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")
GENERATION = "generation_config.json"
FURTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates/*.jinja")
# Files of tokenizers and processors.
TOKENIZER = (
    "tokenizer_config.json", "*processor_config.json", "preprocessor_config.json",
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab*.txt", "dict.txt", "merges.txt",
    "vocab.bpe", "bpe.codes", "normalizer.json", "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
    "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json",
    "*.jinja", "chat*/*.jinja", *FURTHER_TEMPLATES,
)  # fmt: skip
# Files of a model folder beside its weights that no training run, version control or download cache writes.
BESIDE_WEIGHTS = (
    "config.json", "*_config.json", "config_*.json", "modelcard.json", "modules.json",
    *TOKENIZER,
    "*.py", "custom_generate/*.py", "custom_generate/requirements.txt", "[0-9]_*/config.json",
    "README*", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class FolderKind:
    """One kind of folder.

    Attributes:
        what: Name for messages, such as "an adapter".
        manifest: Name of the file that lists the others.
        files: Patterns of the names that the library writes there; a pattern with a slash reaches into one folder.
        not_files: Patterns of names that are excepted.
    """

    what: str
    manifest: str
    files: tuple[str, ...]
    not_files: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether the library writes files of this name there; `name` is relative, with slashes."""
        return matches(name, self.files) and not matches(name, self.not_files)

    def listed(self, folder: Path) -> set[str]:
        """The files that the manifest lists, itself included; empty without a manifest of ours."""
        file = folder / self.manifest
        if file.is_symlink() or not file.is_file():
            return set()
        try:
            manifest = read_json(file, "")
        except (OSError, ValueError):
            return set()
        if not isinstance(manifest, dict) or manifest.get("written_by") != WRITTEN_BY:
            return set()
        files = manifest.get("files")
        if not isinstance(files, list):
            return set()
        return {self.manifest, *(name for name in files if isinstance(name, str))}

    def is_at(self, folder: Path) -> bool:
        """Whether there is a folder of this kind."""
        return bool(self.listed(folder))

    def own(self, folder: Path) -> list[str]:
        """The files that may be removed, the manifest last, so that a folder after a kill is still ours."""
        listed = self.listed(folder)
        found = [
            name
            for name, entry in entries(folder)
            if entry.is_file(follow_symlinks=False) and (is_litter(name) or name in listed and self.has(name))
        ]
        return sorted(found, key=lambda name: (name == self.manifest, name))


ADAPTER = FolderKind(
    "an adapter",
    "adapter_config.json",
    ("README.md", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER, GENERATION),
)
LORA = FolderKind("an exported LoRA", "export_report.json", (*ADAPTER.files, "export_report.json"))
MERGED = FolderKind(
    "a merged model",
    "merge_report.json",
    (
        *SHARDS, "model.safetensors.index.json", "other_modules.safetensors", "merge_report.json", *BESIDE_WEIGHTS,
    ),
    (ADAPTER.manifest,),
)  # fmt: skip
KINDS = (ADAPTER, LORA, MERGED)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a relative name fits one of the patterns part by part; names of unprintable characters fit none."""
    parts = name.split("/")
    return name.isprintable() and any(
        len(parts) == len(wanted := pattern.split("/")) and all(map(fnmatchcase, parts, wanted)) for pattern in patterns
    )


def files_below(folder: Path) -> list[str]:
    """The files of a folder that was just written, as sorted relative names with slashes, for its manifest."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def entries(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files, links and other entries by relative name; a folder that no pattern reaches into is one entry."""
    inner = {PurePosixPath(pattern).parts[0] for kind in KINDS for pattern in kind.files if "/" in pattern}
    with os.scandir(folder) as found:
        top = sorted(found, key=lambda entry: entry.name)
    for entry in top:
        if not entry.is_dir(follow_symlinks=False):
            yield entry.name, entry
        elif not any(fnmatchcase(entry.name, pattern) for pattern in inner):
            yield f"{entry.name}/", entry
        else:
            with os.scandir(entry) as below:
                yield from ((f"{entry.name}/{part.name}", part) for part in sorted(below, key=lambda part: part.name))


def is_litter(name: str) -> bool:
    """Whether a file manager left this file behind."""
    return name.rsplit("/", 1)[-1] in _LITTER

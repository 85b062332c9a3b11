"""Damage a file or folder at random, by a seed: bits, lengths, structure of JSON and CSV, kinds of files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# JSON texts that a value is replaced by. Python reads some that are no JSON.
VALUES = (
    "null", "true", "false", "0", "-1", "1", "3", "0.5", "1e-45", "1e300", "-1e39", "1e999", "NaN", "Infinity", "-Infinity",
    "1" + "0" * 39, "-" + "9" * 400, "9" * 5000, '""', '"x"', '"0"', '"$\\\\frac$"', '"a\\u0000b"', '"\\ud800"', '"../.."',
    '"/dev/zero"', '"\\n"', '"(a+)+$"', '"' + "a" * 3000 + '"', "[]", "{}", "[[]]", "[1, 2]", '["x"]', '{"a": 1}',
    "[" * 2000 + "]" * 2000, '{"a":' * 700 + "1" + "}" * 700,
)  # fmt: skip
CELLS = (
    "", "nan", "inf", "-inf", "x", "1e999", "1e308", "-1", "0.5", "9" * 400, "9" * 5000, '"', "\x00", "$\\frac$", "_", "a,b",
    "\n", "a" * 200000,
)  # fmt: skip
_MARK = "\u2603here\u2603"


def mutate(path: Path, random: Random) -> str:
    """Damage one file, or one of a folder's files, in one to three ways; says how."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    told = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        file = random.choice(files)
        if not file.is_file() or file.is_symlink():
            continue  # an earlier one has made it something else
        ways = [*_BYTES, *_BYTES]
        if file.suffix in (".json", ".jsonl"):
            ways += [_json] * 3 * len(_BYTES)
        if file.suffix == ".csv":
            ways += [_csv] * 2 * len(_BYTES)
        if random.random() < 0.08:
            ways = _KINDS
        told.append(f"{file.name}: {random.choice(ways)(file, random)}")
    return "; ".join(told)


def _bits(file: Path, random: Random) -> str:
    data = bytearray(file.read_bytes() or b"\0")
    places = [random.randrange(8 * len(data)) for _ in range(random.choice((1, 1, 3, 20)))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return f"bits {places[:3]} flipped"


def _length(file: Path, random: Random) -> str:
    data = file.read_bytes()
    size = random.choice((0, 1, len(data) - 1, len(data) // 2, random.randrange(len(data) + 1)))
    file.write_bytes(data[: max(0, size)])
    return f"cut to {size} bytes"


def _part(file: Path, random: Random) -> str:
    data = file.read_bytes()
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    what = random.choice(("removed", "doubled", "zeros", "noise"))
    part = {
        "removed": b"",
        "doubled": data[start:end] * 2,
        "zeros": bytes(end - start),
        "noise": random.randbytes(min(end - start, 4096)),
    }[what]
    file.write_bytes(data[:start] + part + data[end:])
    return f"bytes {start} to {end}: {what}"


def _text(file: Path, random: Random) -> str:
    data = file.read_bytes()
    what = random.choice(("byte order mark", "CRLF", "not UTF-8", "UTF-16", "no end", "blank lines", "doubled lines"))
    lines = data.split(b"\n")
    changed = {
        "byte order mark": b"\xef\xbb\xbf" + data,
        "CRLF": data.replace(b"\n", b"\r\n"),
        "not UTF-8": data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :],
        "UTF-16": data.decode("latin-1").encode("utf-16"),
        "no end": data.rstrip(b"\n"),
        "blank lines": b"\n\n".join(lines),
        "doubled lines": b"\n".join(line for line in lines for _ in range(2)),
    }[what]
    file.write_bytes(changed)
    return what


def _json(file: Path, random: Random) -> str:
    """One value, key or entry of a JSON file, or of one line of a JSON lines file."""
    lines = (
        file.read_text(errors="replace").split("\n") if file.suffix == ".jsonl" else [file.read_text(errors="replace")]
    )
    number = random.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return _bits(file, random)
    text = random.choice(VALUES)
    place: list[Any] = []
    while isinstance(value if not place else place[-1][0][place[-1][1]], dict | list):
        inner = value if not place else place[-1][0][place[-1][1]]
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or random.random() < 0.15:
            break
        place.append((inner, random.choice(keys)))
    if not place:
        value, told = _MARK, "all of it"
    else:
        inner, key = place[-1]
        told = ".".join(str(k) for _, k in place)
        way = random.choice(("value", "value", "value", "gone", "renamed", "twice"))
        told += f" {way}"
        if way == "value" or not isinstance(inner, dict):
            inner[key] = _MARK
        else:
            old = inner.pop(key)
            if way == "renamed":
                inner[f"{key}x"] = old
            elif way == "twice":
                inner[key], inner[_MARK] = old, old
                text = json.dumps(key)
    lines[number] = json.dumps(value, ensure_ascii=False).replace(f'"{_MARK}"', text)
    file.write_text("\n".join(lines), errors="surrogatepass")
    return f"{told} = {text[:40]}"


def _csv(file: Path, random: Random) -> str:
    rows = [line.split(",") for line in file.read_text(errors="replace").split("\n")]
    row = random.choice(rows)
    place, text = random.randrange(len(row)), random.choice(CELLS)
    row[place] = text
    file.write_text("\n".join(map(",".join, rows)))
    return f"a cell {text[:20]!r}"


def _gone(file: Path, random: Random) -> str:
    file.unlink()
    return "removed"


def _folder(file: Path, random: Random) -> str:
    file.unlink()
    file.mkdir()
    if random.random() < 0.5:
        (file / "inside").write_text("x")
    return "a folder"


def _pipe(file: Path, random: Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a pipe"


def _link(file: Path, random: Random) -> str:
    file.unlink()
    target = random.choice((file.name, ".", "..", "/dev/null", "/dev/zero", "nothing"))
    file.symlink_to(target)
    return f"a link to {target}"


def _locked(file: Path, random: Random) -> str:
    file.chmod(0)  # root reads it all the same
    return "mode 000"


_BYTES: list[Callable[[Path, Random], str]] = [_bits, _bits, _length, _part, _text]
_KINDS: list[Callable[[Path, Random], str]] = [_gone, _folder, _pipe, _link, _locked]


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a file or folder, in the place of an earlier one."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif os.path.lexists(target):
        target.unlink()
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target

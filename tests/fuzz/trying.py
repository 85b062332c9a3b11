"""Try something on damaged input: it works, or it refuses in one sentence."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

COUNT = int(os.environ.get("PMSS_FUZZ", "40"))
FIRST = int(os.environ.get("PMSS_FUZZ_FIRST", "0"))
LIMIT = pytest.mark.timeout(300 + 60 * COUNT)  # of a whole test; a hang shows long before
_SECONDS = 60  # a hang, on any machine
_LONGEST = 2000  # letters of a message


class Hang(BaseException):
    """No `except Exception` stops it."""


def cases(kind: str, count: int = COUNT) -> Iterator[tuple[int, Random]]:
    """Seeds and the random numbers that they stand for."""
    for seed in range(FIRST, FIRST + max(1, count)):
        yield seed, Random(f"{kind} {seed}")  # noqa: S311


def attempt(
    action: Callable[[], Any], told: str, refusals: tuple[type[BaseException], ...] = (OSError, ValueError)
) -> Any:
    """Run the action; another exception than a refusal, a hang or a refusal that is no sentence fails the test.

    Args:
        action: What to try.
        told: How its input was damaged, with the seed.
        refusals: Exceptions that are an answer.

    Returns:
        What the action returned, or the refusal.
    """
    try:
        with _time():
            return action()
    except refusals as error:
        text = str(error)
        if isinstance(error, SystemExit):
            if error.code != 2:
                pytest.fail(f"{told}: exit code {error.code}")
        elif not text.strip() or not text.replace("\n", " ").isprintable() or len(text) > _LONGEST:
            pytest.fail(f"{told}: the message is {text[:_LONGEST]!r}")
        return error
    except Hang:
        pytest.fail(f"{told}: no answer within {_SECONDS} s")
    except BaseException:  # noqa: BLE001 - pytest.fail shows the seed
        pytest.fail(f"{told}:\n{traceback.format_exc()}")


@contextmanager
def _time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(folder: Path) -> dict[str, Any]:
    """What is in a folder, by relative name: content of files, targets of links, kinds of the rest."""
    found: dict[str, Any] = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root) / name
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = os.readlink(path)
            elif path.is_dir():
                found[key] = None
            elif path.is_file():
                found[key] = path.read_bytes()
            else:
                found[key] = path.stat().st_mode
    return found

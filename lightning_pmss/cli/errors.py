"""What a command says when it cannot do what was typed: one block on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_pmss.cli.debugging import DEBUG, debugging

_OURS = ("lightning", "lightning_pmss")
# Frames of Lightning's loops inside which a batch is fetched, trained on or evaluated.
_IN_A_BATCH = {
    "lightning.pytorch.loops.training_epoch_loop": ("advance",),
    "lightning.pytorch.loops.evaluation_loop": ("_evaluation_step",),
    "lightning.pytorch.loops.prediction_loop": ("_predict_step",),
    "lightning.pytorch.loops.fetchers": ("__next__",),
}


def says_it_all(error: BaseException) -> bool:
    """Whether the message is all that the person at the command line needs; everything else is a bug with a traceback.

    It is for what Lightning calls a misconfiguration; for files, which the message names; for missing packages and values that
    code refuses by a ``raise`` (what falls out of an operation, such as unpacking, is a bug); and for what Lightning and this
    library refuse to run. Once batches are computed, what other code raises is a bug, too.
    """
    frames = list(_frames(error.__traceback__))
    if not frames:
        return False
    package = _module(frames[-1]).partition(".")[0]
    on_purpose = _raises(frames[-1])
    in_a_batch = any(tb.tb_frame.f_code.co_name in _IN_A_BATCH.get(_module(tb), ()) for tb in frames)
    if isinstance(error, MisconfigurationException) or isinstance(error, OSError) and error.filename is not None:
        return True
    if isinstance(error, ModuleNotFoundError) or isinstance(error, (OSError, ValueError, ImportError)) and on_purpose:
        return package in _OURS or not in_a_batch
    return isinstance(error, RuntimeError) and package in _OURS and on_purpose


def behind(error: Exception) -> Exception:
    """The error that jsonargparse has wrapped into its own."""
    while isinstance(error.__cause__, Exception) and _raised_in(error).partition(".")[0] == "jsonargparse":
        error = error.__cause__
    return error


def message_of(error: BaseException) -> str:
    """What it says, and where it is from if another library says so."""
    text = str(error).strip() or type(error).__name__
    where = _raised_in(error)
    known = where.partition(".")[0] in (*_OURS, "jsonargparse") or isinstance(error, OSError)
    return text if known else f"{text} ({type(error).__name__} of {where})"


def refuse(program: str, message: str, help_of: str | None = None) -> NoReturn:
    """Print the message, whole on rank 0 and its first line on other ranks, and end with code 2.

    Args:
        program: The command that was typed.
        message: What is wrong and what to type instead.
        help_of: The command whose ``--help`` shows the options, if they are in question.

    Raises:
        SystemExit: Always.
    """
    rank = getattr(rank_zero_only, "rank", 0) or 0
    tip = f"tip: {DEBUG}=1 in front of the command shows the traceback"
    tip += f"; all options: {help_of} --help" if help_of else ""
    text = (
        f"{program}, rank {rank}: error: {message.splitlines()[0]}" if rank else f"{tip}\n{program}: error: {message}"
    )
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    raise SystemExit(2)


@contextmanager
def refusing(program: str) -> Iterator[None]:
    """Turn an error of the user's, raised inside, into a message and an exit.

    Args:
        program: The command that is running.
    """
    try:
        yield
    except Exception as error:
        cause = behind(error)
        if debugging() or not says_it_all(cause):
            raise
        refuse(program, message_of(cause))


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _module(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__", ""))


def _raised_in(error: BaseException) -> str:
    frames = list(_frames(error.__traceback__))
    return _module(frames[-1]) if frames else ""


def _raises(traceback: TracebackType) -> bool:
    """Whether the frame ended in a ``raise`` statement."""
    return dis.opname[traceback.tb_frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"

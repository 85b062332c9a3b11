"""The database of a search, and what a study is bound to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.study import Study

from lightning_pmss.messages import reason
from lightning_pmss.runs.configuration import differences

BOUND = "bound"
_CONNECT_SECONDS = 10
_LOCK_SECONDS = 60
_ATTEMPTS = 5
_MOST = 8  # differences in a message

optuna.logging.set_verbosity(optuna.logging.WARNING)


def database_file(url: str) -> Path | None:
    """Return the file of an SQLite database; None of other databases.

    Raises:
        ValueError: It is no URL of a database.
    """
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise ValueError(
            f"--storage {url!r} is no URL of a database. Type sqlite:///FOLDER/study.db or postgresql://USER@HOST/NAME."
        ) from None
    if parsed.get_backend_name() != "sqlite":
        return None
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"--storage {url}: a database in memory is lost at the end. Type sqlite:///FOLDER/study.db.")
    return Path(str(parsed.database)).absolute()


def open_storage(url: str) -> RDBStorage:
    """Connect to the database of a search.

    Args:
        url: SQLAlchemy's, such as ``sqlite:///runs/study.db``.

    Raises:
        ValueError: It cannot be reached, or its driver is not installed.
    """
    file = database_file(url)
    shown = sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    wait = {"timeout": _LOCK_SECONDS} if file is not None else {"connect_timeout": _CONNECT_SECONDS}
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"--storage {shown}: the folder {file.parent} does not exist; make it first.")
    one_at_a_time = contextlib.nullcontext() if file is None else claims(url, file.parent)
    try:
        with one_at_a_time:
            return _connect(url, wait)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise ValueError(
            f"--storage {shown}: its driver is not installed ({reason(error)}). For PostgreSQL install psycopg2-binary"
            " and begin the URL with postgresql+psycopg2://, for MySQL install pymysql and begin it with mysql+pymysql://"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, TypeError) as error:
        cause = getattr(error, "orig", None) or error
        raise ValueError(f"--storage {shown}: the database cannot be used: {reason(cause, 300)}") from error


def claims(url: str, folder: Path) -> FileLock:
    """Return the lock under which the workers of one machine take trials.

    The workers of several machines are kept apart by the database, whose rows SQLite cannot lock.

    Args:
        url: The database.
        folder: Where the lock is, of other databases than SQLite.
    """
    return FileLock(f"{database_file(url) or folder / 'study'}.claims")


def _connect(url: str, options: Mapping[str, Any]) -> RDBStorage:
    """Connect, and make the tables of a new database, as another worker may be doing at this moment."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            return RDBStorage(url, engine_kwargs={"connect_args": dict(options), "pool_pre_ping": True})
        except sqlalchemy.exc.DBAPIError as error:
            known = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error.orig)
            if left == 0 or not known:
                raise
            time.sleep(1.0)
    raise AssertionError


def open_study(storage: RDBStorage, name: str, mode: str, bound: Mapping[str, Any]) -> tuple[Study, bool]:
    """Open a study, or make it and bind it.

    Args:
        storage: The database.
        name: Of the study.
        mode: ``min`` or ``max``.
        bound: What trials must share to be compared; plain data.

    Returns:
        The study, and whether it is new.

    Raises:
        ValueError: The study of this name is bound to something else; the message names the differences.
    """
    new = name not in {study.study_name for study in optuna.get_all_study_summaries(storage)}
    study = optuna.create_study(storage=storage, study_name=name, direction=direction(mode), load_if_exists=True)
    if BOUND not in study.user_attrs:
        study.set_user_attr(BOUND, dict(bound))
    if found := differences(study.user_attrs[BOUND], bound):
        more = f"\n  and {len(found) - _MOST} more" if len(found) > _MOST else ""
        listed = "".join(f"\n  {line}" for line in found[:_MOST])
        raise ValueError(
            f"the study {name!r} is of another search; its trials cannot be compared with these:{listed}{more}\n"
            "Type another --study, or what the study had."
        )
    return study, new


def direction(mode: str) -> Literal["minimize", "maximize"]:
    """Return Optuna's word for ``min`` or ``max``."""
    return "minimize" if mode == "min" else "maximize"


def load_study(storage: RDBStorage, name: str) -> Study:
    """Open a study that exists.

    Raises:
        ValueError: It does not; the message names those that do.
    """
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        names = sorted(study.study_name for study in optuna.get_all_study_summaries(storage))
        known = f"It has {', '.join(map(repr, names))}." if names else "It has none."
        raise ValueError(f"the database has no study {name!r}. {known}") from None


@contextlib.contextmanager
def said_if_away() -> Iterator[None]:
    """Turn an error of the database into one sentence.

    Raises:
        ConnectionError: The database cannot be reached any more.
    """
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = getattr(error.__cause__ or error, "orig", None) or error
        raise ConnectionError(
            f"the database broke off: {reason(cause, 300)}. The trials' folders keep their results; the same command continues."
        ) from error

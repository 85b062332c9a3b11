"""The required content of JSON files, as strict models of pydantic."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightning_pmss.messages import one_line, short

Size = Annotated[int, Field(ge=1, le=2**48)]
Length = Annotated[int, Field(ge=0, le=2**48)]
Shape = Annotated[list[Length], Field(max_length=16)]
# Settings of a model's config.json: sizes such as the vocabulary's, and the description of a head.
Setting = Annotated[int, Field(ge=0, le=2**31)] | str | list[str] | dict[Any, Any] | None
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Part of a file: exact types, no unknown entries, finite numbers."""

    # Built at first use: most commands read one kind of file.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class TensorRecord(Record):
    """One tensor of a file at the time of writing.

    Attributes:
        dtype: Its name in torch, such as ``float32``.
        shape: Its shape.
        sha256: Checksum of its bytes, row after row, little-endian.
    """

    dtype: str
    shape: Shape
    sha256: Sha256


class FileRecord(Record):
    """One file of a folder at the time of writing.

    Attributes:
        bytes: Its size.
        sha256: Checksum of its content.
    """

    bytes: Length
    sha256: Sha256


AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def checked(kind: type[AnyRecord], value: Any, where: str, remedy: str, *, under: str = "") -> AnyRecord:
    """Check a value and return it as a record of this kind.

    Args:
        kind: The record's class.
        value: Content of the file: dicts, lists, strings and numbers.
        where: Its name for messages: a file, or a part of one.
        remedy: Remedy for a damaged one, a whole sentence.
        under: The entry of the file that contains the value, for messages.

    Raises:
        ValueError: Something is missing, unknown, of another type or out of range; the first such place is named.
    """
    if not isinstance(value, dict) and not under:
        raise ValueError(f"{where} is no JSON object but {shown(value)}. {remedy}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = _place(faults[0], value)
        reasons = dict.fromkeys(_reason(fault) for fault in faults if _place(fault, value) == first)
        path = ".".join([*([under] if under else []), *map(str, first)])
        place = f"`{short(one_line(path), 80)}` " if path else "it "
        said = "" if faults[0]["type"] in _WITHOUT_INPUT else f", not {shown(faults[0]['input'])}"
        raise ValueError(
            f"{where} is damaged or was edited by hand: {place}{' or '.join(reasons)}{said}. {remedy}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where} is damaged or was edited by hand: it is nested too deeply. {remedy}") from error


_WITHOUT_INPUT = {"missing": "is missing", "extra_forbidden": "is not known"}


def _place(fault: Any, value: Any) -> tuple[int | str, ...]:
    """The path of the fault within the value; pydantic appends the member of a union that it tried."""
    path: list[int | str] = []
    for part in fault["loc"]:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif not (isinstance(value, dict) and fault["type"] == "missing"):
            break
        path.append(part)
    return tuple(path)


def _reason(fault: Any) -> str:
    text = re.sub(r"^(Input|String|Value|List|Dictionary) | or instance of \w+", "", fault["msg"])
    return _WITHOUT_INPUT.get(fault["type"], f"{text[:1].lower()}{text[1:]}")


def shown(value: Any) -> str:
    """A value of a file, for messages."""
    try:
        return one_line(short(repr(value), 80))
    except (ValueError, RecursionError):  # more digits than Python prints
        return type(value).__name__

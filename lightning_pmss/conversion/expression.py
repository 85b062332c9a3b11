"""Regular expressions from users, with a time limit."""

from __future__ import annotations

import time

import regex

PATIENCE = 5.0  # seconds for all names of a model; a usual expression takes a millisecond


class Expression:
    """A user's regular expression. `PATIENCE` limits its time over all names, since some would run for centuries.

    Args:
        pattern: Expression for whole names.
        field: Name of the option, for messages.

    Raises:
        ValueError: The pattern is not a regular expression.
    """

    def __init__(self, pattern: str, field: str) -> None:
        self.pattern, self.field, self.left = pattern, field, PATIENCE
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError) as error:
            raise ValueError(
                f"{field}={pattern!r} is not a regular expression ({error}), nor the name of a module; type the end of a"
                " name, such as q_proj, or a list of them."
            ) from error

    def matches(self, name: str) -> bool:
        """Whether the expression matches the whole name.

        Raises:
            ValueError: The time limit is reached.
        """
        begun = time.perf_counter()
        try:
            return self._compiled.fullmatch(name, timeout=max(self.left, 0.001)) is not None
        except TimeoutError:
            raise ValueError(
                f"{self.field}={self.pattern!r} has not answered for `{name}` within {PATIENCE:.0f} s: repetitions inside a"
                " repetition, such as (a|aa)+, try every division of a name. Simplify it, or type a list of names."
            ) from None
        finally:
            self.left -= time.perf_counter() - begun

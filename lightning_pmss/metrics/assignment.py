"""The best one-to-one assignment between two small sets (scipy would be a dependency for one function)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_assignment(scores: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Return pairs (row, column) of a one-to-one assignment with the largest sum of scores.

    The Hungarian method with potentials and shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987), exact,
    in O(rows^2 columns).

    Args:
        scores: a matrix of finite numbers, n rows of m columns.

    Returns:
        min(n, m) pairs, ordered by row. Of several best assignments, any one.

    """
    if not scores or not scores[0]:
        return []
    if len(scores) > len(scores[0]):  # the method below places every row
        flipped = best_assignment(list(zip(*scores, strict=True)))
        return sorted((row, column) for column, row in flipped)
    columns = len(scores[0])
    row_price, column_price = [0.0] * len(scores), [0.0] * columns
    row_of: list[int | None] = [None] * columns
    for start in range(len(scores)):
        # Dijkstra over columns from the unplaced row `start` to the nearest free column.
        distance, before = [math.inf] * columns, [-1] * columns
        done: set[int] = set()
        row, column, reached = start, -1, 0.0
        while True:
            for other in range(columns):
                if other not in done:
                    through = reached - scores[row][other] - row_price[row] - column_price[other]
                    if through < distance[other]:
                        distance[other], before[other] = through, column
            column = min((other for other in range(columns) if other not in done), key=distance.__getitem__)
            reached = distance[column]
            done.add(column)
            placed = row_of[column]
            if placed is None:
                break
            row = placed
        row_price[start] += reached
        for other in done - {column}:
            owner = row_of[other]
            assert owner is not None
            row_price[owner] += reached - distance[other]
            column_price[other] -= reached - distance[other]
        while column >= 0:  # along the path, each column takes over the row of the column before it
            previous = before[column]
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    return sorted((row, column) for column, row in enumerate(row_of) if row is not None)

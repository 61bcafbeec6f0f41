"""Pareto fronts of any number of objectives."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

GOALS = ("max", "min")


def pareto_front(rows: Sequence[Mapping[str, float]], objectives: Mapping[str, str]) -> list[int]:
    """Indices of the rows that no other row beats: none is as good in every objective and better in one.

    Args:
        rows: one mapping a candidate, with a number in every column that is an objective.
        objectives: column -> "max" or "min".

    Returns:
        Indices in the order of `rows`; rows that tie in all objectives stand or fall together.

    Raises:
        ValueError: no objective, a goal other than "max" and "min", or a row without a number for an objective.
    """
    if not objectives:
        raise ValueError("objectives must name at least one column")
    for column, goal in objectives.items():
        if goal not in GOALS:
            raise ValueError(f"the goal of {column!r} must be 'max' or 'min', got {goal!r}")
        for i, row in enumerate(rows):
            if not isinstance(row.get(column), int | float) or math.isnan(row[column]):
                raise ValueError(f"row {i} has no number in column {column!r}: {row.get(column)!r}")
    points = [tuple(row[c] if goal == "max" else -row[c] for c, goal in objectives.items()) for row in rows]

    def beaten(p: tuple) -> bool:
        return any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points)

    return [i for i, p in enumerate(points) if not beaten(p)]

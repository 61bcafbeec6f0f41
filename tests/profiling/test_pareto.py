from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionbb.profiling import pareto_front

GOALS = {"speed": "max", "memory": "min", "accuracy": "max"}
rows_of = st.lists(st.fixed_dictionaries({c: st.integers(0, 5) for c in GOALS}), max_size=20)


def beats(a, b):
    signed = [(a[c] - b[c]) * (1 if goal == "max" else -1) for c, goal in GOALS.items()]
    return min(signed) >= 0 and max(signed) > 0


@given(rows_of)
def test_the_front_is_the_unbeaten_rows(rows):
    front = pareto_front(rows, GOALS)
    assert front == [i for i, r in enumerate(rows) if not any(beats(other, r) for other in rows)]
    assert bool(front) == bool(rows)


def test_two_objectives_by_hand():
    rows = [{"x": 1, "y": 1}, {"x": 2, "y": 3}, {"x": 3, "y": 2}, {"x": 3, "y": 3}, {"x": 4, "y": 5}]
    assert pareto_front(rows, {"x": "min", "y": "max"}) == [0, 1, 4]
    assert pareto_front(rows, {"x": "max", "y": "max"}) == [4]
    assert pareto_front(rows, {"x": "min"}) == [0]


@pytest.mark.parametrize(
    ("rows", "objectives", "message"),
    [
        ([{"x": 1}], {}, "at least one"),
        ([{"x": 1}], {"x": "up"}, "'max' or 'min'"),
        ([{"x": 1}, {"y": 1}], {"x": "max"}, "row 1 has no number in column 'x'"),
        ([{"x": float("nan")}], {"x": "max"}, "row 0"),
        ([{"x": None}], {"x": "max"}, "row 0"),
    ],
)
def test_bad_input_is_named(rows, objectives, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(rows, objectives)

from __future__ import annotations

import pytest

from visionbb.profiling import Comparison, Timing, compare, compare_models, growth


def row(model: str, size: int, ms: float, mode: str = "forward") -> Comparison:
    return Comparison(model, mode, size, 1, ms, ms, 1e3 / ms, 1.0)


def test_ratios_are_taken_at_the_same_size_and_mode(monkeypatch):
    seen = []

    def fake(calls, **kwargs):
        seen.append(list(calls))
        return {key: Timing((float(key[1]) * (1 if key[0] == "test_vit" else 4),)) for key in calls}

    monkeypatch.setattr(compare, "interleaved", fake)
    rows = compare_models(["test_resnet", "test_vit"], [64, 96], baseline="test_vit", batch_size=2)
    assert seen[0] == seen[1] == [("test_resnet", 64), ("test_vit", 64), ("test_resnet", 96), ("test_vit", 96)]
    assert [r.mode for r in rows] == ["forward"] * 4 + ["train"] * 4
    assert [r.ratio for r in rows] == [0.25, 1.0] * 4
    assert rows[0].images_per_sec == pytest.approx(2 / 256)
    assert rows[0].p50_ms == rows[0].p90_ms == 256e3


def test_growth_between_neighbouring_sizes():
    rows = [row("a", 448, 80.0), row("a", 224, 20.0), row("a", 896, 1280.0), row("b", 224, 5.0)]
    linear, quadratic = growth(rows)
    assert (linear.model, linear.from_size, linear.to_size, linear.factor) == ("a", 224, 448, 4.0)
    assert linear.exponent == pytest.approx(1)
    assert (quadratic.factor, quadratic.exponent) == (16.0, pytest.approx(2))


def test_modes_are_kept_apart():
    rows = [row("a", 64, 1.0), row("a", 64, 3.0, "train"), row("a", 128, 4.0), row("a", 128, 6.0, "train")]
    assert [(g.mode, g.factor) for g in growth(rows)] == [("forward", 4.0), ("train", 2.0)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"baseline": "resnet50"}, "baseline must be one of the models"),
        ({"modes": ["backward"]}, "modes must be among forward, train"),
        ({"input_sizes": [64, 64]}, "must not repeat"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        compare_models(["test_vit"], **kwargs)

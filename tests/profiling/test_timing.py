from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionbb.profiling import Timing, interleaved
from visionbb.profiling.timing import cpu_clock, forward_call, stopwatch, train_call, wall_clock

seconds = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50)


@given(seconds, st.floats(0, 100))
def test_percentiles_are_numpys(samples, percent):
    assert Timing(tuple(samples)).percentile(percent) == pytest.approx(np.percentile(samples, percent))


@given(seconds)
def test_median_is_p50(samples):
    timing = Timing(tuple(samples))
    assert timing.median == pytest.approx(timing.percentile(50))


@pytest.mark.parametrize("percent", [-1, 100.5])
def test_percent_out_of_range(percent):
    with pytest.raises(ValueError, match="percent"):
        Timing((1.0,)).percentile(percent)


def test_calls_take_turns_and_warm_up_is_not_measured():
    order = []
    ticks = itertools.count()

    def fake(call):
        call()
        return float(next(ticks))

    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleaved(calls, repeats=5, warmup=1, stopwatch=fake)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 6
    assert all(sorted(round_) == list("abc") for round_ in rounds)
    assert len(set(rounds)) > 2  # the same call does not always come before another
    for name in "abc":
        assert timings[name] == Timing(tuple(float(3 * i + rounds[i].index(name)) for i in range(1, 6)))
    again = interleaved(calls, repeats=5, warmup=1, stopwatch=fake)
    assert len(again) == 3
    assert order[18:] == order[:18]  # drawn from a fixed seed


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_round_counts_out_of_range(repeats, warmup):
    with pytest.raises(ValueError, match="repeats"):
        interleaved({}, repeats=repeats, warmup=warmup)


def test_stopwatch_fits_the_device():
    assert stopwatch("cpu") is wall_clock
    assert stopwatch("cpu", "cpu") is cpu_clock
    assert stopwatch("cuda", window=5).keywords == {"window": 5}
    with pytest.raises(ValueError, match="'wall' or 'cpu'"):
        stopwatch("cpu", "sundial")
    with pytest.raises(ValueError, match="CPU only"):
        stopwatch("cuda", "cpu")


@pytest.mark.parametrize("clock", [wall_clock, cpu_clock])
def test_clocks_run_the_call_once(clock):
    runs = []
    assert clock(lambda: runs.append(sum(range(10000)))) > 0
    assert len(runs) == 1


def test_forward_call_is_inference():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_inference_mode_enabled()))
            return x

    forward_call(Spy().train(), torch.zeros(1))()
    assert seen == [(False, True)]


def test_train_call_steps_and_leaves_no_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    before = model[1].weight.detach().clone()
    images = torch.randn(4, 3, 2, 2)
    train_call(model, images)()
    assert model.training
    assert torch.equal(model[1].weight, before)
    train_call(model, images, torch.optim.SGD(model.parameters(), lr=1.0))()
    assert not torch.equal(model[1].weight, before)
    assert model[1].weight.grad is None

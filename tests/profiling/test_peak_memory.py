from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionbb.profiling import peak_memory
from visionbb.profiling.memory import high_water_mark, tensor_bytes
from visionbb.profiling.timing import forward_call, train_call

MB = 2**20


@given(st.lists(st.integers(-1000, 1000)))
def test_high_water_mark_is_the_largest_prefix_sum(changes):
    assert high_water_mark(changes) == max(sum(changes[:i]) for i in range(len(changes) + 1))


def test_temporaries_by_hand():
    def call():
        a = torch.empty(MB, dtype=torch.uint8)
        b = a + 1  # a, b: 2 MB
        del a
        c = torch.cat([b, b])  # b, c: 3 MB
        del b
        return c + 1  # c, result: 4 MB

    assert peak_memory(call, "cpu") == pytest.approx(4 * MB, rel=0.01)


def test_order_of_releases_matters():
    def together():
        a, b = torch.ones(MB), torch.ones(MB)
        return a, b

    def one_after_the_other():
        torch.ones(MB)
        torch.ones(MB)

    assert peak_memory(together, "cpu") == pytest.approx(8 * MB, rel=0.01)
    assert peak_memory(one_after_the_other, "cpu") == pytest.approx(4 * MB, rel=0.01)


def test_forward_and_training_of_a_small_network():
    width, rows = 4096, 256
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8))
    images = torch.randn(rows, 64)
    hidden = 4 * rows * width
    assert peak_memory(forward_call(model, images), "cpu") == pytest.approx(2 * hidden, rel=0.02)
    # Backward at its worst holds ReLU's saved output and the gradients at its input and output, later all of dW.
    gradients = tensor_bytes(model)
    used = peak_memory(train_call(model, images), "cpu")
    assert 3 * hidden <= used <= 3 * hidden + gradients


def test_tensor_bytes_counts_shared_tensors_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert tensor_bytes(model) == 64
    assert tensor_bytes(nn.BatchNorm1d(3), torch.zeros(2, dtype=torch.float64)) == 4 * 3 * 4 + 8 + 16


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="meta"):
        peak_memory(lambda: None, "meta")

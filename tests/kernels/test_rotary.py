"""`rotary2d`: angles by hand, the portable path against the definition, registration, errors."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import Rotary, rotary2d, use


def turned_pair(rotary, heads, head_dim, row, col, head, pair):
    """Where (1, 0) in one pair of channels of one token goes, as an angle."""
    x = torch.zeros(1, row + 1, col + 1, heads, head_dim, dtype=torch.float64)
    x[0, row, col, head, 2 * pair] = 1
    with use("reference"):
        a, b = rotary2d(x, rotary)[0, row, col, head, 2 * pair : 2 * pair + 2].tolist()
    return math.atan2(b, a)


def test_angles_per_head_by_hand():
    """RALA's: 16 channels have 4 frequencies 1 ... 1e-4, rows first, and all heads are alike."""
    rotary = Rotary.closed(16)
    for head in (0, 1):
        for j in range(4):
            frequency = 10000 ** -(j / 3)
            assert turned_pair(rotary, 2, 16, 3, 2, head, j) == pytest.approx(3 * frequency)
            assert turned_pair(rotary, 2, 16, 3, 2, head, 4 + j) == pytest.approx(2 * frequency)


def test_angles_over_all_channels_by_hand():
    """MILA's: the first half of the heads sees rows alone, the second columns, and 1 / 10000 is not reached."""
    rotary = Rotary.half_open(16)
    for j in range(4):
        frequency = 10000 ** -(j / 4)
        assert turned_pair(rotary, 4, 4, 3, 2, j // 2, j % 2) == pytest.approx(3 * frequency)
        assert turned_pair(rotary, 4, 4, 3, 2, 2 + j // 2, j % 2) == pytest.approx(2 * frequency)


def test_one_frequency_is_one():
    assert turned_pair(Rotary.closed(4), 1, 4, 1, 0, 0, 0) == pytest.approx(1)


@st.composite
def cases(draw):
    heads, quarters = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    span = draw(st.sampled_from([4 * quarters, 4 * quarters * heads]))
    rotary = draw(st.sampled_from([Rotary.closed, Rotary.half_open]))(span)
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6)), heads, 4 * quarters
    return shape, rotary, draw(st.booleans()), draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=50, deadline=None)
def test_portable_equals_reference_and_undoes_itself(case):
    shape, rotary, inverse, seed = case
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(*shape[:3], 3, *shape[3:], generator=generator, dtype=torch.float64)
    x = packed[:, :, :, 1].requires_grad_()  # as it lies in a projection
    dout = torch.randn(shape, generator=generator, dtype=torch.float64)
    got = rotary2d(x, rotary, inverse)
    with use("reference"):
        want = rotary2d(x, rotary, inverse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dout)[0] for y in (got, want)))
    torch.testing.assert_close(rotary2d(got, rotary, not inverse), x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_precision_holds_far_out(dtype, tolerance):
    x = torch.randn(1, 3, 300, 1, 64, dtype=torch.float64)
    with use("reference"):
        want = rotary2d(x, Rotary.closed(64))
    assert (rotary2d(x.to(dtype), Rotary.closed(64)).double() - want).abs().max() < tolerance * want.abs().max()


def test_opcheck_and_second_derivative():
    x = torch.randn(2, 3, 4, 2, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.visionbb.rotary2d.default, (x, 8, 0.1, False))
    x = torch.randn(1, 2, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: rotary2d(x, Rotary.closed(4)).square(), x)


@pytest.mark.parametrize(
    ("x", "rotary", "error", "message"),
    [
        (torch.zeros(1, 2, 2, 1, 8, dtype=torch.long), Rotary.closed(8), TypeError, "floating-point"),
        (torch.zeros(2, 2, 1, 8), Rotary.closed(8), ValueError, r"\(B, H, W, heads, head_dim\)"),
        (torch.zeros(1, 2, 2, 1, 8), Rotary.closed(12), ValueError, "divides heads \\* head_dim = 8, got 12"),
        (torch.zeros(1, 2, 2, 1, 6), Rotary(6, 0.5), ValueError, "multiple of 4"),
        (torch.zeros(1, 2, 2, 1, 8), Rotary(8, -1.0), ValueError, "ratio must be positive, got -1.0"),
    ],
)
def test_errors(x, rotary, error, message):
    with pytest.raises(error, match=message):
        rotary2d(x, rotary)

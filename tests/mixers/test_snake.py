"""PlainMamba's mixer: directions of steps, the released and the paper's recurrence, any map, types, errors."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from visionbb.kernels import scan_routes
from visionbb.mixers import SnakeSS2D
from visionbb.mixers.snake import step_directions

START, RIGHT, LEFT, UP, DOWN = range(5)


def randomised(mixer):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.normal_(-1.0 if name in ("A_log", "dt_bias") else 0.0, 0.5)
    return mixer.eval()


def test_directions_of_the_four_snakes():
    routes = scan_routes("snake", 2, 3)
    assert routes.tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    assert step_directions(routes, 3).tolist() == [
        [START, RIGHT, RIGHT, DOWN, LEFT, LEFT],
        [START, RIGHT, RIGHT, UP, LEFT, LEFT],
        [START, DOWN, RIGHT, UP, RIGHT, DOWN],
        [START, UP, LEFT, DOWN, LEFT, UP],
    ]


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_directions_on_narrow_maps(H, W):
    directions = step_directions(scan_routes("snake", H, W), W)
    assert directions.shape == (4, H * W)
    assert directions[:, 0].tolist() == [START] * 4
    allowed = {(1, 4): {RIGHT, LEFT}, (4, 1): {UP, DOWN}, (1, 1): set(), (2, 2): {RIGHT, LEFT, UP, DOWN}}[H, W]
    assert set(directions[:, 1:].flatten().tolist()) == allowed


@pytest.mark.parametrize("permute", ["u", "all"])
def test_is_the_sum_of_four_scans_whose_input_knows_its_direction(permute):
    H, W, N = 3, 4, 2
    mixer = randomised(SnakeSS2D(6, N, kernel_size=3, permute=permute)).double()
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=12))
    u = u.permute(0, 2, 3, 1).reshape(H * W, 12)
    low, B, C = mixer.x_proj(u).split([1, N, N], -1)
    dt = F.softplus(low @ mixer.dt_proj.T + mixer.dt_bias)
    routes = scan_routes("snake", H, W)
    total = torch.zeros_like(u)
    for route, directions in zip(routes.tolist(), step_directions(routes, W).tolist(), strict=True):
        h = torch.zeros(12, N, dtype=torch.float64)
        for t, (token, direction) in enumerate(zip(route, directions, strict=True)):
            at = t if permute == "u" else token  # whose time step, B and C
            own_B = B[at] + mixer.direction_B[direction]
            h = torch.exp(-dt[at][:, None] * mixer.A_log.exp()) * h + (dt[at] * u[token])[:, None] * own_B
            total[token] += h @ C[at] + mixer.D * u[token]
    want = mixer.out_proj(total.view(1, H, W, 12) * F.silu(z))
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


def test_parameters_of_the_scan_are_kept_from_weight_decay():
    mixer = SnakeSS2D(16)
    assert mixer.no_weight_decay() == {"A_log", "D", "direction_B", "dt_bias"} <= dict(mixer.named_parameters()).keys()
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(32, 16))


@given(H=st.integers(1, 9), W=st.integers(1, 9), permute=st.sampled_from(["u", "all"]))
def test_any_map(H, W, permute):
    mixer = randomised(SnakeSS2D(8, 2, permute=permute))
    x = torch.randn(2, H, W, 8)
    y = mixer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1:], mixer(x[1:]), rtol=1e-4, atol=1e-5)  # images do not mix


def test_reduced_precision_stays_near():
    mixer = randomised(SnakeSS2D(16, 2))
    x = torch.randn(2, 8, 8, 16)
    want = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = mixer(x)
    narrow = mixer.bfloat16()(x.bfloat16())
    assert (autocast.dtype, narrow.dtype) == (torch.bfloat16, torch.bfloat16)
    for got in (autocast, narrow):
        assert F.cosine_similarity(got.float().flatten(), want.flatten(), 0) > 0.995


@pytest.mark.parametrize("permute", ["u", "all"])
def test_all_parameters_get_their_gradients(permute):
    mixer = randomised(SnakeSS2D(16, 2, permute=permute)).train()
    mixer(torch.randn(2, 5, 6, 16)).square().mean().backward()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name
        assert bool((p.grad != 0).any()), name
    assert bool((mixer.direction_B.grad != 0).any(1).all())


def test_errors():
    with pytest.raises(ValueError, match="permute must be 'u' or 'all', got 'x'"):
        SnakeSS2D(16, permute="x")

"""State-space mixers: the formulas of the papers, initial values, routes, types, errors."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from visionbb.kernels import scan_routes
from visionbb.mixers import SS2D, ChannelAttention, NonCausalSSD

MIXERS = {
    "ss2d": lambda **kwargs: SS2D(16, 1, 2.0, **kwargs),
    "gated": lambda **kwargs: SS2D(16, 4, 2.0, conv_bias=True, gate=True, **kwargs),
    "scatter": lambda **kwargs: SS2D(16, 4, 2.0, routes=("atrous2",), merge="scatter", **kwargs),
    "stack": lambda **kwargs: SS2D(16, 4, 2.0, gate=True, routes=("row", "window2"), merge="stack", **kwargs),
    "ssd": lambda **kwargs: NonCausalSSD(16, 4, 6, **kwargs),
}


def randomised(mixer):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.normal_(-1.0 if name in ("A_log", "dt_bias") else 0.0, 0.5)
    return mixer.eval()


def scanned(u, low, B, C, weight, bias, A, D):
    """One route, token by token: u (L, D), low (L, R), B and C (L, N)."""
    h, out = torch.zeros(A.shape, dtype=u.dtype), []
    for t in range(len(u)):
        dt = F.softplus(weight @ low[t] + bias)
        h = torch.exp(dt[:, None] * A) * h + (dt * u[t])[:, None] * B[t]
        out.append(h @ C[t] + D * u[t])
    return torch.stack(out)


@pytest.mark.parametrize("gate", [False, True])
def test_ss2d_is_the_sum_of_four_scans_of_a_rearranged_map(gate):
    H, W, N = 3, 4, 2
    mixer = randomised(SS2D(6, N, 2.0, dt_rank=3, conv_bias=gate, gate=gate)).double()
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1) if gate else (mixer.in_proj(x), None)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=12))
    u = u.permute(0, 2, 3, 1)[0]
    total = torch.zeros_like(u)
    for k in range(4):
        walked = u.transpose(0, 1) if k % 2 else u  # columns, one after another
        sequence = walked.reshape(H * W, -1)
        sequence = sequence.flip(0) if k > 1 else sequence
        low, B, C = (sequence @ mixer.x_proj[k].T).split([3, N, N], -1)
        y = scanned(
            sequence, low, B, C, mixer.dt_proj[k], mixer.dt_bias[k], -mixer.A_log[k].exp(), mixer.D[k]
        )
        y = (y.flip(0) if k > 1 else y).view(walked.shape)
        total += y.transpose(0, 1) if k % 2 else y
    y = F.layer_norm(total, (12,), mixer.norm.weight, mixer.norm.bias)[None]
    want = mixer.out_proj(y if z is None else y * F.silu(z))
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


def test_channel_attention_is_a_gate_for_every_channel():
    attn = randomised(ChannelAttention(16)).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    mean = F.layer_norm(x, (16,), attn.norm.weight, attn.norm.bias).mean((1, 2))
    hidden = F.gelu(mean @ attn.fc1.weight.T + attn.fc1.bias)
    assert hidden.shape == (2, 2)
    want = x * torch.sigmoid(hidden @ attn.fc2.weight.T + attn.fc2.bias)[:, None, None]
    torch.testing.assert_close(attn(x), want, rtol=1e-9, atol=1e-9)
    side_by_side = torch.stack((x, 2 * x.flip(2)), 3)
    torch.testing.assert_close(attn(side_by_side), torch.stack((attn(x), attn(2 * x.flip(2))), 3))


def route_by_route(mixer, u):
    """What each route of a mixer makes of u (H, W, D), one after another, at the tokens that it visits."""
    R, N = mixer.dt_proj.shape[2], mixer.A_log.shape[2]
    for k, route in enumerate(scan_routes(mixer.routes, *u.shape[:2]).tolist()):
        sequence = torch.stack([u.flatten(0, 1)[t] if t >= 0 else torch.zeros_like(u[0, 0]) for t in route])
        low, B, C = (sequence @ mixer.x_proj[k].T).split([R, N, N], -1)
        y = scanned(sequence, low, B, C, mixer.dt_proj[k], mixer.dt_bias[k], -mixer.A_log[k].exp(), mixer.D[k])
        map_ = torch.zeros_like(u).flatten(0, 1)
        for t, token in zip(route, y, strict=True):
            if t >= 0:
                map_[t] = token
        yield map_.view_as(u)


@pytest.mark.parametrize("merge", ["scatter", "stack"])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_ss2d_shares_out_the_map_or_gates_every_route(merge, size):
    routes = ("atrous2",) if merge == "scatter" else ("column", "window3", "row_reversed")
    mixer = randomised(SS2D(8, 2, 2.0, dt_rank=3, routes=routes, merge=merge)).double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    u = F.conv2d(mixer.in_proj(x).permute(0, 3, 1, 2), mixer.conv.weight, padding=1, groups=16)
    found = list(route_by_route(mixer, F.silu(u).permute(0, 2, 3, 1)[0]))
    assert len(found) == (4 if merge == "scatter" else 3)
    if merge == "scatter":
        assert bool((torch.stack(found) != 0).sum(0).eq(1).all())  # every token is on one route
    total = sum(found if merge == "scatter" else [mixer.attn(y[None])[0] for y in found])
    want = mixer.out_proj(F.layer_norm(total, (16,), mixer.norm.weight, mixer.norm.bias))[None]
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


def test_ssd_is_attention_to_all_tokens_with_keys_weighted_by_their_time_steps():
    H, W, heads, N = 3, 4, 2, 5
    mixer = randomised(NonCausalSSD(6, heads, N)).double()
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    z, u, dt = mixer.in_proj(x).split([12, 12 + 2 * N, heads], -1)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=22))
    v, B, C = u.permute(0, 2, 3, 1).reshape(H * W, -1).split([12, N, N], -1)
    weight = (F.softplus(dt + mixer.dt_bias) * mixer.A_log.exp()).view(H * W, heads)
    values = v.view(H * W, heads, 6)
    y = torch.einsum("tn,sn,sh,shp->thp", C, B, weight, values) + mixer.D[:, None] * values
    y = F.layer_norm(y.reshape(1, H, W, 12), (12,), mixer.norm.weight, mixer.norm.bias)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y * z), rtol=1e-9, atol=1e-9)


def test_ssd_knows_no_order_of_tokens():
    """Without the convolution's neighbourhood, moving tokens moves results."""
    mixer = randomised(NonCausalSSD(16, 4, 6))
    with torch.no_grad():
        mixer.conv.weight.mul_(torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    x, order = torch.randn(1, 5, 7, 16), torch.randperm(35)
    moved = x.flatten(1, 2)[:, order].view(x.shape)
    torch.testing.assert_close(mixer(moved), mixer(x).flatten(1, 2)[:, order].view(x.shape), rtol=1e-4, atol=1e-5)


def test_initial_time_steps_decays_and_skips_are_mambas():
    mixer = SS2D(64, 16, 2.0)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(4, 128, 16))
    assert bool((mixer.D == 1).all())
    assert mixer.dt_proj.abs().max() <= mixer.dt_proj.shape[2] ** -0.5
    ssd = NonCausalSSD(512, 512)
    assert 1 <= ssd.A_log.exp().min() < 2 < 15 < ssd.A_log.exp().max() <= 16
    for bias in (mixer.dt_bias, ssd.dt_bias):
        steps = F.softplus(bias.detach())
        assert 9e-4 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101
        assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.3)  # uniform in the logarithm


@pytest.mark.parametrize("kind", MIXERS)
def test_decay_skip_and_time_step_are_kept_from_weight_decay(kind):
    mixer = MIXERS[kind]()
    assert mixer.no_weight_decay() == {"A_log", "D", "dt_bias"} <= dict(mixer.named_parameters()).keys()


@given(H=st.integers(1, 9), W=st.integers(1, 9), kind=st.sampled_from(sorted(MIXERS)))
def test_any_map(H, W, kind):
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(2, H, W, 16)
    y = mixer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1:], mixer(x[1:]), rtol=1e-4, atol=1e-5)  # images do not mix


def test_other_routes_have_their_own_parameters():
    one, four = SS2D(16, routes=("row",)), SS2D(16, routes=("row", "column", "snake_row", "row_reversed"))
    assert (len(one.A_log), len(four.A_log)) == (1, 4)
    # Row by row, no token sees a later one; the convolution reaches one row and column ahead.
    x = torch.randn(1, 6, 6, 16, requires_grad=True)
    randomised(one)(x)[0, 2, 3].sum().backward()
    seen = x.grad.abs().sum(-1)[0] > 0
    assert bool(seen[:3].flatten()[:16].all())
    assert not bool(seen[4:].any())
    assert not bool(seen[3, 5])


@pytest.mark.parametrize("kind", MIXERS)
def test_reduced_precision_stays_near(kind):
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(2, 8, 8, 16)
    want = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = mixer(x)
    narrow = mixer.bfloat16()(x.bfloat16())
    assert (autocast.dtype, narrow.dtype) == (torch.bfloat16, torch.bfloat16)
    for got in (autocast, narrow):
        assert F.cosine_similarity(got.float().flatten(), want.flatten(), 0) > 0.995


@pytest.mark.parametrize("kind", MIXERS)
def test_all_parameters_get_their_gradients(kind):
    mixer = randomised(MIXERS[kind]()).train()
    mixer(torch.randn(2, 5, 6, 16)).square().mean().backward()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name
        assert bool((p.grad != 0).any()), name


def test_errors():
    with pytest.raises(ValueError, match=r"d_state, dt_rank and expand \* dim must be at least 1, got 0, 1, 32"):
        SS2D(16, 0)
    with pytest.raises(ValueError, match="routes must be"):
        SS2D(16, routes=("diagonal",))
    with pytest.raises(ValueError, match="merge must be sum, scatter or stack, got 'max'"):
        SS2D(16, merge="max")
    with pytest.raises(ValueError, match="dim must be at least reduction = 8, got 4"):
        ChannelAttention(4)
    with pytest.raises(ValueError, match=r"expand \* dim must be a multiple of num_heads, got 32 and 5"):
        NonCausalSSD(16, 5)

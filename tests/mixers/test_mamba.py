"""Mixers of sequences: the formulas of the papers, initial values, types, errors."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visionbb.kernels import scan_routes
from visionbb.mixers import S6, BidirectionalMamba, LocalMamba, MambaVisionMixer

MIXERS = {
    "bidirectional": BidirectionalMamba,
    "local": lambda dim: LocalMamba(dim, ("column", "window2_reversed")),
    "mambavision": MambaVisionMixer,
}


def randomised(mixer):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.normal_(-1.0 if name.endswith(("A_log", "dt_bias")) else 0.0, 0.5)
    return mixer.eval()


def scanned(s6: S6, u: torch.Tensor) -> torch.Tensor:
    """The scan of one image's u (L, dim), token by token."""
    A, h, out = -s6.A_log.exp(), torch.zeros_like(s6.A_log), []
    for u_t in u:
        low, B, C = (s6.x_proj @ u_t).split(s6.split)
        dt = F.softplus(s6.dt_proj @ low + s6.dt_bias)
        h = torch.exp(dt[:, None] * A) * h + (dt * u_t)[:, None] * B
        out.append(h @ C + s6.D * u_t)
    return torch.stack(out)


def conv(x: torch.Tensor, conv: nn.Module, pad: tuple[int, int]) -> torch.Tensor:
    return F.silu(F.conv1d(F.pad(x.T, pad), conv.weight, conv.bias, groups=x.shape[1]).T)


def test_vims_mixer_scans_the_sequence_and_its_reverse():
    mixer = randomised(BidirectionalMamba(6, d_state=3)).double()
    sequence = torch.randn(1, 11, 6, dtype=torch.float64)
    x, z = mixer.in_proj(sequence)[0].chunk(2, -1)
    past = scanned(mixer.s6, conv(x, mixer.s6.conv, (3, 0)))
    future = scanned(mixer.s6_reverse, conv(x.flip(0), mixer.s6_reverse.conv, (3, 0))).flip(0)
    want = mixer.out_proj(F.silu(z) * (past + future) / 2)[None]
    torch.testing.assert_close(mixer.forward_tokens(sequence, 5, 2), want)
    # A map is read row by row.
    torch.testing.assert_close(mixer(sequence[:, :10].view(1, 5, 2, 6)),
                               mixer.forward_tokens(sequence[:, :10], 5, 2).view(1, 5, 2, 6))


@pytest.mark.parametrize("prefix", [False, True])
def test_localvims_mixer_follows_each_route_through_its_pads(prefix):
    mixer = randomised(LocalMamba(6, ("column", "window2_reversed"), d_state=3)).double()
    H, W = 3, 5
    sequence = torch.randn(1, H * W + prefix, 6, dtype=torch.float64)
    x, z = mixer.in_proj(sequence)[0].chunk(2, -1)
    want = torch.zeros_like(x)
    for s6, route in zip(mixer.s6, scan_routes(mixer.routes, H, W).tolist(), strict=True):
        if prefix:  # behind half of the patches, in the sequence and on the route
            route = [t + (t >= H * W // 2) for t in route]
            route.insert(H * W // 2, H * W // 2)
        walk = torch.stack([x[t] if t >= 0 else torch.zeros_like(x[0]) for t in route])
        y = torch.empty_like(x)
        for t, token in zip(route, scanned(s6, conv(walk, s6.conv, (3, 0))), strict=True):
            if t >= 0:
                y[t] = token * F.silu(z[t])
        want += mixer.attn(y[None, None])[0, 0]
    got = mixer.forward_tokens(sequence, H, W) if prefix else mixer(sequence.view(1, H, W, 6)).view(sequence.shape)
    torch.testing.assert_close(got, mixer.out_proj(want)[None])


def test_mambavisions_mixer_has_a_branch_without_a_scan():
    mixer = randomised(MambaVisionMixer(6, d_state=3)).double()
    tokens = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    x, z = mixer.in_proj(tokens).view(12, 6).chunk(2, -1)
    y = torch.cat((scanned(mixer.s6, conv(x, mixer.s6.conv, (1, 1))), conv(z, mixer.conv, (1, 1))), -1)
    torch.testing.assert_close(mixer(tokens), mixer.out_proj(y).view(1, 3, 4, 6))


@settings(max_examples=20, deadline=None)
@given(H=st.integers(1, 7), W=st.integers(1, 7), kind=st.sampled_from(sorted(MIXERS)))
def test_any_map(H, W, kind):
    mixer = randomised(MIXERS[kind](16))
    x = torch.randn(2, H, W, 16)
    y = mixer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1:], mixer(x[1:]), rtol=1e-4, atol=1e-5)  # images do not mix


def test_initial_time_steps_decays_and_skips_are_mambas():
    s6 = S6(512, nn.Identity(), 16, 32)
    torch.testing.assert_close(s6.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert bool((s6.D == 1).all())
    assert s6.dt_proj.abs().max() <= 32**-0.5
    steps = F.softplus(s6.dt_bias.detach())
    assert 9e-4 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101
    assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.3)  # uniform in the logarithm
    assert s6.no_weight_decay() == {"A_log", "D", "dt_bias"} <= dict(s6.named_parameters()).keys()


@pytest.mark.parametrize("kind", MIXERS)
def test_reduced_precision_stays_near(kind):
    mixer = randomised(MIXERS[kind](16))
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
    mixer = randomised(MIXERS[kind](16)).train()
    mixer(torch.randn(2, 5, 6, 16)).square().mean().backward()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name
        assert bool((p.grad != 0).any()), name


def test_errors():
    with pytest.raises(ValueError, match="d_state and dt_rank must be at least 1, got 0 and 2"):
        S6(8, nn.Identity(), 0, 2)
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        MambaVisionMixer(7)

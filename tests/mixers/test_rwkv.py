"""RWKV's mixers: the formulas of the paper, any map, initial values, types, errors."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from visionbb.mixers import ChannelMix, SpatialMix
from visionbb.mixers.rwkv import q_shift

MIXERS = {"spatial": SpatialMix, "channel": ChannelMix}


def randomised(mixer):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(0, 0.5)
    return mixer.eval()


def test_shift_brings_each_quarter_from_one_side():
    x = torch.arange(1.0, 7).view(1, 2, 3, 1).expand(-1, -1, -1, 4)
    left, right, above, below = q_shift(x)[0].unbind(-1)
    assert left.tolist() == [[0, 1, 2], [0, 4, 5]]
    assert right.tolist() == [[2, 3, 0], [5, 6, 0]]
    assert above.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert below.tolist() == [[4, 5, 6], [0, 0, 0]]


@pytest.mark.parametrize("norm", [False, True])
def test_spatial_mix_is_a_gated_mean_that_decays_with_the_distance(norm):
    H, W, T = 3, 4, 12
    mixer = randomised(SpatialMix(8, norm=norm)).double()
    x = torch.randn(1, H, W, 8, dtype=torch.float64)
    near = q_shift(x)
    k, v, r = (
        linear(x * mix + near * (1 - mix)).flatten(1, 2)[0]
        for linear, mix in (
            (mixer.key, mixer.mix_k), (mixer.value, mixer.mix_v), (mixer.receptance, mixer.mix_r)
        )
    )
    y = torch.empty(T, 8, dtype=torch.float64)
    for t in range(T):
        bias = [mixer.bonus / T if i == t else -(abs(t - i) - 1) * mixer.decay / T for i in range(T)]
        weight = (torch.stack(bias) + k).exp()
        y[t] = (weight * v).sum(0) / (weight.sum(0) + 1e-6)
    if norm:
        y = F.layer_norm(y, (8,), mixer.norm.weight, mixer.norm.bias)
    want = mixer.output(torch.sigmoid(r) * y).view(1, H, W, 8)
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [False, True])
def test_channel_mix_is_a_gated_squared_relu(norm):
    mixer = randomised(ChannelMix(8, mlp_ratio=3, norm=norm)).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    near = q_shift(x)
    hidden = mixer.key(x * mixer.mix_k + near * (1 - mixer.mix_k)).clamp(min=0) ** 2
    if norm:
        hidden = F.layer_norm(hidden, (24,), mixer.norm.weight, mixer.norm.bias)
    gate = torch.sigmoid(mixer.receptance(x * mixer.mix_r + near * (1 - mixer.mix_r)))
    torch.testing.assert_close(mixer(x), gate * mixer.value(hidden), rtol=1e-9, atol=1e-9)


def test_decay_means_the_same_on_maps_of_any_size():
    """Half as strong a decay of a step on a line that is twice as long."""
    mixer = SpatialMix(4)
    with torch.no_grad():
        for linear in (mixer.value, mixer.output):
            linear.weight.copy_(torch.eye(4))
        mixer.key.weight.zero_()
        mixer.receptance.weight.zero_()
        mixer.mix_v.fill_(1)
        mixer.decay.fill_(4)
    x = torch.linspace(0, 1, 500)[None, None, :, None].expand(-1, -1, -1, 4)
    with torch.no_grad():
        short, long = (2 * mixer(x.repeat_interleave(n, 2))[0, 0, 100 * n] for n in (1, 2))  # the gate is 1/2
    torch.testing.assert_close(short, long, rtol=1e-2, atol=0)
    assert bool(((short > 0.25) & (short < 0.45)).all())  # between the token's own 0.2 and the mean of all, 0.5


def test_initial_values_are_rwkvs():
    first, last = (SpatialMix(8, index, 12) for index in (0, 11))
    assert first.decay[0] == last.decay[0] == -5
    assert first.decay[7].item() == last.decay[7].item() == pytest.approx(3)
    assert bool((first.decay[1:7] > last.decay[1:7]).all())  # deep blocks remember for longer
    torch.testing.assert_close(first.bonus[:3], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5]))
    torch.testing.assert_close(first.mix_k, torch.arange(8) / 8)
    torch.testing.assert_close(last.mix_v, (torch.arange(8) / 8) ** (1 / 12) + 0.3)
    torch.testing.assert_close(ChannelMix(8, 3, 12).mix_r, (torch.arange(8) / 8) ** 0.75)


@pytest.mark.parametrize("kind", MIXERS)
def test_vectors_of_channels_are_kept_from_weight_decay(kind):
    mixer = MIXERS[kind](8)
    assert mixer.no_weight_decay() == {name for name, p in mixer.named_parameters() if p.ndim == 1}


@given(H=st.integers(1, 9), W=st.integers(1, 9), kind=st.sampled_from(sorted(MIXERS)))
def test_any_map(H, W, kind):
    mixer = randomised(MIXERS[kind](16))
    x = torch.randn(2, H, W, 16)
    y = mixer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1:], mixer(x[1:]), rtol=1e-4, atol=1e-5)  # images do not mix


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
    mixer = randomised(MIXERS[kind](16, norm=True)).train()
    mixer(torch.randn(2, 5, 6, 16)).square().mean().backward()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name
        assert bool((p.grad != 0).any()), name


@pytest.mark.parametrize("kind", MIXERS)
def test_errors(kind):
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 6"):
        MIXERS[kind](6)

"""Hybrid-scale and self-guided attention against loops over windows and groups, at any size of the map."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.mixers import HybridScaleAttention, LocalSumAttention, SelfGuidedAttention

double = dict(dtype=torch.float64)


def attention(q, k, heads):
    """(B, heads, N, M) of q (B, N, C) and k (B, M, C)."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def weighted(weights, v):
    return (weights @ v.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def hybrid_by_loops(mixer: HybridScaleAttention, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the docstring says, one window after the other."""
    B, H, W, C = x.shape
    size, ratio = mixer.window_size, mixer.sr_ratio
    far_q, q, k, v, local = mixer.in_proj(x).split([C // 2] * 4 + [C], -1)
    padded = F.pad(x, (0, 0, 0, max(ratio - W, 0), 0, max(ratio - H, 0)))
    patches = F.conv2d(padded.permute(0, 3, 1, 2), mixer.reduce.weight, mixer.reduce.bias, ratio)
    h, w = patches.shape[2:]
    keys, values = mixer.kv(F.gelu(mixer.norm(patches.flatten(2).mT))).chunk(2, -1)
    weights = attention(far_q.flatten(1, 2), keys, heads)
    far = weighted(weights, values).view(B, H, W, -1)
    mean = weights.mean((1, 2)).view(B, h, w)
    significance = mean[:, torch.arange(H) * h // H][:, :, torch.arange(W) * w // W]
    near = torch.zeros_like(far)
    for top in range(0, H, size):
        for left in range(0, W, size):
            inside = (slice(None), slice(top, top + size), slice(left, left + size))
            weights = attention(*(t[inside].flatten(1, 2) for t in (q, k)), heads)
            near[inside] = weighted(weights, v[inside].flatten(1, 2)).view(near[inside].shape)
            significance[inside] += weights.mean(1).sum(1).view(significance[inside].shape) / size**2
    return mixer.proj(torch.cat((far, near), -1) + mixer.local(local)), significance


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 9), W=st.integers(1, 9), sr_ratio=st.integers(1, 4), window=st.integers(1, 5),
    heads=st.sampled_from([1, 2]),
)
def test_hybrid_scale_attention_is_far_and_near(H, W, sr_ratio, window, heads):
    torch.manual_seed(0)
    mixer = HybridScaleAttention(8, 2 * heads, sr_ratio, window, **double)
    x = torch.randn(2, H, W, 8, **double)
    y, significance = mixer(x)
    want_y, want_significance = hybrid_by_loops(mixer, x, heads)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(significance, want_significance)
    assert not significance.requires_grad


def test_significance_is_a_share_of_all_attention():
    """Every query gives away one in all, to as many keys as it has: means over whole windows and patches add up."""
    mixer = HybridScaleAttention(8, 4, 2, 4)
    _, significance = mixer(torch.randn(3, 8, 12, 8))
    near, far = 6, 2 * 2  # windows, and tokens a patch
    torch.testing.assert_close(significance.sum((1, 2)), torch.full((3,), float(near + far)))


def groups_by_loops(mixer: SelfGuidedAttention, x: torch.Tensor, significance: torch.Tensor) -> torch.Tensor:
    """One image (N, dim) and its map (N,): token after token by rank."""
    ranked = sorted(range(len(x)), key=lambda i: significance[i].item())
    keys, cut, left = [], 0, []
    for group, share in zip(mixer.groups, mixer.quarters, strict=True):
        last, size = group is mixer.groups[-1], group.in_features
        stop = len(ranked) if last else len(x) // 4 * (cut + share)
        part = left + ranked[len(x) // 4 * cut : stop]
        cut += share
        tokens = [x[i] for i in part]
        if last:
            tokens = [torch.zeros_like(x[0])] * (-len(tokens) % size) + tokens
        whole = len(tokens) - len(tokens) % size
        left = part[whole:]
        for first in range(0, whole, size):
            weights = group.weight[0]
            keys.append(sum(w * t for w, t in zip(weights, tokens[first : first + size], strict=True)) + group.bias)
    return torch.stack(keys)


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 60), parts=st.sampled_from([((6, 4, 2), (1, 2, 1)), ((2, 1), (2, 2)), ((3, 5), (3, 1))]))
def test_groups_follow_the_ranks(N, parts):
    torch.manual_seed(0)
    mixer = SelfGuidedAttention(4, 2, *parts, **double)
    x, significance = torch.randn(2, N, 4, **double), torch.rand(2, N, **double)
    want = torch.stack([groups_by_loops(mixer, *image) for image in zip(x, significance, strict=True)])
    torch.testing.assert_close(mixer.grouped(x, significance), want)


def test_the_significant_half_keeps_its_tokens():
    mixer = SelfGuidedAttention(1, 1, (2, 1), (2, 2))
    for group in mixer.groups:
        torch.nn.init.ones_(group.weight)
        torch.nn.init.zeros_(group.bias)
    x, significance = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128]), torch.tensor([7.0, 0, 6, 1, 5, 2, 4, 3])
    got = mixer.grouped(x[None, :, None], significance[None])[0, :, 0]
    assert got.tolist() == [2 + 8, 32 + 128, 64, 16, 4, 1]


def test_keys_are_the_same_whichever_way_the_map_is_read():
    """So the authors' second set of keys, from the transposed map, is the first again."""
    mixer = SelfGuidedAttention(8, 2, (6, 4, 2), (1, 2, 1))
    x, significance = torch.randn(2, 6, 8, 8), torch.rand(2, 6, 8)
    by_rows = mixer.grouped(x.flatten(1, 2), significance.flatten(1))
    by_columns = mixer.grouped(x.transpose(1, 2).flatten(1, 2), significance.mT.flatten(1))
    torch.testing.assert_close(by_columns, by_rows, rtol=0, atol=0)


def test_self_guided_attention_is_attention_to_the_groups():
    torch.manual_seed(0)
    mixer = SelfGuidedAttention(8, 2, (6, 4, 2), (1, 2, 1), **double)
    x, significance = torch.randn(2, 5, 7, 8, **double), torch.rand(2, 5, 7)
    q, local = mixer.in_proj(x).chunk(2, -1)
    k, v = mixer.kv(mixer.grouped(x.flatten(1, 2), significance.flatten(1))).chunk(2, -1)
    y = weighted(attention(q.flatten(1, 2), k, 2), v).view(x.shape)
    torch.testing.assert_close(mixer(x, significance), mixer.proj(y + mixer.local(local)))


def test_plain_attention_with_a_convolution():
    torch.manual_seed(0)
    mixer = LocalSumAttention(8, 2, **double)
    x = torch.randn(2, 5, 7, 8, **double)
    q, k, v, local = mixer.in_proj(x).chunk(4, -1)
    y = weighted(attention(q.flatten(1, 2), k.flatten(1, 2), 2), v.flatten(1, 2)).view(x.shape)
    torch.testing.assert_close(mixer(x), mixer.proj(y + mixer.local(local)))


def test_gradients_pass_windows_patches_and_groups():
    torch.manual_seed(0)
    hybrid, guided = HybridScaleAttention(4, 2, 2, 2, **double), SelfGuidedAttention(4, 2, (2, 1), (2, 2), **double)
    x, significance = torch.randn(1, 3, 3, 4, requires_grad=True, **double), torch.rand(1, 3, 3)
    assert torch.autograd.gradcheck(lambda x: hybrid(x)[0], x)
    assert torch.autograd.gradcheck(lambda x: guided(x, significance), x)


@pytest.mark.parametrize(
    ("cls", "args", "message"),
    [
        (LocalSumAttention, (10, 4), "dim must be a multiple of num_heads, got 10 and 4"),
        (HybridScaleAttention, (9, 3, 2), "num_heads must be even, got 3"),
        (HybridScaleAttention, (8, 2, 0), "sr_ratio and window_size must be at least 1, got 0 and 7"),
        (SelfGuidedAttention, (8, 2, (2, 0), (2, 2)), r"group_sizes must be at least 1, got \(2, 0\)"),
        (SelfGuidedAttention, (8, 2, (2, 1), (2, 1)), r"four in sum, got \(2, 1\)"),
        (SelfGuidedAttention, (8, 2, (2, 1), (1, 2, 1)), r"one number a part \(2\)"),
    ],
)
def test_errors(cls, args, message):
    with pytest.raises(ValueError, match=message):
        cls(*args)

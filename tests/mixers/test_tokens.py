"""Mixers on sequences: prefix tokens attend like all others, but have no place on the map."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.mixers import AgentAttention, GaussianAttention, LinearAttention, SoftmaxAttention

H, W, HEADS, D = 4, 6, 2, 3
DIM, N = HEADS * D, H * W

KINDS = {
    "softmax": lambda P: SoftmaxAttention(DIM, HEADS, local_kernel=3, gate="mul"),
    "linear": lambda P: LinearAttention(DIM, HEADS, local_kernel=5, share_local=True, key_pos_size=(2, 3)),
    "flow": lambda P: LinearAttention(DIM, HEADS, "sigmoid", "flow", "none", local_kernel=3),
    "agent": lambda P: AgentAttention(DIM, HEADS, num_agents=4, map_size=(3, 5), prefix_tokens=P),
    "gaussian": lambda P: GaussianAttention(DIM, HEADS, ratio=2),
    "gaussian, normalized": lambda P: GaussianAttention(DIM, HEADS, ratio=2, normalized=True),
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def mixer(kind: str, P: int) -> nn.Module:
    torch.manual_seed(0)
    module = KINDS[kind](P).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module


def tokens(P: int) -> torch.Tensor:
    return torch.randn(2, P + N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@by_kind
def test_without_prefix_tokens_a_sequence_is_its_map(kind):
    module, x = mixer(kind, 0), tokens(0)
    y = module.forward_tokens(x, H, W)
    torch.testing.assert_close(y.unflatten(1, (H, W)), module(x.unflatten(1, (H, W))))
    one_row = module.forward_tokens(x, 1, N)
    assert not torch.allclose(one_row, y)
    torch.testing.assert_close(one_row, module(x.unsqueeze(1)).squeeze(1))


@by_kind
@pytest.mark.parametrize("P", [1, 2])
def test_prefix_tokens_attend_and_are_attended_to(kind, P):
    module, x = mixer(kind, P), tokens(P).requires_grad_()
    y = module.forward_tokens(x, H, W)
    assert y.shape == x.shape
    seen = torch.autograd.grad(y[:, :P].square().sum(), x, retain_graph=True)[0]
    assert (seen.abs().amax(-1) > 0).all()
    given = torch.autograd.grad(y[:, P:].square().sum(), x)[0]
    assert (given[:, :P].abs().amax(-1) > 0).all()


@by_kind
def test_prefix_tokens_have_no_place(kind):
    """They may change places among themselves: the tokens of the map stay as they are."""
    module, x = mixer(kind, 2), tokens(2)
    if kind == "agent":  # whose two prefix tokens have biases of their own
        with torch.no_grad():
            for bias in module.biases:
                bias.prefix[..., 1] = bias.prefix[..., 0]
    y = module.forward_tokens(x, H, W)
    swapped = module.forward_tokens(torch.cat((x[:, :2].flip(1), x[:, 2:]), 1), H, W)
    torch.testing.assert_close(swapped[:, 2:], y[:, 2:])
    torch.testing.assert_close(swapped[:, :2], y[:, :2].flip(1))


def heads(x):
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def conv(v, weight, bias=None):
    """A depthwise convolution of the map behind one prefix token, (B, 1 + N, DIM)."""
    maps = v[:, 1:].transpose(1, 2).unflatten(2, (H, W))
    y = F.conv2d(maps, weight, bias, padding=1, groups=DIM).flatten(2).transpose(1, 2)
    return torch.cat((torch.zeros_like(v[:, :1]), y), 1)


def test_agents_with_a_class_token():
    """softmax(q A + B2) softmax(A k + B1) v, agents A the means of the map's queries over a grid of 2 x 2 cells."""
    module, x = mixer("agent", 1), tokens(1)
    q, k, v = module.qkv(x).chunk(3, -1)
    agents = q[:, 1:].unflatten(1, (2, H // 2, 2, W // 2)).mean((2, 4)).flatten(1, 2)

    def bias(part):
        of_map = (
            F.interpolate(part.table, (H, W), mode="bilinear") + F.interpolate(part.rows, (H, 1), mode="bilinear")
            + F.interpolate(part.cols, (1, W), mode="bilinear")
        )
        return torch.cat((part.prefix, of_map.flatten(2)), -1)

    collect, hand_out = (bias(part) for part in module.biases)
    q, k, values, agents = heads(q), heads(k), heads(v), heads(agents)
    collected = (agents @ k.mT * D**-0.5 + collect).softmax(-1) @ values
    y = (q @ agents.mT * D**-0.5 + hand_out.mT).softmax(-1) @ collected
    y = y.transpose(1, 2).flatten(2) + conv(v, module.local.weight, module.local.bias)
    torch.testing.assert_close(module.forward_tokens(x, H, W), module.proj(y))


@pytest.mark.parametrize("tokens_of_map", [0, 2])
def test_agents_biases_are_for_a_number_of_prefix_tokens(tokens_of_map):
    with pytest.raises(ValueError, match=f"a map must follow 1 prefix tokens, which have biases, got {tokens_of_map}"):
        mixer("agent", 1).forward_tokens(tokens(tokens_of_map), H, W)


def test_gaussian_kernels_with_a_class_token():
    """K(q, l) K(l, l)^-1 K(l, q) v over all tokens, landmarks l patches of the map alone."""
    module, x = mixer("gaussian", 1), tokens(1)
    q, v = module.qv(x).chunk(2, -1)
    queries = heads(q) * D**-0.25
    maps = queries[:, :, 1:].unflatten(2, (H, W)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    pooled = F.conv2d(maps, module.landmarks.weight, stride=2).flatten(2).mT.unflatten(0, (-1, HEADS))
    pooled = F.gelu(F.layer_norm(pooled, (D,), module.norm.weight, module.norm.bias, 1e-5))

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2)

    among = kernel(pooled, pooled) + 0.01 * torch.eye(pooled.shape[2], dtype=torch.float64)
    y = kernel(queries, pooled) @ torch.linalg.solve(among, kernel(pooled, queries)) @ heads(v)
    y = y.transpose(1, 2).flatten(2) + conv(v, module.local.repeat_interleave(D, 0))
    torch.testing.assert_close(module.forward_tokens(x, H, W), module.proj(y), rtol=1e-4, atol=1e-4)

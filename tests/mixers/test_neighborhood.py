"""Neighborhood attention as a module: small maps, and what it makes of its arguments."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import na2d
from visionbb.mixers import NeighborhoodAttention, RelativeAttention

DIM, HEADS = 8, 2
lengths, kernels, dilations = st.integers(1, 9), st.integers(1, 5), st.integers(1, 3)


def mixer(kernel_size=3, dilation=1, **kwargs) -> NeighborhoodAttention:
    """With weights that make qkv bias and position bias matter."""
    torch.manual_seed(0)
    module = NeighborhoodAttention(DIM, HEADS, kernel_size, dilation, **kwargs).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def tokens(H: int, W: int) -> torch.Tensor:
    return torch.randn(2, H, W, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(H * 100 + W))


def by_hand(module: NeighborhoodAttention, qkv: torch.Tensor, **kwargs) -> torch.Tensor:
    """From (B, H, W, 3 * DIM) on."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(3)
    return module.proj(na2d(q, k, v, module.kernel_size, module.dilation, rpb=module.rpb, **kwargs).flatten(3))


@settings(deadline=None, max_examples=40)
@given(H=lengths, W=lengths, kernel=st.tuples(kernels, kernels), dilation=st.tuples(dilations, dilations))
def test_natten14_pads_the_input_of_the_projection_with_zeros(H, W, kernel, dilation):
    module, x = mixer(kernel, dilation, pad_mode="natten14"), tokens(H, W)
    pad = [max(k * d - n, 0) for k, d, n in zip(kernel, dilation, (H, W))]
    # A zero token projected is the qkv bias: it is a key like any other, and no query.
    qkv = module.qkv.bias.expand(2, H + pad[0], W + pad[1], 3 * DIM).clone()
    qkv[:, :H, :W] = module.qkv(x)
    torch.testing.assert_close(module(x), by_hand(module, qkv)[:, :H, :W])


def test_natten14_in_the_words_of_plain_attention():
    """A 2 x 3 map under a 5 x 5 window: 6 tokens and 19 copies of the bias, all of them keys of every query."""
    module, x = mixer(5), tokens(2, 3)
    q, k, v = module.qkv(F.pad(x, (0, 0, 0, 2, 0, 3))).reshape(2, 25, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    at = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"), -1).reshape(25, 2)
    offset = at[None] - at[:, None] + 4  # key - query
    scores = q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5 + module.rpb[:, offset[..., 0], offset[..., 1]]
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 5, DIM)[:, :2, :3]
    torch.testing.assert_close(module(x), module.proj(out))


@settings(deadline=None, max_examples=40)
@given(H=lengths, W=lengths, kernel=st.tuples(kernels, kernels), dilation=st.tuples(dilations, dilations))
def test_mask_lets_windows_shrink_to_the_map(H, W, kernel, dilation):
    module, x = mixer(kernel, dilation, pad_mode="mask"), tokens(H, W)
    torch.testing.assert_close(module(x), by_hand(module, module.qkv(x), clip=True))


@pytest.mark.parametrize(("H", "W"), [(1, 1), (2, 3), (4, 4)])
def test_mask_on_a_map_within_one_window_is_attention_to_all_of_it(H, W):
    module = mixer(5, pad_mode="mask")
    whole = RelativeAttention(DIM, HEADS, (H, W)).double()
    rpb = module.rpb[:, 5 - H : 4 + H, 5 - W : 4 + W]  # the offsets that the map has
    whole.load_state_dict({**module.state_dict(), "rpb": rpb})
    torch.testing.assert_close(module(tokens(H, W)), whole(tokens(H, W)))


@pytest.mark.parametrize(("H", "W", "axis"), [(5, 9, "5, its height"), (9, 5, "5, its width")])
def test_error_names_the_window_and_the_map(H, W, axis):
    with pytest.raises(ValueError, match=rf"kernel_size \* dilation must fit the map: 3 \* 2 > {axis}"):
        mixer(3, 2, pad_mode="error")(tokens(H, W))


def test_modes_agree_where_the_window_fits():
    x = tokens(6, 7)
    outs = [mixer(3, 2, pad_mode=mode)(x) for mode in ("natten14", "mask", "error")]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_padding_without_qkv_bias_adds_keys_of_zero():
    module, x = mixer(3, qkv_bias=False), tokens(1, 1)
    q, k, v = module.qkv(x).reshape(2, 3, HEADS, -1).unbind(1)
    score = (q * k).sum(-1) * (DIM // HEADS) ** -0.5 + module.rpb[:, 2, 2]
    others = module.rpb[:, 2:, 2:].exp().sum((1, 2)) - module.rpb[:, 2, 2].exp()
    weight = score.exp() / (score.exp() + others)
    torch.testing.assert_close(module(x)[:, 0, 0], module.proj((weight[..., None] * v).flatten(1)))


@pytest.mark.parametrize("pad_mode", ["natten14", "mask"])
def test_gradients_on_a_padded_map(pad_mode):
    module = mixer(3, 2, pad_mode=pad_mode)
    torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(module, dict(zip(("rpb", "qkv.bias"), p)), x),
        (tokens(3, 7)[:1].requires_grad_(), module.rpb, module.qkv.bias),
        fast_mode=True,
    )


def test_disc_windows_need_no_padding():
    module = mixer(5, 2, window="disc", pad_mode="natten14")
    x = tokens(3, 4)
    torch.testing.assert_close(module(x), by_hand(module, module.qkv(x), window="disc"))


@pytest.mark.parametrize(
    "kwargs", [{}, {"window": "disc"}, {"is_causal": True, "rel_pos_bias": False}, {"stride": 2}, {"pad_mode": "mask"}]
)
def test_scripted_modules_agree(kwargs):
    module = mixer(3, 1, **kwargs)
    scripted = torch.jit.script(module)
    for H, W in ((2, 5), (6, 4)):
        torch.testing.assert_close(scripted(tokens(H, W)), module(tokens(H, W)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "dim must be a multiple of num_heads, got 8 and 3"),
        ({"pad_mode": "zeros"}, "pad_mode must be one of natten14, mask, error, got 'zeros'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**{"dim": 8, "num_heads": 2, **kwargs})
    if "num_heads" in kwargs:
        with pytest.raises(ValueError, match=message):
            RelativeAttention(8, 3)


def test_attention_to_the_whole_map_resamples_its_table():
    module = RelativeAttention(DIM, HEADS, (3, 4)).double()
    other = RelativeAttention(DIM, HEADS, (5, 2)).double()
    rpb = F.interpolate(module.rpb[None].float(), (9, 3), mode="bicubic", align_corners=False)[0]
    other.load_state_dict({**module.state_dict(), "rpb": rpb})
    torch.testing.assert_close(module(tokens(5, 2)), other(tokens(5, 2)))


def test_position_bias_is_kept_from_weight_decay():
    assert mixer().no_weight_decay() == {"rpb"}
    assert RelativeAttention(DIM, HEADS).no_weight_decay() == {"rpb"}

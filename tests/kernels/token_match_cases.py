"""Random cases of `token_match`, and what is right of them: of the portable path and of the kernel."""
from __future__ import annotations

import torch
from hypothesis import strategies as st

from visionbb.kernels.token_match import reference


@st.composite
def cases(draw, images: int, tokens: tuple[int, int], channels: int):
    """Up to so many images, source tokens from the first to the second number, destinations, channels."""
    few, many = tokens
    return dict(
        shape=(draw(st.integers(1, images)), draw(st.integers(few, many)), draw(st.integers(1, many)),
               draw(st.integers(1, channels))),
        weight=draw(st.booleans()), masked=draw(st.sampled_from([None, 0.3, 1.0])),
        affinity=draw(st.sampled_from(["cosine", "shifted"])), seed=draw(st.integers(0, 999)),
    )


def arguments(case, dtype, device="cpu"):
    """Sources and destinations as they alternate in one tensor, a token of norm zero among each."""
    generator = torch.Generator().manual_seed(case["seed"])
    B, N, M, D = case["shape"]
    tokens = torch.randn(B, 2 * max(N, M), 2 * D, generator=generator, dtype=torch.float64)
    tokens[0, :2] = 0
    tokens = tokens.to(device, dtype)
    weight = torch.rand(B, M, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    masked = torch.rand(B, M, generator=generator).to(device) < (case["masked"] or 0)
    kwargs = dict(
        dst_weight=weight if case["weight"] else None, dst_mask=~masked if case["masked"] else None,
        affinity=case["affinity"],
    )
    return (tokens[:, : 2 * N : 2, D:], tokens[:, 1 : 2 * M : 2, D:]), kwargs


def check(got, args, kwargs, tolerance):
    """Against the definition in float64; an index is right if the affinity there is the largest, up to rounding."""
    (score, index), (src, dst) = got, (x.double() for x in args)
    weight, mask, affinity = kwargs.values()
    want, first = reference.token_match(src, dst, weight, mask, affinity)
    torch.testing.assert_close(score.double(), want, rtol=tolerance, atol=tolerance)
    chosen = dst.gather(1, index[..., None].expand(src.shape))
    weight, mask = (None if x is None else x.gather(1, index).view(-1, 1) for x in (weight, mask))
    src, chosen = src.reshape(-1, 1, src.shape[2]), chosen.flatten(0, 1)[:, None]
    there, _ = reference.token_match(src, chosen, weight, mask, affinity)
    torch.testing.assert_close(there.view(want.shape), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(index[want == float("-inf")], first[want == float("-inf")])

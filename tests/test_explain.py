"""The hidden attention of scans: the paper's formula, the scans' own answers, any block that scans."""
from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionbb import kernels
from visionbb.explain import hidden_attention, row_as_map
from visionbb.mixers import S6, SS2D, BidirectionalMamba, MambaVisionMixer

L, DIM, N = 12, 6, 3


def s6(reverse=False) -> S6:
    torch.manual_seed(0)
    return S6(DIM, nn.Identity(), N, 2, reverse).double()


def sequence(images=2, length=L):
    return torch.randn(images, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def as_the_paper_writes_it(mixer: S6, u: torch.Tensor) -> torch.Tensor:
    """alpha (dim, L, L) of one image's u (L, dim), by its definition."""
    low, B, C = (u @ mixer.x_proj.T).split(mixer.split, -1)
    dt, A = F.softplus(low @ mixer.dt_proj.T + mixer.dt_bias), -mixer.A_log.exp()
    length, alpha = len(u), u.new_zeros(u.shape[1], len(u), len(u))
    for i in range(length):
        between = range(i, length) if mixer.reverse else range(i, -1, -1)
        decay = torch.ones_like(A)
        for j in between:
            alpha[:, i, j] = (C[i] * decay * dt[j, :, None] * B[j]).sum(-1)
            decay = decay * torch.exp(dt[j, :, None] * A)
    return alpha


@pytest.mark.parametrize("reverse", [False, True])
def test_the_papers_formula(reverse):
    mixer, x = s6(reverse), sequence()
    (found,) = hidden_attention(mixer, x, mean=False).values()
    assert found.shape == (2, 1, DIM, L, L)
    for image in range(2):
        torch.testing.assert_close(found[image, 0], as_the_paper_writes_it(mixer, F.silu(x[image])))
    torch.testing.assert_close(hidden_attention(mixer, x)[""], found.mean(2))
    seen = found[0, 0, 0] != 0
    assert torch.equal(seen, torch.ones(L, L).triu().bool() if reverse else torch.ones(L, L).tril().bool())


@pytest.mark.parametrize("reverse", [False, True])
def test_the_matrix_sums_the_tokens_to_the_scans_result(reverse):
    mixer, x = s6(reverse), sequence()
    alpha, u = hidden_attention(mixer, x, mean=False)[""][:, 0], F.silu(x)
    torch.testing.assert_close(torch.einsum("bdij,bjd->bid", alpha, u) + mixer.D * u, mixer(x))


class Frozen(nn.Module):
    """A scan whose time steps, B and C stay as they are."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        shapes = dict(delta=(1, L, DIM), A=(DIM, N), B=(1, L, N), C=(1, L, N), D=(DIM,))
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape, dtype=torch.float64, generator=generator))

    def forward(self, u):
        return kernels.selective_scan(
            u, self.delta, -self.A.exp(), self.B, self.C, self.D, delta_softplus=True
        )


def test_the_matrix_is_the_derivative_of_the_scan():
    model, u = Frozen(), sequence(1)
    alpha = hidden_attention(model, u, mean=False)[""][0, 0]
    jacobian = torch.autograd.functional.jacobian(model, u)[0, :, :, 0]  # (i, channel of y, j, channel of u)
    want = torch.stack([alpha[d] + model.D[d] * torch.eye(L) for d in range(DIM)])
    torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=3).permute(2, 0, 1), want)


@pytest.mark.parametrize(("routes", "merge"), [(("cross",), "sum"), (("snake_row", "window2"), "sum"),
                                               (("bidirectional", "column"), "stack"), (("atrous2",), "scatter")])
@pytest.mark.parametrize(("H", "W"), [(4, 3), (5, 6)])
def test_scans_of_maps_along_any_routes(routes, merge, H, W):
    torch.manual_seed(0)
    mixer = SS2D(8, 2, 2.0, routes=routes, merge=merge).double()
    with torch.no_grad():
        mixer.D.normal_()
    heard = {}
    mixer.conv.register_forward_hook(lambda module, args, output: heard.update(u=F.silu(output)))
    after = mixer.attn if merge == "stack" else mixer.norm
    after.register_forward_pre_hook(lambda module, args: heard.update(y=args[0]))
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    alpha = hidden_attention(mixer, x, mean=False)[""]
    u, y = heard["u"].flatten(1, 2), heard["y"].flatten(1, 2)
    K = 1 if merge == "scatter" else len(mixer.D)
    assert alpha.shape == (2, K, 16, H * W, H * W)
    got = torch.einsum("bkdij,bjd->bikd", alpha, u)
    if merge == "scatter":  # a token is on one of the routes, whose D it has
        table = kernels.scan_routes(routes, H, W)
        of_token = torch.stack([(table == token).any(1).int().argmax() for token in range(H * W)])
        torch.testing.assert_close(got[:, :, 0] + mixer.D[of_token] * u, y)
    else:
        got = got + mixer.D * u[:, :, None]
        torch.testing.assert_close(got if merge == "stack" else got.sum(2), y)


def test_vims_class_token_hears_all_patches_but_itself_twice():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny", embed_dim=16, depth=3, d_state=4, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    logits = model(images)
    found = hidden_attention(model, images, ["blocks.1"])
    assert list(found) == ["blocks.1.mixer.s6", "blocks.1.mixer.s6_reverse"]
    past, future = (alpha[0, 0, 8] for alpha in found.values())
    assert torch.equal(past != 0, torch.arange(17) <= 8)
    assert torch.equal(future != 0, torch.arange(17) >= 8)
    assert len(hidden_attention(model, images)) == 6
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_mixers_that_scan():
    x = torch.randn(2, 3, 4, 16)
    assert [a.shape for a in hidden_attention(BidirectionalMamba(16), x).values()] == 2 * [(2, 1, 12, 12)]
    assert [a.shape for a in hidden_attention(MambaVisionMixer(16), x).values()] == [(2, 1, 12, 12)]


@pytest.mark.parametrize(("name", "modules", "count"), [
    ("vmamba_tiny", ["stages.2"], 1), ("mambavision_tiny", ["stages.2", "stages.3"], 2),
    ("efficient_vmamba_tiny", [""], 2), ("plainmamba_l1", [""], 1), ("local_vim_tiny", ["blocks.0"], 4),
])
def test_families_that_scan(name, modules, count):
    column = dict(depth=1) if name in ("plainmamba_l1", "local_vim_tiny") else dict(depths=(1, 1, 1, 1))
    model = timm.create_model(name, **column).eval()
    found = hidden_attention(model, torch.randn(1, 3, 64, 64), modules)
    assert len(found) == count
    assert all(alpha.isfinite().all() and alpha.ndim == 4 for alpha in found.values())


def test_a_row_as_a_map():
    alpha = torch.arange(2 * 100.0).view(1, 2, 10, 10) - 50  # 3 x 3 patches and a class token behind four of them
    row = alpha[0, :, 4].abs().sum(0)
    assert row_as_map(alpha).tolist() == [[row[:3].tolist(), [row[3], row[5], row[6]], row[7:].tolist()]]
    assert row_as_map(alpha[..., :9, :9], 7).flatten().tolist() == alpha[0, :, 7, :9].abs().sum(0).tolist()
    with pytest.raises(ValueError, match="alpha must be of a square map, with or without a class token, got 8 tokens"):
        row_as_map(alpha[..., :8, :8])
    with pytest.raises(ValueError, match="token must be within 0 and 9, got 10"):
        row_as_map(alpha, 10)


def test_errors():
    with pytest.raises(ValueError, match="modules must be names of modules of the model, got 'blocks'"):
        hidden_attention(s6(), sequence(), ["conv", "blocks"])
    with pytest.raises(ValueError, match="no scan ran in the modules 'conv' of S6"):
        hidden_attention(s6(), sequence(), ["conv"])

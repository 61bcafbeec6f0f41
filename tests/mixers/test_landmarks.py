"""Gaussian attention and its Newton inverse, agent attention."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visionbb.kernels import use
from visionbb.mixers import AgentAttention, GaussianAttention
from visionbb.mixers.landmarks import gaussian_kernel, newton_inverse, normalized_start

SMALL = {
    "plain": lambda **kw: GaussianAttention(16, 2, 2, **kw),
    "normalized": lambda **kw: GaussianAttention(16, 2, 2, local_kernel=5, normalized=True, **kw),
    "agent": lambda **kw: AgentAttention(16, 2, num_agents=9, map_size=(5, 4), **kw),
    "agent without biases": lambda **kw: AgentAttention(16, 2, num_agents=4, map_size=None, **kw),
}


def mixer(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    module = SMALL[name](**kwargs).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return module


def landmark_kernel(m=9, spread=1.0, heads=2, batch=3):
    points = spread * torch.randn(batch, heads, m, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    return gaussian_kernel(points, points)


# ---- Gaussian attention ---------------------------------------------------------------------------------------------

@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_kernel_of_two_sets_of_points(n, m, d):
    a, b = torch.randn(2, n, d, dtype=torch.float64), torch.randn(2, m, d, dtype=torch.float64)
    torch.testing.assert_close(gaussian_kernel(a, b), torch.exp(-torch.cdist(a, b).square() / 2))


@pytest.mark.parametrize("normalized", [False, True])
def test_gaussian_attention_as_the_papers_write_it(normalized):
    """Nystrom's approximation with a true inverse: these landmarks lie far enough apart for Newton's to converge."""
    module = mixer("normalized" if normalized else "plain").double()
    with torch.no_grad():
        module.norm.weight.fill_(6.0)
    x = torch.randn(2, 6, 4, 16, dtype=torch.float64)
    q, v = (t.unflatten(-1, (2, 8)) for t in module.qv(x).chunk(2, -1))
    q = q / 8**0.25
    maps = q.permute(0, 3, 4, 1, 2)
    landmarks = torch.stack([module.landmarks(maps[:, head]).flatten(2).transpose(1, 2) for head in range(2)], 1)
    landmarks = F.gelu(F.layer_norm(landmarks, (8,), module.norm.weight, module.norm.bias, 1e-5))
    q, tokens = (t.flatten(1, 2).transpose(1, 2) for t in (q, v))

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 2)

    among = kernel(landmarks, landmarks)
    if normalized:
        sums = among.sum(-1)
        middle = among.inverse() / (sums[..., :, None] * sums[..., None, :]).sqrt()
    else:
        middle = (among + 0.01 * torch.eye(6, dtype=torch.float64)).inverse()
    y = kernel(q, landmarks) @ middle @ kernel(landmarks, q) @ tokens
    side = module.local.shape[-1]
    local = torch.stack(
        [F.conv2d(v[..., i, :].permute(0, 3, 1, 2).flatten(0, 1)[:, None], module.local[i][None], padding=side // 2)
         .view(2, 8, 6, 4).permute(0, 2, 3, 1) for i in range(2)], 3)
    y = y.transpose(1, 2).reshape(2, 6, 4, 16) + local.flatten(3)
    torch.testing.assert_close(module(x), module.proj(y), rtol=1e-6, atol=1e-6)


def test_newton_inverse_and_its_gradient():
    matrix = landmark_kernel(spread=1.5).requires_grad_()
    inverse = newton_inverse(matrix, 1 / matrix.detach().sum(-1).amax(-1)[..., None, None].square(), 30)
    torch.testing.assert_close(inverse, matrix.inverse())
    weights = torch.randn_like(matrix)
    (gradient,) = torch.autograd.grad((inverse * weights).sum(), matrix)
    torch.testing.assert_close(gradient, torch.autograd.grad((matrix.inverse() * weights).sum(), matrix)[0])


def test_gradient_of_an_inverse_that_has_not_converged_is_the_analytic_one():
    matrix = landmark_kernel(spread=0.2).requires_grad_()
    inverse = newton_inverse(matrix, torch.tensor(0.01, dtype=torch.float64), 5)
    assert (inverse @ matrix - torch.eye(9)).abs().max() > 0.5
    weights = torch.randn_like(matrix)
    (gradient,) = torch.autograd.grad((inverse * weights).sum(), matrix)
    transposed = inverse.detach().transpose(-2, -1)
    torch.testing.assert_close(gradient, -transposed @ weights @ transposed)


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("m", [2, 9, 49])
def test_the_normalized_start_is_that_of_the_loop(spread, m):
    """Halved while a column of I - start M^2 has too large a sum, as written, image by image."""
    matrices = landmark_kernel(m, spread)
    eye = torch.eye(m, dtype=torch.float64)
    for matrix, start in zip(matrices, normalized_start(matrices)[:, 0, 0, 0]):
        alpha, halvings = 2 / matrix.sum(-1).max() ** 2, 0
        while (eye - matrix @ (alpha * matrix)).abs().sum(-2).max() > 1.01 and halvings < 10:
            alpha, halvings = alpha / 2, halvings + 1
        torch.testing.assert_close(start, alpha)
    if m == 49:
        assert (halvings == 8) == (spread < 0.5)  # the most there can be: all entries of M near 1


def test_an_image_does_not_depend_on_its_batch():
    module, x = mixer("normalized"), torch.randn(3, 6, 6, 16) * torch.tensor([0.1, 1.0, 3.0])[:, None, None, None]
    torch.testing.assert_close(module(x), torch.cat([module(image) for image in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_landmarks_are_whole_patches():
    """What is beyond the last whole patch makes no landmark; a map smaller than a patch is padded to one."""
    module, x = mixer("plain"), torch.randn(1, 2, 5, 5, 8)
    torch.testing.assert_close(module.pooled(x), module.pooled(x[:, :, :4, :4]))
    padded = F.pad(x[:, :, :1, :2], (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(module.pooled(x[:, :, :1, :3]), module.pooled(padded))


def test_half_precision_keeps_its_kernels_exact():
    module, x = mixer("plain"), torch.randn(2, 8, 8, 16)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.1 * exact.abs().max()
    assert (module.bfloat16()(x.bfloat16()) - exact).abs().max() < 0.1 * exact.abs().max()


# ---- Agent attention ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["agent", "agent without biases"])
def test_agent_attention_as_the_paper_writes_it(name):
    module, x = mixer(name).double(), torch.randn(2, 5, 4, 16, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 8)).flatten(1, 2).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    agents = F.adaptive_avg_pool2d(module.qkv(x)[..., :16].permute(0, 3, 1, 2), module.side)
    agents = agents.flatten(2).unflatten(1, (2, 8)).transpose(2, 3)
    biases = [0, 0]
    if module.biases is not None:
        for i, bias in enumerate(module.biases):
            table = F.interpolate(bias.table.float(), size=(5, 4), mode="bilinear")
            biases[i] = (table + bias.rows + bias.cols).flatten(2)
        biases[1] = biases[1].transpose(1, 2)
    collected = (8**-0.5 * agents @ k.transpose(2, 3) + biases[0]).softmax(-1) @ v
    y = (8**-0.5 * q @ agents.transpose(2, 3) + biases[1]).softmax(-1) @ collected
    y = y.transpose(1, 2).reshape(2, 5, 4, 16)
    v = v.transpose(1, 2).reshape(2, 5, 4, 16)
    local = F.conv2d(v.permute(0, 3, 1, 2), module.local.weight, module.local.bias, padding=1, groups=16)
    torch.testing.assert_close(module(x), module.proj(y + local.permute(0, 2, 3, 1)), rtol=1e-6, atol=1e-6)


def test_biases_follow_the_map():
    module = mixer("agent")
    bias = module.biases[0]
    with torch.no_grad():
        bias.table.zero_()
        bias.cols.zero_()
        bias.rows.copy_(torch.arange(5.0).view(5, 1).expand_as(bias.rows))
    assert bias(5, 4).shape == (2, 9, 20)
    doubled = bias(10, 3).view(2, 9, 5, 2, 3)
    torch.testing.assert_close(doubled.mean(3)[:, :, 1:-1], torch.arange(1.0, 4)[:, None].expand(2, 9, 3, 3))


# ---- Both -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SMALL)
def test_any_map_any_path_and_gradients(name):
    for H, W in ((1, 1), (1, 5), (7, 3)):
        module = mixer(name)
        x = torch.randn(2, H, W, 16, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        with use("reference"):
            torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", SMALL)
def test_scripts(name):
    module, x = mixer(name), torch.randn(2, 6, 4, 16)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("name", ["normalized", "agent"])
def test_compiles_in_one_graph(name):
    module, x = mixer(name), torch.randn(2, 6, 4, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@pytest.mark.parametrize("name", ["normalized", "agent"])
def test_exports(name):
    module, x = mixer(name), torch.randn(2, 6, 4, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=8)},))
    x = torch.randn(5, 6, 4, 16)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianAttention(16, 3, 2), "dim must be a multiple of num_heads, got 16 and 3"),
        (lambda: GaussianAttention(16, 2, 0), "ratio must be at least 1, got 0"),
        (lambda: GaussianAttention(16, 2, 2, local_kernel=4), "local_kernel must be odd, got 4"),
        (lambda: AgentAttention(16, 3), "dim must be a multiple of num_heads, got 16 and 3"),
        (lambda: AgentAttention(16, 2, num_agents=50), "num_agents must be a square number, got 50"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()

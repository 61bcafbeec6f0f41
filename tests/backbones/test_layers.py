from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.backbones import layers
from visionbb.backbones.layers import TokenMlp
from visionbb.mixers import linear, slabs


def hidden_sizes(mlp, x):
    """What `mlp` gives, and how many numbers its activation was given in each call."""
    sizes = []
    hook = mlp.act.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    out = mlp(x)
    hook.remove()
    return out, sizes


@pytest.mark.parametrize("shape", [(2, 9, 7, 8), (1, 131, 8), (5, 8)])
def test_slabs_give_what_the_whole_gives(shape, monkeypatch):
    monkeypatch.setattr(slabs, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(slabs, "SLAB", 96)
    mlp, x = TokenMlp(8, 32), torch.randn(shape)
    with torch.no_grad():
        out, sizes = hidden_sizes(mlp, x)
        torch.testing.assert_close(out, mlp.fc2(F.gelu(mlp.fc1(x))))
    assert max(sizes) <= 96
    assert sum(sizes) == x.numel() * 4


def test_small_and_differentiated_maps_stay_whole(monkeypatch):
    mlp, x = TokenMlp(8, 32), torch.randn(2, 9, 7, 8)
    with torch.no_grad():
        assert hidden_sizes(mlp, x)[1] == [x.numel() * 4]
    monkeypatch.setattr(slabs, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(slabs, "SLAB", 96)
    assert hidden_sizes(mlp, x)[1] == [x.numel() * 4]


def test_a_graph_takes_any_batch(monkeypatch):
    monkeypatch.setattr(slabs, "WIDEST_HIDDEN", 2**14)  # two images lie below it, eight do not
    mlp, x = TokenMlp(8, 32).eval(), torch.randn(8, 9, 7, 8)
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(mlp, (x[:2],), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(program(x), mlp(x))


def test_one_graph_holds_the_whole(monkeypatch):
    monkeypatch.setattr(slabs, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(slabs, "SLAB", 96)
    mlp, x = TokenMlp(8, 32).eval(), torch.randn(2, 9, 7, 8)
    with torch.no_grad():
        program = torch.export.export(mlp, (x,)).module()
        traced, scripted = torch.jit.trace(mlp, x), torch.jit.script(mlp)
        for form in (program, traced, scripted):
            torch.testing.assert_close(form(x), mlp(x))
    assert sum("linear" in str(node.target) for node in program.graph.nodes) == 2


def stem(act_layer):
    """Convolutions of all kinds with batch norms of some use, evaluated."""
    model = layers.conv_norm_acts(3, [(8, 3, 2), (8, 5, 1), (16, 1, 1), (12, 3, 2)], act_layer).append(act_layer())
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def one_by_one(model, x):
    for module in model:
        x = module(x)
    return x


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.GELU, partial(nn.GELU, "tanh"), nn.Hardswish])
@pytest.mark.parametrize("widest", [0, 2**24])
def test_fused_convolutions_give_what_the_layers_give(act_layer, widest, monkeypatch):
    monkeypatch.setattr(slabs, "WIDEST_HIDDEN", widest)
    model, x = stem(act_layer), torch.randn(3, 3, 37, 42).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(x), one_by_one(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not linear.HAS_ONEDNN, reason="no oneDNN here")
def test_only_plain_inference_fuses(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "conv_norm_act", lambda x, conv, *rest: calls.append(conv) or conv(x))
    model, x = stem(nn.ReLU), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
        assert calls == [m for m in model if isinstance(m, nn.Conv2d)]
        calls.clear()
        model.double()(x.double())
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.train()(x)
        model.eval()
        seen = []
        hook = model[1].register_forward_hook(lambda *args: seen.append(args))
        model(x)
        hook.remove()
        assert len(seen) == 1
    model(x)
    assert not calls


def test_an_mlp_fused_with_its_activation(monkeypatch):
    monkeypatch.setattr(linear, "MIN_PRODUCTS", 0)
    for act in (nn.GELU, nn.ReLU, partial(nn.GELU, "tanh"), nn.SiLU):
        mlp, x = TokenMlp(8, 32, act), torch.randn(2, 9, 7, 8)
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))))


def test_hooks_on_all_modules_see_the_activation(monkeypatch):
    monkeypatch.setattr(linear, "MIN_PRODUCTS", 0)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            TokenMlp(8, 32)(torch.randn(2, 8))
    finally:
        hook.remove()
    assert nn.GELU in seen


def test_norms_that_use_the_batch_are_not_folded():
    model, x = stem(nn.ReLU), torch.randn(4, 3, 16, 16)
    model[1].train()
    model[4].running_mean = model[4].running_var = None
    before = model[1].running_mean.clone()
    with torch.no_grad():
        got = model(x)
        assert not torch.equal(model[1].running_mean, before)
        torch.testing.assert_close(got, one_by_one(model, x), rtol=1e-5, atol=1e-5)

import pytest
import torch
import torch.nn.functional as F

from visionbb.backbones import layers
from visionbb.backbones.layers import TokenMlp


def hidden_sizes(mlp, x):
    """What `mlp` gives, and how many numbers its activation was given in each call."""
    sizes = []
    hook = mlp.act.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    out = mlp(x)
    hook.remove()
    return out, sizes


@pytest.mark.parametrize("shape", [(2, 9, 7, 8), (1, 131, 8), (5, 8)])
def test_slabs_give_what_the_whole_gives(shape, monkeypatch):
    monkeypatch.setattr(layers, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(layers, "SLAB", 96)
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
    monkeypatch.setattr(layers, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(layers, "SLAB", 96)
    assert hidden_sizes(mlp, x)[1] == [x.numel() * 4]


def test_one_graph_holds_the_whole(monkeypatch):
    monkeypatch.setattr(layers, "WIDEST_HIDDEN", 0)
    monkeypatch.setattr(layers, "SLAB", 96)
    mlp, x = TokenMlp(8, 32).eval(), torch.randn(2, 9, 7, 8)
    with torch.no_grad():
        program = torch.export.export(mlp, (x,)).module()
        traced, scripted = torch.jit.trace(mlp, x), torch.jit.script(mlp)
        for form in (program, traced, scripted):
            torch.testing.assert_close(form(x), mlp(x))
    assert sum("linear" in str(node.target) for node in program.graph.nodes) == 2

"""Learned rates: the budget is met, the outputs change less than with equal rates, the search computes DiffRate."""
import pytest
import torch
import torch.nn.functional as F

from visionbb.reduction import calibrate, reduce_tokens, remove_reduction
from visionbb.reduction.calibrate import Search
from visionbb.reduction.report import cost_of

from .conftest import build


@pytest.mark.parametrize("family", ["deit", "eva02", "rope_grouped", "drop_in_average"])
@torch.no_grad()
def test_search_computes_diffrate(family, images):
    """Masked tokens are as good as none: the outputs are those of the numbers that the search stands for."""
    model = build(family)
    search = Search([64, 44, 30, 23], 64)
    removed, pruned = search.numbers()
    assert removed[0] == 0
    assert sum(removed) > 30
    assert sum(pruned) > 10
    reduce_tokens(model, "diffrate", r=removed, prune=pruned)
    want = model(images)
    gmacs = model.reduction.report(images).gmacs
    model.reducer.method = search
    torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-5)
    assert float(search.macs(cost_of(model, (8, 8)))) == pytest.approx(gmacs * 1e9, rel=1e-6)


def test_rates_go_where_they_do_no_harm():
    """A network that attends to few patches in block 2 and to none in block 3: in front of that one they may go."""
    model = build("deit")
    with torch.no_grad():
        model.blocks[3].attn.qkv.weight[96:] = 0
        model.blocks[3].attn.qkv.bias[96:] = 0
        model.blocks[2].attn.qkv.weight[:48] *= 4
        model.blocks[2].attn.proj.weight *= 4
        model.head.weight *= 3
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    state = {name: p.clone() for name, p in model.state_dict().items()}
    model.train()
    rates = calibrate(model, images, 0.0075, steps=30)
    assert model.training
    assert not hasattr(model, "reducer")
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(prune <= r for r, prune in zip(rates["r"], rates["prune"], strict=True))
    model.eval()
    losses = {}
    with torch.no_grad():
        wanted = model(images).softmax(-1)
        for name, kwargs in (("equal", dict(target_gmacs=0.0075, input_size=(64, 64))), ("learned", rates)):
            reduce_tokens(model, "diffrate", **kwargs)
            assert 0.0073 < model.reduction.report(images).gmacs <= 0.0075
            losses[name] = float(F.cross_entropy(model(images), wanted))
            remove_reduction(model)
        floor = float(F.cross_entropy(model(images), wanted))
    assert rates["prune"][1] < rates["prune"][2]
    assert losses["learned"] - floor < 0.5 * (losses["equal"] - floor)


def test_a_reduced_model_is_refused(images):
    model = reduce_tokens(build("deit"), "tome", r=4)
    with pytest.raises(ValueError, match="reduced already"):
        calibrate(model, images, 0.01)

"""AS-ViT against its formulas, written out for one image at a time; batches; training and evaluation agree."""
import pytest
import torch

from visionbb.reduction import budget_loss, reduce_tokens
from visionbb.reduction.matching import keep_marked

from .conftest import FAMILIES, build, each_alone

WITH_CLASS = [name for name in FAMILIES if name not in ("average", "siglip", "column")]


@pytest.fixture
def images() -> torch.Tensor:
    """Three that keep unequal numbers of tokens, in float64: near a threshold rounding decides."""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def network(family: str, *thresholds: float):
    model = reduce_tokens(build(family).double(), "as_vit")
    model.reducer.method.thresholds.data = torch.tensor(thresholds or (0.004, 0.01, 0.02)).double()
    return model


@torch.no_grad()
def test_is_its_definition(images):
    """Block by block, tokens below the threshold leave (arXiv 2209.13802)."""
    model = network("deit")
    thresholds = dict(zip((0, 1, 2), model.reducer.method.thresholds.tolist(), strict=True))
    logits, kept = [], []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(images))):
        for number, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(tokens)).view(-1, 3, 3, 16).permute(1, 2, 0, 3)
            attention = (q @ k.mT / 4).softmax(-1)
            out = attention @ v
            tokens = tokens + block.attn.proj(out.transpose(0, 1).flatten(1))
            tokens = tokens + block.mlp(block.norm2(tokens))
            if number in thresholds:
                norm = out.norm(dim=-1)
                scores = [sum(float(attention[h, 0, i] * norm[h, i] / norm[:, i].sum()) for h in range(3))
                          for i in range(1, len(tokens))]
                left = [i for i, s in enumerate(scores, 1) if s > thresholds[number] or s == max(scores)]
                tokens = tokens[[0, *left]]
        kept.append(len(tokens) - 1)
        logits.append(model.head(model.norm(tokens[0])))
    assert len(set(kept)) == 3, "the case must have unequal numbers"
    assert model.reduction.report(images).tokens[-1] == (max(kept), max(kept))
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", WITH_CLASS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family, images):
    each_alone(network(family), images)


@pytest.mark.parametrize("family", WITH_CLASS)
@torch.no_grad()
def test_training_computes_what_evaluation_does(family, images):
    model = network(family)
    want = model(images)
    model.train()
    logits, state = model.forward_with_state(images)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-7)
    assert [mask.shape for mask in state.record] == [(3, 64)] * 3
    assert len({tuple(mask.sum(1).round().tolist()) for mask in state.record}) > 1


def test_thresholds_learn_to_meet_a_budget(images):
    model = network("deit").train()
    with torch.no_grad():
        plain = budget_loss(model, model.forward_with_state(images)[1], 0.0)
    model.zero_grad()
    losses = []
    thresholds = model.reducer.method.thresholds
    optimizer = torch.optim.Adam([thresholds], 5e-4)
    for _ in range(30):
        optimizer.zero_grad()
        loss = budget_loss(model, model.forward_with_state(images)[1], 0.85 * float(plain))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert thresholds.grad.abs().min() > 0
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    assert model.reduction.report(images[:1]).gmacs < model.reduction.report(images[:1]).plain_gmacs


@torch.no_grad()
def test_budget_loss_by_hand(images):
    model = network("deit").train()
    _, state = model.forward_with_state(images)
    model.eval()
    gmacs = [model.reduction.report(image[None]).gmacs for image in images]
    torch.testing.assert_close(float(budget_loss(model, state, 0.001)), sum(gmacs) / 3 - 0.001)
    with pytest.raises(ValueError, match="3 masks, which a model in training makes, got 0"):
        budget_loss(model, model.forward_with_state(images)[1], 0.001)


@torch.no_grad()
def test_one_token_always_stays(images):
    model = network("drop_in_average", 0.9, 0.9, 0.9)
    assert model.reduction.report(images).tokens[-1] == (1, 1)
    assert model(images).isfinite().all()


def test_training_reaches_all_parameters(images):
    model = network("deit3").train()
    logits, state = model.forward_with_state(images)
    (logits.square().sum() + budget_loss(model, state, 0.001)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_thresholds_are_in_the_state_dict():
    model = reduce_tokens(build("deit"), "as_vit")
    torch.testing.assert_close(model.state_dict()["reducer.method.thresholds"], torch.tensor([0.001, 0.002, 0.003]))
    assert model.reducer.method.blocks(12) == (3, 6, 9)


def test_marked_tokens_by_hand():
    stays = torch.tensor([[True, False, True, False], [False, True, False, False]])
    index, place, dropped = keep_marked(stays)
    assert place[0].tolist() == [0, 2]
    assert place[1, :1].tolist() == [1]
    assert dropped.shape == (2, 3)
    for b, i in ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3)):
        assert dropped[b, index[b, i] - 2] == i
    assert index[0, [0, 2]].tolist() == [0, 1]
    assert index[1, 1] == 0


def test_needs_a_class_token():
    with pytest.raises(ValueError, match="as_vit reads the attention of the class token"):
        reduce_tokens(build("siglip"), "as_vit")

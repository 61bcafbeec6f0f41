"""DynamicViT against its formulas, written out for one image at a time; training masks what evaluation removes."""
import pytest
import torch
import torch.nn.functional as F

from visionbb.reduction import dynamic_vit, ratio_loss, reduce_tokens, remove_reduction

from .conftest import build


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def network(family: str, **schedule):
    """With predictors that tell tokens apart."""
    model = reduce_tokens(build(family).double(), "dynamic_vit", **schedule or dict(keep=0.7))
    generator = torch.Generator().manual_seed(4)
    for p in model.reducer.method.parameters():
        p.data = torch.randn(p.shape, generator=generator).double() * (0.3 if p.ndim > 1 else 1)
    return model


def log_probability(predictor, x, alive):
    """Of each token x (n, C) to stay: section 3.2 of arXiv 2106.02034."""
    norm, linear = predictor.in_conv[:2]
    hidden = F.gelu(F.layer_norm(x, (48,), norm.weight, norm.bias, norm.eps) @ linear.weight.T + linear.bias)
    mean = sum(alive[i] * hidden[i, 24:] for i in range(len(x))) / sum(alive)
    scores = []
    for own in hidden[:, :24]:
        z = torch.cat((own, mean))
        for layer in predictor.out_conv[::2]:
            z = layer.weight @ z + layer.bias
            z = F.gelu(z) if len(z) > 2 else z
        scores.append(z - z.exp().sum().log())
    return torch.stack(scores)


@torch.no_grad()
def test_is_its_definition(images):
    """In front of blocks 1, 2 and 3 of four the tokens most likely to stay go on, 0.7 of those that are left."""
    model = network("deit")
    predictors = dict(zip((1, 2, 3), model.reducer.method.score_predictor, strict=True))
    logits = []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(images))):
        kept = dict(zip((1, 2, 3), (45, 32, 23), strict=True))
        for number, block in enumerate(model.blocks):
            if number in predictors:
                score = log_probability(predictors[number], tokens[1:], [1] * (len(tokens) - 1))[:, 0]
                left = sorted(score.argsort(descending=True)[: kept[number]].tolist())
                tokens = tokens[[0, *(i + 1 for i in left)]]
            tokens = block(tokens[None])[0]
        logits.append(model.head(model.norm(tokens[0])))
    assert model.reduction.report(images).tokens == ((64, 64), (45, 45), (32, 32), (23, 23))
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=1e-5, atol=1e-7)


def fixed(monkeypatch, pick) -> None:
    """Instead of by chance tokens stay or go (1) as `pick(log_probabilities)` says."""
    monkeypatch.setattr(dynamic_vit.F, "gumbel_softmax", lambda score: F.one_hot(pick(score).long(), 2).to(score))


@torch.no_grad()
def test_training_draws_masks_stage_by_stage(images, monkeypatch):
    """What a stage draws counts only of tokens that have stayed so far, and its predictor's mean is over these."""
    model = network("deit").train()
    seen = []
    for predictor in model.reducer.method.score_predictor:
        predictor.register_forward_hook(lambda module, args, out: seen.append((module, args, out)))

    def below_median(score):
        return score[..., 0] < score[..., 0].median(1, keepdim=True).values

    fixed(monkeypatch, below_median)
    _, state = model.forward_with_state(images)
    alive = torch.ones(3, 64).double()
    for (predictor, (x, given), out), mask in zip(seen, state.record, strict=True):
        assert torch.equal(given, alive)
        want = torch.stack([log_probability(predictor, *image) for image in zip(x, alive, strict=True)])
        torch.testing.assert_close(out, want)
        alive = alive * ~below_median(out.float())
        assert torch.equal(mask, alive)
    assert 0 < state.record[2].sum() < state.record[1].sum() < state.record[0].sum() < 3 * 64


@pytest.mark.parametrize("family", ["deit", "dinov3", "siglip", "average", "drop_in", "column"])
@torch.no_grad()
def test_masked_tokens_are_as_good_as_gone(family, images, monkeypatch):
    """Where training marks the tokens that evaluation keeps, it computes what evaluation does."""
    model = network(family)
    want = model(images)
    kept = iter((45, 32, 23))
    alive = []

    def best(score):
        score = score[..., 0].masked_fill(alive[-1] < 0.5, float("-inf")) if alive else score[..., 0]
        gone = torch.ones_like(score).scatter(1, score.topk(next(kept)).indices, 0)
        alive.append(1 - gone)
        return gone

    fixed(monkeypatch, best)
    logits, state = model.train().forward_with_state(images)
    if family == "column":  # whose head reads the whole map, with the tokens that went as they were when they did
        assert logits.isfinite().all()
    else:
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)
    assert [mask.sum(1).tolist() for mask in state.record] == [[45] * 3, [32] * 3, [23] * 3]
    assert ratio_loss(model, state) < 1e-12


@torch.no_grad()
def test_tokens_are_drawn_by_their_probability(images):
    """Over many draws each token of the first stage stays as often as its predictor says."""
    torch.manual_seed(0)
    model = network("deit", keep={1: 0.5}).train()
    outs = []
    model.reducer.method.score_predictor[0].register_forward_hook(lambda module, args, out: outs.append(out))
    many = images[:1].expand(512, -1, -1, -1)
    _, state = model.forward_with_state(many)
    often = state.record[0].mean(0)
    assert (often - outs[0][0, :, 0].exp()).abs().max() < 0.12  # five deviations of the mean of 512


@torch.no_grad()
def test_one_token_always_stays(images):
    model = network("average").train()
    for predictor in model.reducer.method.score_predictor:
        predictor.out_conv[4].bias.copy_(torch.tensor([-1e4, 1e4]))
    logits, state = model.forward_with_state(images)
    assert [mask.sum(1).tolist() for mask in state.record] == [[1] * 3] * 3
    assert logits.isfinite().all()


@torch.no_grad()
def test_with_all_kept_nothing_changes(family):
    model = build(family)
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    assert torch.equal(reduce_tokens(model, "dynamic_vit", keep=1.0)(images), plain)
    assert torch.equal(remove_reduction(model)(images), plain)


def test_training_reaches_all_parameters(images):
    torch.manual_seed(0)
    model = network("deit3").train()
    logits, state = model.forward_with_state(images)
    ratio_loss(model, state).backward(retain_graph=True)
    moved = [p.grad.abs().max() for p in model.reducer.method.parameters()]
    assert min(moved) > 0
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_ratio_loss_by_hand(images):
    model = network("deit", r={1: 16, 3: 32})
    with pytest.raises(ValueError, match="2 masks, which a model in training makes, got 0"):
        ratio_loss(model, model.forward_with_state(images)[1])
    torch.manual_seed(0)
    _, state = model.train().forward_with_state(images)
    wanted = [[(float(image.mean()) - share) ** 2 for image in mask]
              for mask, share in zip(state.record, (48 / 64, 16 / 64), strict=True)]
    assert float(ratio_loss(model, state)) == pytest.approx(sum(map(sum, wanted)) / 6)


def test_ratio_loss_moves_numbers_to_those_of_the_schedule(images):
    torch.manual_seed(0)
    model = network("deit").train()
    predictors = model.reducer.method.score_predictor
    optimizer = torch.optim.Adam(predictors.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = ratio_loss(model, model.forward_with_state(images)[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_predictors_have_the_authors_keys():
    model = reduce_tokens(build("deit"), "dynamic_vit", keep=0.7)
    keys = [key for key in model.state_dict() if key.startswith("reducer.")]
    assert keys == [f"reducer.method.score_predictor.{stage}.{key}.{kind}" for stage in range(3)
                    for key in ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
                    for kind in ("weight", "bias")]
    assert model.reducer.method.blocks(12) == (3, 6, 9)


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(), "exactly one of r, keep and target_gmacs"),
    (dict(keep={0: 0.5}), "dynamic_vit has what it needs at blocks 1, 2, 3; the schedule names 0"),
    (dict(r={0: 1}), "the schedule names 0"),
    (dict(keep=0.5, pruning_loc=[2, 1]), r"pruning_loc must be ascending blocks from 0 to 3, got \[2, 1\]"),
    (dict(keep=0.5, pruning_loc=[4]), r"from 0 to 3, got \[4\]"),
    (dict(keep=0.5, pruning_loc=[]), r"got \[\]"),
])
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(build("deit"), "dynamic_vit", **kwargs)


def test_other_blocks_by_pruning_loc(images):
    model = reduce_tokens(build("deit").double(), "dynamic_vit", keep=0.5, pruning_loc=[0, 2])
    assert model.reduction.report(images).tokens == ((32, 32), (32, 32), (16, 16), (16, 16))
    assert len(model.reducer.method.score_predictor) == 2

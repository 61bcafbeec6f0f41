"""The interpreter by hand, and what it leaves of batches."""
import pytest
import torch

from visionbb.reduction import reduce_tokens

from .conftest import build, each_alone


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def network(family: str, groups: int = 2):
    model = reduce_tokens(build(family).double(), "ia_red2", groups=groups)
    generator = torch.Generator().manual_seed(4)
    for p in model.reducer.method.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator).double()
    return model


@torch.no_grad()
def test_is_its_definition(images):
    """Tokens leave in front of blocks 0 and 2, by heads and tokens one at a time (arXiv 2106.12620)."""
    model = network("deit")
    groups = dict(zip((0, 2), model.reducer.method.interpreters, strict=True))
    logits, kept = [], []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(images))):
        for number, block in enumerate(model.blocks):
            if number in groups:
                each = groups[number]
                p = each.k.weight @ each.policy
                information = []
                for x in tokens[1:]:
                    q = each.q.weight @ x
                    heads = [torch.sigmoid(q[h : h + 16] @ p[h : h + 16]) for h in (0, 16, 32)]
                    information.append(float(sum(heads) / 3))
                tokens = tokens[[0, *(i for i, one in enumerate(information, 1) if one >= 0.5)]]
            tokens = block(tokens[None])[0]
        kept.append(len(tokens) - 1)
        logits.append(model.head(model.norm(tokens[0])))
    assert len(set(kept)) == 3, "the case must have unequal numbers"
    assert 1 < min(kept) < max(kept) < 64
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family, images):
    each_alone(network(family), images)


@torch.no_grad()
def test_nothing_goes_before_it_is_trained(images):
    model = build("average").double()
    plain = model(images)
    torch.testing.assert_close(reduce_tokens(model, "ia_red2")(images), plain, rtol=1e-6, atol=1e-9)
    assert model.reduction.report(images).tokens == ((64, 64),) * 4
    assert model.reducer.method.blocks(12) == (0, 4, 8)


@torch.no_grad()
def test_one_token_always_stays(images):
    model = network("average")
    model.pos_embed.zero_()
    model.patch_embed.proj.weight.mul_(0.01)  # all tokens are about the bias
    for interpreter in model.reducer.method.interpreters:
        interpreter.q.weight.zero_().fill_diagonal_(1)
        interpreter.k.weight.zero_().fill_diagonal_(-1)
        interpreter.policy.copy_(model.patch_embed.proj.bias)
    assert model.reduction.report(images).tokens == ((1, 1),) * 4
    assert model(images).isfinite().all()


@pytest.mark.parametrize(("groups", "message"), [(0, "groups must be at least 1, got 0"), (5, "at most the 4 blocks")])
def test_wrong_groups_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(build("deit"), "ia_red2", groups=groups)

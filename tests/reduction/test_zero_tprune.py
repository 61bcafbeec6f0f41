"""Zero-TPrune against its formulas, written out for one image, head and token at a time."""
import pytest
import torch
import torch.nn.functional as F

from visionbb.reduction import reduce_tokens
from visionbb.reduction.zero_tprune import importance, page_rank

from .conftest import build


def ranks(matrix, alive, steps):
    """Weighted page rank over the tokens of one head that are alive; token 0 is the class token."""
    sub = matrix[alive][:, alive]
    sub = sub / sub.sum(1, keepdim=True)
    s = torch.ones(len(alive))
    s[0] = len(matrix) ** 0.5
    for _ in range(steps):
        s = torch.stack([(sub[:, i] * s).sum() for i in range(len(alive))])
    return s[1:]


def scores(matrices, alive, steps):
    heads = [ranks(matrix, alive, steps) for matrix in matrices]
    heads = [s / s.mean() for s in heads]
    heard = [s for s in heads if 0.01 <= s.var(correction=0) <= 0.7] or heads
    return dict(zip(alive[1:], (sum(s**2 for s in heard) / len(heard)).sqrt().tolist(), strict=True)), len(heard)


@pytest.mark.parametrize(("index", "steps"), [(0, 30), (2, 5), (3, 1)])
@torch.no_grad()
def test_is_its_definition(images, index, steps):
    """One pruning block, behind block `index`: stages I', S and I (arXiv 2305.17328)."""
    model, remove, similar = build("deit"), 25, 7
    for block in model.blocks:  # the first head attends evenly, which is not heard
        scale = torch.tensor([0.001, 0.3, 0.3]).repeat_interleave(16)
        block.attn.qkv.weight[:48] *= scale[:, None]
        block.attn.qkv.bias[:48] *= scale
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks[:index]:
        x = block(x)
    block, heard = model.blocks[index], set()
    kept = []
    for tokens in x:
        q, k, _ = block.attn.qkv(block.norm1(tokens)).view(-1, 3, 3, 16).permute(1, 2, 0, 3)
        matrices = (q @ k.mT / 4).softmax(-1)
        keys = k.mean(0)
        first, _ = scores(matrices, list(range(65)), 1)
        order = sorted(first, key=first.get, reverse=True)
        alike = {a: max(float(F.cosine_similarity(keys[a], keys[b], dim=0)) for b in order[:32]) for a in order[32:]}
        doubles = sorted(alike, key=alike.get, reverse=True)[:similar]
        last, count = scores(matrices, [i for i in range(65) if i not in doubles], steps)
        heard.add(count)
        kept.append(sorted(i - 1 for i in sorted(last, key=last.get, reverse=True)[: 64 - remove]))
    assert heard <= {1, 2}, "the case must tell heads that are heard from others"
    reduce_tokens(model, "zero_tprune", r={index: remove}, similar=similar)
    got, state, _ = model.forward_tokens(images, blocks=index + 1)
    assert state.position.tolist() == kept
    whole = block(x)
    torch.testing.assert_close(got[:, :1], whole[:, :1], rtol=1e-4, atol=1e-5)
    for i in range(2):
        torch.testing.assert_close(got[i, 1:], whole[i, 1:][kept[i]], rtol=1e-4, atol=1e-5)


def test_page_rank_by_hand():
    attention = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    votes = torch.tensor([[[2.0, 4.0]]])
    torch.testing.assert_close(page_rank(attention, votes, 1), torch.tensor([[[2.0, 4.0]]]))
    torch.testing.assert_close(page_rank(attention, torch.tensor([[[4.0, 4.0]]]), 1), torch.tensor([[[3.0, 5.0]]]))
    torch.testing.assert_close(page_rank(attention, votes[..., :1].expand(1, 1, 2), 40),
                               torch.tensor([[[4 / 3, 8 / 3]]]))


def test_importance_by_hand():
    quiet, clear, loud = [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 2.0, 2.0], [4.0, 0.0, 0.0, 0.0]
    got = importance(torch.tensor([[quiet, clear, loud]]))
    torch.testing.assert_close(got, torch.tensor([[1.5, 0.5, 1.0, 1.0]]))
    both = importance(torch.tensor([[clear, [1.0, 3.0, 2.0, 2.0]]]))
    torch.testing.assert_close(both, torch.tensor([[1.25**0.5, 1.25**0.5, 1.0, 1.0]]))
    torch.testing.assert_close(importance(torch.tensor([[quiet, loud]])), torch.tensor([[8.5**0.5] + [0.5**0.5] * 3]))
    dead = importance(torch.tensor([[[3.0, 1.0, 9.0]]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(dead, torch.tensor([[1.5, 0.5, 0.0]]))


@torch.no_grad()
def test_models_without_class_token_and_only_doubles(images):
    model = reduce_tokens(build("siglip"), "zero_tprune", r={0: 6, 2: 20}, similar=6)
    report = model.reduction.report(images)
    assert report.tokens == ((64, 64), (58, 58), (58, 58), (38, 38))


def test_default_blocks_of_twelve():
    method = reduce_tokens(build("deit"), "zero_tprune", keep=0.8).reduction.method
    assert method.blocks(12) == (0, 2, 5, 8, 10)
    assert method.blocks(4) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(similar=-1), "similar must be at least 0, got -1"),
     (dict(iterations=(5, 0, 1)), r"three numbers of at least 1, got \(5, 0, 1\)")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(build("deit"), "zero_tprune", keep=0.8, **options)

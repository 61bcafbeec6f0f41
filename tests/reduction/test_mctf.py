"""MCTF against its equations, written out for one image and one edge at a time."""
import pytest
import timm
import torch
import torch.nn.functional as F

from visionbb.profiling import count_flops
from visionbb.reduction import reduce_tokens
from visionbb.reduction.blocks import QUERIES_AND_KEYS, VALUES, adapter_for
from visionbb.reduction.mctf import bidirectional

from .conftest import build


def halves(n: int, first: int) -> tuple[range, range]:
    return range(first, n, 2), range(1 - first, n, 2)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["precise", "approximate"])
def test_is_its_definition(images, attention):
    """Block by block, with attention matrices and loops over edges (arXiv 2403.10030)."""
    model, r, temperatures = build("deit"), 11, (2.0, 5.0, 3.0)
    logits = []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(images))):
        size = torch.ones(65)
        for number, block in enumerate(model.blocks):
            def projected(tokens, block=block):
                return block.attn.qkv(block.norm1(tokens)).view(-1, 3, 3, 16).permute(1, 2, 0, 3)

            q, k, v = projected(tokens)
            matrix = (q @ k.mT / 4 + size.log()).softmax(-1)
            if number > 0:
                patches, n = tokens[1:], len(tokens) - 1
                a, s = matrix.mean((0, 1))[1:], size[1:]
                rare, small = (1 / a) / (1 / a).max(), (1 / s) / (1 / s).max()

                def edge(i, j, x=patches, rare=rare, small=small):
                    similar = (float(F.cosine_similarity(x[i], x[j], dim=0)) + 1) / 2
                    return (similar ** (1 / temperatures[0]) * float(rare[i] * rare[j]) ** (1 / temperatures[1])
                            * float(small[i] * small[j]) ** (1 / temperatures[2]))

                one, two = halves(n, first=1)
                group = list(range(n))
                best = {i: max((edge(i, j), j) for j in two) for i in one}
                gone = sorted(best, key=best.get, reverse=True)[: r // 2]
                for i in gone:
                    group[i] = best[i][1]
                left = [i for i in one if i not in gone]
                best = {j: max((edge(i, j), i) for i in left) for j in two}
                back = sorted(best, key=best.get, reverse=True)[: r - r // 2]
                group = [best[g][1] if g in back else g for g in group]
                order = left + [j for j in two if j not in back]
                members = torch.zeros(1 + len(order), 1 + n)
                members[0, 0] = 1
                for i, g in enumerate(group):
                    members[1 + order.index(g), 1 + i] = 1
                weights = members * torch.cat((torch.ones(1), a * s))
                weights = weights / weights.sum(1, keepdim=True)
                tokens, size = weights @ tokens, members @ size
                q, k, v = projected(tokens)
                if attention == "precise":
                    matrix = (q @ k.mT / 4 + size.log()).softmax(-1)
                else:
                    matrix = weights @ matrix @ members.T
            tokens = tokens + block.attn.proj((matrix @ v).transpose(0, 1).flatten(1))
            tokens = tokens + block.mlp(block.norm2(tokens))
        logits.append(model.head(model.norm(tokens[0])))
    names = ("similarity", "information", "size")
    reduce_tokens(model, "mctf", r=r, attention=attention, **dict(zip(names, temperatures)))
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=1e-4, atol=1e-5)


def test_what_goes_into_one_that_goes_back_goes_with_it():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.5], [0.0, 1.0]]])
    assignment = bidirectional(x, torch.ones(1, 4), remove=2, first=0)
    assert assignment.place.tolist() == [[2, 3]]
    assert assignment.index.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("attention", ["precise", "approximate"])
@pytest.mark.parametrize("family", ["dinov3", "rope_grouped", "column"])
@torch.no_grad()
def test_attention_of_other_families(images, family, attention):
    """Without anything merged the matrix is the block's own attention; with it, results are finite and others."""
    model = build(family)
    plain = model(images)
    reduce_tokens(model, "mctf", r=8, attention=attention)
    reduced = model(images)
    assert reduced.isfinite().all()
    assert (reduced - plain).abs().max() > 1e-4


@torch.no_grad()
def test_approximate_is_precise_where_equal_tokens_merge():
    """Equal queries and keys: the merged matrix is the matrix of the merged tokens, weighed by size."""
    model = build("average")
    model.pos_embed.zero_()
    kinds = torch.randn(1, 3, 4, 8, 1, 8, generator=torch.Generator().manual_seed(0))
    images = kinds.repeat(1, 1, 1, 2, 8, 1).reshape(1, 3, 64, 64)
    outputs = [reduce_tokens(model, "mctf", r={1: 8, 2: 8}, attention=kind)(images)
               for kind in ("precise", "approximate")]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(attention="exact"), "attention must be one of precise, approximate, got 'exact'"),
     (dict(size=0.0), "size is a temperature and must be above 0, got 0.0")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(build("deit"), "mctf", r=4, **options)


@pytest.mark.parametrize(("attention", "gmacs"), [("precise", 2.96), ("approximate", 2.58)])  # 2.6 is published
def test_looking_ahead_is_counted(attention, gmacs):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        reduce_tokens(model, "mctf", r=16, attention=attention)
        closed = model.reduction.report(torch.empty(1, 3, 224, 224)).gmacs
        assert closed == pytest.approx(gmacs, abs=0.005)
        assert count_flops(model, 224).gmacs == pytest.approx(closed, rel=0.015)
        reduce_tokens(model, "mctf", target_gmacs=2.9, attention=attention)
        assert 2.87 < model.reduction.report(torch.empty(1, 3, 224, 224)).gmacs <= 2.9


@torch.no_grad()
def test_queries_and_keys_ahead_are_those_of_the_whole_projection(family, images):
    """What looks ahead projects to q and k alone, and what attends approximately to v alone: parts of one layer."""
    model = build(family)
    adapter, block = adapter_for(model.blocks), model.blocks[1]
    x = torch.randn(2, 65, 48)
    whole = adapter.project(block, x)
    for parts in (QUERIES_AND_KEYS, VALUES):
        torch.testing.assert_close(adapter.project(block, x, parts), whole[parts])


@torch.no_grad()
def test_a_wrapped_projection_is_used_as_a_whole(images):
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("deit")
    block = model.blocks[1]
    twice = Twice(48, 144)
    twice.load_state_dict(block.attn.qkv.state_dict())
    block.attn.qkv = twice
    q, k = adapter_for(model.blocks).project(block, images[..., :48].flatten(1, 2), QUERIES_AND_KEYS)
    torch.testing.assert_close((q, k), adapter_for(model.blocks).project(block, images[..., :48].flatten(1, 2))[:2])

"""The methods against their definitions, written out for one image at a time, and what must hold for all of them."""
import pytest
import torch
import torch.nn.functional as F

from visionbb.reduction import reduce_tokens
from visionbb.reduction.pitome import energy
from visionbb.reduction.tofu import mlerp

from .conftest import build

RECIPES = {
    "tome": dict(r=10),
    "tofu": dict(r=10),
    "pitome": dict(r=10),
    "mctf": dict(r=10),
    "mctf_approximate": dict(method="mctf", r=10, attention="approximate"),
    "zero_tprune": dict(keep=0.7),
    "diffrate": dict(r=10),
    "dynamic_vit": dict(keep=0.7),
    "evit": dict(keep=0.7),
    "evit_fused": dict(method="evit", keep=0.7, fuse_token=True),
}


@pytest.fixture(params=RECIPES)
def recipe(request) -> dict:
    return dict(method=request.param) | RECIPES[request.param]


# ---- What holds for all ---------------------------------------------------------------------------------------------

@torch.no_grad()
def test_every_patch_is_in_a_token_or_in_the_attic(images, recipe):
    model = reduce_tokens(build("dinov2"), **recipe)
    x, state, _ = model.forward_tokens(images)
    n = x.shape[1] - state.prefix
    dropped = 0 if state.attic is None else state.attic.shape[1]
    for source, position in zip(state.source, state.position):
        assert source.unique().tolist() == list(range(n + dropped))
        assert position.unique().numel() == n
        assert torch.equal(source[position], torch.arange(n))  # a token stands at the place of one of its patches
    if state.size is not None:
        assert torch.equal(state.size, torch.stack([s.bincount(minlength=n)[:n] for s in state.source]).float())


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images, recipe):
    model = reduce_tokens(build("dinov2"), **recipe)
    both = model(images)
    torch.testing.assert_close(model(images[1:]), both[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images.flip(0)), both.flip(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_results_are_the_same_every_time(images, recipe):
    model = reduce_tokens(build("dinov2"), **recipe)
    assert torch.equal(model(images), model(images))


@torch.no_grad()
def test_keys_of_zero_norm_are_similar_to_nothing(images, recipe):
    model = build("deit")
    for block in model.blocks:
        block.attn.qkv.weight[48:96] = 0
        block.attn.qkv.bias[48:96] = 0
    assert reduce_tokens(model, **recipe)(images).isfinite().all()


def test_training_reaches_all_parameters(images, recipe):
    model = reduce_tokens(build("deit3").train(), **recipe)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_equal_patches_merge_without_loss():
    """Of an image of few kinds of patches, features without reduction are those with it: merged tokens are equal."""
    model = build("average")
    model.pos_embed.zero_()
    kinds = torch.randn(1, 3, 4, 8, 1, 8, generator=torch.Generator().manual_seed(0))  # one a pair of rows
    images = kinds.repeat(1, 1, 1, 2, 8, 1).reshape(1, 3, 64, 64)
    plain = model.forward_features(images)
    reduce_tokens(model, "tome", r=10)
    assert model.reduction.report(images).tokens[-1][1] == 24
    torch.testing.assert_close(model.forward_features(images), plain, rtol=1e-3, atol=1e-4)


# ---- ToMe -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_tome_is_its_definition(images):
    """Block by block, with plain attention and loops over tokens (arXiv 2210.09461, section 3 and appendix D)."""
    model, r = build("deit"), 10
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    logits = []
    for tokens in x:
        tokens, size = list(tokens), [1.0] * 65
        for block in model.blocks:
            at = torch.stack(tokens)
            q, k, v = block.attn.qkv(block.norm1(at)).view(-1, 3, 3, 16).permute(1, 2, 0, 3)
            attention = (q @ k.mT / 4 + torch.tensor(size).log()).softmax(-1)
            at = at + block.attn.proj((attention @ v).transpose(0, 1).flatten(1))
            metric = F.normalize(k.mean(0), dim=-1)
            src, dst = range(0, len(at), 2), range(1, len(at), 2)
            edges = {a: max((float(metric[a] @ metric[b]), b) for b in dst) for a in src if a > 0}
            gone = sorted(edges, key=edges.get, reverse=True)[:r]
            merged, sizes = {b: size[b] * at[b] for b in dst}, {b: size[b] for b in dst}
            for a in gone:
                b = edges[a][1]
                merged[b] = merged[b] + size[a] * at[a]
                sizes[b] += size[a]
            kept = [a for a in src if a not in gone]
            tokens = [at[a] for a in kept] + [merged[b] / sizes[b] for b in dst]
            size = [size[a] for a in kept] + list(sizes.values())
            at = torch.stack(tokens)
            tokens = list(at + block.mlp(block.norm2(at)))
        logits.append(model.head(model.norm(tokens[0])))
    torch.testing.assert_close(reduce_tokens(model, "tome", r=r)(images), torch.stack(logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_proportional_attention_matters_and_can_be_left_out(images):
    model = build("deit")
    with_size = reduce_tokens(model, "tome", r=10)(images)
    without = reduce_tokens(model, "tome", r=10, proportional=False)(images)
    assert (with_size - without).abs().max() > 1e-4


# ---- The others -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_tofu_prunes_early_and_interpolates_late(images):
    model = build("deit")
    tome = reduce_tokens(model, "tome", r=10).forward_tokens(images, blocks=1)
    pruned = reduce_tokens(model, "tofu", r=10).forward_tokens(images, blocks=1)
    assert torch.equal(tome[1].source, pruned[1].source)
    assert torch.equal(tome[1].size, pruned[1].size)
    alone = tome[1].size == 1
    assert torch.equal(tome[0][:, 1:][alone], pruned[0][:, 1:][alone])
    assert not torch.allclose(tome[0], pruned[0])


def test_mlerp_by_hand():
    from visionbb.reduction import Assignment

    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])
    assignment = Assignment(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2]]))
    mean = torch.tensor([[[1.5, 0.5], [0.0, 5.0]]])
    want = torch.tensor([[[9 / 10**0.5, 3 / 10**0.5], [0.0, 5.0]]])
    torch.testing.assert_close(mlerp(mean, x, assignment), want)


@torch.no_grad()
def test_evit_keeps_what_the_class_token_attends_to(images):
    model = build("deit")
    reduce_tokens(model, "evit", keep={0: 0.25})
    x, state, _ = model.forward_tokens(images, blocks=1)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    block = model.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).view(2, 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
    score = (q @ k.mT / 4).softmax(-1)[:, :, 0, 1:].mean(1)
    best = score.topk(16).indices.sort().values
    assert torch.equal(state.position, best)
    whole = block(tokens)
    torch.testing.assert_close(x[:, :1], whole[:, :1])
    for i in range(2):
        torch.testing.assert_close(x[i, 1:], whole[i, 1:][best[i]])

    reduce_tokens(model, "evit", keep={0: 0.25}, fuse_token=True)
    x, state, _ = model.forward_tokens(images, blocks=1)
    attended = tokens + block.attn(block.norm1(tokens))
    for i in range(2):
        order = score[i].argsort(descending=True)
        fused = score[i, order[15:]] @ attended[i, 1:][order[15:]]
        torch.testing.assert_close(x[i, -1], fused + block.mlp(block.norm2(fused)))
        assert state.position[i, -1] == order[15]


def test_energy_by_hand():
    features = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])
    low = torch.tensor(-0.5).exp().item() - 1
    want = torch.tensor([[(0.5 + 0.5 + low) / 3, (0.5 + 0.5 + low) / 3, (0.5 + 2 * low) / 3]])
    torch.testing.assert_close(energy(features, 0.5), want)


@torch.no_grad()
def test_pitome_protects_what_is_rare(images):
    """In the later half the tokens of least energy stay alone."""
    model = build("deit")
    reduce_tokens(model, "pitome", r={3: 10})
    _, state, _ = model.forward_tokens(images)
    reduce_tokens(model, "tome", r=0)
    tokens = model.forward_tokens(images, blocks=3)[0]
    block = model.blocks[3]
    k = block.attn.qkv(block.norm1(tokens)).view(2, 65, 3, 3, 16)[:, 1:, 1].mean(2)
    rare = energy(k, 0.75 / 4).argsort(descending=True)[:, 20:]
    alone = state.size.gather(1, state.source.gather(1, rare))
    assert (alone == 1).all()
    assert state.size.max() > 1

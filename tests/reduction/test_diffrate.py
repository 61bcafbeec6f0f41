"""DiffRate's block against its definition, written out for one image and token at a time."""
import pytest
import torch
import torch.nn.functional as F

from visionbb.reduction import reduce_tokens

from .conftest import build


@pytest.mark.parametrize(
    ("remove", "prune"), [([0, 20, 9, 0], [0, 8, 0, 0]), ([5, 20, 0, 3], 0.5), ([0, 9, 9, 9], 1.0)]
)
@torch.no_grad()
def test_is_its_definition(images, remove, prune):
    """Block by block, with loops over tokens (arXiv 2305.17997)."""
    model = build("deit")
    logits = []
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(images))):
        size = torch.ones(65)
        for number, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(tokens)).view(-1, 3, 3, 16).permute(1, 2, 0, 3)
            attention = (q @ k.mT / 4 + size.log()).softmax(-1)
            tokens = tokens + block.attn.proj((attention @ v).transpose(0, 1).flatten(1))
            score = attention[:, 0, 1:].mean(0).tolist()
            order = sorted(range(len(score)), key=score.__getitem__, reverse=True)
            dropped = prune[number] if isinstance(prune, list) else int(prune * remove[number])
            kept, rest = len(score) - remove[number], len(score) - dropped
            members = {i: [i] for i in sorted(order[:kept])}
            for i in order[kept:rest]:
                best = max(members, key=lambda j: float(F.cosine_similarity(tokens[1 + i], tokens[1 + j], dim=0)))
                members[best].append(i)
            tokens = torch.stack([tokens[0], *(torch.stack([tokens[1 + i] for i in m]).mean(0)
                                               for m in members.values())])
            size = torch.stack([size[0], *(sum(size[1 + i] for i in m) for m in members.values())])
            tokens = tokens + block.mlp(block.norm2(tokens))
        logits.append(model.head(model.norm(tokens[0])))
    model = reduce_tokens(model, "diffrate", r=remove, prune=prune)
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prune", "message"),
    [(1.5, r"a share in \[0, 1\] or a list of numbers of at least 0, got 1.5"), ([0, -1, 0, 0], "at least 0, got"),
     ([4, 4], "each of 4 blocks, got 2")],
)
def test_wrong_options_are_named(prune, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(build("deit"), "diffrate", r=4, prune=prune)

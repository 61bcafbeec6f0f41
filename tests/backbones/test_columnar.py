"""Where the class token stands, and what is left of it outside."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionbb.backbones import ClassTokenStem, fold_class_position


@pytest.mark.parametrize(("H", "W"), [(32, 32), (24, 24), (8, 8), (21, 37)])  # even and odd numbers of patches
def test_a_class_token_in_the_middle(H, W):
    stem = ClassTokenStem(8, 3, 6, (3, 3), middle=True)
    front = ClassTokenStem(8, 3, 6, (3, 3))
    front.load_state_dict(stem.state_dict())
    x = torch.randn(2, 3, H, W)
    tokens, h, w = stem(x)
    assert (h, w) == (-(-H // 8), -(-W // 8))
    assert tokens.shape == (2, 1 + h * w, 6)
    torch.testing.assert_close(tokens[:, h * w // 2], stem.cls_token[0].expand(2, -1))
    torch.testing.assert_close(stem.class_first(tokens), front(x)[0])
    torch.testing.assert_close(front.class_first(front(x)[0]), front(x)[0])


def test_patches_overlap_by_their_stride():
    stem = ClassTokenStem(16, 3, 6, (3, 3), stride=8)
    tokens, h, w = stem(torch.randn(1, 3, 32, 32))
    assert (h, w) == (3, 3)
    x = torch.randn(1, 3, 20, 32)  # zeros below
    tokens, h, w = stem(x)
    assert (h, w) == (3, 3)
    patches = F.conv2d(F.pad(x, (0, 0, 0, 12)), stem.patch_embed.proj.weight, stem.patch_embed.proj.bias, 8)
    torch.testing.assert_close(tokens[:, 1:], patches.flatten(2).mT + stem.pos_embed.flatten(1, 2))
    with pytest.raises(ValueError, match="stride must divide patch_size = 16, got 6"):
        ClassTokenStem(16, 3, 6, (3, 3), stride=6)


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resampled_as_asked_for(antialias):
    stem = ClassTokenStem(4, 3, 6, (8, 8), antialias=antialias)
    torch.nn.init.zeros_(stem.patch_embed.proj.weight)
    torch.nn.init.zeros_(stem.patch_embed.proj.bias)
    tokens, _, _ = stem(torch.randn(1, 3, 12, 20))
    want = F.interpolate(stem.pos_embed.permute(0, 3, 1, 2), (3, 5), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(tokens[:, 1:].mT.unflatten(2, (3, 5)), want)


@pytest.mark.parametrize(("middle", "before"), [(False, 0), (True, 4)])
def test_positions_of_a_class_token_are_folded_into_it(middle, before):
    cls_token, pos = torch.randn(1, 1, 5), torch.randn(1, 10, 5)
    folded = fold_class_position(cls_token, pos, middle)
    torch.testing.assert_close(folded["stem.cls_token"], cls_token + pos[:, before : before + 1])
    rest = [i for i in range(10) if i != before]
    torch.testing.assert_close(folded["stem.pos_embed"], pos[:, rest].view(1, 3, 3, 5))
    with pytest.raises(ValueError, match="a class token and a square map of patches, got 11 positions"):
        fold_class_position(cls_token, torch.randn(1, 11, 5), middle)

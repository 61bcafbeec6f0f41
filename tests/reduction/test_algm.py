"""ALGM against its formulas, written out for one image at a time, and batches of images that keep unequal numbers."""
import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer

from visionbb.reduction import reduce_tokens
from visionbb.reduction.algm import similar_pairs, similar_windows
from visionbb.reduction.matching import pad

from .conftest import SIZES, build


def plain_and_busy(seed: int = 0) -> torch.Tensor:
    """Images (3, 3, 64, 64) of 8 x 8 patches: one plain, one plain in the upper half, one busy all over."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 3, 64, 64, generator=generator)
    images = torch.randn(3, 3, 1, 1, generator=generator) + 0.02 * noise
    images[1, :, 32:] = noise[1, :, 32:]
    images[2] = noise[2]
    return images


def network(family: str, **kwargs):
    model = build(family)
    for name, p in model.named_parameters():
        if name == "pos_embed":
            p.data.mul_(0.05)
    return reduce_tokens(model, "algm", **kwargs)


def cosine(a, b) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


@torch.no_grad()
def test_windows_are_their_definition():
    x = torch.randn(2, 15, 6, generator=torch.Generator().manual_seed(0)) + 1
    into, stays = similar_windows(x, (3, 5), 0.6)
    merged = 0
    for b in range(2):
        want = list(range(15))
        for corner in (0, 2):  # of a grid of 3 x 5: two whole windows
            window = [corner, corner + 1, corner + 5, corner + 6]
            pairs = [cosine(x[b, i], x[b, j]) for i in window for j in window if i < j]
            if sum(pairs) / 6 >= 0.6:
                merged += 1
                for i in window:
                    want[i] = corner
        assert into[b].tolist() == want
        assert stays[b].tolist() == [i == w for i, w in enumerate(want)]
    assert 0 < merged < 4


@torch.no_grad()
def test_pairs_are_their_definition():
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 21, dtype=torch.bool)
    real[1, 16:] = False
    into, stays = similar_pairs(x, real, first=1, layer=3)
    for b, n in enumerate((21, 16)):
        best = {i: max((cosine(x[b, i], x[b, j]), j) for j in range(0, n, 2)) for i in range(1, n, 2)}
        scores = torch.tensor([score for score, _ in best.values()])
        threshold = float(scores.mean() + scores.std() / 3)
        going = {i: j for i, (score, j) in best.items() if score >= threshold}
        assert 0 < len(going) < len(best)
        assert into[b, :n].tolist() == [going.get(i, i) for i in range(n)]
        assert stays[b].tolist() == [i < n and i not in going for i in range(21)]


def test_padding_by_hand():
    into = torch.tensor([[0, 0, 2, 0], [0, 1, 2, 3], [1, 1, 1, 1]])
    stays = torch.tensor([[True, False, True, False], [True, True, True, False], [False, True, False, False]])
    assignment = pad(into, stays)
    assert assignment.index[0].tolist() == [0, 0, 1, 0]
    assert assignment.index[1, :3].tolist() == [0, 1, 2]
    assert assignment.index[2].tolist() == [0, 0, 0, 0]
    assert assignment.place.shape == (3, 3)
    assert [assignment.place[0, :2].tolist(), assignment.place[1].tolist(), assignment.place[2, :1].tolist()] == [
        [0, 2], [0, 1, 2], [1]]


@torch.no_grad()
def test_sizes_and_sources_agree():
    x, state, _ = network("dinov2", threshold=0.9, global_block=2).forward_tokens(plain_and_busy())
    counts = [len(source.unique()) for source in state.source]
    assert len(set(counts)) == 3, "the case must have unequal numbers"
    assert max(counts) == state.size.shape[1] == x.shape[1] - state.prefix
    for source, size, count in zip(state.source, state.size, counts, strict=True):
        assert torch.equal(source.bincount(minlength=len(size)).float(), size)
        assert (size[:count] > 0).all()
        assert (size[count:] == 0).all()


@pytest.mark.parametrize("proportional", [False, True])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family, proportional):
    """In float64: where rounding decides about equal similarities, tokens may go elsewhere."""
    images = plain_and_busy().double()
    model = network(family, threshold=0.9, global_block=2, proportional=proportional).double()
    logits, features = model(images), model.forward_features(images)
    assert features.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(model(images[i : i + 1]), logits[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_features(images[i : i + 1]), features[i : i + 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_proportional_attention_matters():
    images = plain_and_busy()
    first, second = (network("deit", threshold=0.9, proportional=p)(images) for p in (False, True))
    assert (first - second).abs().amax(1)[0] > 1e-4


@torch.no_grad()
def test_dense_maps_are_whole_on_any_grid():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, dynamic_img_size=True).eval()
    reduce_tokens(model, "algm", threshold=0.5, global_block=2)
    maps = model.forward_intermediates(torch.randn(2, 3, 40, 72), indices=[0, 3], intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 48, 5, 9)] * 2
    assert all(m.isfinite().all() for m in maps)


@torch.no_grad()
def test_nothing_alike_nothing_merged(images):
    """A threshold that no window reaches, in networks of one block: the plain outputs, bit by bit."""
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES | dict(depth=1)).eval()
    plain = model(images)
    assert torch.equal(reduce_tokens(model, "algm", threshold=1.1)(images), plain)


def test_training_goes_through_padding():
    model = network("average", threshold=0.9, global_block=2).train()
    model(plain_and_busy()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("block", [0, 4])
def test_block_out_of_reach(block):
    with pytest.raises(ValueError, match=rf"global_block must be in \[1, 4\), behind the first block, got {block}"):
        reduce_tokens(build("deit"), "algm", global_block=block)


def test_takes_no_schedule():
    with pytest.raises(ValueError, match="algm takes none of r, keep and target_gmacs, got r"):
        reduce_tokens(build("deit"), "algm", r=4)

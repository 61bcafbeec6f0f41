"""Every family: nothing changes at r = 0, and the whole contract holds where tokens go."""
import copy
import pickle

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

from visionbb.reduction import METHODS, reduce_tokens, remove_reduction

from .conftest import build


@torch.no_grad()
def test_without_removal_all_outputs_are_equal_bit_by_bit(family, images):
    model = build(family)
    kwargs = dict(norm=True, output_fmt="NCHW")
    plain = model(images), model.forward_features(images), *model.forward_intermediates(images, **kwargs)[1]
    reduce_tokens(model, "tome", r=0)
    reduced = model(images), model.forward_features(images), *model.forward_intermediates(images, **kwargs)[1]
    assert len(plain) == len(reduced)
    assert all(map(torch.equal, plain, reduced))


@torch.no_grad()
def test_removal_gives_other_numbers_and_remove_reduction_the_old_ones(family, images):
    model = build(family)
    keys, cls, plain = list(model.state_dict()), type(model), model(images)
    assert reduce_tokens(model, "tome", r=10) is model
    assert isinstance(model, cls)
    assert list(model.state_dict()) == keys
    change = (model(images) - plain).abs().max()
    assert 1e-4 < change / plain.abs().max() < 1
    remove_reduction(model)
    assert type(model) is cls
    assert not hasattr(model, "reducer")
    assert torch.equal(model(images), plain)


@torch.no_grad()
def test_head_weighs_tokens_by_size(family, images):
    """A head over the tokens that are left gives what the plain head gives over all patches."""
    model = reduce_tokens(build(family), "tome", r=10)
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_intermediates_are_whole_maps(family, images):
    model = reduce_tokens(build(family), "tome", r=10)
    final, maps = model.forward_intermediates(images, indices=[1, 3])
    assert [m.shape for m in maps] == [(2, 48, 8, 8)] * 2
    torch.testing.assert_close(final, model.forward_features(images))
    for m, left in zip(maps, (44, 24)):
        assert all(len(one.flatten(1).T.unique(dim=0)) == left for one in m)
    stopped = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped[0], maps[0])


@torch.no_grad()
def test_copies_and_pickles(family, images):
    model = reduce_tokens(build(family), "tome", r=10)
    want = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), want)
        assert type(twin) is type(model)
        assert type(remove_reduction(twin)) is type(build(family))
    assert torch.equal(model(images), want)


def test_checkpointing_gives_the_same_gradients(family, images):
    model = reduce_tokens(build(family).train(), "tome", r=10)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert grad is not None, name
        assert torch.equal(grad, gradients[1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(family, images, dtype):
    model = reduce_tokens(build(family).to(dtype), "tome", r=10)
    out = model(images.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


OTHERS = {
    "algm": dict(threshold=0.3, global_block=2), "as_vit": {}, "diffrate": dict(r=10),
    "dynamic_vit": dict(keep=0.7), "evit": dict(keep=0.7), "ia_red2": {}, "mctf": dict(r=10), "pitome": dict(r=10),
    "tofu": dict(r=10), "zero_tprune": dict(keep=0.7),
}


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_in_half_precision_and_with_checkpointing(family, images, method):
    if METHODS[method].needs_class_token and family in ("average", "siglip", "column"):
        with pytest.raises(ValueError, match="class token"):
            reduce_tokens(build(family), method, **OTHERS[method])
        return
    with torch.no_grad():
        half = reduce_tokens(build(family).bfloat16(), method, **OTHERS[method])
        for out in (half(images.bfloat16()), half.forward_features(images.bfloat16())):
            assert out.dtype == torch.bfloat16
            assert out.isfinite().all()
    model, gradients = reduce_tokens(build(family).train(), method, **OTHERS[method]), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # some draw
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0].keys() >= {name for name, _ in model.named_parameters() if not name.startswith("reducer.")}
    for name, grad in gradients[0].items():
        assert grad.isfinite().all(), name
        assert torch.equal(grad, gradients[1][name]), name


@torch.no_grad()
def test_registers_and_class_tokens_never_move(images):
    model = reduce_tokens(build("dinov2"), "tome", r=32)
    x, state, _ = model.forward_tokens(images)
    assert state.prefix == 5
    assert x.shape[1] - 5 == state.size.shape[1] == 4  # 64, 32, 16, 8, 4
    assert state.source.shape == (2, 64)
    with_prefix = model.forward_intermediates(images, indices=[3], return_prefix_tokens=True, intermediates_only=True)
    torch.testing.assert_close(with_prefix[0][1], x[:, :5])


@torch.no_grad()
def test_timm_feature_extraction(images):
    model = reduce_tokens(build("deit"), "tome", r=10)
    want = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    features = FeatureGetterNet(model, out_indices=[0, 2])
    assert all(map(torch.equal, features(images), want))
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[0, 2])
    reduce_tokens(net.model, "tome", r=10)
    assert [f.shape for f in net(torch.zeros(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2


@torch.no_grad()
def test_other_image_sizes():
    from timm.models import VisionTransformer

    from .conftest import SIZES

    model = VisionTransformer(**SIZES, dynamic_img_size=True).eval()
    reduce_tokens(model, "tome", r=10)
    (last,) = model.forward_intermediates(torch.randn(1, 3, 40, 96), indices=1, intermediates_only=True)
    assert last.shape == (1, 48, 5, 12)

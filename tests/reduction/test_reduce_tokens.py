"""What `reduce_tokens` refuses, schedules, budgets and the report."""
import pytest
import timm
import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import ParallelScalingBlock

import visionbb
from visionbb.models.drop_ins import DropIn
from visionbb.profiling import count_flops
from visionbb.reduction import METHODS, reduce_tokens

from .conftest import SIZES, build


def test_is_reachable_from_the_package():
    assert visionbb.reduction.reduce_tokens is reduce_tokens
    names = "algm as_vit diffrate dynamic_vit evit ia_red2 mctf pitome tofu tome zero_tprune"
    assert set(names.split()) <= METHODS.keys()


# ---- Refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: timm.create_model("resnet18"), "one of the families .*, got ResNet"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "got SwinTransformer"),
        (lambda: timm.create_model("beit_base_patch16_224"), "got Beit"),
        (lambda: VisionTransformer(**SIZES, block_fn=ParallelScalingBlock), "block 0 is .*ParallelScalingBlock"),
        (lambda: VisionTransformer(**SIZES, attn_layer="diff"), "DiffAttention"),
        (lambda: VisionTransformer(**SIZES, global_pool="prr"), "'prr'"),
        (lambda: VisionTransformer(**SIZES, patch_drop_rate=0.5), "patch_drop_rate"),
        (lambda: DropIn(mixer="elu", **SIZES), "LinearAttention"),
        (lambda: timm.create_model("nat_isotropic_small"), "NeighborhoodAttention"),
    ],
)
def test_models_that_it_does_not_know_are_refused_with_the_reason(model, reason):
    with torch.device("meta"):
        model = model()
    cls = type(model)
    with pytest.raises(TypeError, match=reason):
        reduce_tokens(model, "tome", r=4)
    assert type(model) is cls


def test_a_forward_of_its_own_is_refused():
    class Mine(VisionTransformer):
        def forward_features(self, x, **kwargs):
            return super().forward_features(x, **kwargs) * 2

    with pytest.raises(TypeError, match="forward_features is not that of VisionTransformer"):
        reduce_tokens(Mine(**SIZES), "tome", r=4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(method="tomee", r=4), ValueError, "method must be one of .*'tomee'"),
        (dict(method="tome"), ValueError, "exactly one of r, keep and target_gmacs, got none"),
        (dict(method="tome", r=4, keep=0.5), ValueError, "got r, keep"),
        (dict(method="tome", r=-1), ValueError, "at least 0, got -1"),
        (dict(method="tome", r=2.5), ValueError, "r must be made of ints .* got 2.5"),
        (dict(method="tome", r=True), ValueError, "got True"),
        (dict(method="tome", r=[4, 4]), ValueError, "each of 4 blocks, got 2"),
        (dict(method="tome", r={7: 4}), ValueError, "from 0 to 3, got 7"),
        (dict(method="tome", r=(8, 2.0)), ValueError, "slope in .* got 2.0"),
        (dict(method="evit", keep=0.0), ValueError, r"numbers in \(0, 1\], got 0.0"),
        (dict(method="evit", keep=1.5), ValueError, "got 1.5"),
        (dict(method="tome", target_gmacs=9.0), ValueError, "target_gmacs must lie below"),
        (dict(method="tome", target_gmacs=1e-4), ValueError, "the least that ToMe reaches"),
        (dict(method="tome", r=4, proportion=True), TypeError, "no option 'proportion'; it has: proportional"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    model = build("deit")
    with pytest.raises(error, match=message):
        reduce_tokens(model, **kwargs)
    assert type(model) is VisionTransformer


def test_evit_needs_a_class_token():
    with pytest.raises(ValueError, match="attention of the class token, which VisionTransformer has not"):
        reduce_tokens(build("siglip"), "evit", keep=0.7)


def test_masks_are_refused(images):
    model = reduce_tokens(build("deit"), "tome", r=4)
    with pytest.raises(ValueError, match="no attn_mask"):
        model(images, is_causal=True)


def test_a_failed_call_leaves_a_reduced_model_as_it_was(images):
    model = reduce_tokens(build("deit"), "tome", r=4)
    with pytest.raises(ValueError, match="keep"):
        reduce_tokens(model, "evit", keep=2.0)
    assert model.reduction.schedule == (4,) * 4
    reduce_tokens(model, "tome", r=6)
    assert model.reduction.schedule == (6,) * 4


# ---- Schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("method", "kwargs", "left"),
    [
        ("tome", dict(r=10), [54, 44, 34, 24]),
        ("tome", dict(r=(10, 1.0)), [64, 58, 45, 25]),
        ("tome", dict(r=[10, -1.0]), [44, 31, 25, 25]),  # as a recipe has it
        ("tome", dict(r=[0, 20, 0, 4]), [64, 44, 44, 40]),
        ("tome", dict(r={2: 8}), [64, 64, 56, 56]),
        ("tome", dict(r=30), [34, 17, 9, 5]),  # half at most
        ("tome", dict(keep=0.75), [48, 36, 27, 21]),
        ("evit", dict(keep=0.7), [64, 45, 32, 23]),
        ("evit", dict(keep={1: 0.5}), [64, 32, 32, 32]),
        ("evit", dict(keep=0.7, fuse_token=True), [64, 45, 32, 23]),
        ("evit", dict(r=100), [64, 1, 1, 1]),
    ],
)
def test_tokens_left_behind_each_block(images, method, kwargs, left):
    report = reduce_tokens(build("deit"), method, **kwargs).reduction.report(images)
    assert [mlp for _, mlp in report.tokens] == left
    assert [attention for attention, _ in report.tokens] == [64, *left[:-1]]


def test_report(images):
    report = reduce_tokens(build("dinov2"), "tome", r=10).reduction.report(images)
    assert report.grid == (8, 8)
    assert report.source.shape == (2, 64)
    assert report.size.sum(1).tolist() == [64, 64]
    assert report.gmacs < report.plain_gmacs
    assert str(report).splitlines()[1].split() == ["0", "64", "54"]
    dropped = reduce_tokens(build("deit"), "evit", keep=0.5).reduction.report(images)
    assert (dropped.source == -1).sum(1).tolist() == [56, 56]


# ---- Multiply-adds --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("method", "kwargs", "published"),
    [("tome", dict(r=0), 4.6), ("tome", dict(r=13), 2.7), ("tome", dict(r=16), 2.3), ("evit", dict(keep=0.7), 3.0),
     ("evit", dict(keep=0.5), 2.3), ("dynamic_vit", dict(r={3: 59, 6: 41, 9: 29}), 2.98)],  # 2.9 and its predictors
)
def test_gmacs_of_deit_small_are_the_published_ones_and_those_counted(method, kwargs, published):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224").eval()
        reduce_tokens(model, method, **kwargs)
        closed = model.reduction.report(torch.empty(1, 3, 224, 224)).gmacs
    assert closed == pytest.approx(published, abs=0.051)
    assert count_flops(model, 224).gmacs == pytest.approx(closed, rel=0.008)


def test_gmacs_of_every_family_are_those_counted(family):
    model = build(family)
    size = torch.empty(1, 3, 64, 64, device="meta")
    counted = count_flops(model, 64).gmacs
    closed = reduce_tokens(model.to("meta"), "tome", r=0).reduction.report(size).gmacs
    assert closed == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("target", [2.3, 2.9, 3.7])
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_budget_is_met_closely(method, target):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        reduce_tokens(model, method, target_gmacs=target)
        gmacs = model.reduction.report(torch.empty(1, 3, 224, 224)).gmacs
    assert target - 0.03 < gmacs <= target

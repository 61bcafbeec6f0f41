from __future__ import annotations

import pytest
import timm
import torch
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch import nn

from visionbb.mm import SimpleFeaturePyramid, TimmBackbone
from visionbb.mm.backbone import load_classifier

# Name, intermediates, expected strides: every kind of family, timm's and visionbb's.
MODELS_OF_ALL_KINDS = {
    "test_convnext": ((0, 1, 2, 3), [4, 8, 16, 32]),
    "test_resnet": ((1, 2, 3), [4, 8, 16]),
    "test_efficientnet": ((1, 2, 3, 4), [4, 8, 16, 32]),
    "mambaout_femto": ((0, 3), [4, 32]),  # NHWC inside
    "swin_tiny_patch4_window7_224": ((0, 1, 2, 3), [4, 8, 16, 32]),  # of fixed size, unless told
    "test_vit": ((-1,), [16]),
    "nat_digits": ((0, 1, 2, 3), [4, 8, 16, 32]),
    "ravlt_tiny": ((1, 2, 3), [8, 16, 32]),
    "nat_isotropic_small": ((5, 11), [16, 16]),
    "vitrpb_small": ((-1,), [16]),  # with a class token
}


@pytest.mark.parametrize("name", MODELS_OF_ALL_KINDS)
def test_maps_of_any_model_at_any_size(name):
    indices, strides = MODELS_OF_ALL_KINDS[name]
    backbone = TimmBackbone(name, out_indices=indices, with_cp=True).train()
    x = torch.randn(2, 3, 72, 104, requires_grad=True)
    maps = backbone(x)
    assert backbone.strides == strides
    for m, channels, stride in zip(maps, backbone.channels, strides, strict=True):
        assert m.shape[:2] == (2, channels)
        assert all(abs(side - full / stride) < 1 for side, full in zip(m.shape[2:], (72, 104)))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    unused = [key for key, p in backbone.named_parameters() if p.grad is None]
    assert not unused  # DistributedDataParallel would wait for them


def test_agrees_with_the_classification_model():
    """Output i is the norm of the whole model's intermediate i, weights under the same names."""
    backbone = TimmBackbone("nat_digits", out_indices=(1, 3)).eval()
    whole = timm.create_model("nat_digits").eval()
    assert set(backbone.model.state_dict()) < set(whole.state_dict())
    nn.Module.load_state_dict(whole, backbone.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, (1, 3), intermediates_only=True)
        for m, e in zip(backbone(x), expected):
            torch.testing.assert_close(m, torch.nn.functional.layer_norm(
                e.permute(0, 2, 3, 1), e.shape[1:2], eps=1e-6).permute(0, 3, 1, 2))
        plain = TimmBackbone("nat_digits", out_indices=(1, 3), out_norm=False).eval()
        plain.model.load_state_dict(backbone.model.state_dict())
        assert all(torch.equal(m, e) for m, e in zip(plain(x), expected))


def test_arguments_reach_the_model():
    dilations = [[2], [1, 2], [1], [1]]
    backbone = TimmBackbone("nat_digits", dilations=dilations, drop_path_rate=0.3)
    blocks = [block for stage in backbone.model.stages for block in stage.blocks]
    assert [list(block.mixer.dilation) for block in blocks] == [[d, d] for d in (2, 1, 2, 1, 1, 1)]
    assert max(m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")) == pytest.approx(0.3)
    with pytest.raises(TypeError, match="windows"):
        TimmBackbone("nat_digits", windows=7)


@pytest.mark.parametrize("arguments", [
    dict(model_name="test_vit"),
    dict(model_name="deit_tiny_patch16_224_elu", mixer="softmax", depth=2),  # a column of ours
])
def test_reduced_vits_give_whole_maps(arguments):
    def maps(**reduction):
        torch.manual_seed(0)
        backbone = TimmBackbone(**arguments, out_indices=(0, -1), reduction=reduction or None).eval()
        backbone.init_weights()
        return backbone(x)

    x = torch.randn(2, 3, 72, 104)
    with torch.no_grad():
        for whole, still, fewer in zip(maps(), maps(method="tome", r=0), maps(method="tome", r=8), strict=True):
            assert torch.equal(whole, still)
            assert fewer.shape == whole.shape
            assert torch.isfinite(fewer).all()
            assert not torch.equal(whole, fewer)


def test_reduction_parameters_outlive_a_checkpoint(tmp_path):
    whole = timm.create_model("test_vit")
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    backbone = TimmBackbone(
        "test_vit", out_indices=(-1,), checkpoint=str(tmp_path / "vit.safetensors"), reduction=dict(method="as_vit")
    )
    thresholds = [p.clone() for key, p in backbone.model.named_parameters() if key.startswith("reducer.")]
    backbone.init_weights()
    assert torch.equal(backbone.model.blocks[0].mlp.fc1.weight, whole.blocks[0].mlp.fc1.weight)
    kept = [p for key, p in backbone.model.named_parameters() if key.startswith("reducer.")]
    assert kept
    assert all(torch.equal(p, before) for p, before in zip(kept, thresholds, strict=True))


# ---- Weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoint(tmp_path, suffix):
    """A classification checkpoint of other classes: the classifier is not needed, everything else is there."""
    source = timm.create_model("nat_digits", num_classes=7)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, file)
    else:
        save_file(source.state_dict(), file)
    backbone = MODELS.build(dict(type="visionbb.TimmBackbone", model_name="nat_digits", checkpoint=str(file)))
    backbone.init_weights()
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_without_checkpoint_weights_stay():
    """mmengine's Runner calls init_weights on everything; it must not draw or overwrite anything here."""
    backbone = TimmBackbone("test_convnext")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert backbone.is_init
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_authors_key_names(tmp_path):
    """An official NAT checkpoint has other names; `checkpoint_filter_fn` of the family is asked."""
    model = timm.create_model("nat_digits")
    official = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "patch_embed.").replace(".mixer.", ".attn.").replace("head.fc.", "head.")
        stage = key.split(".")[1] if key.startswith("stages.") else ""
        if ".downsample." in key:
            key = key.replace(f"stages.{stage}", f"levels.{int(stage) - 1}")
        official[key.replace("stages.", "levels.")] = value
    assert "levels.0.blocks.0.attn.rpb" in official
    target = timm.create_model("nat_digits")
    torch.save({"model": official}, tmp_path / "official.pth")
    load_classifier(target, tmp_path / "official.pth")
    key = "stages.0.blocks.0.mixer.rpb"
    assert torch.equal(target.state_dict()[key], model.state_dict()[key])


def test_checkpoint_of_another_model(tmp_path):
    file = tmp_path / "other.pth"
    torch.save(timm.create_model("test_convnext").state_dict(), file)
    backbone = TimmBackbone("nat_digits", checkpoint=str(file))
    with pytest.raises(ValueError, match=r"does not fit nat_digits: \d+ missing \(.*left over"):
        backbone.init_weights()
    wider = timm.create_model("nat_digits", embed_dim=64, num_heads=(2, 4, 8, 16))
    torch.save(wider.state_dict(), file)
    with pytest.raises(ValueError, match="of another shape"):
        backbone.init_weights()
    part = timm.create_model("nat_digits").state_dict()
    del part["norm.weight"]
    torch.save(part, file)
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\)"):
        backbone.init_weights()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model_name="nat_tinny"), "unknown model 'nat_tinny'; close names: nat_tiny"),
        (dict(model_name="nat_digits", out_indices=(0, 4)), "within the 4 intermediates of nat_digits, got \\(0, 4\\)"),
        (dict(model_name="nat_digits", out_indices=()), "out_indices"),
        (dict(model_name="nat_digits", frozen_stages=5), "frozen_stages must be within -1 and 4 for nat_digits, got 5"),
        (dict(model_name="nat_digits", pretrained="a.pth"), "files are given as checkpoint="),
        (dict(model_name="nat_digits", pretrained=True, checkpoint="a.pth"), "not from both"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_no_such_checkpoint():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere.pth'"):
        TimmBackbone("nat_digits", checkpoint="nowhere.pth").init_weights()


# ---- Frozen parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [-1, 0, 1, 2, 4])
@pytest.mark.parametrize("name", ["nat_digits", "test_convnext"])
def test_frozen_stages(name, stages):
    backbone = TimmBackbone(name, frozen_stages=stages, drop_path_rate=0.2)
    prefixes = ("model.stem", *(f"model.stages.{i}." for i in range(4)))
    assert backbone.train() is backbone
    for key, parameter in backbone.named_parameters():
        frozen = key.startswith(prefixes[: stages + 1]) if stages >= 0 else False
        assert parameter.requires_grad is not frozen, key
    training = [i for i, stage in enumerate(backbone.model.stages) if stage.training]
    assert training == list(range(max(stages, 0), 4))
    if stages < 4:
        backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()


def test_frozen_batch_norms_keep_their_statistics():
    backbone = TimmBackbone("test_resnet", out_indices=(1, 2, 3), frozen_stages=1).train()
    before = {key: value.clone() for key, value in backbone.model.state_dict().items() if "running_mean" in key}
    backbone(torch.randn(4, 3, 64, 64))
    changed = {key for key, value in before.items() if not torch.equal(value, backbone.model.state_dict()[key])}
    assert changed
    assert all(key.startswith(("layer2", "layer3", "layer4")) for key in changed)


def test_norm_eval():
    backbone = TimmBackbone("ravlt_tiny", norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    assert all(m.training for m in TimmBackbone("ravlt_tiny").train().modules() if isinstance(m, nn.BatchNorm2d))


def test_autocast():
    backbone = TimmBackbone("nat_digits").train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(torch.randn(2, 3, 64, 64))
        sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


# ---- Pyramid of a plain ViT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "nat_isotropic_small", "vitrpb_small"])
def test_simple_feature_pyramid(name):
    backbone = TimmBackbone(name, out_indices=(-1,))
    neck = MODELS.build(dict(
        type="visionbb.SimpleFeaturePyramid", in_channels=backbone.channels[0], out_channels=32, num_outs=5
    ))  # fmt: skip
    maps = neck(backbone(torch.randn(1, 3, 96, 128)))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 96 // s, 128 // s) for s in (4, 8, 16, 32)] + [(32, 2, 2)]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_simple_feature_pyramid_refuses():
    with pytest.raises(ValueError, match=r"scale_factors must be 4, 2, 1 or 0\.5, got 3"):
        SimpleFeaturePyramid(8, scale_factors=(3,))
    with pytest.raises(ValueError, match="num_outs must be at least 4"):
        SimpleFeaturePyramid(8, num_outs=3)

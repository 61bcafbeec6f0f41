"""Drop-ins: DeiT in all but its attention; what they inherit from a ViT, and that each of them learns."""
from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import nn

from visionbb.mixers import LinearAttention
from visionbb.models import drop_ins, inherit_attention
from visionbb.models.drop_ins import AGENT_BIASES, MIXERS, DropIn
from visionbb.training import Digits

OURS = [name for name in MIXERS if name != "softmax"]
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)

by_mixer = pytest.mark.parametrize("mixer", MIXERS)


def small(mixer: str, **kwargs) -> DropIn:
    torch.manual_seed(0)
    return DropIn(mixer=mixer, **{**SMALL, **kwargs}).eval()


def vit(**kwargs) -> VisionTransformer:
    """A small ViT of timm's with weights that let every layer matter."""
    torch.manual_seed(1)
    model = VisionTransformer(**{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 and p.shape[0] > 1 else 0.5)
    return model


def images(H: int = 32, W: int = 32, chans: int = 3) -> torch.Tensor:
    return torch.randn(2, chans, H, W, generator=torch.Generator().manual_seed(2))


# ---- DeiT in all but its attention ----------------------------------------------------------------------------------

def test_every_mixer_comes_in_three_sizes():
    assert set(drop_ins.VARIANTS) == {
        f"deit_{size}_patch16_224_{mixer}" for size in ("tiny", "small", "base") for mixer in OURS
    }
    for name, args in drop_ins.VARIANTS.items():
        names = name, name.removesuffix(f"_{args['mixer']}")
        model, deit = (timm.create_model(n, device="meta", depth=1) for n in names)
        assert drop_ins._traits(model) == drop_ins._traits(deit)
        cfg, deit_cfg = model.pretrained_cfg, deit.pretrained_cfg
        for key in ("mean", "std", "crop_pct", "interpolation", "input_size", "num_classes"):
            assert cfg[key] == deit_cfg[key]


@torch.backends.mkldnn.flags(enabled=False)  # timm's linear layers are MKL's
def test_with_softmax_it_is_timms_deit():
    """To the bit, from timm's own checkpoint, at every depth and at another size."""
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, depth=3).eval()
    nn.init.normal_(theirs.cls_token)
    nn.init.normal_(theirs.head.weight, std=0.1)
    ours = DropIn(mixer="softmax", depth=3).eval()
    ours.load_state_dict(theirs.state_dict())
    for H, W in ((224, 224), (256, 192)):
        x = images(H, W)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    final, maps = ours.forward_intermediates(x, norm=True)
    wanted, their_maps = theirs.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, wanted, rtol=0, atol=0)
    torch.testing.assert_close(maps, their_maps, rtol=0, atol=0)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_pooling_is_timms(pool):
    theirs = vit(global_pool=pool, fc_norm=False, final_norm=True)
    ours = small("softmax", global_pool=pool)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=0)


@pytest.mark.parametrize("mixer", ["softmax", "focused", "agent"])
def test_tables_of_another_size_are_resampled(mixer):
    """When a checkpoint is loaded as when an image comes; from timm's checkpoints too."""
    x, loaded, at_forward = images(48, 40), small(mixer, img_size=(48, 40)), small(mixer)
    with torch.no_grad():
        for p in at_forward.parameters():
            p.normal_(0, 0.2)
    loaded.load_state_dict(at_forward.state_dict())
    assert loaded.stem.pos_embed.shape == (1, 6, 5, 32)
    torch.testing.assert_close(loaded(x), at_forward(x), rtol=0, atol=0)
    theirs = vit()
    for model in (loaded, at_forward):
        model.load_state_dict(theirs.state_dict(), strict=mixer == "softmax")
    torch.testing.assert_close(loaded(x), at_forward(x), rtol=0, atol=0)


@by_mixer
def test_one_model_takes_any_image(mixer):
    model = small(mixer)
    first = model(images())
    for H, W in ((33, 70), (8, 8), (100, 31), (5, 3)):
        final, maps = model.forward_intermediates(images(H, W))
        h, w = math.ceil(H / 8), math.ceil(W / 8)
        assert final.shape == (2, 1 + h * w, 32)
        assert [m.shape for m in maps] == [(2, 32, h, w)] * 2
        assert model.forward_head(final).isfinite().all()
    torch.testing.assert_close(model(images()), first, rtol=0, atol=0)


@by_mixer
def test_native_checkpoints_come_back_as_they_are(mixer, tmp_path):
    model = small(mixer)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = DropIn(mixer=mixer, **SMALL).eval()
    again.load_state_dict(torch.load(tmp_path / "own.pth"))
    torch.testing.assert_close(again(images()), model(images()), rtol=0, atol=0)


def test_checkpoints_with_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="a class token and a square map of patches, got 18 positions"):
        small("softmax").load_state_dict(
            timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=1).state_dict()
        )


def test_feature_maps_and_layer_decay():
    model = timm.create_model("deit_tiny_patch16_224_polar", features_only=True, **SMALL | dict(depth=4, num_classes=0))
    assert [m.shape for m in model(images(40, 24))] == [(2, 32, 5, 3)] * 3
    groups = timm.optim.param_groups_layer_decay(small("polar"), layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 4
    spared = small("polar").no_weight_decay()
    assert {"stem.cls_token", "stem.pos_embed", "blocks.1.mixer.key_pos"} <= spared


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(mixer="sinkhorn"), ValueError, "mixer must be one of softmax, .*, got 'sinkhorn'"),
        (dict(mixer_args=dict(power=2)), TypeError, "power"),
        (dict(num_heads=5), ValueError, "dim must be a multiple of num_heads, got 32 and 5"),
        (dict(global_pool="map"), AssertionError, "global_pool must be token, .*, got 'map'"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        DropIn(**{**SMALL, **kwargs})


# ---- Starting from a ViT --------------------------------------------------------------------------------------------

def test_softmax_inherits_everything():
    theirs, ours = vit(), small("softmax")
    assert inherit_attention(ours, theirs) == []
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=0)


# What each has that a ViT has not, and the arguments that leave it away.
EXTRAS = {
    "softmax": ((), {}),
    "elu": ((), {}),
    "relu": ((), {}),
    "hedgehog": (("feature_map.q_weight", "feature_map.k_weight"), {}),
    "flow": ((), {}),
    "mala": (("local.weight", "local.bias"), dict(local_kernel=0, gate="")),
    "rala": (("local.weight", "local.bias"), dict(local_kernel=0, gate="")),
    "focused": (
        ("key_pos", "local.weight", "local.bias", "feature_map.scale"), dict(local_kernel=0, key_pos_size=None)
    ),
    "polar": (
        ("key_pos", "local.weight", "local.bias", "feature_map.scale", "feature_map.power"),
        dict(local_kernel=0, gate="", key_pos_size=None),
    ),
    "agent": (
        ("local.weight", "local.bias", *(f"biases.{i}.{part}" for i in (0, 1) for part in AGENT_BIASES.values())),
        dict(local_kernel=0, map_size=None),
    ),
    "soft": (("local", "landmarks.weight", "norm.weight", "norm.bias"), {}),
}


@by_mixer
def test_drop_ins_begin_as_plain_attention_with_another_kernel(mixer):
    """Whatever they were before: what the mixer has beside attention is without effect, all else is the ViT's."""
    extras, without = EXTRAS[mixer]
    theirs, ours = vit(), small(mixer)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.5)
    new = inherit_attention(ours, theirs)
    assert sorted(new) == sorted(f"blocks.{i}.mixer.{name}" for i in range(2) for name in extras)
    plain = small(mixer, mixer_args=without)
    inherit_attention(plain, theirs)
    torch.testing.assert_close(ours(images()), plain(images()), rtol=1e-5, atol=1e-6)
    hidden = theirs.blocks[0].norm1(theirs.pos_embed)
    q, k, v = theirs.blocks[0].attn.qkv(hidden).chunk(3, -1)
    for name, wanted in (("q", q), ("k", k), ("v", v)):
        mine = ours.blocks[0].mixer
        if name in mine.projections:
            got = getattr(mine, mine.in_proj)(hidden).chunk(len(mine.projections), -1)[mine.projections.index(name)]
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("gate", ["mul", "silu"])
def test_gates_begin_at_one(gate):
    torch.manual_seed(0)
    gated, bare = LinearAttention(8, 2, gate=gate), LinearAttention(8, 2)
    gated.begin_plain()
    with torch.no_grad():
        for own, other in ((gated.qkv, bare.qkv), (gated.proj, bare.proj)):
            own.weight[: len(other.weight)].copy_(other.weight)
            own.bias[: len(other.bias)].copy_(other.bias)
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(gated(x), bare(x))
    with pytest.raises(ValueError, match="qkv_bias must be True, got False"):
        LinearAttention(8, 2, gate=gate, qkv_bias=False).begin_plain()


def test_source_by_name_with_its_weights_from_a_file(tmp_path):
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    nn.init.normal_(theirs.head.bias)
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    ours = timm.create_model("deit_tiny_patch16_224_hedgehog", num_classes=7, img_size=64)
    head = ours.head.fc.weight.clone()
    new = inherit_attention(ours, "deit_tiny_patch16_224", tmp_path / "deit.pth")
    assert {name.partition(".mixer.")[2] or name for name in new} == {
        "head.fc.weight", "head.fc.bias", "feature_map.q_weight", "feature_map.k_weight"
    }
    torch.testing.assert_close(ours.head.fc.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(ours.blocks[3].mixer.proj.weight, theirs.blocks[3].attn.proj.weight, rtol=0, atol=0)


def test_another_pooling_keeps_its_own_head():
    ours = small("elu", global_pool="avg")
    assert inherit_attention(ours, vit()) == ["head.fc.weight", "head.fc.bias"]


def test_a_source_without_biases_leaves_none():
    theirs, ours = vit(qkv_bias=False), small("softmax")
    assert inherit_attention(ours, theirs) == ["blocks.0.mixer.qkv.bias", "blocks.1.mixer.qkv.bias"]
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_a_drop_in_inherits_from_another():
    """What both have comes along: a gate stays where the source has it."""
    source = small("mala")
    with torch.no_grad():
        for p in source.parameters():
            p.normal_(0, 0.2)
    same, other = small("mala"), small("rala")
    assert inherit_attention(same, source) == inherit_attention(other, source) == []
    torch.testing.assert_close(same(images()), source(images()), rtol=0, atol=0)
    torch.testing.assert_close(other.blocks[1].mixer.qkv.weight, source.blocks[1].mixer.qkv.weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no place for: blocks\.0\.mixer\.local\.bias, "):
        inherit_attention(small("elu"), source)


@pytest.mark.parametrize(
    ("theirs", "error", "message"),
    [
        (dict(embed_dim=64), ValueError, "source must have embed_dim 32, as the drop-in, got 64"),
        (dict(depth=3), ValueError, "source must have depth 2, as the drop-in, got 3"),
        (dict(num_heads=4), ValueError, "source must have num_heads 2, as the drop-in, got 4"),
        (dict(patch_size=4), ValueError, r"source must have patch_size \(8, 8\), as the drop-in, got \(4, 4\)"),
        (dict(in_chans=1), ValueError, "source must have in_chans 3, as the drop-in, got 1"),
        (dict(class_token=False, global_pool="avg"), ValueError, "number of class tokens 1, as the drop-in, got 0"),
        (dict(reg_tokens=4), ValueError, "number of class tokens 1, as the drop-in, got 5"),
        (dict(no_embed_class=True), ValueError, "a class token and a square map of patches, got 16 positions"),
        (dict(init_values=1e-5), ValueError, r"source has parameters .* no place for: blocks\.0\.ls1\.gamma, "),
        (dict(mlp_ratio=2), ValueError, r"blocks\.0\.mlp\.fc1\.weight must be \(128, 32\) in source, got \(64, 32\)"),
        (dict(act_layer="quick_gelu"), ValueError, "source must have activation GELU, as the drop-in, got QuickGELU"),
        (dict(norm_layer=nn.LayerNorm), ValueError, r"source must have norm \('LayerNorm', 1e-06\), .*1e-05\)"),
        (dict(block_fn=timm.models.vision_transformer.ResPostBlock), TypeError, "plain pre-norm blocks"),
    ],
)
def test_sources_that_do_not_fit(theirs, error, message):
    ours = small("elu")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    source = VisionTransformer(**{**SMALL, **theirs})
    with pytest.raises(error, match=message):
        inherit_attention(ours, source)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(TypeError, match="model must be a drop-in, a TokenColumnar, got VisionTransformer"):
        inherit_attention(vit(), vit())
    with pytest.raises(TypeError, match=r"source must be a timm VisionTransformer .* got Linear"):
        inherit_attention(small("elu"), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="checkpoint_path goes with the name of a model"):
        inherit_attention(small("elu"), vit(), tmp_path / "weights.pth")


# ---- Learning -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """32 handwritten digits, (32, 1, 32, 32), and what they are."""
    pytest.importorskip("sklearn")
    dataset = Digits("train")
    pixels = np.stack([np.asarray(image) for image in dataset.images[:32]])
    x = torch.from_numpy(pixels)[:, None].float() / 255
    return F.interpolate((x - x.mean()) / x.std(), size=32), torch.tensor(dataset.targets[:32])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@by_mixer
def test_learns_digits(mixer, autocast, digits):
    x, targets = digits
    model = small(mixer, in_chans=1, drop_path_rate=0.05, proj_drop_rate=0.05).train()
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):  # a gain of one: DeiT's 0.02 is for widths that learn in more than a few steps
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert losses[-1] < 0.8 * losses[0]


# ---- Compilers ------------------------------------------------------------------------------------------------------

@by_mixer
def test_scripts(mixer):
    model = small(mixer)
    x = images(40, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_compiles_in_one_graph():
    model = small("polar")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), model(images()))


@pytest.mark.parametrize("mixer", ["rala", "polar"])
def test_exports(mixer):
    model = small(mixer)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=16)},))
    x = torch.cat((images(), images().flip(3)))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = small("focused")
    onnxruntime_agrees(model, images(40, 32))

"""NAT, DiNAT, DiNAT_s and the columns: what they promise beyond timm's contract."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import save_for_hf

from visionbb.cards import read_card
from visionbb.mixers import NeighborhoodAttention, RelativeAttention
from visionbb.models import nat, nat_isotropic

CARDS = Path(__file__).parents[2] / "model_cards"
PYRAMIDS = [name for name in nat.VARIANTS if name != "nat_digits"]
COLUMNS = list(nat_isotropic.VARIANTS)
KINDS = ["nat_small", "dinat_tiny", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"]
PYRAMID = dict(embed_dim=16, depths=(1, 2, 3, 2), num_heads=(1, 2, 4, 8))
COLUMN = dict(embed_dim=16, depth=3, num_heads=2)


def tiny(name: str, **kwargs) -> torch.nn.Module:
    """The variant as it is but narrow and shallow, weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    small = COLUMN if name in COLUMNS else PYRAMID
    model = timm.create_model(name, **{**small, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("rpb", ".gamma", "bias")):
                p.normal_(0, 0.5)
    return model


def mixers(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Stage by stage; a column is one stage."""
    stages = [stage.blocks for stage in model.stages] if hasattr(model, "stages") else [model.blocks]
    return [[block.mixer for block in blocks] for blocks in stages]


def dilations(model: torch.nn.Module) -> list[list[int]]:
    for mixer in (m for stage in mixers(model) for m in stage):
        assert mixer.dilation[0] == mixer.dilation[1]
    return [[mixer.dilation[0] for mixer in stage] for stage in mixers(model)]


def images(model: torch.nn.Module, *size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.in_chans, *size, generator=generator)


def outputs(model: torch.nn.Module, size: int = 64) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(model, size, size))


def headless(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: p for key, p in model.state_dict().items() if not key.startswith("head.")}


# ---- Input sizes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_one_model_takes_any_image(name):
    model = tiny(name)
    first = outputs(model, 224)
    for H, W in ((256, 192), (97, 131), (512, 512), (33, 40)):
        with torch.no_grad():
            final, maps = model.forward_intermediates(images(model, H, W))
            logits = model.forward_head(final)
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(outputs(model, 224), first, rtol=0, atol=0)


# ---- Dilations ------------------------------------------------------------------------------------------------------

DILATED = {
    name: weights.settings["dilations"]
    for name, weights in read_card(CARDS / "dinat.md").tags().items()
    if "dilations" in weights.settings
}


@pytest.mark.parametrize("name", DILATED)
def test_dilations_are_the_authors_block_by_block(name):
    model = timm.create_model(name, device="meta")
    published = DILATED[name]
    assert dilations(model) == ([published] if isinstance(published[0], int) else published)


def test_nat_has_no_dilation():
    assert {d for stage in dilations(tiny("nat_tiny")) for d in stage} == {1}


def test_the_tag_brings_its_dilations_and_the_caller_overrides_them():
    assert dilations(tiny("dinat_large")) == [[1], [1, 4], [1, 2, 1], [1, 1]]
    by_tag = [[1], [1, 6], [1, 3, 1], [1, 1]]
    assert dilations(tiny("dinat_large.in22k_in1k_384")) == by_tag
    assert dilations(tiny("dinat_large", pretrained_cfg="in22k_in1k_384")) == by_tag
    mine = [[2], [1, 5], [3, 2, 1], [2, 1]]
    assert dilations(tiny("dinat_large.in22k_in1k_384", dilations=mine)) == mine
    assert dilations(tiny("dinat_large", dilations=[[1], [3], [1, 2], [1]])) == [[1], [3, 3], [1, 2, 1], [1, 1]]
    assert dilations(tiny("dinat_isotropic_small")) == [[1, 2, 1]]
    assert dilations(tiny("nat_isotropic_small", dilations=(1, 1, 3))) == [[1, 1, 3]]


def test_dilations_are_no_part_of_the_weights():
    narrow, wide = tiny("dinat_tiny"), tiny("dinat_tiny", dilations=[[1], [1, 2], [1, 3, 1], [1]])
    wide.load_state_dict(narrow.state_dict())
    assert not torch.allclose(outputs(narrow, 224), outputs(wide, 224))


def test_layer_scale_is_where_the_authors_have_it():
    gained = {name for name, args in nat.VARIANTS.items() if args.get("layer_scale") is not None}
    assert gained == {"nat_small", "nat_base", "dinat_base"}
    assert any("gamma" in key for key in tiny("nat_small").state_dict())
    assert not any("gamma" in key for key in tiny("dinat_small").state_dict())


# ---- The authors' checkpoints ---------------------------------------------------------------------------------------

def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def authors_shapes(name: str, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Key names of the authors' checkpoint of this variant, with the shapes that a model of this width has."""
    column, patches = name in COLUMNS, name.startswith("dinat_s_")
    dims = [m[0].proj.in_features for m in mixers(model)]
    heads = [m[0].num_heads for m in mixers(model)]
    stem = model.stem.proj if column or patches else None
    keys = affine("patch_embed.norm", dims[0]) | affine("norm", dims[-1]) | affine("head", 5, dims[-1])
    if stem is not None:
        keys |= affine("patch_embed.proj", dims[0], 3, *stem.kernel_size)
    else:
        keys |= affine("patch_embed.proj.0", dims[0] // 2, 3, 3, 3)
        keys |= affine("patch_embed.proj.1", dims[0], dims[0] // 2, 3, 3)
    for i, (dim, stage) in enumerate(zip(dims, mixers(model), strict=True)):
        root = "layers" if column or patches else "levels"
        for j in range(len(stage)):
            block = f"{root}.{j}" if column else f"{root}.{i}.blocks.{j}"
            hidden = dim * (4 if column or patches else 3 if name.endswith(("_mini", "_tiny")) else 2)
            side = 27 if name.startswith("vitrpb") else 21 if name.endswith("11x11") else 13
            keys |= affine(f"{block}.norm1", dim) | affine(f"{block}.norm2", dim)
            keys |= affine(f"{block}.attn.qkv", 3 * dim, dim) | affine(f"{block}.attn.proj", dim, dim)
            keys |= affine(f"{block}.mlp.fc1", hidden, dim) | affine(f"{block}.mlp.fc2", dim, hidden)
            keys[f"{block}.attn.rpb"] = (heads[i], side, side)
            if name in ("nat_small", "nat_base", "dinat_base"):
                keys |= {f"{block}.gamma1": (dim,), f"{block}.gamma2": (dim,)}
        if i < len(dims) - 1:
            down = f"{root}.{i}.downsample"
            keys |= affine(f"{down}.norm", 4 * dim if patches else 2 * dim)
            keys[f"{down}.reduction.weight"] = (2 * dim, 4 * dim) if patches else (2 * dim, dim, 3, 3)
    return keys


def authors_weights(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint in the authors' words, random."""
    generator = torch.Generator().manual_seed(2)
    shapes = authors_shapes(name, model).items()
    weights = {key: 0.3 * torch.randn(*shape, generator=generator) for key, shape in shapes}
    if name.startswith("vitrpb"):
        for j in range(len(model.blocks)):
            weights[f"layers.{j}.attn.relative_position_index"] = torch.zeros(196, 196, dtype=torch.long)
    return weights


def in_transformers_words(weights: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """The same checkpoint as transformers' {Nat,Dinat}ForImageClassification names it."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm",
        "levels": "encoder.levels", "blocks": "layers", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.rpb": "attention.self.rpb", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }
    out = {}
    for key, value in weights.items():
        if key.startswith("head."):
            out[key.replace("head", "classifier")] = value
            continue
        if key.startswith("norm."):
            key = f"layernorm.{key.removeprefix('norm.')}"
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = f"{family}.{key}"
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[key.replace("attn.qkv", f"attention.self.{part}")] = third
        elif key.endswith("gamma1"):
            out[key.replace("gamma1", "layer_scale_parameters")] = value
        elif key.endswith("gamma2"):
            stacked = key.replace("gamma2", "layer_scale_parameters")
            out[stacked] = torch.stack([out[stacked], value])
        else:
            out[key] = value
    return out


@pytest.mark.parametrize("name", [*PYRAMIDS, *COLUMNS])
def test_the_authors_checkpoint_loads_whole(name):
    model = tiny(name)
    weights = authors_weights(name, model)
    model.load_state_dict(weights)  # strict: nothing missing, nothing left over

    loaded = sorted((tuple(p.shape), p.double().sum().item()) for p in model.state_dict().values())
    given = {key: w for key, w in weights.items() if not key.endswith("relative_position_index")}
    assert loaded == sorted((tuple(w.shape), w.double().sum().item()) for w in given.values())

    again = tiny(name)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({key: w for key, w in weights.items() if key != "norm.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict(weights | {"extra.weight": torch.zeros(1)})


@pytest.mark.parametrize(("name", "family"), [("nat_tiny", "nat"), ("nat_small", "nat"), ("dinat_base", "dinat")])
def test_the_checkpoint_of_transformers_loads_alike(name, family):
    ours, theirs = tiny(name), tiny(name)
    weights = authors_weights(name, ours)
    ours.load_state_dict(weights)
    theirs.load_state_dict(in_transformers_words(weights, family))
    assert torch.equal(outputs(theirs), outputs(ours))


@pytest.mark.parametrize("name", ["dinat_large", "vitrpb_small"])
def test_a_bias_table_of_another_size_is_resampled(name):
    source = tiny(name)
    target = tiny("dinat_large_11x11") if name == "dinat_large" else tiny(name, map_size=20)
    weights = authors_weights(name, source)
    target.load_state_dict(weights)
    side = 21 if name == "dinat_large" else 39
    tables = {key: p for key, p in target.named_parameters() if key.endswith("rpb")}
    assert {tuple(p.shape[1:]) for p in tables.values()} == {(side, side)}
    key = "layers.0.attn.rpb" if name == "vitrpb_small" else "levels.0.blocks.0.attn.rpb"
    want = F.interpolate(weights[key][None], size=(side, side), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(next(iter(tables.values())).data, want)
    assert outputs(target).isfinite().all()


@pytest.mark.parametrize("envelope", ["model", "state_dict", "state_dict_ema", "model_ema"])
def test_envelopes_of_training_scripts_are_opened(envelope):
    model, weights = tiny("nat_tiny"), authors_weights("nat_tiny", tiny("nat_tiny"))
    want = tiny("nat_tiny")
    want.load_state_dict(weights)
    model.load_state_dict({envelope: {f"module.{key}": w for key, w in weights.items()}, "epoch": 3})
    assert torch.equal(outputs(model), outputs(want))


def test_a_downloaded_file_loads_and_runs_no_code(tmp_path):
    model = tiny("dinat_s_tiny")
    weights = authors_weights("dinat_s_tiny", model)
    model.load_state_dict(weights)
    torch.save(weights, tmp_path / "dinat_s_tiny_in1k_224.pth")
    loaded = timm.create_model(
        "dinat_s_tiny", checkpoint_path=tmp_path / "dinat_s_tiny_in1k_224.pth", num_classes=5, **PYRAMID
    )
    assert torch.equal(outputs(loaded), outputs(model))

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": weights, "optimizer": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        tiny("dinat_s_tiny", checkpoint_path=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("nat_tiny", "test_resnet"),
        ("nat_tiny", "dinat_s_tiny"),
        ("dinat_small", "nat_small"),
        ("vitrpb_small", "nat_mini"),
    ],
)
def test_another_architecture_is_refused(name, other, tmp_path):
    model = tiny(name)
    weights = timm.create_model(other).state_dict() if other == "test_resnet" else authors_weights(other, tiny(other))
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for NAT"):
        model.load_state_dict(weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for NAT"):
        tiny(name, checkpoint_path=tmp_path / "other.pth")


def test_another_width_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny("nat_tiny").load_state_dict(tiny("nat_tiny", embed_dim=32).state_dict())


@pytest.mark.parametrize("kwargs", [{}, {"dilations": [[2], [1, 3], [1, 2, 1], [1, 1]]}, {"pad_mode": "mask"}])
def test_saved_for_the_hub_and_back(tmp_path, kwargs):
    model = tiny("dinat_large.in22k_in1k_384", **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert dilations(back) == dilations(model)
    assert torch.equal(outputs(back), outputs(model))
    assert back.pretrained_cfg["license"] == "mit"


# ---- Arguments ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_features_only(name):
    model = tiny(name)
    features = tiny(name, features_only=True)
    weights = model.state_dict()
    features.load_state_dict({key: weights[key.removeprefix("model.")] for key in features.state_dict()})
    taken = features.feature_info.out_indices
    with torch.no_grad():
        want = model.forward_intermediates(images(model, 96, 80), indices=list(taken), intermediates_only=True)
        got = features(images(model, 96, 80))
    assert [x.shape[1] for x in got] == features.feature_info.channels()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    assert features.feature_info.reduction() == ([4, 8, 16, 32] if len(taken) == 4 else [16, 16, 16])


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_isotropic_small"])
def test_heads(name):
    model = tiny(name)
    with torch.no_grad():
        x = model.forward_features(images(model, 64, 64))
    width = model.num_features
    pools = {"": x, "avg": x.mean((1, 2)), "max": x.amax((1, 2)), "avgmax": (x.mean((1, 2)) + x.amax((1, 2))) / 2}
    pools["catavgmax"] = torch.cat([pools["avg"], pools["max"]], -1)
    for pool, want in pools.items():
        pooled = tiny(name, num_classes=0, global_pool=pool)
        pooled.load_state_dict(headless(model))
        torch.testing.assert_close(outputs(pooled), want)
        if pool:
            classifier = tiny(name, global_pool=pool)
            assert classifier.head_hidden_size == want.shape[-1] == classifier.get_classifier().in_features
            assert outputs(classifier).shape == (2, 5)
    assert tiny(name, num_classes=0).num_features == width


def test_grey_images_take_the_summed_kernel_of_colour_weights(tmp_path):
    colour = tiny("nat_tiny")
    save_for_hf(colour, tmp_path, safe_serialization=True)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    x = images(grey, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nat_tiny", "vitrpb_small"])
def test_drop_path_rises_linearly(name):
    model = tiny(name, drop_path_rate=0.35)
    blocks = [b for s in getattr(model, "stages", [model]) for b in s.blocks]
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in blocks]
    assert rates[0] == []
    for i, of_block in enumerate(rates[1:], start=1):
        assert of_block == pytest.approx([0.35 * i / (len(blocks) - 1)] * 2)  # both residual branches


@pytest.mark.parametrize("name", KINDS)
def test_position_biases_are_kept_from_weight_decay(name):
    model = tiny(name)
    names = {key for key, _ in model.named_parameters()}
    assert model.no_weight_decay() & names == {key for key in names if key.endswith(".rpb")}


def test_small_maps_follow_pad_mode():
    models = {mode: tiny("nat_tiny", pad_mode=mode) for mode in ("natten14", "mask", "error")}
    padded, masked = (outputs(models[mode], 64) for mode in ("natten14", "mask"))
    assert not torch.allclose(padded, masked, atol=1e-3)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must fit the map: 7 \* 1 > 4, its height"):
        outputs(models["error"], 64)  # maps of 16, 8, 4 and 2 tokens a side
    same = [outputs(model, 224) for model in models.values()]
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)
    torch.testing.assert_close(same[0], same[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_heads": (1, 2, 4, 7)}, ValueError, "dim must be a multiple of num_heads, got 128 and 7"),
        ({"num_heads": (1, 2)}, ValueError, r"num_heads and dilations must have one entry a stage \(4\), got \(1, 2\)"),
        ({"dilations": [[1], [1]]}, ValueError, r"must have one entry a stage \(4\), got .* \[\[1\], \[1\]\]"),
        ({"pad_mode": "zeros"}, ValueError, "pad_mode must be one of natten14, mask, error, got 'zeros'"),
        ({"window_size": 7}, TypeError, "window_size"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny("nat_tiny", **kwargs)


# ---- Attention to the whole map -------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=20)
@given(H=st.integers(1, 9), W=st.integers(1, 9), heads=st.sampled_from([1, 2]))
def test_vit_rpb_is_neighborhood_attention_with_the_map_as_window(H, W, heads):
    torch.manual_seed(H * 10 + W)
    whole = RelativeAttention(8, heads, (H, W)).double()
    window = NeighborhoodAttention(8, heads, (H, W), pad_mode="error").double()
    window.load_state_dict(whole.state_dict())
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    torch.testing.assert_close(window(x), whole(x))


# ---- Training, compilation, export ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_under_bfloat16_autocast(name):
    model = tiny(name, drop_path_rate=0.1, proj_drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(model, 64, 96))
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float(), torch.tensor([0, 3])).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.dtype == torch.float32, key


@pytest.mark.parametrize("name", ["nat_small", "dinat_s_tiny", "vitrpb_small"])
def test_gradients_do_not_change_with_checkpointing(name):
    grads = []
    for enable in (False, True):
        model = tiny(name)
        model.set_grad_checkpointing(enable)
        model.train()(images(model, 64, 64)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


# Images of 64 x 56 make maps larger than a window, then padded ones: with a dilation, and with a single window.
SHALLOW = dict(depths=(1, 1), num_heads=(1, 2), dilations=[[1], [2]])
SHALLOW_WITH_ONE_WINDOW = dict(depths=(1, 1, 1), num_heads=(1, 2, 4), dilations=[[1], [2], [1]])


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = tiny("dinat_tiny", **SHALLOW)
    x = images(model, 64, 56)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    compiled.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exported_program_runs_without_our_ops():
    model = tiny("dinat_tiny", **SHALLOW)
    x = images(model, 64, 56)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for batch in (x, torch.cat([x, 2 * x, -x])):
        with torch.no_grad():
            torch.testing.assert_close(module(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_onnxruntime_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny("dinat_tiny", **SHALLOW_WITH_ONE_WINDOW)
    x = images(model, 64, 56)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(kernel_size=0), "kernel_size must be at least 1, got 0"),
        (dict(dilations=(1, 1, 1, 1)), r"dilations\[0\] must be a list of dilations, got 1"),
        (dict(dilations=([], [1], [1], [1])), r"dilations\[0\] must be a list"),
    ],
)
def test_windows_that_cannot_be(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", device="meta", **args)

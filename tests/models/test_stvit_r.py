"""STViT-R: dumbbells of semantic tokens, the authors' keys of every size, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.mixers import ShiftedWindowAttention
from visionbb.models.stvit_r import VARIANTS, Dumbbell

TINY = dict(embed_dim=8, depths=(2, 1, 2, 1), num_heads=(2, 2, 2, 4), mlp_ratio=2.0)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("stvit_r_swin_small", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


def authors_shapes(dim, heads) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of the authors."""
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    for i, (before, width) in enumerate(((3, dim // 2), (dim // 2, dim))):
        conv = f"patch_embed.proj.{2 * i}"
        layer(f"{conv}.c", width, before, 3, 3, bias=False)
        layer(f"{conv}.bn", width)
        shapes |= {f"{conv}.bn.running_mean": (width,), f"{conv}.bn.running_var": (width,)}
        shapes[f"{conv}.bn.num_batches_tracked"] = ()
    for stage, depth in enumerate((2, 2, 18, 2)):
        C = dim * 2**stage
        for j in range(depth):
            block = f"layers.{stage}.blocks.{j}"
            layer(f"{block}.norm1", C)
            layer(f"{block}.norm2", C)
            layer(f"{block}.mlp.fc1", 4 * C, C)
            layer(f"{block}.mlp.fc2", C, 4 * C)
            layer(f"{block}.attn.proj", C, C)
            if stage == 2 and j % 6:
                layer(f"{block}.attn.q", C, C)
                layer(f"{block}.attn.kv", 2 * C, C)
                shapes |= {f"{block}.layer_scale_{i}": (C,) for i in (1, 2)}
            else:
                layer(f"{block}.attn.qkv", 3 * C, C)
                shapes[f"{block}.attn.relative_position_bias_table"] = (169, heads[stage])
                shapes[f"{block}.attn.relative_position_index"] = (49, 49)
                if stage < 2 and j % 2:
                    shapes[f"{block}.attn_mask"] = (64 // 4**stage, 49, 49)
        if stage < 3:
            layer(f"layers.{stage}.downsample.norm", 4 * C)
            layer(f"layers.{stage}.downsample.reduction", 2 * C, 4 * C, bias=False)
    layer("norm", 8 * dim)
    layer("head", 1000, 8 * dim)
    return shapes


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_of_the_authors_fit(name):
    model = timm.create_model(name, device="meta")
    shapes = authors_shapes(VARIANTS[name]["embed_dim"], VARIANTS[name]["num_heads"])
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model.load_state_dict({"model": checkpoint}, assign=True)  # strict
    computed = ("relative_position_index", "attn_mask", "running_mean", "running_var", "num_batches_tracked")
    counted = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(computed))
    assert counted == sum(p.numel() for p in model.parameters())


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("stvit_r_swin_small", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_the_third_stage_is_of_dumbbells_and_every_second_window_elsewhere_is_shifted():
    model = timm.create_model("stvit_r_swin_small", device="meta")
    assert [m for m in model.stages[2].blocks if not isinstance(m, Dumbbell)] == []
    shifts = [[m.shift for m in stage.modules() if isinstance(m, ShiftedWindowAttention)] for stage in model.stages]
    assert shifts == [[0, 3], [0, 3], [0, 0, 0], [0, 3]]


def test_stochastic_depth_rises_layer_by_layer():
    model = timm.create_model("stvit_r_swin_small", device="meta")
    rates = [m.drop_prob for key, m in model.named_modules() if key.endswith("drop_path2") and hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.3 * i / 23 for i in range(1, 24)])  # the first has none


def test_pooled_tokens_are_never_dropped():
    """Nothing else would be left of them: in that layer only the MLP's branch is."""
    layer = tiny(drop_path_rate=0.9).stages[2].blocks[1].generate.train()
    nn.init.zeros_(layer.mlp.fc2.weight)
    nn.init.zeros_(layer.mlp.fc2.bias)
    s, x = torch.randn(4, 3, 3, 32), torch.randn(4, 7, 7, 32)
    torch.testing.assert_close(layer(s, x), layer.eval()(s, x))


def dumbbell() -> Dumbbell:
    return tiny().double().stages[2].blocks[0]


@pytest.mark.parametrize("size", [(14, 14), (21, 7), (5, 9), (16, 1)])
def test_equals_the_paper_layer_by_layer(size):
    """Written out for one image: pooling window by window, then queries, keys and values of each layer."""
    block, (H, W) = dumbbell(), size
    x = torch.randn(1, H, W, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = block(x)

    x = block.local(x)
    n, m = -(-H // 7), -(-W // 7)
    s = x.new_empty(1, 3 * n, 3 * m, 32)
    for r in range(3 * n):
        for c in range(3 * m):
            part = x[0, r * H // (3 * n) : -(-(r + 1) * H // (3 * n)), c * W // (3 * m) : -(-(c + 1) * W // (3 * m))]
            s[0, r, c] = part.amax((0, 1))

    def mlp(layer, y):
        return y + layer.ls2.gamma * layer.mlp(layer.norm2(y))

    def cross(layer, x, y):
        return mlp(layer, x + layer.ls1.gamma * layer.mixer(layer.norm1(x), layer.norm1(y)))

    layer = block.generate
    s = mlp(layer, layer.ls1.gamma * layer.mixer(layer.norm1(s), layer.norm1(x)))
    s = cross(block.refine, s.flatten(1, 2), torch.cat((s.flatten(1, 2), x.flatten(1, 2)), 1)).view(s.shape)
    s = mlp(block.near, s + block.near.ls1.gamma * block.near.mixer(block.near.norm1(s)))
    s = mlp(block.far, s + block.far.ls1.gamma * block.far.mixer(block.far.norm1(s)))
    want = cross(block.recover, x.flatten(1, 2), s.flatten(1, 2)).view(x.shape)
    torch.testing.assert_close(got, want)


def test_semantic_tokens_of_whole_windows_are_those_of_each_window():
    """As the authors pool: every 7 x 7 window by itself."""
    x = torch.randn(1, 14, 21, 8)
    s = timm.create_model("stvit_r_swin_small", **TINY).stages[2].blocks[0].semantic_tokens(x)
    window = F.adaptive_max_pool2d(x[:, 7:, 7:14].permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    assert s.shape == (1, 6, 9, 8)
    torch.testing.assert_close(s[:, 3:, 3:6], window, rtol=0, atol=0)


def test_the_map_comes_back_from_semantic_tokens_alone():
    """Far tokens act on each other by way of a few: the last layer's keys are nine a window."""
    model = tiny()
    keys = []
    for m in model.stages[2].blocks:
        m.recover.mixer.kv.register_forward_hook(lambda m, args, out: keys.append(out.shape[1]))
    model(images(224, 224))
    model(images(300, 200))  # 19 x 13 tokens: three windows by two
    assert keys == [4 * 9, 4 * 9, 6 * 9, 6 * 9]


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(144, 128)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_position_biases_are_kept_from_weight_decay():
    model = tiny()
    tables = {key for key, _ in model.named_parameters() if key.endswith(".rpb")}
    assert len(tables) == 2 + 1 + 2 + 1
    assert model.no_weight_decay() == tables


def test_errors():
    with pytest.raises(ValueError, match=r"num_heads must have one entry a stage \(4\), got \(2, 2\)"):
        tiny(num_heads=(2, 2))


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depths=(2, 1, 1), num_heads=(2, 2, 2))
    onnxruntime_agrees(model, images(150, 130))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny(depths=(2, 1, 1), num_heads=(2, 2, 2))
    compiles_in_one_graph(model, images(150, 130))

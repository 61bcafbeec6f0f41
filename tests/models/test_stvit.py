"""STViT on DeiT: semantic tokens against the formulas, the published cost, any image, weights, exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from visionbb.models.stvit import VARIANTS, SemanticTokens
from visionbb.profiling import count_flops
from visionbb.reduction import reduce_tokens

TINY = dict(img_size=64, patch_size=8, embed_dim=16, map_depth=1, semantic_depth=1, num_heads=2, mlp_ratio=2.0)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("stvit_deit_small", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 and p.shape[0] > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_twelve_layers_of_deit_without_its_class_token(name):
    """Parameters: DeiT's without class token, with a key more for each global centre."""
    model = timm.create_model(name, device="meta")
    deit = timm.create_model(name.removeprefix("stvit_") + "_patch16_224", device="meta")
    kinds = [isinstance(unit, SemanticTokens) for unit in model.blocks]
    assert kinds == [False] * 4 + [True] + [False] * 6
    dim = deit.embed_dim
    assert model.blocks[4].centres.weight.shape == (1, 4, 4, dim)
    count, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, deit))
    assert count == theirs - 2 * dim + 16 * dim  # the class token and its position


def test_most_of_the_work_is_left_behind():
    """-58 % of DeiT's multiply-adds (table 1), 1.91 G of small's (table 8)."""
    for size in ("tiny", "small", "base"):
        ours, deit = (count_flops(timm.create_model(name, device="meta"), 224).gmacs
                      for name in (f"stvit_deit_{size}", f"deit_{size}_patch16_224"))  # fmt: skip
        assert ours / deit == pytest.approx(1 - 0.58, abs=0.01)
        assert size != "small" or ours == pytest.approx(1.91, abs=0.005)


def by_heads(mixer, x, y):
    """softmax(q(x) k(y)^T / sqrt(head_dim)) v(y) of x (N, dim) and y (M, dim), one head after the other."""
    k, v = mixer.kv(y).chunk(2, -1)
    parts = (part.chunk(mixer.num_heads, -1) for part in (mixer.q(x), k, v))
    heads = [(q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
    return mixer.proj(torch.cat(heads, -1))


@pytest.mark.parametrize(("H", "W", "rows", "cols"), [(8, 8, 3, 3), (14, 14, 4, 4), (7, 14, 2, 4), (1, 5, 1, 2)])
def test_semantic_tokens_are_those_of_the_paper(H, W, rows, cols):
    """Written out: centres of equal parts of the map ask it; with global centres added they ask it and each other."""
    unit = tiny().double().blocks[1]
    x = torch.randn(1, H, W, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = unit(x)
    assert got.shape == (1, rows, cols, 16)

    pooled = torch.stack([
        x[0, r * H // rows : -(-(r + 1) * H // rows), c * W // cols : -(-(c + 1) * W // cols)].amax((0, 1))
        for r in range(rows) for c in range(cols)
    ])
    X = x[0].flatten(0, 1)
    first, second = unit.generate, unit.refine
    S = by_heads(first.mixer, first.norm1(pooled), first.norm1(X))  # nothing of the pooled tokens is kept
    S = S + first.mlp(first.norm2(S))
    G = unit.centres(torch.zeros(1, rows, cols, 16, dtype=torch.float64))[0].flatten(0, 1)
    Q = S + G
    S = Q + by_heads(second.mixer, second.norm1(Q), second.norm1(torch.cat((S, X))))
    S = S + second.mlp(second.norm2(S))
    torch.testing.assert_close(got[0].flatten(0, 1), S)


def test_centres_of_the_first_size_are_pooled_as_pytorch_pools():
    unit = tiny(img_size=112).blocks[1]
    asked = []
    unit.generate.register_forward_hook(lambda module, args, out: asked.append(args[0]))
    x = torch.randn(2, 14, 14, 16)
    unit(x)
    want = F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(asked[0].unflatten(1, (4, 4)), want, rtol=0, atol=0)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        h, w = math.ceil(H / 8), math.ceil(W / 8)
        few = math.ceil(h / 3.5), math.ceil(w / 3.5)
        assert [x.shape for x in maps] == [(2, 16, h, w), (2, 16, *few), (2, 16, *few)]
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)
    assert [info["reduction"] for info in model.feature_info] == [8, 28, 28]


def test_maps_of_images_come_from_the_first_blocks():
    model = timm.create_model(
        "stvit_deit_tiny", features_only=True, **TINY | dict(map_depth=3), out_indices=(0, 1, 2)
    ).eval()
    assert [x.shape for x in model(images(48, 40))] == [(2, 16, 6, 5)] * 3
    assert len(model.model.blocks) == 3  # and what generates semantic tokens is gone


def test_a_checkpoint_of_another_size_loads_with_resampled_tables():
    state = tiny(img_size=112).state_dict()
    model = tiny()
    model.load_state_dict(state)
    for key in ("pos_embed.weight", "blocks.1.centres.weight"):
        size = model.get_parameter(key).shape[1:3]
        assert size != state[key].shape[1:3]
        want = F.interpolate(state[key].permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
        torch.testing.assert_close(model.get_parameter(key).permute(0, 3, 1, 2), want)


def test_stochastic_depth_rises_layer_by_layer_and_spares_the_first_attention():
    model = timm.create_model("stvit_deit_small", device="meta", drop_path_rate=0.11)
    rates = [m.drop_prob for key, m in model.named_modules() if key.endswith("drop_path2") and hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.01 * i for i in range(1, 12)])  # the first has none
    layer = tiny(drop_path_rate=0.9).blocks[1].generate.train()
    nn.init.zeros_(layer.mlp.fc2.weight)
    nn.init.zeros_(layer.mlp.fc2.bias)
    s, x = torch.randn(4, 9, 16), torch.randn(4, 64, 16)
    torch.testing.assert_close(layer(s, x), layer.eval()(s, x))


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(60, 72)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    assert model.no_weight_decay() == {"pos_embed.weight", "blocks.1.centres.weight"}


def test_errors():
    with pytest.raises(ValueError, match=r"semantic_stride must be at least 1, got 0.5"):
        tiny(semantic_stride=0.5)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 16 and 3"):
        tiny(num_heads=3)
    with pytest.raises(TypeError, match="SemanticTokens"):
        reduce_tokens(tiny(), "tome", r=2)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    onnxruntime_agrees(tiny(), images(97, 131))


def test_compiles_in_one_graph(compiles_in_one_graph):
    compiles_in_one_graph(tiny(), images(97, 131))

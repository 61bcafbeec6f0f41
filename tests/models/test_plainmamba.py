"""PlainMamba: the released maths and the paper's, any image, the authors' keys of all variants, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from visionbb.backbones import MixerBlock
from visionbb.mixers import SnakeSS2D
from visionbb.models.plainmamba import ConvBlock
from visionbb.profiling import count_flops

TINY = dict(img_size=64, embed_dim=8, depth=2, d_state=2)


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("plainmamba_l1", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "dim", "depth", "convs"), [
    ("plainmamba_l1", 192, 24, 2), ("plainmamba_l2", 384, 24, 3), ("plainmamba_l3", 448, 36, 3),
])
def test_variants_differ_as_the_paper_says(name, dim, depth, convs):
    model = timm.create_model(name, device="meta")
    assert len(model.blocks) == depth
    assert [type(block) for block in model.blocks[:2]] == [ConvBlock if convs == 2 else MixerBlock, MixerBlock]
    assert sum(isinstance(m, nn.Conv2d) for m in model.stem.convs) == convs
    mixer = model.blocks[0].mixer
    assert mixer.A_log.shape == (2 * dim, 16)
    assert mixer.permute == "u"
    assert (model.blocks[0].norm1.eps, model.norm.eps) == (1e-5, 1e-6)


def test_the_papers_form_is_another():
    released, paper = tiny(), tiny(permute="all")
    paper.load_state_dict(released.state_dict())
    x = images(64, 48)
    assert (released(x) - paper(x)).abs().max() > 1e-2


def test_cost_grows_with_the_number_of_pixels():
    model = timm.create_model("plainmamba_l1", device="meta")
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("permute", ["u", "all"])
def test_one_model_takes_any_image(permute):
    model = tiny(permute=permute)
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        assert {x.shape for x in maps} == {(2, 8, math.ceil(H / 16), math.ceil(W / 16))}
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_every_token_sees_the_whole_map_after_one_block():
    block = tiny().blocks[1]
    x = torch.randn(1, 9, 10, 8, requires_grad=True)
    block(x)[0, 7, 2].sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_trains():
    model = tiny(drop_path_rate=0.2, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_scan_parameters_and_positions_are_kept_from_weight_decay():
    model = tiny()
    scans = [key for key, m in model.named_modules() if isinstance(m, SnakeSS2D)]
    own = {f"{key}.{name}" for key in scans for name in ("A_log", "D", "direction_B", "dt_bias")}
    assert model.no_weight_decay() == own | {"pos_embed.weight"}


def authors_checkpoint(dim: int, depth: int, stem_depth: int, convs: int) -> dict:
    """Names and shapes of the authors' checkpoints, without numbers."""
    def norm(key: str, width: int, batch: bool = False) -> dict:
        stats = {f"{key}.running_mean": (width,), f"{key}.running_var": (width,), f"{key}.num_batches_tracked": ()}
        return {f"{key}.weight": (width,), f"{key}.bias": (width,), **(stats if batch else {})}

    inner, rank = 2 * dim, math.ceil(dim / 16)
    shapes = {"pos_embed": (1, 196, dim), "patch_embed.stem.0.weight": (64, 3, 7, 7)}
    shapes |= norm("patch_embed.stem.1", 64, batch=True)
    for i in range(stem_depth):
        shapes[f"patch_embed.convs.{3 * i}.weight"] = (64, 64, 3, 3)
        shapes |= norm(f"patch_embed.convs.{3 * i + 1}", 64, batch=True)
    shapes |= {"patch_embed.projection.weight": (dim, 64, 8, 8), "patch_embed.projection.bias": (dim,)}
    for i in range(depth):
        shapes |= norm(f"layers.{i}.norm", dim)
        if i < convs:
            shapes |= {f"layers.{i}.dw.0.weight": (dim, 1, 3, 3), **norm(f"layers.{i}.dw.1", dim, batch=True)}
        shapes |= {f"layers.{i}.mamba.{name}": shape for name, shape in {
            "A_log": (inner, 16), "D": (inner,), "direction_Bs": (5, 16),
            "in_proj.weight": (2 * inner, dim), "in_proj.bias": (2 * inner,),
            "conv2d.weight": (inner, 1, 7, 7), "conv2d.bias": (inner,),
            "x_proj.weight": (rank + 32, inner), "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,),
            "out_proj.weight": (dim, inner), "out_proj.bias": (dim,),
        }.items()}  # fmt: skip
    shapes |= norm("ln1", dim)
    shapes = {f"backbone.{key}": shape for key, shape in shapes.items()}
    shapes |= {"head.fc.weight": (1000, dim), "head.fc.bias": (1000,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "args"), [
    ("plainmamba_l1", (192, 24, 1, 1)), ("plainmamba_l2", (384, 24, 2, 0)), ("plainmamba_l3", (448, 36, 2, 0)),
])
def test_authors_checkpoints_fit(name, args):
    """Strictly: no key missing, none left over."""
    model = timm.create_model(name, device="meta")
    model.load_state_dict({"state_dict": authors_checkpoint(*args)}, assign=True)


def test_biases_of_time_steps_are_doubled_once(request):
    recorded = load_file(request.config.rootpath / "tests/golden/plainmamba.safetensors")
    weights = {key.removeprefix("weights."): x for key, x in recorded.items() if key.startswith("weights.")}
    model = timm.create_model("plainmamba_l1", img_size=48, embed_dim=4, depth=3, num_classes=7).eval()
    model.load_state_dict(weights)
    bias = weights["backbone.layers.1.mamba.dt_proj.bias"]
    torch.testing.assert_close(model.blocks[1].mixer.dt_bias, 2 * bias)
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.blocks[1].mixer.dt_bias, 2 * bias)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depth=1)
    onnxruntime_agrees(model, images(64, 48))


@pytest.mark.parametrize("permute", ["u", "all"])
def test_scripts(permute):
    model = tiny(permute=permute)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images(64, 50)), model(images(64, 50)))


def test_compiles_in_one_graph(compiles_in_one_graph):
    model = tiny()
    compiles_in_one_graph(model, images(64, 48))

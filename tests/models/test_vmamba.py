"""VMamba: four routes in linear time, the authors' older key names, any image, weights and exports."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from visionbb.backbones import Block, MixerBlock
from visionbb.mixers import SS2D
from visionbb.profiling import count_flops

GOLDEN = "tests/golden"
TWO_STAGES = dict(depths=(1, 1))  # where a graph of all four costs seconds
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1))
NAMES = ("vmamba_tiny", "vanilla_vmamba_tiny")


def tiny(name="vmamba_tiny", **kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias")):
                p.normal_(-0.5, 0.5)
            else:
                p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "layers", "width", "states", "gate"), [
    ("vmamba_tiny", 8, 96, 1, False), ("vmamba_tiny_s2l5", 5, 192, 1, False), ("vanilla_vmamba_tiny", 9, 192, 16, True),
])
def test_variants_differ_as_their_names_say(name, layers, width, states, gate):
    model = timm.create_model(name, device="meta")
    block = model.stages[0].blocks[0]
    assert len(model.stages[2].blocks) == layers
    assert block.mixer.A_log.shape == (4, width, states)
    assert block.mixer.gate == gate
    assert type(block) is (MixerBlock if gate else Block)


@pytest.mark.parametrize("name", NAMES)
def test_cost_grows_with_the_number_of_pixels(name):
    model = timm.create_model(name, device="meta")
    assert count_flops(model, 896).flops / count_flops(model, 448).flops == pytest.approx(4, rel=1e-3)


def test_the_small_one_for_the_digits_costs_what_nats_does():
    """Their training steps are compared on the card."""
    cost = [count_flops(timm.create_model(f"{name}_digits", device="meta"), 32).flops for name in ("nat", "vmamba")]
    assert cost[1] / cost[0] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_one_model_takes_any_image(name):
    model = tiny(name)
    first = model(images(224, 224))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(224, 224)), first, rtol=0, atol=0)


def test_every_token_sees_the_whole_map_after_one_block():
    block = tiny().stages[0].blocks[0]
    x = torch.randn(1, 12, 9, 8, requires_grad=True)
    block(x)[0, 7, 2].sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    model = tiny(name, drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_scan_parameters_are_kept_from_weight_decay():
    model = tiny()
    scans = [key for key, m in model.named_modules() if isinstance(m, SS2D)]
    assert model.no_weight_decay() == {f"{key}.{name}" for key in scans for name in ("A_log", "D", "dt_bias")}


def old_names(key: str) -> str:
    """The keys of the authors' first checkpoints."""
    for new, old in (
        ("patch_embed.0.", "patch_embed.proj."), ("patch_embed.2.", "patch_embed.norm."), (".op.", ".self_attention."),
        ("classifier.", ""),
    ):
        key = key.replace(new, old)
    return key.replace(".norm.", ".ln_1.") if ".blocks." in key and "self_attention" not in key else key


@pytest.mark.parametrize("envelope", ["model", "model_ema"])
def test_first_checkpoints_load_as_well(envelope, tmp_path, request):
    recorded = load_file(request.config.rootpath / GOLDEN / "vanilla_vmamba.safetensors")
    weights = {
        old_names(key.removeprefix("weights.")): x for key, x in recorded.items() if key.startswith("weights.")
    }
    assert "layers.1.blocks.0.ln_1.weight" in weights
    assert "layers.1.blocks.0.self_attention.A_logs" in weights
    checkpoint = {"model": {key: torch.zeros_like(x) for key, x in weights.items()}, envelope: weights}
    torch.save(checkpoint, tmp_path / "authors.pth")
    args = dict(embed_dim=4, depths=(1, 2, 1, 1), num_classes=7, checkpoint_path=tmp_path / "authors.pth")
    model = timm.create_model("vanilla_vmamba_tiny", **args).eval()
    torch.testing.assert_close(model(recorded["input"]), recorded["output"], rtol=1e-4, atol=1e-4)


def test_linear_layers_stored_as_convolutions_load_as_well(request):
    recorded = load_file(request.config.rootpath / GOLDEN / "vmamba.safetensors")
    weights = {
        key.removeprefix("weights."): x[..., None, None] if key.endswith(("proj.weight", "fc1.weight")) else x
        for key, x in recorded.items() if key.startswith("weights.")
    }
    model = timm.create_model(
        "vmamba_tiny", embed_dim=4, depths=(1, 2, 1, 1), ssm_ratio=2.0, mlp_ratio=2.0, num_classes=7
    ).eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(model(recorded["input"]), recorded["output"], rtol=1e-4, atol=1e-4)


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("vmamba_tiny", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(onnxruntime_agrees):
    model = tiny(depths=(1,))
    onnxruntime_agrees(model, images(24, 20))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(compiles_in_one_graph, name):
    model = tiny(name, **TWO_STAGES)
    compiles_in_one_graph(model, images(64, 64))

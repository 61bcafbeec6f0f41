"""Our models with the weights of the authors' code give the authors' outputs (tests/golden, recorded once)."""
import ast
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import visionbb  # noqa: F401  (registers the models)
from visionbb.models.local_vmamba import searched

GOLDEN = Path(__file__).parents[1] / "golden"

_RAVLT = dict(dims=(8, 16, 16, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratio=2.0, head_hidden=24)
_SOFT = dict(dims=(8, 8, 8, 16), depths=(1, 1, 2, 1), num_heads=(2, 2, 1, 2))
_LOCAL = [searched(blocks) for blocks in ("h v- w7 w7-", "h- v w2 w2-, w2 w7- v h-", "h v- w2- w7", "h h- v w2")]
_LOCAL_VIM = dict(img_size=20, patch_size=4, embed_dim=16, depth=3,
                  routes=searched("h v- w2 w7-, h- v w2- w7, v v- w2 h-"))

# recording -> (our model, the recorded network's arguments in our words)
CASES = {
    "nat": ("nat_tiny", dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=3, mlp_ratio=2.0,
                             layer_scale=1e-5)),
    "dinat": ("dinat_tiny", dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=3, mlp_ratio=2.0,
                                 dilations=((2,), (1, 3), (2,), (1,)))),
    "dinat_s": ("dinat_s_tiny", dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=3,
                                     mlp_ratio=2.0, dilations=((2,), (1, 3), (2,), (1,)))),
    "nat_isotropic": ("dinat_isotropic_small", dict(embed_dim=16, depth=3, num_heads=2, kernel_size=3, mlp_ratio=2.0)),
    "vitrpb": ("vitrpb_small", dict(embed_dim=16, depth=3, num_heads=2, map_size=4, mlp_ratio=2.0)),
    "ravlt": ("ravlt_tiny", _RAVLT),
    "mavit": ("mavit_tiny", _RAVLT),
    "nalaformer": ("nalaformer_tiny", _RAVLT),
    "agent_deit": ("deit_tiny_patch16_224_agent", dict(img_size=64, patch_size=8, embed_dim=16, depth=3, num_heads=2,
                                                       mlp_ratio=2.0, mixer_args=dict(num_agents=9))),
    "mila": ("mila_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratio=2.0)),
    "l2vit": ("l2vit_tiny", dict(embed_dim=4, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), mlp_ratio=2.0)),
    "flowformer": ("flowformer_19l", dict(dims=(12, 24, 24, 48), depths=(1, 2, 1, 1), mlp_ratio=2.0,
                                          pos_embed_size=(16, 16))),
    "care": ("care_s0", dict(dims=(16, 16, 32, 32), depths=(1, 2, 1, 2), ratios=((1, 2), (1, 3), (2, 1), (2, 2)),
                             head_dims=(0, 0, 4, 8))),
    "vmamba": ("vmamba_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1), ssm_ratio=2.0, mlp_ratio=2.0)),
    "vanilla_vmamba": ("vanilla_vmamba_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1))),
    "efficient_vmamba": ("efficient_vmamba_tiny", dict(embed_dim=8, depths=(1, 2, 2, 1))),
    "local_vim": ("local_vim_tiny", _LOCAL_VIM),
    "local_vim_middle_cls_token": ("local_vim_tiny_middle_cls_token", _LOCAL_VIM),
    "local_vmamba": ("local_vmamba_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1), routes=_LOCAL)),
    "medmamba": ("medmamba_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1))),
    "vssd": ("vssd_tiny", dict(embed_dim=4, depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4), d_state=6, mlp_ratio=2.0)),
    "plainmamba": ("plainmamba_l1", dict(img_size=48, embed_dim=4, depth=3)),
    "vrwkv": ("vrwkv_tiny", dict(img_size=64, embed_dim=8, depth=3)),
    "vrwkv_large": ("vrwkv_large", dict(img_size=48, embed_dim=8, depth=13, head_hidden=12)),
    "mambavision": ("mambavision_base", dict(stem_dim=6, embed_dim=4, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 4),
                                             window_size=(0, 0, 3, 3), mlp_ratio=2.0)),
    "vim": ("vim_tiny_stride8", dict(img_size=48, embed_dim=16, depth=3, d_state=4)),
    "sgformer": ("sgformer_small", dict(embed_dim=4, depths=(2, 2, 1), num_heads=(2, 4, 4), sr_ratios=(8, 2),
                                        mlp_ratio=2.0, pos_embed_size=(14, 56))),
    "sgformer_quarters": ("sgformer_small", dict(embed_dim=4, depths=(2, 2, 2), num_heads=(2, 2, 4), sr_ratios=(4, 2),
                                                 mlp_ratio=2.0, pos_embed_size=(14, 56))),
    "stvit_r": ("stvit_r_swin_small", dict(in_chans=1, embed_dim=4, depths=(1, 2, 2, 1), num_heads=(1, 1, 2, 2),
                                           mlp_ratio=1.0)),
    "soft": ("soft_tiny", _SOFT),
    "soft_norm": ("soft_norm_tiny", _SOFT),
}


def recording(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return tensors, weights, metadata


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name, tmp_path):
    tensors, weights, _ = recording(name)
    architecture, args = CASES[name]
    torch.save(weights, tmp_path / "authors.pth")
    # Through timm's own loader, which is strict: no key missing, none left over.
    model = timm.create_model(architecture, num_classes=7, checkpoint_path=tmp_path / "authors.pth", **args).eval()
    # In float64, so that the recording's own rounding is all that differs: in float32 each processor adds another.
    model, x = model.double(), tensors["input"].double()
    with torch.no_grad():
        _, features = model.forward_intermediates(x)
        torch.testing.assert_close(model(x), tensors["output"].double(), rtol=1e-4, atol=1e-4)
    recorded = [tensors[f"features.{i}"] for i in range(len(features))]
    for got, want in zip(features, recorded):
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_provenance_is_recorded(name):
    metadata = recording(name)[2]
    assert metadata["repository"].startswith("https://github.com/")
    assert len(metadata["commit"]) == 40
    assert isinstance(ast.literal_eval(metadata["arguments"].replace("dict(", "")), dict)


def test_every_recording_is_used():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(CASES)

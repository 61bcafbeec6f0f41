"""timm's own checks, on our models: one small variant a family, all of them with VISIONBB_CONTRACT=all.

VISIONBB_CONTRACT may also name models: `VISIONBB_CONTRACT="nat_small dinat_base" pytest tests/contract`.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm_suite
from own_models import OWN

SMALL = [
    "nat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small", "nat_digits", "ravlt_tiny",
    "nalaformer_xtiny", "mila_tiny", "l2vit_tiny", "care_s0", "sgformer_small", "soft_tiny", "stvit_r_swin_small",
    "stvit_deit_tiny", "lookupvit_tiny_patch16_5x5", "deit_tiny_patch16_224_agent", "vim_tiny", "mambavision_tiny",
    "efficient_vmamba_tiny", "local_vmamba_tiny", "vmamba_tiny", "vrwkv_tiny", "vssd_micro",
]
CHOICE = os.environ.get("VISIONBB_CONTRACT", "").split()
NAMES = sorted(OWN) if CHOICE == ["all"] else CHOICE or SMALL


@pytest.fixture(scope="module")
def suite():
    return timm_suite.load("test_models")


# timm's per-model checks and their arguments after the name
CHECKS = {
    "test_model_forward": (1,),
    "test_model_backward": (2,),
    "test_model_default_cfgs": (1, "meta"),
    "test_model_forward_torchscript": (1,),
    "test_model_forward_features": (1,),
    "test_model_forward_intermediates": (1,),
    "test_model_forward_intermediates_features": (1,),
    "test_prune_intermediate_layers_contract": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_model_forward_fx": (1,),
    "test_model_backward_fx": (2,),
    "test_model_forward_fx_torchscript": (1,),
    "test_headless_checkpoint_reload": ({},),
    "test_reset_classifier_keeps_pool": (),
    "test_features_only_grad_checkpointing_backward": (),
    "test_head_hidden_size": ({},),
    "test_model_init_weights_after_to_empty": ({},),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS)
def test_timm_check(suite, check, name):
    assert name in OWN
    if check == "test_model_default_cfgs" and timm.get_pretrained_cfg_value(name, "pool_size") is None:
        suite.test_model_default_cfgs_non_std(name, *CHECKS[check])  # forward_features gives a sequence, no map
    else:
        getattr(suite, check)(name, *CHECKS[check])  # asserts


@pytest.mark.parametrize("name", NAMES)
def test_hub_round_trip(tmp_path, name):
    check = timm_suite.load("test_model_input").test_export_tracks_reset_classifier_structure
    assert check(tmp_path, name, {}, None, None) is None  # asserts


@pytest.mark.slow
def test_timms_suite_runs_unmodified():
    """The whole of timm's test_models.py, in a process of its own, as timm would run it."""
    here, folder = Path(__file__).parent, timm_suite.tests_folder()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "own_models", "-p", "no:cacheprovider", "-q", "-W", "ignore",
         "-k", "nat_mini", f"--rootdir={folder}", "-o", "addopts=", folder / "test_models.py"],
        env={**os.environ, "PYTHONPATH": str(here), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 10

"""Every shipped config: it builds, its parts fit, it learns from a step, it predicts, and it can be counted."""
from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData, PixelData

from visionbb.backbones import Columnar
from visionbb.mm.config import build_model, fit_to_machine, load_config, parse_options
from visionbb.mm.flops import config_flops, count_detector_flops, flops_table

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.glob("*/*/*.py") if "_base_" not in path.parts) + sorted(
    CONFIGS.glob("*/digits_*.py")
)


def name(path: Path) -> str:
    return path.stem


def offline(path: Path) -> Config:
    """The config as this machine can build it, without the pretrained weights it would download."""
    config = load_config(path)
    fit_to_machine(config)
    config.model.backbone.update(pretrained=False, checkpoint=None)
    return config


def shrink(config: Config) -> None:
    """Stages of one block, few boxes and narrow hidden layers in the heads, which are the same for all backbones."""
    model = config.model
    if isinstance(timm.create_model(model.backbone.model_name, device="meta"), Columnar):
        taken = len(model.backbone.out_indices)
        model.backbone.update(depth=taken, out_indices=tuple(range(taken)))
    else:
        model.backbone.depths = (1, 1, 1, 1)
    if "window_size" in model.backbone:
        model.backbone.window_size = (0, 0, 4, 2)
    if "roi_head" in model:
        model.train_cfg.rpn_proposal.max_per_img = 20
        model.test_cfg.rpn.max_per_img = 20
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 32
    if "decode_head" in model:
        model.decode_head.channels = 32


def fake_batch(config: Config, size: int = 64) -> dict:
    """Two images with one or two annotated squares each, as the pipelines pack them."""
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    meta = dict(
        img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size), scale_factor=(1.0, 1.0), img_id=0
    )
    samples = []
    for i in range(2):
        if config.default_scope == "mmseg":
            from mmseg.structures import SegDataSample

            classes = config.model.decode_head.num_classes
            sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, size, size))))
        else:
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            boxes = torch.tensor([[8.0, 8, 40, 40], [20, 16, 60, 56]])[: i + 1]
            masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
                mask[y1:y2, x1:x2] = 1
            instances = InstanceData(
                bboxes=boxes, labels=torch.arange(len(boxes)), masks=BitmapMasks(masks.numpy(), size, size)
            )
            sample = DetDataSample(gt_instances=instances)
        sample.set_metainfo(meta)
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


WHOLE = [path for path in FILES if path.parent.name == "nat" and "nat-tiny" in path.stem] + FILES[-2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "whole"),
    [pytest.param(path, path in WHOLE, id=path.stem + "-whole" * (path in WHOLE)) for path in FILES],
)
def test_fits_learns_and_predicts(path, whole):
    """Each kind of head is run once as it is; the other backbones, at full width, on slimmer heads."""
    torch.manual_seed(0)
    config = offline(path)
    if not whole:
        shrink(config)
    model = revert_sync_batchnorm(build_model(config))
    backbone = model.backbone
    fed = config.model.get("neck", {}).get("in_channels") or config.model.decode_head.in_channels
    assert ([fed] if isinstance(fed, int) else list(fed)) == backbone.channels
    if "auxiliary_head" in config.model:
        heads = config.model.auxiliary_head
        for aux in heads if isinstance(heads, list) else [heads]:
            assert aux.in_channels == config.model.decode_head.in_channels[aux.in_index]

    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {key: value.clone() for key, value in backbone.named_parameters()}
    model.train()
    losses = model.train_step(fake_batch(config), optim_wrapper)
    assert all(torch.isfinite(loss).all() for loss in losses.values()), losses
    moved = [key for key, value in backbone.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) > 0.5 * len(before)
    assert any(key.startswith("model.stem") for key in moved)

    model.eval()
    with torch.no_grad():
        found = model.test_step(fake_batch(config))
    assert len(found) == 2
    if config.default_scope == "mmseg":
        assert found[0].pred_sem_seg.data.shape == (1, 64, 64)
    else:
        instances = found[0].pred_instances
        assert len(instances.scores) <= model.test_cfg.get("rcnn", model.test_cfg).max_per_img
        assert ("masks" in instances) == ("mask" in path.stem)
    assert count_detector_flops(model, (64, 64)).by_module["model.backbone"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_parameters_and_flops(path):
    """At full depth, without running anything; the parts make up the whole."""
    parts = config_flops(path, (64, 64))
    (params, gmacs), of_parts = parts[""], [numbers for part, numbers in parts.items() if part]
    assert params == pytest.approx(sum(p for p, _ in of_parts))
    assert gmacs == pytest.approx(sum(g for _, g in of_parts))
    assert parts["backbone"][0] > 0
    assert parts["backbone"][1] > 0


# What the papers print for whole models: parameters in 1e6, "GFLOPs" (GMACs), at an image of (height, width).
PUBLISHED = {
    "detection/nat/mask-rcnn_nat-tiny_fpn_ms-3x_coco": (48, 258, (800, 1280)),  # NAT, table 3
    "detection/nat/cascade-mask-rcnn_nat-tiny_fpn_ms-3x_coco": (85, 737, (800, 1280)),
    "segmentation/nat/nat-tiny_upernet_8xb2-160k_ade20k-512x512": (58, 934, (512, 2048)),  # NAT, table 4
}


@pytest.mark.slow
@pytest.mark.parametrize("config", PUBLISHED)
def test_published_flops(config):
    params, gmacs, size = PUBLISHED[config]
    counted = config_flops(CONFIGS / f"{config}.py", size)[""]
    assert counted == (pytest.approx(params, rel=0.02), pytest.approx(gmacs, rel=0.02))


def test_table_of_flops():
    table = flops_table([CONFIGS / "detection" / "digits_mask-rcnn_nat-digits_fpn.py"], (128, 128))
    assert list(table.columns[1].cells) == ["whole", "backbone", "neck", "rpn_head", "roi_head"]


# ---- Loading --------------------------------------------------------------------------------------------------------


def test_options_on_top(tmp_path):
    options = parse_options(["train_dataloader.batch_size=4", "model.backbone.out_indices=(0,1)", "a.b=text"])
    config = load_config(CONFIGS / "detection" / "digits_mask-rcnn_nat-digits_fpn.py", options)
    assert config.train_dataloader.batch_size == 4
    assert config.model.backbone.out_indices == (0, 1)
    with pytest.raises(ValueError, match="options are KEY=VALUE, got 'epochs'"):
        parse_options(["epochs"])
    with pytest.raises(FileNotFoundError, match=r"no config 'nowhere\.py'"):
        load_config("nowhere.py")
    empty = tmp_path / "empty.py"
    empty.write_text("a = 1\n")
    with pytest.raises(ValueError, match="describes no model"):
        load_config(empty)


def test_mixed_precision_needs_a_gpu(monkeypatch):
    path = next(path for path in FILES if "nat-tiny" in path.stem and "1x" in path.stem)
    for gpu, wrapper in ((True, "AmpOptimWrapper"), (False, "OptimWrapper")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        config = load_config(path)
        assert bool(fit_to_machine(config)) is not gpu
        assert config.optim_wrapper.type == wrapper


def test_schedules_of_the_papers():
    """Spot checks against the authors' files: learning rate, weight decay, drop path, epochs, milestones, dilations."""
    config = load_config(CONFIGS / "detection/dinat/cascade-mask-rcnn_dinat-base_fpn_ms-3x_coco.py")
    assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=7.5e-5, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.model.backbone.drop_path_rate == 0.6
    assert config.model.backbone.dilations[0] == [1, 28, 1]
    assert config.train_cfg.max_epochs == 36
    assert config.param_scheduler[1].milestones == [27, 33]
    config = load_config(CONFIGS / "detection/ravlt/retinanet_ravlt-large_fpn_1x_coco.py")
    assert config.optim_wrapper.optimizer.weight_decay == 1e-4
    assert config.model.backbone.out_indices == (1, 2, 3)
    assert config.model.backbone.norm_eval
    config = load_config(CONFIGS / "segmentation/nat/nat-small_upernet_8xb2-160k_ade20k-512x512.py")
    assert config.optim_wrapper.optimizer.lr == 6e-5
    assert config.model.backbone.drop_path_rate == 0.5
    assert config.train_cfg.max_iters == 160000


def test_every_config_names_what_it_holds():
    """The file's name says head and backbone."""
    for path in FILES:
        config = load_config(path)
        model = config.model.backbone.model_name.split(".")[0].replace("_", "-")
        assert model in path.stem, path
        kind = {"MaskRCNN": "mask-rcnn", "CascadeRCNN": "cascade-mask-rcnn", "RetinaNet": "retinanet"}
        head = kind.get(config.model.type) or {"UPerHead": "upernet", "FPNHead": "fpn"}[config.model.decode_head.type]
        assert head in path.stem, path

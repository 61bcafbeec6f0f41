from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import timm
import torch
from torch import nn

from visionbb.profiling import profile_model, profile_models
from visionbb.profiling.memory import tensor_bytes
from visionbb.profiling.output import write_csv, write_json
from visionbb.profiling.plot import plot_models
from visionbb.profiling.report import ModelProfile, profile_table
from visionbb.profiling.subject import parse_reduction, subject
from visionbb.reduction import reduce_tokens

FAST = {"batch_size": 2, "repeats": 2, "latency_repeats": 2, "warmup": 1}
# The header of timm's benchmark files, and what their users read from them.
TIMM_COLUMNS = [
    "model", "infer_img_size", "infer_batch_size", "infer_samples_per_sec", "infer_step_time", "infer_gmacs",
    "infer_macts", "param_count",
]  # fmt: skip


@pytest.fixture(scope="module")
def profiles():
    return profile_models(["test_vit", "test_resnet"], train=True, **FAST)


def test_numbers_hang_together(profiles):
    for p in profiles:
        assert p.infer_samples_per_sec == pytest.approx(2 / p.infer_step_time * 1e3)
        assert p.train_samples_per_sec == pytest.approx(2 / p.train_step_time * 1e3)
        assert p.latency_p50_ms <= p.latency_p90_ms
        weights = tensor_bytes(timm.create_model(p.model)) / 1e6
        assert weights < p.peak_memory_mb < p.train_peak_memory_mb
        assert (p.infer_img_size, p.infer_batch_size) == (160, 2)
        assert (p.device, p.dtype, p.backend, p.torch) == ("cpu", "float32", "auto", torch.__version__)
    assert profiles[0].model == "test_vit"
    assert profiles[0].param_count == sum(p.numel() for p in timm.create_model("test_vit").parameters()) / 1e6


def test_csv_has_timms_columns(profiles, tmp_path):
    write_csv(tmp_path / "p.csv", profiles)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[: len(TIMM_COLUMNS)] == TIMM_COLUMNS
    assert [r["model"] for r in rows] == ["test_vit", "test_resnet"]
    assert float(rows[1]["infer_step_time"]) == pytest.approx(profiles[1].infer_step_time, rel=1e-5)
    with pytest.raises(ValueError, match="rows"):
        write_csv(tmp_path / "p.csv", [])


def test_json_says_where_it_was_measured(profiles, tmp_path):
    write_json(tmp_path / "p.json", profiles, "cpu", batch_size=2)
    document = json.loads((tmp_path / "p.json").read_text())
    assert {"device", "cpu", "threads", "python", "torch", "timm", "triton", "visionbb", "date"} <= set(
        document["environment"]
    )
    assert document["environment"]["threads"] == torch.get_num_threads()
    assert document["settings"] == {"batch_size": 2}
    assert [set(r) for r in document["results"]] == [{f.name for f in dataclasses.fields(ModelProfile)}] * 2


def test_table_has_a_row_a_model(profiles):
    table = profile_table(profiles)
    assert table.row_count == 2
    assert [c.header for c in table.columns][-2:] == ["train images/s", "train peak MB"]
    inference = [dataclasses.replace(p, train_step_time=None) for p in profiles]
    assert "train images/s" not in [c.header for c in profile_table(inference).columns]


def test_plot_marks_the_front_and_names_every_model(profiles, tmp_path):
    slow = dataclasses.replace(
        profiles[0], model="slow", infer_gmacs=9.0, infer_samples_per_sec=profiles[0].infer_samples_per_sec / 2
    )
    figure = plot_models([*profiles, slow], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (ax,) = figure.axes
    names = [t for t in ax.texts if t.get_text()]
    assert [t.get_text() for t in names] == ["test_vit", "test_resnet", "slow"]
    dominated = {c.get_label(): c.get_offsets().tolist() for c in ax.collections}["dominated"]
    assert [9.0, pytest.approx(slow.infer_samples_per_sec, rel=1e-5)] in dominated
    boxes = [t.get_window_extent() for t in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert plot_models(profiles, tmp_path / "p.svg", x="param_count", y="latency_p50_ms").axes[0].get_xlabel() == (
        "parameters, millions"
    )
    assert "<svg" in (tmp_path / "p.svg").read_text()
    with pytest.raises(ValueError, match="x must be one of"):
        plot_models(profiles, tmp_path / "p.png", x="colour")


def test_a_given_module_stays_as_it_is():
    model = timm.create_model("test_resnet").train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    p = profile_model(model, 64, dtype=torch.bfloat16, train=True, **FAST)
    assert (p.model, p.infer_img_size, p.dtype) == ("test_resnet", 64, "bfloat16")
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(q.grad is None for q in model.parameters())


def test_fixed_size_models_are_resized_and_others_take_any_size():
    assert subject("test_vit", 96).shape == (3, 96, 96)
    for name in ("test_vit", "test_resnet"):
        resized = subject(name, (96, 128))
        assert resized.model(resized.images(2)).shape == (2, 1000)


def test_subjects_with_fewer_tokens_are_those_of_reduce_tokens():
    plain = subject("test_vit", 96)
    reduced = subject("test_vit+tome:r={1: 9},proportional=False", 96)
    assert reduced.name == "test_vit+tome:r={1: 9},proportional=False"
    reduction = reduced.model.eval().reduction
    assert reduction.schedule[:3] == (0, 9, 0)
    assert reduction.method.proportional is False
    images = plain.images(1)
    plain.model.load_state_dict(reduced.model.state_dict())
    want = reduce_tokens(plain.model.eval(), "tome", r={1: 9}, proportional=False)(images)
    assert torch.equal(reduced.model(images), want)
    budget = subject("test_vit+evit:target_gmacs=0.005", 96).model  # meant for these images
    assert budget.reduction.report(images).gmacs == pytest.approx(0.005, rel=0.1)
    profiles = [profile_model(name, 96, **FAST) for name in ("test_vit", reduced.name)]
    assert profiles[0].infer_gmacs > profiles[1].infer_gmacs


def test_a_reduction_in_words():
    assert parse_reduction("algm") == {"method": "algm"}
    assert parse_reduction("mctf:r=[0, 4],attention=approximate") == {
        "method": "mctf", "r": [0, 4], "attention": "approximate"
    }


def test_bad_subjects_are_named():
    with pytest.raises(ValueError, match=r"unknown model 'resnet_50'.*resnet50"):
        subject("resnet_50")
    for name, message in {
        "test_vit+tome:13": r"test_vit\+tome:13: a reduction must be METHOD:key=value,key=value..., got 'tome:13'",
        "test_vit+tome:r=4,r=5": "a reduction must be",
        "test_vit+": "test_vit.: method must be one of",
        "test_vit+tome:colour=1": "test_vit.tome:colour=1: tome has no option 'colour'",
        "test_vit+tome:r=4,model=1": "model",
        "test_resnet+tome:r=4": "test_resnet.tome:r=4: model must be of one of the families",
        "vitt+tome:r=4": "unknown model 'vitt'",
    }.items():
        with pytest.raises(ValueError, match=message):
            subject(name)
    with pytest.raises(ValueError, match="input_size must be given: Linear"):
        subject(nn.Linear(2, 2))

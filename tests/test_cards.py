"""The cards of model_cards/ are complete, and the models are what their cards say."""
from __future__ import annotations

import importlib.util
import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs

import visionbb  # noqa: F401  (registers the models)
from visionbb.cards import (
    Card,
    CardError,
    Measured,
    card_paths,
    measure,
    measure_speed,
    measured_block,
    published_block,
    read_block,
    read_card,
    read_table,
    replace_block,
)
from visionbb.reduction import METHODS
from visionbb.training import TrainConfig

ROOT = Path(__file__).parents[1]
PATHS = card_paths(ROOT / "model_cards")
CARDS = {path: read_card(path) for path in PATHS}
TAGS = [(path, name) for path, card in CARDS.items() for name in card.tags()]

# Published figures that are no rounding of the count of the published code.
ODD_FIGURES = {
    "dinat_large_11x11": "the README repeats the 200 M of the model with 7x7 windows",
    **dict.fromkeys(["plainmamba_l1", "plainmamba_l2", "plainmamba_l3"], "the README leaves the classifier out"),
    "vrwkv_base": "the README has 93.7 for 93.65",
}

by_card = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
by_tag = pytest.mark.parametrize(("path", "name"), TAGS, ids=[name for _, name in TAGS])


# ---- The models are what their cards say ----------------------------------------------------------------------------

def test_every_model_stands_in_exactly_one_card():
    in_cards = [name for card in CARDS.values() for name in (*card.models, *card.demos)]
    ours = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("visionbb.")]
    assert sorted(set(ours) - set(in_cards)) == [], "models without a card"
    assert sorted(in_cards) == sorted(set(in_cards) & set(ours)), "in two cards, or no model of ours"


@by_card
def test_tags_are_those_of_the_registry(path):
    for name, model in CARDS[path].models.items():
        assert set(model.weights) == {cfg.tag for cfg in get_arch_pretrained_cfgs(name).values()}, name


@by_tag
def test_the_registry_says_what_the_card_says(path, name):
    card, cfg = CARDS[path], timm.get_pretrained_cfg(name)
    weights = card.tags()[name]
    assert (cfg.url or None) == weights.url
    assert cfg.input_size == (3, weights.input_size, weights.input_size)
    assert cfg.license == (card.weights_license and card.weights_license.lower())
    assert cfg.paper_ids == f"arXiv:{card.paper.arxiv}"
    assert cfg.origin_url == (card.code and card.code.repository)


@by_tag
def test_published_and_measured_figures_are_those_of_the_model(path, name):
    model, weights = CARDS[path].models[name.split(".")[0]], CARDS[path].tags()[name]
    now = measure(name)
    if timm.get_pretrained_cfg(name).num_classes == 1000:
        if model.param_count is not None:
            assert now.params == model.param_count
        elif model.params is not None:  # no public code: within 0.5 % of the paper
            assert now.params / 1e6 == pytest.approx(model.params, rel=5e-3)
    if weights.gmacs is not None:
        assert now.gmacs == pytest.approx(weights.gmacs, rel=0.02)
    table = {row["model"]: row for row in read_table(read_block(path.read_text(), "measured"))}
    row = table[f"`{name}`"]
    assert {title: row[title] for title in now.cells()} == now.cells(), "run tools/update_cards.py"


@by_card
def test_published_parameters_are_the_count_rounded_or_cut_off(path):
    for name, model in CARDS[path].models.items():
        if model.params is None or model.param_count is None or name in ODD_FIGURES:
            continue
        decimals = len(f"{model.params:g}".partition(".")[2])
        cut_off = int(model.param_count / 1e6 * 10**decimals) / 10**decimals
        assert model.params in (round(model.param_count / 1e6, decimals), cut_off), name


@by_card
def test_tables_hold_the_front_matter_and_every_tag(path):
    text, card = path.read_text(), CARDS[path]
    assert read_block(text, "published") == published_block(card), "run tools/update_cards.py"
    rows = read_table(read_block(text, "measured"))
    assert [row["model"] for row in rows] == [f"`{name}`" for name in card.tags()]


@by_card
def test_recipes_use_the_options_of_train(path):
    options = {option.name for option in fields(TrainConfig)}
    for recipe in CARDS[path].recipes.values():
        assert set(recipe) <= options
    assert {weights.recipe for weights in CARDS[path].tags().values()} - {None} == set(CARDS[path].recipes)


@by_card
def test_the_text_names_models_that_exist(path):
    text, card = path.read_text(), CARDS[path]
    created = re.findall(r'create_model\("([^"]+)"', text)
    assert created
    assert set(created) <= {*card.models, *card.tags()}
    assert card.paper.arxiv in text
    assert "```bibtex" in text


def test_the_page_on_token_reduction_knows_every_method():
    text = (ROOT / "model_cards" / "token_reduction.md").read_text()
    for name, method in METHODS.items():
        arxiv = re.search(r"https://arxiv\.org/abs/[\d.]+\d", inspect.getmodule(method).__doc__).group()
        assert re.search(rf"^\| `{name}` \|.*{re.escape(arxiv)}", text, re.MULTILINE), name
    rows = read_table(read_block(text, "measured"))
    assert rows[0]["method"] == "none"
    assert {name for row in rows[1:] for name in re.findall("`(.*)`", row["method"])} <= METHODS.keys()


# ---- Reading --------------------------------------------------------------------------------------------------------

MINIMAL = """
family: Ours
paper: {title: Ours, arxiv: "2401.00001"}
models:
  ours_tiny:
    weights:
      in1k: {url: null, input_size: 224}
"""


def write(tmp_path, front: str, body: str = "# Ours\n") -> Path:
    path = tmp_path / "ours.md"
    path.write_text(f"---\n{textwrap.dedent(front).strip()}\n---\n{body}")
    return path


def test_optional_fields_have_defaults(tmp_path):
    card = read_card(write(tmp_path, MINIMAL))
    assert isinstance(card, Card)
    assert card.code is None
    assert card.recipes == {}
    assert card.models["ours_tiny"].coco == {}
    assert card.tags()["ours_tiny.in1k"].top1 is None


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        ("family: Ours", "", "ours.md: family is missing"),
        ("title: Ours, ", "", "ours.md: paper.title is missing"),
        ("input_size: 224", "", "models.ours_tiny.weights.in1k.input_size is missing"),
        ("input_size: 224", "input_size: big", "in1k.input_size must be a whole number, got 'big'"),
        ("input_size: 224", "input_size: 224.5", "in1k.input_size must be a whole number, got 224.5"),
        ("input_size: 224", "input_size: true", "in1k.input_size must be a whole number, got True"),
        ("input_size: 224", "input_size: 224, top1: good", "in1k.top1 must be a number, got 'good'"),
        ("input_size: 224", "input_size: 224, top5: 99.0", "in1k.top5 is no field of a card; known here: url, input_"),
        ('"2401.00001"', "2401.00001", r"paper.arxiv must be text \(in quotes\), got 2401.00001"),
        ("paper: {", "paper: [", "ours.md: the front matter is not valid YAML"),
        ('paper: {title: Ours, arxiv: "2401.00001"}', "paper: Ours", "ours.md: paper must be a mapping, got 'Ours'"),
        ("ours_tiny:", "7:", r"a key of models must be text \(in quotes\), got 7"),
        (MINIMAL, "- a list", "ours.md: the front matter must be a mapping, got"),
    ],
)
def test_errors_name_the_file_the_field_and_the_value(tmp_path, find, put, message):
    assert find in MINIMAL
    with pytest.raises(CardError, match=message):
        read_card(write(tmp_path, MINIMAL.replace(find, put)))


@pytest.mark.parametrize("text", ["# Ours\n", "---\nfamily: Ours\n", "family: Ours\n---\n"])
def test_a_card_without_front_matter_is_refused(tmp_path, text):
    (tmp_path / "ours.md").write_text(text)
    with pytest.raises(CardError, match=r"ours\.md: a card starts with YAML front matter"):
        read_card(tmp_path / "ours.md")


# ---- Blocks and tables ----------------------------------------------------------------------------------------------

BODY = "before\n<!-- {0}:begin -->\nold\n<!-- {0}:end -->\nafter\n"


def test_a_block_is_replaced_and_nothing_else():
    text = BODY.format("measured") + BODY.format("published")
    new = replace_block(text, "measured", "| a |\n| --- |\n| 1 |")
    assert new == text.replace("old", "| a |\n| --- |\n| 1 |", 1)
    assert read_table(read_block(new, "measured")) == [{"a": "1"}]
    assert read_block(new, "published") == "old"
    assert read_table("old") == []
    assert replace_block(new, "measured", "old") == text


@pytest.mark.parametrize(
    "text",
    ["", "<!-- measured:begin -->", "<!-- measured:end --><!-- measured:begin -->", BODY.format("measured") * 2],
)
def test_markers_must_be_one_pair(text):
    with pytest.raises(CardError, match="<!-- measured:begin --> followed by one <!-- measured:end -->"):
        replace_block(text, "measured", "new")


def test_the_measured_table_reads_back():
    rows = [Measured("a.in1k", 224, 19_984_174, 2.6951, 12.34), Measured("b.in1k", 384, 7_000, 101.5, 1234.5)]
    block = measured_block(rows, {"device": "cpu", "batch_size": 4})
    assert read_table(block) == [row.cells() for row in rows]
    assert read_table(block)[0] == {
        "model": "`a.in1k`", "input": "224", "params M": "19.98", "GMACs": "2.70", "images/s": "12.3"
    }
    assert "batch_size 4" in block


def test_published_tables_leave_out_what_was_not_published(tmp_path):
    front = """
    family: Ours
    paper: {title: Ours, arxiv: "2401.00001"}
    models:
      ours_tiny:
        params: 20
        weights:
          in1k: {url: null, input_size: 224, gmacs: 2.7, top1: 80}
          in22k: {url: null, input_size: 224}
      ours_small:
        weights: {in1k: {url: null, input_size: 224, top1: 82.1}}
      ours_base:
        weights: {in1k: {url: null, input_size: 384}}
        coco: {mask_rcnn_1x: {box_ap: 46.5, gmacs: 225}}
        ade20k: {upernet: {miou: 45, miou_ms: 46.4}}
    """
    classification, dense = published_block(read_card(write(tmp_path, front))).split("\n\n")[1::2]
    assert classification.splitlines()[2:] == [
        "| `ours_tiny.in1k` | 224 | 20 | 2.7 | 80.0 |",
        "| `ours_small.in1k` | 224 |  |  | 82.1 |",
    ]
    assert dense.splitlines()[2:] == ["| `ours_base` | 46.5 / - (225 G) | 45.0 / 46.4 |"]


def test_speeds_are_measured_at_the_size_of_the_tag():
    speeds = measure_speed(["test_vit.r160_in1k", "nat_digits.untrained"], batch_size=2, repeats=1, warmup=0)
    assert set(speeds) == {"test_vit.r160_in1k", "nat_digits.untrained"}
    assert all(speed > 0 for speed in speeds.values())


# ---- The tool -------------------------------------------------------------------------------------------------------

@pytest.fixture
def update_cards():
    spec = importlib.util.spec_from_file_location("tools_update_cards", ROOT / "tools" / "update_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


DIGITS = MINIMAL.replace("ours_tiny", "nat_digits").replace("in1k", "untrained").replace("224", "32")


def test_the_tool_rewrites_both_blocks(tmp_path, update_cards, capsys):
    path = write(tmp_path, DIGITS, BODY.format("published") + BODY.format("measured"))
    update_cards([str(path)])
    assert capsys.readouterr().out == "ours.md: 1 rows\n"
    text = path.read_text()
    assert read_block(text, "published") == published_block(read_card(path))
    assert read_table(read_block(text, "measured")) == [measure("nat_digits.untrained").cells()]
    assert "old" not in text

    update_cards([str(path), "--speed", "--batch-size", "2", "--repeats", "1"])
    (row,) = read_table(read_block(path.read_text(), "measured"))
    assert float(row["images/s"]) > 0
    update_cards([str(path)])
    assert path.read_text() == text


def test_the_tool_leaves_a_faulty_card_alone(tmp_path, update_cards, capsys):
    path = write(tmp_path, DIGITS)
    before = path.read_text()
    with pytest.raises(SystemExit):
        update_cards([str(path)])
    assert "<!-- published:begin -->" in capsys.readouterr().err
    assert path.read_text() == before

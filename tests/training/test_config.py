from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

import visionbb  # noqa: F401  (registers the models)
from visionbb.training import ConfigError, TrainConfig, parse_config
from visionbb.training.config import build_parser, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_without_arguments() -> None:
    assert parse_config([]) == TrainConfig()


def test_every_option_is_a_flag_with_a_help_text() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    for option in fields(TrainConfig):
        assert "--" + option.name.replace("_", "-") in flags
        assert option.metadata["help"]


def test_command_line_beats_recipe_beats_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "lr: 1e-4\nepochs: 7\nmodel_ema: true\nclip_grad: 1\nmodel_kwargs: {depth: 2}\n")
    config = parse_config(["--config", path, "--epochs", "9", "--no-model-ema", "--clip-grad", "none",
                           "--opt-betas", "0.9", "0.95", "--model-kwargs", "k=3", "name=abc", "-b", "32"])
    assert (config.lr, config.epochs, config.model_ema, config.clip_grad) == (1e-4, 9, False, None)
    assert (config.opt_betas, config.model_kwargs, config.batch_size) == ([0.9, 0.95], {"k": 3, "name": "abc"}, 32)
    assert config.weight_decay == TrainConfig().weight_decay


@settings(deadline=None)
@given(epochs=st.integers(1, 10**6), lr=st.floats(0, 1e3), aa=st.none() | st.text("abc-0.5", min_size=1),
       betas=st.none() | st.lists(st.floats(0, 1), min_size=2, max_size=2), ema=st.booleans(),
       kwargs=st.dictionaries(st.text("xyz", min_size=1), st.integers() | st.booleans() | st.floats(-1, 1)))
def test_saved_options_are_a_recipe_of_the_same_run(tmp_path_factory, epochs, lr, aa, betas, ema, kwargs) -> None:
    config = TrainConfig(epochs=epochs, lr=lr, aa=aa, opt_betas=betas, model_ema=ema, model_kwargs=kwargs)
    path = tmp_path_factory.mktemp("saved") / "args.yaml"
    config.save(path)
    assert parse_config(["--config", str(path)]) == config


@pytest.mark.parametrize(("text", "message"), [
    ("batch-size: 3", "unknown option 'batch-size': did you mean 'batch_size'"),
    ("epoch: 3", "unknown option 'epoch': did you mean 'epochs'"),
    ("epochs: 3.5", "epochs must be of type int, got 3.5"),
    ("epochs: true", "epochs must be of type int, got True"),
    ("lr: fast", "lr must be of type float, got 'fast'"),
    ("amp: 1", "amp must be of type bool, got 1"),
    ("model: null", "model must be of type str, got None"),
    ("scale: 0.5", "scale must be a list, got 0.5"),
    ("scale: [0.5, big]", "scale must be of type float, got 'big'"),
    ("scale: [0.9, 0.5]", "scale must be two numbers, 0 < low <= high"),
    ("model_kwargs: [1]", "model_kwargs must be of type dict"),
    ("epochs: 0", "epochs must be at least 1, got 0"),
    ("smoothing: 1.5", "smoothing must be between 0 and 1, got 1.5"),
    ("lr: .nan", "lr must be at least 0, got nan"),
    ("sched: cosin", "sched must be one of .*did you mean 'cosine'"),
    ("{mixup: 0.2, batch_size: 7}", "batch_size must be even with mixup"),
    ("- epochs", "must hold a mapping of options, got list"),
    ("epochs: [", "is not valid YAML"),
])
def test_bad_recipes_name_the_option(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(["--config", recipe(tmp_path, text)])


@pytest.mark.parametrize(("argv", "message"), [
    (["--epoch", "3"], "unknown argument '--epoch': did you mean '--epochs'"),
    (["--config", "no/such.yaml"], "config: cannot read no/such.yaml"),
    (["--sched", "cosin"], "sched must be one of"),
])
def test_bad_arguments_name_the_option(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(argv)


@pytest.mark.parametrize("argv", [["--epochs", "x"], ["--model-kwargs", "k"]])
def test_text_that_is_no_value_ends_with_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert timm.is_model(TrainConfig(**load_recipe(path)).model)

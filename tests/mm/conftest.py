"""Everything here needs the extra `mm`, which `dev` installs: without it the tests fail, they do not skip."""
from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A small copy of the digit scenes."""
    from visionbb.mm.digit_scenes import write_digit_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_digit_scenes(folder, training=24, validation=6)
    return folder


@pytest.fixture(autouse=True)
def fresh_scope():
    """mmengine keeps the default scope of the last config; each test starts without."""
    from mmengine.registry import DefaultScope

    yield
    DefaultScope._instance_dict.clear()

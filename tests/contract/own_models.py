"""A pytest plugin for timm's own test suite: its model lists hold the models of visionbb, and nothing else.

    python -m pytest -p own_models tests/test_models.py -k nat_mini
"""
import timm
from timm.models import _registry

import visionbb  # noqa: F401  (registers the models)

OWN = {name for name, build in _registry._model_entrypoints.items() if build.__module__.startswith("visionbb.")}
_all_models = timm.list_models


def list_models(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
    """timm's, without its restriction to modules of timm's, and with no model of its list of irregular ones."""
    if not isinstance(filter, str) and "vit_*" in filter:  # the selection of models without a map before pooling
        return []
    return [name for name in _all_models(filter, "", pretrained, exclude_filters, **kwargs) if name in OWN]


def pytest_configure(config):
    """Before timm's test module is collected, which takes these names from timm."""
    timm.list_models = list_models
    timm.list_pretrained = lambda *args, **kwargs: []

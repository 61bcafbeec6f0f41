"""Choosing the path of an op."""
from __future__ import annotations

import threading

import pytest
import torch

from visionbb.kernels import _dispatch, na2d_qkvpacked, use


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="one of auto, reference, portable, triton, got 'cuda'"), use("cuda"):
        pass


def test_triton_asked_for_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use("triton"), pytest.raises(RuntimeError, match=r"triton is not installed|need a GPU tensor"):
        na2d_qkvpacked(torch.zeros(1, 3, 3, 3, 1, 8), 3)


def test_choice_is_restored_after_an_error_and_reaches_other_threads():
    seen = []
    with pytest.raises(KeyError), use("reference"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.reference_chosen()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [True]
    assert not _dispatch.reference_chosen()


@pytest.mark.parametrize(("version", "serves"), [("3.2.0", False), ("3.4.0", True), ("3.10.1+git", True)])
def test_old_triton_is_none(monkeypatch, version, serves):
    monkeypatch.setattr(_dispatch.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: object())
    assert _dispatch.has_triton.__wrapped__() == serves


def test_without_triton_the_portable_path_serves(monkeypatch):
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    assert _dispatch.resolve(torch.zeros(1), None) == "portable"
    with use("triton"), pytest.raises(RuntimeError, match="not installed"):
        _dispatch.resolve(torch.zeros(1), None)

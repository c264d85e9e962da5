"""The manifests of each overlay, rendered once."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import yaml

from k8s import render

OVERLAYS = ("local", "prod", "prod-kserve")


@functools.cache
def _rendered(overlay: str) -> tuple[dict, ...]:
    return tuple(yaml.safe_load_all(render.render(overlay, {})))


@pytest.fixture(params=OVERLAYS)
def overlay(request) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: the manifests cannot be rendered")
    return request.param


@pytest.fixture
def objects(overlay) -> list[dict]:
    """Every object of an overlay; a copy, which a test may break."""
    found = copy.deepcopy(list(_rendered(overlay)))
    assert len(found) > 30
    return found


@pytest.fixture
def prod() -> list[dict]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: the manifests cannot be rendered")
    return copy.deepcopy(list(_rendered("prod")))

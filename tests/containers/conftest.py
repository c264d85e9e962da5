"""The images, built once, and what their containers need. `make test-containers` runs these tests."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.container import VOLUMES, Container, Root, missing

ASKED = "TUNEYARD_TEST_CONTAINERS"
# The gpu image is six GiB, so it is built and tried only where asked for, train in it; no GPU is needed.
GPU = bool(os.environ.get("TUNEYARD_TEST_GPU_IMAGE"))
IMAGES = ["serving", "cpu", *(["gpu"] if GPU else [])]
# Names of the environment that a pod has from the ConfigMap and the Secrets; the rest is of this machine.
OF_A_POD = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "TUNEYARD_STORE",
    "TUNEYARD_MLFLOW_ARTIFACTS",
    "TUNEYARD_SERVING_TOKEN",
)


logging.getLogger("httpx").setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing() or (
        "" if os.environ.get(ASKED) else "builds images, some minutes: `make test-containers`"
    )
    if why:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def bases() -> Callable[[str], str]:
    """The base of an image: $TUNEYARD_TEST_BASE, or one made with debootstrap."""
    from pipelines.images import build, builders, debootstrap

    @functools.cache
    def base(compilers: bool) -> str:
        named = os.environ.get("TUNEYARD_TEST_BASE", "")
        return named or debootstrap.make(builders.find("buildah"), build.source_state()[1], compilers)

    return lambda image: base(image == "gpu")


@pytest.fixture(scope="session")
def built(bases):
    """Builds an image: `built(name)` -> what was built."""
    from pipelines.images import build

    made: dict[str, build.Built] = {}

    def make(image: str) -> build.Built:
        if image not in made:
            [made[image]] = build.build([image], base=bases(image), builder="buildah")
        return made[image]

    return make


@pytest.fixture(scope="session")
def roots(built):
    """The root file system of an image: `roots(name)`."""
    opened: dict[str, Root] = {}

    def root(image: str) -> Root:
        if image not in opened:
            opened[image] = Root(built(image).tag)
        return opened[image]

    yield root
    for each in opened.values():
        each.close()


@pytest.fixture(scope="session")
def contain(roots, tmp_path_factory) -> Callable[..., Container]:
    """Makes a container: `contain(image, arguments, environment, volumes)`; all end with the tests."""
    made: list[Container] = []

    def make(image, arguments=None, environment=None, volumes=VOLUMES):
        folder = tmp_path_factory.mktemp("container")
        # runc's user must be able to reach the volumes below it.
        for parent in [folder, *folder.parents][:4]:
            parent.chmod(0o755)
        made.append(Container(roots(image), folder, arguments, environment, volumes))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(scope="session")
def pod_environment(store_env) -> dict[str, str]:
    """What a pod's ConfigMap and Secrets say, for the platform of the tests."""
    return {name: store_env[name] for name in OF_A_POD}

"""What is in an image, seen from inside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from components.shared import digest
from pipelines.images import lock
from tests.containers.bills import fault
from tests.containers.conftest import GPU, IMAGES
from tests.containers.container import buildah

TRAINING = {"accelerate", "datasets", "great-expectations", "kfp", "mlflow", "peft", "scikit-learn", "trl"}
DEVELOPMENT = {"hypothesis", "mypy", "pip", "pytest", "ruff", "uv", "wheel"}


@pytest.fixture
def bill(built):
    """The bill of materials of an image: `bill(name)`."""
    return lambda image: json.loads(Path(built(image).sbom).read_text())


def distributions(bill):
    return {each["name"]: each["version"] for each in bill["components"] if "pypi" in each["purl"]}


def pinned(image):
    text = (digest.TREE_ROOT / "requirements" / "images" / f"{image}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)===?(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_the_code_that_its_digest_is_over(built, roots, image):
    app = roots(image).path / "app"
    inside = {
        path.relative_to(app): digest.of_file(path)
        for path in app.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert inside == {
        path.relative_to(digest.TREE_ROOT): digest.of_file(path) for path in lock.code_files(image)
    }
    # Said by the image's own Python, over the files that it found.
    assert built(image).code == lock.code_digest(image)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_what_its_lock_pins_and_nothing_else(bill, image):
    assert distributions(bill(image)) == pinned(image)
    assert not DEVELOPMENT & distributions(bill(image)).keys()


def test_the_serving_image_holds_no_training_library(bill):
    assert not TRAINING & distributions(bill("serving")).keys()
    assert TRAINING & distributions(bill("cpu")).keys() == TRAINING - {"datasets", "trl"}


@pytest.mark.parametrize("image", IMAGES)
def test_the_bill_of_materials_keeps_to_its_schema_and_has_the_systems_packages(bill, image):
    found = bill(image)
    assert fault(found) == ""
    packages = {each["name"] for each in found["components"] if "pkg:deb" in each["purl"]}
    assert {"libc6", "libpython3.11-stdlib"} <= packages
    without = [
        each["name"] for each in found["components"] if "pypi" in each["purl"] and not each.get("hashes")
    ]
    assert without == []


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_of_the_machine_that_built_it_is_in_an_image(roots, image):
    root = roots(image).path
    for name in ("etc/pip.conf", "etc/apt/sources.list", "root/.config/pip", "root/.cache", "wheels", "lock"):
        assert not (root / name).exists(), name
    tree = str(digest.TREE_ROOT).encode()
    texts = [path for path in (root / "venv").rglob("*") if path.suffix in (".json", ".cfg", "")]
    texts += [path for path in (root / "etc").rglob("*")]
    found = [p for p in texts if p.is_file() and not p.is_symlink() and tree in p.read_bytes()]
    assert found == []


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_in_an_image_belongs_to_its_user_or_is_writable_by_it(roots, image):
    """The root is read-only anyway; where a cluster forgets that, the code still cannot be changed."""
    root = roots(image).path
    writable = []
    for path in [*root.glob("app/**/*"), *root.glob("venv/**/*"), root / "app", root / "venv"]:
        status = path.lstat()
        if not path.is_symlink() and (status.st_uid == 10001 or status.st_mode & 0o002):
            writable.append(path)
    assert writable == []
    forbidden = {"pip", "pip3"} if image == "gpu" else {"pip", "pip3", "gcc"}
    assert not [path for path in (root / "usr/bin").iterdir() if path.name in forbidden]


@pytest.mark.skipif(not GPU, reason="six GiB: TUNEYARD_TEST_GPU_IMAGE=1 builds it")
def test_the_gpu_image_has_cuda_and_a_compiler_for_triton(contain):
    """As far as it can be seen without a GPU: the build of PyTorch, its extras, and what Triton calls."""
    lines = [
        "import subprocess, torch, triton, deepspeed",
        "assert torch.version.cuda and not torch.cuda.is_available()",
        "open('/tmp/host.c', 'w').write('#include <Python.h>\\nint main() { return 0; }')",
        "include = __import__('sysconfig').get_paths()['include']",
        "subprocess.run(['gcc', '-I', include, '-c', '/tmp/host.c', '-o', '/tmp/host.o'], check=True)",
    ]
    container = contain("gpu", ["python3", "-c", "\n".join(lines)])
    assert container.run() == 0, container.log.read_text()


def test_a_second_build_gives_the_same_layers(built, bases):
    """Nothing of the time, the order or the folder of a build is in an image: only its files are."""
    tag, again = built("serving").tag, "localhost/tuneyard/serving:again"
    folder = digest.TREE_ROOT / "build" / "images" / "serving"
    [epoch] = {int(path.stat().st_mtime) for path in (folder / "app").rglob("*.py")}
    first = json.loads(buildah("inspect", "--type", "image", tag))
    dockerfile = digest.TREE_ROOT / "docker" / "Dockerfile"
    buildah(
        "build", "--no-cache", "--layers", f"--timestamp={epoch}", "--network=host", "--target=serving",
        f"--build-arg=BASE={bases('serving')}", f"--build-arg=SOURCE_DATE_EPOCH={epoch}",
        "--file", str(dockerfile), "--tag", again, str(folder),
    )  # fmt: skip
    ids = json.loads(buildah("inspect", "--type", "image", again))["OCIv1"]["rootfs"]["diff_ids"]
    buildah("rmi", again)
    assert ids == first["OCIv1"]["rootfs"]["diff_ids"]

"""Bills of materials, the lock of images, and what hadolint says."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.shared import digest
from components.shared.errors import TuneyardError
from pipelines.images import build, builders, context, facts, lock, sbom
from tests.containers.bills import fault

INSIDE = facts.Facts(
    code="c" * 64,
    user=(10001, 10001),
    python=[
        ("kfp-server-api", "2.17.0", {"names": ["Apache Software License"]}),
        ("torch", "2.13.0+cpu", {"expression": "BSD-3-Clause"}),
        ("unknown", "1", {"names": []}),
    ],
    debian=[("libstdc++6", "12.2.0-14+deb12u1", "amd64"), ("passwd", "1:4.13+dfsg1-1", "amd64")],
    size_bytes=1,
)


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", "kfp_server_api-2.17.0.tar.gz"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.slow  # the schema has seconds of references to resolve
def test_a_bill_keeps_to_the_schema_of_cyclonedx(wheels):
    bill = sbom.document("cpu", INSIDE, wheels, 1_700_000_000)
    assert fault(bill) == ""
    assert "type" in fault(bill | {"components": [{"name": "no type"}]})


def test_a_bill_names_each_distribution_and_package_with_its_file(wheels):
    found = {each["name"]: each for each in sbom.document("cpu", INSIDE, wheels, 1)["components"]}
    assert found["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert found["torch"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    source = hashlib.sha256(b"kfp_server_api-2.17.0.tar.gz").hexdigest()
    assert found["kfp-server-api"]["hashes"] == [{"alg": "SHA-256", "content": source}]
    assert "hashes" not in found["unknown"] and "licenses" not in found["unknown"]
    assert found["passwd"]["purl"] == "pkg:deb/debian/passwd@1%3A4.13%2Bdfsg1-1?arch=amd64"
    assert found["libstdc++6"]["purl"].startswith("pkg:deb/debian/libstdc%2B%2B6@")


def test_the_same_image_has_the_same_bill_and_another_one_another(wheels):
    one, two = (sbom.document("cpu", INSIDE, wheels, 1) for _ in range(2))
    assert one == two
    assert sbom.document("gpu", INSIDE, wheels, 1)["serialNumber"] != one["serialNumber"]


def test_an_image_with_other_code_another_user_or_pip_is_refused_with_all_faults():
    wrong = facts.Facts("d" * 64, (0, 0), [("pip", "26", {"names": []})], [], 1)
    with pytest.raises(TuneyardError) as error:
        build._see("cpu", "t:1", wrong, "c" * 64)
    assert (
        "dddddddddddd" in error.value.what
        and "0:0" in error.value.what
        and "pip is in it" in error.value.what
    )
    build._see("cpu", "t:1", INSIDE, "c" * 64)


@pytest.fixture
def stubbed(monkeypatch, tmp_path, wheels):
    """Everything around a build but the builder's work: that is done by tests/containers."""
    folder = tmp_path / "cpu"
    monkeypatch.setattr(context, "folder_of", lambda image: folder)
    monkeypatch.setattr(context, "fetch", lambda folder: None)
    monkeypatch.setattr(builders, "find", lambda name: builders.Builder("buildah", "buildah"))
    monkeypatch.setattr(builders, "build", lambda *arguments: None)
    code = lock.code_digest("cpu")
    inside = facts.Facts(code, INSIDE.user, INSIDE.python, INSIDE.debian, 2**30)
    monkeypatch.setattr(facts, "ask", lambda *arguments: inside)
    monkeypatch.setattr(sbom, "FOLDER", tmp_path / "sbom")
    written = {}
    monkeypatch.setattr(lock, "write", written.update)
    return written


def test_a_pushed_image_is_locked_by_the_digest_of_the_registry(stubbed, monkeypatch, tmp_path):
    monkeypatch.setattr(builders, "push", lambda builder, tag, name: "sha256:" + "e" * 64)
    [built] = build.build(["cpu"], registry="r.example.com/t", push=True)
    assert stubbed == {
        "cpu": lock.Image("r.example.com/t/cpu", "sha256:" + "e" * 64, lock.code_digest("cpu"))
    }
    assert built.reference == f"r.example.com/t/cpu@sha256:{'e' * 64}"
    assert json.loads(Path(built.sbom).read_text())["bomFormat"] == "CycloneDX"


def test_an_image_that_is_not_pushed_is_not_locked(stubbed):
    [built] = build.build(["cpu"])
    assert stubbed == {} and built.reference == ""


def test_the_command_prints_one_json_object(stubbed):
    from pipelines.cli import app

    answer = CliRunner().invoke(app, ["images", "--only", "cpu", "--json"])
    assert answer.exit_code == 0, answer.output
    [image] = json.loads(answer.stdout)["images"]
    assert image["image"] == "cpu" and image["size_bytes"] == 2**30


def test_hadolint_finds_nothing_in_any_dockerfile():
    hadolint = Path(sys.executable).parent / "hadolint"
    found = [path for path in (digest.TREE_ROOT / "docker").rglob("*Dockerfile*") if path.is_file()]
    assert found
    answer = subprocess.run([hadolint, "--no-color", *found], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "")


def test_docker_never_becomes_a_package():
    """It would shadow the docker SDK, which kfp imports."""
    assert not list((digest.TREE_ROOT / "docker").rglob("*.py"))


def test_every_command_of_the_page_on_images_is_one_that_make_takes():
    text = (digest.TREE_ROOT / "docs" / "containers.md").read_text()
    lines = re.findall(r"^    (make .*)$", text, re.MULTILINE)
    assert len(lines) >= 5
    makefile = (digest.TREE_ROOT / "Makefile").read_text()
    for line in lines:
        words = shlex.split(line)[1:]
        done = subprocess.run(["make", "-n", *words], cwd=digest.TREE_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        rule = re.search(rf"^{words[0]}:.*?(?=^\S|\Z)", makefile, re.MULTILINE | re.DOTALL)
        names = [word.split("=")[0] for word in words[1:]]
        unknown = [name for name in names if not re.search(rf"\$\$\{{?{name}\b", rule[0])]
        assert unknown == [], line

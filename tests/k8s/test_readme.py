"""The instructions name what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from components.deploy.config import DeployConfig
from k8s import render
from tests.k8s.test_manifests import SECRETS, images_of

K8S = Path(__file__).resolve().parents[2] / "k8s"
README = (K8S / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_paths_and_overlays_are_there() -> None:
    paths = set(re.findall(r"`((?:base|components|overlays|cluster|common|argo)/[\w./-]*)`", README))
    assert len(paths) >= 8
    roots = (K8S, K8S / "overlays" / "prod")
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []
    assert {f"overlays/{name}" for name in render.overlays()} <= paths


def test_the_commands_make_the_secrets_that_the_manifests_name(tmp_path) -> None:
    """The block is run as it stands, against a kubectl that writes down what it is asked."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH, and the block makes passwords with it")
    (block,) = [block for block in BLOCKS if "tuneyard-object-store" in block]
    asked = tmp_path / "asked"
    for name, body in {
        # Of what comes through a pipe, only s3.json matters.
        "kubectl": 'printf "%s\\n" "$*" >> "$ASKED"; case "$*" in *s3.json*) cat > "$ASKED.s3";; esac',
        "python": ":",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(shutil.which('openssl')).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "ASKED": str(asked)}
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, check=True, timeout=60)
    made: dict[tuple[str, str], dict[str, str]] = {}
    for space, name, rest in re.findall(r"-n (\w+) create secret generic (\S+)(.*)", asked.read_text()):
        made[space, name] = dict(re.findall(r"--from-literal=(\w+)=(\S+)", rest))
    keys = {name: {key: "" for key in keys} for name, keys in SECRETS.items() if name != "tuneyard-notify"}
    for space in ("kubeflow", "tuneyard"):
        for name in keys:
            if (space, name) != ("kubeflow", "tuneyard-mlflow-server"):
                assert set(made[space, name]) == set(keys[name]), (space, name)
                # A URI of PostgreSQL and a form of MLflow take these as they are.
                assert all(re.fullmatch(r"[a-z0-9]+", value) for value in made[space, name].values())
    identity = yaml.safe_load(Path(f"{asked}.s3").read_text())["identities"][0]["credentials"][0]
    s3 = made["kubeflow", "tuneyard-s3"]
    assert identity == {"accessKey": s3["AWS_ACCESS_KEY_ID"], "secretKey": s3["AWS_SECRET_ACCESS_KEY"]}
    assert made["tuneyard", "tuneyard-s3"] == s3


def test_the_canary_that_the_instructions_show_is_one() -> None:
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "canary:" in block]
    shown = DeployConfig.model_validate(yaml.safe_load(block)["deploy"])
    assert shown.canary is not None
    assert set(yaml.safe_load(block)["deploy"]["canary"]) == set(type(shown.canary).model_fields)


@pytest.mark.parametrize("overlay", ["local"])
def test_the_images_of_others_are_pinned_as_the_instructions_say(objects, tmp_path) -> None:
    tagged = {image for image in images_of(objects) if not image.startswith("tuneyard/")}
    (block,) = re.findall(r"```yaml\n(images:.*?)```", README, re.DOTALL)
    pinned = yaml.safe_load(block.replace("<64 hexadecimal digits>", "d" * 64))
    assert {image["name"] for image in pinned["images"]} == {image.split(":")[0] for image in tagged}
    shutil.copytree(K8S, tmp_path / "k8s", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "k8s" / "overlays" / "local" / "kustomization.yaml"
    file.write_text(file.read_text() + yaml.safe_dump(pinned))
    done = subprocess.run(["kubectl", "kustomize", str(file.parent)], capture_output=True, text=True)
    found = images_of(list(yaml.safe_load_all(done.stdout)))
    digest = f"sha256:{'d' * 64}"
    assert {image for image in found if not image.startswith("tuneyard/")} == {
        f"postgres@{digest}",
        f"registry.example/mirror/seaweedfs@{digest}",
    }, done.stderr

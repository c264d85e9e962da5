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
from k8s.reachability import Endpoint, Port, allowed
from tests.k8s.manifests import one
from tests.k8s.test_manifests import SECRETS, images_of
from tests.k8s.test_network import MATRIX, Network, policies_of

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


# --- what may be added to the overlay `local` -----------------------------------------------------


@pytest.mark.parametrize("overlay", ["local"])
def test_the_way_to_the_hub_is_open_with_the_policy_that_is_shown_and_not_before(objects, overlay) -> None:
    (block,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "tuneyard-hub" in block
    ]
    ends, policies = Network(overlay).endpoints, policies_of(objects)
    shown = yaml.safe_load(block)
    for name in ("ingest", "train", "evaluate", "train-node"):
        assert not allowed(policies, ends[name], ends["internet"], Port(443))
        assert allowed([*policies, shown], ends[name], ends["internet"], Port(443))
        for elsewhere in ("neighbour", "metadata-service"):
            assert not allowed([*policies, shown], ends[name], ends[elsewhere], Port(443))


@pytest.mark.parametrize("overlay", ["local"])
def test_monitoring_is_beside_local_what_it_is_in_prod(objects, overlay, prod) -> None:
    assert any("kubectl apply --namespace tuneyard -k k8s/base/monitoring " in block for block in BLOCKS)
    folder = str(K8S / "base" / "monitoring")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    added = list(yaml.safe_load_all(done.stdout))
    # kubectl's --namespace is for objects without one, and refuses the others.
    assert [item["metadata"]["name"] for item in added if "namespace" in item["metadata"]] == []
    for item in added:
        item["metadata"]["namespace"] = "tuneyard"
        assert item == one(prod, item["kind"], item["metadata"]["name"])
    prometheus = Endpoint("prometheus", "10.244.9.9", **MATRIX["others"]["prometheus"])
    ends, policies = Network(overlay).endpoints, policies_of(objects)
    opened = [*policies, *(item for item in added if item["kind"] == "NetworkPolicy")]
    assert not allowed(policies, prometheus, ends["serving"], Port(8080))
    assert allowed(opened, prometheus, ends["serving"], Port(8080))
    assert not allowed(opened, ends["stranger"], ends["serving"], Port(8080))

"""Objects of kinds that Kubernetes does not know, against the schemas of those who brought them.

TrainingRuntime against the classes of the Kubeflow SDK. The others against CustomResourceDefinitions, which
are not ours to copy: `kubectl get customresourcedefinitions -o yaml > crds.yaml` on a cluster with all of
them, then TUNEYARD_CRDS=crds.yaml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s.manifests import one
from tests.k8s.test_manifests import CUSTOM


def closed(schema: Any) -> Any:
    """A schema of a CRD under which an unknown field is an error, as `kubectl apply` has it."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        done.pop("type", None)
    described = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if described and not schema.get("x-kubernetes-preserve-unknown-fields"):
        done.setdefault("additionalProperties", False)
    return done


def faults(crds: list[dict], item: dict) -> list[str]:
    """Why a CRD of this list refuses an object; that none knows its kind is a fault too."""
    group, version = item["apiVersion"].split("/")
    for crd in crds:
        spec = crd["spec"]
        if (spec["group"], spec["names"]["kind"]) == (group, item["kind"]):
            for served in spec["versions"]:
                if served["name"] == version and served["served"]:
                    schema = closed(served["schema"]["openAPIV3Schema"])
                    # What every object has stands in no CRD.
                    for name in ("apiVersion", "kind", "metadata"):
                        schema.setdefault("properties", {})[name] = {}
                    found = jsonschema.Draft202012Validator(schema).iter_errors(item)
                    return [f"{error.json_path}: {error.message}" for error in found]
            return [f"{item['apiVersion']} of {item['kind']} is not served"]
    return [f"no CRD for {item['kind']} of {group}"]


@pytest.fixture(scope="module")
def crds() -> list[dict]:
    path = os.environ.get("TUNEYARD_CRDS")
    if not path:
        pytest.skip("TUNEYARD_CRDS names no file of CustomResourceDefinitions (see this module)")
    found = []
    for document in yaml.safe_load_all(Path(path).read_text()):
        found += document["items"] if document["kind"].endswith("List") else [document]
    return found


def test_custom_objects_are_valid(objects, crds) -> None:
    custom = [item for item in objects if item["kind"] in CUSTOM]
    assert custom
    refused = {f"{i['kind']} {i['metadata']['name']}": faults(crds, i) for i in custom}
    assert {name: found for name, found in refused.items() if found} == {}


CRD = {
    "spec": {
        "group": "example.com",
        "names": {"kind": "Lamp"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {
                                    "watts": {"type": "integer", "minimum": 1},
                                    "port": {"x-kubernetes-int-or-string": True, "type": "string"},
                                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                                    "free": {
                                        "type": "object",
                                        "properties": {},
                                        "x-kubernetes-preserve-unknown-fields": True,
                                    },
                                },
                            }
                        },
                    }
                },
            }
        ],
    }
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": {"watts": 5, "port": 80, "labels": {"a": "b"}, "free": {"any": 1}}}, ""),
        ({"spec": {"wats": 5}}, "'wats' was unexpected"),
        ({"spec": {"watts": 0}}, "less than the minimum"),
        ({"spec": {"labels": {"a": 1}}}, "not of type 'string'"),
        ({}, "'spec' is a required property"),
        ({"apiVersion": "example.com/v2", "spec": {}}, "not served"),
        ({"kind": "Bulb", "spec": {}}, "no CRD for Bulb"),
    ],
)
def test_an_object_is_held_against_its_definition(changes, said) -> None:
    item = {"apiVersion": "example.com/v1", "kind": "Lamp", "metadata": {"name": "x"}} | changes
    found = faults([CRD], item)
    assert (said in found[0]) if said else (found == [])


def test_the_training_runtime_is_one_that_trainer_knows(objects) -> None:
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    runtime = one(objects, "TrainingRuntime", "tuneyard-torch")

    def read(item: dict) -> dict:
        parsed = TrainerV1alpha1TrainingRuntime.from_dict(item)
        assert parsed is not None
        return parsed.to_dict()

    # The SDK's classes drop what they do not know: nothing may be lost on the way through.
    assert read(runtime)["spec"] == runtime["spec"]
    runtime["spec"]["mlPolicy"]["torch"]["procPerNode"] = 2
    assert read(runtime)["spec"] != runtime["spec"]

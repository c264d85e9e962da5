"""Reading rendered manifests."""

from __future__ import annotations

from collections.abc import Iterator


def pods_of(objects: list[dict]) -> Iterator[tuple[str, dict, dict]]:
    """What each workload starts: its name, the PodSpec, the pod's metadata."""
    for item in objects:
        name = f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
            template = item["spec"]["template"]
        elif item["kind"] == "CronJob":
            template = item["spec"]["jobTemplate"]["spec"]["template"]
        elif item["kind"] == "InferenceService":
            predictor = item["spec"]["predictor"]
            template = {"spec": predictor, "metadata": {"labels": predictor["labels"]}}
        elif item["kind"] == "TrainingRuntime":
            job = item["spec"]["template"]["spec"]["replicatedJobs"][0]
            template = job["template"]["spec"]["template"]
        else:
            continue
        yield name, template["spec"], template.get("metadata", {})


def one(objects: list[dict], kind: str, name: str) -> dict:
    """The object of this kind and name."""
    found = [item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]

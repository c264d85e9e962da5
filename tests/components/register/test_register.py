from __future__ import annotations

import json
import subprocess

import pytest

from components.register import identity
from components.register.config import RegisterConfig
from components.register.register import register
from components.shared import digest, ledger, registry, tracking
from components.shared.errors import StageStopped, TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context
from components.shared.store import Store
from tests.rivals import rivals

NAME = "sft_legal"
TEST_SET = digest.of_value("test set")


def made_by(stage, **inputs):
    return {
        "stage": stage,
        "key": f"key of {stage}",
        "code": f"code of {stage}",
        "settings": {},
        "inputs": inputs,
    }


def artifact(store, folder, kind, made):
    """Only the manifest goes to the store: register reads no bytes from there."""
    manifest = Manifest(kind, describe(folder), {}, made)
    key = store.key(f"manifests/{manifest.digest}.json")
    store.client.put_object(Bucket=store.bucket, Key=key, Body=manifest.to_json().encode())
    return Artifact(manifest, folder)


def a_model(store, folder, weights="w", mlflow_run="", task="causal-lm"):
    """A model folder made by train from a train set made by split from examples made by ingest."""
    corpus = made_by("ingest") | {"settings": {"source": "s3://corpora/legal"}}
    digests = {}
    for name, made in (("examples", corpus), ("train", None), ("eval", None)):
        (folder / name).mkdir(parents=True)
        (folder / name / "examples.jsonl").write_text(name)
        made = made or made_by("split", examples=digests["examples"])
        digests[name] = artifact(store, folder / name, "dataset", made).manifest.digest
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_text(weights)
    ModelCard(
        task=task,
        layout="peft",
        base_model=BaseModelRef(uri="s3://models/gemma-3-270m", fingerprint="f" * 64),
        max_length_tokens=512,
        trainable_weights=1,
        total_weights=2,
        mlflow_run=mlflow_run,
    ).write(folder / "model")
    return artifact(
        store, folder / "model", "model", made_by("train", train=digests["train"], eval=digests["eval"])
    )


def an_evaluation(store, folder, model, test=TEST_SET, passed=True, **metrics):
    """evaluation.json as the evaluate stage writes it."""
    (folder / "evaluation").mkdir(parents=True)
    document = {
        "test": {"count": 9, "digest": test},
        "model": {"model": model.manifest.digest},
        "systems": {"base": {"loss": 2.9}, "tuned": {"about": "x", "intervals": {"loss": [1, 2]}, **metrics}},
        "verdict": {
            "passed": passed,
            "system": "tuned",
            "gates": [{"metric": "rouge_l", "value": 0.1, "min": 0.2, "max": None, "passed": passed}],
        },
        "answered": 9,
        "max_new_tokens": 64,
        "truncated": {"left_out": []},
    }
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(document))
    return artifact(
        store, folder / "evaluation", "report", made_by("evaluate", model=model.manifest.digest, test=test)
    )


def run_register(store, folder, model, evaluation, run="run-1", **config):
    context = Context(run, NAME, "register", "key", store, folder / "out", folder)
    result = register(RegisterConfig(**config), {"model": model, "evaluation": evaluation}, context)
    written = json.loads((folder / "out" / "registration" / "registration.json").read_text())
    assert result.summary == written and result.kinds == {"registration": "report"}
    return written


def accepted(
    store, folder, weights="w", run="run-1", mlflow_run="", test=TEST_SET, task="causal-lm", **metrics
):
    """Register a model with these metrics; returns registration.json."""
    model = a_model(store, folder, weights, mlflow_run, task)
    return run_register(store, folder, model, an_evaluation(store, folder, model, test, **metrics), run)


def test_the_first_accepted_model_becomes_champion_with_all_that_made_it(mlflow_store, tmp_path):
    run = tracking.start_run(NAME, "train", {}, {})
    made = accepted(mlflow_store, tmp_path / "a", mlflow_run=run, loss=2.5, rouge_l=0.3)
    version = registry.champion(NAME)
    assert (made["name"], made["version"], made["aliases"]) == (NAME, 1, ["candidate", "champion"])
    assert made["champion"] and made["why"] == "there was no champion" and made["previous_champion"] is None
    assert version.digest == made["digest"] and version.manifest_uri == made["manifest"]
    assert mlflow_store.read_manifest(made["manifest"]).digest == made["digest"]
    assert version.metrics == {"loss": 2.5, "rouge_l": 0.3}
    tags = version.tags
    assert tags["digest.shipped"] == made["digest"] and tags["digest.test"] == TEST_SET
    assert {tags[f"code.{stage}"] for stage in ("ingest", "split", "train", "evaluate")} == {
        f"code of {stage}" for stage in ("ingest", "split", "train", "evaluate")
    }
    assert len({tags["digest.examples"], tags["digest.train"], tags["digest.eval"]}) == 3
    assert tags["source"] == "s3://corpora/legal" and tags["base_model.fingerprint"] == "f" * 64
    assert (tags["pipeline"], tags["run"], tags["verdict"]) == (NAME, "run-1", "passed")
    from components.shared import mlflow_database

    assert mlflow_database.client().get_model_version(NAME, "1").run_id == run
    entries = ledger.verify(NAME, mlflow_store)
    assert [(e.action, e.version, e.digest) for e in entries] == [
        ("register", 1, made["digest"]),
        ("promote", 1, made["digest"]),
    ]
    assert entries[0].evidence["metrics"] == version.metrics and "run run-1" in entries[0].who


def test_only_a_model_that_is_not_worse_takes_over(mlflow_store, tmp_path):
    accepted(mlflow_store, tmp_path / "1", "one", loss=2.5)
    worse = accepted(mlflow_store, tmp_path / "2", "two", loss=2.6)
    assert worse["aliases"] == ["candidate"] and not worse["champion"] and worse["previous_champion"] == 1
    assert "worse than champion version 1: loss 2.6, needed <= 2.5" in worse["why"]
    assert registry.aliases(NAME) == {"candidate": 2, "champion": 1}
    equal = accepted(mlflow_store, tmp_path / "3", "three", loss=2.5)
    assert equal["champion"] and registry.aliases(NAME) == {"candidate": 3, "champion": 3}
    assert equal["compare"]["champion"] == equal["compare"]["candidate"] == 2.5


def test_the_same_model_gets_a_new_version_and_stays_champion_under_it(mlflow_store, tmp_path):
    first = accepted(mlflow_store, tmp_path / "1", loss=2.5)
    again = accepted(mlflow_store, tmp_path / "2", loss=2.5, test=digest.of_value("grown"))
    assert again["digest"] == first["digest"] and again["version"] == 2 and again["champion"]
    assert registry.aliases(NAME) == {"candidate": 2, "champion": 2}


def test_a_better_number_on_another_test_set_waits_for_a_person(mlflow_store, tmp_path):
    accepted(mlflow_store, tmp_path / "1", "one", loss=2.5)
    made = accepted(mlflow_store, tmp_path / "2", "two", loss=1.0, test=digest.of_value("grown"))
    assert not made["champion"] and made["compare"]["comparable"] is False
    assert "judged on another test set" in made["why"] and "may promote version 2" in made["why"]
    assert registry.aliases(NAME) == {"candidate": 2, "champion": 1}


def test_classifiers_are_compared_by_accuracy(mlflow_store, tmp_path):
    accepted(mlflow_store, tmp_path / "1", "one", task="classification", accuracy=0.97, loss=0.1)
    assert not accepted(mlflow_store, tmp_path / "2", "two", task="classification", accuracy=0.96, loss=0.05)[
        "champion"
    ]
    assert accepted(mlflow_store, tmp_path / "3", "three", task="classification", accuracy=0.98, loss=0.2)[
        "champion"
    ]


def test_a_failed_verdict_is_refused_and_leaves_nothing(mlflow_store, tmp_path):
    model = a_model(mlflow_store, tmp_path / "a")
    evaluation = an_evaluation(mlflow_store, tmp_path / "a", model, passed=False, loss=2.5)
    with pytest.raises(StageStopped, match=r"verdict failed \(rouge_l\)"):
        run_register(mlflow_store, tmp_path / "a", model, evaluation)
    assert registry.versions(NAME) == [] and ledger.read(NAME, mlflow_store) == []


def test_an_evaluation_of_another_model_is_refused(mlflow_store, tmp_path):
    judged = a_model(mlflow_store, tmp_path / "a", "judged")
    evaluation = an_evaluation(mlflow_store, tmp_path / "a", judged, loss=2.5)
    other = a_model(mlflow_store, tmp_path / "b", "other")
    with pytest.raises(TuneyardError, match="the evaluation judged model"):
        run_register(mlflow_store, tmp_path / "b", other, evaluation)
    assert registry.versions(NAME) == []


def test_a_metric_that_was_not_measured_is_named_before_anything_is_written(mlflow_store, tmp_path):
    model = a_model(mlflow_store, tmp_path / "a")
    evaluation = an_evaluation(mlflow_store, tmp_path / "a", model, loss=2.5)
    with pytest.raises(TuneyardError, match=r"compare_by is 'auc'.*\n.*it has: loss"):
        run_register(mlflow_store, tmp_path / "a", model, evaluation, compare_by="auc")
    assert registry.versions(NAME) == []


def test_a_database_made_anew_beside_an_old_ledger_is_refused(
    mlflow_store, tmp_path, tmp_path_factory, monkeypatch
):
    accepted(mlflow_store, tmp_path / "1", loss=2.5)
    template = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    (tmp_path / "anew.db").write_bytes(template.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'anew.db'}")
    with pytest.raises(TuneyardError, match="gave sft_legal the version 1, which the ledger has since"):
        accepted(mlflow_store, tmp_path / "2", "two", loss=2.4)


def test_a_better_model_promoted_in_between_is_not_replaced(mlflow_store, tmp_path, monkeypatch):
    """We beat the champion that we saw, 2.5, but lose the write to a rival with 2.0 and must see it."""
    first = accepted(mlflow_store, tmp_path / "1", "one", loss=2.5)
    write = Store.write_json
    rivals = []

    def rival_first(self, name, document, once=False):
        if document.get("action") == "promote" and not rivals:
            rivals.append(name)
            evidence = document["evidence"] | {"metrics": {"loss": 2.0}}
            change = ledger.Change("promote", 1, first["digest"], "rival", "first", evidence)
            ledger.append(NAME, self, lambda _: change)
        return write(self, name, document, once)

    monkeypatch.setattr(Store, "write_json", rival_first)
    made = accepted(mlflow_store, tmp_path / "2", "two", loss=2.4)
    assert rivals and not made["champion"] and made["compare"]["champion"] == 2.0
    assert registry.aliases(NAME) == {"candidate": 2, "champion": 1}


def test_of_eight_that_register_at_once_the_best_is_champion(mlflow_store, tmp_path):
    """Whatever the order: each compares with the champion that its write really follows."""
    losses = [2.7, 2.3, 2.9, 2.1, 2.5, 2.2, 2.8, 2.4]

    def one(number, loss):
        store = Store(mlflow_store.root, tmp_path / f"cache-{number}")  # own connections after the fork
        accepted(store, tmp_path / f"run-{number}", f"weights {number}", run=f"run-{number}", loss=loss)

    assert rivals(one, enumerate(losses)) == [0] * 8
    entries = ledger.verify(NAME, mlflow_store)
    champion = registry.champion(NAME)
    assert champion.metrics["loss"] == min(losses)
    assert champion.version == ledger.champion(entries)
    assert sorted(e.version for e in entries if e.action == "register") == list(range(1, 9))
    # Champions only ever got better.
    promoted = [e.evidence["metrics"]["loss"] for e in entries if e.action == "promote"]
    assert promoted == sorted(promoted, reverse=True)


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_checkout_is_recorded_with_its_dirt(tmp_path):
    folder = tmp_path.resolve()
    assert identity.git_state(folder) == {}
    git(folder, "init", "-q")
    assert identity.git_state(folder) == {}, "no commit yet"
    (folder / "a").write_text("a")
    git(folder, "add", "a")
    git(folder, "commit", "-qm", "a")
    clean = identity.git_state(folder)
    assert clean == {"git.commit": git(folder, "rev-parse", "HEAD"), "git.dirty": "false"}
    (folder / "a").write_text("b")
    assert identity.git_state(folder) == clean | {"git.dirty": "true"}
    (folder / "inner").mkdir()
    assert identity.git_state(folder / "inner") == {}, "unpacked inside somebody else's repository"


def test_a_lineage_ends_where_a_manifest_was_cleaned_away(store_env, mlflow_store, tmp_path):
    model = a_model(mlflow_store, tmp_path / "a")
    examples = mlflow_store.read_manifest(
        f"{mlflow_store.root}/manifests/{model.manifest.made_by['inputs']['train']}.json"
    ).made_by["inputs"]["examples"]
    mlflow_store.client.delete_object(
        Bucket=mlflow_store.bucket, Key=mlflow_store.key(f"manifests/{examples}.json")
    )
    stages = identity.lineage({"shipped": model.manifest}, mlflow_store)
    assert sorted(stages) == ["split", "train"]
    assert identity.tags(stages)["digest.examples"] == examples

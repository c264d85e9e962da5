from __future__ import annotations

import json
import sqlite3

import pytest
from pydantic import ValidationError

from components.register.config import RegisterConfig
from components.shared import mlflow_database, registry
from components.shared.errors import TuneyardError
from tests.rivals import rivals

DIGESTS = ["a" * 64, "b" * 64, "c" * 64]


def uri(digest):
    return f"s3://tuneyard/manifests/{digest}.json"


def add(name="legal", digest=DIGESTS[0], **tags):
    return registry.register_version(name, uri(digest), "", tags)


def test_every_call_adds_a_version_even_for_the_same_model(mlflow_store):
    first, second = add(metrics=json.dumps({"loss": 2.5}), verdict="passed"), add()
    assert (first.version, second.version) == (1, 2)
    assert first.manifest_uri == uri(DIGESTS[0]) and first.digest == DIGESTS[0]
    assert first.metrics == {"loss": 2.5} and first.tags["verdict"] == "passed"
    assert second.metrics == {}
    assert [v.version for v in registry.versions("legal")] == [1, 2]


def test_aliases_move_in_one_step_and_are_listed(mlflow_store):
    for digest in DIGESTS:
        add(digest=digest)
    assert registry.champion("legal") is None
    registry.set_alias("legal", "champion", 1)
    registry.set_alias("legal", "candidate", 3)
    registry.set_alias("legal", "champion", 3)
    champion = registry.champion("legal")
    assert champion is not None and champion.version == 3 and champion.digest == DIGESTS[2]
    assert champion.aliases == ["candidate", "champion"]
    assert registry.get("legal", "candidate") == registry.get("legal", 3) == champion
    assert [v.aliases for v in registry.versions("legal")] == [[], [], ["candidate", "champion"]]
    registry.delete_alias("legal", "champion")
    registry.delete_alias("legal", "champion")
    assert registry.aliases("legal") == {"candidate": 3}


@pytest.mark.parametrize("wanted", [7, "champion", "nobody"])
def test_what_is_not_there_is_said_with_what_is(mlflow_store, wanted):
    add()
    with pytest.raises(TuneyardError, match=rf"no version or alias {wanted!r}; it has versions \[1\]"):
        registry.get("legal", wanted)


def test_an_unknown_model_has_nothing(mlflow_store):
    assert registry.versions("nobody") == [] and registry.champion("nobody") is None
    with pytest.raises(TuneyardError, match=r"has no version or alias 'champion'; it has versions \[\]"):
        registry.get("nobody", "champion")
    with pytest.raises(TuneyardError, match="pointing champion of nobody"):
        registry.set_alias("nobody", "champion", 1)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", "../x", "é", "x" * 101, "a\n"])
def test_names_that_would_not_fit_everywhere_are_refused(mlflow_store, name):
    with pytest.raises(TuneyardError, match="cannot name a registered model"):
        add(name)
    with pytest.raises(ValidationError, match="should match pattern"):
        RegisterConfig(name=name)


def test_the_longest_name_passes_in_a_pipeline_file_and_in_the_registry():
    assert registry.check_name("x" * 100) == RegisterConfig(name="x" * 100).name


def test_processes_that_register_at_once_get_a_version_each(mlflow_store):
    assert rivals(add, [()] * 4) == [0] * 4
    assert [v.version for v in registry.versions("legal")] == list(range(1, 5))


def test_a_database_that_stays_locked_is_one_clear_error(mlflow_store, tmp_path, monkeypatch):
    """The writer here never lets go; without SQLite's 20 s of waiting, since a test cannot wait for them."""
    add()
    monkeypatch.setattr(mlflow_database, "_ATTEMPTS", 2)
    calls = []

    def impatient():
        calls.append(1)
        from mlflow.exceptions import MlflowException

        with sqlite3.connect(tmp_path / "mlflow.db", timeout=0) as rival:
            try:
                rival.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise MlflowException(str(error)) from error

    with sqlite3.connect(tmp_path / "mlflow.db") as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(TuneyardError, match="database is locked"):
            mlflow_database.attempt("writing", impatient)
    assert len(calls) == 2
    mlflow_database.attempt("writing", impatient)


def test_what_a_rival_caused_is_tried_again_and_nothing_else(mlflow_store):
    from mlflow.exceptions import MlflowException

    raised = [MlflowException("Model Version creation error (name=x). Giving up after 3 attempts.")]

    def once():
        if raised:
            raise raised.pop()
        return "made"

    assert mlflow_database.attempt("adding", once) == "made"
    calls = []

    def never():
        calls.append(1)
        raise MlflowException("no such thing")

    with pytest.raises(TuneyardError, match="adding failed: no such thing"):
        mlflow_database.attempt("adding", never)
    assert len(calls) == 1


def test_no_error_of_the_database_gets_through_as_it_is(mlflow_store, tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("DROP TABLE registered_model_aliases")
    with pytest.raises(TuneyardError, match="no such table"):
        add()
        registry.aliases("legal")

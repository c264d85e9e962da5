from __future__ import annotations

import copy
import itertools
import json
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.shared import digest, ledger, registry
from components.shared.errors import TuneyardError
from components.shared.ledger import Change
from components.shared.store import Store
from tests.rivals import FORK, rivals

NAME = "legal"


def model(version):
    return digest.of_value(version)


def change(action, version, **evidence):
    return Change(action, version, model(version), "someone", "because", evidence)


def add_version(store):
    """A version in MLflow and its entry in the ledger; no alias yet."""
    version = len(registry.versions(NAME)) + 1
    made = registry.register_version(NAME, f"s3://tuneyard/manifests/{model(version)}.json", "", {})
    ledger.append(NAME, store, lambda entries: change("register", made.version, loss=2.5 / made.version))
    return made.version


def promote(store, version):
    return ledger.change(NAME, store, lambda entries: change("promote", version))


@pytest.fixture
def three(mlflow_store):
    """Versions 1 to 3 registered, 1 and then 2 promoted: five entries."""
    for _ in range(3):
        add_version(mlflow_store)
    ledger.append(NAME, mlflow_store, lambda entries: change("promote", 1))
    promote(mlflow_store, 2)
    return mlflow_store


def test_entries_are_numbered_chained_and_read_back(three):
    entries = ledger.verify(NAME, three)
    assert [(e.number, e.action, e.version) for e in entries] == [
        (1, "register", 1),
        (2, "register", 2),
        (3, "register", 3),
        (4, "promote", 1),
        (5, "promote", 2),
    ]
    assert [e.previous_hash for e in entries] == [ledger.GENESIS, *(e.hash for e in entries[:-1])]
    assert [e.previous_champion for e in entries] == [None, None, None, None, 1]
    assert entries[0].evidence == {"loss": 2.5} and entries[0].at.endswith("+00:00")
    assert ledger.champion(entries) == 2 and ledger.candidate(entries) == 3
    assert registry.aliases(NAME) == {"champion": 2, "candidate": 3}
    # A person can read it.
    body = three.client.get_object(Bucket=three.bucket, Key=three.key(f"ledger/{NAME}/00000005.json"))[
        "Body"
    ].read()
    assert json.loads(body)["why"] == "because" and body.count(b"\n") >= 10
    # What lies beside it is no entry.
    three.write_json(f"ledger/{NAME}/00000002.json.bak", {})
    three.write_json(f"ledger/{NAME}-2/00000001.json", {})
    assert ledger.read(NAME, three) == entries


def places(document, path=()):
    """Every leaf of a JSON value."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def flipped(value):
    if isinstance(value, int | float):
        return value + 1
    return 1 if value is None else ("x" if value[:1] != "x" else "y") + value[1:]


def spoilt(store, number, body):
    """Put other bytes in an entry's place (None: remove it); see what `verify` says; put it back.

    Returns the error's text.
    """
    key = store.key(f"ledger/{NAME}/{number:08d}.json")
    whole = store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read()
    if body is None:
        store.client.delete_object(Bucket=store.bucket, Key=key)
    else:
        store.client.put_object(Bucket=store.bucket, Key=key, Body=body)
    with pytest.raises(TuneyardError) as caught:
        ledger.verify(NAME, store)
    store.client.put_object(Bucket=store.bucket, Key=key, Body=whole)
    return caught.value.what


@pytest.mark.parametrize("number", [1, 5])
def test_any_changed_field_is_named_with_its_entry(three, number):
    """Every leaf of the first and of the last document, one after the other."""
    whole = three.read_json(f"ledger/{NAME}/{number:08d}.json")
    paths = list(places(whole))
    assert len(paths) >= 10
    for path in paths:
        bad = copy.deepcopy(whole)
        inner = bad
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = flipped(inner[path[-1]])
        assert f"{number:08d}.json" in spoilt(three, number, json.dumps(bad).encode()), path
    assert len(ledger.verify(NAME, three)) == 5


def test_changed_removed_and_foreign_entries_are_named(three):
    for number in (1, 3, 5):
        assert f"{number:08d}.json" in spoilt(three, number, None)
        # With its own hash made right, the next entry no longer follows; for the last it is MLflow's note.
        bad = three.read_json(f"ledger/{NAME}/{number:08d}.json") | {"why": "another reason"}
        bad["hash"] = ledger._hash(bad)
        assert f"{min(number + 1, 5):08d}.json" in spoilt(three, number, json.dumps(bad).encode())
        # The next one in its place.
        other = three.read_json(f"ledger/{NAME}/{number % 5 + 1:08d}.json")
        assert f"{number:08d}.json" in spoilt(three, number, json.dumps(other).encode())
        for body in (b"", b"{}", b"[]", b'{"number": 1', b"\xff\xfe", b"null"):
            assert f"{number:08d}.json" in spoilt(three, number, body), body
    assert len(ledger.verify(NAME, three)) == 5


def test_a_broken_ledger_stops_promotions(three):
    """The last entry is gone: a new one would take its number and hide that."""
    three.client.delete_object(Bucket=three.bucket, Key=three.key(f"ledger/{NAME}/00000005.json"))
    with pytest.raises(TuneyardError, match=r"00000005.json is not what MLflow noted"):
        promote(three, 3)
    with pytest.raises(TuneyardError, match=r"00000005.json"):
        ledger.reconcile(NAME, three)
    assert registry.aliases(NAME)["champion"] == 2 and len(ledger.read(NAME, three)) == 4


def test_the_loser_reads_again_and_decides_again(three):
    """A rival writes entry 6 after we have read five and before we write."""
    seen = []

    def decide(entries):
        seen.append(len(entries))
        if len(seen) == 1:
            ledger.append(NAME, three, lambda _: change("promote", 3))
        return None if ledger.champion(entries) == 3 else change("promote", 1)

    assert ledger.append(NAME, three, decide) is None
    assert seen == [5, 6]
    assert ledger.champion(ledger.read(NAME, three)) == 3


def test_a_write_whose_answer_was_lost_counts_once(three, monkeypatch):
    """The S3 client repeats such a request and gets `412 exists` for what it wrote itself."""
    write = type(three).write_json

    def lossy(self, name, document, once=False):
        assert write(self, name, document, once)
        return False

    monkeypatch.setattr(type(three), "write_json", lossy)
    entry = ledger.append(NAME, three, lambda entries: change("promote", 3))
    assert entry is not None and entry.number == 6
    assert len(ledger.read(NAME, three)) == 6


def _promote_often(store, version, times):
    own = Store(store.root, store.cache)  # a forked process must not share the parent's connections
    for _ in range(times):
        promote(own, version)


def test_rivals_without_a_common_lock_agree_too(mlflow_store, tmp_path):
    """Two machines share no lock: the conditional write alone decides, and the aliases follow."""
    for _ in range(4):
        add_version(mlflow_store)

    def elsewhere(version):
        os.environ["TUNEYARD_HOME"] = str(tmp_path / f"home-{version}")
        _promote_often(mlflow_store, version, 3)

    assert rivals(elsewhere, [(version,) for version in range(1, 5)]) == [0] * 4
    entries = ledger.verify(NAME, mlflow_store)
    assert len(entries) == 4 + 12
    assert registry.aliases(NAME) == {"champion": entries[-1].version, "candidate": 4}
    # Each entry names the champion that the one before it made.
    assert all(e.previous_champion == b.version for b, e in itertools.pairwise(entries[4:]))


def test_a_kill_between_ledger_and_alias_leaves_the_old_champion_until_reconciled(three, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", die)
        process = FORK.Process(target=_promote_often, args=(three, 3, 1), daemon=True)
        process.start()
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert ledger.champion(ledger.verify(NAME, three)) == 3
    assert registry.aliases(NAME)["champion"] == 2
    assert ledger.reconcile(NAME, three) == {"champion": 3, "candidate": 3}
    assert registry.aliases(NAME) == {"champion": 3, "candidate": 3}


def test_aliases_set_past_the_ledger_are_put_right(three):
    registry.set_alias(NAME, "champion", 3)
    registry.delete_alias(NAME, "candidate")
    ledger.reconcile(NAME, three)
    assert registry.aliases(NAME) == {"champion": 2, "candidate": 3}


def test_a_champion_that_the_ledger_does_not_know_is_removed(mlflow_store):
    add_version(mlflow_store)
    registry.set_alias(NAME, "champion", 1)
    ledger.reconcile(NAME, mlflow_store)
    assert registry.aliases(NAME) == {"candidate": 1}


def test_a_version_of_another_database_gets_no_alias(three, monkeypatch, tmp_path_factory, tmp_path):
    """The database was lost and made anew: version 2 there is another model than in the ledger."""
    template = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    (tmp_path / "other.db").write_bytes(template.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    for _ in range(3):
        registry.register_version(NAME, f"s3://tuneyard/manifests/{'f' * 64}.json", "", {})
    with pytest.raises(TuneyardError, match="not the MLflow database"):
        ledger.reconcile(NAME, three)
    assert registry.aliases(NAME) == {}


def test_bytes_that_are_no_text_do_not_break_an_entry(three):
    ledger.append(
        NAME, three, lambda e: Change("promote", 3, model(3), "J\udce9r\u00f4me", "\udcff", {"n": (1, 2)})
    )
    entry = ledger.read(NAME, three)[-1]
    assert entry.who == "J?r\u00f4me" and entry.evidence == {"n": [1, 2]}


def rolled_back(standing, models):
    """The champions that stand after a rollback: those above the last one with other bytes are gone."""
    others = [i for i, version in enumerate(standing) if models[version] != models[standing[-1]]]
    return standing[: others[-1] + 1] if others else standing


def replayed(moves, models):
    """Entries as `append` would write them, without a store, and the champions that stand, newest last.

    Args:
        moves: versions to promote; None rolls back.
        models: digest of each version.
    """
    entries, standing = [], []
    for move in moves:
        if move is not None:
            standing = [*standing, move]
            entries.append(ledger._sealed(Change("promote", move, models[move], "", "", {}), entries))
            continue
        target = ledger.rollback_target(entries)
        after = rolled_back(standing, models)
        assert (target.version if target else None) == (after[-1] if after != standing else None)
        if target is not None:
            standing = after
            change = Change("rollback", target.version, target.digest, "", "", {})
            entries.append(ledger._sealed(change, entries))
    return entries, standing


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=20),
    st.lists(st.sampled_from("xyz"), min_size=5, max_size=5),
)
def test_rollback_goes_to_the_last_standing_champion_with_other_bytes(moves, models):
    """The ledger is read as entries; the reference keeps the champions that stand as state."""
    entries, standing = replayed([*moves, None], models)
    assert ledger.champion(entries) == (standing[-1] if standing else None)


def test_rolling_back_step_by_step_walks_back_and_not_forth():
    models = [str(version) for version in range(5)]
    for steps, champion in enumerate([4, 2, 3, 1]):
        entries, _ = replayed([1, 3, 2, 4, *[None] * steps], models)
        assert ledger.champion(entries) == champion
    assert ledger.rollback_target(entries) is None

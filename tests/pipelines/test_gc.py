"""What goes is what nothing wants, and whoever wants something meanwhile has it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import uuid
from dataclasses import asdict, dataclass, field, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from components.shared import cache, ledger, transfer, uses
from components.shared.errors import TuneyardError, UsageError
from components.shared.ledger import Change
from components.shared.manifest import describe
from components.shared.store import Store
from pipelines import cli, gc, holds, reach

OLD = 100.0


@dataclass
class Made:
    """An artifact of a random store: the shared files that it has, what it was made from, ages in days."""

    shared: set[int]
    inputs: set[int]
    manifest_age: float
    use_age: float
    commit_age: float | None


@dataclass
class World:
    made: list[Made]
    ledger: list[tuple[int, bool]] = field(default_factory=list)  # artifact, promoted at once
    deployed: int | None = None
    deployed_before: int | None = None
    held: set[int] = field(default_factory=set)
    once_held: set[int] = field(default_factory=set)
    aliased: set[int] = field(default_factory=set)  # by hand, in MLflow
    runs: list[tuple[float, set[int]]] = field(default_factory=list)
    young_file: int | None = None
    keep_days: float = 30.0


# Why an artifact stays, each for itself; two of these are no reason.
REASONS = (
    "nothing",
    "once held",
    "young manifest",
    "used lately",
    "young commit",
    "young run",
    "deployed",
    "deployed before",
    "held",
    "alias in MLflow",
)


def world_of(reasons, inputs, shared, registered, young_file, keep_days) -> World:
    """A world where artifact n stays for `reasons[n]`, or for what it is an input of."""
    count = len(reasons)

    def having(reason):
        return [n for n in range(count) if reasons[n] == reason]

    made = [
        Made(
            shared[n],
            {i for i in inputs[n] if i < n},
            0.5 if reasons[n] == "young manifest" else [OLD, 10.0][n % 2],
            0.5 if reasons[n] == "used lately" else OLD,
            0.5 if reasons[n] == "young commit" else [OLD, None, 10.0][n % 3],
        )
        for n in range(count)
    ]
    return World(
        made,
        [(n, promoted) for n, promoted in registered if n < count],
        next(iter(having("deployed")), None),
        next(iter(having("deployed before")), None),
        {*having("held")},
        {*having("once held")},
        {*having("alias in MLflow")},
        [(0.5, {n}) for n in having("young run")] + [(10.0, set()), (OLD, {0})],
        young_file,
        keep_days,
    )


@st.composite
def worlds(draw):
    count = draw(st.integers(1, 7))
    indices = st.integers(0, count - 1)

    def each(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    return world_of(
        each(st.sampled_from(REASONS)),
        each(st.sets(indices, max_size=1)),
        each(st.sets(st.integers(0, 2), max_size=1)),
        draw(st.lists(st.tuples(indices, st.booleans()), max_size=4)),
        draw(st.none() | st.integers(0, 2)),
        draw(st.sampled_from([0.0, 30.0])),
    )


def every_reason(keep_days) -> World:
    """Each reason once, for one artifact each; besides a candidate, a champion and the champion before."""
    reasons = ["nothing", *REASONS, "nothing", "nothing", "nothing"]
    count = len(reasons)
    inputs = [{1} if n == count - 1 else {2} if n == 3 else set() for n in range(count)]
    registered = [(count - 4, False), (count - 3, True), (count - 2, True), (count - 1, False)]
    return world_of(reasons, inputs, [{n % 3} for n in range(count)], registered, 1, keep_days)


def key_of(number: int) -> str:
    return hashlib.sha256(f"key {number}".encode()).hexdigest()


@dataclass
class Built:
    store: Store
    manifests: list
    ages: dict[str, float]
    entries: list


def build(world: World, store: Store, folder) -> Built:
    """Write a world into an empty store."""
    manifests, ages = [], {}
    for number, made in enumerate(world.made):
        tree = folder / f"tree-{number}"
        tree.mkdir(parents=True)
        (tree / "own.txt").write_text(f"own {number}")
        for shared in made.shared:
            (tree / f"shared-{shared}.txt").write_text(f"shared {shared}")
        made_by = {
            "stage": "train",
            "key": key_of(number),
            "code": "0" * 64,
            "settings": {},
            "inputs": {f"in-{i}": manifests[i].digest for i in made.inputs},
        }
        manifest = store.put_tree(tree, "model", {}, made_by)
        manifests.append(manifest)
        ages[f"manifests/{manifest.digest}.json"] = made.manifest_age
        ages[f"uses/{manifest.digest}.json"] = made.use_age
        if made.commit_age is not None:
            outputs = {"out": store.manifest_uri(manifest)}
            commit = {"stage": "train", "key": key_of(number), "run": f"run-of-{number}", "outputs": outputs}
            name = f"stages/train/{key_of(number)}.json"
            store.write_json(name, commit)
            ages[name] = made.commit_age
            store.write_json(f"runs/run-of-{number}/train.json", {"status": "done"})
            store.write_json(log_of(f"run-of-{number}"), {})
    entries = build_ledger(world, store, manifests)
    build_roots(world, store, manifests, ages)
    if world.young_file is not None:
        sha256 = hashlib.sha256(f"shared {world.young_file}".encode()).hexdigest()
        ages[f"objects/{sha256[:2]}/{sha256}"] = 0.5
    return Built(store, manifests, ages, entries)


def build_ledger(world, store, manifests):
    entries: list[ledger.Entry] = []

    def write(action, version, number):
        change = Change(action, version, manifests[number].digest, "we", "a test", {})
        entry = ledger._sealed(change, entries)
        store.write_json(ledger._document("m", entry.number), asdict(entry))
        entries.append(entry)

    for version, (number, promoted) in enumerate(world.ledger, 1):
        write("register", version, number)
        if promoted:
            write("promote", version, number)
    return entries


def build_roots(world, store, manifests, ages):
    if world.deployed is not None:
        before = None
        if world.deployed_before is not None:
            before = {"version": 1, "digest": manifests[world.deployed_before].digest}
        document = {"name": "m", "digest": manifests[world.deployed].digest, "previous": before}
        store.write_json("deployments/m.json", document)
    for number in world.held:
        held = {"what": "x", "digest": manifests[number].digest, "who": "we", "why": "court", "at": "now"}
        store.write_json(f"holds/{manifests[number].digest}-0001.json", held)
    for number in world.once_held:
        held = {"what": "x", "digest": manifests[number].digest, "who": "we", "why": "court", "at": "now"}
        store.write_json(f"holds/{manifests[number].digest}-0002.json", held | {"ended": {"who": "we"}})
    for number, (age, numbers) in enumerate(world.runs):
        uris = [store.manifest_uri(manifests[n]) for n in numbers]
        store.write_json(f"runs/run-{number}/run.json", {"stages": [{"outputs": {"o": u}} for u in uris]})
        store.write_json(f"runs/run-{number}/train.json", {"status": "running"})
        store.write_json(log_of(f"run-{number}"), {})
        ages[f"runs/run-{number}/run.json"] = age


def log_of(run):
    """A part of a log: nothing leads to it but its run."""
    return f"logs/{run}/20261201T030000.000000/train/a-pod/00001.txt"


def expected(world: World, built: Built) -> set[str]:
    """What must be left, worked out from the world and not from what is in the store."""
    keep = max(world.keep_days, 1.0)
    young_runs = {n for n, (age, _) in enumerate(world.runs) if age < keep}
    aliases = set(ledger.aliases(built.entries).values())
    target = ledger.rollback_target(built.entries)
    aliases |= {target.version} if target else set()
    live = world.held | world.aliased | {world.ledger[version - 1][0] for version in aliases}
    live |= {n for run in young_runs for n in world.runs[run][1]}
    if world.deployed is not None:
        live |= {n for n in (world.deployed, world.deployed_before) if n is not None}
    for number, made in enumerate(world.made):
        commit = made.commit_age is not None and made.commit_age < keep
        if commit or made.manifest_age < 1 or made.use_age < keep:
            live.add(number)
    while more := {i for n in live for i in world.made[n].inputs} - live:
        live |= more
    names = {f"runs/run-{n}/{doc}.json" for n in young_runs for doc in ("run", "train")}
    names |= {log_of(f"run-{n}") for n in young_runs}
    for number in live:
        manifest, made = built.manifests[number], world.made[number]
        names.add(f"manifests/{manifest.digest}.json")
        names |= {f"objects/{e.sha256[:2]}/{e.sha256}" for e in manifest.files}
        if made.commit_age is not None:
            names |= {f"stages/train/{key_of(number)}.json", f"runs/run-of-{number}/train.json"}
            names.add(log_of(f"run-of-{number}"))
    for number, made in enumerate(world.made):
        if made.use_age < keep:
            names.add(f"uses/{built.manifests[number].digest}.json")
    if world.young_file is not None and any(world.young_file in made.shared for made in world.made):
        sha256 = hashlib.sha256(f"shared {world.young_file}".encode()).hexdigest()
        names.add(f"objects/{sha256[:2]}/{sha256}")
    return names


def left(store: Store) -> set[str]:
    return {name for prefix in reach.KINDS for name in store.names(prefix)}


@contextlib.contextmanager
def aged(ages, aliased=()):
    """Everything is old but what `ages` says, in days; MLflow has these aliases."""
    original = Store.listing

    def listing(self, prefix):
        days = {item.name: ages.get(item.name, OLD) for item in original(self, prefix)}
        return [replace(i, age_seconds=days[i.name] * reach.DAY_SECONDS) for i in original(self, prefix)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "listing", listing)
        patch.setattr(reach, "_mlflow_roots", lambda: list(aliased))
        yield


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(world=worlds())
@example(world=every_reason(30.0))
@example(world=every_reason(0.0))
def test_what_is_left_is_what_something_leads_to_and_all_of_it_is_readable(store_env, tmp_path, world):
    folder = tmp_path / uuid.uuid4().hex
    store = Store(f"s3://tuneyard/gc-{uuid.uuid4().hex[:12]}", folder / "cache")
    built = build(world, store, folder)
    aliases = [json.dumps(store.manifest_uri(built.manifests[n])) for n in world.aliased]
    before, wanted = left(store), expected(world, built)
    with aged(built.ages, aliases):
        seen = gc.look(store, world.keep_days)
        assert left(store) == before, "a dry run changed something"
        swept = gc.sweep(store, world.keep_days)
        assert left(store) == wanted
        assert {i.name for i in swept.removed} == {i.name for i in seen.removed} == before - wanted
        assert gc.sweep(store, world.keep_days).removed == []
    reader = Store(store.root, folder / "another-cache")
    for number, manifest in enumerate(built.manifests):
        if f"manifests/{manifest.digest}.json" in wanted:
            again = reader.read_manifest(store.manifest_uri(manifest))
            assert describe(reader.get_tree(again, folder / f"back-{number}")) == manifest.files


@pytest.fixture
def lone(store, tmp_path):
    """A store with one old artifact that nothing wants; its manifest and tree."""
    built = build(World([Made({0}, set(), OLD, OLD, OLD)]), store, tmp_path / "world")
    return store, built.manifests[0], tmp_path / "world" / "tree-0"


def sweep(store, ages=None, keep_days=30.0):
    with aged(ages or {}):
        return gc.sweep(store, keep_days)


def test_who_stores_the_same_bytes_during_a_sweep_gets_them_stored(lone, tmp_path, monkeypatch):
    """The object is there when the writer begins, and removed under its feet: without the wait it is lost."""
    store, manifest, tree = lone
    monkeypatch.setattr(uses, "_WAIT_SECONDS", 0.05)
    writer = threading.Thread(target=lambda: Store(store.root, tmp_path / "w").put_tree(tree, "model"))
    original = reach.survey

    def survey(*arguments):
        found = original(*arguments)
        writer.start()
        writer.join(0.7)
        assert writer.is_alive(), "the writer did not wait for the sweep"
        return found

    monkeypatch.setattr(reach, "survey", survey)
    assert sweep(store).removed
    writer.join(30)
    reader = Store(store.root, tmp_path / "r")
    assert describe(reader.get_tree(manifest, tmp_path / "back")) == manifest.files


def test_a_sweep_sees_who_has_begun_to_rely_on_an_artifact(lone):
    store, manifest, _ = lone
    assert store.has_tree(manifest)
    assert sweep(store, {f"uses/{manifest.digest}.json": 0.0}).removed == []
    assert store.has_tree(manifest)


def test_who_asks_during_a_sweep_is_told_what_is_there_after_it(lone, monkeypatch):
    store, manifest, _ = lone
    monkeypatch.setattr(uses, "_WAIT_SECONDS", 0.05)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(store.has_tree(manifest)))
    original = reach.survey

    def survey(*arguments):
        found = original(*arguments)
        asking.start()
        asking.join(0.5)
        return found

    monkeypatch.setattr(reach, "survey", survey)
    sweep(store)
    asking.join(30)
    assert answers == [False]


def test_two_sweeps_do_not_meet_and_a_killed_one_does_not_bar_the_next(lone, monkeypatch):
    store, _, _ = lone
    store.write_json(uses.SWEEP, {"id": "other", "machine": "elsewhere"})
    with pytest.raises(TuneyardError, match="a sweep is at work on elsewhere"):
        sweep(store)
    monkeypatch.setattr(Store, "age", lambda self, name: uses.SWEEP_ENDED_SECONDS + 1)
    assert sweep(store).removed
    assert store.read_json(uses.SWEEP) is None


def test_nobody_waits_for_a_sweep_that_was_killed(lone, monkeypatch):
    store, manifest, _ = lone
    store.write_json(uses.SWEEP, {"id": "other"})
    monkeypatch.setattr(Store, "age", lambda self, name: uses.SWEEP_ENDED_SECONDS + 1)
    monkeypatch.setattr(uses, "_LONGEST_WAIT_SECONDS", 0.0)
    assert store.has_tree(manifest)


def test_a_sweep_that_was_taken_for_ended_removes_nothing_more(lone, monkeypatch):
    store, manifest, _ = lone
    monkeypatch.setattr(gc, "_ALIVE_SECONDS", -1.0)
    original = reach.survey

    def survey(*arguments):
        found = original(*arguments)
        store.write_json(uses.SWEEP, {"id": "another"})
        return found

    monkeypatch.setattr(reach, "survey", survey)
    with pytest.raises(TuneyardError, match="may no longer go on"):
        sweep(store)
    assert f"manifests/{manifest.digest}.json" in left(store)
    assert store.read_json(uses.SWEEP) == {"id": "another"}


def test_a_killed_sweep_leaves_no_manifest_without_its_files(lone, monkeypatch):
    store, _, _ = lone
    original, batches = gc._remove, []

    def remove(store, names, alive):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(names)
        original(store, names, alive)

    monkeypatch.setattr(gc, "_remove", remove)
    with pytest.raises(KeyboardInterrupt):
        sweep(store)
    names = left(store)
    assert not any(name.startswith(("stages/", "manifests/")) for name in names)
    assert any(name.startswith("objects/") for name in names)
    monkeypatch.undo()
    sweep(store)
    assert not any(name.startswith("objects/") for name in left(store))


def test_an_object_that_cannot_be_removed_is_named(lone, monkeypatch):
    store, _, _ = lone
    answer = {"Errors": [{"Key": "objects/x", "Code": "AccessDenied", "Message": "no"}]}
    monkeypatch.setattr(store.client, "delete_objects", lambda **_: answer)
    with pytest.raises(TuneyardError, match=r"1 of 1 were not removed: objects/x \(AccessDenied: no\)"):
        sweep(store)


@pytest.mark.parametrize("name", ["objects/ab/" + "ab" * 32, "work/evaluate/k/slice-1-of-2.safetensors"])
def test_an_upload_that_nobody_finished_is_aborted_once_it_is_old(lone, monkeypatch, name):
    store, _, _ = lone
    key = store.key(name)
    remote = transfer.Remote(store.bucket, key, 6 * 2**20)
    upload_id = transfer._begin(store.client, remote)
    store.client.upload_part(
        Bucket=store.bucket,
        Key=key,
        UploadId=upload_id,
        PartNumber=1,
        Body=b"x" * 1000,
        ChecksumAlgorithm="SHA256",
    )
    assert sweep(store).uploads == [] and transfer._begun(store.client, remote)[0] == upload_id
    monkeypatch.setattr(reach, "GRACE_DAYS", -1.0)
    swept = sweep(store)
    assert [(u.key, u.size) for u in swept.uploads] == [(key, 1000)]
    assert swept.by_kind()["unfinished uploads"]["removed_bytes"] == 1000
    assert transfer._begun(store.client, remote) == ("", [])


def test_what_a_training_and_a_schedule_left_goes_by_its_age(lone):
    store, _, _ = lone
    names = [
        f"work/train/{key}/step-3/{file}"
        for key in ("old", "young")
        for file in ("state.json", "w.safetensors")
    ]
    names = [
        f"work/evaluate/{key}/slice-2-of-4.{kind}"
        for key in ("old", "young")
        for kind in ("json", "safetensors")
    ] + names
    for name in names:
        store.write_json(name, {})
    store.write_json("slots/sft_legal/20260101030000.json", {"id": "run-1"})
    sweep(store, {name: 5.0 for name in names if "young" in name})
    assert store.names("work/") == [name for name in names if "young" in name] and store.names("slots/") == []


def test_what_is_removed_leaves_the_cache_too(lone):
    store, manifest, _ = lone
    kept = [cache.path_of(store.cache, entry.sha256) for entry in manifest.files]
    assert all(path.exists() for path in kept)
    sweep(store)
    assert not any(path.exists() for path in kept)


@pytest.mark.parametrize("broken", ["ledger", "document"])
def test_nothing_is_removed_when_a_root_cannot_be_read(lone, broken):
    store, _, _ = lone
    if broken == "ledger":
        store.write_json("ledger/m/00000002.json", {})
    else:
        store.client.put_object(Bucket=store.bucket, Key=store.key("deployments/m.json"), Body=b"{cut")
    before = left(store)
    with pytest.raises(TuneyardError):
        sweep(store)
    assert left(store) == before and store.read_json(uses.SWEEP) is None


def test_what_is_not_of_our_kinds_is_left_alone(lone):
    store, _, _ = lone
    others = ["ledger/m/note.txt", "platform/probe", "elsewhere/objects/x.json"]
    for name in others:
        store.client.put_object(Bucket=store.bucket, Key=store.key(name), Body=b"{}")
    sweep(store)
    assert {*others} <= {*store.names("")}


def test_damaged_objects_are_kept_as_long_as_runs_are(lone):
    store, _, _ = lone
    for name in ("damaged/objects/aa/young", "damaged/objects/aa/old"):
        store.client.put_object(Bucket=store.bucket, Key=store.key(name), Body=b"x")
    sweep(store, {"damaged/objects/aa/young": 20.0})
    assert store.names("damaged/") == ["damaged/objects/aa/young"]


def test_an_alias_set_by_hand_in_mlflow_keeps_its_version(mlflow_store, tmp_path, monkeypatch):
    from components.shared import registry

    store = mlflow_store
    world = World([Made(set(), set(), OLD, OLD, OLD), Made(set(), set(), OLD, OLD, OLD)])
    built = build(world, store, tmp_path / "world")
    for manifest in built.manifests:
        registry.register_version("m", store.manifest_uri(manifest), "", {})
    registry.set_alias("m", "court", 1)
    roots = reach._mlflow_roots()
    with aged({}, roots):
        gc.sweep(store, 30.0)
    assert [store.has_tree(m) for m in built.manifests] == [True, False]
    assert holds.digest_of("m/1", store) == built.manifests[0].digest


# --- holds and the command ------------------------------------------------------------------------


def test_a_hold_keeps_and_its_end_lets_go_and_both_are_on_record(lone):
    store, manifest, _ = lone
    with pytest.raises(UsageError, match="needs a reason"):
        holds.add(manifest.digest, " ", "we", store)
    holds.add(store.manifest_uri(manifest), "case 12", "Li", store)
    sweep(store)
    assert f"manifests/{manifest.digest}.json" in left(store)
    (held,) = holds.standing(store)
    assert (held["who"], held["why"]) == ("Li", "case 12")
    holds.end(manifest.digest, "case closed", "Wang", store)
    assert holds.standing(store) == []
    with pytest.raises(UsageError, match="is not held"):
        holds.end(manifest.digest, "again", "Wang", store)
    (name,) = store.names("holds/")
    document = store.read_json(name)
    assert document["who"] == "Li" and document["ended"]["who"] == "Wang"
    sweep(store)
    assert f"manifests/{manifest.digest}.json" not in left(store)


def test_what_is_gone_or_unknown_cannot_be_held(lone):
    store, manifest, _ = lone
    for what in ("nonsense", "model/three", "f" * 64):
        with pytest.raises(UsageError, match=what[:10]):
            holds.add(what, "why", "we", store)
    sha256 = manifest.files[0].sha256
    store.remove(f"objects/{sha256[:2]}/{sha256}")
    with pytest.raises(TuneyardError, match=r"files of manifest .* are gone"):
        holds.add(manifest.digest, "why", "we", store)
    assert holds.standing(store) == []


def test_the_command_shows_first_and_removes_when_told(lone, monkeypatch):
    from pipelines.commands import store as commands

    store, manifest, _ = lone
    monkeypatch.setattr(commands, "nearest_store", lambda: store)
    run = CliRunner().invoke
    with aged({}):
        before = left(store)
        text = run(cli.app, ["gc"])
        assert text.exit_code == 0 and "bytes can go: tuneyard gc --delete" in text.stdout
        held = run(cli.app, ["hold", "add", manifest.digest, "--why", "audit", "--who", "Li", "--json"])
        assert json.loads(held.stdout)["who"] == "Li"
        assert "audit" in run(cli.app, ["hold", "list"]).stdout
        assert json.loads(run(cli.app, ["gc", "--json"]).stdout)["kinds"]["objects"]["removed"] == 0
        run(cli.app, ["hold", "remove", manifest.digest, "--why", "over", "--who", "Li"])
        assert before <= left(store)
        done = json.loads(run(cli.app, ["gc", "--delete", "--json"]).stdout)
        sizes = sum(entry.size for entry in manifest.files)
        assert done["deleted"] and done["kinds"]["objects"]["removed_bytes"] == sizes
        assert left(store) == set()
        assert "nothing can go" in run(cli.app, ["gc"]).stdout

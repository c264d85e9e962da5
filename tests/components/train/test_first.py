"""Domain text first, then the task: the stages of a line, leakage on the way, a kill in either phase."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from components.ingest.config import IngestConfig
from components.ingest.ingest import ingest
from components.shared import jsonl
from components.shared.errors import TuneyardError
from components.shared.examples import DOMAIN
from components.shared.manifest import Manifest
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.split.config import SplitConfig
from components.split.split import split
from components.train import checkpoint, fit, phases
from components.train import train as stage
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.opening import open_objective
from pipelines import planner, spec

# Articles of the Civil Code of the People's Republic of China, and what people ask about it.
ARTICLES = [
    "民事主体从事民事活动，应当遵循自愿原则，按照自己的意思设立、变更、终止民事法律关系。",
    "民事主体从事民事活动，应当遵循公平原则，合理确定各方的权利和义务。",
    "民事主体从事民事活动，应当遵循诚信原则，秉持诚实，恪守承诺。",
    "自然人从出生时起到死亡时止，具有民事权利能力，依法享有民事权利，承担民事义务。",
    "十八周岁以上的自然人为成年人。不满十八周岁的自然人为未成年人。",
    "成年人为完全民事行为能力人，可以独立实施民事法律行为。",
    "法人是具有民事权利能力和民事行为能力，依法独立享有民事权利和承担民事义务的组织。",
    "民事法律行为可以采用书面形式、口头形式或者其他形式。",
    "因不可抗力不能履行民事义务的，不承担民事责任。法律另有规定的，依照其规定。",
    "依法成立的合同，受法律保护。依法成立的合同，仅对当事人具有法律约束力。",
    "当事人应当按照约定全面履行自己的义务。",
    "当事人一方不履行合同义务的，应当承担继续履行、采取补救措施或者赔偿损失等违约责任。",
]


def asked(number):
    question = f"第{number}号租赁合同的承租人逾期{number + 1}个月未付租金，催告后仍不支付，能否解除合同？"
    answer = f"可以。承租人无正当理由逾期{number + 1}个月未支付租金，经催告在合理期限内仍不支付的，"
    return {"prompt": question, "completion": f"{answer}出租人可以解除{number}号合同。"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def stage_of(verb, config, inputs, folder):
    """Run a stage as `perform` does, without a store; returns (result, its outputs as artifacts)."""
    context = Context("run", "t", verb.__name__, "k" * 64, None, folder / "out", folder / "work")
    shutil.rmtree(context.out, ignore_errors=True)
    context.out.mkdir(parents=True)
    result = verb(config, inputs, context)
    made = {}
    for name, kind in result.kinds.items():
        files = sorted(p for p in (context.out / name).rglob("*") if p.is_file())
        print = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
        manifest = SimpleNamespace(digest=print, kind=kind, metadata=result.metadata.get(name, {}))
        made[name] = Artifact(manifest, context.out / name)
    return result, made


@pytest.fixture
def line(tmp_path, monkeypatch):
    """The line up to split: `line(domain rows, **split settings)` -> (result of split, its sides)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(documents, **settings):
        source = write(tmp_path / "asked.jsonl", [asked(n) for n in range(40)])
        domain = write(tmp_path / "law.jsonl", documents)
        config = IngestConfig(source=source, domain={"source": domain, "columns": {"text": "article"}})
        read, made = stage_of(ingest, config, {}, tmp_path / "ingest")
        assert read.summary["read"] == read.summary["kept"] == 40 + len(documents)
        return stage_of(split, SplitConfig(**settings), {**made, "report": None}, tmp_path / "split")

    return run


def law(count=36):
    return [{"article": f"第{n}条 {ARTICLES[n % 12]}{ARTICLES[(n * 5 + 1) % 12]}"} for n in range(count)]


def settings_for(base, **changes):
    first = changes.pop("first", {})
    if first is not None:
        first = {"source": "law.jsonl", "max_steps": 12, "max_length": 48, **first}
    defaults = {
        "objective": "sft",
        "base_model": str(base),
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "max_steps": 10,
        "learning_rate": 5e-3,
        "per_device_batch_size": 4,
        "max_length": 256,
        "eval_steps": 4,
        "eval_examples": 6,
        "checkpoint_steps": 4,
        "precision": "float32",
    }
    return TrainConfig.model_validate({**defaults, "first": first, **changes})


def test_the_line_learns_the_domain_then_the_task(line, tiny_causal, tmp_path):
    result, sides = line(law())
    counts = result.summary["domain"]
    assert (counts["read"], counts["leaks"], counts["duplicates"]) == (36, 0, 0)
    assert counts["train"] + counts["eval"] == 36 and not result.stop
    config = settings_for(tiny_causal)
    trained, made = stage_of(stage.train, config, sides, tmp_path / "train")
    found = trained.metrics
    # The first phase taught the documents, and the second the task, from where the first one ended.
    assert found["first_eval_loss"] < found["first_base_eval_loss"] - 0.05
    assert found["eval_loss"] < found["eval_loss_after_first"] < found["base_eval_loss"]
    card = ModelCard.read(made["model"].path)
    assert card.first.documents == counts["train"] and card.first.objective == "language-modeling"
    assert (card.first.steps, card.layout, card.base_model.uri) == (12, "peft", str(tiny_causal))
    ledger = made["ledger"].path
    rows = [list(jsonl.read(ledger / name)) for name in ("first_history.jsonl", "history.jsonl")]
    assert [row["step"] for row in rows[0]] == list(range(13)) and len(rows[1]) == 11
    assert trained.summary["examples"]["first_train"]["split"] > 0
    assert "First phase: loss" in trained.page.read_text()
    # Without the first phase the same task starts from the base.
    alone, _ = stage_of(stage.train, settings_for(tiny_causal, first=None), sides, tmp_path / "alone")
    assert alone.metrics["base_eval_loss"] == pytest.approx(found["base_eval_loss"], abs=1e-6)


def test_planted_leakage_is_left_out_with_its_origin_and_stops_above_the_budget(line, tmp_path):
    _, sides = line(law())
    tested = list(jsonl.read(sides["test"].path / "examples.jsonl"))
    watched = list(jsonl.read(sides["eval"].path / "examples.jsonl"))
    edited = watched[0]["completion"].replace("无正当理由", "没有正当理由").replace("仍不支付", "仍未支付")
    planted = law()
    planted[7] = {"article": f"{ARTICLES[0]}{tested[0]['prompt']}{tested[0]['completion']}{ARTICLES[3]}"}
    planted[20] = {"article": f"案例：{edited}{ARTICLES[1]}"}
    planted.append({"article": " " + planted[3]["article"].replace("，", ", ")})  # one that repeats
    result, sides = line(planted, max_domain_leaks=0.2)
    assert not result.stop
    leaks = {row["origin"]["line"]: row for row in jsonl.read(sides["train"].path / "domain_leaks.jsonl")}
    # The questions are alike, so a document that holds one holds most of others too; it is named once.
    assert set(leaks) == {8, 21} and leaks[8]["covered"] == 1
    assert (leaks[8]["side"], leaks[8]["example"]["id"]) == ("test", tested[0]["id"])
    assert leaks[21]["covered"] > 0.8 and leaks[21]["origin"]["file"].endswith("law.jsonl")
    repeated = list(jsonl.read(sides["train"].path / "domain_duplicates.jsonl"))
    assert [(row["origin"]["line"], row["like"]["line"]) for row in repeated] == [(37, 4)]
    kept = [row for side in ("train", "eval") for row in jsonl.read(sides[side].path / DOMAIN)]
    assert len(kept) == 34 and not {8, 21, 37} & {row["origin"]["line"] for row in kept}
    assert not (sides["test"].path / DOMAIN).exists()
    stopped, _ = line(planted)
    assert "2 of 37 documents of domain text (5.4%) hold an example of eval or test" in stopped.stop
    assert "law.jsonl:8 holds 100% of an example of test" in stopped.stop


class Killed(BaseException):
    """As SIGKILL: nothing is saved."""


def test_killed_in_either_phase_it_ends_with_the_same_bits(line, tiny_causal, tmp_path, monkeypatch):
    _, sides = line(law())
    config = settings_for(tiny_causal, first={"learning_rate": 5e-3}, max_steps=9, learning_rate="auto")
    _, whole = stage_of(stage.train, config, sides, tmp_path / "whole")
    expected = load_file(whole["model"].path / "adapter_model.safetensors")
    update, calls = fit.timed_update, []

    def counted(*given):
        calls.append(given)
        if len(calls) == limit:
            raise Killed
        return update(*given)

    monkeypatch.setattr(fit, "timed_update", counted)
    seen = []
    # Within the first phase, twice; in the second before and after its first checkpoint; then not at all.
    for limit in (3, 6, 9, 6, 4, 10**9):
        calls.clear()
        if limit == 10**9:
            _, cut = stage_of(stage.train, config, sides, tmp_path / "cut")
            break
        with pytest.raises(Killed):
            stage_of(stage.train, config, sides, tmp_path / "cut")
        found = checkpoint.newest(tmp_path / "cut/work/checkpoints")
        seen.append((found[1]["step"], bool(found[1]["state"]["first"])) if found else None)
    assert seen == [None, (4, False), (12, False), (16, True), (16, True)]
    got = load_file(cut["model"].path / "adapter_model.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in expected)
    curves = [made["ledger"].path / "first_history.jsonl" for made in (whole, cut)]
    losses = [[row["loss"] for row in jsonl.read(path) if row["step"]] for path in curves]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.parametrize(
    "adapter", ["full", {"kind": "lora", "rank": 4}, "houlsby", {"kind": "last_layers", "layers": 1}]
)
def test_an_encoder_hands_its_body_over_and_drops_its_head(tiny_encoder, adapter):
    config = TrainConfig(
        objective="classification",
        base_model=str(tiny_encoder),
        adapter=adapter,
        max_steps=2,
        first={"source": "law.jsonl"},
    )
    assert config.first.objective.kind == "masked-language-modeling"
    rows = [{"label": label} for label in ("up", "down")]
    before = open_objective(config.first_phase(), [], tiny_encoder)
    apply_adapter(before, config.first_phase())
    with torch.no_grad():
        for weight in checkpoint.trainable(before.model).values():
            weight.add_(1.0)
    taken = phases.taken(before.model)
    after = open_objective(config, rows, tiny_encoder)
    apply_adapter(after, config)
    phases.hand_over(taken, after.model)
    now = phases.taken(after.model)
    shared = taken.keys() & now.keys()
    assert all(torch.equal(taken[name], now[name]) for name in shared)
    assert {name for name in taken if name.startswith("body.")} == {
        name for name in now if name.startswith("body.") and name in taken
    }
    assert shared and (taken.keys() ^ now.keys())  # heads are of one phase


def test_a_classifier_learns_its_domain_by_hidden_words(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sides = {}
    for side, count in (("train", 24), ("eval", 8)):
        origin = {"file": "f", "line": 1, "part": "main"}
        labelled = [{"text": f"profit rose {n}", "label": "up"} for n in range(count // 2)]
        labelled += [{"text": f"losses widened {n}", "label": "down"} for n in range(count // 2)]
        rows = [{**row, "id": str(n), "origin": origin} for n, row in enumerate(labelled)]
        jsonl.write(tmp_path / side / "examples.jsonl", rows)
        said = [{"text": f"profit and losses of quarter {n}", "id": str(n)} for n in range(count)]
        jsonl.write(tmp_path / side / DOMAIN, [{**row, "origin": origin} for row in said])
        sides[side] = Artifact(SimpleNamespace(digest=side), tmp_path / side)
    config = TrainConfig(
        objective="classification",
        base_model=str(tiny_encoder),
        max_steps=10,
        learning_rate=2e-3,
        precision="float32",
        first={"source": "law.jsonl", "max_steps": 30},
    )
    trained, made = stage_of(stage.train, config, sides, tmp_path / "run")
    assert trained.metrics["first_eval_loss"] < trained.metrics["first_base_eval_loss"]
    card = ModelCard.read(made["model"].path)
    assert (card.task, card.first.objective) == ("classification", "masked-language-modeling")
    assert card.labels == ["down", "up"]


def test_weights_that_would_not_move_on_are_no_silent_loss(tiny_encoder):
    config = TrainConfig(objective="classification", base_model="b", adapter="full", first={"source": "l"})
    before = open_objective(config.first_phase(), [], tiny_encoder)
    apply_adapter(before, config)
    after = open_objective(config, [{"label": label} for label in ("up", "down")], tiny_encoder)
    apply_adapter(
        after,
        config.model_copy(
            update={
                "adapter": TrainConfig(
                    objective="sft", base_model="b", adapter={"kind": "last_layers", "layers": 1}
                ).adapter
            }
        ),
    )
    with pytest.raises(TuneyardError, match=r"do not move on in it: body\.embeddings"):
        phases.hand_over(phases.taken(before.model), after.model)


def test_a_first_phase_without_its_documents_says_where_they_come_from(tmp_path):
    for side in ("train", "eval"):
        (tmp_path / side).mkdir()
    inputs = {s: Artifact(Manifest("dataset", ()), tmp_path / s) for s in ("train", "eval")}
    with pytest.raises(TuneyardError, match=r"train\.first: train has no domain\.jsonl"):
        phases.documents(inputs)


def pipeline(tmp_path, **train):
    settings = {"objective": "sft", "base_model": "./base", "first": {"source": "./law.jsonl"}, **train}
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"name": "p", "ingest": {"source": "./a.jsonl"}, "train": settings}))
    return str(path)


def test_a_pipeline_file_says_it_once_and_takes_over_the_rest(tmp_path):
    path = pipeline(tmp_path, max_length=300, learning_rate=1e-4, per_device_batch_size=2, max_steps=7)
    read = spec.load(path)
    assert read.ingest.domain.source == "./law.jsonl"
    first = read.train.first_phase()
    assert (first.objective.kind, first.max_length, first.learning_rate) == ("language-modeling", 300, 1e-4)
    assert (first.per_device_batch_size, first.epochs, first.max_steps) == (2, 1.0, None)
    assert first.over_length == "split" and first.first is None
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(read.resolved()))
    assert spec.load(str(again)) == read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "dpo"}, "line 1: train: first: no domain text before dpo; it is measured against"),
        ({"objective": "seq2seq"}, "an encoder-decoder has no objective for documents"),
        ({"first": {"source": "l", "objective": "masked-language-modeling"}}, "does not go before sft"),
        ({"adapter": "prefix"}, "a soft prompt \\(prefix\\)"),
        ({"retain": {"source": "r", "ewc": 1.0}}, "would undo what first taught; use retain.replay"),
        ({"first": {"source": "l", "epochs": 1, "max_steps": 2}}, "cannot both be set"),
        ({"first": {"max_steps": 2}}, "train.first.source: Field required"),
        ({"first": {"source": "l", "epoch": 1}}, "train.first.epoch: no such setting; did you mean epochs"),
    ],
)
def test_what_cannot_go_together_is_refused_when_the_file_is_read(tmp_path, changes, said):
    with pytest.raises(TuneyardError, match=said):
        spec.load(pipeline(tmp_path, **changes))


@pytest.mark.server
def test_a_changed_domain_source_never_hits_the_cache(store_env, tmp_path, monkeypatch):
    from components.shared.commit import stage_key
    from components.shared.store import Store

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [asked(0)])
    write(tmp_path / "law.jsonl", law())
    read, store = spec.load(pipeline(tmp_path)), Store.from_environment()
    before = stage_key("ingest", read.ingest, {}, store)
    assert planner.plan(read, store)[0].key == before
    write(tmp_path / "law.jsonl", law(35))
    assert planner.plan(read, store)[0].key != before

"""Preferences through train and evaluate: what was chosen wins, by numbers that are those defined."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from components.evaluate import pairs
from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.register.compare import default_metric
from components.shared import chat, jsonl, rewards
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.train import train as stage
from components.train.config import TrainConfig
from tests.components.evaluate.conftest import example as example_of
from tests.components.evaluate.conftest import make_tokenizer
from tests.tiny import tiny_gemma

KIND = ("合同", "欠款", "押金", "加班", "离婚", "酒驾")


def preference(number, write):
    """A long answer about the matter was chosen, a short evasive one rejected."""
    matter = KIND[number % len(KIND)]
    fields = {
        "prompt": f"请问{matter}{number}怎么办",
        "chosen": f"应当承担{matter}责任",
        "rejected": "不知道" + "啊" * (number % 3),
    }
    return write(fields, number)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a random Gemma that knows the characters of these examples."""
    folder = tmp_path_factory.mktemp("preference-base")
    texts = [
        "请问怎么办应当承担责任不知道啊" + "".join(KIND) + "0123456789",
        *(" ".join(f"{matter}{n}" for n in range(40)) for matter in KIND),
    ]
    tokenizer = make_tokenizer(texts)
    tiny_gemma(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def line(tmp_path, base, monkeypatch):
    """line(objective, rows, **settings): train and evaluate; (train's result, evaluation, its folder)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def dataset(name, rows):
        jsonl.write(tmp_path / name / "examples.jsonl", rows)
        return Artifact(SimpleNamespace(digest=name), tmp_path / name)

    def go(objective, rows, gates=None, **settings):
        config = TrainConfig(
            objective=objective,
            base_model=str(base),
            precision="float32",
            max_length=64,
            warmup_fraction=0.0,
            **settings,
        )
        cuts = {"train": rows[:18], "eval": rows[18:24], "test": rows[24:]}
        data = {side: dataset(side, part) for side, part in cuts.items()}
        work = tmp_path / f"train-{config.objective.kind}"
        context = Context("run", "tiny", "train", "k" * 64, None, work / "out", work)
        context.out.mkdir(parents=True)
        trained = stage.train(config, {side: data[side] for side in ("train", "eval")}, context)
        model = context.out / "model"
        work = tmp_path / f"evaluate-{config.objective.kind}"
        context = Context("run", "tiny", "evaluate", "e" * 64, None, work / "out", work)
        context.out.mkdir(parents=True)
        inputs = {side: data[side] for side in ("train", "test")}
        inputs["model"] = Artifact(SimpleNamespace(digest="m" * 64), model)
        judging = EvaluateConfig(gates=gates or {}, max_new_tokens=8, per_device_batch_size=4)
        judged = evaluate(judging, inputs, context)
        document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
        _same_in_slices(judging, inputs, context, document)
        return trained, SimpleNamespace(result=judged, document=document, out=context.out), model

    return go


def _same_in_slices(config, inputs, context, document):
    """Whatever is judged in three shares has the numbers that it has in one."""
    task, tests = task_of(inputs, config), read_tests(inputs)
    parts = [task.take(config, tests, inputs, context, Share(number, 3)) for number in (1, 2, 3)]
    systems = task.judge(config, tests, inputs, context, parts).systems
    for name, system in systems.items():
        for metric in ("pair_accuracy", "pair_margin_nats", "reward", "kl_nats", "win_rate", "loss"):
            assert system.get(metric) == document["systems"][name].get(metric), (name, metric)


def rows_of(count, start=0):
    return [preference(number, example_of) for number in range(start, start + count)]


def test_dpo_through_train_and_evaluate_prefers_what_was_chosen(line, base):
    rows = rows_of(32)
    trained, found, model = line(
        {"kind": "dpo", "beta": 0.2},
        rows,
        gates={"pair_accuracy": {"min": 0.9}, "pair_margin_nats": {"min": 1.0}},
        max_steps=12,
        learning_rate=1e-2,
        adapter={"kind": "lora", "dropout": 0.0},
        per_device_batch_size=6,
    )
    assert trained.metrics["eval_loss"] < 0.5 * trained.metrics["base_eval_loss"]
    assert trained.metrics["base_eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    systems = found.document["systems"]
    assert found.result.stop == "" and systems["tuned"]["pair_accuracy"] == 1.0
    assert (systems["base"]["pair_accuracy"], systems["base"]["pair_margin_nats"]) == (0.5, 0.0)
    assert systems["longer"]["pair_accuracy"] == 1.0  # every chosen answer is the longer one
    assert {"loss", "rouge_l", "tokens_per_second"} <= systems["tuned"].keys()
    assert default_metric("causal-lm", systems["tuned"]) == "pair_accuracy"
    # The margin of one pair, from whole logits of base and tuned model.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    row = next(jsonl.read(found.out / "evaluation" / "answers.jsonl"))
    example = next(each for each in rows if each["id"] == row["id"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = _tokenizer(model)
    before = [_log_likelihood(plain, tokenizer, example, name) for name in ("chosen", "rejected")]
    tuned = PeftModel.from_pretrained(plain, str(model)).eval()
    after = [_log_likelihood(tuned, tokenizer, example, name) for name in ("chosen", "rejected")]
    margin = (after[0] - before[0]) - (after[1] - before[1])
    # The stage computes in bfloat16 where the processor does, so two figures of some nats.
    assert row["tuned_margin_nats"] == pytest.approx(margin, rel=0.05, abs=0.2)
    assert row["rejected"] == example["rejected"] and row["reference"] == example["chosen"]
    page = (found.out / "evaluation" / "page.html").read_text()
    assert "Chosen answer above the rejected one" in page and "Rejected" in page


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _log_likelihood(model, tokenizer, example, name):
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": example["prompt"]}])
    answer = chat.answer_ids(tokenizer, example[name])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def test_a_reward_model_and_then_ppo_against_it(line):
    rows = rows_of(32)
    _, found, judge = line(
        "reward",
        rows,
        gates={"pair_accuracy": {"min": 0.9}},
        max_steps=20,
        learning_rate=1e-2,
        per_device_batch_size=6,
    )
    systems = found.document["systems"]
    assert found.result.stop == "" and systems["tuned"]["pair_accuracy"] == 1.0
    assert list(systems) == ["tuned", "likelier", "longer"] and systems["tuned"]["texts_per_second"] > 0
    card = ModelCard.read(judge)
    assert (card.task, card.layout) == ("reward", "transformers")
    said = next(jsonl.read(found.out / "evaluation" / "answers.jsonl"))
    # Read back as anybody would: transformers' own class gives the reward (its end token pads nothing here).
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    tokenizer = _tokenizer(judge)
    example = next(each for each in rows if each["id"] == said["id"])
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": example["prompt"]}])
    for name in ("chosen", "rejected"):
        ids = torch.tensor([[*prompt, *chat.answer_ids(tokenizer, example[name])]])
        assert said[f"{name}_reward"] == pytest.approx(
            float(model(input_ids=ids).logits.detach()), rel=1e-3, abs=1e-3
        )
    assert said["tuned"] == "chosen" and said["tuned_probability"] > 0.5

    prompts = [{k: row[k] for k in ("prompt", "id", "origin")} for row in rows]
    _, found, policy = line(
        {"kind": "ppo", "reward_model": str(judge), "max_new_tokens": 8, "kl_weight": 0.01},
        prompts,
        gates={"reward_gain": {"min": 0.05}},
        max_steps=6,
        learning_rate=2e-2,
        per_device_batch_size=8,
    )
    systems = found.document["systems"]
    assert found.result.stop == ""
    assert systems["tuned"]["reward_gain"] == pytest.approx(
        systems["tuned"]["reward"] - systems["base"]["reward"]
    )
    assert 0 <= systems["tuned"]["win_rate"] <= 1 and systems["tuned"]["kl_nats"] > 0
    assert default_metric("causal-lm", systems["tuned"]) == "reward"
    card = ModelCard.read(policy)
    assert card.task == "causal-lm" and card.reward_model.uri == str(judge)
    assert not any("value_head" in name for name in _weights(policy))
    assert "reward " in (found.out / "evaluation" / "page.html").read_text()


def _weights(folder):
    from safetensors import safe_open

    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    assert names
    return names


def test_pair_metrics_count_a_tie_as_half():
    found = pairs.score([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0])
    assert found["pair_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["pair_margin_nats"] == pytest.approx(0.25)
    low, high = found["intervals"]["pair_accuracy"]
    assert low < found["pair_accuracy"] < high


def test_a_pair_that_does_not_fit_the_window_is_left_out(base):
    tokenizer = chat.prepare(_tokenizer(base))
    rows = rows_of(3)
    long = {**rows[0], "rejected": "不知道" * 40, "id": "long"}
    kept = pairs.read([*rows, long], tokenizer, 40)
    assert [row["id"] for row in kept.tests] == [row["id"] for row in rows]
    assert all(len(sequence) <= 40 for sequence in kept.both)
    with pytest.raises(TuneyardError, match="none of the 1 test pairs fits"):
        pairs.read([long], tokenizer, 40)


def test_a_model_that_gives_no_rewards_is_refused(causal_line):
    with pytest.raises(TuneyardError, match="a causal-lm model gives no rewards"):
        rewards.load(causal_line.root / "tuned")


def test_prompts_alone_cannot_judge_a_model_without_a_reward_model(
    causal_line, causal_inputs, context, tmp_path, write_dataset
):
    prompts = [{k: row[k] for k in ("prompt", "id", "origin")} for row in causal_line.test]
    causal_inputs["test"] = write_dataset(tmp_path / "prompts", prompts)
    with pytest.raises(TuneyardError, match="no reward model that could judge"):
        evaluate(EvaluateConfig(), causal_inputs, context)
    with pytest.raises(TuneyardError, match="loss cannot be measured on a causal-lm model"):
        evaluate(EvaluateConfig(gates={"loss": {"max": 1}}), causal_inputs, context)

"""Pipeline files: every fault at once, with its line and what to do."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.config import METRICS, OF_TEACHER
from components.shared import tasks
from components.shared.errors import EXIT_USAGE, SpecError, UsageError
from pipelines.graph import inputs_of
from pipelines.spec import FOLDER, load, names

GOOD = """name: good
ingest: {source: ./corpus.jsonl, columns: {prompt: q, completion: a}}
train:
  objective: sft
  base_model: ./model
"""


def write(tmp_path, text):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return str(path)


def test_five_lines_have_a_default_for_everything(tmp_path):
    spec = load(write(tmp_path, GOOD))
    assert list(spec.stages()) == ["ingest", "validate", "split", "train", "evaluate"]
    assert spec.train.adapter.kind == "lora" and spec.ingest.format == "prompt-completion"


def test_every_shipped_pipeline_loads():
    assert len(names()) >= 2
    for name in names():
        assert load(name).name == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: Bad Name\n", "line 1: name"),
        ("nam: x\n", "line 1: nam: no such setting; did you mean name?"),
        (
            "train: {objective: sft, base_model: b, adapter: {kind: lora, rnk: 3}}\n",
            "train.adapter.rnk: no such setting; did you mean rank?",
        ),
        ("name: a\nname: b\n", "line 2: name stands twice; keep one"),
        ("a: [1\n", "not YAML"),
        ("- 1\n", "line 1: a pipeline file is a mapping"),
        (GOOD + "  epochs: 1\n  max_steps: 2\n", "epochs (1.0) and max_steps (2) cannot both be set"),
        (GOOD + "deploy:\n", "line 6: deploy: needs a register section"),
        (GOOD + "register: false\ndeploy:\n", "line 7: deploy: needs a register section"),
        (GOOD + "register:\ndeploy:\n", "line 7: deploy: needs a compress section, which merges the adapter"),
        (
            GOOD + "  adapter: houlsby\nregister:\ncompress:\ndeploy:\n",
            "line 8: compress: adapter houlsby stays beside its base, and there is nothing to merge or "
            "export; drop this section, or choose an adapter that merges (lora, qlora, ia3)",
        ),
        (
            GOOD + "  adapter: {kind: prompt}\nregister:\ndeploy:\n",
            "line 8: deploy: adapter prompt stays beside its base, and the model server takes whole models",
        ),
        (GOOD + "  adapter: {kind: ia3}\nregister:\ndeploy:\n", "deploy: needs a compress section"),
        (
            GOOD + "  adapter: prefix\n  gradient_checkpointing: true\n",
            "gradient_checkpointing cannot go with adapter prefix",
        ),
        (GOOD + "  adapter: {kind: lastlayers}\n", "did you mean last_layers?"),
        (GOOD + "  adapter: {kind: progressive, untill: 0.3}\n", "no such setting; did you mean until?"),
        (GOOD + "split: {ratios: [0.5, 0.1, 0.1]}\n", "must be positive and sum to 1"),
        (
            GOOD.replace("sft", "classification").replace("source:", "format: prompt-completion, source:"),
            "line 2: ingest.format: objective classification needs labelled-text data",
        ),
        (
            GOOD.replace("sft", "stf"),
            "line 4: train.objective: there is no 'stf'; did you mean sft? there are classification",
        ),
        (
            GOOD.replace("source:", "test_source: ./test.jsonl, source:"),
            "line 2: ingest.test_source: write it as split.test_source",
        ),
        (
            GOOD.replace("source:", "keep: client, source:"),
            "line 2: ingest.keep: Input should be a valid list",
        ),
        (
            GOOD + "register: {compare_by: auc}\n",
            "line 6: register.compare_by: auc is no metric of a causal-lm",
        ),
        (GOOD.replace("{prompt: q", "{question: q"), "are no fields of prompt-completion"),
        (
            GOOD.replace("sft", "regression").replace(", columns: {prompt: q, completion: a}", "")
            + "compress:\n",
            "line 6: compress: there is no smaller form of regression models; drop this section",
        ),
        (
            GOOD.replace("sft", "contrastive") + "register:\ndeploy:\n",
            "line 7: deploy: the model server does not serve embedding models; drop this section",
        ),
        (
            GOOD.replace("sft", "regression") + "  label_smoothing: 0.1\n",
            "label_smoothing (0.1) means nothing to regression",
        ),
        (
            GOOD.replace("objective: sft", "objective: {kind: multi-task, tasks: {mood: {hed: regression}}}"),
            "train.objective.tasks.mood.hed: no such setting; did you mean head?",
        ),
        (
            GOOD.replace("objective: sft", "objective: {kind: regression, loss: hubber}"),
            "train.objective.loss: Input should be 'mse' or 'huber' (it is 'hubber')",
        ),
        (GOOD + "evaluate: {gates: {loss: {}}}\n", "a gate needs min or max"),
    ],
)
def test_a_fault_names_its_line_and_what_to_do(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


CLASSES = """name: classes
ingest: {source: ./corpus.jsonl}
train:
  objective: classification
  base_model: ./model
evaluate:
  gates:
    accuracy: {min: 0.9}
    size_ratio: {max: 0.3}
"""


OF_COMPRESSION = ("accuracy_drop_points", "throughput_ratio", "size_ratio")
TEXTS = GOOD.replace("{prompt: q, completion: a}", "{text: t}")
PAIRS = GOOD.replace("{prompt: q, completion: a}", "{prompt: q}")
# A pipeline file for a key of METRICS whose data are no plain texts.
OF_METRICS = {
    "causal-lm": GOOD,
    "causal-lm by language-modeling": TEXTS.replace("sft", "language-modeling"),
    "seq2seq": GOOD.replace("sft", "seq2seq"),
    "causal-lm by preference": PAIRS.replace("sft", "dpo"),
    "causal-lm by prompt-only": PAIRS.replace("sft", "{kind: ppo, reward_model: ./judge}"),
    "reward": PAIRS.replace("sft", "reward"),
    **dict.fromkeys(
        ("image-classification", "speech-recognition"),
        CLASSES[: CLASSES.index("evaluate")].replace("corpus.jsonl", "corpus"),
    ),
}


@pytest.mark.parametrize("task", METRICS)
@given(st.data())
def test_a_gate_is_on_what_the_pipeline_can_measure(tmp_path_factory, task, data):
    """Any gate that the spec takes is a metric of its task, and each of the others is named with its line."""
    every = sorted({metric for metrics in METRICS.values() for metric in metrics})
    gates = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    model, _, form = task.partition(" by ")
    # Of others there is no smaller form.
    compress = model in tasks.COMPRESSED and data.draw(st.booleans())
    every_kind = tasks.OBJECTIVES.items()
    kinds = (
        kind for kind, trait in every_kind if trait.task == model and (not form or form in trait.formats)
    )
    text = OF_METRICS.get(task, CLASSES[: CLASSES.index("evaluate")])
    text = text.replace("objective: classification", f"objective: {next(kinds)}")
    lines = [*text.splitlines(), "evaluate:", "  gates:", *(f"    {metric}: {{max: 1}}" for metric in gates)]
    path = tmp_path_factory.mktemp("gates") / "gates.yaml"
    path.write_text("\n".join(lines + ["compress:"] * compress))
    without = set() if compress else set(OF_COMPRESSION)
    # The first needs train.retain, the others a teacher.
    good = set(METRICS[task]) - without - {"retention_loss_increase", *OF_TEACHER}
    expected = [f"line {lines.index(f'    {m}: {{max: 1}}') + 1}: evaluate.gates.{m}: " for m in gates]
    expected = [start for start, metric in zip(expected, gates, strict=True) if metric not in good]
    try:
        load(str(path))
        faults = []
    except SpecError as error:
        faults = error.faults
    assert [fault[: len(start)] for fault, start in zip(faults, expected, strict=True)] == expected


def test_a_gate_on_compression_needs_the_stage_and_says_so_among_all_faults(tmp_path):
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, CLASSES + "register: {compare_by: bleu}\n"), ["train.epochs=lots"])
    gate, register, epochs = caught.value.faults
    assert gate.startswith(
        "line 9: evaluate.gates.size_ratio: compares the compressed model with the tuned one"
    )
    assert register.startswith("line 10: register.compare_by: bleu is no metric of a classification model; ")
    assert register.endswith("choose from accuracy, macro_f1, auc") and "train.epochs" in epochs
    assert load(write(tmp_path, CLASSES + "compress:\nregister: {compare_by: auc}\n"))


def test_a_gate_on_forgetting_needs_what_must_not_be_forgotten(tmp_path):
    gate = "evaluate: {gates: {retention_loss_increase: {max: 0.1}}}"
    text = "\n".join([CLASSES[: CLASSES.index("evaluate")], gate])
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, text))
    assert "retention_loss_increase: needs train.retain" in caught.value.faults[0]
    assert load(write(tmp_path, text), ["train.retain={source: s3://corpora/general, replay: 0.05}"])


@pytest.mark.parametrize("objective", ["seq2seq", "masked-language-modeling"])
def test_stages_that_cannot_take_a_model_yet_are_refused_before_anything_runs(tmp_path, objective):
    text = (GOOD if objective == "seq2seq" else TEXTS).replace("sft", objective)
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, text + "compress:\nregister:\ndeploy:\n"))
    compress, deploy = caught.value.faults
    assert compress.startswith("line 6: compress: there is no smaller form of ")
    assert deploy.startswith("line 8: deploy: the model server does not serve ")
    assert load(write(tmp_path, text + "register:\n"))


IMAGES = (
    CLASSES[: CLASSES.index("evaluate")]
    .replace("corpus.jsonl", "corpus")
    .replace("classification", "image-classification")
)


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ("compress:\n", "compress"),
        ("register:\ndeploy:\n", "deploy"),
        ("evaluate: {gates: {rouge_l: {min: 0.1}}}\n", "evaluate.gates.rouge_l"),
        ("  max_length: 77\n", "train.max_length"),
        ("  over_length: error\n", "train.over_length"),
        ("  retain: {source: s3://corpora/general}\n", "train.retain"),
    ],
)
def test_what_images_cannot_do_is_said_before_anything_runs(tmp_path, more, where):
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, IMAGES + more))
    assert [f for f in caught.value.faults if f": {where}: " in f]


def test_what_belongs_to_images_is_refused_for_texts(tmp_path):
    more = "evaluate: {positive_label: ill, gates: {sensitivity: {min: 0.9}}}\n"
    assert load(write(tmp_path, IMAGES + more)).evaluate.positive_label == "ill"
    with pytest.raises(SpecError, match=r"positive_label: belongs to image-classification"):
        load(write(tmp_path, CLASSES[: CLASSES.index("evaluate")] + more))


def test_documents_are_split_unless_the_file_says_otherwise(tmp_path):
    def resolved(text):
        return load(write(tmp_path, text)).resolved()

    whole = resolved(TEXTS.replace("sft", "language-modeling"))
    assert (whole["ingest"]["format"], whole["train"]["over_length"]) == ("language-modeling", "split")
    assert resolved(GOOD)["train"]["over_length"] == "drop"
    with pytest.raises(SpecError, match="over_length split is not for sft"):
        load(write(tmp_path, GOOD), ["train.over_length=split"])


def test_classification_is_stratified_by_label_unless_the_file_says_otherwise(tmp_path):
    def stratified(text):
        return load(write(tmp_path, text)).resolved()["split"]["stratify_by"]

    classes = CLASSES + "compress:\n"
    assert stratified(classes) == "label"
    assert stratified(classes + "split: {seed: 7}\n") == "label"
    assert stratified(classes + "split: {stratify_by: source}\n") == "source"
    assert stratified(classes + "split: {stratify_by: null}\n") is None
    assert stratified(GOOD) is None


@pytest.mark.parametrize("text", [GOOD, *((FOLDER / f"{name}.yaml").read_text() for name in names())])
def test_a_resolved_pipeline_is_a_pipeline_file(tmp_path, text):
    spec = load(write(tmp_path, text))
    assert load(write(tmp_path, yaml.safe_dump(spec.resolved()))) == spec


@pytest.mark.parametrize(
    ("objective", "more", "expected"),
    [
        ("reward", "compress:\n", "line 6: compress: there is no smaller form of reward models"),
        ("reward", "register:\ndeploy:\n", "line 7: deploy: the model server does not serve reward models"),
        (
            "dpo",
            "evaluate: {gates: {reward: {min: 1}}}\n",
            "reward: no metric of a causal-lm model on preference",
        ),
        ("{kind: dpo, loss: ipo}", "  label_smoothing: 0.1\n", "label_smoothing: loss ipo has no labels"),
        ("{kind: dpo, loss: ipo, score_weight: 1}", "", "mean nothing to loss ipo"),
        ("ppo", "", "train.objective.reward_model: Field required"),
        ("PPO", "  dropout: 0.1\n", "train.dropout: ppo computes without dropout"),
        ("PPO", "  adapter: {kind: lora, dropout: 0.1}\n", "train.adapter.dropout: ppo computes without"),
        ("PPO", "  gradient_checkpointing: true\n", "gradient_checkpointing: ppo keeps its activations"),
        ("PPO", "  label_smoothing: 0.1\n", "label_smoothing (0.1) means nothing to ppo"),
        ("PPO", "hardware: {nodes: 2, gpus_per_node: 1}\n", "hardware: ppo trains in one process yet"),
    ],
)
def test_what_preferences_cannot_do_is_said_before_anything_runs(tmp_path, objective, more, expected):
    said = objective.replace("PPO", "{kind: ppo, reward_model: ./judge}")
    path = write(tmp_path, PAIRS.replace("sft", said) + more)
    with pytest.raises(SpecError) as caught:
        load(path)
    assert expected in str(caught.value)


ANSWER = "rewards: [{kind: answer}]"
FORMAT = "rewards: [{kind: format, pattern: a}]"


@pytest.mark.parametrize(
    ("said", "data", "more", "expected"),
    [
        ("kind: grpo", PAIRS, "", "train.objective: nothing judges the answers"),
        (f"kind: rloo, {ANSWER}", PAIRS, "", "rewards: a reward of kind answer compares with the data's own"),
        (f"kind: grpo, {FORMAT}", PAIRS, "", "rewards: evaluate judges answers by a reward_model or by"),
        ("kind: rloo, reward_model: ./judge", PAIRS, "  dropout: 0.1\n", "rloo computes without dropout"),
        (
            "kind: grpo, reward_model: ./judge",
            PAIRS,
            "hardware: {nodes: 2, gpus_per_node: 1}\n",
            "grpo trains in one process yet",
        ),
        ("kind: grpo, rewards: [{kind: answr}]", PAIRS, "", "there is no 'answr'"),
        (f"kind: grpo, {ANSWER}", GOOD.replace("{source", "{format: prompt-completion, source"), "", ""),
        (f"kind: rloo, {FORMAT}, reward_model: ./judge", PAIRS, "", ""),
    ],
)
def test_what_judges_drawn_answers_is_settled_before_anything_runs(tmp_path, said, data, more, expected):
    path = write(tmp_path, data.replace("objective: sft", f"objective: {{{said}}}") + more)
    if not expected:
        spec = load(path)
        assert load(write(tmp_path, yaml.safe_dump(spec.resolved()))) == spec
        return
    with pytest.raises(SpecError) as caught:
        load(path)
    assert expected in str(caught.value)


DISTILLED = GOOD.replace("objective: sft", "objective: {kind: distillation, teacher: ./large}")


@pytest.mark.parametrize(
    ("objective", "more", "expected"),
    [
        ("distillation", "", "train.objective.teacher: Field required"),
        (
            "{kind: distillation, teacher: t, level: sequence}",
            "hardware: {nodes: 2, gpus_per_node: 1}\n",
            "hardware: distillation trains in one process yet",
        ),
        ("sft", "evaluate: {gates: {teacher_speed_ratio: {min: 2}}}\n", "needs an objective with a teacher"),
        (
            "{kind: distillation, teacher: t, temprature: 3}",
            "",
            "train.objective.temprature: no such setting; did you mean temperature?",
        ),
    ],
)
def test_what_a_distillation_cannot_do_is_said_before_anything_runs(tmp_path, objective, more, expected):
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, GOOD.replace("objective: sft", f"objective: {objective}") + more))
    assert expected in str(caught.value)


def test_a_file_may_name_a_teacher_alone_and_bound_what_its_student_keeps(tmp_path):
    text = """name: small
ingest: {source: ./corpus.jsonl}
train:
  objective: {kind: classification-distillation, teacher: ./large, student: {layers: [0, 2, 4]}}
evaluate:
  gates: {teacher_quality_kept: {min: 0.97}, teacher_speed_ratio: {min: 1.8}}
compress:
deploy: false
"""
    spec = load(write(tmp_path, text))
    assert (spec.train.base_model, spec.train.adapter.kind) == ("./large", "full")
    assert spec.ingest.format == "labelled-text" and spec.split.stratify_by == "label"
    assert load(write(tmp_path, yaml.safe_dump(spec.resolved()))) == spec
    assert load(write(tmp_path, DISTILLED + "hardware: {nodes: 2, gpus_per_node: 1}\n"))


def test_pairs_with_one_prompt_stay_on_one_side_unless_the_file_says_otherwise(tmp_path):
    def grouped(text):
        return load(write(tmp_path, text)).split.group_by

    assert grouped(PAIRS.replace("sft", "dpo")) == grouped(PAIRS.replace("sft", "reward")) == "prompt"
    assert grouped(PAIRS.replace("sft", "dpo") + "split: {group_by: null}\n") is None
    assert grouped(GOOD) is None


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, "name: X\ningest: {sorce: a}\ntrain: {learning_rate: fast}\n"), ["split.sede=3"])
    assert len(caught.value.faults) >= 6


def test_columns_read_either_way_round(tmp_path):
    turned = GOOD.replace("{prompt: q, completion: a}", "{q: prompt, a: completion}")
    assert load(write(tmp_path, turned)).ingest == load(write(tmp_path, GOOD)).ingest


def test_overrides_are_checked_as_the_file_is(tmp_path):
    path = write(tmp_path, GOOD + "  epochs: 2\nregister:\n")
    spec = load(
        path, ["train.learning_rate=1e-5", "train.max_steps=7", "register=null", "split.group_by=client"]
    )
    assert (spec.train.learning_rate, spec.train.max_steps, spec.train.epochs) == (1e-5, 7, None)
    assert "register" not in spec.stages() and spec.ingest.keep == ["client"]
    with pytest.raises(SpecError, match=r"write section\.key=value"):
        load(path, ["train.epochs"])


def test_the_test_source_goes_to_ingest(tmp_path):
    spec = load(write(tmp_path, GOOD + "split: {test_source: ./test.jsonl}\n"))
    assert spec.ingest.external_uris() == ["./corpus.jsonl", "./test.jsonl"]
    assert "test_source" not in spec.resolved()["ingest"]


def test_an_unknown_name_suggests_one():
    with pytest.raises(UsageError, match="did you mean sft_legal"):
        load("sft_leagl")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
sections = st.sampled_from(
    ["name", "ingest", "validate", "split", "train", "evaluate", "compress", "deploy", "x"]
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3)
)


@given(st.dictionaries(sections, values, max_size=6) | values)
def test_any_yaml_is_read_or_refused_with_a_message(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("wild") / "wild.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8", errors="replace")
    try:
        load(str(path))
    except SpecError as error:
        assert "line " in str(error)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_message(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("wild") / "wild.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(SpecError, match="line "):
        load(str(path))


def test_every_input_is_an_output_of_an_earlier_stage():
    for name in names():
        spec = load(name)
        seen = set()
        for stage in spec.stages():
            assert {source for source, _ in inputs_of(stage, spec).values()} <= seen
            seen.add(stage)


def test_test_reaches_evaluate_alone():
    spec = load("sft_legal")
    readers = [s for s in spec.stages() if ("split", "test") in inputs_of(s, spec).values()]
    assert readers == ["evaluate"]


# These need a reward model or a teacher.
WITH_OTHERS = {"ppo", "grpo", "rloo", "distillation", "classification-distillation"}


@pytest.mark.parametrize("kind", sorted(set(tasks.OBJECTIVES) - WITH_OTHERS))
def test_a_file_needs_only_the_name_of_its_objective(tmp_path, kind):
    """Dataset type, adapter and stratification come from the one table of objectives."""
    text = CLASSES[: CLASSES.index("evaluate")].replace("classification", kind)
    # Of files that a list names the folder is named.
    text = text.replace("corpus.jsonl", "corpus")
    spec, trait = load(write(tmp_path, text)), tasks.OBJECTIVES[kind]
    assert spec.ingest.format == trait.formats[0] and spec.train.adapter.kind == trait.adapter
    assert spec.split.stratify_by == trait.stratify_by and spec.train.objective.kind == kind
    assert METRICS[trait.task]


SEARCH = """name: searching
ingest: {source: ./corpus.jsonl, columns: {prompt: q, completion: a}}
train:
  objective: sft
  base_model: ./model
  search:
    space:
"""


def test_a_search_is_read_and_resolved_and_can_be_overridden(tmp_path):
    text = SEARCH + "      learning_rate: {low: 1e-5, high: 1e-3, log: true}\n      adapter.rank: [8, 16]\n"
    path = write(tmp_path, text + "    trials: 12\n")
    spec = load(path, ["train.search.trials=6", "train.search.pruner.min_steps=5"])
    found = spec.train.search
    assert (found.trials, found.parallel, found.pruner.min_steps, found.pruner.reduction_factor) == (
        6,
        1,
        5,
        3,
    )
    assert (found.space["learning_rate"].low, found.space["adapter.rank"]) == (1e-5, (8, 16))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(spec.resolved()))
    assert load(str(again)) == spec
    assert load(path, ["train.search=null"]).train.search is None
    # The dots of a name are those of sections, on the command line as anywhere.
    more = load(path, ["train.search.space.adapter.alpha=[16, 32]"]).train.search
    assert more.space["adapter.alpha"] == (16, 32) and more.space["adapter.rank"] == (8, 16)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("adapter.r: [8, 16]", "adapter.r: no such setting of train; did you mean adapter.rank?"),
        ("lerning_rate: [1, 2]", "lerning_rate: no such setting of train; did you mean learning_rate?"),
        ("learning_rate: {low: -1, high: 1}", "learning_rate: -1: Input should be greater than 0"),
        ("label_smoothing: {low: 0, high: 1}", "label_smoothing: 1: Input should be less than 1"),
        ("adapter.rank: {low: 0.5, high: 8}", "adapter.rank: 0.5: Input should be a valid integer"),
        (
            "precision: [float32, float16]",
            "precision: float16: Input should be 'auto', 'float32' or 'bfloat16'",
        ),
        ("learning_rate: {low: 2, high: 1}", "learning_rate: low (2) is not below high (1)"),
        ("learning_rate: {low: 0, high: 1, log: true}", "low (0) has no logarithm"),
        ("learning_rate: {lo: 1, high: 2}", "lo: no such setting; there are high, log, low"),
        ("learning_rate: 3", "learning_rate: write a list, or {low: ..., high: ..., log: true} (it is 3)"),
        ("adapter.rank: [8]", "adapter.rank: has nothing to choose from"),
        ("adapter.rank: [8, 8]", "adapter.rank: has a value twice"),
        ("seed: [1, 2]", "seed: would choose a lucky order of the examples"),
        ("base_model: [a, b]", "base_model: is what every trial begins with"),
        ("objective.kind: [sft, dpo]", "objective.kind: is what trials are compared by"),
        ("objective.loss_on: [all, last]", "objective.loss_on: changes the loss itself"),
        ("adapter: [lora, full]", "adapter: is a whole section: name a setting of it"),
        ("adapter.kind: [lora, full]", "adapter.kind: decides what later stages can do with the model"),
        ("max_steps: [10, 20]", "max_steps: says how long a trial may train"),
        ("eval_examples: [10, 20]", "eval_examples: decides which examples trials are judged on"),
        ("retain.replay: [0.1, 0.2]", "retain.replay: retain.source: Field required"),
        ("adapter.rank: [8, 16]\n    trials: 3", "search.trials: 3 trials of a space of 2 combinations"),
        ("weight_decay: [0.1, 0.2]\n    parallel: 40", "search.parallel: 40 at a time of 20 trials"),
    ],
)
def test_what_a_search_cannot_try_is_refused_with_its_line(tmp_path, space, expected):
    with pytest.raises(SpecError) as error:
        load(
            write(tmp_path, f"{SEARCH}      {space}\n"),
            ["train.search.trials=2"] * ("trials" not in expected),
        )
    found = [fault for fault in error.value.faults if expected in fault]
    assert found and found[0].startswith(("line 8: ", "line 9: ")), error.value.faults
    assert error.value.exit_code == EXIT_USAGE


def test_all_faults_of_a_search_are_told_at_once_with_those_beside_it(tmp_path):
    text = SEARCH + (
        "      adapter.r: [8, 16]\n      seed: [1, 2]\n      learning_rate: {low: 2, high: 1}\n"
        "      dropout: {low: 0, high: 2}\n  max_lenght: 3\nhardware: {nodes: 2, gpus_per_node: 1}\n"
    )
    with pytest.raises(SpecError) as error:
        load(write(tmp_path, text))
    starts = (
        "line 8: ",
        "line 9: ",
        "line 10: ",
        "line 11: ",
        "line 12: ",
        "line 13: hardware: trials share one pod",
    )
    assert len(error.value.faults) == 6
    assert all(any(fault.startswith(start) for fault in error.value.faults) for start in starts)


def test_a_value_that_the_rest_of_train_does_not_allow_is_refused(tmp_path):
    space = "      retain.distil_from_base: [0.0, 0.5]\n      adapter.every_steps: [5, 10]\n    trials: 2\n"
    text = SEARCH.replace("sft", "language-modeling").replace("prompt: q, completion: a", "text: q") + space
    text = text.replace("  search:", "  adapter: progressive\n  retain: {source: ./kept}\n  search:")
    with pytest.raises(SpecError) as error:
        load(write(tmp_path, text))
    told = "\n".join(error.value.faults)
    assert "retain.distil_from_base: 0.5: retain.distil_from_base (0.5) needs a base that predicts" in told
    assert "adapter.every_steps: 5: every_steps (5) and until (0.5) cannot both be set" in told


def test_a_pruner_that_never_prunes_is_refused(tmp_path):
    text = SEARCH + "      weight_decay: [0.0, 0.1]\n    trials: 2\n  max_steps: 10\n"
    with pytest.raises(SpecError, match=r"min_steps \(10\) is not below train.max_steps \(10\)"):
        load(write(tmp_path, text))
    assert load(write(tmp_path, text), ["train.search.pruner.min_steps=5"]).train.search.trials == 2

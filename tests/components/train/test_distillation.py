"""Distillation of causal models: formulas, limits, the vocabulary, students cut out, a teacher's answers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, log_softmax

from components.shared import chat, generation, jsonl
from components.shared.errors import StageStopped, TuneyardError
from components.train import checkpoint, selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives import divergences, teachers
from components.train.objectives.divergences import Head
from components.train.objectives.opening import open_objective
from components.train.objectives.students import keep_layers
from tests.tiny import tiny_gemma
from tests.trl_source import method

ORIGIN = {"file": "talks.jsonl", "line": 3, "part": "main"}
KINDS = {"forward": 0, "reverse": 1, "jensen-shannon": 0.5}


def rows(count):
    answers = ["合同自成立时生效", "the company said profit rose", "三年", "pay the rent"]
    return [
        {
            "id": str(i),
            "origin": ORIGIN,
            "prompt": f"question {i} " * (1 + i % 3) + answers[i % 4],
            "completion": answers[i % 4] + "。" * (i % 3),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_tokenizer):
    """A teacher that is wider and deeper than the student, with rows in its head that are no token."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = tiny_gemma(len(tiny_tokenizer) + 12, seed=7, final_logit_softcapping=9.0, **sizes, **ids)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def settings_for(objective=None, **changes):
    base = {"base_model": "tiny", "max_length": 96, "precision": "float32", "per_device_batch_size": 4}
    base["objective"] = {"kind": "distillation", "teacher": "t", **(objective or {})}
    return TrainConfig(**(base | changes))


def opened(folder, teacher, config, data=None, adapt=True):
    torch.manual_seed(config.seed)
    objective = open_objective(config, data or rows(4), folder, teacher_folder=teacher)
    if adapt:
        apply_adapter(objective, config)
    return objective


def taught(folder, teacher, config, count=6):
    objective = opened(folder, teacher, config, adapt=False)
    encoded = [objective.encode(row) for row in rows(count)]
    objective.prepare(encoded, nullcontext)
    apply_adapter(objective, config)
    return objective, encoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_divergence_is_trls_times_the_square_of_the_temperature(kind, temperature):
    theirs = method(
        "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss", {"torch": torch, "F": torch.nn.functional}
    )
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 9, 40).double() * 3
    ours = divergences.nats(teacher, student, temperature, kind).sum()
    expected = theirs(student, teacher, beta=KINDS[kind], temperature=temperature, reduction="sum")
    # Ours is computed in float32.
    assert float(ours) == pytest.approx(temperature**2 * float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [0.0, 6.0])
def test_rows_by_rows_the_loss_and_its_gradient_are_those_of_whole_logits(kind, cap):
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 50), torch.nn.Linear(12, 45)
    with torch.no_grad():
        head.weight.mul_(8)
        other.weight.mul_(8)
    states = torch.randn(150, 8, requires_grad=True)  # three times the rows that are made at once
    theirs, targets = torch.randn(150, 12), torch.randint(0, 45, (150,))
    leaves = [states, head.weight, head.bias]
    found, hard, soft = divergences.summed(
        states, Head(head, cap), targets, theirs, Head(other, 0.0), 45, (0.3, 2.0, kind)
    )
    # Over twice, as an update divides by its terms.
    ours = torch.autograd.grad(found / 2, leaves)
    logits = torch.nn.functional.linear(states, head.weight, head.bias).double()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected_hard = cross_entropy(logits, targets, reduction="sum")
    wanted = log_softmax(other(theirs).double() / 2, -1)
    said = log_softmax(logits[:, :45] / 2, -1)
    mixed = (wanted.exp() / 2 + said.exp() / 2).log()
    kl = {
        "forward": (wanted.exp() * (wanted - said)).sum(),
        "reverse": (said.exp() * (said - wanted)).sum(),
        "jensen-shannon": ((wanted.exp() * (wanted - mixed)).sum() + (said.exp() * (said - mixed)).sum()) / 2,
    }[kind]
    exact = torch.autograd.grad((0.3 * expected_hard + 0.7 * 4 * kl) / 2, leaves)
    assert float(hard) == pytest.approx(float(expected_hard.detach()), rel=1e-5)
    assert float(soft) == pytest.approx(4 * float(kl.detach()), rel=1e-5)
    assert float(found.detach()) == pytest.approx(0.3 * float(hard) + 0.7 * float(soft), rel=1e-6)
    for mine, right in zip(ours, exact, strict=True):
        # float32 against float64, over 150 rows.
        assert float((mine - right).norm() / right.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_who_says_the_same_is_no_distance_apart_and_is_not_moved(kind):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30)
    states = torch.randn(70, 8)
    moving = states.clone().requires_grad_()
    measure = (0.0, 2.0, kind)
    found, _, soft = divergences.summed(
        moving, Head(head, 0.0), torch.zeros(70, dtype=torch.long), states, Head(head, 0.0), 30, measure
    )
    (slope,) = torch.autograd.grad(found, [moving])
    assert abs(float(soft)) < 1e-5 and float(slope.abs().max()) < 1e-6
    apart, _, _ = divergences.summed(
        moving, Head(head, 0.0), torch.zeros(70, dtype=torch.long), states + 0.5, Head(head, 0.0), 30, measure
    )
    assert float(apart.detach()) > 0.1


def test_cold_the_teachers_word_is_a_hard_label_and_hot_logits_are_matched():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 6, 20)
    cold = 0.01
    hard = cross_entropy(student / cold, teacher.argmax(-1), reduction="none")
    # The teacher's second choice has exp(-gap / 0.01) of the first one's probability.
    assert torch.allclose(
        divergences.nats(teacher, student, cold, "forward") / cold**2, hard, rtol=1e-3, atol=1e-2
    )
    # Hinton et al. 2015, section 2.1: half the mean squared distance of centred logits.
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    hot = divergences.nats(teacher.double(), student.double(), 200.0, "forward")
    assert torch.allclose(hot.float(), (centred**2).mean(-1) / 2, rtol=0.05)


@pytest.mark.parametrize("keep", [True, False])
def test_the_loss_is_that_of_both_whole_models(tiny_causal, large, keep):
    config = settings_for({"hard_weight": 0.25, "temperature": 3.0, "keep_states": keep}, adapter="full")
    objective, encoded = taught(tiny_causal, large, config)
    ours = objective.summed_loss(encoded, 0.0)
    mine = torch.autograd.grad(ours, [objective.model.model.embed_tokens.weight])[0]
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (tiny_causal, large)
    )
    vocabulary = len(student.lm_head.weight)
    assert len(teacher.lm_head.weight) == vocabulary + 12
    loss = 0.0
    for each in encoded:
        ids = torch.tensor([[*each.prompt, *each.answer]])
        at = slice(len(each.prompt) - 1, len(each) - 1)
        logits = student(input_ids=ids).logits[0, at]
        with torch.no_grad():
            wanted = log_softmax(teacher(input_ids=ids).logits[0, at, :vocabulary] / 3, -1)
        said = log_softmax(logits / 3, -1)
        loss = loss + 0.25 * cross_entropy(logits, torch.tensor(each.answer), reduction="sum")
        loss = loss + 0.75 * 9 * (wanted.exp() * (wanted - said)).sum()
    right = torch.autograd.grad(loss, [student.model.embed_tokens.weight])[0]
    # Two models in float32 against float64.
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float((mine - right).norm() / right.norm()) < 1e-3
    assert objective._sums["divergence"] > 1 and objective._sums["hard_loss"] > 1
    found = selfcheck.check(objective, encoded, rows(6), "float32")
    assert {"plain_loss", "plain_gradient", "micro_batches_loss"} <= set(found)
    assert (objective._teacher is None) == keep  # what is kept needs no teacher any more


def test_an_example_that_the_teacher_did_not_read_has_the_hard_loss_alone(tiny_causal, large):
    config = settings_for({"hard_weight": 0.25})
    objective, encoded = taught(tiny_causal, large, config, count=3)
    alone = [objective.encode(row) for row in rows(5)[3:]]  # as a retention set's are
    objective.model.eval()
    with torch.no_grad():
        apart = [float(objective.summed_loss(part, 0.0)) for part in (encoded, alone)]
        mixed = float(objective.summed_loss([alone[0], *encoded, alone[1]], 0.0))
        ids = [torch.tensor([[*e.prompt, *e.answer]]) for e in alone]
        objective.model.set_attn_implementation("eager")
        logits = [
            objective.model(input_ids=i).logits[0, len(e.prompt) - 1 : -1]
            for i, e in zip(ids, alone, strict=True)
        ]
    plain = sum(
        float(cross_entropy(x, torch.tensor(e.answer), reduction="sum"))
        for x, e in zip(logits, alone, strict=True)
    )
    assert apart[1] == pytest.approx(plain, rel=1e-4)
    assert mixed == pytest.approx(sum(apart), rel=1e-5)


def trained(folder, teacher, work, config, crash_after=None):
    objective = opened(folder, teacher, config, adapt=False)
    encoded = [objective.encode(row) for row in rows(16)]
    objective.prepare(encoded, nullcontext)
    apply_adapter(objective, config)
    if crash_after is not None:
        original, calls = objective.gradient, iter(range(1000))

        def counted(*arguments):
            if next(calls) >= crash_after:
                raise SystemExit
            return original(*arguments)

        objective.gradient = counted
    state = fit(objective, encoded[:12], encoded[12:], config, "float32", work, lambda *_: None)
    return checkpoint.copy_weights(objective.model), state


def test_the_student_comes_nearer_and_a_killed_run_ends_with_the_same_bits(tiny_causal, large, tmp_path):
    config = settings_for(
        {"hard_weight": 0.1},
        max_steps=12,
        learning_rate=1e-2,
        checkpoint_steps=4,
        eval_steps=4,
        adapter="full",
        dropout=0.1,
    )
    whole, state = trained(tiny_causal, large, tmp_path / "whole", config)
    first, last = state.history[0], state.history[-1]
    assert last["divergence"] < 0.9 * first["divergence"] and state.best_loss < state.base_loss
    assert {"hard_loss", "eval_hard_loss", "eval_divergence"} <= last.keys()
    with pytest.raises(SystemExit):
        trained(tiny_causal, large, tmp_path / "cut", config, crash_after=6)
    resumed, _ = trained(tiny_causal, large, tmp_path / "cut", config)
    assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_vocabulary_is_refused_with_the_numbers(tiny_causal, tiny_encoder, tiny_tokenizer):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_encoder)
    with pytest.raises(TuneyardError) as caught:
        teachers.shared_vocabulary(other, tiny_tokenizer, (300, 300))
    said = str(caught.value)
    assert f"{len(other.get_vocab()):,} and {len(tiny_tokenizer.get_vocab()):,} tokens" in said
    assert "level: sequence" in said
    assert teachers.shared_vocabulary(tiny_tokenizer, tiny_tokenizer, (400, 320)) == 320
    with pytest.raises(TuneyardError, match="has ids up to"):
        teachers.shared_vocabulary(tiny_tokenizer, tiny_tokenizer, (400, 100))


def test_two_tokens_that_changed_places_are_another_vocabulary(tiny_tokenizer):
    class Swapped:
        def get_vocab(self):
            found = dict(tiny_tokenizer.get_vocab())
            one, two = sorted(found)[50:52]
            return found | {one: found[two], two: found[one]}

    with pytest.raises(
        TuneyardError, match="2 have different ids, 0 are the teacher's alone, 0 the student's"
    ):
        teachers.shared_vocabulary(Swapped(), tiny_tokenizer, (400, 400))


def test_a_teacher_that_cannot_read_so_far_says_so(tiny_causal, large):
    objective = opened(tiny_causal, large, settings_for())
    objective._window = 10
    with pytest.raises(TuneyardError, match="the teacher reads 10"):
        objective.prepare([objective.encode(row) for row in rows(2)], nullcontext)


@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3]])
def test_a_student_of_some_layers_is_the_same_model_once_saved(large, tmp_path, kept):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(large).eval()
    student = AutoModelForCausalLM.from_pretrained(large).eval()
    keep_layers(student, kept)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == len(again.model.layers) == len(kept)
    assert again.config.layer_types == [teacher.config.layer_types[at] for at in kept]
    for mine, at in zip(again.model.layers, kept, strict=True):
        for name, weight in teacher.model.layers[at].named_parameters():
            assert torch.equal(weight, mine.get_parameter(name))
    ids = torch.arange(3, 60)[None]  # longer than the window of a sliding layer
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, again(input_ids=ids).logits)
        assert not torch.allclose(student(input_ids=ids).logits, teacher(input_ids=ids).logits)
        # Each layer has its own place in the cache.
        told = generation.generate(student, [list(range(3, 30))], {999}, 5, 1)[0].tokens
        whole = list(range(3, 30))
        for _ in range(5):
            whole.append(int(student(input_ids=torch.tensor([whole])).logits[0, -1].argmax()))
    assert told == whole[-5:]


def test_layers_that_are_not_there_are_refused(large):
    from transformers import AutoModelForCausalLM

    with pytest.raises(TuneyardError, match=r"layers \[0, 4\]: Gemma3ForCausalLM has 4 layers"):
        keep_layers(AutoModelForCausalLM.from_pretrained(large), [0, 4])


@pytest.mark.parametrize(
    ("objective", "more", "expected"),
    [
        ({"level": "sequence", "temperature": 3.0}, {}, "temperature belong to level logits"),
        ({"max_new_tokens": 3}, {}, "max_new_tokens belong to level sequence"),
        ({"hard_weight": 1.0}, {}, "less than 1"),
        ({"student": {"layers": [2, 1]}}, {}, "ascending order"),
        ({"student": {"layers": [0]}}, {"adapter": "lora"}, "adapter lora could be put on again"),
        ({"student": {"layers": [0]}}, {"adapter": "pfeiffer"}, "adapter pfeiffer could be put on again"),
        ({}, {"label_smoothing": 0.1}, "means nothing to distillation"),
    ],
)
def test_settings_that_mean_nothing_are_refused(objective, more, expected):
    with pytest.raises(ValidationError, match=expected):
        settings_for(objective, **more)


def test_a_student_of_some_layers_needs_only_its_teacher_named():
    objective = {"kind": "distillation", "teacher": "s3://models/large", "student": {"layers": [0, 2]}}
    config = TrainConfig(objective=objective)
    assert (config.base_model, config.adapter.kind) == ("s3://models/large", "full")
    assert config.external_uris() == ["s3://models/large"] * 2
    assert TrainConfig(**config.model_dump()) == config
    with pytest.raises(ValidationError, match="base_model"):
        TrainConfig(objective={"kind": "distillation", "teacher": "s3://models/large"})


@pytest.fixture
def ends(monkeypatch):
    """A random model hardly ever ends an answer: for it, a few more tokens do."""
    monkeypatch.setattr(chat, "end_ids", lambda tokenizer: frozenset({2, 39, 187, 256}))


def sequence(folder, teacher, **objective):
    settings = {"level": "sequence", "max_unanswered": 1.0, **objective}
    return opened(folder, teacher, settings_for(settings), adapt=False)


def test_a_student_learns_what_its_teacher_answers_and_never_a_cut_answer(
    tiny_causal, large, tmp_path, caplog, ends
):
    objective = sequence(tiny_causal, large, max_new_tokens=12)
    given = rows(24)
    teacher = objective._teacher
    learned, unused = objective.rewritten({"train": given, "eval": []}, tmp_path)
    kept = {row["id"]: row for row in learned["train"]}
    lost = {row["id"]: row for row in unused["train"]}
    assert (
        kept
        and lost
        and kept.keys() | lost.keys() == {row["id"] for row in given}
        and not kept.keys() & lost.keys()
    )
    stops, reasons = chat.end_ids(teacher.tokenizer), set()
    for row in given:
        ids = chat.prompt_ids(teacher.tokenizer, [{"role": "user", "content": row["prompt"]}])
        teacher.model.set_attn_implementation("eager")
        answer = generation.generate(teacher.model, [ids], stops, 12, 1)[0]
        text = teacher.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        if row["id"] in kept:
            assert answer.ended and kept[row["id"]] == {**row, "completion": text}
            assert objective.encode(kept[row["id"]]).answer == chat.answer_ids(objective.tokenizer, text)
        else:
            assert not (answer.ended and text)
            reasons.add(lost[row["id"]]["reason"])
            assert lost[row["id"]]["reason"] == ("empty" if answer.ended else "cut at max_new_tokens")
            assert lost[row["id"]]["origin"] == ORIGIN
    assert reasons == {"empty", "cut at max_new_tokens"}
    assert "have no answer of the teacher" in caplog.text
    (tmp_path / "ledger").mkdir()
    objective.leave(tmp_path / "ledger")
    noted = list(jsonl.read(tmp_path / "ledger" / "teacher_answers_train.jsonl"))
    assert [row["id"] for row in noted] == [row["id"] for row in given]
    assert {row["id"] for row in noted if row["used"]} == kept.keys()


def test_answers_are_asked_for_once_however_often_the_training_is_cut_off(
    tiny_causal, large, tmp_path, monkeypatch
):
    given = {"train": rows(6), "eval": rows(8)[6:]}
    first, _ = sequence(tiny_causal, large, max_new_tokens=12).rewritten(given, tmp_path)
    monkeypatch.setattr(generation, "generate", None)
    again, _ = sequence(tiny_causal, large, max_new_tokens=12).rewritten(given, tmp_path)
    assert first == again
    with pytest.raises(TypeError):  # another question has no answer yet
        sequence(tiny_causal, large, max_new_tokens=13).rewritten(given, tmp_path)


def test_a_teacher_that_ends_few_answers_stops_the_line(tiny_causal, large, tmp_path):
    with pytest.raises(StageStopped, match=r"of 24 prompts of train have no whole answer .* allowed 1%"):
        sequence(tiny_causal, large, max_new_tokens=2, max_unanswered=0.01).rewritten(
            {"train": rows(24)}, tmp_path
        )


def test_a_prompt_that_its_teacher_cannot_read_is_counted(tiny_causal, large, tmp_path, ends):
    objective = sequence(tiny_causal, large, max_new_tokens=12)
    from dataclasses import replace

    objective._teacher = replace(objective._teacher, window_tokens=20)
    _, unused = objective.rewritten({"train": rows(3)}, tmp_path)
    long = [row["id"] for row in unused["train"] if row["reason"] == "prompt too long"]
    assert "2" in long and all(row["tokens"] > 8 for row in unused["train"] if row["id"] in long)


def test_a_conversation_gets_another_last_answer(tiny_causal, large, tmp_path, ends):
    talk = [
        {"role": "user", "content": "rent?"},
        {"role": "assistant", "content": "pay it"},
        {"role": "user", "content": "profit?"},
        {"role": "assistant", "content": "12 mln"},
    ]
    given = [
        {
            "id": str(i),
            "origin": ORIGIN,
            "messages": [{"role": "user", "content": f"rent {i * i}?"}, *talk[1:]],
        }
        for i in range(12)
    ]
    objective = sequence(tiny_causal, large, max_new_tokens=30)
    learned, _ = objective.rewritten({"train": given}, tmp_path)
    assert learned["train"]
    for row in learned["train"]:
        assert row["messages"][1:3] == talk[1:3] and row["messages"][3]["content"] != "12 mln"
        encoded = objective.encode(row)
        assert encoded.spans == ()  # earlier answers are not the teacher's

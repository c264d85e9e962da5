"""Decoding together: the same tokens as transformers gives, alone or beside others."""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
from types import SimpleNamespace

import pytest

from components.shared import causal
from components.shared.drift import Window
from components.shared.errors import TuneyardError
from serving import decode, openai_api, sampling
from serving.answers import Job
from serving.causal import CausalModel
from serving.identity import Identity
from serving.openai_requests import CompletionRequest

PROMPTS = [
    "The contract is void",
    "根据刑法第二百六十四条，盗窃公私财物",
    "oil",
    "Profits rose by twelve percent in the third quarter. " * 3,
]


@pytest.fixture(scope="module")
def model_and_tokenizer(causal_folder):
    # float32: batched and single sums differ in the 7th digit there, far below the lead of the best token.
    return causal.open_folder(causal_folder(1), "float32")


@pytest.fixture
def served(model_and_tokenizer):
    model = CausalModel(Identity("tiny", "1", "d" * 64), *model_and_tokenizer, Window(None))
    yield model
    model.abort(10)


def ask(served, prompt, **settings):
    """Queue a job; returns (job, function that waits for its text and last piece)."""
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    facts = {"max_tokens": 24, "temperature": 0.0, "top_p": 1.0, "seed": None, "stops": ()} | settings
    job = Job(prompt=served.encode_text(prompt), emit=pieces.put, **facts)
    served.submit(job)

    def wait():
        text = ""
        while True:
            piece = pieces.get(timeout=30)
            text += piece.text
            if piece.last:
                return text, piece

    return job, wait


def reference_ids(model, tokenizer, prompt, max_tokens=24):
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, use_cache=True
    )
    return out[0, ids.shape[1] :].tolist()


def reference(model, tokenizer, prompt, max_tokens=24):
    return tokenizer.decode(reference_ids(model, tokenizer, prompt, max_tokens), skip_special_tokens=True)


def test_greedy_answers_equal_those_of_transformers(served, model_and_tokenizer):
    expected = [reference(*model_and_tokenizer, prompt) for prompt in PROMPTS]
    # Else the model repeats itself or answers alike to everything, and the comparison proves little.
    assert len(set(expected)) == len(PROMPTS) and all(len(set(text)) > 6 for text in expected)
    assert [ask(served, prompt)[1]()[0] for prompt in PROMPTS] == expected


def test_answers_do_not_depend_on_who_is_decoded_beside(served, model_and_tokenizer):
    # Different lengths, so that rows leave and others join while some are under way.
    lengths = [24, 3, 17, 9, 24, 1, 30, 12]
    asked = [(PROMPTS[i % 4], length) for i, length in enumerate(lengths)]
    waits = [ask(served, prompt, max_tokens=length)[1] for prompt, length in asked]
    together = [wait()[0] for wait in waits]
    assert together == [reference(*model_and_tokenizer, prompt, length) for prompt, length in asked]


def test_a_long_prompt_is_read_in_pieces_with_the_same_result(served, model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(decode, "PROMPT_PIECE_TOKENS", 7)
    other = ask(served, PROMPTS[0], max_tokens=30)[1]
    text, _ = ask(served, PROMPTS[3])[1]()
    assert text == reference(*model_and_tokenizer, PROMPTS[3])
    assert other()[0] == reference(*model_and_tokenizer, PROMPTS[0], 30)


def test_a_seed_gives_the_same_answer_alone_and_beside_others(served):
    alone = ask(served, PROMPTS[0], temperature=1.5, seed=11)[1]()[0]
    others = [ask(served, prompt, temperature=1.5, seed=n)[1] for n, prompt in enumerate(PROMPTS)]
    beside = ask(served, PROMPTS[0], temperature=1.5, seed=11)[1]()[0]
    texts = [wait()[0] for wait in others]
    assert beside == alone
    assert alone not in texts[:1]  # another seed, another answer


def test_a_cancelled_job_stops_at_the_next_token(model_and_tokenizer):
    generated = []
    model = CausalModel(Identity("tiny", "1", "d" * 64), *model_and_tokenizer, Window(None), generated.append)
    begun = threading.Event()
    job = Job(model.encode_text(PROMPTS[0]), 480, 0.0, 1.0, None, (), lambda piece: begun.set())
    model.submit(job)
    assert begun.wait(30)
    model.cancel(job)
    pause = threading.Event()
    while model.in_flight:
        pause.wait(0.01)
    model.abort(30)
    # Whole, it would be 480 tokens.
    assert 0 < sum(generated) < 400
    assert (model.in_flight, model.waiting, model.alive) == (0, 0, False)


def test_a_cancelled_job_that_waits_leaves_the_queue(served):
    jobs = [ask(served, prompt, max_tokens=60)[0] for prompt in PROMPTS * 6]
    assert served.waiting > 0
    for job in jobs:
        served.cancel(job)
    assert served.waiting == 0


def test_the_end_token_ends_the_answer_and_is_not_part_of_it(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    whole = reference_ids(model, tokenizer, PROMPTS[0])
    ends = copy.deepcopy(tokenizer)
    ends.eos_token = tokenizer.convert_ids_to_tokens(whole[7])
    at = whole.index(whole[7])
    served = CausalModel(Identity("tiny", "1", "d" * 64), model, ends, Window(None))
    text, last = ask(served, PROMPTS[0])[1]()
    served.abort(10)
    assert text == tokenizer.decode(whole[:at])
    assert (last.finish, last.tokens) == ("stop", at)


def test_accepted_jobs_are_finished_after_close_and_the_weights_are_freed(served):
    waits = [ask(served, prompt, max_tokens=40)[1] for prompt in PROMPTS]
    served.close()
    assert [wait()[1].finish for wait in waits] == ["length"] * 4
    served._worker.join(10)
    assert not served.alive
    assert served._model is None


def test_a_request_on_its_way_to_a_replaced_model_is_answered_by_the_new_one(served, model_and_tokenizer):
    old = CausalModel(Identity("tiny", "0", "c" * 64), *model_and_tokenizer, Window(None))
    old.close()
    found = iter([old, served])
    catalogue = SimpleNamespace(causal=lambda name, choice: next(found))
    request = SimpleNamespace(state=SimpleNamespace(), headers={})
    asked = CompletionRequest(model="tiny", prompt=PROMPTS[0], max_tokens=3, temperature=0)

    async def answered():
        answer = await openai_api.ask(
            catalogue, request, asked, PROMPTS[0], lambda model: served.encode_text(asked.prompt)
        )
        return [piece async for piece in answer.read()]

    pieces = asyncio.run(answered())
    assert (pieces[-1].finish, pieces[-1].tokens) == ("length", 3)
    assert request.state.served == served.identity


def test_a_stop_string_ends_the_answer_before_it(served):
    whole, _ = ask(served, PROMPTS[1])[1]()
    stop = whole[6:9]
    text, last = ask(served, PROMPTS[1], stops=[stop])[1]()
    assert text == whole[: whole.index(stop)]
    assert last.finish == "stop"


def test_logits_that_are_not_finite_fail_the_request_and_the_model_lives(served, model_and_tokenizer):
    import torch

    weight = model_and_tokenizer[0].model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        _, last = ask(served, PROMPTS[0])[1]()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert isinstance(last.error, FloatingPointError)
    assert ask(served, PROMPTS[0], max_tokens=2)[1]()[1].finish == "length"


def test_a_model_whose_rows_influence_each_other_is_refused(model_and_tokenizer, monkeypatch):
    model, _ = model_and_tokenizer
    real = decode.step

    def crossed(model, rows, tokens):
        logits, rows = real(model, rows, tokens)
        return logits.flip(0), rows

    monkeypatch.setattr(decode, "step", crossed)
    with pytest.raises(TuneyardError, match="rows of Gemma3ForCausalLM decoded together differ"):
        decode.verify_joins(model, ([5, 6, 7], [9, 10, 11, 12, 13]))


def test_nucleus_sampling_keeps_the_smallest_set_and_its_proportions():
    import torch

    logits = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))
    generator = torch.Generator().manual_seed(0)
    # 0.5 + 0.3 reaches 0.75, so the nucleus is tokens 1 and 2 with odds of 5 : 3.
    drawn = [sampling.choose(logits, 1.0, 0.75, generator) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    # Standard deviation of the share is sqrt(0.625 * 0.375 / 2000) = 0.011; four of them.
    assert abs(drawn.count(1) / 2000 - 0.625) < 0.044


def test_nucleus_sampling_looks_beyond_the_likeliest_when_they_do_not_suffice():
    import torch

    logits = torch.zeros(5000)
    generator = torch.Generator().manual_seed(0)
    drawn = {sampling.choose(logits, 1.0, 0.99, generator) for _ in range(3000)}
    # Of 5000 equally likely tokens the nucleus holds 4950; 3000 draws see about 2250 different ones.
    assert len(drawn) > 2000

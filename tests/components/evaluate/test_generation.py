from __future__ import annotations

import pytest

from components.evaluate.generation import generate
from tests.tiny import tiny_gemma

PROMPTS = [[5, 9, 7], list(range(4, 44)), [11] * 12, [30, 31, 32, 33, 34], [8]]


def one_by_one(model, prompt: list[int], end_id: int, limit: int) -> list[int]:
    """Greedy without batch, padding or cache: the whole text goes through the model for each token."""
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + limit:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == end_id:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model():
    # Sharp attention and a head of its own: with Gemma's usual ones a random model repeats its last token
    # whatever stands before it, and a wrong mask or position would not be seen.
    return tiny_gemma(48, initializer_range=0.3, tie_word_embeddings=False, query_pre_attn_scalar=1)


@pytest.mark.parametrize("per_device_batch_size", [1, 2, 5])
def test_batches_say_what_one_prompt_at_a_time_says(model, per_device_batch_size):
    # A token that the second answer holds ends the answers, so that they finish at different times.
    free = [one_by_one(model, prompt, -1, 12) for prompt in PROMPTS]
    end_id = free[1][4]
    expected = [one_by_one(model, prompt, end_id, 12) for prompt in PROMPTS]
    lengths = {len(answer) for answer in expected}
    assert all(len(set(answer)) > 3 for answer in free), "a model that repeats itself shows no fault"
    assert len(lengths) > 1, f"all answers are {lengths} long: the test would not see a batch shrink"
    found = generate(model, PROMPTS, {end_id}, 12, per_device_batch_size)
    assert [answer.tokens for answer in found] == expected
    assert [answer.ended for answer in found] == [len(answer) < 12 for answer in expected]


def test_each_answer_is_reported_and_timed(model):
    done: list[int] = []
    found = generate(model, PROMPTS, {-1}, 3, 2, done.append)
    assert sum(done) == len(PROMPTS)
    assert all(answer.seconds > 0 and len(answer.tokens) == 3 and not answer.ended for answer in found)

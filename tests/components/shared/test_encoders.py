"""Texts in a batch, and how long a text a model has positions for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from components.shared import encoders, prompts, window

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    model = AutoModel.from_pretrained(tiny_encoder).eval()
    return model, AutoTokenizer.from_pretrained(tiny_encoder)


def drawn(*lengths):
    return [torch.randint(5, 40, (length,)).tolist() for length in lengths]


def test_batches_of_many_lengths_have_few_widths(encoder):
    widths = {encoders.padded(*encoder, drawn(length, 3))["input_ids"].shape[1] for length in range(3, 65)}
    assert widths == {16, 32, 48, 64}


def test_a_wider_batch_says_the_same(encoder):
    model, tokenizer = encoder
    batch = drawn(7, 19)
    wide = encoders.padded(model, tokenizer, batch)
    narrow = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
    assert wide["input_ids"].shape[1] == 32
    with torch.no_grad():
        found = encoders.unit_pooled(model(**wide).last_hidden_state, wide["attention_mask"])
        expected = encoders.unit_pooled(model(**narrow).last_hidden_state, narrow["attention_mask"])
    # float32: the order of sums may differ with the width, nothing else.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left_is_not_asked_where(encoder, tiny_encoder):
    """What is read at a token (a tag, a hidden word) counts from the left."""
    other = AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left")
    batch = drawn(7, 19)
    found, expected = (encoders.padded(encoder[0], each, batch) for each in (other, encoder[1]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["input_ids"][0, :7].tolist() == batch[0]


def test_a_batch_is_not_made_wider_than_the_model(encoder):
    model = BertModel(BertConfig(**SIZES))
    assert encoders.padded(model, encoder[1], drawn(35))["input_ids"].shape[1] == 40


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BertModel(BertConfig(**SIZES)), 40),
        (RobertaModel(RobertaConfig(**SIZES)), 38),
        (MPNetModel(MPNetConfig(**SIZES)), 38),
    ],
    ids=["bert", "roberta", "mpnet"],
)
def test_the_window_is_as_long_as_there_are_positions(model, expected):
    assert window.of_model(model) == expected
    ids = torch.full((1, expected), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    ids = torch.full((1, expected + 1), 5)
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_model_that_names_no_limit_has_none():
    bare = torch.nn.Linear(1, 1)
    bare.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert window.of_model(bare) is None


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p_tuning_v2"])
def test_a_soft_prompt_has_its_place_in_the_window(encoder, kind):
    model = BertModel(BertConfig(**SIZES)).eval()
    prompts.add(model, kind, 4)
    batch = drawn(34, 36)  # with the four the longest fills the 40 positions; rounded up it would not fit
    inputs = encoders.padded(model, encoder[1], batch)
    assert inputs["input_ids"].shape[1] == 36
    model(**inputs)


def test_relative_positions_are_no_window():
    """The number says how far they were trained apart, not where a text must end."""
    sizes = {name: SIZES[name] for name in SIZES if name != "pad_token_id"}
    settings = DebertaV2Config(
        **sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    )
    model = DebertaV2Model(settings).eval()
    assert window.of_model(model) is None
    ids = torch.full((1, 90), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))

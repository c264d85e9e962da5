"""Spans become tags and come back; the loss is that of transformers; what cannot be said is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.shared import tagging
from components.shared.causal import IGNORED
from components.shared.tagging import Span
from components.train.config import TrainConfig
from components.train.data import fit_lengths
from components.train.objectives.token_classification import TokenClassification

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}
ENGLISH = "The lessee Acme Holdings shall pay the rent to Globex, within the agreed time limit."
CHINESE = "被告人黄某某在嵊州市窃得vivo牌手机2只，合同自成立时生效。"


def example(text, *entities):
    spans = []
    for words, label in entities:
        start = text.index(words)
        spans.append({"start": start, "end": start + len(words), "label": label})
    return {"id": text, "origin": ORIGIN, "text": text, "entities": spans}


ROWS = [
    example(ENGLISH, ("Acme Holdings", "PARTY"), ("Globex", "PARTY"), ("the rent", "THING")),
    example(CHINESE, ("黄某某", "PARTY"), ("嵊州市", "PLACE"), ("vivo牌手机2只", "THING")),
]


@pytest.fixture(params=["word pieces", "bytes"])
def tokenizer(request, tiny_encoder, tiny_tokenizer):
    """BERT's word pieces (a Chinese character is a word) and byte-level BPE (a sentence is one, of bytes)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_encoder) if request.param == "word pieces" else tiny_tokenizer


def words_of(tokenizer, text):
    return tagging.words(text, tokenizer(text, return_offsets_mapping=True)["offset_mapping"])


def test_words_are_those_a_reader_sees(tokenizer):
    found = [ENGLISH[w.start : w.end] for w in words_of(tokenizer, ENGLISH)]
    assert found == ENGLISH.replace(",", " ,").replace(".", " .").split()
    found = [CHINESE[w.start : w.end] for w in words_of(tokenizer, CHINESE)]
    assert found == [*"被告人黄某某在嵊州市窃得", "vivo", *"牌手机", "2", *"只，合同自成立时生效。"]


@pytest.mark.parametrize("row", ROWS)
def test_spans_come_back_from_their_tags(tokenizer, row):
    words, spans = words_of(tokenizer, row["text"]), tagging.spans_of(row)
    named, said = tagging.tags(words, spans)
    assert None not in named and len(said) == len(spans)
    assert tagging.spans(words, named) == spans


@given(st.lists(st.sampled_from("ABC "), min_size=1, max_size=40), st.data())
@settings(max_examples=60)
def test_any_spans_over_words_come_back(letters, data):
    """Also neighbours of one label, which only B- keeps apart."""
    text = "".join(letters)
    offsets = [(i, i + 1) for i in range(len(text))]
    words = tagging.words(text, offsets)
    edges = data.draw(st.lists(st.integers(0, len(words)), max_size=8, unique=True).map(sorted))
    spans = [
        Span(words[a].start, words[b - 1].end, data.draw(st.sampled_from(["x", "y"])))
        for a, b in zip(edges[::2], edges[1::2], strict=False)
    ]
    named, said = tagging.tags(words, spans)
    assert len(said) == len(spans) and tagging.spans(words, named) == spans


def test_tags_are_read_as_conlleval_reads_them():
    words = [tagging.Word(i, i, i, i + 1) for i in range(7)]
    read = tagging.spans(words, ["I-x", "I-x", "B-x", "I-y", "O", "I-y", "B-y"])
    assert read == [Span(0, 2, "x"), Span(2, 3, "x"), Span(3, 4, "y"), Span(5, 6, "y"), Span(6, 7, "y")]


def test_loss_is_that_of_transformers_over_the_first_token_of_each_word(tiny_encoder):
    torch.manual_seed(0)
    made = TokenClassification(tiny_encoder, ["PARTY", "PLACE", "THING"], 0.0)
    assert made.labels == ["O", *(f"{b}-{name}" for name in ("PARTY", "PLACE", "THING") for b in "BI")]
    encoded = [made.encode(row) for row in ROWS]
    batch = made.tokenizer([row["text"] for row in ROWS], return_tensors="pt", padding=True)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for index, row in enumerate(ROWS):
        before = None
        offsets = made.tokenizer(row["text"], return_offsets_mapping=True)["offset_mapping"]
        # BERT's own idea of a word agrees with ours on these texts.
        for token, word in enumerate(batch.word_ids(index)):
            if word is None or word == before:
                continue
            before, start = word, offsets[token][0]
            tag = "O"
            for entity in row["entities"]:
                if entity["start"] <= start < entity["end"]:
                    tag = f"{'B' if start == entity['start'] else 'I'}-{entity['label']}"
            labels[index, token] = made.labels.index(tag)
    with torch.no_grad():
        theirs = made.model(**batch, labels=labels).loss
        ours = made.summed_loss(encoded, 0.0)
    terms = sum(map(made.terms, encoded))
    assert terms == int((labels != IGNORED).sum())
    assert float(ours) / terms == pytest.approx(float(theirs), rel=1e-5)


def test_an_entity_that_ends_within_a_word_teaches_nothing_and_is_counted(tiny_encoder, caplog):
    made = TokenClassification(tiny_encoder, ["PARTY"], 0.0)
    row = {**example(ENGLISH, ("Acme Holdings", "PARTY"), ("Globex", "PARTY"))}
    row["entities"][1]["end"] -= 2  # Glob
    whole = made.encode(example(ENGLISH, ("Acme Holdings", "PARTY")))
    encoded = made.encode(row)
    assert made.terms(encoded) == made.terms(whole) - 1 and len(encoded.entities) == 1
    assert made.account([row], [encoded]) == {"entities": 2, "entities_lost": 1}
    assert "1 of 2 entities are lost" in caplog.text


def test_entities_beyond_the_cut_are_counted_and_the_one_it_goes_through_teaches_nothing(tiny_encoder):
    made = TokenClassification(tiny_encoder, ["PARTY", "PLACE", "THING"], 0.0)
    encoded = made.encode(ROWS[1])
    first, last = encoded.entities[1]  # 嵊州市
    limit = last + 1  # its last token gives way to the special one that closes the text
    config = TrainConfig(
        objective="token-classification",
        base_model="tiny",
        max_length=limit,
        over_length="truncate_prompt",
        max_over_length=1,
    )
    (kept,), ledger = fit_lengths([ROWS[1]], made.encode, made.shorten, config)
    assert len(kept) == len(kept.tags) == limit and ledger.counts == {"cut": 1}
    assert kept.ids[-1] == encoded.ids[-1] and kept.ids[:-1] == encoded.ids[: limit - 1]
    assert set(kept.tags[first:]) == {IGNORED} and kept.tags[:first] == encoded.tags[:first]
    assert made.account([ROWS[1]], [kept]) == {"entities": 3, "entities_lost": 2}


def test_a_label_that_train_has_not_is_named_and_not_judged(tiny_encoder, caplog):
    made = TokenClassification(tiny_encoder, ["PARTY"], 0.0)
    assert made.usable(ROWS) == []
    assert "entity labels ['PLACE', 'THING'] occur in eval and not in train" in caplog.text

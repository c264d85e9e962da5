"""Text in pieces: the pieces add up to the whole, without half characters or anything after a stop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.assembly import Assembly


def pieces(tokenizer, ids, stops=()):
    assembly = Assembly(tokenizer, stops)
    sent = []
    for token in ids:
        sent.append(assembly.push(token))
        if assembly.stopped:
            return sent
    return [*sent, assembly.finish()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_pieces_add_up_to_the_decoded_text_without_half_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sent = pieces(tokenizer, ids)
    assert "".join(sent) == tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in sent)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab。法", max_size=40),
    stops=st.lists(st.text(alphabet="ab。法", min_size=1, max_size=3), max_size=3),
)
def test_nothing_of_a_stop_string_is_sent(tokenizer, text, stops):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [text.index(stop) for stop in stops if stop in text]
    sent = "".join(pieces(tokenizer, ids, stops))
    # A stop that ends earlier wins over one that begins earlier but ends later: it is seen first.
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert sent == text if not found else len(sent) >= min(found)
    if len(found) == 1:
        assert sent == text[: found[0]]


def test_half_a_character_at_the_end_is_not_swallowed(tokenizer):
    ids = tokenizer("法", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=False)["input_ids"]
    alphabet_only = [i for i in ids]
    sent = pieces(tokenizer, [*whole, *alphabet_only[:1]])
    assert "".join(sent) == tokenizer.decode([*whole, *alphabet_only[:1]])

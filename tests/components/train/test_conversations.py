"""Conversations: every answer carries loss and nothing else, token by token as TRL marks them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.shared import causal, chat
from components.shared.encoded import Encoded, cut_prompt, shorten
from components.shared.errors import TuneyardError
from components.train import selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.base import choose_attention
from components.train.objectives.config import SftObjective
from components.train.objectives.sft import Sft

TALK = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "When is the rent due?"},
    {"role": "assistant", "content": "根据合同, within the agreed time limit."},
    {"role": "user", "content": "And the deposit?"},
    {"role": "assistant", "content": "In the first quarter."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "合同自成立时生效。"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_statute",
            "description": "Finds a statute.",
            "parameters": {"type": "object", "properties": {"topic": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "find_statute", "arguments": {"topic": "租"}}}],
}
WITH_TOOLS = [
    {"role": "user", "content": "Which statute covers rent?"},
    CALL,
    {"role": "tool", "content": "第七百二十二条"},
    {"role": "assistant", "content": "Article 722."},
]


@pytest.fixture
def tokenizer_of(tiny_tokenizer):
    """A tokenizer with the tokens and the training template of a family, as TRL ships it."""
    import copy

    import trl

    def make(family, *special):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        folder = Path(trl.__file__).parent / "chat_templates"
        tokenizer.chat_template = (folder / f"{family}_training.jinja").read_text()
        return tokenizer

    return make


def marked(tokenizer, messages, tools=None):
    """Token ids, and those that `{% generation %}` marks: what TRL's assistant_only_loss trains on."""
    found = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize(
    ("family", "special", "talk", "tools"),
    [
        ("gemma3", ("<start_of_turn>", "<end_of_turn>"), TALK, None),
        ("qwen2_5", ("<|im_start|>", "<|im_end|>"), TALK, None),
        ("qwen2_5", ("<|im_start|>", "<|im_end|>"), WITH_TOOLS, TOOLS),
    ],
)
def test_the_tokens_with_loss_are_those_of_trl(tokenizer_of, family, special, talk, tools):
    tokenizer = tokenizer_of(family, *special)
    ours = causal.encode(tokenizer, {"messages": talk, "tools": tools}, "all")
    ids, mask = marked(tokenizer, talk, tools)
    whole = [*ours.prompt, *ours.answer]
    # The template writes a line feed after the token that ends a turn; nobody generates it.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert whole + newline == ids
    ends = {i for i, token in enumerate(ids) if token == chat.end_id(tokenizer)}
    expected = [
        at
        for at, carries in enumerate(mask)
        # and Qwen's marks begin with the line feed of the header, which the prompt gives
        if carries and at - 1 not in ends and not (family == "qwen2_5" and not mask[at - 1])
    ]
    assert ours.places == expected
    assert ours.terms == len(expected) == len(ours.targets)
    assert [whole[at] for at in ours.places] == ours.targets


def test_the_loss_is_that_of_transformers_on_labels_made_of_the_turns(tiny_causal):
    torch.manual_seed(0)
    sft = Sft(tiny_causal, "float32")
    encoded = [sft.encode({"messages": TALK}), sft.encode({"messages": TALK[:3]})]
    said = [sft.tokenizer.decode(e.targets, skip_special_tokens=True) for e in encoded]
    turns = [m["content"] for m in TALK if m["role"] == "assistant"]
    assert said == ["".join(turns), turns[0]]
    nats = 0.0
    for e in encoded:
        labels = torch.full((1, len(e)), -100)
        labels[0, e.places] = torch.tensor(e.targets)
        ids = torch.tensor([[*e.prompt, *e.answer]])
        with torch.inference_mode():
            nats += float(sft.model(input_ids=ids, labels=labels).loss) * e.terms
    choose_attention(sft, 512)
    with torch.inference_mode():
        assert float(sft.summed_loss(encoded, 0.0)) == pytest.approx(nats, rel=1e-5)
    assert sum(map(sft.terms, encoded)) == sum(e.terms for e in encoded)
    assert sum(causal.answer_nats(sft.model, encoded)) == pytest.approx(nats, rel=1e-5)


def test_the_last_answer_alone_where_that_is_asked(tiny_causal):
    last = Sft(tiny_causal, "float32", None, SftObjective(kind="sft", loss_on="last"))
    every = Sft(tiny_causal, "float32")
    one, other = last.encode({"messages": TALK}), every.encode({"messages": TALK})
    assert one.spans == () and one.targets == one.answer == other.answer
    assert (one.prompt, len(other.spans)) == (other.prompt, 2)


def test_the_self_check_holds_for_conversations(tiny_causal):
    sft = Sft(tiny_causal, "float32")
    choose_attention(sft, 512)
    apply_adapter(sft, TrainConfig(objective="sft", base_model="tiny", adapter="full"))
    rows = [{"messages": TALK}, {"messages": TALK[:5]}, {"messages": TALK[:3]}]
    found = selfcheck.check(sft, [sft.encode(row) for row in rows], rows, "float32")
    assert max(found.values()) < 1e-4


def test_a_template_that_rewrites_an_earlier_answer_is_refused(tiny_causal):
    sft = Sft(tiny_causal, "float32")
    whole = sft.tokenizer.chat_template
    sft.tokenizer.chat_template = whole.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:9] }}",
    )
    assert sft.tokenizer.chat_template != whole
    with pytest.raises(TuneyardError, match=r"message 2 of a conversation(.|\n)*once (.|\n)*loss_on: last"):
        sft.encode({"messages": TALK})


def test_tools_that_a_template_does_not_know_are_refused(tiny_causal):
    sft = Sft(tiny_causal, "float32")
    with pytest.raises(TuneyardError, match="does not write the tools"):
        sft.encode({"messages": WITH_TOOLS, "tools": TOOLS})
    assert "leaves out 'find_statute'" in sft.template_faults([{"messages": WITH_TOOLS[:2]}])[0]


@given(
    st.lists(st.integers(0, 5), min_size=4, max_size=40),
    st.integers(1, 50),
    st.sampled_from([None, 1]),
)
def test_a_cut_prompt_keeps_whole_answers_where_they_are(tail, max_length, bos_id):
    prompt = [1, *range(10, 10 + len(tail))]
    ends = sorted({1 + at for at, kind in enumerate(tail) if kind == 0} | {1, len(prompt)})
    spans = tuple((a, b) for a, b in itertools.pairwise(ends) if (a + b) % 2)
    whole = Encoded(prompt, [7, 8], spans)
    short = shorten(whole, max_length, bos_id)
    if max_length < 3:
        assert short is None
        return
    assert short.prompt == cut_prompt(prompt, max_length - 2, bos_id) and short.answer == [7, 8]
    kept = [short.prompt[a:b] for a, b in short.spans]
    assert all(a > 0 for a, _ in short.spans)
    assert kept == [prompt[a:b] for a, b in spans][len(spans) - len(kept) :]
    # One that is still there whole, behind another token, was not forgotten.
    lost = [prompt[a:b] for a, b in spans][: len(spans) - len(kept)]
    assert not any(set(turn) <= set(short.prompt[1:]) for turn in lost)


THOUGHT = {"prompt": "12 - 3?", "reasoning": "Three from twelve leaves nine.", "completion": "nine"}


def test_reasoning_stands_before_the_answer_and_carries_loss_or_not(tiny_causal):
    with_loss = Sft(tiny_causal, "float32").encode(THOUGHT)
    context = Sft(tiny_causal, "float32", None, SftObjective(kind="sft", loss_on_reasoning=False))
    without = context.encode(THOUGHT)
    decode = context.tokenizer.decode
    assert decode(with_loss.answer[:-1]) == "Three from twelve leaves nine.\nnine"
    assert decode(without.answer[:-1]) == "nine"
    assert [*without.prompt, *without.answer] == [*with_loss.prompt, *with_loss.answer]
    assert context.template_faults([THOUGHT]) == []


def test_reasoning_goes_where_the_template_has_a_place(tokenizer_of):
    tokenizer = tokenizer_of("qwen3", "<|im_start|>", "<|im_end|>")
    encoded = causal.encode(tokenizer, THOUGHT)
    assert (
        tokenizer.decode(encoded.answer)
        == "<think>\nThree from twelve leaves nine.\n</think>\n\nnine<|im_end|>"
    )
    context = causal.encode(tokenizer, THOUGHT, "all", loss_on_reasoning=False)
    assert tokenizer.decode(context.answer) == "nine<|im_end|>"
    assert chat.fault(tokenizer, chat.messages(tokenizer, THOUGHT)) == ""
    tokenizer.chat_template = tokenizer.chat_template.replace("reasoning_content.strip('\\n')", "''")
    assert "leaves out 'Three from" in chat.fault(tokenizer, chat.messages(tokenizer, THOUGHT))

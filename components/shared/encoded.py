"""An example of a causal language model as token ids, and which of them carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.shared import batches, chat


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: what the model is given, and what it must answer.

    Args:
        prompt: what it is given.
        answer: what it must answer; each of these tokens carries loss.
        spans: (start, end) of the prompt's tokens that carry loss too, ascending: the earlier answers of a
            conversation. None starts at 0, which nothing predicts.
    """

    prompt: list[int]
    answer: list[int]
    spans: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def terms(self) -> int:
        """How many tokens carry loss."""
        return sum(end - start for start, end in self.spans) + len(self.answer)

    @property
    def places(self) -> list[int]:
        """Where the tokens that carry loss stand, ascending."""
        earlier = [at for start, end in self.spans for at in range(start, end)]
        return [*earlier, *range(len(self.prompt), len(self))]

    @property
    def targets(self) -> list[int]:
        """The tokens that carry loss, in order."""
        return [*(token for start, end in self.spans for token in self.prompt[start:end]), *self.answer]


def encode(
    tokenizer: Any,
    example: Mapping[str, Any],
    loss_on: Literal["all", "last"] = "last",
    loss_on_reasoning: bool = True,
) -> Encoded:
    """Token ids of a prompt-completion or conversational example; the answer is its last message.

    Args:
        tokenizer: with the template.
        example: with `tools` or `reasoning`, or without.
        loss_on: `all`: earlier answers of the conversation carry loss too.
        loss_on_reasoning: whether `reasoning` belongs to the answer, else to the prompt.

    Raises:
        TuneyardError: the template writes an earlier answer in such a way that it cannot carry loss.
    """
    messages, tools = chat.messages(tokenizer, example), example.get("tools")
    text = chat.answer_text(tokenizer, messages, tools)
    answer = chat.answer_ids(tokenizer, text)
    if loss_on == "all":
        prompt, spans = chat.prompt_with_answers(tokenizer, messages[:-1], tools)
    else:
        prompt, spans = chat.prompt_ids(tokenizer, messages[:-1], tools), ()
    if example.get("reasoning") and not loss_on_reasoning:
        _, ((start, _),) = chat.located(tokenizer, text, [(text.rindex(example["completion"]), len(text))])
        prompt, answer = [*prompt, *answer[:start]], answer[start:]
    return Encoded(prompt, answer, spans)


def encode_all(
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    loss_on: Literal["all", "last"] = "last",
    loss_on_reasoning: bool = True,
) -> Iterator[Encoded]:
    """`encode` of many examples; arguments are the same.

    Prompts and answers go through the tokenizer together, but for those examples where what carries loss has
    to be found in the text (tools, reasoning, conversations).
    """
    plain = [not any(example.get(n) for n in ("messages", "tools", "reasoning")) for example in examples]

    def texts() -> Iterator[str]:
        for example, alone in zip(examples, plain, strict=True):
            if alone:
                *asked, answer = chat.messages(tokenizer, example)
                yield chat.render(tokenizer, asked, asked=True)
                yield str(answer["content"])

    ids, end_id = batches.token_ids(tokenizer, texts()), chat.end_id(tokenizer)
    for example, alone in zip(examples, plain, strict=True):
        if alone:
            prompt, answer = next(ids), next(ids)
            yield Encoded(prompt, [*answer, end_id])
        else:
            yield encode(tokenizer, example, loss_on, loss_on_reasoning)


def shorten(encoded: Encoded, max_length: int, bos_id: int | None) -> Encoded | None:
    """The example with its prompt cut from the left (`cut_prompt`); None where its answer alone is too long.

    An earlier answer of which a part would go keeps what is left of it as context, without loss.
    """
    room = max_length - len(encoded.answer)
    if room < 1:
        return None
    prompt = cut_prompt(encoded.prompt, room, bos_id)
    gone = len(encoded.prompt) - len(prompt)
    # 0 is the beginning-of-sequence token, or one that nothing predicts any more.
    spans = tuple((start - gone, end - gone) for start, end in encoded.spans if start - gone > 0)
    return Encoded(prompt, encoded.answer, spans)


def cut_prompt(prompt: Sequence[int], room: int, bos_id: int | None) -> list[int]:
    """The end of a prompt in `room` tokens (one at least), behind its beginning-of-sequence token if any.

    A model that always saw that token first answers badly without it.
    """
    if len(prompt) <= room:
        return list(prompt)
    head = list(prompt[:1]) if room > 1 and prompt[0] == bos_id else []
    return [*head, *prompt[len(prompt) - room + len(head) :]]

"""One way from messages to token ids, used by training, evaluation and serving alike.

A model that was trained on one template and served with another answers badly and no metric shows it. So
the template is stored in the model's tokenizer files, everything renders through `prompt_ids`, and the
token ids of a probe are stored with the model (`probe`) and reproduced before it serves (`verify_probe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from components.shared.errors import TuneyardError

# For a base model without a template: no invented control tokens, whose embeddings the base never trained;
# each message on its own line, and the answer ends with the end-of-sequence token.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
_PROBE = [
    {"role": "system", "content": "Answer briefly. 请简要回答。"},
    {"role": "user", "content": "1 + 1 = ?"},
]


def prepare(tokenizer: Any) -> Any:
    """Give a tokenizer the plain template when it has none. Returns the same tokenizer."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids up to where the assistant's answer begins."""
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer, ended by the end-of-sequence token.

    Tokenised apart from the prompt: so the ids that carry loss are just the ids that the model must produce
    after `prompt_ids`, whatever a tokenizer would merge across the border.
    """
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], end_id(tokenizer)]


def fault(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """How a rendered conversation differs from its prompt followed by the very answer; '' where it does not.

    A template may trim an answer, drop part of it, or open the assistant's turn in one way when it asks for
    an answer and in another when it is given one; then what is trained is not what is served.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    answer = messages[-1]["content"]
    whole = render(list(messages))
    prompt = render(list(messages[:-1]), add_generation_prompt=True)
    if whole.startswith(prompt + answer):
        return ""
    wanted = prompt + answer
    at = next((i for i, (a, b) in enumerate(zip(whole, wanted, strict=False)) if a != b), len(whole))
    return (
        f"the chat template writes {whole[at : at + 20]!r} where prompt and answer have "
        f"{wanted[at : at + 20]!r} (character {at})"
    )


def end_id(tokenizer: Any) -> int:
    """The token that ends an answer: the turn's end where the template writes one, else end-of-sequence."""
    template = tokenizer.chat_template or ""
    for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        if token in template and tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id:
            return int(tokenizer.convert_tokens_to_ids(token))
    return int(tokenizer.eos_token_id)


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens at which generation stops, in service and when it is judged."""
    return frozenset({end_id(tokenizer), int(tokenizer.eos_token_id)})


def probe(tokenizer: Any) -> dict[str, Any]:
    """Messages and their token ids, to be stored with a model."""
    return {"messages": _PROBE, "token_ids": prompt_ids(tokenizer, _PROBE), "end_id": end_id(tokenizer)}


def verify_probe(tokenizer: Any, stored: Mapping[str, Any], where: str) -> None:
    """Check that this tokenizer renders the probe as the training did.

    Raises:
        TuneyardError: it does not; shows the first difference.
    """
    now = prompt_ids(tokenizer, stored["messages"])
    then = list(stored["token_ids"])
    if now == then and end_id(tokenizer) == stored["end_id"]:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b), min(len(now), len(then))
    )
    raise TuneyardError(
        f"{where}: the chat template gives other token ids than in training, first at {at}: "
        f"{now[at : at + 3]} instead of {then[at : at + 3]}",
        "serve it with the tokenizer files and the transformers version it was trained with",
    )

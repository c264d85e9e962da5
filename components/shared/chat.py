"""One way from messages to token ids, used by training, evaluation and serving alike.

A model that was trained on one template and served with another answers badly and no metric shows it. So
the template is stored in the model's tokenizer files, everything renders through `prompt_ids`, and the
token ids of a probe are stored with the model (`probe`) and reproduced before it serves (`verify_probe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.shared import examples
from components.shared.errors import TuneyardError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

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


def messages(tokenizer: Any, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An example as messages; `reasoning` where the template has a place for it, else before the answer."""
    found: list[dict[str, Any]] = list(examples.messages(example))
    reasoning = example.get("reasoning")
    if not reasoning:
        return found
    answer = found[-1]
    placed = "reasoning_content" in (tokenizer.chat_template or "")
    thought = {"reasoning_content": reasoning} if placed else {"content": f"{reasoning}\n{answer['content']}"}
    return [*found[:-1], answer | thought]


def render(tokenizer: Any, messages: Messages, tools: Tools = None, asked: bool = False) -> str:
    """Messages as the template writes them.

    Args:
        tokenizer: with the template.
        messages: the conversation.
        tools: schemas of what the assistant may call.
        asked: whether the assistant's turn is opened at the end.
    """
    offered = {"tools": list(tools)} if tools else {}
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked, **offered)
    )


def prompt_ids(tokenizer: Any, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids up to where the assistant's answer begins."""
    rendered = render(tokenizer, messages, tools, asked=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer, ended by the end-of-sequence token.

    Tokenised apart from the prompt: so the ids that carry loss are just the ids that the model must produce
    after `prompt_ids`, whatever a tokenizer would merge across the border.
    """
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], end_id(tokenizer)]


def answer_text(tokenizer: Any, messages: Messages, tools: Tools = None) -> str:
    """What the assistant must write as last message: its content, or all that the template makes of it."""
    answer = messages[-1]
    if not (answer.get("tool_calls") or answer.get("reasoning_content")):
        return str(answer["content"])
    before = render(tokenizer, messages[:-1], tools, asked=True)
    whole = render(tokenizer, messages, tools)
    return whole[len(before) : _turn_end(tokenizer, whole, len(before))[0]]


def _turn_end(tokenizer: Any, rendered: str, start: int) -> tuple[int, int]:
    """Where the text of the last turn of a rendering ends, and where the token that ends it does."""
    token = tokenizer.convert_ids_to_tokens(end_id(tokenizer))
    at = rendered.rfind(token, start)
    return (at, at + len(token)) if at >= 0 else (len(rendered.rstrip()),) * 2


def prompt_with_answers(
    tokenizer: Any, messages: Messages, tools: Tools = None
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """`prompt_ids`, and the (start, end) of the tokens that the assistant's earlier turns must write.

    A turn ends with the token that ends it. One before any word of the user, a greeting, answers nothing.

    Raises:
        TuneyardError: the template writes a turn otherwise while it is asked for than afterwards.
    """
    whole = render(tokenizer, messages, tools, asked=True)
    ranges = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or not any(m["role"] == "user" for m in messages[:at]):
            continue
        upto = render(tokenizer, messages[: at + 1], tools)
        found = fault(tokenizer, messages[: at + 1], tools)
        if not found and not whole.startswith(upto):
            found = "the chat template writes it otherwise once the conversation goes on"
        if found:
            raise TuneyardError(
                f"message {at} of a conversation, {str(message.get('content'))[:40]!r}: {found}",
                "set train.objective: {kind: sft, loss_on: last}, or use a base with another template",
            )
        start = len(render(tokenizer, messages[:at], tools, asked=True))
        ranges.append((start, _turn_end(tokenizer, upto, start)[1]))
    return located(tokenizer, whole, ranges) if ranges else (prompt_ids(tokenizer, messages, tools), ())


def located(
    tokenizer: Any, text: str, ranges: Sequence[tuple[int, int]]
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Token ids of a text, and the tokens that stand for these ranges of its characters.

    A token across the border of a range belongs to it, but for the first token of all.

    Raises:
        TuneyardError: the tokenizer cannot say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise TuneyardError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand",
            "use a base with a tokenizer.json, or loss on the last answer alone",
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = found["offset_mapping"]
    places = []
    for start, end in ranges:
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > start)
        last = next((i for i, (begin, _) in enumerate(offsets) if begin >= end), len(offsets))
        places.append((max(first, 1), last))
    return list(found["input_ids"]), tuple(places)


def fault(tokenizer: Any, messages: Messages, tools: Tools = None) -> str:
    """How a rendered conversation differs from its prompt followed by the very answer; '' where it does not.

    A template may trim an answer, drop part of it (tools, what it calls, what it thought), or open the
    assistant's turn in one way when it asks for an answer and in another when it is given one; then what is
    trained is not what is served.
    """
    answer = messages[-1]
    whole = render(tokenizer, messages, tools)
    prompt = render(tokenizer, messages[:-1], tools, asked=True)
    called = [call["function"]["name"] for call in answer.get("tool_calls") or ()]
    thought = [answer["reasoning_content"]] if answer.get("reasoning_content") else []
    # Where there is more than content, what is around it is the template's own business.
    wanted = prompt if called or thought else prompt + answer["content"]
    if tools and render(tokenizer, messages[:-1], asked=True) == prompt:
        return "the chat template does not write the tools"
    if whole.startswith(wanted):
        lost = [part for part in (*called, *thought, answer["content"]) if part not in whole[len(prompt) :]]
        return f"the chat template leaves out {lost[0][:40]!r}" if lost else ""
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

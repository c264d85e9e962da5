"""The fields of an example: each value as it was read, and normalised or the fault it has."""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from components.ingest.config import Normalise
from components.ingest.reading import Fault
from components.shared import examples

# Zero-width space, joiners and non-joiner between CJK, word joiner, byte order mark: invisible, and they make
# equal texts unequal. Tab and line feed are text.
_INVISIBLE = dict.fromkeys([0x200B, 0x2060, 0xFEFF, *(c for c in range(32) if c not in (9, 10, 13)), 127])
ROLES = ("system", "user", "assistant", "tool")
# Of a message of the role `tool`: whose result it is. Kept where a corpus has it.
_OF_RESULTS = ("name", "tool_call_id")


def normalise(text: str, how: Normalise) -> str:
    """Text under the stated choices; idempotent."""
    if how.newlines:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if how.controls:
        text = text.translate(_INVISIBLE)
    if how.unicode != "none":
        text = unicodedata.normalize(how.unicode, text)
    return text.strip() if how.trim else text


def _text(value: Any, name: str, how: Normalise) -> tuple[str, str | Fault]:
    """The value as it was, and normalised or a fault."""
    if value is None:
        return "", Fault("missing_field", name, "null")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name == "label":
        value = str(value)
    if not isinstance(value, str):
        return "", Fault("wrong_type", name, f"{type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return "", Fault("bad_encoding", name, str(error))
    return value, normalise(value, how)


def _messages(value: Any, how: Normalise) -> tuple[Any, Any]:
    if not isinstance(value, list) or not value:
        return None, Fault("wrong_type", "messages", "not a list of messages")
    cleaned = []
    for at, message in enumerate(value):
        place = f"messages[{at}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return None, Fault("wrong_type", place, f"needs a role out of {ROLES} and content")
        calls = _calls(message.get("tool_calls"), message["role"], place)
        if isinstance(calls, Fault):
            return None, calls
        # Who calls a tool may say nothing beside.
        said = "" if calls and message.get("content") is None else message.get("content")
        _, content = _text(said, f"{place}.content", how)
        if isinstance(content, Fault):
            return None, content
        known = {key: message[key] for key in _OF_RESULTS if isinstance(message.get(key), str)}
        cleaned.append(
            {"role": message["role"], "content": content}
            | (known if message["role"] == "tool" else {})
            | ({"tool_calls": calls} if calls else {})
        )
    return value, cleaned


def _calls(value: Any, role: str, place: str) -> list[dict[str, Any]] | Fault:
    """Calls of tools as {type, function: {name, arguments}}, the arguments as the object that they spell."""
    if value is None or value == []:
        return []
    if role != "assistant" or not isinstance(value, list):
        return Fault("wrong_type", f"{place}.tool_calls", "needs a list, in a message of the assistant")
    found = []
    for at, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        name, arguments = (
            function.get(k) if isinstance(function, dict) else None for k in ("name", "arguments")
        )
        if not isinstance(_parsed(arguments), dict) or not isinstance(name, str):
            what = f"needs a function with a name and arguments (an object); is {str(call)[:80]}"
            return Fault("wrong_type", f"{place}.tool_calls[{at}]", what)
        found.append({"type": "function", "function": {"name": name, "arguments": _parsed(arguments)}})
    return found


def _tools(value: Any) -> tuple[Any, Any]:
    """Schemas of tools as {type, function: {name, ...}}: a list, or text that spells one."""
    tools = _parsed(value)
    if not isinstance(tools, list):
        return value, Fault("wrong_type", "tools", "not a list of schemas")
    found = []
    for at, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f"needs a function with a name; is {str(tool)[:80]}"
            return value, Fault("wrong_type", f"tools[{at}]", what)
        found.append({"type": "function", "function": function})
    return value, found


def _parsed(value: Any) -> Any:
    """The value that text spells as JSON; another value, or text that spells none, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _number(value: Any, name: str) -> tuple[Any, Any]:
    """A finite number; text that spells one (a CSV column) is read as it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        return value, Fault("wrong_type", name, f"{str(value)[:40]!r} is no finite number")
    return value, number


def _spans(value: Any, before: str, after: str, how: Normalise) -> tuple[Any, Any]:
    """Entities as sorted {start, end, label}: given in characters of the text `before` normalisation."""
    if not isinstance(value, list):
        return value, Fault("wrong_type", "entities", "not a list of {start, end, label}")
    found: list[dict[str, Any]] = []
    for at, span in enumerate(value):
        if not _is_span(span, len(before)):
            wanted = f"needs a label and whole numbers 0 <= start < end <= {len(before)}"
            return value, Fault("bad_span", f"entities[{at}]", f"{wanted}; is {str(span)[:80]}")
        start, end = (_moved(span[edge], before, how) for edge in ("start", "end"))
        if after[start:end] != normalise(before[span["start"] : span["end"]], how):
            inside = before[span["start"] : span["end"]]
            what = f"normalisation joins {inside!r} with its neighbours, or trims it"
            return value, Fault("bad_span", f"entities[{at}]", what)
        found.append({"start": start, "end": end, "label": span["label"]})
    found.sort(key=lambda span: (span["start"], span["end"]))
    for one, other in itertools.pairwise(found):
        if other["start"] < one["end"]:
            return value, Fault("bad_span", "entities", f"{one} and {other} overlap")
    return value, found


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, dict) or not isinstance(span.get("label"), str) or not span["label"]:
        return False
    start, end = span.get("start"), span.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end <= length


def _moved(edge: int, before: str, how: Normalise) -> int:
    """Where a place of the text is after normalisation."""
    untrimmed = how.model_copy(update={"trim": False})
    lead = len(before) - len(before.lstrip()) if how.trim else 0
    return len(normalise(before[:edge], untrimmed)) - len(normalise(before[: min(lead, edge)], untrimmed))


def field_value(
    value: Any, name: str, how: Normalise, example: Mapping[str, Any], original: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(the value as it was, the value normalised or a fault) of one field.

    Args:
        value: of the column.
        name: of the field.
        how: see Normalise.
        example: the fields before it, normalised.
        original: those of them that normalisation changed, as they were.
    """
    match examples.NOT_TEXT.get(name):
        case "messages":
            return _messages(value, how)
        case "tools":
            return _tools(value)
        case "number":
            return _number(value, name)
        case "spans":
            return _spans(value, original.get("text", example["text"]), example["text"], how)
        case _:
            return _text(value, name, how)

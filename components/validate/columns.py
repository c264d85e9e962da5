"""Examples as the table that expectations are written against: their fields, and measures of each row.

A measure is a column that says about one row what only the whole corpus can tell (how many answers its
prompt has, for one), so that an ordinary expectation can bound it and point at rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from components.shared import examples as dataset
from components.shared import tagging
from components.validate import media_columns
from components.validate.media_columns import classes, distinct, folded

if TYPE_CHECKING:
    import pandas as pd

Rows = Sequence[Mapping[str, Any]]

# A pile of texts that end at exactly the same length is how an export with a column limit looks. Under 100
# characters equal lengths are common; a pile is 1% of a file, and three times as high as any of the ten
# lengths below it, which a corpus that happens to be even does not show.
_LIMIT_CHARACTERS = 100
_PILE_FRACTION = 0.01
_PILE_ROWS = 5
_PILE_TIMES = 3

# What is left of a web page: tags of layout, and entities that nobody resolved.
_MARKUP = re.compile(
    r"</?(?:p|br|div|span|a|img|table|tr|td|th|ul|ol|li|strong|em|b|i|u|font|h[1-6])(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>"
    r"|&(?:nbsp|lt|gt|amp|quot|ldquo|rdquo|#\d+);",
    re.IGNORECASE,
)


def origin(row: Mapping[str, Any]) -> str:
    """`file:line` of where an example (or a row in quarantine) was read."""
    place = row.get("origin", row)
    return f"{place.get('file', '?')}:{place.get('line', '?')}"


def text_columns(dataset_type: str) -> tuple[str, ...]:
    """The columns of a dataset type that hold prose, in reading order."""
    return {
        "prompt-completion": ("system", "prompt", "reasoning", "completion"),
        "conversational": ("prompt", "completion"),
        "language-modeling": ("text",),
        "prompt-only": ("system", "prompt"),
        "preference": ("system", "prompt", "chosen", "rejected"),
        "labelled-text": ("text",),
        "scored-text": ("text",),
        "tagged-text": ("text",),
        "text-pair": ("anchor", "positive", "negative"),
        "task-text": ("text",),
        "labelled-image": (),
        "transcribed-audio": ("text",),
    }[dataset_type]


def table(dataset_type: str, examples: Rows) -> pd.DataFrame:
    """One row for each example, in order, index 0..n-1.

    Columns: `id`, `part`, the dataset type's fields, its measures, and the columns that ingest kept (under
    their own names, or `extra.<name>` where that name is taken).
    """
    import pandas as pd

    columns: dict[str, list[Any]] = {
        "id": [row.get("id") for row in examples],
        "part": [row.get("origin", {}).get("part") for row in examples],
    }
    measured: dict[str, Callable[[Rows], dict[str, list[Any]]]] = {
        "labelled-text": _labelled,
        "prompt-completion": partial(_answered, dataset_type),
        "conversational": partial(_answered, dataset_type),
        "scored-text": _scored,
        "tagged-text": _tagged,
        "text-pair": _paired,
        "task-text": _tasked,
        "preference": _preferred,
        "labelled-image": media_columns.pictured,
        "transcribed-audio": media_columns.spoken,
    }
    columns |= measured.get(dataset_type, partial(_fields, dataset_type))(examples)
    for name in dict.fromkeys(name for row in examples for name in row.get("extra") or {}):
        free = name if name not in columns else f"extra.{name}"
        columns[free] = [(row.get("extra") or {}).get(name) for row in examples]
    # object: pandas' own string type would hide a value that is no string.
    return pd.DataFrame({name: pd.Series(values, dtype=_dtype(values)) for name, values in columns.items()})


def _dtype(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    return kinds.pop() if len(kinds) == 1 and kinds <= {int, float, bool} else object


def _answered(dataset_type: str, examples: Rows) -> dict[str, list[Any]]:
    if dataset_type == "conversational":
        columns = _conversations(examples)
        contexts = [json.dumps(_messages(row)[:-1], ensure_ascii=False, default=str) for row in examples]
    else:
        columns = _fields(dataset_type, examples)
        contexts = [
            json.dumps([row.get("system"), row.get("prompt")], ensure_ascii=False) for row in examples
        ]
    answers = [_text(answer) for answer in columns["completion"]]
    prompts = len(set(contexts))
    columns["answers_for_prompt"] = distinct(contexts, answers)
    columns["prompts_for_answer_fraction"] = [count / prompts for count in distinct(answers, contexts)]
    columns["completion_markup"] = [len(_MARKUP.findall(answer)) for answer in answers]
    columns["completion_at_limit"] = _at_limit(answers, examples)
    return columns


def _preferred(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("preference", examples)
    prompts = [json.dumps([row.get("system"), row.get("prompt")], ensure_ascii=False) for row in examples]
    chosen, rejected = ([_text(value) for value in columns[name]] for name in ("chosen", "rejected"))
    pairs = Counter(zip(prompts, chosen, rejected, strict=True))
    columns["opposite_verdicts"] = [
        pairs[prompt, worse, better] if better != worse else 0
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]
    columns["chosen_longer"] = [
        float(len(better) > len(worse)) + 0.5 * (len(better) == len(worse))
        for better, worse in zip(chosen, rejected, strict=True)
    ]
    columns["score_lead"] = [
        row["chosen_score"] - row["rejected_score"] if _both_scores(row) else None for row in examples
    ]
    columns["chosen_markup"] = [len(_MARKUP.findall(answer)) for answer in chosen]
    columns["chosen_at_limit"] = _at_limit(chosen, examples)
    return columns


def _both_scores(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), int | float) for name in ("chosen_score", "rejected_score"))


def _fields(dataset_type: str, examples: Rows) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in examples] for name in dataset.fields(dataset_type)}


def _conversations(examples: Rows) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"roles": [], "prompt": [], "completion": [], "empty_messages": []}
    for row in examples:
        messages = _messages(row)
        contents = [_text(message.get("content")) or _text(message.get("tool_calls")) for message in messages]
        roles = ["calls" if message.get("tool_calls") else message.get("role") for message in messages]
        columns["roles"].append(" ".join(map(str, roles)))
        columns["prompt"].append("\n".join(contents[:-1]))
        columns["completion"].append(contents[-1] if contents else "")
        columns["empty_messages"].append(sum(not content.strip() for content in contents))
    return columns


def _messages(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = row.get("messages")
    return [m if isinstance(m, Mapping) else {} for m in found] if isinstance(found, list) else []


def _labelled(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("labelled-text", examples)
    texts, labels = ([_text(value) for value in columns[name]] for name in ("text", "label"))
    columns |= classes(labels)
    columns["labels_for_text"] = distinct(texts, labels)
    columns["text_at_limit"] = _at_limit(texts, examples)
    return columns


def _scored(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("scored-text", examples)
    texts = [_text(value) for value in columns["text"]]
    scores = [value for value in columns["score"] if isinstance(value, int | float)]
    mean = sum(scores) / max(1, len(scores))
    deviation = (sum((score - mean) ** 2 for score in scores) / max(1, len(scores))) ** 0.5
    columns["scores_for_text"] = distinct(texts, [str(value) for value in columns["score"]])
    columns["score_deviations"] = [
        abs(value - mean) / deviation if deviation and isinstance(value, int | float) else 0.0
        for value in columns["score"]
    ]
    columns["text_at_limit"] = _at_limit(texts, examples)
    return columns


def _tagged(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("tagged-text", examples)
    texts = [_text(value) for value in columns["text"]]
    spans = [value if isinstance(value, list) else [] for value in columns["entities"]]
    counts = Counter(span["label"] for found in spans for span in found)
    columns["entities"] = [
        "; ".join(f"{span['label']}: {text[span['start'] : span['end']]}" for span in found)
        for text, found in zip(texts, spans, strict=True)
    ]
    columns["entity_count"] = [len(found) for found in spans]
    columns["entities_for_text"] = distinct(texts, [_text(found) for found in spans])
    # A row without entities has no rare label.
    most = max(counts.values(), default=0)
    columns["entity_label_examples"] = [
        min((counts[span["label"]] for span in found), default=most) for found in spans
    ]
    columns["entity_unmarked"] = [_unmarked(text, found) for text, found in zip(texts, spans, strict=True)]
    columns["text_at_limit"] = _at_limit(texts, examples)
    return columns


def _unmarked(text: str, spans: Sequence[Mapping[str, Any]]) -> int:
    """How many places of a text hold the text of one of its entities and touch none."""
    covered = [False] * len(text)
    for span in spans:
        covered[span["start"] : span["end"]] = [True] * (span["end"] - span["start"])
    found = 0
    for entity in {text[span["start"] : span["end"]] for span in spans}:
        for match in re.finditer(re.escape(entity), text):
            edges = (tagging.inside_word(text, at) for at in match.span())
            found += not any(covered[match.start() : match.end()]) and not any(edges)
    return found


def _paired(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("text-pair", examples)
    anchors, positives, negatives = (
        [_text(value) for value in columns[name]] for name in ("anchor", "positive", "negative")
    )
    many = len(set(anchors))
    columns["anchors_for_positive_fraction"] = [n / many for n in distinct(positives, anchors)]
    belongs = set(zip(anchors, positives, strict=True))
    columns["negative_belongs"] = [pair in belongs for pair in zip(anchors, negatives, strict=True)]
    columns["positive_at_limit"] = _at_limit(positives, examples)
    return columns


def _tasked(examples: Rows) -> dict[str, list[Any]]:
    columns = _fields("task-text", examples)
    tasks, texts, labels = ([_text(v) for v in columns[n]] for n in ("task", "text", "label"))
    counts = Counter(tasks)
    asked = [json.dumps(pair, ensure_ascii=False) for pair in zip(tasks, texts, strict=True)]
    spelled = [f"{task}\n{folded(label)}" for task, label in zip(tasks, labels, strict=True)]
    columns["labels_of_task"] = distinct(tasks, labels)
    columns["labels_for_text"] = distinct(asked, labels)
    columns["label_spellings"] = distinct(spelled, labels)
    columns["task_examples"] = [counts[task] for task in tasks]
    columns["text_at_limit"] = _at_limit(texts, examples)
    return columns


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _at_limit(texts: Sequence[str], examples: Rows) -> list[bool]:
    """For each row, whether its text ends where suspiciously many of its file end: at the file's longest."""
    files = [row.get("origin", {}).get("file", "") for row in examples]
    of_file: dict[str, list[str]] = defaultdict(list)
    for file, text in zip(files, texts, strict=True):
        of_file[file].append(text)
    limits = {file: _limit(found) for file, found in of_file.items()}
    return [len(text) == limits[file] for file, text in zip(files, texts, strict=True)]


def _limit(texts: list[str]) -> int | None:
    lengths = Counter(len(text) for text in set(texts))
    longest = max(lengths)
    below = max(lengths[longest - step] for step in range(1, 11))
    wanted = max(_PILE_ROWS, _PILE_FRACTION * len(texts), _PILE_TIMES * below)
    return longest if longest >= _LIMIT_CHARACTERS and lengths[longest] >= wanted else None

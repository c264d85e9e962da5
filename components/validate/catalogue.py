"""Which expectations there are and what each takes, without importing Great Expectations.

Its import costs seconds, too much for reading a pipeline file. But the package brings a JSON schema of most
of its expectations, so we read those of the installed version. The few without a schema are known by name
only, and Great Expectations itself judges their settings when the stage starts; so does it all of them
where the package is not installed beside the command.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# What a schema allows but the stage decides or has no use for.
_OURS = {
    "id",
    "batch_id",
    "result_format",
    "catch_exceptions",
    "rendered_content",
    "windows",
    "meta",
    "metadata",
}
_NEAR = 3
# The index of the schemas also says which work on a table in memory, but leaves out one that does.
SQL_ONLY = {
    "expect_column_values_to_match_like_pattern",
    "expect_column_values_to_match_like_pattern_list",
    "expect_column_values_to_not_match_like_pattern",
    "expect_column_values_to_not_match_like_pattern_list",
    "expect_query_results_to_match_comparison",
    "expect_table_row_count_to_equal_other_table",
    "unexpected_rows_expectation",
}
SEVERITIES = ("critical", "warning", "info")


@cache
def _schemas() -> Path | None:
    # find_spec of a top-level package finds its folder and runs none of its code.
    spec = importlib.util.find_spec("great_expectations")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "expectations" / "core" / "schemas"
    return folder if (folder / "index.json").is_file() else None


@cache
def known() -> dict[str, str | None]:
    """Expectation type -> its schema's file name, None for one without; empty without the package.

    Expectations that only speak SQL are left out: examples are no table of a database.
    """
    folder = _schemas()
    if folder is None:
        return {}
    index = json.loads((folder / "index.json").read_text())
    schemas = {n: e["schema_file"] for n, e in index["expectations"].items() if n not in SQL_ONLY}
    return {**schemas, **dict.fromkeys(index["documented_absent"])}


@cache
def _schema(file: str) -> dict[str, Any]:
    folder = _schemas()
    assert folder is not None
    return dict(json.loads((folder / file).read_text()))


def near(word: str, words: list[str]) -> str:
    """`; near: a, b` for error messages, empty when nothing is."""
    matches = difflib.get_close_matches(word, words, _NEAR, 0.6)
    return f" (near: {', '.join(matches)})" if matches else ""


def faults(expectation: Mapping[str, Any]) -> list[str]:
    """Everything wrong with an expectation of a pipeline file, one sentence each.

    Args:
        expectation: `type` and its keyword arguments.
    """
    kind = expectation.get("type")
    if not isinstance(kind, str):
        return ["has no type, e.g. type: expect_column_value_lengths_to_be_between"]
    arguments = {name: value for name, value in expectation.items() if name != "type"}
    found = []
    if arguments.pop("severity", "critical") not in SEVERITIES:
        found = [f"{kind}: severity is {expectation['severity']!r}, not one of {', '.join(SEVERITIES)}"]
    names = known()
    if names and kind not in names:
        return [f"unknown type {kind!r}{near(kind, list(names))}", *found]
    file = names.get(kind)
    return [*found, *_argument_faults(kind, _schema(file), arguments)] if file else found


def _argument_faults(kind: str, schema: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    allowed = {name: rule for name, rule in schema["properties"].items() if name not in _OURS}
    found = [
        f"{kind} has no {name!r}{near(name, list(allowed))}" for name in arguments if name not in allowed
    ]
    found += [f"{kind} needs {name!r}" for name in schema.get("required", []) if name not in arguments]
    for name, rule in allowed.items():
        if name in arguments and not _fits(arguments[name], rule, schema["definitions"]):
            found.append(f"{kind}: {name} is {arguments[name]!r}, not {_wanted(rule, schema['definitions'])}")
    return found


def _fits(value: Any, rule: dict[str, Any], definitions: dict[str, Any]) -> bool:
    import jsonschema

    # multipleOf belongs to a slider in their web page: the library takes mostly: 0.995.
    loose = {key: part for key, part in rule.items() if key != "multipleOf"}
    return bool(jsonschema.Draft7Validator({**loose, "definitions": definitions}).is_valid(value))


def _wanted(rule: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in rule:
        rule = definitions[rule["$ref"].rsplit("/", 1)[-1]]
    choices = rule.get("anyOf") or rule.get("allOf")
    if choices:
        return " or ".join(
            _wanted(choice, definitions) for choice in choices if choice.get("type") != "object"
        )
    if "enum" in rule:
        return " or ".join(map(repr, rule["enum"]))
    bounds = [f"{word} {rule[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in rule]
    return " ".join([str(rule.get("type", rule.get("title", "valid"))), *bounds])

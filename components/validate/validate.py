"""validate: hold the examples against expectations, and ingest's quarantine against its budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from components.shared import examples as dataset
from components.shared import jsonl
from components.shared.stage import Artifact, Context, Result
from components.validate import columns, distributions, judge, page, quarantine, suite
from components.validate.config import ValidateConfig

log = logging.getLogger("tuneyard.validate")

_ROWS_IN_MESSAGE = 3
_CHARACTERS_IN_MESSAGE = 100
_TODO = (
    "correct these rows at their source; or, if the data is meant to be so, state your own bound under "
    "validate.expectations (same type and column) or validate.budget"
)


def validate(config: ValidateConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Judge the examples; a failed expectation or an exceeded budget stops the line.

    Args:
        config: expectations and budget.
        inputs: `examples` and `quarantine` of ingest.
        context: where to write `report`: result.json and page.html.

    Raises:
        TuneyardError: the expectations cannot be used, or rows of ingest do not add up.
    """
    dataset_type = inputs["examples"].manifest.metadata["dataset_type"]
    examples = list(jsonl.read(inputs["examples"].path / "examples.jsonl"))
    documents = _documents(inputs["examples"])
    kept = len(examples) + len(documents)
    account = quarantine.account(inputs["quarantine"].path, kept, config.budget)
    result = report(dataset_type, examples, config.expectations, account, documents)
    folder = context.out / "report"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False, default=str), "utf-8"
    )
    (folder / "page.html").write_text(page.render(result), "utf-8")
    stop = faults(result)
    failed, warned = (_unmet(result, severity) for severity in ("fail", "warn"))
    for entry in warned:
        log.warning("%s", _headline(entry))
    metrics = {
        "rows": len(examples),
        "failed_expectations": len(failed),
        "warned_expectations": len(warned),
        "duplicates": result["duplicates"],
        "quarantined_fraction": account["fraction"],
    }
    return Result(
        kinds={"report": "report"},
        metrics={name: float(value) for name, value in metrics.items()},
        summary={"failed": [e["expectation"] for e in failed], "warned": [e["meaning"] for e in warned]},
        page=folder / "page.html",
        stop=_message(len(failed), stop, len(examples)) if stop else "",
        stop_todo=_TODO if stop else "",
    )


def report(
    dataset_type: str,
    examples: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    account: Mapping[str, Any],
    documents: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What result.json says: everything the page shows, and nothing that differs between equal runs.

    Args:
        dataset_type: of the examples.
        examples: rows of ingest.
        settings: expectations of the pipeline file.
        account: see quarantine.account.
        documents: of domain text, held against the suite of their own dataset type.
    """
    table = columns.table(dataset_type, examples)
    expectations = judge.merge(suite.of(dataset_type, table), judge.of_settings(settings, table))
    judged = judge.judge(table, expectations, [columns.origin(row) for row in examples])
    judged += _judged_documents(documents)
    return {
        "success": all(e["success"] or e["severity"] == "warn" for e in judged)
        and not quarantine.faults(account),
        "dataset_type": dataset_type,
        "rows": len(examples),
        "duplicates": len(table) - table["id"].nunique(),
        "in_main_and_test": _in_main_and_test(table["id"], table["part"]),
        "great_expectations": version("great_expectations"),
        "expectations": judged,
        "quarantine": dict(account),
        "lengths": distributions.lengths(table, columns.text_columns(dataset_type)),
        "labels": distributions.labels(table),
    }


def _documents(examples: Artifact) -> list[dict[str, Any]]:
    """The domain text that ingest laid beside the examples; none where the pipeline has none."""
    path = examples.path / dataset.DOMAIN
    return list(jsonl.read(path)) if path.exists() else []


def _judged_documents(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not documents:
        return []
    table = columns.table("language-modeling", documents)
    # How many there are says nothing: a code of law is one.
    counted = "expect_table_row_count_to_be_between"
    expectations = [one for one in suite.of("language-modeling", table) if one.type != counted]
    found = judge.judge(table, expectations, [columns.origin(row) for row in documents])
    return [{**entry, "meaning": f"domain text: {entry['meaning']}"} for entry in found]


def faults(result: Mapping[str, Any]) -> list[str]:
    """What stops the line: each failed expectation and each exceeded budget, with numbers and rows."""
    return [_sentence(e) for e in _unmet(result, "fail")] + quarantine.faults(result["quarantine"])


def _unmet(result: Mapping[str, Any], severity: str) -> list[dict[str, Any]]:
    return [e for e in result["expectations"] if not e["success"] and e["severity"] == severity]


def _in_main_and_test(ids: Any, parts: Any) -> int:
    test = set(ids[parts == "test"])
    return len(test & set(ids[parts != "test"]))


def _message(failed: int, stop: list[str], rows: int) -> str:
    parts = (failed, "expectation", "failed"), (len(stop) - failed, "quarantine budget", "exceeded")
    heads = [f"{count} {what}{'s' if count > 1 else ''} {how}" for count, what, how in parts if count]
    return f"{', '.join(heads)} in {rows:,} examples" + "".join(
        f"\n  {n}. {s}" for n, s in enumerate(stop, 1)
    )


def _sentence(entry: Mapping[str, Any]) -> str:
    rows = "".join(
        "\n       " + row["origin"] + " " + ", ".join(f"{k}={_cut(v)}" for k, v in row["values"].items())
        for row in entry["examples"][:_ROWS_IN_MESSAGE]
    )
    return _headline(entry) + rows


def _headline(entry: Mapping[str, Any]) -> str:
    about = f" on {', '.join(entry['columns'])}" if entry["columns"] else ""
    bounds = {
        k: v for k, v in entry["kwargs"].items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    wanted = "; " + ", ".join(f"{name} {value}" for name, value in bounds.items()) if bounds else ""
    percent = f" ({entry['unexpected_percent']:.2f}%)" if entry["unexpected_percent"] is not None else ""
    return f"{entry['expectation']}{about}: {entry['meaning']}; observed {entry['observed']}{percent}{wanted}"


def _cut(value: str) -> str:
    # repr keeps a line feed or a control character inside a value from breaking the terminal's line.
    return repr(value if len(value) <= _CHARACTERS_IN_MESSAGE else value[:_CHARACTERS_IN_MESSAGE] + "…")

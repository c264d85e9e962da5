"""Runs expectations through Great Expectations and reduces its answer to what a person acts on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.shared.errors import TuneyardError
from components.validate import catalogue
from components.validate.expectation import Expectation

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS = 5
SHOWN_CHARACTERS = 240
_SEVERITY = {"fail": "critical", "warn": "warning"}


def of_settings(settings: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> list[Expectation]:
    """The expectations of a pipeline file, all of them held against the library and the table.

    Raises:
        TuneyardError: unknown types or arguments, or columns that the examples do not have; all of them.
    """
    found, faults = [], []
    for at, setting in enumerate(settings):
        kwargs = {
            key: value for key, value in setting.items() if key not in ("type", "severity", "description")
        }
        severity = "warn" if setting.get("severity") in ("warning", "info") else "fail"
        meaning = setting.get("description") or "as the pipeline file asks"
        expectation = Expectation(setting["type"], kwargs, meaning, severity, source="settings")  # type: ignore[arg-type]
        wrong = _library_faults(expectation)
        wrong += [
            f"no column {name!r}{catalogue.near(name, list(table))}; there are {', '.join(table)}"
            for name in expectation.about
            if name not in table
        ]
        faults += [f"[{at}] {setting['type']}: {fault}" for fault in wrong]
        found.append(expectation)
    if faults:
        raise TuneyardError(
            "validate.expectations: " + "; ".join(faults),
            "correct them in the pipeline file and submit again",
        )
    return found


def merge(suite: Sequence[Expectation], settings: Sequence[Expectation]) -> list[Expectation]:
    """Suite and settings; a setting takes the place of what in the suite has its type and columns."""
    stated = {(e.type, e.about) for e in settings}
    return [e for e in suite if (e.type, e.about) not in stated] + list(settings)


def judge(
    table: pd.DataFrame, expectations: Sequence[Expectation], origins: Sequence[str]
) -> list[dict[str, Any]]:
    """Hold a table against expectations.

    Args:
        table: see columns.table.
        expectations: valid ones.
        origins: `file:line` of each row.

    Returns:
        For each expectation, in order: expectation, columns, kwargs, meaning, source, severity (`fail` or
        `warn`), success, observed (a value or a sentence), unexpected_count and unexpected_percent (None for
        what is no property of single rows) and examples ({origin, values}).
    """
    gx = _library()
    suite = gx.ExpectationSuite("examples", expectations=[_build(e, at) for at, e in enumerate(expectations)])
    asset = _context(gx).data_sources.add_pandas("examples").add_dataframe_asset("examples")
    batch = asset.add_batch_definition_whole_dataframe("examples").get_batch({"dataframe": table})
    # Without the names of index columns the positions of unexpected rows are left out.
    whole = {"result_format": "COMPLETE", "unexpected_index_column_names": []}
    answers = {}
    for answer in batch.validate(suite, result_format=whole).results:
        answers[answer.expectation_config.meta["at"]] = answer  # the library answers in an order of its own
    return [_reduce(e, answers[at], table, origins) for at, e in enumerate(expectations)]


def _library() -> Any:
    # Both before it is imported. 1.24 sends nothing any more, earlier versions did; and it logs a line for
    # each of its methods. What goes wrong in an expectation is in its result.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    log = logging.getLogger("great_expectations")
    if log.propagate:
        log.propagate = False
        log.addHandler(logging.NullHandler())
    import great_expectations

    return great_expectations


def _context(gx: Any) -> Any:
    """A project of the library that lives in memory alone: no folder, no docs site, no progress bars."""
    from great_expectations.data_context.types import base

    config = base.DataContextConfig(
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=base.ProgressBarsConfig(globally=False),
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _build(expectation: Expectation, at: int) -> Any:
    _library()
    from great_expectations.expectations.registry import get_expectation_impl

    ours = {"meta": {"at": at}, "severity": _SEVERITY[expectation.severity]}
    return get_expectation_impl(expectation.type)(**{**expectation.kwargs, **ours})


def _library_faults(expectation: Expectation) -> list[str]:
    _library()
    from great_expectations.compatibility.pydantic import ValidationError
    from great_expectations.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.registry import list_registered_expectation_implementations as names

    try:
        _build(expectation, 0)
    except ExpectationNotFoundError:
        return [f"unknown type{catalogue.near(expectation.type, names())}"]
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix("__root__: ") for e in error.errors()
        ]
    return []


def _reduce(
    expectation: Expectation, answer: Any, table: pd.DataFrame, origins: Sequence[str]
) -> dict[str, Any]:
    result = answer.result or {}
    positions = _bring_together(result.get("unexpected_index_list") or [], expectation.together, table)
    count, judged = result.get("unexpected_count"), result.get("element_count") or len(table)
    shown = expectation.show or expectation.about
    return {
        "expectation": expectation.type,
        "columns": list(expectation.about),
        "kwargs": dict(expectation.kwargs),
        "meaning": expectation.meaning,
        "source": expectation.source,
        "severity": expectation.severity,
        "success": bool(answer.success),
        "observed": _observed(answer, judged),
        "unexpected_count": count,
        "unexpected_percent": round(100 * count / judged, 4) if count is not None and judged else None,
        "examples": [
            {"origin": origins[at], "values": {name: _short(table[name].iloc[at]) for name in shown}}
            for at in positions[:SHOWN_ROWS]
        ],
    }


def _observed(answer: Any, judged: int) -> int | float | str:
    """A number or a sentence; `judged` is how many rows the expectation looked at."""
    broken = _exception(answer.exception_info)
    if broken:
        return f"cannot be computed: {broken}"
    count, value = (answer.result.get(key) for key in ("unexpected_count", "observed_value"))
    if count is not None:
        return f"{count:,} of {judged:,} rows do not"
    if value is None:
        return "as expected" if answer.success else "not as expected"
    value = value.item() if hasattr(value, "item") else value  # of numpy
    return value if isinstance(value, int | float) else _short(value)


def _exception(info: Any) -> str:
    """The message of what an expectation raised; the library keys it by metric when a metric raised it."""
    if not isinstance(info, Mapping) or info.get("raised_exception") is False:
        return ""
    inner = [part for part in info.values() if isinstance(part, Mapping)] or [info]
    return "; ".join(dict.fromkeys(str(part.get("exception_message")) for part in inner))


def _bring_together(positions: list[int], column: str, table: pd.DataFrame) -> list[int]:
    """Positions in order, those with the same value of the column right after the first of them."""
    if not column:
        return sorted(positions)
    first: dict[str, int] = {}
    keyed = [(first.setdefault(str(table[column].iloc[at]), at), at) for at in sorted(positions)]
    return [at for _, at in sorted(keyed)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"

"""Split: every example gets a side that depends on nothing but itself.

A side is a threshold on a hash of the example's content, or of its group: so an example keeps its side when
rows are added, and exact duplicates, having equal hashes, share one (pictures that decode to the same pixels
too, whatever their labels). The price is that a side's share, of the
whole and of each stratum, is right only in expectation and by the law of large numbers; what came out is
measured and gated, not assumed (docs/decisions/0002-a-side-is-a-hash.md).
"""

from __future__ import annotations

import hashlib
import html
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from components.shared import examples, jsonl, media
from components.shared.errors import TuneyardError
from components.shared.stage import Artifact, Context, Result
from components.split import domain
from components.split.config import SplitConfig

log = logging.getLogger("tuneyard.split")

SIDES = ("train", "eval", "test")
_SHOWN_STRATA = 20


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone, evenly spread (53 bits of sha256)."""
    raw = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(raw[:8], "big") / 2**64


def column_value(example: Mapping[str, Any], column: str) -> str:
    """The value of a field or of a kept column, as text."""
    value = example.get(column, example.get("extra", {}).get(column))
    if value is None:
        origin = example["origin"]
        raise TuneyardError(
            f"{origin['file']}:{origin['line']}: no value of {column!r} to split by",
            f"name a column that every row has, and list it under `ingest.keep: [{column}]`",
        )
    return str(value)


def side_of(example: Mapping[str, Any], config: SplitConfig, own_test: bool) -> str:
    """The side of one example.

    Args:
        example: with `id` and `origin`.
        config: ratios, seed and group.
        own_test: whether the source brings its own test split, so that the rest is train and eval.
    """
    if example["origin"]["part"] == "test":
        return "test"
    unit = column_value(example, config.group_by) if config.group_by else examples.likeness(example)
    at = unit_hash(str(config.seed), config.group_by or "", unit)
    train, evaluation, _ = config.ratios
    if own_test:
        return "train" if at < train / (train + evaluation) else "eval"
    return "train" if at < train else "eval" if at < train + evaluation else "test"


def kl_nats(part: Mapping[str, int], whole: Mapping[str, int]) -> float:
    """Kullback-Leibler divergence of a side that is not empty from the whole, in nats; 0: they are alike.

    A side is part of the whole, so no value of it has probability 0 in the whole and none must be invented.
    """
    n, m = sum(part.values()), sum(whole.values())
    return sum(c / n * math.log(c / n / (whole[v] / m)) for v, c in part.items() if c)


def explained_by_chance(values: int, count: int) -> float:
    """The KL (nats) that a fair draw of `count` examples over `values` values exceeds once in a thousand.

    2 n KL of a fair draw tends to a chi-squared with values - 1 degrees of freedom (Wilks 1938); its quantile
    is by Wilson and Hilferty (1931). Without this a side of ten examples would fail by luck alone.
    """
    freedom = max(values - 1, 1)
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3 / (2 * count)


def length_bin(example: Mapping[str, Any]) -> str:
    """Order of magnitude of an example, in powers of two of characters, of pixels, or of milliseconds."""
    if "seconds" in example:
        return f"2^{int(1000 * example['seconds']).bit_length():02d}"
    if "width" in example:
        return f"2^{(example['width'] * example['height']).bit_length():02d}"
    text = "".join(str(v) for v in examples.content(example).values())
    return f"2^{len(text).bit_length():02d}"


def _distributions(rows: Iterable[Mapping[str, Any]], config: SplitConfig) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {"length": Counter()}
    for row in rows:
        found["length"][length_bin(row)] += 1
        if config.stratify_by:
            found.setdefault(config.stratify_by, Counter())[column_value(row, config.stratify_by)] += 1
    return found


def _without_leaks(sides: dict[str, list[dict[str, Any]]], config: SplitConfig) -> list[dict[str, Any]]:
    """Take examples out of a side whose content or group also stands in a side that judges it.

    Eval judges train, and test judges both. Only two things put them there: the source's own test split, and
    equal examples of two groups. So nothing ever changes to another side, and test loses nothing.
    """
    contents: set[str] = set()
    groups: set[str] = set()
    removed: list[dict[str, Any]] = []
    for side in reversed(SIDES):
        kept: list[dict[str, Any]] = []
        for row in sides[side]:
            group = column_value(row, config.group_by) if config.group_by else None
            (removed if examples.likeness(row) in contents or group in groups else kept).append(row)
        sides[side] = kept
        contents |= {examples.likeness(row) for row in kept}
        if config.group_by:
            groups |= {column_value(row, config.group_by) for row in kept}
    return removed


def _balance(
    sides: Mapping[str, list[dict[str, Any]]], config: SplitConfig, own_test: bool
) -> dict[str, Any]:
    """How far each side is from the whole; None for a side that is empty or not ours to judge.

    Returns:
        `kl_nats` and `kl_by_chance`: distribution -> side -> nats. `absent`: side -> stratum that it has no
        example of -> how many the whole has, the most frequent first.
    """
    # The source's own test split has its own distribution.
    ours = [side for side in SIDES if not (own_test and side == "test")]
    whole = _distributions([row for side in ours for row in sides[side]], config)
    parts = {side: _distributions(sides[side], config) for side in ours if sides[side]}
    strata = whole.get(config.stratify_by, Counter()) if config.stratify_by else Counter()
    return {
        "kl_nats": {
            name: {s: kl_nats(parts[s][name], whole[name]) if s in parts else None for s in SIDES}
            for name in whole
        },
        "kl_by_chance": {
            name: {s: explained_by_chance(len(whole[name]), len(sides[s])) for s in parts} for name in whole
        },
        "absent": {
            side: {
                value: count for value, count in strata.most_common() if value not in part[config.stratify_by]
            }
            for side, part in parts.items()
            if config.stratify_by
        },
    }


def _absences(summary: Mapping[str, Any], config: SplitConfig) -> list[str]:
    """One sentence for each side that lacks a stratum."""
    sentences = []
    for side, absent in summary["absent"].items():
        shown = ", ".join(f"{value} ({count})" for value, count in list(absent.items())[:_SHOWN_STRATA])
        more = f" and {len(absent) - _SHOWN_STRATA} more" if len(absent) > _SHOWN_STRATA else ""
        if absent:
            sentences.append(f"{side} has no example of {config.stratify_by} {shown}{more}")
    return sentences


def _page(summary: Mapping[str, Any], config: SplitConfig) -> str:
    rows = "".join(
        f"<tr><td>{side}<td>{summary['counts'][side]}"
        + "".join(
            f"<td>{'–' if values[side] is None else format(values[side], '.4f')}"
            for values in summary["kl_nats"].values()
        )
        for side in SIDES
    )
    heads = "".join(f"<th>KL of {html.escape(name)} (nats)" for name in summary["kl_nats"])
    notes = [f"{summary['duplicates']} exact duplicates, each beside its twin."]
    if summary["removed_as_leak"]:
        notes.append(
            f"{summary['removed_as_leak']} examples left out of train or eval because their content or group "
            "also stands in eval or test."
        )
    notes += [f"{sentence} (in brackets: how many there are)." for sentence in _absences(summary, config)]
    notes += domain.notes(summary["domain"]) if "domain" in summary else []
    return (
        "<!doctype html><meta charset=utf-8><title>split</title><style>body{font:15px system-ui;margin:2em}"
        "td,th{padding:.3em 1em;border-bottom:1px solid #ddd;text-align:left}</style><h1>Split</h1>"
        f"<table><tr><th>side<th>examples{heads}</tr>{rows}</table>"
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    )


def split(config: SplitConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Write `train`, `eval` and `test`.

    Raises:
        TuneyardError: a column to split by is missing.
    """
    rows = list(jsonl.read(inputs["examples"].path / "examples.jsonl"))
    own_test = any(row["origin"]["part"] == "test" for row in rows)
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for row in rows:
        sides[side_of(row, config, own_test)].append(row)
    removed = _without_leaks(sides, config)
    contents = [examples.likeness(row) for side in SIDES for row in sides[side]]
    summary: dict[str, Any] = {
        "counts": {side: len(sides[side]) for side in SIDES},
        "removed_as_leak": len(removed),
        "duplicates": len(contents) - len(set(contents)),
        "own_test": own_test,
        **_balance(sides, config, own_test),
    }
    for sentence in _absences(summary, config):
        log.warning("split: %s", sentence)
    dataset_type = inputs["examples"].manifest.metadata["dataset_type"]
    metadata: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        jsonl.write(context.out / side / "examples.jsonl", sides[side])
        media.carry(sides[side], inputs["examples"].path, context.out / side)
        metadata[side] = {"dataset_type": dataset_type, "count": len(sides[side]), "side": side}
    jsonl.write(context.out / "train" / "removed_as_leak.jsonl", removed)
    if (inputs["examples"].path / examples.DOMAIN).exists():
        summary["domain"] = _domain(sides, config, inputs["examples"], context)
    (context.out / "page.html").write_text(_page(summary, config))
    stop, todo = _judge(summary, config)
    if not stop and "domain" in summary:
        stop, todo = domain.faults(summary["domain"], config)
    measured = {(n, s): kl for n, values in summary["kl_nats"].items() for s, kl in values.items()}
    return Result(
        kinds=dict.fromkeys(SIDES, "dataset"),
        metadata=metadata,
        metrics={f"examples_{side}": len(sides[side]) for side in SIDES}
        | {f"kl_{name}_{side}": kl for (name, side), kl in measured.items() if kl is not None},
        summary=summary,
        page=context.out / "page.html",
        stop=stop,
        stop_todo=todo,
    )


def _domain(
    sides: Mapping[str, list[dict[str, Any]]], config: SplitConfig, ingested: Artifact, context: Context
) -> dict[str, Any]:
    """Divide the domain text, whose documents have no groups and no test side."""
    alone = config.model_copy(update={"group_by": None})
    documents = list(jsonl.read(ingested.path / examples.DOMAIN))
    return domain.divide(documents, sides, lambda row: side_of(row, alone, own_test=True), context.out)


def _judge(summary: Mapping[str, Any], config: SplitConfig) -> tuple[str, str]:
    faults = [f"{side} has no example" for side in SIDES if not summary["counts"][side]]
    if not faults:
        faults = [
            f"KL of {name} between {side} and the whole is {value:.3f} nats, over {config.max_kl_nats}"
            for name, values in summary["kl_nats"].items()
            for side, value in values.items()
            if value is not None and value > max(config.max_kl_nats, summary["kl_by_chance"][name][side])
        ]
    if not faults:
        return "", ""
    counts = ", ".join(f"{side} {summary['counts'][side]}" for side in SIDES)
    todo = "add examples (small sides differ by chance), try another split.seed, or raise split.max_kl_nats"
    return f"split ({counts}): " + "; ".join(faults), todo

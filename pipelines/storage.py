"""What a run leaves in the store, before it starts. Held against a run in docs/figures.md (`footprint`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pipelines.corpus import Documents
from pipelines.spec import PipelineSpec

# Of train's ledger: the id cut short, what became of it, how often it was seen.
_LEDGER_BYTES = 48
# Of a judged text: what each system said of it, and how sure it was, beside the text.
_VERDICT_BYTES = 300
# int8 weights with a scale for each row and column, and the graph.
_INT8_BYTES = 1.02
# Pages, reports, commits, manifests and cards of all stages.
_RECORDS_BYTES = 150_000


def left_bytes(
    spec: PipelineSpec,
    needs: Any,
    folder: Path,
    file_bytes: int,
    rows: Sequence[Mapping[str, Any]],
    examples: int,
    test_share: float,
    documents: Documents | None = None,
) -> dict[str, int]:
    """Stage -> bytes that it leaves in the store; the base is there already, checkpoints are gone in the end.

    Files of equal contents are stored once, so what split keeps of ingest's rows in another order is stored
    again and a tokenizer is not.

    Args:
        spec: the pipeline.
        needs: of train, by its dry run.
        folder: of the base, without weights.
        file_bytes: of its weights.
        rows: some of the corpus, as ingest writes them.
        examples: of the whole corpus, its test split too.
        test_share: of them that are judged, 0-1.
        documents: domain text, where there is a first phase: ingest and split keep it beside the examples.
    """
    each = _written(rows)
    text = _written(documents.rows) * documents.total if documents else 0.0
    corpus = round(each * examples + text)
    tokenizer = sum(path.stat().st_size for path in folder.glob("tokenizer*"))
    full = not spec.train.adapter.frozen
    # The weights that move are float32.
    model = 4 * (needs.total_weights if full else needs.moving_weights)
    encoder = spec.train.objective.kind.startswith("classification")
    found = {
        "ingest": corpus,
        "split": corpus,
        "train": model
        + tokenizer
        + round(_LEDGER_BYTES * (examples * (1 - test_share) + (documents.total if documents else 0))),
        "records": _RECORDS_BYTES,
    }
    judged = examples * test_share if encoder else min(spec.evaluate.max_generated, examples * test_share)
    found["evaluate"] = round(judged * (each / 2 + _VERDICT_BYTES))
    if spec.compress is not None:
        # A fully tuned model is copied byte for byte, which costs nothing where files are stored once.
        whole = 0 if full else file_bytes
        found["compress"] = round(_INT8_BYTES * needs.total_weights) if encoder else whole
    return found


def _written(rows: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of a row as ingest writes it, on average."""
    return sum(len(orjson.dumps(row)) + 1 for row in rows) / len(rows)

"""From documents to token ids on disk: ours beside `datasets.map` with the same tokenizer.

Documents are LawBench's questions with their answers, as many times over as fill some megabytes, numbered so
that no two are equal. Each contender is a process of its own; what is timed begins with texts in memory and
the tokenizer loaded, and ends when the ids are on disk. Then each is asked again, in a new process. All ids
are compared, one by one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from components.shared import jsonl, sources
from components.shared.store import Store
from pipelines.embedded import platform
from pipelines.samples import fetch

_GEMMA = "s3://models/gemma-3-270m"
_BYTES = 30 * 2**20
_ROUNDS = 3
OURS = "tuneyard"
# `datasets.map` over processes with batches, the usual advice; over the tokenizer's threads; one at a time.
PEERS = ("map_batched_processes", "map_batched_threads", "map_single_processes")


def texts(rows: list[str], size: int) -> list[str]:
    """The rows, numbered, as often as they fill so many bytes."""
    found: list[str] = []
    while size > 0:
        for row in rows:
            found.append(f"{len(found)}. {row}")
            size -= len(found[-1].encode())
    return found


def _ours(tokenizer: Any, documents: list[str], folder: Path) -> float:
    from components.train import tokens
    from components.train.config import TrainConfig
    from components.train.objectives.language_modeling import LanguageModeling

    # The objective as it is, but for its model, which encoding does not look at.
    objective = LanguageModeling.__new__(LanguageModeling)
    objective.tokenizer = tokenizer
    settings = {"objective": "language-modeling", "base_model": "base", "max_length": 1 << 20}
    config = TrainConfig.model_validate(settings)
    origin = {"file": "corpus.jsonl", "line": 1, "part": "main"}
    rows = [{"id": str(n), "origin": origin, "text": text} for n, text in enumerate(documents)]
    began = time.perf_counter()
    sides, _ = tokens.encoded(objective, {"train": rows}, config, folder / "tokenizer", folder / OURS)
    seconds = time.perf_counter() - began
    ids = ([*example.prompt, *example.answer] for example in sides["train"])
    start, end = int(tokenizer.bos_token_id is not None), -1
    _leave(folder / f"{OURS}.ids", (one[start:end] for one in ids))
    return seconds


def _peer(name: str, tokenizer: Any, documents: list[str], folder: Path) -> float:
    import datasets

    datasets.disable_progress_bars()
    cores = os.cpu_count() if name.endswith("processes") else None
    given = datasets.load_dataset(
        "json", data_files=str(folder / "documents.jsonl"), split="train", cache_dir=str(folder / "cache")
    )

    def ids(batch: dict[str, Any]) -> dict[str, Any]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

    kept = folder / name
    kept.mkdir(exist_ok=True)
    began = time.perf_counter()
    made = given.map(
        ids,
        batched="batched" in name,
        num_proc=cores,
        remove_columns=["text"],
        cache_file_name=str(kept / "ids.arrow"),
        new_fingerprint=name,
    )
    seconds = time.perf_counter() - began
    _leave(folder / f"{name}.ids", made["ids"])
    return seconds


def _leave(path: Path, every: Any) -> None:
    """All ids as 32-bit numbers, each document's ended by -1."""
    import numpy

    parts = [numpy.array([*ids, -1], dtype=numpy.int32) for ids in every]
    path.write_bytes(numpy.concatenate(parts).tobytes())


def _seconds(name: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.tokenise", name, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(tokenizer: Path, rows: list[str], folder: Path) -> dict[str, Any]:
    """Time all contenders, in turn, for some rounds; the first time and the second.

    Args:
        tokenizer: folder with its files.
        rows: texts.
        folder: to work in.
    """
    documents = texts(rows, _BYTES)
    (folder / "tokenizer").symlink_to(tokenizer)
    jsonl.write(folder / "documents.jsonl", ({"text": text} for text in documents))
    size = sum(len(text.encode()) for text in documents)
    figures: dict[str, Any] = {"cores": os.cpu_count(), "documents": len(documents), "bytes": size}
    rounds = []
    for number in range(_ROUNDS):
        (place := folder / str(number)).mkdir()
        for name in ("tokenizer", "documents.jsonl"):
            (place / name).symlink_to(folder / name)
        rounds.append({(n, t): _seconds(n, place) for n in (OURS, *PEERS) for t in ("first", "again")})
        found = {name: (place / f"{name}.ids").read_bytes() for name in (OURS, *PEERS)}
        figures["ids_are_equal"] = len(set(found.values())) == 1 and figures.get("ids_are_equal", True)
    for name, which in rounds[0]:
        taken = statistics.median(one[name, which] for one in rounds)
        figures[f"{name}.{which}_seconds"] = round(taken, 3)
        if which == "first":
            figures[f"{name}.mb_per_second"] = round(size / taken / 1e6, 2)
    for which in ("first", "again"):
        for peer in PEERS:
            ratio = statistics.median(one[peer, which] / one[OURS, which] for one in rounds)
            figures[f"ratio_to_{peer}.{which}"] = round(ratio, 2)
    return figures


def run() -> dict[str, Any]:
    """Measure on the sample corpus with Gemma's tokenizer."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        home = Path(folder) / "home"
        os.environ["TUNEYARD_HOME"] = str(home)
        os.environ.update(platform.environment(platform.up(home)))
        try:
            fetch.ensure(["s3://corpora/legal", _GEMMA], home)
            store = Store.from_environment()
            model = sources.model_folder(_GEMMA, store)
            rows = [
                f"{row['query']}\n{row['response']}"
                for name in ("consultation", "statute")
                for path in sorted(store.get_prefix(f"s3://corpora/legal/{name}").rglob("*.jsonl"))
                for row in jsonl.read(path)
            ]
        finally:
            platform.down(home)
        return measure(model, rows, Path(folder))


def main() -> None:
    """One contender, in this process."""
    from transformers import AutoTokenizer

    name, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    documents = [row["text"] for row in jsonl.read(folder / "documents.jsonl")]
    taken = _ours(tokenizer, documents, folder) if name == OURS else _peer(name, tokenizer, documents, folder)
    sys.stdout.write(json.dumps(taken) + "\n")


if __name__ == "__main__":
    main()

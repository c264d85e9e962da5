from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from components.shared import jsonl
from components.shared.examples import DOMAIN
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.validate import validate as stage
from components.validate.config import ValidateConfig

_WORDS = "合同租赁赔偿法院起诉婚姻财产劳动工资交通事故保险继承借款担保公司股东证据判决执行"


def prose(seed: int, words: int) -> str:
    """Chinese words in an order that the seed decides, so that every text differs and none is cut."""
    draw = random.Random(seed)
    picks = (2 * draw.randrange(len(_WORDS) // 2) for _ in range(words + draw.randrange(words)))
    return "".join(_WORDS[at : at + 2] for at in picks) + f"第{seed}条。"


def make(kind: str, seed: int) -> dict:
    """The fields of one healthy example."""
    question, answer = prose(seed, 8), prose(seed + 10_000, 40)
    if kind == "prompt-completion":
        return {"prompt": question, "completion": answer, "system": "请回答下列法律问题。"}
    if kind == "conversational":
        turns = [("user", question), ("assistant", answer)] * (1 + seed % 2)
        return {
            "messages": [
                {"role": "system", "content": "请回答。"},
                *({"role": r, "content": c} for r, c in turns),
            ]
        }
    if kind == "preference":
        better, worse = (answer, prose(seed + 20_000, 40))[:: 1 if seed % 2 else -1]
        return {"prompt": question, "chosen": better, "rejected": worse}
    if kind == "prompt-only":
        return {"prompt": question, "system": "请回答下列法律问题。"}
    match kind:
        case "labelled-image":
            facts = {"pixels": f"{seed:064}", "width": 32 + seed % 3, "height": 30, "channels": 3}
            return {"image": f"media/{seed}.png", "label": ("cat", "dog")[seed % 2], **facts, "spread": 40.0}
        case "scored-text":
            return {"text": answer, "score": 50.0 + seed % 17}
        case "tagged-text":
            spans = [{"start": 0, "end": 2, "label": "WORD"}, {"start": 2, "end": 4, "label": "NEXT"}]
            return {"text": f"甲乙丙丁{answer}", "entities": spans}
        case "text-pair":
            hard = {"negative": prose(seed + 20_000, 20)} if seed % 2 else {}
            return {"anchor": question, "positive": answer, **hard}
        case "task-text":
            task = ("mood", "price")[seed % 2]
            return {
                "task": task,
                "text": answer,
                "label": {"mood": "+-"[seed % 4 // 2], "price": f"{seed}"}[task],
            }
    return {"text": answer, "label": ("acq", "earn", "grain")[seed % 3]}


def as_example(fields: dict, line: int, part: str = "main") -> dict:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return {**fields, "id": digest, "origin": {"file": "corpus.jsonl", "line": line, "part": part}}


@pytest.fixture
def corpus():
    """corpus(kind, rows, changes): healthy examples, those named in changes (line -> fields) changed."""

    def build(kind, rows=200, changes=None):
        fields = {line: make(kind, line) for line in range(1, rows + 1)}
        for line, change in (changes or {}).items():
            fields[line] = {**fields[line], **change}
        return [as_example(value, line) for line, value in fields.items()]

    return build


@pytest.fixture
def run(tmp_path):
    """run(kind, examples, settings, quarantined): the stage on trees on disk; (Result, report folder)."""

    def go(kind, examples, settings=None, quarantined=(), summary=None, documents=()):
        folder = Path(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        jsonl.write(folder / "examples" / "examples.jsonl", examples)
        if documents:
            jsonl.write(folder / "examples" / DOMAIN, documents)
        jsonl.write(folder / "quarantine" / "quarantine.jsonl", quarantined)
        by_reason = {
            r: sum(q["reason"] == r for q in quarantined) for r in sorted({q["reason"] for q in quarantined})
        }
        counted = {
            "read": len(examples) + len(documents) + len(quarantined),
            "kept": len(examples) + len(documents),
            "quarantined": len(quarantined),
        }
        text = json.dumps({**counted, "by_reason": by_reason, **(summary or {})})
        (folder / "quarantine" / "summary.json").write_text(text)
        metadata = {"dataset_type": kind}
        inputs = {
            name: Artifact(Manifest("dataset", describe(folder / name), metadata), folder / name)
            for name in ("examples", "quarantine")
        }
        context = Context("run", "pipeline", "validate", "key", None, folder / "out", folder)
        result = stage.validate(ValidateConfig.model_validate(settings or {}), inputs, context)
        return result, folder / "out" / "report"

    return go


def bad_row(line: int, reason: str = "bad_json") -> dict:
    return {
        "file": "corpus.jsonl",
        "line": line,
        "field": "",
        "reason": reason,
        "detail": "<b>torn",
        "raw": "{",
    }


@pytest.fixture
def quarantined():
    """quarantined(n, reason): rows as ingest puts them in quarantine."""
    return lambda count, reason="bad_json": [bad_row(900 + at, reason) for at in range(count)]

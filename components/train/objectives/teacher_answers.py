"""Sequence-level distillation: the student learns what the teacher answers (Kim and Rush 2016)."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat, digest, examples, generation, jsonl, packed
from components.shared.errors import StageStopped
from components.shared.progress import Progress
from components.train.objectives.config import SftObjective
from components.train.objectives.distillation_config import DistillationObjective
from components.train.objectives.sft import Sft
from components.train.objectives.teachers import Teacher

log = logging.getLogger("tuneyard.train")

# Prompts that the teacher answers together.
_TOGETHER = 32


class SequenceDistillation(Sft):
    """Supervised fine-tuning on what the teacher answers, greedily, to the prompts of the data.

    It reads them in its own template, with its own tokens. Of a conversation it writes the last answer, and
    that alone carries loss. eval is what the teacher answers too; test keeps the data's own answers.
    """

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: DistillationObjective,
        teacher: Teacher,
        dropout: float | None = None,
    ) -> None:
        super().__init__(folder, precision, dropout, SftObjective(kind="sft", loss_on="last"))
        self.settings = settings
        self._teacher: Teacher | None = teacher
        self._left: list[Path] = []

    def rewritten(
        self, rows: Mapping[str, Sequence[dict[str, Any]]], folder: Path
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
        """See Objective: each example with the teacher's answer in place of its own.

        Answers are kept in `folder` batch by batch, so that an attempt that was cut off goes on where it was.

        Raises:
            StageStopped: too few prompts have an answer of the teacher.
        """
        assert self._teacher is not None
        learned, unused = {}, {}
        for side, given in rows.items():
            said = _answers(self._teacher, given, side, self.settings, folder / side)
            self._left.append(_kept(said, given, folder / f"teacher_answers_{side}.jsonl"))
            learned[side] = [
                _with_answer(row, one["answer"]) for row, one in zip(given, said, strict=True) if _usable(one)
            ]
            unused[side] = [
                _unanswered(row, one) for row, one in zip(given, said, strict=True) if not _usable(one)
            ]
            if unused[side]:
                why = dict(Counter(one["reason"] for one in unused[side]))
                log.warning(
                    "train: %d of %d prompts of %s have no answer of the teacher: %s",
                    len(unused[side]),
                    len(given),
                    side,
                    why,
                )
        self._teacher = None  # it has said all that it is asked for
        return learned, unused

    def leave(self, folder: Path) -> None:
        """See Objective: what the teacher was asked and answered."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._left:
            shutil.copy(path, folder / path.name)


def _answers(
    teacher: Teacher,
    rows: Sequence[Mapping[str, Any]],
    side: str,
    settings: DistillationObjective,
    folder: Path,
) -> list[dict[str, Any]]:
    """What the teacher answers to each row: `answer`, `tokens`, `ended`, `prompt_tokens`.

    The batches are the same in each attempt, since an answer may turn on the rounding of its batch.
    """
    asked = [chat.prompt_ids(teacher.tokenizer, examples.asked(row), row.get("tools")) for row in rows]
    room = math.inf if teacher.window_tokens is None else teacher.window_tokens - settings.max_new_tokens
    found: list[dict[str, Any]] = [
        {"answer": "", "tokens": 0, "ended": False, "prompt_tokens": len(ids)} for ids in asked
    ]
    fitting = [at for at, ids in enumerate(asked) if len(ids) <= room]
    progress = Progress(f"teacher: {side}", len(fitting), "answers")
    folder.mkdir(parents=True, exist_ok=True)
    cut = 0
    for number, batch in enumerate(generation.batches([asked[at] for at in fitting], _TOGETHER)):
        places = [fitting[at] for at in batch]
        said = _batch(teacher, [asked[at] for at in places], settings, folder / f"{number}.json")
        for at, one in zip(places, said, strict=True):
            found[at] |= one
        progress.advance(len(batch))
        cut += sum(not one["ended"] or not one["answer"] for one in said)
        _refuse_many(cut + len(asked) - len(fitting), len(rows), side, settings)
    _refuse_many(cut + len(asked) - len(fitting), len(rows), side, settings)
    return found


def _batch(
    teacher: Teacher, prompts: Sequence[Sequence[int]], settings: DistillationObjective, path: Path
) -> list[dict[str, Any]]:
    """The answers to some prompts, written down under their digest; read back where that is done."""
    of = digest.of_value([list(map(list, prompts)), settings.max_new_tokens])
    if path.exists() and (known := json.loads(path.read_text()))["of"] == of:
        return list(known["said"])
    with packed.unpacked(teacher.model):
        answers = generation.generate(
            teacher.model, prompts, chat.end_ids(teacher.tokenizer), settings.max_new_tokens, len(prompts)
        )
    said = [
        {
            "answer": str(teacher.tokenizer.decode(one.tokens, skip_special_tokens=True)).strip(),
            "tokens": len(one.tokens),
            "ended": one.ended,
        }
        for one in answers
    ]
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({"of": of, "said": said}))
    aside.replace(path)
    return said


def _refuse_many(missing: int, of: int, side: str, settings: DistillationObjective) -> None:
    if missing > settings.max_unanswered * of:
        raise StageStopped(
            f"{missing} of {of} prompts of {side} have no whole answer of the teacher in "
            f"{settings.max_new_tokens} tokens, allowed {settings.max_unanswered:.0%}",
            "raise train.objective.max_new_tokens or max_unanswered, or take a teacher that ends its answers",
        )


def _usable(one: Mapping[str, Any]) -> bool:
    """Whether an answer is one: ended by the teacher itself, and not empty."""
    return bool(one["ended"] and one["answer"])


def _with_answer(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """An example with another last answer."""
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}
    return {**{name: value for name, value in row.items() if name != "reasoning"}, "completion": answer}


def _unanswered(row: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ledger."""
    reason = "empty" if one["ended"] else "cut at max_new_tokens" if one["tokens"] else "prompt too long"
    known = {"id": row["id"], "origin": row["origin"], "action": "unanswered"}
    return {**known, "reason": reason, "tokens": one["prompt_tokens"]}


def _kept(said: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write down what was asked and answered, used or not."""
    jsonl.write(
        path,
        [
            {
                "id": row["id"],
                "origin": row["origin"],
                "asked": examples.asked(row),
                **one,
                "used": _usable(one),
            }
            for row, one in zip(rows, said, strict=True)
        ],
    )
    return path

"""Judging a causal model: the loss on every test answer, and what base and tuned model really answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate import citations, intervals, sitting, taught, text_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.sitting import Exam, Sitting
from components.evaluate.slices.share import Part, Share, joined
from components.shared import causal, examples
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
    kind: sitting.Kind = sitting.CAUSAL,
) -> Part:
    """Do a share of the exam: see `sitting.take`.

    Raises:
        TuneyardError: the text metrics do not hold for this corpus, or no example fits into the model.
    """
    tokenizer = sitting.tokenizer_of(inputs)
    text_metrics.self_test([sitting.reference(tokenizer, row) for row in tests])
    part = sitting.take(config, tests, inputs, context, share, kind)
    card = ModelCard.read(inputs["model"].path)
    if card.teacher is not None:
        found = taught.answer(config, tests, card, context, share, part.facts["precision"])
        part.arrays.update(found.arrays)
        part.facts.update(found.facts)
        part.measured.update(found.measured)
    return part


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
    kind: sitting.Kind = sitting.CAUSAL,
) -> Findings:
    """Base and tuned model side by side; `tuned` is the compressed artifact where there is one.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        parts: what `take` found in every share.
        kind: of the models.

    Raises:
        TuneyardError: the parts do not add up.
    """
    tokenizer = sitting.tokenizer_of(inputs)
    exam, facts = sitting.prepare(config, tests, tokenizer, parts[0].facts["window_tokens"], kind)
    base, tuned = sitting.whole("base", exam, parts), sitting.whole("tuned", exam, parts)
    systems = compare(exam, base, tuned)
    ships = sitting.shipped(inputs)
    systems["tuned"]["about"] = f"the tuned model that ships (artifact {ships!r})"
    if ships == "compressed":
        systems["uncompressed"] = _uncompressed(exam, tuned, joined(parts, "uncompressed/nats").tolist())
    card = ModelCard.read(inputs["model"].path)
    if card.teacher is not None:
        window = parts[0].facts["teacher_window_tokens"]
        theirs = taught.exam_of(config, tests, card, context, window)
        told = score(theirs, sitting.whole("teacher", theirs, parts))
        taught.beside(systems, told, "rouge_l", "tokens_per_second")
    facts = {"precision": parts[0].facts["precision"], **facts}
    if len(parts) > 1:
        count = len(parts[0].arrays["tuned/answers"])
        facts["latency"] += f"; measured, as memory, on slice 1 of {len(parts)} alone: {count} answers"
    return Findings(systems, "tuned", rows(exam, base, tuned), facts)


def compare(exam: Exam, base: Sitting, tuned: Sitting) -> dict[str, dict[str, Any]]:
    """The metrics of both systems, how far the tuned one's loss fell and its ROUGE-L rose."""
    systems = {"base": score(exam, base), "tuned": score(exam, tuned)}
    systems["base"]["about"] = "the base model, untuned"
    systems["tuned"]["loss_reduction"] = 1 - systems["tuned"]["loss"] / systems["base"]["loss"]
    systems["tuned"]["rouge_l_gain"] = systems["tuned"]["rouge_l"] - systems["base"]["rouge_l"]
    systems["tuned"]["intervals"]["loss_reduction"] = intervals.of_reduction(base.nats, tuned.nats)
    return systems


def score(exam: Exam, found: Sitting) -> dict[str, Any]:
    """The metrics of one system (names and units: config.METRICS), and their 95% intervals."""
    tokens = [len(e.answer) for e in exam.encoded]
    loss = sum(found.nats) / sum(tokens)
    references = exam.references
    rouge = [text_metrics.rouge_l(r, t) for r, t in zip(references, found.texts, strict=True)]
    exact = [text_metrics.exact_match(r, t) for r, t in zip(references, found.texts, strict=True)]
    bleu, signature = text_metrics.bleu(references, found.texts)
    cited, citing = citations.accuracy(references, found.texts)
    metrics: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "exact_match": sum(exact) / len(exact),
        "rouge_l": sum(rouge) / len(rouge),
        "bleu": bleu,
        **found.measured,
        "answers_cut": sum(not ended for ended in found.ended),
        "bleu_signature": signature,
        "intervals": {"loss": intervals.of_ratio(found.nats, tokens), "rouge_l": intervals.of_mean(rouge)},
    }
    if cited is not None:
        metrics["statute_citation_accuracy"] = cited
        metrics["citing_references"] = citing
    return metrics


def _uncompressed(exam: Exam, tuned: Sitting, nats: Sequence[float]) -> dict[str, Any]:
    """The loss before compression, on the answered examples: merging must not cost any."""
    count = len(exam.prompts)
    tokens = causal.token_count(exam.encoded[:count])
    return {
        "about": f"artifact 'model', on the {count} answered examples: what compression changed",
        "loss": sum(nats) / tokens,
        "compressed_loss": sum(tuned.nats[:count]) / tokens,
        "loss_increase": (sum(tuned.nats[:count]) - sum(nats)) / tokens,
        "examples": count,
    }


def rows(exam: Exam, base: Sitting, tuned: Sitting) -> list[dict[str, Any]]:
    """What was asked and answered, for answers.jsonl and the page."""
    found = []
    for index, reference in enumerate(exam.references):
        row = exam.tests[index]
        found.append(
            {
                "id": row["id"],
                "origin": row.get("origin"),
                "prompt": "\n".join(m["content"] for m in examples.messages(row)[:-1]),
                "reference": reference,
                "base": base.texts[index],
                "tuned": tuned.texts[index],
                "base_rouge_l": text_metrics.rouge_l(reference, base.texts[index]),
                "tuned_rouge_l": text_metrics.rouge_l(reference, tuned.texts[index]),
                "base_ended": base.ended[index],
                "tuned_ended": tuned.ended[index],
                "base_nats": base.nats[index],
                "tuned_nats": tuned.nats[index],
                "answer_tokens": len(exam.encoded[index].answer),
            }
        )
    return found

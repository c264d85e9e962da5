"""Judging a causal model: the loss on every test answer, and what base and tuned model really answer."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import citations, intervals, resources, text_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.shared import causal, chat, examples, generation
from components.shared.causal import Encoded, Precision
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

log = logging.getLogger("tuneyard.evaluate")
_LONGEST_DEFAULT_ANSWER_TOKENS = 512


@dataclass(frozen=True)
class Exam:
    """What every system is asked: the same token ids under the same limits.

    Args:
        tests: the test examples that fit into the model, by id.
        encoded: their token ids.
        prompts: token ids of those, the first by id, that are answered in full.
        max_new_tokens: longest answer.
        per_device_batch_size: prompts in one forward pass.
        tokenizer: the tuned model's; writes the answers out.
    """

    tests: list[Mapping[str, Any]]
    encoded: list[Encoded]
    prompts: list[list[int]]
    max_new_tokens: int
    per_device_batch_size: int
    tokenizer: Any

    @property
    def references(self) -> list[str]:
        """What the generated answers should be."""
        return [examples.messages(row)[-1]["content"] for row in self.tests[: len(self.prompts)]]


@dataclass(frozen=True)
class Sitting:
    """What one system did in the exam: nats for each test example, and answers to the prompts."""

    nats: list[float]
    answers: list[generation.Answer]
    texts: list[str]
    generate_seconds: float
    memory_gib: float


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
) -> Findings:
    """Base and tuned model side by side; `tuned` is the compressed artifact where there is one.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.

    Raises:
        TuneyardError: the text metrics do not hold for this corpus, or no example fits into the model.
    """
    from transformers import AutoTokenizer

    text_metrics.self_test([examples.messages(row)[-1]["content"] for row in tests])
    folder = inputs["model"].path
    shipped = "compressed" if "compressed" in inputs else "model"
    precision = causal.served_precision(inputs[shipped].path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = causal.load_base(ModelCard.read(folder), context.store, precision)
    exam, facts = prepare(config, tests, tokenizer, _window(model))
    base = sit("base", model, exam)
    del model
    gc.collect()
    model, _, _ = causal.load(inputs[shipped].path, context.store, precision)
    tuned = sit("tuned", model, exam)
    del model
    gc.collect()
    systems = compare(exam, base, tuned)
    systems["tuned"]["about"] = f"the tuned model that ships (artifact {shipped!r})"
    if shipped == "compressed":
        systems["uncompressed"] = _uncompressed(inputs["model"], context, precision, exam, tuned)
    return Findings(systems, "tuned", rows(exam, base, tuned), {"precision": precision, **facts})


def _window(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prepare(
    config: EvaluateConfig, tests: Sequence[Mapping[str, Any]], tokenizer: Any, window_tokens: int | None
) -> tuple[Exam, dict[str, Any]]:
    """The exam, and the facts about what did not fit.

    A prompt that does not fit beside its answer is cut (causal.cut_prompt); an example whose answer alone
    does not fit is left out. Both are counted.

    Raises:
        TuneyardError: no example fits.
    """
    encoded = {row["id"]: causal.encode(tokenizer, row) for row in tests}
    kept = [row for row in tests if window_tokens is None or len(encoded[row["id"]].answer) < window_tokens]
    if not kept:
        raise TuneyardError(
            f"each answer of the {len(tests)} test examples is longer than the model's window of "
            f"{window_tokens} tokens",
            "use a base model with a longer context, or shorter answers",
        )
    whole = [encoded[row["id"]] for row in kept]

    def cut_beside(prompt: list[int], tokens: int) -> list[int]:
        if window_tokens is None:
            return prompt
        return causal.cut_prompt(prompt, window_tokens - tokens, tokenizer.bos_token_id)

    cut = [cut_beside(e.prompt, len(e.answer)) for e in whole]
    asked = min(config.max_generated, len(kept))
    limit = config.max_new_tokens or min(
        max(len(e.answer) for e in whole[:asked]), _LONGEST_DEFAULT_ANSWER_TOKENS
    )
    if window_tokens is not None:
        limit = min(limit, window_tokens - 1)
    prompts = [cut_beside(e.prompt, limit) for e in whole[:asked]]
    judged = [Encoded(prompt, e.answer) for prompt, e in zip(cut, whole, strict=True)]
    exam = Exam(kept, judged, prompts, limit, config.per_device_batch_size, tokenizer)
    truncated = {
        "prompts": sum(len(now) < len(e.prompt) for now, e in zip(cut, whole, strict=True)),
        "left_out": sorted(encoded.keys() - {row["id"] for row in kept}),
        "of": len(tests),
        "limit_tokens": window_tokens,
    }
    facts = {
        "truncated": truncated,
        "answered": asked,
        "max_new_tokens": limit,
        "latency": f"from the start of a batch of {config.per_device_batch_size} prompts to an answer's end",
    }
    return exam, facts


def sit(name: str, model: Any, exam: Exam) -> Sitting:
    """Let one system take the exam, with progress lines under its name."""
    with resources.peak_memory() as memory:
        progress = Progress(f"{name}: loss", len(exam.encoded), "examples")
        nats = causal.answer_nats(model, exam.encoded, done=progress.advance)
        progress = Progress(f"{name}: answers", len(exam.prompts), "answers")
        started = time.perf_counter()
        answers = generation.generate(
            model,
            exam.prompts,
            chat.end_ids(exam.tokenizer),
            exam.max_new_tokens,
            exam.per_device_batch_size,
            progress.advance,
        )
        seconds = time.perf_counter() - started
    texts = [exam.tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers]
    return Sitting(nats, answers, texts, seconds, memory["gib"])


def compare(exam: Exam, base: Sitting, tuned: Sitting) -> dict[str, dict[str, Any]]:
    """The metrics of both systems, how far the tuned one's loss fell and its ROUGE-L rose."""
    systems = {"base": score(exam, base), "tuned": score(exam, tuned)}
    systems["base"]["about"] = "the base model, untuned"
    systems["tuned"]["loss_reduction"] = 1 - systems["tuned"]["loss"] / systems["base"]["loss"]
    systems["tuned"]["rouge_l_gain"] = systems["tuned"]["rouge_l"] - systems["base"]["rouge_l"]
    systems["tuned"]["intervals"]["loss_reduction"] = intervals.of_reduction(base.nats, tuned.nats)
    return systems


def score(exam: Exam, sitting: Sitting) -> dict[str, Any]:
    """The metrics of one system (names and units: config.METRICS), and their 95% intervals."""
    tokens = [len(e.answer) for e in exam.encoded]
    loss = sum(sitting.nats) / sum(tokens)
    references = exam.references
    rouge = [text_metrics.rouge_l(r, t) for r, t in zip(references, sitting.texts, strict=True)]
    exact = [text_metrics.exact_match(r, t) for r, t in zip(references, sitting.texts, strict=True)]
    bleu, signature = text_metrics.bleu(references, sitting.texts)
    cited, citing = citations.accuracy(references, sitting.texts)
    written = sum(len(a.tokens) + a.ended for a in sitting.answers)
    found: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "exact_match": sum(exact) / len(exact),
        "rouge_l": sum(rouge) / len(rouge),
        "bleu": bleu,
        **resources.latencies([a.seconds for a in sitting.answers]),
        "tokens_per_second": written / sitting.generate_seconds,
        "memory_gib": sitting.memory_gib,
        "answers_cut": sum(not a.ended for a in sitting.answers),
        "bleu_signature": signature,
        "intervals": {"loss": intervals.of_ratio(sitting.nats, tokens), "rouge_l": intervals.of_mean(rouge)},
    }
    if cited is not None:
        found["statute_citation_accuracy"] = cited
        found["citing_references"] = citing
    return found


def _uncompressed(
    model: Artifact, context: Context, precision: Precision, exam: Exam, tuned: Sitting
) -> dict[str, Any]:
    """The loss before compression, on the answered examples: merging must not cost any."""
    count = len(exam.prompts)
    loaded, _, _ = causal.load(model.path, context.store, precision)
    progress = Progress("uncompressed: loss", count, "examples")
    nats = causal.answer_nats(loaded, exam.encoded[:count], done=progress.advance)
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
                "base_ended": base.answers[index].ended,
                "tuned_ended": tuned.answers[index].ended,
                "base_nats": base.nats[index],
                "tuned_nats": tuned.nats[index],
                "answer_tokens": len(exam.encoded[index].answer),
            }
        )
    return found

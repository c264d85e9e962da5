"""A causal model's exam: what every system is asked, and what the systems did with it, share by share."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, chat, generation, window
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

_LONGEST_DEFAULT_ANSWER_TOKENS = 512
# Padded tokens of one forward pass over answers that are given.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Kind:
    """How models of a task are loaded, asked and read.

    Args:
        encode: (tokenizer, example) -> Encoded.
        base: (card, store, precision) -> the base model, in eval mode.
        tuned: (folder, store, precision) -> a model of ours, in eval mode.
        nats: (model, encoded, batch tokens, done) -> nats of each answer.
        generate: (model, prompts, end ids, longest answer, batch size, done) -> their answers.
    """

    encode: Callable[[Any, Mapping[str, Any]], Encoded]
    base: Callable[..., Any]
    tuned: Callable[..., Any]
    nats: Callable[..., list[float]]
    generate: Callable[..., list[generation.Answer]]


CAUSAL = Kind(
    encode=causal.encode,
    base=lambda card, store, precision: causal.load_base(card, store, precision),
    tuned=lambda folder, store, precision: causal.load(folder, store, precision)[0],
    nats=causal.answer_nats,
    generate=generation.generate,
)


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
        kind: of the models that are asked.
    """

    tests: list[Mapping[str, Any]]
    encoded: list[Encoded]
    prompts: list[list[int]]
    max_new_tokens: int
    per_device_batch_size: int
    tokenizer: Any
    kind: Kind = CAUSAL

    @property
    def references(self) -> list[str]:
        """What the generated answers should be."""
        return [reference(self.tokenizer, row) for row in self.tests[: len(self.prompts)]]


def reference(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """What a model should write: the answer, with what it thinks before it and the tools it calls."""
    return chat.answer_text(tokenizer, chat.messages(tokenizer, row), row.get("tools")).strip()


@dataclass(frozen=True)
class Sitting:
    """What one system did in the exam.

    Args:
        nats: for each test example.
        answers: token ids of each answer, without the end token.
        ended: whether the model ended the answer itself.
        texts: the answers, written out.
        measured: latency, tokens per second and memory, of one machine.
    """

    nats: list[float]
    answers: list[list[int]]
    ended: list[bool]
    texts: list[str]
    measured: Mapping[str, Any]


def shipped(inputs: Mapping[str, Artifact]) -> str:
    """The input that is the model that ships."""
    return "compressed" if "compressed" in inputs else "model"


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
    kind: Kind = CAUSAL,
) -> Part:
    """Do a share of the exam: the losses and the answers of each system.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        share: which batches.
        kind: of the models.

    Raises:
        TuneyardError: no example fits into the model, or the base has changed.
    """
    from transformers import AutoConfig

    card, ships = ModelCard.read(inputs["model"].path), shipped(inputs)
    precision = causal.served_precision(inputs[ships].path)
    settings = AutoConfig.from_pretrained(card.base_model.folder(context.store), local_files_only=True)
    most = window.of_settings(settings)
    exam, _ = prepare(config, tests, tokenizer_of(inputs), most, kind)
    arrays: dict[str, Any] = {}
    measured: dict[str, dict[str, Any]] = {}
    systems: dict[str, Callable[[], Any]] = {
        "base": lambda: kind.base(card, context.store, precision),
        "tuned": lambda: kind.tuned(inputs[ships].path, context.store, precision),
    }
    if not (loss_batches(exam.encoded, share) or _answer_batches(exam, share)):
        # More slices than batches: nothing to load a model for.
        systems = dict.fromkeys(systems, lambda: None)
    for name, load in systems.items():
        model = load()
        found, measured[name] = sit(name, model, exam, share)
        arrays |= found
        del model
        gc.collect()
    if ships == "compressed":
        answered = exam.encoded[: len(exam.prompts)]
        wanted = loss_batches(answered, share)
        model = kind.tuned(inputs["model"].path, context.store, precision) if wanted else None
        arrays |= losses("uncompressed", model, answered, share, kind)
        del model
    return Part(arrays, {"window_tokens": most, "precision": precision}, measured)


def tokenizer_of(inputs: Mapping[str, Artifact]) -> Any:
    """The tuned model's tokenizer, which every system is asked with."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(inputs["model"].path, local_files_only=True)


def prepare(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    window_tokens: int | None,
    kind: Kind = CAUSAL,
) -> tuple[Exam, dict[str, Any]]:
    """The exam, and the facts about what did not fit.

    A prompt that does not fit beside its answer is cut (causal.cut_prompt); an example whose answer alone
    does not fit is left out. Both are counted.

    Raises:
        TuneyardError: no example fits.
    """
    encoded = {row["id"]: kind.encode(tokenizer, row) for row in tests}
    kept = [row for row in tests if window_tokens is None or len(encoded[row["id"]].answer) < window_tokens]
    if not kept:
        raise TuneyardError(
            f"each answer of the {len(tests)} test examples exceeds the window of {window_tokens} tokens",
            "use a base model with a longer context, or shorter answers",
        )
    whole = [encoded[row["id"]] for row in kept]

    def cut_beside(prompt: list[int], tokens: int) -> list[int]:
        if window_tokens is None:
            return prompt
        return causal.cut_prompt(prompt, window_tokens - tokens, tokenizer.bos_token_id)

    cut = [cut_beside(e.prompt, len(e.answer)) for e in whole]
    asked = min(config.max_generated, len(kept))
    longest = max(len(e.answer) for e in whole[:asked])
    limit = config.max_new_tokens or min(longest, _LONGEST_DEFAULT_ANSWER_TOKENS)
    if window_tokens is not None:
        limit = min(limit, window_tokens - 1)
    prompts = [cut_beside(e.prompt, limit) for e in whole[:asked]]
    judged = [Encoded(prompt, e.answer) for prompt, e in zip(cut, whole, strict=True)]
    exam = Exam(kept, judged, prompts, limit, config.per_device_batch_size, tokenizer, kind)
    facts = {
        "truncated": {
            "prompts": sum(len(now) < len(e.prompt) for now, e in zip(cut, whole, strict=True)),
            "left_out": sorted(encoded.keys() - {row["id"] for row in kept}),
            "of": len(tests),
            "limit_tokens": window_tokens,
        },
        "answered": asked,
        "max_new_tokens": limit,
        "latency": f"from the start of a batch of {config.per_device_batch_size} prompts to an answer's end",
    }
    return exam, facts


def loss_batches(encoded: Sequence[Encoded], share: Share) -> list[list[int]]:
    """Which examples are read together in a share."""
    return share.take(list(causal.by_length([len(each) for each in encoded], BATCH_TOKENS)))


def _answer_batches(exam: Exam, share: Share) -> list[list[int]]:
    return share.take(generation.batches(exam.prompts, exam.per_device_batch_size))


def losses(
    name: str, model: Any, encoded: Sequence[Encoded], share: Share, kind: Kind = CAUSAL
) -> dict[str, Any]:
    """Nats of the answers in a share, in the batches that one process would make of all of them."""
    batches = loss_batches(encoded, share)
    progress = Progress(share.label(f"{name}: loss"), sum(map(len, batches)), "examples")
    nats: list[float] = []
    for batch in batches:
        nats += kind.nats(model, [encoded[i] for i in batch], BATCH_TOKENS, progress.advance)
    return rows(f"{name}/nats", [index for batch in batches for index in batch], nats)


def _answers(
    name: str, model: Any, exam: Exam, share: Share
) -> tuple[list[int], list[generation.Answer], float]:
    """Which prompts of the exam are in a share, their answers, and the seconds they took."""
    batches = _answer_batches(exam, share)
    progress = Progress(share.label(f"{name}: answers"), sum(map(len, batches)), "answers")
    answers: list[generation.Answer] = []
    end_ids = chat.end_ids(exam.tokenizer)
    started = time.perf_counter()
    for batch in batches:
        prompts = [exam.prompts[index] for index in batch]
        answers += exam.kind.generate(
            model, prompts, end_ids, exam.max_new_tokens, len(batch), progress.advance
        )
    return [index for batch in batches for index in batch], answers, time.perf_counter() - started


def sit(name: str, model: Any, exam: Exam, share: Share) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let one system take its share of the exam, with progress lines under its name.

    Returns:
        Arrays of a Part, and what was measured.
    """
    import numpy as np

    with resources.peak_memory() as memory:
        found = losses(name, model, exam.encoded, share, exam.kind)
        asked, answers, seconds = _answers(name, model, exam, share)
    tokens = np.full((len(answers), exam.max_new_tokens), -1, dtype=np.int64)  # -1: no token
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer.tokens)] = answer.tokens
    found |= rows(f"{name}/answers", asked, tokens)
    found |= rows(f"{name}/ended", asked, np.asarray([answer.ended for answer in answers], dtype=bool))
    if not share.measures:
        return found, {}
    written = sum(len(answer.tokens) + answer.ended for answer in answers)
    return found, {
        **resources.latencies([answer.seconds for answer in answers]),
        "tokens_per_second": written / seconds,
        "memory_gib": memory["gib"],
    }


def whole(name: str, exam: Exam, parts: Sequence[Part]) -> Sitting:
    """What one system did, put together from all shares."""
    answers = [[token for token in row if token >= 0] for row in joined(parts, f"{name}/answers").tolist()]
    texts = [exam.tokenizer.decode(each, skip_special_tokens=True).strip() for each in answers]
    nats = joined(parts, f"{name}/nats").tolist()
    ended = joined(parts, f"{name}/ended").tolist()
    return Sitting(nats, answers, ended, texts, parts[0].measured[name])

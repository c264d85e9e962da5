"""What evaluate will need of memory, before it starts: its own forward passes on tensors without bytes.

Held against processes by `python -m benchmarks footprint`; figures in docs/figures.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluate import predictions, sitting
from components.evaluate.config import EvaluateConfig
from components.shared import causal, chat, generation, window
from components.shared.dryrun import Live, no_weights_read, shapes_only

# Resident memory of the process that is no tensor: Python, PyTorch, transformers, tokenizer, and in the end
# the metrics' libraries and MLflow. Seen with `python -m benchmarks footprint`.
CAUSAL_HOST_BYTES = 980 * 2**20
# The same of a classifier, with scikit-learn and what its single texts leave; and what kernels for batches of
# many lengths take, of which oneDNN keeps no more than it is told: between three evaluations of MiniLM, see
# docs/figures.md.
ENCODER_HOST_BYTES = 604 * 2**20
KERNEL_BYTES = 150 * 2**20
_LENGTHS_OF_KERNELS = 8
# What the process holds beyond what lives, as a share of what the largest batch of each system allocates:
# blocks of lengths that do not come again, and a kernel of oneDNN for each of them.
SLACK = 0.5


def of_causal(
    config: EvaluateConfig,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    file_bytes: int,
    precision: causal.Precision,
) -> int:
    """Peak bytes of the process in which a causal model and its base answer, one after the other.

    A model is read from a file that is in memory meanwhile; where the file is of the precision that is
    computed in, the model is the mapped file.

    Args:
        config: settings of evaluate.
        folder: with config.json and tokenizer of the base; weights are not read.
        rows: test examples.
        file_bytes: of the base's weights.
        precision: what the shipped model is computed in.

    Raises:
        TuneyardError: no example fits into the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    exam, _ = sitting.prepare(config, rows, tokenizer, window.of_settings(settings))
    with shapes_only() as live, no_weights_read():
        model = causal.open_model(folder, precision)
        held = live.bytes
        read = causal.by_length([len(each) for each in exam.encoded], sitting.BATCH_TOKENS)
        causal.answer_nats(model, [exam.encoded[i] for i in next(read)], sitting.BATCH_TOKENS)
        if exam.prompts:
            _answers(model, exam, live)
        working = live.peak - held
    mapped = abs(file_bytes - held) < 0.05 * held
    opening = held + (0 if mapped else file_bytes)
    return CAUSAL_HOST_BYTES + max(opening, held + round((1 + SLACK) * working))


def _answers(model: Any, exam: sitting.Exam, live: Live) -> None:
    """The longest prompts are read, and a last token is added to answers of full length."""
    import torch
    from transformers import DynamicCache

    batch = generation.batches(exam.prompts, exam.per_device_batch_size)[-1]
    asked = [exam.prompts[index] for index in batch]
    ids, mask = generation.left_padded(asked, causal.device())
    with torch.inference_mode():
        generation.next_logits(model, ids, mask, DynamicCache(config=model.config))
        peak = live.peak
        # As long as prompt and answer together: read at once for the cache alone, this peak is not counted.
        longest = max(map(len, asked)) + exam.max_new_tokens - 1
        ids = torch.zeros(len(asked), longest, dtype=torch.long)
        mask, cache = torch.ones_like(ids), DynamicCache(config=model.config)
        generation.next_logits(model, ids, mask, cache)
        live.mark()
        mask = torch.cat([mask, mask.new_ones(len(asked), 1)], dim=1)
        generation.next_logits(model, ids[:, :1], mask, cache)
    live.peak = max(peak, live.peak)


def of_classifier(
    config: EvaluateConfig,
    folder: Path,
    texts: Sequence[str],
    labels: int,
    max_length_tokens: int,
) -> int:
    """Peak bytes of the process in which a text classifier and its frozen base read the texts.

    Args:
        config: settings of evaluate.
        folder: with config.json and tokenizer of the base; weights are not read.
        texts: of test.
        labels: how many classes.
        max_length_tokens: longest text; the rest of one is cut.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encodings = predictions.encode(tokenizer, texts, max_length_tokens)
    inputs = [encodings.batch(each) for each in encodings.batches(config.per_device_batch_size)]
    largest = max(inputs, key=lambda each: each["input_ids"].size)
    lengths = len({each["input_ids"].shape[1] for each in inputs})
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=labels)
    held = left = 0.0
    # The base reads texts of train too, which are of the same lengths.
    for kind, precision in (
        (AutoModelForSequenceClassification, "float32"),
        (AutoModel, causal.preferred_precision("auto")),
    ):
        with shapes_only() as live, no_weights_read(), torch.inference_mode():
            before = live.bytes
            model = kind.from_pretrained(folder, config=settings, dtype=getattr(torch, precision))
            held, of_model = max(held, live.bytes - before), live.bytes
            model(**{name: torch.from_numpy(array) for name, array in largest.items()})
            # What one system leaves is there when the next one is opened.
            left += live.peak - of_model
            del model
    kernels = KERNEL_BYTES * min(1.0, (lengths - 1) / _LENGTHS_OF_KERNELS)
    return round(ENCODER_HOST_BYTES + kernels + held + left)

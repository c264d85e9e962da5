"""What compress will need of memory, before it starts, told from the shape of the model and the probes.

Seen with `python -m benchmarks footprint`; figures in docs/figures.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.compress import probes

_FLOAT32 = 4
# Resident memory of the process before a causal model is opened: Python, PyTorch, transformers, PEFT and a
# tokenizer of 262,144 words (789 MiB for Gemma 3).
CAUSAL_HOST_BYTES = 790 * 2**20
# `proof.compare` on one sequence: five tensors of its logits' size live at once (two log-softmaxes, and what
# their divergence is summed from), and the blocks of as many as three that went before are still held.
_COMPARED = 8
# An encoder's peak, over the bytes of its float32 weights: the model, the exporter's graph of it and its
# serialised form, what the fusion reads, makes and writes, each once or twice. A MiniLM of 22.7 million
# weights peaked at 1,325 MiB, a BERT of 59.9 million at 2,564: a straight line through both, which starts
# where the libraries are (PyTorch, ONNX, ONNX Runtime).
ENCODER_COPIES = 8.73
ENCODER_HOST_BYTES = 568 * 2**20


@dataclass(frozen=True)
class Shape:
    """What compress is given.

    Args:
        total_weights: of the base.
        merged_weights: of the matrices that an adapter moves; 0 where the whole model was trained.
        vocabulary: logits of a token.
        file_bytes: of the base's weights.
        sequence_tokens: of each probe.
    """

    total_weights: int
    merged_weights: int
    vocabulary: int
    file_bytes: int
    sequence_tokens: Sequence[int]


def probe_tokens(tokenizer: object) -> list[int]:
    """Tokens of each probe that a causal model is proved on."""
    return [len(ids) for ids in probes.dialogues(tokenizer)]


def of_causal(shape: Shape) -> int:
    """Peak bytes of the process that makes a causal model ready to serve, and proves it.

    All is computed in float32. Three models are asked the same probes, and their logits, of every token and
    word, are kept: base, adapted and exported. The highest of:

    - a model is read while the file it comes from is in memory too (not where the file is float32: then the
      model is the mapped file);
    - the rounded form of a merged model is judged: the model, its exact merged matrices beside it, three
      sets of logits, the workings of a comparison;
    - the reloaded export is judged: model, three sets of logits, the workings.

    Args:
        shape: see Shape.
    """
    model, merged = _FLOAT32 * shape.total_weights, _FLOAT32 * shape.merged_weights
    logits = _FLOAT32 * shape.vocabulary * sum(shape.sequence_tokens)
    compared = _COMPARED * _FLOAT32 * shape.vocabulary * max(shape.sequence_tokens)
    stored_in_float32 = shape.file_bytes >= model
    # A float32 base stays mapped while its merged matrices are made; a rounded one is judged beside them.
    judged = model + 3 * logits + compared
    settled = model + merged + 2 * logits if stored_in_float32 else judged + merged
    reloaded = model + (0 if stored_in_float32 else shape.file_bytes) + 2 * logits
    return CAUSAL_HOST_BYTES + max(judged, settled, reloaded)


def of_encoder(total_weights: int) -> int:
    """Peak bytes of the process that exports and quantises a text classifier."""
    return ENCODER_HOST_BYTES + round(ENCODER_COPIES * _FLOAT32 * total_weights)

"""Class probabilities of texts, by PyTorch or ONNX Runtime, over exactly the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import clock, encoders, opening
from components.shared.store import Store

# From padded arrays [batch, longest] by input name to logits [batch, classes].
Forward = Callable[[dict[str, Any]], Any]
_TIMED_SINGLY = 48


@dataclass(frozen=True)
class Encodings:
    """Texts as a model's tokenizer sees them.

    Args:
        columns: input name (`input_ids`, `attention_mask`...) -> one list of ids for each text.
        pad_id: of `input_ids`; every other column is padded with 0.
        cut: how many texts were longer than the limit.
    """

    columns: dict[str, list[list[int]]]
    pad_id: int
    cut: int

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def by_length(self) -> list[int]:
        """Indices, shortest text first, so that a batch is padded little."""
        return sorted(range(len(self)), key=lambda index: len(self.columns["input_ids"][index]))

    def batches(self, per_device_batch_size: int) -> list[list[int]]:
        """Indices of all texts, in batches of similar length."""
        order = self.by_length()
        return [order[i : i + per_device_batch_size] for i in range(0, len(order), per_device_batch_size)]

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Right-padded int64 arrays [len(indices), longest]."""
        import numpy as np

        longest = max(len(self.columns["input_ids"][i]) for i in indices)
        arrays = {}
        for name, rows in self.columns.items():
            array = np.full(
                (len(indices), longest), self.pad_id if name == "input_ids" else 0, dtype=np.int64
            )
            for at, index in enumerate(indices):
                array[at, : len(rows[index])] = rows[index]
            arrays[name] = array
        return arrays


@dataclass(frozen=True)
class Timed:
    """What a model made of a share of the texts.

    Args:
        of: which texts, in order.
        outputs: [texts, ...] of those.
        seconds: in the model alone.
        single_seconds: of single texts, where these were timed.
    """

    of: list[int]
    outputs: Any
    seconds: float
    single_seconds: list[float]


def encode(tokenizer: Any, texts: Sequence[str], max_length_tokens: int) -> Encodings:
    """Tokenise texts, cut at a limit, and count those that were cut."""
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length_tokens)
    cut = sum(length > max_length_tokens for length in lengths)
    return Encodings({name: list(rows) for name, rows in encoded.items()}, tokenizer.pad_token_id or 0, cut)


def run(
    forward: Forward,
    encodings: Encodings,
    batches: Sequence[Sequence[int]],
    singly: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> Timed:
    """Put texts through a model.

    Args:
        forward: the model.
        encodings: the texts.
        batches: indices of the texts of each forward pass; one at least.
        singly: also time some texts, evenly spread over the lengths of all, one at a time.
        done: called with how many texts each batch finished.
    """
    import numpy as np

    def timed(batch: dict[str, Any]) -> tuple[Any, float]:
        before = clock.arithmetic_seconds()
        with clock.arithmetic():
            output = forward(batch)
        return output, clock.arithmetic_seconds() - before

    timed(encodings.batch(batches[0]))  # the first pass pays for set-up; it does not count
    outputs, seconds = [], 0.0
    for batch in batches:
        output, took = timed(encodings.batch(batch))
        outputs.append(output)
        seconds += took
        done(len(batch))
    single_seconds = []
    order = encodings.by_length()
    for index in order[:: max(1, len(order) // _TIMED_SINGLY)] if singly else []:
        single_seconds.append(timed(encodings.batch([index]))[1])
    of = [index for batch in batches for index in batch]
    return Timed(sorted(of), np.concatenate(outputs)[np.argsort(of)], seconds, single_seconds)


def torch_classifier(folder: Path, store: Store) -> Forward:
    """The float32 PyTorch model of a folder, logits out; `store` is where an adapter's base may be."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = opening.tuned(folder, store, AutoModelForSequenceClassification)

    def forward(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()

    return forward


def torch_tagger(folder: Path, limit: int) -> Forward:
    """The float32 token classifier of a folder: the index of the likeliest tag of each of `limit` tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()

    def forward(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
        tags = np.zeros((len(logits), limit), dtype=np.int64)  # as wide for each batch
        tags[:, : logits.shape[1]] = logits.argmax(-1).numpy()
        return tags

    return forward


def torch_embedder(folder: Path, precision: str) -> Forward:
    """The frozen encoder of a folder: the mean over a text's tokens of its last hidden states."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder, dtype=getattr(torch, precision), local_files_only=True, use_safetensors=True
    ).eval()

    def forward(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
            hidden = model(**tensors).last_hidden_state
            return encoders.mean_pooled(hidden, tensors["attention_mask"]).numpy()

    return forward


def onnx_classifier(path: Path, threads: int) -> Forward:
    """An ONNX model on the CPU with as many threads as PyTorch has, logits out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = [entry.name for entry in session.get_inputs()]
    first = session.get_outputs()[0].name

    def forward(batch: dict[str, Any]) -> Any:
        return session.run([first], {name: batch[name] for name in wanted})[0]

    return forward

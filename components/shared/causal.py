"""Causal language models: loading them, encoding examples, and the loss on the answer alone.

The vocabulary projection costs more than the whole body of a small model (Gemma 3 270M: 336 against 200
MFLOP a token), so it is applied only at positions that predict an answer token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from components.shared import addons, chat, clock, packed
from components.shared.addons import Addon
from components.shared.encoded import Encoded as Encoded
from components.shared.encoded import cut_prompt as cut_prompt
from components.shared.encoded import encode as encode
from components.shared.encoded import encode_all as encode_all
from components.shared.encoded import shorten as shorten
from components.shared.errors import TuneyardError
from components.shared.loss import token_nats
from components.shared.modelcard import ModelCard
from components.shared.store import Store

Precision = Literal["float32", "bfloat16"]
IGNORED = -100


def preferred_precision(setting: str) -> Precision:
    """What to compute in: the setting, or for `auto` bfloat16 where the processor multiplies in it.

    A processor without bfloat16 arithmetic emulates it several times slower than float32.
    """
    import torch

    if setting != "auto":
        return "float32" if setting == "float32" else "bfloat16"
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def served_precision(folder: Path) -> Precision:
    """What a model folder of ours is computed in when it is judged and when it serves.

    bfloat16 where the processor multiplies in it, unless the weights are stored in more: compress keeps
    float32 where rounding would bury what the tuning moved, and loading must not round it after all.
    """
    fast = preferred_precision("auto")
    layout = ModelCard.read(folder).layout
    if layout == "peft" or (layout == "addon" and not Addon.read(folder).moves_base):
        return fast  # the adapter stays float32, as in training
    if layout == "addon":
        return "float32"
    stored = json.loads((folder / "config.json").read_text()).get("dtype")
    return fast if stored == "bfloat16" else "float32"


_ON_CPU: ContextVar[bool] = ContextVar("on_cpu", default=False)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block models are on the CPU, whatever else there is: one is about to be cut up."""
    before = _ON_CPU.set(True)
    try:
        yield
    finally:
        _ON_CPU.reset(before)


def device() -> Any:
    """The GPU when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and not _ON_CPU.get() else "cpu")


def load_base(card: ModelCard, store: Store, precision: Precision) -> Any:
    """The untuned base of a model, in eval mode.

    Raises:
        TuneyardError: the base at its URI is no longer the one that was tuned.
    """
    return open_model(card.base_model.folder(store), precision)


def open_folder(folder: Path, precision: Precision, settings: Any = None) -> tuple[Any, Any]:
    """Load a transformers causal model and its tokenizer; see `open_model`."""
    from transformers import AutoTokenizer

    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return open_model(folder, precision, settings), tokenizer


def open_model(folder: Path, precision: Precision, settings: Any = None) -> Any:
    """Load a transformers causal model from a local folder, in eval mode.

    Args:
        folder: of the model.
        precision: what the weights are held in.
        settings: a transformers config to use in place of the folder's own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=settings,
        dtype=getattr(torch, precision),
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to(device()).eval()


def load(folder: Path, store: Store, precision: Precision) -> tuple[Any, Any, ModelCard]:
    """Load one of our causal model folders (layout transformers, peft or addon), in eval mode.

    Raises:
        TuneyardError: the base changed, or the template gives other token ids than in training.
    """
    card = ModelCard.read(folder)
    if card.layout == "peft":
        from peft import PeftModel
        from transformers import AutoTokenizer

        base = load_base(card, store, precision)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = PeftModel.from_pretrained(base, str(folder), local_files_only=True).eval()
    elif card.layout == "addon":
        from transformers import AutoTokenizer

        model = load_base(card, store, precision)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        addons.load(model, folder)
    elif card.layout == "transformers":
        model, tokenizer = open_folder(folder, precision)
    else:
        raise TuneyardError(
            f"{folder}: layout {card.layout!r} is no causal model", "use the classifier's loader"
        )
    chat.verify_probe(tokenizer, card.template_probe or {}, str(folder))
    return model, tokenizer, card


def pad(batch: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """Right-padded tensors of a batch.

    Returns:
        `input_ids`, `attention_mask`, `labels`, each [batch, longest]; labels are IGNORED where no loss is.
    """
    import torch

    longest = max(map(len, batch))
    rows = [[*e.prompt, *e.answer, *[pad_id] * (longest - len(e))] for e in batch]
    labels = [[IGNORED] * longest for _ in batch]
    for e, label in zip(batch, labels, strict=True):
        for at, token in zip(e.places, e.targets, strict=True):
            label[at] = token
    mask = [[1] * len(e) + [0] * (longest - len(e)) for e in batch]
    return {
        "input_ids": torch.tensor(rows, device=device()),
        "attention_mask": torch.tensor(mask, device=device()),
        "labels": torch.tensor(labels, device=device()),
    }


def body_and_head(model: Any) -> tuple[Any, Any, float]:
    """The transformer below the vocabulary projection, the projection, and its soft cap (0 for none)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return inner.base_model, inner.get_output_embeddings(), float(cap or 0)


def answer_states(model: Any, batch: Sequence[Encoded], pad_id: int) -> tuple[Any, Any]:
    """Last hidden states at the positions that predict a token with loss.

    Args:
        model: causal model, PEFT or not; examples are laid end to end where it takes them so (packed.py).
        batch: examples.
        pad_id: token that fills up the shorter ones otherwise.

    Returns:
        states [tokens with loss, width] and their targets [tokens with loss], in batch order.
    """
    body, _, _ = body_and_head(model)
    if packed.used(model):
        hidden = body(**packed.lay([[*e.prompt, *e.answer] for e in batch], device()), use_cache=False)[0]
        predicts, targets = _predicting(batch)
        return hidden[0, predicts], targets
    tensors = pad(batch, pad_id)
    labels = tensors.pop("labels")[:, 1:]
    hidden = body(**tensors, use_cache=False)[0]
    return hidden[:, :-1][labels != IGNORED], labels[labels != IGNORED]


def _predicting(batch: Sequence[Encoded]) -> tuple[Any, Any]:
    """Places in the laid row whose state predicts a token with loss, and those tokens."""
    import torch

    starts = itertools.accumulate(map(len, batch[:-1]), initial=0)
    places = [start + at - 1 for start, e in zip(starts, batch, strict=True) for at in e.places]
    targets = [token for e in batch for token in e.targets]
    return torch.tensor(places, device=device()), torch.tensor(targets, device=device())


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each of at most `batch_tokens` padded tokens.

    Longest first, so that a batch that does not fit in memory fails at once and not near the end.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def answer_nats(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int = 4096, done: Any = lambda count: None
) -> list[float]:
    """Summed negative log-likelihood of each answer, in nats.

    Args:
        model: causal model in eval mode.
        encoded: the examples.
        batch_tokens: padded tokens in one forward pass.
        done: called with how many examples each batch finished.
    """
    import torch

    nats = [0.0] * len(encoded)
    _, head, cap = body_and_head(model)
    for indices in by_length([len(e) for e in encoded], batch_tokens):
        with clock.arithmetic(), torch.inference_mode():
            states, targets = answer_states(model, [encoded[i] for i in indices], 0)
            losses = token_nats(states, head, cap, targets).cpu()
        for index, part in zip(indices, losses.split([encoded[i].terms for i in indices]), strict=True):
            nats[index] = float(part.double().sum())
        done(len(indices))
    return nats


def token_count(encoded: Iterable[Encoded]) -> int:
    """Tokens that carry loss."""
    return sum(e.terms for e in encoded)

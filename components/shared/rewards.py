"""Reward models: a causal model's body and one number for a whole answer, read at its last token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat, clock, examples
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard

_BATCH_TOKENS = 4096


def open_model(folder: Path, settings: Any = None) -> tuple[Any, Any]:
    """A reward model and its tokenizer, in float32 and eval mode; over a causal base its head is new.

    Args:
        folder: of a causal base, or of a reward model.
        settings: a transformers config to use in place of the folder's own.

    Raises:
        TuneyardError: the model class has no such head (it is no causal model).
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    settings = settings or AutoConfig.from_pretrained(folder, local_files_only=True)
    settings.num_labels = 1
    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, config=settings, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    if not hasattr(model, "score"):
        raise TuneyardError(
            f"{folder}: a {type(model).__name__} does not read a reward at the last token",
            "name a causal language model as train.base_model",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(causal.device()).eval(), tokenizer


def load(folder: Path) -> tuple[Any, Any, ModelCard]:
    """One of our reward model folders.

    Raises:
        TuneyardError: it is no reward model, or the template gives other token ids than in training.
    """
    card = ModelCard.read(folder)
    if card.task != "reward":
        raise TuneyardError(
            f"{folder}: a {card.task} model gives no rewards",
            "name a model that was trained with `objective: reward`",
        )
    model, tokenizer = open_model(folder)
    chat.verify_probe(tokenizer, card.template_probe or {}, str(folder))
    return model, tokenizer, card


def encode(
    tokenizer: Any, asked: Sequence[Mapping[str, str]], answer: str, max_length: int, ended: bool = True
) -> Encoded:
    """Token ids of an answer and what it answers; an over-long prompt loses its left, an answer its end.

    Args:
        tokenizer: of the reward model.
        asked: the messages before the answer.
        answer: its text.
        max_length: tokens of both.
        ended: whether the answer came to its end; else it is read without its end token.
    """
    ids = chat.answer_ids(tokenizer, answer)[:max_length]
    ids = ids if ended or len(ids) == 1 else ids[:-1]
    prompt = chat.prompt_ids(tokenizer, asked)
    room = max_length - len(ids)
    return Encoded(causal.cut_prompt(prompt, room, tokenizer.bos_token_id) if room else [], ids)


def of_sequences(model: Any, batch: Sequence[Encoded], pad_id: int) -> Any:
    """Rewards [sequences], in float32; differentiable where gradients are on.

    Read at the last real token whatever its id: transformers looks for the last one that is no padding, which
    is another one where a tokenizer pads with its end token.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = causal.pad(batch, pad_id)
    hidden = inner.base_model(
        input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=False
    )[0]
    last = tensors["attention_mask"].sum(1) - 1
    states = hidden[torch.arange(len(batch), device=hidden.device), last]
    # The head in float32 also under autocast: a reward of bfloat16 has three digits, and differences of two
    # rewards decide.
    with torch.autocast(hidden.device.type, enabled=False):
        return inner.score(states.float())[:, 0]


def of_answers(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Encoded],
    done: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Rewards of encoded answers, in batches of similar length, without gradients."""
    import torch

    found = [0.0] * len(sequences)
    for indices in causal.by_length([len(each) for each in sequences], _BATCH_TOKENS):
        with clock.arithmetic(), torch.inference_mode():
            rewards = of_sequences(model, [sequences[i] for i in indices], tokenizer.pad_token_id)
        for index, reward in zip(indices, rewards.tolist(), strict=True):
            found[index] = reward
        done(len(indices))
    return found


def pair(tokenizer: Any, example: Mapping[str, Any], max_length: int) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected answer of a preference example, each with its prompt."""
    asked = examples.asked(example)
    chosen, rejected = (
        encode(tokenizer, asked, example[name], max_length) for name in ("chosen", "rejected")
    )
    return chosen, rejected

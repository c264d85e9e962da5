"""Encoder-decoder language models: one side reads the prompt, the other writes the answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat, clock
from components.shared.encoded import Encoded


def encode(tokenizer: Any, example: Mapping[str, Any]) -> Encoded:
    """Token ids of a prompt-completion example, each side as the tokenizer ends it; answers carry loss."""
    *before, last = chat.messages(tokenizer, example)
    source = tokenizer("\n".join(message["content"] for message in before), verbose=False)
    target = tokenizer(text_target=last["content"], verbose=False)
    return Encoded(list(source["input_ids"]), list(target["input_ids"]))


def open_model(folder: Path, precision: causal.Precision, settings: Any = None) -> Any:
    """Load a transformers encoder-decoder model from a local folder, in eval mode.

    Args:
        folder: of the model.
        precision: what the weights are held in.
        settings: a transformers config to use in place of the folder's own.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder,
        config=settings,
        dtype=getattr(torch, precision),
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to(causal.device()).eval()


def tensors(batch: Sequence[Encoded], pad_id: int) -> tuple[dict[str, Any], Any]:
    """Right-padded inputs of the encoder [batch, longest prompt], and labels [batch, longest answer]."""
    import torch

    longest, most = max(len(e.prompt) for e in batch), max(len(e.answer) for e in batch)
    read = [[*e.prompt, *[pad_id] * (longest - len(e.prompt))] for e in batch]
    mask = [[1] * len(e.prompt) + [0] * (longest - len(e.prompt)) for e in batch]
    labels = [[*e.answer, *[causal.IGNORED] * (most - len(e.answer))] for e in batch]
    at = causal.device()
    inputs = {"input_ids": torch.tensor(read, device=at), "attention_mask": torch.tensor(mask, device=at)}
    return inputs, torch.tensor(labels, device=at)


def answer_logits(model: Any, batch: Sequence[Encoded], pad_id: int) -> tuple[Any, Any]:
    """Logits at each answer token, float32 [answer tokens, vocabulary], and those tokens; in batch order."""
    inputs, labels = tensors(batch, pad_id)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    shifted = inner.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
    there = labels != causal.IGNORED
    return logits[there].float(), labels[there]


def answer_nats(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int = 4096, done: Any = lambda count: None
) -> list[float]:
    """Summed negative log-likelihood of each answer, in nats; see causal.answer_nats."""
    import torch

    nats = [0.0] * len(encoded)
    for indices in causal.by_length([len(e) for e in encoded], batch_tokens):
        with clock.arithmetic(), torch.inference_mode():
            logits, targets = answer_logits(model, [encoded[i] for i in indices], model.config.pad_token_id)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
        for index, part in zip(indices, losses.split([len(encoded[i].answer) for i in indices]), strict=True):
            nats[index] = float(part.double().sum())
        done(len(indices))
    return nats


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[list[list[int]], list[bool], float]:
    """Answer prompts greedily, all in one batch.

    Args:
        model: in eval mode.
        prompts: token ids of each.
        max_new_tokens: longest answer, the token that ends it included.
        done: called with how many answers are finished.

    Returns:
        Token ids of each answer without the end token, whether the model ended it, and the seconds of all.
    """
    import torch

    settings = copy.deepcopy(model.generation_config)
    # What the folder's own settings would search or forbid is no part of what was trained.
    settings.update(num_beams=1, do_sample=False, max_new_tokens=max_new_tokens, max_length=None)
    settings.update(min_length=0, no_repeat_ngram_size=0, early_stopping=False, length_penalty=1.0)
    inputs, _ = tensors([Encoded(list(prompt), []) for prompt in prompts], model.config.pad_token_id)
    started = time.perf_counter()
    with clock.arithmetic(), torch.inference_mode():
        written = model.generate(**inputs, generation_config=settings).tolist()
    end = model.config.eos_token_id
    # The first token is what the decoder starts with; after the end there is padding.
    bodies = [row[1:] for row in written]
    ended = [end in body for body in bodies]
    done(len(prompts))
    answers = [body[: body.index(end)] if end in body else body for body in bodies]
    return answers, ended, time.perf_counter() - started

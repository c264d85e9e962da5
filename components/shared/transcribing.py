"""Speech to text by an encoder-decoder model: what it must write, its loss, and what it writes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.shared import causal, clock
from components.shared.encoded import Encoded


def encode(tokenizer: Any, text: str) -> Encoded:
    """A transcript: what the decoder is given (start, language, task), and what it must write, to its end."""
    ids = list(tokenizer(text).input_ids)
    given = len(tokenizer.prefix_tokens)
    return Encoded(ids[:given], ids[given:])


def transcript_logits(model: Any, heard: Any, batch: Sequence[Encoded]) -> tuple[Any, Any]:
    """Logits where each token of the transcripts is predicted, [tokens, vocabulary], and those tokens.

    Args:
        model: of AutoModelForSpeechSeq2Seq.
        heard: features [recordings, bands, frames].
        batch: their transcripts.
    """
    import torch

    longest = max(len(e) for e in batch) - 1
    fill = model.config.pad_token_id
    read = [[*e.prompt, *e.answer][:-1] for e in batch]
    ids = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in read], device=causal.device())
    logits = model(input_features=heard, decoder_input_ids=ids, use_cache=False).logits
    parts = [
        row[len(e.prompt) - 1 : len(e.prompt) - 1 + len(e.answer)]
        for row, e in zip(logits, batch, strict=True)
    ]
    targets = [token for e in batch for token in e.answer]
    return torch.cat(parts).float(), torch.tensor(targets, device=causal.device())


def write(model: Any, heard: Any, prefix: Sequence[int], end_id: int, most: int) -> list[list[int]]:
    """What a model writes of recordings, greedily, all in one batch; without the token that ends it.

    Args:
        model: in eval mode.
        heard: features [recordings, bands, frames].
        prefix: what the decoder is given.
        end_id: token that ends a transcript.
        most: tokens, its end included.
    """
    import torch

    with clock.arithmetic(), torch.inference_mode():
        encoded = model.get_encoder()(heard)
        ids = torch.tensor([list(prefix)] * len(heard), device=heard.device)
        past, written = None, [[] for _ in range(len(heard))]  # type: tuple[Any, list[list[int]]]
        open_ = set(range(len(heard)))
        for _ in range(most):
            step = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
            for index in list(open_):
                token = int(ids[index, 0])
                if token == end_id:
                    open_.discard(index)
                else:
                    written[index].append(token)
            if not open_:
                break
    return written

"""Makes a small model of random weights. A program of its own: see convert.py.

Nothing was learned, so nothing can be expected of it but that every stage takes it as it takes a real one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Passes of noise from which a batch norm takes the mean and variance that it then keeps.
_PASSES = 200


def main(asked: Path, out: Path) -> None:
    """Write a model folder.

    Args:
        asked: JSON file with what catalogue.RandomModel has.
        out: to be made.
    """
    import torch

    spec = json.loads(asked.read_text())
    torch.manual_seed(spec["seed"])
    model = {"resnet": _resnet, "whisper": whisper}[spec["family"]](spec["config"], spec["processor"], out)
    found = sum(weight.numel() for weight in model.parameters())
    if found != spec["parameters"]:
        sys.exit(f"{found} weights came out, the catalogue expects {spec['parameters']}")
    model.eval().save_pretrained(out)


def _resnet(config: Mapping[str, Any], processor: Mapping[str, Any], out: Path) -> Any:
    """A ResNet without a head; its norms know what its layers give on noise."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    prepared = ConvNextImageProcessorPil(**processor)
    prepared.save_pretrained(out)
    model = ResNetModel(ResNetConfig(**config)).train()
    side = prepared.size["shortest_edge"]
    with torch.no_grad():
        for _ in range(_PASSES):
            model(torch.randn(16, 3, side, side))
    return model


def whisper(config: Mapping[str, Any], processor: Mapping[str, Any], out: Path) -> Any:
    """A Whisper whose tokens are bytes, so that it can write any language."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>"]
    special += ["<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    alphabet = sorted(bytes_to_unicode().values())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], language="en", task="transcribe")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.pad_token = special[0]
    WhisperProcessor(WhisperFeatureExtractor(**processor), tokenizer).save_pretrained(out)
    start, end = vocabulary["<|startoftranscript|>"], vocabulary[special[0]]
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(tokenizer), **ids, **config))
    # Whisper's own list of tokens to suppress is of another vocabulary.
    model.generation_config = GenerationConfig(**ids)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

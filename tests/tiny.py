"""A model that is small in every way and like the real ones in each."""

from __future__ import annotations


def tiny_gemma(vocabulary: int, seed: int = 0, **changes):
    """A random Gemma 3 with a layer of either kind; `changes` are fields of its configuration."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**settings, **changes})).eval()

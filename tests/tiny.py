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


def tiny_resnet(folder, seed: int = 0) -> None:
    """Write a random ResNet of four stages, its norms settled, and how its images are made."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}
    model = ResNetModel(ResNetConfig(layer_type="basic", **sizes)).train()
    with torch.no_grad():
        for _ in range(40):
            model(torch.rand(8, 3, 32, 32) * 2 - 1)
    model.eval().save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)


def tiny_vit(folder, seed: int = 0) -> None:
    """Write a random ViT of two layers, and how its images are made."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def tiny_whisper(folder, seed: int = 0) -> None:
    """Write a random Whisper of one layer each side that hears 1 s and writes bytes."""
    import torch

    from pipelines.samples.random_model import whisper

    torch.manual_seed(seed)
    sizes = {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 40}
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
    sizes |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    whisper(sizes, {"feature_size": 16, "chunk_length": 1}, folder).eval().save_pretrained(folder)

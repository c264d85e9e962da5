"""A quantised GGUF causal model to a bfloat16 safetensors folder: `dequantise.py MODEL.gguf OUT PARAMETERS`.

Run as a program; progress goes to standard output, a line each. It imports nothing of this project.

bfloat16 halves the folder and costs nothing that matters for Gemma-3-270M at Q4_K_M: the norm weights are
exact, a quantised weight moves by at most 2^-8 of itself (0.39%, half a unit in the last place; a Q4_K
step is many times that), and over twelve texts (eight legal consultations, three other Chinese sentences,
one English) the loss per token was 3.2394 in float32 and 3.2377 with rounded weights, 0.0077 nats apart
at most.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

log = logging.getLogger("tuneyard.samples")

ROUND_TRIP = "依法成立的合同，自成立时生效。 Paris\n\n  ok"


def main(model_path: Path, out: Path, parameters: int) -> None:
    """Convert, then check what was made.

    Raises:
        SystemExit: the weights or the tokenizer are not what they should be.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(model_path.parent), "gguf_file": model_path.name}
    log.info("converting the tokenizer (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(out)
    log.info("dequantising the weights (about a minute)")
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain now; with these left in place save_pretrained refuses and loaders are misled.
    model.hf_quantizer = None
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    log.info("checking the converted model")
    _check(out, parameters)


def _check(out: Path, parameters: int) -> None:
    """A library that reads GGUF a little differently must not slip a broken model into the store."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    faults = []
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    found = sum(weight.numel() for weight in model.parameters())
    if found != parameters:
        faults.append(f"{found} weights came out, expected {parameters}")
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        faults.append(f"weights that are not finite numbers: {broken}")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(ROUND_TRIP).input_ids
    if ids[0] != tokenizer.bos_token_id:
        faults.append("the tokenizer does not begin a text with the <bos> token")
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if back != ROUND_TRIP:
        faults.append(f"the tokenizer gives {ROUND_TRIP!r} back as {back!r}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    # This logger alone: what libraries have to say goes to standard error, DeepSpeed's log too.
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    sys.stdout = sys.stderr
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

"""An encoder classifier exported, quantised and proved against the float32 model it came from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.compress import probes, quantise
from components.shared import clock
from components.shared.errors import TuneyardError
from components.shared.modelcard import NAME, ModelCard

# float32 in another order of operations, over a few layers.
MAX_EXPORT_DIFFERENCE = 1e-3
# int8 keeps how far apart texts are within a few percent; a model that lost its input would keep none of it.
MIN_SPREAD_RATIO = 0.5
MODEL = "model.onnx"
_BATCH = 16


@dataclass(frozen=True)
class EncoderProof:
    """What was measured on the probe texts.

    Args:
        export_difference: largest absolute logit difference of float32 ONNX and PyTorch.
        max_logit_difference: of int8 ONNX and PyTorch.
        agreement: share (0-1) of texts that int8 and PyTorch put in the same class.
        spread_ratio: how much int8 logits vary between texts, as a multiple of how much PyTorch's do.
        texts: how many there were.
    """

    export_difference: float
    max_logit_difference: float
    agreement: float
    spread_ratio: float
    texts: int

    def facts(self) -> dict[str, Any]:
        """As JSON for the run's record."""
        return asdict(self)


def _batches(tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Probe texts as padded int64 arrays [batch, longest]; short and long ones meet in each batch."""
    texts = probes.texts()
    stride = len(texts) // _BATCH

    def arrays(part: list[str]) -> dict[str, Any]:
        encoded = tokenizer(part, truncation=True, max_length=max_length, padding=True, return_tensors="np")
        return {name: encoded[name].astype("int64") for name in ("input_ids", "attention_mask")}

    return [arrays(texts[offset::stride]) for offset in range(stride)]


def torch_logits(model: Any, batches: Sequence[dict[str, Any]]) -> Any:
    """PyTorch's logits [texts, labels]."""
    import numpy as np
    import torch

    with clock.arithmetic(), torch.inference_mode():
        parts = [
            model(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy() for batch in batches
        ]
    return np.concatenate(parts)


def onnx_logits(path: Path, batches: Sequence[dict[str, Any]]) -> Any:
    """ONNX Runtime's logits [texts, labels], on the CPU."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with clock.arithmetic():
        return np.concatenate([session.run(["logits"], dict(batch))[0] for batch in batches])


def judge(reference: Any, exported: Any, int8: Any) -> EncoderProof:
    """Compare logits [texts, labels] of PyTorch, float32 ONNX and int8 ONNX."""
    import numpy as np

    spread = float(reference.std(axis=0).mean())
    return EncoderProof(
        export_difference=float(np.abs(exported - reference).max()),
        max_logit_difference=float(np.abs(int8 - reference).max()),
        agreement=float((int8.argmax(-1) == reference.argmax(-1)).mean()),
        spread_ratio=float(int8.std(axis=0).mean()) / max(spread, 1e-12),
        texts=len(reference),
    )


def insist(proof: EncoderProof, min_agreement: float, where: str) -> None:
    """Accept an export or refuse it. A NaN is refused: every comparison with it is false.

    Raises:
        TuneyardError: with every fault and its numbers.
    """
    found = []
    if not proof.export_difference <= MAX_EXPORT_DIFFERENCE:
        found.append(
            f"float32 ONNX differs from PyTorch by {proof.export_difference:.2g} in a logit, "
            f"at most {MAX_EXPORT_DIFFERENCE:g} is allowed"
        )
    if not proof.agreement >= min_agreement:
        found.append(
            f"int8 chooses the float32 class for {proof.agreement:.3f} of {proof.texts} probe texts, "
            f"min_agreement is {min_agreement:g}"
        )
    if not proof.spread_ratio >= MIN_SPREAD_RATIO:
        found.append(
            f"int8 logits vary {proof.spread_ratio:.3f} times as much between texts as float32's, "
            f"at least {MIN_SPREAD_RATIO:g} is needed: its answer is close to constant"
        )
    if found:
        listed = "\n".join(f"  {fault}" for fault in found)
        raise TuneyardError(
            f"{where}: the int8 export was refused\n{listed}",
            "drop `compress:` from the pipeline file to serve float32, or train longer: "
            "a model that barely tells its classes apart has no margin for int8",
        )


def compress_encoder(folder: Path, target: Path, work: Path, min_agreement: float) -> EncoderProof:
    """Export and quantise a classifier, then prove the file that was written.

    Args:
        folder: model folder of layout transformers.
        target: where `model.onnx`, tokenizer files, config.json and tuneyard.json go.
        work: for the float32 graph in between.
        min_agreement: see CompressConfig.

    Raises:
        TuneyardError: the export was refused; says why with numbers.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    card = ModelCard.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", local_files_only=True, use_safetensors=True
    ).eval()
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*", NAME))
    whole = work / "float32.onnx"
    quantise.export(model, whole)
    quantise.quantise(whole, target / MODEL)
    card.model_copy(update={"layout": "onnx"}).write(target)
    batches = _batches(tokenizer, card.max_length_tokens)
    logits = torch_logits(model, batches), onnx_logits(whole, batches), onnx_logits(target / MODEL, batches)
    proof = judge(*logits)
    insist(proof, min_agreement, str(folder))
    whole.unlink()
    return proof

"""From a manifest in the store to a model that answers."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.shared import causal, chat
from components.shared.drift import Window
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.store import Store
from serving import files
from serving.causal import CausalModel
from serving.classifier import Classifier, Forward
from serving.identity import Identity

log = logging.getLogger("tuneyard.serving")

Served = CausalModel | Classifier


def open_model(
    identity: Identity, manifest_uri: str, store: Store, count_tokens: Callable[[int], None]
) -> tuple[Served, ModelCard]:
    """Fetch, verify and load a model, and let it answer a probe.

    Args:
        identity: what the deployment says it is.
        manifest_uri: s3:// URI of its manifest.
        store: where its files are.
        count_tokens: gets how many tokens a causal model generated.

    Raises:
        TuneyardError: a file is missing, damaged or of a type that is not allowed; the card or the chat
            template does not fit; the model does not answer.
    """
    started = time.monotonic()
    manifest = store.read_manifest(manifest_uri)
    if manifest.digest != identity.digest:
        raise TuneyardError(
            f"{manifest_uri} has digest {manifest.digest[:12]}, the deployment says {identity.digest[:12]}",
            "deploy the model again",
        )
    files.verify_names(manifest, manifest_uri)
    store.cache.mkdir(parents=True, exist_ok=True)
    # In the cache's own filesystem: files are hard links. Weights stay mapped after the folder is gone.
    with tempfile.TemporaryDirectory(prefix="serving-", dir=store.cache) as scratch:
        folder = store.get_tree(manifest, Path(scratch) / "model")
        files.verify_contents(folder, manifest)
        card = ModelCard.read(folder)
        served = _open(identity, card, folder, store, count_tokens)
    try:
        answer = served.probe()
    except BaseException:
        served.close()
        raise
    log.info("%s: loaded in %.1f s, answered %r", identity, time.monotonic() - started, answer)
    return served, card


def _open(
    identity: Identity, card: ModelCard, folder: Path, store: Store, count_tokens: Callable[[int], None]
) -> Served:
    if card.task == "causal-lm":
        if card.template_probe is None:
            raise TuneyardError(f"{identity}: the model card has no template probe", "train the model again")
        model, tokenizer, _ = causal.load(folder, store, causal.served_precision(folder))
        chat.verify_probe(tokenizer, card.template_probe, str(identity))
        return CausalModel(identity, model, tokenizer, Window(card.reference), count_tokens)
    if not card.labels:
        raise TuneyardError(f"{identity}: the model card has no labels", "train the model again")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    onnx = card.layout == "onnx"
    forward = _onnx_forward(folder) if onnx else _torch_forward(folder)
    platform = "onnx" if onnx else "pytorch"
    return Classifier(identity, card, tokenizer, forward, Window(card.reference), platform)


def _onnx_forward(folder: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [tensor.name for tensor in session.get_inputs()]
    return lambda batch: session.run(None, {name: batch[name] for name in names})[0]


def _torch_forward(folder: Path) -> Forward:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model = model.to(causal.device()).eval()

    def forward(batch: Mapping[str, Any]) -> Any:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items()}
            return model(**tensors).logits.float().cpu().numpy()

    return forward

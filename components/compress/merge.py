"""A causal model made ready to serve, with proof: its adapter merged, or a full model copied."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.compress import probes, proof
from components.compress.proof import Proof, Reference
from components.shared import causal, chat, clock, nf4
from components.shared.errors import TuneyardError
from components.shared.modelcard import NAME, ModelCard
from components.shared.store import Store

log = logging.getLogger("tuneyard.compress")

_ADAPTER = "adapter_model.safetensors"
_NOT_OF_THE_EXPORT = (
    "adapter_*",
    "*.safetensors",
    "README.md",
    NAME,
    "config.json",
    "generation_config.json",
)


def tuned_tensors(keys: Iterable[str]) -> set[str]:
    """Names of the base's tensors that an adapter file moves.

    Args:
        keys: tensor names in the adapter file, such as `base_model.model.<module>.lora_A.weight`.
    """
    names = set()
    for key in keys:
        name = key.removeprefix("base_model.model.")
        module, added, _ = name.replace(".ia3_", ".lora_").partition(".lora_")
        names.add(f"{module}.weight" if added else name)
    return names


def scaled_biases(adapted: Any) -> set[str]:
    """Names of the base's biases that IA3 scales together with the weights beside them; zeros stay zeros."""
    return {
        f"{name.removeprefix('base_model.model.')}.bias"
        for name, module in adapted.named_modules()
        if hasattr(module, "ia3_l")
        and not module.is_feedforward
        and module.base_layer.bias is not None
        and bool(module.base_layer.bias.any())
    }


def stored_dtype(folder: Path) -> Any:
    """The dtype that a model folder's config names; float32 where it names none."""
    import torch
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True).dtype or torch.float32


def settle_storage(model: Any, dtype: Any, reference: Reference, bound: float) -> str:
    """Cast a merged float32 model, in place, to what it will be stored in; says what that is.

    Unchanged weights go back to the base's dtype, which is exact. The merged ones follow if the rounded model
    passes the whole proof. bfloat16 has 8 significant bits: it can round a small adapter's update away or
    bury it in noise, and then the merged weights stay in float32 and the model is served in float32.

    Args:
        model: merged, in float32.
        dtype: of the base on disk.
        reference: what the export is measured against.
        bound: largest absolute logit difference.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        return name
    weights = dict(model.named_parameters())
    exact = {key: weights[key].data for key in reference.tuned & weights.keys()}
    for key, value in exact.items():
        weights[key].data = value.to(dtype).float()
    clock.give_back_memory()
    found = proof.faults(proof.measure(model, reference, proof.digests(model), name), bound)
    for key, weight in weights.items():
        weight.data = exact[key] if found and key in exact else weight.data.to(dtype)
    if found:
        log.info(
            "compress: %s would lose the tuning (%s); merged weights stay float32", name, "; ".join(found)
        )
    return f"{name}, merged weights float32" if found else name


def save(model: Any, source: Path, folder: Path, card: ModelCard) -> None:
    """Write a transformers folder: the weights, and the tuned model's own tokenizer files, unchanged."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_NOT_OF_THE_EXPORT))
    model.save_pretrained(folder)
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    settings = json.loads((folder / "config.json").read_text())
    # Whoever loads with dtype="auto" must not round away what was kept in float32.
    settings["dtype"] = "float32" if len(dtypes) > 1 else dtypes.pop()
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    card.model_copy(update={"layout": "transformers"}).write(folder)


def merge_adapter(folder: Path, target: Path, store: Store, bound: float) -> Proof:
    """Merge the adapter of a peft folder into its base, save it, reload it and prove it.

    Everything is computed in float32, whatever the base is stored in.

    Args:
        folder: model folder of layout peft.
        target: where the merged model goes.
        store: to find the base.
        bound: largest absolute logit difference between the saved and the adapted model.

    Raises:
        TuneyardError: the export was refused; see proof.faults.
    """
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoTokenizer

    card = ModelCard.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat.verify_probe(tokenizer, card.template_probe or {}, str(folder))
    sequences = probes.dialogues(tokenizer)
    base = causal.load_base(card, store, "float32")
    base_logits, base_digests = proof.logits(base, sequences), proof.digests(base)
    trained = _as_trained(folder, card, store, sequences) if card.quantised else None
    adapted = PeftModel.from_pretrained(base, str(folder), local_files_only=True).eval()
    with safe_open(folder / _ADAPTER, "pt") as file:
        tuned = tuned_tensors(file.keys()) | scaled_biases(adapted)
    reference = Reference(sequences, base_logits, proof.logits(adapted, sequences), base_digests, tuned)
    merged = _merged(adapted, folder)
    clock.give_back_memory()
    storage = settle_storage(merged, stored_dtype(card.base_model.folder(store)), reference, bound)
    written = proof.digests(merged)
    save(merged, folder, target, card)
    del base, adapted, merged  # the reloaded model needs the room
    clock.give_back_memory()
    exported, _, _ = causal.load(target, store, "float32")
    found = proof.measure(exported, reference, written, storage)
    proof.insist(found, bound, str(folder))
    if trained is None:
        return found
    return replace(found, trained_adapted=proof.compare(trained, reference.adapted))


def _as_trained(folder: Path, card: ModelCard, store: Store, sequences: list[list[int]]) -> list[Any]:
    """Logits of the adapter on the quantised base that it was trained on."""
    from peft import PeftModel

    base = causal.load_base(card, store, "float32")
    nf4.quantise(base)
    return proof.logits(PeftModel.from_pretrained(base, str(folder), local_files_only=True).eval(), sequences)


def _merged(adapted: Any, folder: Path) -> Any:
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT's word for a NaN or an infinity in the merged weights
        raise TuneyardError(f"{folder}: the adapter cannot be merged ({error})", "train it again") from error


def copy_full(folder: Path, target: Path, store: Store, bound: float) -> Proof:
    """Copy a fully fine-tuned model byte for byte, after proof that it is not its base.

    Args:
        folder: model folder of layout transformers.
        target: where the copy goes.
        store: to find the base.
        bound: largest absolute logit difference between the copy and the tuned model.

    Raises:
        TuneyardError: it equals its base, or the copy does not answer as the original.
    """
    tuned, tokenizer, card = causal.load(folder, store, "float32")
    sequences = probes.dialogues(tokenizer)
    tuned_logits, tuned_digests = proof.logits(tuned, sequences), proof.digests(tuned)
    storage = str(stored_dtype(folder)).removeprefix("torch.")
    del tuned
    clock.give_back_memory()
    base = causal.load_base(card, store, "float32")
    base_digests = proof.digests(base)
    # Every weight could move, but not each must (a rarely used embedding may have had no gradient).
    moved = proof.differing(tuned_digests, base_digests)
    reference = Reference(sequences, proof.logits(base, sequences), tuned_logits, base_digests, moved)
    del base
    clock.give_back_memory()
    shutil.copytree(folder, target)
    exported, _, _ = causal.load(target, store, "float32")
    found = proof.measure(exported, reference, tuned_digests, storage)
    proof.insist(found, bound, str(folder))
    return found

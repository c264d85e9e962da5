"""Who is killed in `benchmarks/kill.py`: `-m benchmarks.survivors NAME JOB` kills one of two contenders.

JOB is a JSON file: `config` (TrainConfig), `rows`, `folder` to work in, `kills`. It leaves `ended.json` in
that folder: how the fit went, beside two that were left alone. Both contenders get the same token ids, LoRA
(rank, alpha, dropout), dropout of the base, batch sizes, updates, learning rate, and the same steps between
evaluations and between checkpoints, of which they keep equally many.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import trainer_utils

from benchmarks import trainers
from benchmarks.killing import OURS, TRAINER, Contender, contend
from components.shared import causal
from components.train import checkpoint
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.base import base_settings
from components.train.objectives.opening import open_objective

_JUDGED = 4


def _ours(job: dict[str, Any], folder: Path) -> None:
    """Our fit; the weights it leaves are those after the last update, and those of the best evaluation."""
    config = TrainConfig.model_validate(job["config"])
    objective = open_objective(config, job["rows"], Path(config.base_model))
    torch.manual_seed(config.seed)
    apply_adapter(objective, config)
    encoded = [objective.encode(row) for row in job["rows"]]
    judged, learnt = encoded[:_JUDGED], encoded[_JUDGED:]
    # With `more` the end is kept as a checkpoint: the best weights may be old ones, which no kill touched.
    fit(objective, learnt, judged, config, "float32", folder, lambda *_: None, more=True)
    found = checkpoint.newest(folder)
    assert found is not None
    kept = {
        f"{name}.{weight}": value
        for name in ("weights", "best")
        for weight, value in load_file(found[0] / f"{name}.safetensors").items()
    }
    save_file(kept, folder / "weights.safetensors")


def _trainer(job: dict[str, Any], folder: Path) -> None:
    """transformers.Trainer as its documentation says to resume it; the weights after the last update.

    Its batches are laid end to end (DataCollatorWithFlattening); with `sdpa` and no cache, the masks of
    transformers keep the examples of such a row apart by their positions, on a CPU too.
    """
    config = TrainConfig.model_validate(job["config"])
    base = Path(config.base_model)
    transformers.enable_full_determinism(config.seed)
    model, tokenizer = causal.open_folder(base, "float32", base_settings(base, config.dropout))
    adapter = job["config"]["adapter"]
    model = peft.get_peft_model(model, trainers.lora(adapter["rank"], adapter["dropout"]))
    rows = trainers.rows([causal.encode(tokenizer, row) for row in job["rows"]])
    trainer = transformers.Trainer(
        model=model,
        args=_arguments(config, folder),
        train_dataset=rows[_JUDGED:],
        eval_dataset=rows[:_JUDGED],
        data_collator=transformers.DataCollatorWithFlattening(),
    )
    trainer.train(resume_from_checkpoint=trainer_utils.get_last_checkpoint(str(folder)))
    save_file(checkpoint.copy_weights(model), folder / "weights.safetensors")


def _arguments(config: TrainConfig, folder: Path) -> transformers.TrainingArguments:
    task = {
        "per_device_batch_size": config.per_device_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "updates": config.max_steps,
    }
    told = {
        "output_dir": str(folder),
        "learning_rate": config.peak_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_fraction,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "full_determinism": True,
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "save_total_limit": config.keep_checkpoints,
        "ignore_data_skip": False,
        "restore_callback_states_from_checkpoint": True,
    }
    return transformers.TrainingArguments(**trainers.arguments(task, folder) | told)


CONTENDERS = {
    OURS: Contender(_ours, lambda: (checkpoint, "save"), "step-"),
    TRAINER: Contender(_trainer, lambda: (transformers.Trainer, "_save_checkpoint"), "checkpoint-"),
}


def main() -> None:
    """Kill the contender that is asked for."""
    job = json.loads(Path(sys.argv[2]).read_text())
    ended = contend(CONTENDERS[sys.argv[1]], job)
    (Path(job["folder"]) / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()

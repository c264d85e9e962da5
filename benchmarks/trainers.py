"""One contender of `benchmarks/train.py`, in a process of its own: `-m benchmarks.trainers NAME FOLDER`.

FOLDER has `task.json` (model, LoRA rank, batch sizes, updates, threads) and `examples.jsonl` (token ids of
prompt and answer). It leaves `NAME.json`: real tokens (no padding) and seconds of each update, and losses.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared.encoded import Encoded

PADDED, GROUPED, TRL, TRL_PACKED, OURS = "padded_trainer", "grouped_trainer", "trl", "trl_packed", "ours"
PEERS = {
    PADDED: "transformers.Trainer + PEFT as it comes: padded batches, float32, all logits",
    GROUPED: "transformers.Trainer + PEFT with bf16 and batches grouped by length",
    TRL: "TRL's SFTTrainer with bf16, the model in bfloat16, batches grouped by length, its chunked loss",
    TRL_PACKED: "the same with packing (bfd)",
}


class Clock:
    """Real tokens and seconds of each update."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []
        self._tokens, self._began = 0, time.perf_counter()

    def saw(self, tokens: int) -> None:
        """A forward pass over so many tokens that are no padding."""
        self._tokens += tokens

    def begin(self) -> None:
        """An update begins."""
        self._tokens, self._began = 0, time.perf_counter()

    def end(self) -> None:
        """It ends."""
        self.rows.append({"tokens": self._tokens, "seconds": time.perf_counter() - self._began})


def lora(rank: int, dropout: float = 0.0) -> Any:
    """PEFT's settings of LoRA on all linear layers, alpha twice the rank as it is with us."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def ours(task: dict[str, Any], examples: Sequence[Encoded], clock: Clock) -> None:
    """Our updates, from the code that the train stage runs."""
    import torch

    from components.shared import causal
    from components.shared.clock import keep_few_kernels
    from components.train.adapters.applying import apply_adapter
    from components.train.config import TrainConfig
    from components.train.data import schedule_batches
    from components.train.objectives.opening import open_objective
    from components.train.ranks import ALONE
    from components.train.sharding.whole import Whole
    from components.train.update import make_optimizer, timed_update

    keep_few_kernels()
    config = TrainConfig(
        objective="sft",
        base_model=task["model"],
        adapter={"kind": "lora", "rank": task["rank"], "alpha": 2 * task["rank"], "dropout": 0.0},
        per_device_batch_size=task["per_device_batch_size"],
        gradient_accumulation_steps=task["gradient_accumulation_steps"],
        max_length=task["max_length"],
        max_steps=task["updates"],
    )
    precision = causal.preferred_precision(config.precision)
    objective = open_objective(config, [], Path(task["model"]))
    torch.manual_seed(0)
    apply_adapter(objective, config)
    objective.model.train()
    layout = Whole(ALONE, make_optimizer(objective.model, config))

    def note(row: dict[str, float], tokens: int, seconds: float) -> None:
        clock.saw(tokens)
        clock.losses.append(row["loss"])

    steps = schedule_batches(list(map(len, examples)), config, objective.packs)
    for number, step in enumerate(steps):
        clock.begin()
        batches = [[examples[i] for i in micro] for micro in step]
        timed_update(objective, layout, len(steps), config, precision, note, lambda _: False, number, batches)
        clock.end()


def count_tokens(clock: Clock, model: Any, pad_id: int) -> None:
    """Let each forward pass of a model count its tokens; padding is the token that no example holds."""

    def count(_: Any, __: Any, named: dict[str, Any]) -> None:
        clock.saw(int((named["input_ids"] != pad_id).sum()))

    model.register_forward_pre_hook(count, with_kwargs=True)


def watch(clock: Clock) -> Any:
    """A callback that times updates and keeps their losses."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    return Watch()


def packed_rows(task: Mapping[str, Any], examples: Sequence[Encoded]) -> int:
    """Full rows that hold as many tokens as the examples of one update do on average."""
    mean = sum(map(len, examples)) / len(examples)
    wanted = mean * task["per_device_batch_size"] * task["gradient_accumulation_steps"]
    return max(1, round(wanted / task["max_length"]))


def rows(examples: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """The examples as a Trainer takes them: the loss is on answers alone."""
    return [
        {"input_ids": [*e.prompt, *e.answer], "labels": [*[-100] * len(e.prompt), *e.answer]}
        for e in examples
    ]


def arguments(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of a Trainer that computes on the CPU and tells nobody."""
    return {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": task["per_device_batch_size"],
        "gradient_accumulation_steps": task["gradient_accumulation_steps"],
        "max_steps": task["updates"],
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }


def trainer(
    task: dict[str, Any], examples: Sequence[Encoded], clock: Clock, folder: Path, grouped: bool
) -> None:
    """transformers.Trainer with PEFT."""
    import datasets
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.data import DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32), lora(task["rank"])
    )
    better = {"bf16": True, "train_sampling_strategy": "group_by_length"} if grouped else {}
    count_tokens(clock, model, tokenizer.pad_token_id)
    Trainer(
        model=model,
        args=TrainingArguments(**arguments(task, folder), **better),
        train_dataset=datasets.Dataset.from_list(rows(examples)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[watch(clock)],
    ).train()


def trl(task: dict[str, Any], examples: Sequence[Encoded], clock: Clock, folder: Path, packed: bool) -> None:
    """TRL's SFTTrainer; packed rows hold as many tokens to the update as the others have."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    given = arguments(task, folder) | {"bf16": True, "max_length": task["max_length"]}
    if packed:
        given |= {
            "packing": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": packed_rows(task, examples),
        }
    else:
        given |= {"train_sampling_strategy": "group_by_length"}
    built = SFTTrainer(
        model=model,
        args=SFTConfig(**given),
        train_dataset=datasets.Dataset.from_list(rows(examples)),
        processing_class=tokenizer,
        peft_config=lora(task["rank"]),
    )
    count_tokens(clock, built.model, tokenizer.pad_token_id)
    built.add_callback(watch(clock))
    built.train()


def read_task(folder: Path) -> tuple[dict[str, Any], list[Encoded]]:
    """What a contender finds in its folder: the task and the examples."""
    lines = (folder / "examples.jsonl").read_text().splitlines()
    return json.loads((folder / "task.json").read_text()), [Encoded(**json.loads(line)) for line in lines]


def main() -> None:
    """Run the contender that is asked for."""
    import torch

    name, folder = sys.argv[1], Path(sys.argv[2])
    task, examples = read_task(folder)
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    clock = Clock()
    run: dict[str, Callable[[], None]] = {
        OURS: lambda: ours(task, examples, clock),
        PADDED: lambda: trainer(task, examples, clock, folder, False),
        GROUPED: lambda: trainer(task, examples, clock, folder, True),
        TRL: lambda: trl(task, examples, clock, folder, False),
        TRL_PACKED: lambda: trl(task, examples, clock, folder, True),
    }
    run[name]()
    (folder / f"{name}.json").write_text(json.dumps({"updates": clock.rows, "losses": clock.losses}))


if __name__ == "__main__":
    main()

"""LLaMA-Factory as a contender of `benchmarks/train.py`, in the environment of llamafactory.txt.

`python -m benchmarks.peers.llamafactory NAME FOLDER [exact]`, run with that environment's Python: FOLDER has
what `benchmarks/trainers.py` reads, and `texts/`. It starts LLaMA-Factory by its own entry, `run_exp`, and
leaves `NAME.json`: real tokens and seconds of each update, losses, and which examples the first update had.
`exact` is one update in float32, left in `NAME.exact.json`: its loss must be the reference's.

Settings: those of its examples for LoRA (train_lora/*_lora_sft.yaml: bf16, `lora_target: all`), with the
rank, the learning rate and the batch of the other contenders, nothing recomputed in the backward pass (its
examples recompute; nobody else here does), and the template `empty`, which leaves text as it is; packed by
`neat_packing`, where no example sees another. It takes text, so each example's text is what its ids decode
to, and before the first update the ids and labels it made of that must be the examples' own.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import shutil
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import trainers
from benchmarks.peers.environment import Environment
from components.shared.encoded import Encoded

MODULE, EXACT = "benchmarks.peers.llamafactory", "exact"
PADDED, PACKED = "llamafactory", "llamafactory_packed"
PEERS = {
    PADDED: "LLaMA-Factory's LoRA SFT as its examples set it: bf16, lora_target all, padded batches",
    PACKED: "the same with neat_packing",
}
TOLD = ("llamafactory", "torch", "transformers", "peft", "accelerate", "datasets", "trl")
# Nats a token between its first loss and a reference on the same examples, both in float32: what is asked of
# our own loss. They add the same numbers in another order, which moved it by 6e-7 (Gemma, four examples). On
# six of the random Qwen2's, loss on the prompts too moves it by 0.011, a packed row read as one text by
# 0.0016.
LOSS_TOLERANCE = 1e-3


def write_texts(folder: Path, examples: Sequence[Encoded]) -> None:
    """Write the examples as text to FOLDER/texts, in the form that LLaMA-Factory reads.

    Raises:
        ValueError: ids that are not what the tokenizer of FOLDER/model makes of their text.
    """
    from transformers import PreTrainedTokenizerFast

    # tokenizer.json as it stands: for a Qwen2, AutoTokenizer of our transformers makes a Qwen2Tokenizer of
    # any file, which is not what LLaMA-Factory's older one does.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model", local_files_only=True)
    texts = folder / "texts"
    texts.mkdir()
    rows = [
        {"instruction": text_of(tokenizer, e.prompt), "input": "", "output": text_of(tokenizer, e.answer)}
        for e in examples
    ]
    (texts / "examples.json").write_text(json.dumps(rows))
    (texts / "dataset_info.json").write_text(json.dumps({"examples": {"file_name": "examples.json"}}))


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that a tokenizer makes these ids of.

    Raises:
        ValueError: it makes other ids of what they decode to.
    """
    text = str(tokenizer.decode(ids))
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(again) != list(ids):
        at = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), len(again))
        raise ValueError(
            f"{len(ids)} ids decode to a text of {len(again)} ids, the first other one at {at}: leave the"
            " example out, or train LLaMA-Factory on other ids than the others"
        )
    return text


def settings(
    name: str, task: Mapping[str, Any], examples: Sequence[Encoded], folder: Path, exact: bool = False
) -> dict[str, Any]:
    """What LLaMA-Factory is given; see the module."""
    packed = name == PACKED
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": task["model"],
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": task["rank"],
        "lora_alpha": 2 * task["rank"],
        "lora_dropout": 0.0,
        "dataset": "examples",
        "dataset_dir": str(folder / "texts"),
        "template": "empty",
        "cutoff_len": task["max_length"],
        "overwrite_cache": True,
        "neat_packing": packed,
        "bf16": not exact,
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": 1 if packed else task["per_device_batch_size"],
        "gradient_accumulation_steps": (
            trainers.packed_rows(task, examples) if packed else task["gradient_accumulation_steps"]
        ),
        "max_steps": 1 if exact else task["updates"],
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "output_dir": str(folder / "output" / (f"{name}.exact" if exact else name)),
    }


def located(
    rows: Iterable[Mapping[str, Any]], examples: Sequence[Encoded], pad_id: int
) -> dict[tuple[int, ...], list[int]]:
    """Which examples each row of LLaMA-Factory's data set holds, by the row's ids without padding.

    Args:
        rows: with `input_ids`, `labels` and, of packed ones, `packing_params`.
        examples: what they must be made of, each once.
        pad_id: the token that fills rows up.

    Raises:
        ValueError: a row holds ids or labels that are no example's, or an example is missing.
    """
    waiting: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, e in enumerate(examples):
        ids, labels = (*e.prompt, *e.answer), (*[-100] * len(e.prompt), *e.answer)
        if pad_id in ids:
            raise ValueError(f"example {index} has the padding token {pad_id}, which is not counted")
        waiting.setdefault((ids, labels), []).append(index)
    found = {}
    for number, row in enumerate(rows):
        ids, labels = tuple(row["input_ids"]), tuple(row["labels"])
        borders = (row.get("packing_params") or {}).get("sequence_boundaries") or [0, len(ids)]
        held = []
        for start, end in itertools.pairwise(borders):
            if set(ids[start:end]) == {pad_id}:
                continue
            left = waiting.get((ids[start:end], labels[start:end]))
            if not left:
                raise ValueError(
                    f"LLaMA-Factory's row {number} holds {end - start} ids with labels, from {start} on, that"
                    f" are no example's (left): {ids[start : start + 8]}... {labels[start : start + 8]}..."
                )
            held.append(left.pop())
        found[without(ids, pad_id)] = held
    missing = sorted(itertools.chain(*waiting.values()))
    if missing:
        raise ValueError(f"LLaMA-Factory made nothing of {len(missing)} examples: {missing[:8]}...")
    return found


def without(ids: Sequence[int], pad_id: int) -> tuple[int, ...]:
    """A row's ids without padding."""
    return tuple(each for each in ids if each != pad_id)


def contend(peer: Environment, name: str, folder: Path, *exact: str) -> dict[str, Any]:
    """Run a contender in its environment; what it leaves."""
    stem = ".".join([name, *exact])
    # LLaMA-Factory refuses a folder that an earlier round has filled.
    shutil.rmtree(folder / "output" / stem, ignore_errors=True)
    peer.run(MODULE, name, str(folder), *exact, log=folder / f"{stem}.log")
    return dict(json.loads((folder / f"{stem}.json").read_text()))


def loss_gap(peer: Environment, name: str, folder: Path, examples: Sequence[Encoded]) -> float:
    """How far its first loss is from the reference's on the same examples, in nats a token, both in float32.

    Raises:
        ValueError: by more than LOSS_TOLERANCE.
    """
    import torch

    from components.train.objectives.sft import Sft

    told = contend(peer, name, folder, EXACT)
    plain = Sft(folder / "model", "float32")
    plain.model.set_attn_implementation("eager")
    batch = [examples[i] for i in told["first"]]
    with torch.no_grad():
        nats = sum(float(plain.plain_loss(batch[at : at + 4], 0.0)) for at in range(0, len(batch), 4))
    reference = nats / sum(e.terms for e in batch)
    gap = abs(told["losses"][0] - reference)
    if not gap <= LOSS_TOLERANCE:
        raise ValueError(
            f"{name} reports a first loss of {told['losses'][0]:.4f} nats a token; the reference gives"
            f" {reference:.4f} on the same {len(batch)} examples: it trains on something else than the others"
        )
    return gap


def _opening(clock: trainers.Clock, examples: Sequence[Encoded], first: list[int]) -> Any:
    """A callback that checks the data before the first update and tells which examples that one had."""
    from transformers import TrainerCallback

    class Opening(TrainerCallback):
        def on_train_begin(self, *_: Any, **named: Any) -> None:
            pad_id = named["processing_class"].pad_token_id
            rows = located(named["train_dataloader"].dataset, examples, pad_id)

            def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
                if not clock.rows:
                    for ids in inputs["input_ids"].tolist():
                        first.extend(rows[without(ids, pad_id)])

            named["model"].register_forward_pre_hook(note, with_kwargs=True)
            trainers.count_tokens(clock, named["model"], pad_id)

    return Opening()


def main() -> None:
    """See the module."""
    import torch

    # Its module for sound imports torchaudio, whose build on the registry loads PyTorch's CUDA build. Text
    # asks nothing of it.
    sound = types.ModuleType("torchaudio")
    sound.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = sound

    from llamafactory.train.tuner import run_exp

    name, folder, exact = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    task, examples = trainers.read_task(folder)
    torch.set_num_threads(task["threads"])
    clock, first = trainers.Clock(), list[int]()
    run_exp(
        settings(name, task, examples, folder, EXACT in exact),
        callbacks=[_opening(clock, examples, first), trainers.watch(clock)],
    )
    told = {"updates": clock.rows, "losses": clock.losses, "first": first}
    (folder / f"{'.'.join([name, *exact])}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

"""Tokens a second of LoRA fine-tuning on ragged lengths, beside transformers.Trainer, TRL and LLaMA-Factory.

Two models: Gemma 3 270M on LawBench's consultations, and a Qwen2 of 11 million random weights on token ids
whose lengths are log-normal (a mean of 120, at most 2,048), half of each an answer. All contenders get the
same examples and as many of them to an update (packed ones as many tokens), one process each, in turn, for
some rounds; the first update is not counted. Tokens are real ones: padding is none. Before that, the loss is
compared with a float32 reference: whole logits, padded, PyTorch's cross-entropy.

LLaMA-Factory wants older versions than ours, so it runs in an environment of its own, made the first time
(peers/environment.py). It reads text, so the Qwen2's tokenizer has a word for each id; what it makes of the
texts of both tasks must be the examples' ids, and its first loss the reference's (peers/llamafactory.py).
Where that environment cannot be made, its figures say "not measured" and why.

Limit by arithmetic: a LoRA step costs 4 FLOP a weight and token in the body and, for each answer token, 4
FLOP a weight of the vocabulary projection; a large matrix product says what the processor does at best.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import trainers
from benchmarks.peers import environment, llamafactory, lock
from benchmarks.peers.environment import Environment
from components.shared import causal, jsonl, sources
from components.shared.causal import Encoded
from components.shared.store import Store
from pipelines.embedded import platform, services
from pipelines.samples import fetch

_GEMMA = "s3://models/gemma-3-270m"
_TASKS: dict[str, dict[str, Any]] = {
    "ragged": {
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "updates": 6,
        "max_length": 2048,
    },
    "gemma": {
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "updates": 3,
        "max_length": 768,
    },
}


def word_tokenizer(size: int) -> Any:
    """A tokenizer of `size` ids that has one word for each, so that text and ids say the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, *(f"w{each}" for each in range(len(special), size))]
    model = models.WordLevel({word: each for each, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _ragged(folder: Path, count: int) -> list[Encoded]:
    """A small model with random weights in `folder`/model, and token ids for it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"vocab_size": 32000, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    settings = Qwen2Config(tie_word_embeddings=True, **shape)
    Qwen2ForCausalLM(settings).save_pretrained(folder / "model")
    word_tokenizer(shape["vocab_size"]).save_pretrained(folder / "model")
    draw = random.Random(0)
    found = []
    for _ in range(count):
        length = max(8, min(2048, round(draw.lognormvariate(4.3, 0.95))))
        ids = [draw.randrange(10, 31000) for _ in range(length)]
        found.append(Encoded(ids[: length // 2], ids[length // 2 :]))
    return found


def _legal(store: Store, model: Path, count: int, max_length: int) -> list[Encoded]:
    from transformers import AutoTokenizer

    from components.shared import chat

    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(model, local_files_only=True))
    rows = [
        {"prompt": row["query"], "completion": row["response"]}
        for name in ("consultation", "statute")
        for path in sorted(store.get_prefix(f"s3://corpora/legal/{name}").rglob("*.jsonl"))
        for row in jsonl.read(path)
    ]
    encoded = (causal.encode(tokenizer, row) for row in random.Random(42).sample(rows, 4 * count))
    return [e for e in encoded if len(e) <= max_length][:count]


def _contend(name: str, folder: Path, peer: Environment | None) -> float:
    """Real tokens a second of one contender over its updates but the first."""
    if name in llamafactory.PEERS:
        assert peer is not None
        updates = llamafactory.contend(peer, name, folder)["updates"][1:]
    else:
        command = [sys.executable, "-m", "benchmarks.trainers", name, str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        updates = json.loads((folder / f"{name}.json").read_text())["updates"][1:]
    return sum(row["tokens"] for row in updates) / sum(row["seconds"] for row in updates)


def _measure(
    name: str, folder: Path, examples: list[Encoded], rounds: int, peer: Environment | None, why_not: str
) -> dict[str, Any]:
    """All contenders on one model and corpus; what LLaMA-Factory lacks says `why_not`."""
    (folder / "task.json").write_text(
        json.dumps(_TASKS[name] | {"model": str(folder / "model"), "rank": 16, "threads": os.cpu_count()})
    )
    lines = (json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in examples)
    (folder / "examples.jsonl").write_text("\n".join(lines))
    figures: dict[str, Any] = {"loss_difference_in_float32": _loss_gap(folder / "model", examples)}
    theirs = list(llamafactory.PEERS) if peer else []
    if peer:
        llamafactory.write_texts(folder, examples)
        for each in theirs:
            gap = llamafactory.loss_gap(peer, each, folder, examples)
            figures[f"{each}.loss_difference_in_float32"] = gap
    peers = [*trainers.PEERS, *theirs]
    speeds = [
        {each: _told(name, each, _contend(each, folder, peer)) for each in (trainers.OURS, *peers)}
        for _ in range(rounds)
    ]
    for each in speeds[0]:
        figures[f"{each}.tokens_per_second"] = round(statistics.median(r[each] for r in speeds), 1)
    families = {each: [each] for each in peers} | {
        "trl_at_its_best": [trainers.TRL, trainers.TRL_PACKED],
        "llamafactory_at_its_best": theirs,
    }
    for each in (*families, *llamafactory.PEERS):
        figures[f"ratio_to_{each}"] = _ratio(speeds, families.get(each)) or why_not
    return figures


def _ratio(rounds: list[dict[str, float]], peers: list[str] | None) -> float | None:
    """How many times as fast as the fastest of these peers ours is, in the median round."""
    if not peers:
        return None
    return round(statistics.median(r[trainers.OURS] / max(r[peer] for peer in peers) for r in rounds), 2)


def _told(name: str, contender: str, speed: float) -> float:
    print(f"  {name:8} {contender:16} {speed:8.1f} tokens/s", file=sys.stderr, flush=True)
    return speed


def _loss_gap(model: Path, examples: list[Encoded]) -> float:
    """Largest difference, in nats a token, of our loss from the plain one, both in float32."""
    import torch

    from components.train.objectives.base import choose_attention
    from components.train.objectives.sft import Sft

    ours, plain = Sft(model, "float32"), Sft(model, "float32")
    choose_attention(ours, 2048)
    plain.model.set_attn_implementation("eager")
    gaps = []
    with torch.no_grad():
        for start in (0, 4):
            batch = examples[start : start + 4]
            terms = sum(map(ours.terms, batch))
            reference = float(plain.plain_loss(batch, 0.0)) / terms
            gaps.append(abs(float(ours.summed_loss(batch, 0.0)) / terms - reference))
    return max(gaps)


def _arithmetic(figures: dict[str, Any], examples: list[Encoded]) -> dict[str, Any]:
    """How far Gemma's step is from what the processor can do."""
    tokens, answers = sum(map(len, examples)), sum(len(e.answer) for e in examples)
    flop = 4 * (100e6 * tokens + 168e6 * answers) / tokens
    speed = figures[f"{trainers.OURS}.tokens_per_second"]
    return {
        "gflop_per_token": round(flop / 1e9, 3),
        "gflop_per_second": round(flop * speed / 1e9, 1),
        "matmul_gflop_per_second_of_this_machine": round(_matmul_rate(), 1),
    }


def _matmul_rate() -> float:
    import torch

    a = torch.randn(2048, 2048).to(getattr(torch, causal.preferred_precision("auto")))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return best


def _peer() -> tuple[Environment | None, str]:
    """LLaMA-Factory's environment, or why there is none."""
    try:
        return environment.ensure(lock.LIST, services.home_dir()), ""
    except environment.NotMadeError as error:
        return None, f"not measured: {error}"


def _versions(peer: Environment | None, why_not: str) -> dict[str, Any]:
    """What ran: versions of ours, and of LLaMA-Factory's environment with what it took to make."""
    ours = {each: metadata.version(each) for each in ("torch", "transformers", "peft", "trl", "accelerate")}
    told = dict(peer.made) if peer else {}
    installed = told.pop("versions", {})
    theirs = {each: installed[each] for each in llamafactory.TOLD} if peer else why_not
    return {"versions": ours, "llamafactory.versions": theirs} | {
        f"llamafactory.environment.{key}": value for key, value in told.items()
    }


def run(rounds: int) -> dict[str, Any]:
    """Time all contenders on both corpora: on the ragged one in so many rounds, on Gemma in one."""
    peer, why_not = _peer()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "peers": trainers.PEERS | llamafactory.PEERS}
    figures |= _versions(peer, why_not)
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        scratch = Path(folder)
        os.environ["TUNEYARD_HOME"] = str(scratch / "home")
        os.environ.update(platform.environment(platform.up(scratch / "home")))
        try:
            fetch.ensure(["s3://corpora/legal", _GEMMA], scratch / "home")
            store = Store.from_environment()
            model = sources.model_folder(_GEMMA, store)
            legal = _legal(store, model, _needed("gemma"), _TASKS["gemma"]["max_length"])
        finally:
            platform.down(scratch / "home")
        for name in _TASKS:
            (scratch / name).mkdir()
        (scratch / "gemma" / "model").symlink_to(model)
        ragged = _ragged(scratch / "ragged", _needed("ragged"))
        found = {"ragged": _measure("ragged", scratch / "ragged", ragged, rounds, peer, why_not)}
        found["gemma"] = _measure("gemma", scratch / "gemma", legal, 1, peer, why_not)
        found["gemma"] |= _arithmetic(found["gemma"], legal)
    figures |= {f"{name}.{key}": value for name, part in found.items() for key, value in part.items()}
    # The figures that are asked for first.
    first = (trainers.PADDED, trainers.GROUPED, "trl_at_its_best", "llamafactory_at_its_best")
    figures |= {f"ratio_to_{each}": found["ragged"][f"ratio_to_{each}"] for each in first}
    return figures


def _needed(name: str) -> int:
    task = _TASKS[name]
    return int(task["per_device_batch_size"] * task["gradient_accumulation_steps"] * task["updates"])

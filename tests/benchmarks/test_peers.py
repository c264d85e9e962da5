"""LLaMA-Factory as a contender: what can be told without it being installed."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train, trainers
from benchmarks.peers import environment, llamafactory, lock
from components.shared.encoded import Encoded

EXAMPLES = [Encoded([10, 11, 12], [13, 14]), Encoded([15], [16, 17, 1]), Encoded([10, 11], [12, 13, 14])]
ROOT = Path(__file__).resolve().parents[2]


def row(example: Encoded, padding: int = 0) -> dict[str, Any]:
    """An example as LLaMA-Factory's data set should hold it."""
    return {
        "input_ids": [*example.prompt, *example.answer, *[0] * padding],
        "labels": [*[-100] * len(example.prompt), *example.answer, *[-100] * padding],
    }


def packed(*examples: Encoded, padding: int) -> dict[str, Any]:
    """A packed row: examples end to end, and where each ends."""
    rows = [*map(row, examples), {"input_ids": [0] * padding, "labels": [-100] * padding}]
    borders = [sum(len(each["input_ids"]) for each in rows[:at]) for at in range(len(rows) + 1)]
    return {
        "input_ids": [each for part in rows for each in part["input_ids"]],
        "labels": [each for part in rows for each in part["labels"]],
        "packing_params": {"sequence_boundaries": borders},
    }


def test_the_word_tokenizer_has_one_text_for_any_ids(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    train.word_tokenizer(60).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [llamafactory.text_of(tokenizer, [each]) for each in range(60)]
    assert len(set(texts)) == 60
    together = llamafactory.text_of(tokenizer, [*range(60), 12, 1, 12])
    assert tokenizer(together, add_special_tokens=False)["input_ids"] == [*range(60), 12, 1, 12]


def test_ids_that_their_text_does_not_give_back_are_refused() -> None:
    tokenizer = train.word_tokenizer(20)
    with pytest.raises(ValueError, match="3 ids decode to a text of 2 ids, the first other one at 1"):
        llamafactory.text_of(tokenizer, [10, 99, 11])


def test_the_texts_are_those_of_the_examples(tmp_path: Path) -> None:
    train.word_tokenizer(30).save_pretrained(tmp_path / "model")
    llamafactory.write_texts(tmp_path, EXAMPLES)
    info = json.loads((tmp_path / "texts" / "dataset_info.json").read_text())
    rows = json.loads((tmp_path / "texts" / info["examples"]["file_name"]).read_text())
    assert rows[1] == {"instruction": "w15", "input": "", "output": "w16 w17 <eos>"}
    assert len(rows) == len(EXAMPLES)


def test_rows_are_found_to_hold_the_examples() -> None:
    # The first and the last have the same ids; what carries loss tells them apart.
    a, b, c = EXAMPLES
    loose = [row(c), row(a), row(b)]
    assert sorted(llamafactory.located(loose[1:], [a, b], 0).values()) == [[0], [1]]
    assert list(llamafactory.located([packed(c, b, a, padding=4)], EXAMPLES, 0).values()) == [[2, 1, 0]]


def planted(kind: str) -> list[dict[str, Any]]:
    """Rows of the first two examples with one fault."""
    rows = [row(EXAMPLES[0]), row(EXAMPLES[1])]
    if kind == "id":
        rows[1]["input_ids"][0] = 18
    elif kind == "label":
        rows[0]["labels"][2] = 12
    elif kind == "end":
        rows[0] = {key: [*value, 1] for key, value in rows[0].items()}
    elif kind == "twice":
        rows.append(row(EXAMPLES[0]))
    elif kind == "border":
        rows = [packed(EXAMPLES[0], EXAMPLES[1], padding=1)]
        rows[0]["packing_params"]["sequence_boundaries"][1] -= 1
    return rows


@pytest.mark.parametrize("kind", ["id", "label", "end", "twice", "border"])
def test_a_planted_difference_of_ids_or_labels_is_found(kind: str) -> None:
    with pytest.raises(ValueError, match="are no example's"):
        llamafactory.located(planted(kind), EXAMPLES[:2], 0)


def test_a_missing_example_and_one_with_padding_in_it_are_found() -> None:
    with pytest.raises(ValueError, match=r"nothing of 1 examples: \[1\]"):
        llamafactory.located([row(EXAMPLES[0])], EXAMPLES[:2], 0)
    with pytest.raises(ValueError, match="example 1 has the padding token 1"):
        llamafactory.located([], EXAMPLES, 1)


def test_packed_updates_have_as_many_tokens_as_the_others() -> None:
    task = {"per_device_batch_size": 8, "gradient_accumulation_steps": 2, "max_length": 64}
    task |= {"model": "m", "rank": 4, "updates": 3}
    examples = [Encoded([10] * n, [11] * n) for n in (4, 8, 12, 16)]  # 20 ids on average, 320 to an update
    by_name = {
        each: llamafactory.settings(each, task, examples, Path("folder")) for each in llamafactory.PEERS
    }
    per_update = {
        name: given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
        for name, given in by_name.items()
    }
    assert per_update == {llamafactory.PADDED: 16, llamafactory.PACKED: 5}
    assert trainers.packed_rows(task | {"max_length": 4096}, examples) == 1
    assert {name: given["neat_packing"] for name, given in by_name.items()} == {
        llamafactory.PADDED: False,
        llamafactory.PACKED: True,
    }


def test_the_list_is_pinned_and_hashed_with_our_build_of_torch() -> None:
    text = lock.LIST.read_text()
    pins = lock.entries(text)
    assert len(pins) > 40
    loose = [
        pin
        for pin in pins
        if not re.match(r"[a-z0-9.-]+==\S+ ", pin) or not re.search(r"--hash=sha256:[0-9a-f]{64}\b", pin)
    ]
    assert loose == []
    assert "://" not in text
    names = {lock.name_of(pin) for pin in pins}
    assert {*llamafactory.TOLD} <= names
    assert not names & {*lock.LEFT_OUT}
    assert any(pin.startswith(f"{lock.WANTED} ") for pin in pins)
    ours = lock.entries(lock.OURS.read_text())
    assert [p for p in pins if lock.name_of(p) == "torch"] == sorted(
        p for p in ours if lock.name_of(p) == "torch"
    )


def wheel(folder: Path) -> str:
    """A wheel of one module; returns its pin."""
    path = folder / "tiny_peer-1.5-py3-none-any.whl"
    info = "tiny_peer-1.5.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_peer.py", "value = 7\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.5\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return f"tiny-peer==1.5 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees a folder of wheels and nothing else; no network is asked."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


@pytest.mark.slow  # real venvs and pip
def test_an_environment_is_made_once_and_whole(no_index: Path) -> None:
    pins = no_index / "peer.txt"
    pins.write_text(f"# a peer\n{wheel(no_index / 'wheels')}")
    made = environment.ensure(pins, no_index / "home")
    assert made.made["versions"] == {"tiny_peer": "1.5"}
    made.run("tiny_peer", log=no_index / "log")
    with pytest.raises(RuntimeError, match="No module named surely_not"):
        made.run("surely_not", log=no_index / "log")

    # The wheel is gone: it is reused, whatever the comments of the list say, and not when its pins differ.
    (no_index / "wheels" / "tiny_peer-1.5-py3-none-any.whl").unlink()
    pins.write_text(pins.read_text().replace("# a peer", "# the peer"))
    assert environment.ensure(pins, no_index / "home").python == made.python
    pins.write_text(pins.read_text().replace("1.5", "1.6"))
    with pytest.raises(environment.NotMadeError, match=r"No matching distribution found for tiny-peer==1\.6"):
        environment.ensure(pins, no_index / "home")
    assert [each.name for each in (no_index / "home" / "peers").iterdir()] == [made.python.parents[1].name]


def test_too_little_room_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "NEEDED_GIB", 10**9)
    with pytest.raises(environment.NotMadeError, match="GiB free, 1000000000 are needed"):
        environment.ensure(lock.LIST, tmp_path)
    assert list((tmp_path / "peers").iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
def test_without_the_environment_the_figures_say_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The other contenders are measured all the same."""

    def refuse(*_: Any) -> environment.Environment:
        if not there:
            raise environment.NotMadeError("no network")
        return environment.Environment(tmp_path, {"versions": dict.fromkeys(llamafactory.TOLD, "1")})

    speeds = {trainers.OURS: 60.0, llamafactory.PADDED: 20.0, llamafactory.PACKED: 30.0}
    monkeypatch.setattr(environment, "ensure", refuse)
    monkeypatch.setattr(train, "_loss_gap", lambda *_: 0.0)
    monkeypatch.setattr(train, "_contend", lambda name, *_: speeds.get(name, 12.0))
    monkeypatch.setattr(llamafactory, "write_texts", lambda *_: None)
    monkeypatch.setattr(llamafactory, "loss_gap", lambda *_: 0.0)
    peer, why_not = train._peer()
    figures = train._measure("ragged", tmp_path, EXAMPLES, 1, peer, why_not)
    said = "not measured: no network"
    assert figures["ratio_to_padded_trainer"] == figures["ratio_to_trl_at_its_best"] == 5.0
    assert figures["ratio_to_llamafactory"] == (3.0 if there else said)
    assert figures["ratio_to_llamafactory_at_its_best"] == (2.0 if there else said)
    assert ("llamafactory.tokens_per_second" in figures) == there
    versions = train._versions(peer, why_not)["llamafactory.versions"]
    assert versions == (dict.fromkeys(llamafactory.TOLD, "1") if there else said)


def test_a_first_loss_that_is_not_the_references_is_refused(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is computed here once more, from PyTorch's own parts and one example at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    examples = [Encoded([5, 6, 7], [8, 9]), Encoded([9], [10, 11, 12, 2]), Encoded([7, 8], [5, 5])]
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32).eval()
    nats = 0.0
    with torch.no_grad():
        for e in (examples[2], examples[1]):
            logits = model(torch.tensor([[*e.prompt, *e.answer]])).logits[0]
            told = torch.log_softmax(logits, 1)[len(e.prompt) - 1 : -1]
            nats -= float(told.gather(1, torch.tensor(e.answer)[:, None]).sum())
    loss = nats / 6
    (tmp_path / "model").symlink_to(tiny_causal)
    peer = environment.Environment(tmp_path, {})

    def contended(by: float) -> float:
        monkeypatch.setattr(llamafactory, "contend", lambda *_: {"first": [2, 1], "losses": [loss + by]})
        return llamafactory.loss_gap(peer, llamafactory.PADDED, tmp_path, examples)

    # One float32 sum beside another of six terms: their last bits differ.
    assert contended(0.0) < 1e-5
    assert contended(5e-4) == pytest.approx(5e-4, abs=1e-5)
    with pytest.raises(ValueError, match=r"the reference gives .* on the same 2 examples"):
        contended(0.002)


def test_a_later_round_finds_no_output_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA-Factory refuses to write where something lies."""

    def run(_: Any, module: str, name: str, folder: str, *exact: str, log: Path) -> None:
        output = Path(llamafactory.settings(name, task, EXAMPLES, Path(folder), bool(exact))["output_dir"])
        output.mkdir(parents=True)
        (tmp_path / f"{'.'.join([name, *exact])}.json").write_text('{"updates": []}')

    task = {"per_device_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 64}
    task |= {"model": "m", "rank": 4, "updates": 3}
    monkeypatch.setattr(environment.Environment, "run", run)
    peer = environment.Environment(tmp_path, {})
    for exact in ([], [], [llamafactory.EXACT], [llamafactory.EXACT]):
        assert llamafactory.contend(peer, llamafactory.PACKED, tmp_path, *exact) == {"updates": []}

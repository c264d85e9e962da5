"""Tokenised once: what is kept gives the same ids, and whatever they depend on is in its name."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.shared import batches
from components.shared.encoded import Encoded
from components.shared.errors import StageStopped
from components.shared.masked import Piece
from components.train import shards, tokens
from components.train.config import TrainConfig
from components.train.objectives.classification import Labelled
from components.train.objectives.contrastive import Pair as Anchored
from components.train.objectives.opening import open_objective
from components.train.objectives.pairs import Pair
from components.train.objectives.ppo import Prompt
from components.train.objectives.token_classification import Tagged

TALK = [{"role": "user", "content": "合同何时生效？"}, {"role": "assistant", "content": "成立时。"}]


def rows(count, **fields):
    origin = {"file": "corpus.jsonl", "line": 1, "part": "main"}
    return [
        {
            "id": str(n),
            "origin": {**origin, "line": n},
            "prompt": f"第{n}条? " * (n % 5 + 1),
            "completion": f"答 {n}",
        }
        | fields
        for n in range(count)
    ]


def settings(base, **changes):
    defaults = {"objective": "sft", "base_model": str(base), "max_steps": 1, "precision": "float32"}
    return TrainConfig.model_validate(
        {**defaults, "max_length": 24, "over_length": "truncate_prompt", **changes}
    )


class Counted:
    """An objective that counts what it tokenises."""

    def __init__(self, objective):
        self.calls, self.objective, self.tokenizer = 0, objective, objective.tokenizer
        self.shorten, self.pieces, self.account = objective.shorten, objective.pieces, objective.account

    def encode_all(self, examples):
        for one in self.objective.encode_all(examples):
            self.calls += 1
            yield one


@pytest.fixture
def kept(tiny_causal, tmp_path):
    """kept(rows, config, folder) -> (sides, ledgers, how many examples were tokenised)."""

    def run(sides, config=None, folder=tiny_causal, cache=tmp_path / "cache", over=None):
        config = config or settings(tiny_causal, max_over_length=1)
        objective = Counted(over or open_objective(config, sides["train"], Path(folder)))
        found, ledgers = tokens.encoded(objective, sides, config, Path(folder), cache)
        return found, ledgers, objective.calls

    return run


def test_a_second_run_reads_what_the_first_one_tokenised(kept, tmp_path):
    sides = {"train": rows(20), "eval": rows(30)[20:]}
    plain, expected, calls = kept(sides, cache=None)
    assert calls == 30 and isinstance(plain["train"], list)
    for tokenised in (30, 0, 0):
        found, ledgers, calls = kept(sides)
        assert calls == tokenised and isinstance(found["train"], shards.Shards)
        for side in sides:
            assert list(found[side]) == plain[side] == found[side][:]
            assert shards.lengths(found[side]) == [len(example) for example in plain[side]]
            assert dataclasses.asdict(ledgers[side]) == dataclasses.asdict(expected[side])
            assert all(type(token) is int for token in found[side][0].prompt)
    assert expected["train"].counts["cut"] > 0  # so the ledger had something to remember
    assert found["train"][-1] == plain["train"][-1]
    with pytest.raises(IndexError):
        found["train"][20]


CHANGES = {
    "a row": lambda s: s["sides"]["train"][3].update(completion="anders"),
    "a row's origin": lambda s: s["sides"]["train"][3]["origin"].update(line=77),
    "the order of rows": lambda s: s["sides"]["train"].reverse(),
    "one row more": lambda s: s["sides"]["train"].extend(rows(13)[12:]),
    "max_length": lambda s: s["config"].update(max_length=25),
    "over_length": lambda s: s["config"].update(over_length="drop"),
    "the objective's settings": lambda s: s["config"].update(objective={"kind": "sft", "loss_on": "last"}),
    "the objective": lambda s: s["config"].update(objective="language-modeling", over_length="split"),
    "the template": lambda s: _edit(s["folder"], "chat_template.jinja", lambda t: t + " "),
    "the vocabulary": lambda s: _edit(s["folder"], "tokenizer.json", lambda t: t.replace("\n", "\n ", 1)),
    "the code": lambda s: s["patch"].setattr(tokens.digest, "of_code", lambda stage: "other"),
    "the tokenizers library": lambda s: _another(s["patch"], "tokenizers"),
    "the transformers library": lambda s: _another(s["patch"], "transformers"),
}


def _another(patch, library):
    installed = tokens.version
    patch.setattr(tokens, "version", lambda name: "0" if name == library else installed(name))


def _edit(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text() if path.exists() else "{{ messages[0]['content'] }}"))


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_token_ids_depend_on_is_in_the_key(tiny_causal, tmp_path, monkeypatch, change):
    folder = tmp_path / "base"
    shutil.copytree(tiny_causal, folder)
    given = {"max_over_length": 1}
    sides = {"train": [{**r, "text": "x", "origin": dict(r["origin"])} for r in rows(12)], "eval": rows(2)}

    def keys():
        config = settings(folder, **given)
        objective = SimpleNamespace(tokenizer=_tokenizer(folder))
        monkeypatch.setattr(tokens, "_side", lambda o, r, c, place: seen.append(place.name) or ([1], None))
        seen = []
        tokens.encoded(objective, {"train": sides["train"]}, config, folder, folder / "cache")
        return seen

    before = keys()
    assert keys() == before != []
    CHANGES[change]({"sides": sides, "config": given, "folder": folder, "patch": monkeypatch})
    assert keys() != before


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_labels_that_train_tells_are_in_the_key_of_eval(tiny_encoder, kept):
    config = settings(tiny_encoder, objective="classification", over_length="drop", max_over_length=1)

    def sides(*labels):
        train = [
            {**r, "text": "profit rose", "label": labels[n % len(labels)]} for n, r in enumerate(rows(6))
        ]
        return {"train": train, "eval": [{**rows(1)[0], "text": "profit", "label": "up"}]}

    first, _, _ = kept(sides("down", "up"), config, tiny_encoder)
    second, _, calls = kept(sides("a", "down", "up"), config, tiny_encoder)
    assert (first["eval"][0].label, second["eval"][0].label) == (1, 2) and calls == 7


@pytest.mark.parametrize("harm", ["torn", "flipped", "missing", "about"])
def test_what_is_damaged_is_named_thrown_away_and_made_again(kept, tmp_path, caplog, harm):
    sides = {"train": rows(20), "eval": rows(4)}
    plain, _, _ = kept(sides, cache=None)
    kept(sides)
    for place in (tmp_path / "cache/tokens").iterdir():
        path = place / ("about.json" if harm == "about" else "prompt.values.npy")
        raw = path.read_bytes()
        path.chmod(0o644)
        if harm == "torn":
            path.write_bytes(raw[:-5])
        elif harm == "missing":
            path.unlink()
        else:
            at = raw.index(b'"kept": ') + 8 if harm == "about" else len(raw) - 3
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    found, _, calls = kept(sides)
    assert calls == 24 and list(found["train"]) == list(plain["train"])
    assert caplog.text.count("are damaged (") == 2 and str(tmp_path / "cache/tokens") in caplog.text
    assert kept(sides)[2] == 0


def test_one_process_tokenises_and_the_others_wait(kept, tiny_causal):
    sides = {"train": rows(30), "eval": rows(5)}
    config, found = settings(tiny_causal), []
    over = open_objective(config, sides["train"], Path(tiny_causal))
    run = lambda: found.append(kept(sides, over=over))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(calls for _, _, calls in found) == 35 and len(found) == 4
    assert all(list(one["train"]) == list(found[0][0]["train"]) for one, _, _ in found)


def test_a_stop_keeps_nothing_and_leaves_no_lock(kept, tiny_causal, tmp_path):
    config = settings(tiny_causal, over_length="error")
    for _ in range(2):
        with pytest.raises(StageStopped, match="longer than"):
            kept({"train": rows(20), "eval": rows(4)}, config)
    assert list((tmp_path / "cache/tokens").glob("[!.]*")) == []


def test_what_was_unused_for_longest_goes_first(tmp_path):
    for age, name in enumerate(["new", "used", "old", "oldest"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.npy").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    for name, age in ((".torn", 1e6), (".going", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    tokens.bound(tmp_path, tmp_path / "oldest", most=250)
    (tmp_path / ".going").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "oldest"]
    tokens.bound(tmp_path, tmp_path / "oldest", most=0)
    assert [path.name for path in tmp_path.iterdir()] == ["oldest"]


EXAMPLES = {
    "answers": [Encoded([1, 2], [3]), Encoded([1], [2, 3], ((1, 2), (2, 3))), Encoded([], [2**31 - 1])],
    "labels": [Labelled([1, 2, 3], 0), Labelled([], 5)],
    "tags": [Tagged([1, 2], [-100, 3], [(0, 1)]), Tagged([4], [-100], [])],
    "negatives": [Anchored([1], [2, 3], None), Anchored([4, 5], [6], [])],
    "no negative": [Anchored([1], [2, 3], None), Anchored([4, 5], [6], None)],
    "pieces": [Piece([1, 2, 3], 1, 1, 0.15), Piece([1], 0, 0, 0.15)],
    "pairs": [Pair([1], [2], [3, 4], 0.25), Pair([5, 6], [7], [8], 0.0)],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_come_back_as_they_were(tmp_path, name):
    assert shards.write(EXAMPLES[name], tmp_path, {"fact": 1})
    found, about = shards.read(tmp_path)
    assert list(found) == EXAMPLES[name] and about["fact"] == 1
    # What an objective writes into its examples must stay with them.
    assert isinstance(found, list) == (name == "pairs")
    assert [type(getattr(e, f.name)) for e in found for f in dataclasses.fields(e)] == [
        type(getattr(e, f.name)) for e in EXAMPLES[name] for f in dataclasses.fields(e)
    ]


def test_what_has_no_form_is_tokenised_each_time(tmp_path, kept, monkeypatch):
    assert not shards.write([Prompt(TALK, [1], 3)], tmp_path, {})
    assert not shards.write([Encoded([1], [2]), Labelled([1], 2)], tmp_path, {})
    assert not shards.write([Labelled([1], True)], tmp_path, {})
    monkeypatch.setattr(shards, "write", lambda *_: False)
    for _ in range(2):
        found, _, calls = kept({"train": rows(6), "eval": rows(2)})
        assert calls == 8 and len(found["train"]) == 6
    assert list((tmp_path / "cache/tokens").iterdir()) == []


MIXED = [
    *rows(7),
    {**rows(1)[0], "system": "Answer briefly."},
    {**rows(1)[0], "reasoning": "thought first"},
    {"id": "t", "origin": {}, "messages": [*TALK, {"role": "user", "content": "q"}, TALK[1]]},
    {**rows(1)[0], "completion": "ends\n\nwith   blanks "},
]


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_many_at_once_are_encoded_as_one_by_one(tiny_causal, loss_on):
    config = settings(tiny_causal, objective={"kind": "sft", "loss_on": loss_on})
    objective = open_objective(config, [], Path(tiny_causal))
    assert list(objective.encode_all(MIXED)) == [objective.encode(row) for row in MIXED]

    class Otherwise(type(objective)):
        def encode(self, example):
            return Encoded([1], [2])

    objective.__class__ = Otherwise
    assert list(objective.encode_all(MIXED[:2])) == [Encoded([1], [2])] * 2


def test_batches_give_what_the_tokenizer_gives_for_each_text(tiny_causal, tiny_encoder, monkeypatch):
    monkeypatch.setattr(batches, "_TEXTS", 3)
    said = ["", "a", " 合同 ", "line\nfeed", "<s> [MASK] <eos>", "profit rose " * 50, "\u200b"]
    for folder in (tiny_causal, tiny_encoder):
        tokenizer = _tokenizer(folder)
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
        assert list(batches.token_ids(tokenizer, iter(said))) == expected
        # One that was set to cut keeps to it.
        tokenizer(said, truncation=True, max_length=2)
        assert tokenizer.backend_tokenizer.truncation is not None
        assert list(batches.token_ids(tokenizer, said)) == expected

"""A Hugging Face data set: its train split, where its paths tell one."""

from __future__ import annotations

import json
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub.hf_api import DatasetInfo
from huggingface_hub.utils import filter_repo_objects

from components.shared.errors import TuneyardError

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(names): a hub with one data set, whose files hold one row each: their own name."""

    def offer(names):
        info = DatasetInfo(id="org/law", sha=COMMIT, siblings=[{"rfilename": name} for name in names])

        def download(repo_id, *, repo_type, revision, allow_patterns):
            assert (repo_id, repo_type, revision) == ("org/law", "dataset", COMMIT)
            folder = tmp_path / "snapshot"
            for name in filter_repo_objects(names, allow_patterns=allow_patterns):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"q": name, "a": "answer"}))
            return str(folder)

        real = huggingface_hub.HfApi.repo_info
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", create_autospec(real, return_value=info))
        stub = create_autospec(huggingface_hub.snapshot_download, side_effect=download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)

    return offer


SPLITS = [
    "data/train-00000-of-00002.jsonl",
    "data/train-00001-of-00002.jsonl",
    "data/test-00000-of-00001.jsonl",
]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([*SPLITS, "data/validation-00000-of-00001.jsonl", "README.md"], SPLITS[:2]),
        (
            ["en/train/0.jsonl", "en/test/0.jsonl", "de/Train/0.jsonl"],
            ["de/Train/0.jsonl", "en/train/0.jsonl"],
        ),
        (["law_train1.jsonl", "law_test1.jsonl"], ["law_train1.jsonl"]),
        (["training.jsonl", "testing.jsonl"], ["training.jsonl"]),
        (["train_test/test.jsonl", "train_test/train.jsonl"], ["train_test/train.jsonl"]),
        (["trainees.jsonl", "constraints.jsonl", "part[1].jsonl"], None),
        (["test.jsonl", "more.jsonl"], None),
    ],
)
def test_the_train_split_is_read_where_paths_tell_it_and_all_else(hub, run, names, read):
    hub(names)
    _, examples, _ = run("org/law")
    assert [example["prompt"] for example in examples] == (read or sorted(names))
    assert examples[0]["origin"]["file"] == f"org/law@{COMMIT[:12]}/{examples[0]['prompt']}"


def test_a_test_source_is_the_test_split(hub, run):
    hub(SPLITS)
    _, examples, _ = run("org/law", test_source="org/law")
    assert [(e["prompt"], e["origin"]["part"]) for e in examples] == [
        (SPLITS[0], "main"),
        (SPLITS[1], "main"),
        (SPLITS[2], "test"),
    ]


def test_a_test_source_that_has_only_train_is_refused(hub, run):
    hub(SPLITS[:2])
    with pytest.raises(
        TuneyardError, match=r"data set org/law: no file of a test split among \['data/train-0"
    ):
        run("org/law", test_source="org/law")


def test_a_data_set_without_a_data_file_is_refused(hub, run):
    hub(["README.md", "law.py"])
    with pytest.raises(TuneyardError, match="no JSONL, CSV or Parquet file"):
        run("org/law")

"""A base model is safetensors beside a config.json, and whatever else is refused before it is fetched."""

from __future__ import annotations

from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub.hf_api import ModelInfo

from components.shared import sources
from components.shared.errors import TuneyardError
from components.shared.settings import Settings
from components.shared.stage import perform
from components.shared.store import split_uri

PICKLED = ["config.json", "pytorch_model.bin", "training_args.bin", "last.ckpt", "old.pt", "tokenizer.json"]
SAFE = [*PICKLED, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ELSEWHERE = [*PICKLED, "onnx/model.safetensors"]
REFUSED = r"no \*\.safetensors file .*, only last.ckpt, old.pt, pytorch_model.bin, training_args.bin, and "


class Reads(Settings):
    base_model: str

    def external_uris(self):
        return [self.base_model]


@pytest.fixture(params=["local", "s3", "hub"])
def offer(request, store, tmp_path, monkeypatch):
    """offer(names): the URI of a base model with these files, in each kind of place that there is."""

    def local(names):
        for name in names:
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_text("x")
        return str(tmp_path / "model")

    def s3(names):
        _, prefix = split_uri(store.root)
        for name in names:
            store.client.put_object(Bucket="models", Key=f"{prefix}/model/{name}", Body=b"x")
        return f"s3://models/{prefix}/model"

    def hub(names):
        info = ModelInfo(id="org/model", sha="c" * 40, siblings=[{"rfilename": name} for name in names])
        real = huggingface_hub.HfApi.repo_info
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", create_autospec(real, return_value=info))
        return "org/model"

    return {"local": local, "s3": s3, "hub": hub}[request.param]


def test_a_pickled_base_model_is_refused_before_anything_is_fetched_or_trained(offer, store, tmp_path):
    def train(config, inputs, context):
        raise AssertionError("it must not come to this")

    train.__module__ = "components.train.train"
    run = {"id": "run-1", "pipeline": "test"}
    with pytest.raises(TuneyardError, match=REFUSED) as caught:
        perform(train, Reads(base_model=offer(PICKLED)), run, {})
    assert "convert its weights to safetensors" in caught.value.todo
    assert not (store.cache / "prefixes").exists()
    assert store.read_json("runs/run-1/train.json")["error"]["exit_code"] == 1


@pytest.mark.parametrize("names", [SAFE, SAFE[::-1]])
def test_safetensors_are_enough_whatever_stands_beside_them(offer, store, names):
    assert len(sources.fingerprint(offer(names), store, "model")) == 64


def test_weights_count_beside_config_json_only(offer, store):
    with pytest.raises(TuneyardError, match=r"no \*\.safetensors file beside config\.json"):
        sources.fingerprint(offer(ELSEWHERE), store, "model")


def test_a_folder_without_config_json_is_no_base_model(offer, store):
    with pytest.raises(TuneyardError, match=r"no config\.json there"):
        sources.fingerprint(offer(["model.safetensors"]), store, "model")


def test_the_folder_of_a_base_model_is_held_to_the_same(store, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(TuneyardError, match=r"only pytorch_model\.bin"):
        sources.model_folder(str(tmp_path), store)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert sources.model_folder(str(tmp_path), store) == tmp_path

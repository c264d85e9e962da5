"""Images: the loss is transformers' own, augmentation repeats, and what is trained is judged as it was."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from components.evaluate import class_metrics, image_classes
from components.evaluate.config import METRICS, EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.ingest.config import IngestConfig
from components.ingest.ingest import ingest
from components.register.compare import default_metric
from components.register.config import BETTER
from components.shared import images, jsonl
from components.shared.errors import StageStopped, TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact
from components.shared.store import Store
from components.split.config import SplitConfig
from components.split.split import split
from components.train import checkpoint, selfcheck
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.footprint import predict
from components.train.objectives.image_augmenting import augmented
from components.train.objectives.media_config import ImageAugmentation
from components.train.objectives.opening import open_objective
from components.train.train import train
from tests.components.train.staging import stage
from tests.tiny import tiny_resnet, tiny_vit

AUGMENT = {"rotate_degrees": 20.0, "crop": 0.2, "colour_jitter": 0.3, "flip": "both"}
BASES = {"resnet": tiny_resnet, "vit": tiny_vit}


def picture(label, number, size=(24, 20)):
    """A noisy picture: bright above the middle, or below it."""
    noise = np.random.default_rng(number).integers(0, 90, (size[1], size[0], 3))
    half = size[1] // 2
    rows = slice(0, half) if label == "above" else slice(half, None)
    noise[rows] += 150
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    made = {}
    for name, make in BASES.items():
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name])
    return made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder per class, 60 pictures of either."""
    folder = tmp_path_factory.mktemp("pictures")
    for label in ("above", "below"):
        (folder / label).mkdir()
        for number in range(60):
            picture(label, number + 1000 * (label == "above")).save(folder / label / f"{number}.png")
    return folder


def rows_of(corpus, count=8):
    paths = [p for label in ("above", "below") for p in sorted((corpus / label).glob("*.png"))[: count // 2]]
    return [{"image": str(p), "label": p.parent.name, "id": str(p)} for p in paths]


def opened(base, rows, **settings):
    settings = {"objective": "image-classification", "precision": "float32", "dropout": 0.0, **settings}
    config = TrainConfig(base_model=str(base), **settings)
    torch.manual_seed(config.seed)
    return open_objective(config, rows, base), config


@pytest.mark.parametrize("kind", BASES)
def test_the_loss_is_that_of_transformers(bases, corpus, kind):
    from transformers import AutoModelForImageClassification

    rows = rows_of(corpus)
    objective, _ = opened(bases[kind], rows)
    objective.model.eval()
    batch = [objective.encode(row) for row in rows]
    found = objective.summed_loss(batch, 0.0)
    book = AutoModelForImageClassification.from_pretrained(bases[kind], num_labels=2)
    book.load_state_dict(objective.model.state_dict())
    book.eval()
    pictures = [Image.open(row["image"]).convert("RGB") for row in rows]
    values = images.open_processor(bases[kind])(images=pictures, return_tensors="pt")["pixel_values"]
    expected = book(pixel_values=values, labels=torch.tensor([e.label for e in batch])).loss * len(rows)
    # Equal arithmetic, so to the last digits of float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_micro_batches_add_up_with_norms_and_augmentation_on(bases, corpus, kind):
    """A batch norm over the batch, or a draw for each batch, would make the two differ by percents."""
    rows = rows_of(corpus)
    objective, _ = opened(bases[kind], rows, objective={"kind": "image-classification", "augment": AUGMENT})
    objective.model.train()
    batch = [objective.encode(row) for row in rows]
    statistics = {n: b.clone() for n, b in objective.model.named_buffers()}
    (whole,) = objective.turns([batch], None)
    losses = []
    for micros in (whole, [batch[:3], batch[3:]]):
        objective.model.zero_grad()
        loss = sum(
            objective.summed_loss(micro, 0.0) for micro in ([micros] if micros is whole[0] else micros)
        )
        loss.backward()
        losses.append((loss.item(), torch.cat([p.grad.flatten() for p in objective.model.parameters()])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(b, statistics[n]) for n, b in objective.model.named_buffers())
    assert selfcheck.check(objective, batch, rows, "float32")["micro_batches_gradient"] < 1e-3
    # Another update draws anew; what judges is never changed.
    objective.turns([batch], None)
    assert objective.summed_loss(batch, 0.0).item() != pytest.approx(losses[0][0], rel=1e-6)
    objective.model.eval()
    assert objective.summed_loss(batch, 0.0).item() == objective.summed_loss(batch, 0.0).item()


def test_class_weights_and_smoothing_are_those_of_pytorch(bases, corpus):
    rows = rows_of(corpus)[:6]  # four above, two below
    objective, _ = opened(
        bases["vit"], rows, objective={"kind": "image-classification", "class_weights": "balanced"}
    )
    objective.model.eval()
    batch = [objective.encode(row) for row in rows]
    weight = torch.tensor([6 / (2 * 4), 6 / (2 * 2)])
    targets = torch.tensor([e.label for e in batch])
    expected = torch.nn.functional.cross_entropy(
        objective.logits(batch), targets, weight, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(objective.summed_loss(batch, 0.1), expected)


def test_each_augmentation_changes_the_picture_and_repeats(corpus):
    image = picture("above", 3)
    for name, value in AUGMENT.items():
        how = ImageAugmentation(**{name: value})
        drawn = [augmented(image, how, random.Random(seed)) for seed in range(8)]
        assert any(d.tobytes() != image.tobytes() for d in drawn), name
        assert len({d.tobytes() for d in drawn}) > 1, name
        assert all(d.size == image.size for d in drawn)
        again = [augmented(image, how, random.Random(seed)) for seed in range(8)]
        assert [d.tobytes() for d in drawn] == [d.tobytes() for d in again], name
    assert augmented(image, ImageAugmentation(), random.Random(0)).tobytes() == image.tobytes()
    # A mirrored picture is the picture mirrored, and nothing else.
    flips = {
        augmented(image, ImageAugmentation(flip="horizontal"), random.Random(s)).tobytes() for s in range(9)
    }
    assert flips == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}


def fitted(base, corpus, folder, steps=12, interrupt_after=None):
    rows = rows_of(corpus, 24)
    objective, config = opened(
        base,
        rows,
        objective={"kind": "image-classification", "augment": AUGMENT},
        adapter="progressive",
        max_steps=steps,
        per_device_batch_size=4,
        learning_rate=1e-2,
        checkpoint_steps=4,
        early_stopping=None,
        dropout=0.1,
    )
    apply_adapter(objective, config)
    weight_counts(objective, config, steps)
    encoded = [objective.encode(row) for row in rows]

    def report(history, ended):
        if interrupt_after and len(history) == interrupt_after:
            raise KeyboardInterrupt

    fit(objective, encoded, encoded[:6], config, "float32", folder, report)
    return objective.model.state_dict()


@pytest.mark.parametrize("kind", BASES)
def test_a_resumed_training_ends_in_the_same_bits(bases, corpus, tmp_path, kind):
    """Augmentation, dropout and progressive unfreezing on; cut off between two checkpoints."""
    whole = fitted(bases[kind], corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(bases[kind], corpus, tmp_path / "cut", interrupt_after=7)
    torch.manual_seed(99)
    resumed = fitted(bases[kind], corpus, tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("kind", BASES)
def test_unfreezing_goes_from_the_head_down(bases, corpus, kind):
    objective, config = opened(
        bases[kind], rows_of(corpus), adapter={"kind": "progressive", "every_steps": 1}, max_steps=10
    )
    apply_adapter(objective, config)
    weight_counts(objective, config, 10)
    first = {n for n, w in objective.model.named_parameters() if w.requires_grad}
    assert first and all("classifier" in n or "layernorm" in n for n in first)
    assert len(checkpoint.trainable(objective.model)) == len(list(objective.model.parameters()))


@pytest.fixture(scope="session")
def sides(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    config = IngestConfig(source=str(corpus), format="labelled-image")
    _, made = stage(ingest, config, {}, folder)
    _, sides = stage(split, SplitConfig(stratify_by="label"), {**made, "report": made["quarantine"]}, folder)
    return sides


@pytest.mark.parametrize(("kind", "adapter"), [("resnet", "progressive"), ("vit", "lora")])
def test_pictures_go_through_the_stages(bases, sides, tmp_path, monkeypatch, kind, adapter):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrainConfig(
        objective={"kind": "image-classification", "augment": {"crop": 0.1}},
        base_model=str(bases[kind]),
        adapter=adapter,
        max_steps=40,
        per_device_batch_size=8,
        learning_rate=1e-2,
        early_stopping=None,
        precision="float32",
    )
    result, made = stage(train, config, sides, tmp_path)
    assert result.metrics["eval_loss"] < 0.7 * result.metrics["base_eval_loss"]
    inputs = {**sides, **made}
    card = ModelCard.read(inputs["model"].path)
    assert card.task == "image-classification" and card.labels == ["above", "below"]
    assert (inputs["model"].path / "preprocessor_config.json").is_file()
    asked = EvaluateConfig(gates={"accuracy": {"min": 0.9}}, per_device_batch_size=7)
    judged, outputs = stage(evaluate, asked, inputs, tmp_path)
    assert judged.stop == ""
    document = json.loads((outputs["evaluation"].path / "evaluation.json").read_text())
    systems = document["systems"]
    assert set(METRICS[card.task]) <= set(systems["tuned"])
    assert systems["tuned"]["accuracy"] > systems["commonest"]["accuracy"]
    assert systems["pixels_logreg"]["accuracy"] > 0.9 and systems["commonest"]["auc"] == 0.5
    assert default_metric(card.task, systems["tuned"]) in BETTER
    page = (outputs["evaluation"].path / "page.html").read_text()
    assert "Sensitivity" in page and "Images per second" in page
    context = SimpleNamespace(store=Store("s3://none", tmp_path / "cache"))
    task, tests = task_of(inputs, asked), read_tests(inputs)
    parts = [task.take(asked, tests, inputs, context, Share(number, 3)) for number in (1, 2, 3)]
    assert task.judge(asked, tests, inputs, context, parts).systems["tuned"]["auc"] == systems["tuned"]["auc"]


def test_pictures_prepared_otherwise_than_in_training_are_refused(bases, tmp_path):
    processor = images.open_processor(bases["vit"])
    expected = images.probe(processor)
    images.refuse_other(processor, expected, tmp_path)
    for change in ({"image_mean": [0.1, 0.5, 0.5]}, {"size": {"height": 16, "width": 16}}):
        processor.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | change
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(TuneyardError, match="not prepared as in training"):
            images.refuse_other(images.open_processor(tmp_path), expected, tmp_path)
    with pytest.raises(TuneyardError, match="preprocessor_config"):
        images.open_processor(tmp_path / "nothing")


def test_a_test_picture_that_train_has_under_other_bytes_is_a_leak(sides, tmp_path):
    rows = list(jsonl.read(sides["test"].path / "examples.jsonl"))
    twin = {**rows[0], "id": "another", "image": "media/00/elsewhere.png", "label": "another"}
    jsonl.write(tmp_path / "examples.jsonl", [twin])
    leaky = {"test": sides["test"], "train": Artifact(sides["train"].manifest, tmp_path)}
    with pytest.raises(TuneyardError, match="leaked: 1 of"):
        read_tests(leaky)


def test_sensitivity_and_specificity_are_of_the_class_that_is_looked_for():
    truth, said = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1]
    scores = np.eye(2)[said]
    assert class_metrics.of_two(truth, scores, 1) == {
        "sensitivity": 0.75,
        "specificity": pytest.approx(1 / 3),
    }
    assert class_metrics.of_two(truth, scores, 0) == {
        "sensitivity": pytest.approx(1 / 3),
        "specificity": 0.75,
    }
    assert class_metrics.of_two([1, 1], np.eye(2)[[1, 0]], 1) == {"sensitivity": 0.5, "specificity": None}
    pick = image_classes.positive_label
    assert pick(None, ["ill", "well"], {"ill": 3, "well": 90}) == "ill"
    assert pick(None, ["no", "yes"], {"no": 5, "yes": 5}) == "yes"
    assert pick("well", ["ill", "well"], {"ill": 3, "well": 90}) == "well"
    assert pick(None, ["a", "b", "c"], {}) is None
    with pytest.raises(TuneyardError, match="positive_label"):
        pick("sick", ["ill", "well"], {"ill": 3, "well": 90})


@pytest.mark.parametrize("kind", BASES)
def test_the_dry_run_counts_the_memory_of_pictures(bases, corpus, kind):
    rows = rows_of(corpus, 24)
    needs = [
        predict(opened(bases[kind], rows, per_device_batch_size=size)[1], bases[kind], rows, 1000)
        for size in (2, 16)
    ]
    weights = sum(w.numel() for w in opened(bases[kind], rows)[0].model.parameters())
    assert needs[0].total_weights == weights == needs[0].moving_weights
    # Activations grow with the batch; weights, gradients and moments do not.
    working = [n.peak_bytes - n.held_bytes for n in needs]
    assert needs[0].held_bytes == needs[1].held_bytes >= 12 * weights
    assert working[1] > working[0]


def test_one_class_alone_is_refused(bases, corpus):
    with pytest.raises(StageStopped, match="two labels"):
        opened(bases["vit"], rows_of(corpus)[:4])

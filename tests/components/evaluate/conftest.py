"""Tiny real models: a Gemma 3 and a BERT of some thousand weights, tuned for a second, and their cards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from components.shared import causal, chat, digest, jsonl, sources
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context
from components.shared.store import Store
from tests.tiny import tiny_gemma

QUESTIONS = [
    "合同未履行怎么办",
    "欠款不还怎么办",
    "加班没有加班费",
    "房东不退押金",
    "酒后驾驶如何处罚",
    "离婚后孩子归谁",
]
ANSWERS = [
    "根据《中华人民共和国民法典》第五百七十七条，应当承担违约责任。",
    "根据《民法典》第六百七十五条，借款人应当按期返还借款。",
    "根据《劳动法》第四十四条，用人单位应当支付加班工资。",
    "法律依据：《民法典》第七百二十二条，押金应当返还。",
    "法律依据：《道路交通安全法》第九十一条，暂扣驾驶证并处罚款。",
    "由双方协议；协议不成的，由人民法院判决。",
]
TEXTS = {
    "earn": [
        "net profit rose to {} dollars this quarter",
        "the company posts a dividend of {} cents a share",
    ],
    "crude": ["oil output fell by {} barrels a day", "opec keeps its crude price at {} dollars"],
    "grain": ["wheat exports of {} tonnes were shipped", "the maize harvest reached {} tonnes"],
}


def example(fields: dict, line: int) -> dict:
    origin = {"file": "corpus.jsonl", "line": line, "part": "main"}
    return {**fields, "id": digest.of_value(fields), "origin": origin}


def artifact(folder: Path, kind: str = "dataset") -> Artifact:
    return Artifact(Manifest(kind, describe(folder)), folder)


def dataset(folder: Path, rows: list[dict]) -> Artifact:
    jsonl.write(folder / "examples.jsonl", rows)
    return artifact(folder)


def make_tokenizer(texts: list[str]):
    """Characters for Chinese, words for English: each text is a few dozen tokens at most."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    words = sorted(
        {c for text in texts for c in text if not c.isspace()} | {w for t in texts for w in t.split()}
    )
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\x00-\x7f]"), "isolated")]
    )
    raw.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return chat.prepare(PreTrainedTokenizerFast(tokenizer_object=raw, **names))


@pytest.fixture
def write_dataset():
    return dataset


@pytest.fixture
def make_artifact():
    return artifact


@pytest.fixture
def context(tmp_path) -> Context:
    # The store is never asked: the base models of these tests are local folders.
    store = Store("s3://none", tmp_path / "cache")
    return Context("run-1", "legal", "evaluate", "key", store, tmp_path / "out", tmp_path / "work")


def _tune(model, encoded, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        states, targets = causal.answer_states(model, encoded, 0)
        loss = torch.nn.functional.cross_entropy(model.lm_head(states), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def causal_line(tmp_path_factory):
    """Folders of train, test, base and tuned model; test asks the questions of train in other words."""
    root = tmp_path_factory.mktemp("causal")
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    train = [example({"prompt": f"请问{q}？", "completion": a}, n) for n, (q, a) in enumerate(pairs, 1)]
    test = [example({"prompt": f"请问{q}", "completion": a}, n) for n, (q, a) in enumerate(pairs, 11)]
    tokenizer = make_tokenizer([row["prompt"] + row["completion"] for row in train + test])
    model = tiny_gemma(len(tokenizer))
    for name in ("base", "tuned"):
        if name == "tuned":
            _tune(model.train(), [causal.encode(tokenizer, row) for row in train], 60)
        model.eval().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    base = str(root / "base")
    card = ModelCard(
        task="causal-lm",
        layout="transformers",
        base_model=BaseModelRef(uri=base, fingerprint=sources.fingerprint(base, None, "model")),
        max_length_tokens=128,
        template_probe=chat.probe(tokenizer),
        trainable_weights=1,
        total_weights=1,
    )
    card.write(root / "tuned")
    dataset(root / "train", train)
    dataset(root / "test", test)
    return SimpleNamespace(root=root, train=train, test=test, tokenizer=tokenizer, card=card)


@pytest.fixture
def causal_inputs(causal_line) -> dict[str, Artifact]:
    root = causal_line.root
    return {
        "test": artifact(root / "test"),
        "train": artifact(root / "train"),
        "model": artifact(root / "tuned", "model"),
    }


def _texts(first: int, last: int) -> list[dict]:
    return [
        example({"text": pattern.format(number), "label": label}, number)
        for number in range(first, last)
        for label, patterns in TEXTS.items()
        for pattern in patterns
    ]


@pytest.fixture(scope="session")
def class_line(tmp_path_factory):
    """Folders of train, test, base, tuned and ONNX model of a tiny news classifier."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    root = tmp_path_factory.mktemp("classes")
    train, test = _texts(0, 8), _texts(20, 26)
    labels = sorted(TEXTS)
    tokenizer = make_tokenizer([row["text"] for row in train])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=3, max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(root / "base")
    model = BertForSequenceClassification.from_pretrained(root / "base", config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = tokenizer([row["text"] for row in train], return_tensors="pt", padding=True)
    truth = torch.tensor([labels.index(row["label"]) for row in train])
    for _ in range(30):
        loss = model(**batch, labels=truth).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(root / "tuned")
    for name in ("base", "tuned", "onnx"):
        tokenizer.save_pretrained(root / name)
    _export(model.eval(), batch, root / "onnx" / "model.onnx")
    base = str(root / "base")
    card = ModelCard(
        task="classification",
        layout="transformers",
        base_model=BaseModelRef(uri=base, fingerprint=sources.fingerprint(base, None, "model")),
        labels=labels,
        max_length_tokens=8,
        trainable_weights=1,
        total_weights=1,
    )
    card.write(root / "tuned")
    card.model_copy(update={"layout": "onnx"}).write(root / "onnx")
    dataset(root / "train", train)
    dataset(root / "test", test)
    return SimpleNamespace(root=root, train=train, test=test, tokenizer=tokenizer, card=card)


def _export(model, batch, path: Path) -> None:
    """Float32 ONNX: its predictions are those of PyTorch, so a difference is a fault of the stage."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    shape = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Logits().eval(),
        (batch["input_ids"], batch["attention_mask"]),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={"input_ids": shape, "attention_mask": shape, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
        verbose=False,
    )


@pytest.fixture
def class_inputs(class_line) -> dict[str, Artifact]:
    root = class_line.root
    return {
        "test": artifact(root / "test"),
        "train": artifact(root / "train"),
        "model": artifact(root / "tuned", "model"),
        "compressed": artifact(root / "onnx", "model"),
    }

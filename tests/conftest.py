"""What the whole suite shares: one real object store, and models small enough to train in a second."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import socket
import uuid

import hypothesis
import pytest

from tests.tiny import tiny_gemma

# For a line of source, `inspect` looks through every loaded module: 0.1 s when torch's are among them. kfp
# asks it 48 times in a compile for the name of a caller, and for no line.
inspect.stack.__defaults__ = (0,)
# Tiny models are slower on two threads than on one, and far slower when the machine is busy. PyTorch reads
# this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The machine is shared: how long an example takes says nothing about the code.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

TEXTS = [
    "根据《民法典》第一百八十八条，向人民法院请求保护民事权利的诉讼时效期间为三年。",
    "The lessee shall pay the rent within the agreed time limit.",
    "合同自成立时生效，法律另有规定的除外。Contracts take effect when they are formed.",
    "profit rose to 12 mln dlrs vs 3 mln in the first quarter, the company said",
]


# Fixtures with a server process behind them: a test that asks for one is marked `server`.
SERVERS = {"embedded_home", "s3_server", "store_env"}


@pytest.hookimpl(tryfirst=True)  # before pytest picks by marker
def pytest_collection_modifyitems(items):
    for item in items:
        if SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


def pytest_sessionfinish(session, exitstatus):
    """Of an interrupted run, stop what its workers started: they are ended without their fixtures."""
    config = session.config
    if exitstatus != pytest.ExitCode.INTERRUPTED or not config.getoption("numprocesses", None):
        return
    from pipelines.embedded import platform

    for started in config._tmp_path_factory.getbasetemp().rglob("supervisord.conf"):
        platform.down(started.parent)


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """A test that is not marked for it connects to nothing, not even on this machine."""
    if any(request.node.get_closest_marker(name) for name in ("server", "e2e")):
        return

    def refuse(self, address):
        raise AssertionError(f"a unit test connects to {address}: mark it with pytest.mark.server")

    def connect(self, address):
        return original(self, address) if self.family == socket.AF_UNIX else refuse(self, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture(autouse=True)
def no_log_into_a_closed_stream():
    """A stage sends the root log to standard error, which pytest closes after the test."""
    before = list(logging.root.handlers)
    yield
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def store_env(tmp_path_factory):
    """The embedded platform on free ports, and its environment; stopped at the end."""
    from pipelines.embedded import platform

    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("TUNEYARD_HOME", str(home))
    started = platform.up(home)
    environment = platform.environment(started)
    for name, value in environment.items():
        patch.setenv(name, value)
    yield environment
    platform.down(home)
    patch.undo()


@pytest.fixture
def store(store_env, tmp_path, monkeypatch):
    """A store of this test alone, its cache and work folders under tmp_path."""
    from components.shared.store import Store

    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNEYARD_STORE", f"s3://tuneyard/test-{uuid.uuid4().hex[:12]}")
    return Store.from_environment()


@pytest.fixture
def mlflow_store(store, tmp_path, tmp_path_factory, monkeypatch):
    """`store`, and an MLflow database of its own, copied from one that was migrated once (5 s)."""
    from components.shared import mlflow_database

    template = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    if not template.exists():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{template}.new")
        mlflow_database.client()
        os.replace(f"{template}.new", template)
    shutil.copy(template, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TUNEYARD_MLFLOW_ARTIFACTS", "s3://mlflow")
    return store


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer with 300 tokens, trained on four sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory, tiny_tokenizer):
    """Folder of a random Gemma 3 with two layers."""
    folder = tmp_path_factory.mktemp("tiny-causal")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"max_position_embeddings": 512, "sliding_window": 64, "initializer_range": 0.02}
    tiny_gemma(len(tiny_tokenizer), **ids, **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of a random BERT with two layers and a word-piece tokenizer: of TEXTS all words and characters.

    The vocabulary is written, not trained: tokenizers' trainer numbers word pieces in another order in each
    process, and with it the random weights of every word.
    """
    import torch
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-encoder")
    normal = BertNormalizer()
    split = [BertPreTokenizer().pre_tokenize_str(normal.normalize_str(text)) for text in TEXTS]
    words = sorted({word for text in split for word, _ in text})
    letters = sorted(set("".join(words)))
    # A word's own characters, at its start and within it, so that whatever is written in them has a token.
    pieces = dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder

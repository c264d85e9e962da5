"""The int8 encoder: one file, the same classes, the same bytes each time; a bad one is refused."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from components.compress import encoder, probes, quantise
from components.shared.errors import TuneyardError
from components.shared.manifest import describe
from components.shared.modelcard import ModelCard


@pytest.fixture(scope="module")
def int8(classifier, tmp_path_factory):
    """(proof, folder, work folder) of the classifier, compressed once for this module."""
    work = tmp_path_factory.mktemp("int8")
    return encoder.compress_encoder(classifier, work / "out", work, 0.9), work / "out", work


def test_int8_keeps_the_classes(int8, classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    proof, folder, _ = int8
    assert proof.export_difference < 1e-4 and proof.agreement >= 0.9
    assert proof.texts == len(probes.texts()) == 64
    # On texts that the stage did not look at, through the plain attention that training uses.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    text = ["profit rose", "合同自成立时生效，法律另有规定的除外。" * 2, "the lessee shall pay " * 8] * 8
    encoded = tokenizer(text, padding=True, truncation=True, max_length=64, return_tensors="np")
    batch = {k: encoded[k].astype("int64") for k in ("input_ids", "attention_mask")}
    ours = encoder.onnx_logits(folder / encoder.MODEL, [batch])
    theirs = encoder.torch_logits(model, [batch])
    assert ours.shape == (24, 3)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.9


def test_any_batch_and_length_runs_and_padding_is_ignored(int8):
    _, folder, _ = int8
    path = folder / encoder.MODEL
    ids = np.arange(5, 12)[None].astype("int64")
    alone = encoder.onnx_logits(path, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}])
    padded = np.zeros((3, 40), dtype="int64")
    padded[:, :7] = ids
    padded[1, 7:] = 9  # what stands under the mask must not matter
    mask = np.tile((np.arange(40) < 7).astype("int64"), (3, 1))
    together = encoder.onnx_logits(path, [{"input_ids": padded, "attention_mask": mask}])
    assert alone.shape == (1, 3) and together.shape == (3, 3)
    # Not exactly: activations share one int8 scale over the batch, and padding positions take part in it.
    np.testing.assert_allclose(together, np.repeat(alone, 3, axis=0), atol=0.15 * np.abs(alone).max())


def test_any_mask_means_what_it_means_to_pytorch(classifier, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier, attn_implementation="eager").eval()
    quantise.export(model, tmp_path / "float32.onnx")
    ids = np.arange(5, 32, dtype="int64").reshape(3, 9)
    mask = np.array([[0] * 4 + [1] * 5, [1] * 3 + [0] * 2 + [1] * 4, [1] * 6 + [0] * 3])  # left, hole, right
    batch = [{"input_ids": ids, "attention_mask": mask}]
    exported, reference = (
        encoder.onnx_logits(tmp_path / "float32.onnx", batch),
        encoder.torch_logits(model, batch),
    )
    # float32 in another order
    np.testing.assert_allclose(exported, reference, atol=1e-4)


def test_the_folder_is_whole_and_the_card_carried_over(int8, classifier):
    _, folder, _ = int8
    before, after = ModelCard.read(classifier), ModelCard.read(folder)
    assert after.layout == "onnx" and after.model_copy(update={"layout": "transformers"}) == before
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "tuneyard.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".data"))]
    model = onnx.load(folder / encoder.MODEL, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_matrices_and_the_word_table_are_int8(int8):
    _, folder, _ = int8
    model = onnx.load(folder / encoder.MODEL)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) <= 4096
    kinds = Counter(node.op_type for node in model.graph.node)
    # Two layers: three of the six matrices in the fused attention; and the pooler. The head stays float32.
    assert kinds["QAttention"] == 2
    assert kinds["MatMulInteger"] == 2 * 3 + 1
    # The embeddings' two additions before their norm are three tables: word + type, + position.
    assert kinds["Sum"] == kinds["LayerNormalization"] == 2 * 2 + 1


def test_equal_input_gives_equal_bytes(int8, classifier, tmp_path):
    encoder.compress_encoder(classifier, tmp_path / "again", tmp_path, 0.9)
    assert describe(tmp_path / "again") == describe(int8[1])


def test_the_stage_reports_sizes_and_agreement(classifier, run_compress):
    result, folder = run_compress(classifier)
    assert result.metrics["size_before_bytes"] == (classifier / "model.safetensors").stat().st_size
    assert result.metrics["size_after_bytes"] == (folder / "model.onnx").stat().st_size
    assert result.metrics["agreement"] >= 0.9
    assert result.metadata["compressed"]["labels"] == ["earn", "acq", "trade"]
    assert "of 64 texts" in result.page.read_text()


def test_a_wrong_export_is_refused(classifier, tmp_path, monkeypatch):
    export = quantise.export

    def export_another_bias(model, path):
        export(model, path)
        written = onnx.load(path)
        bias = next(t for t in written.graph.initializer if t.name.endswith("classifier.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(np.array([9, 0, 0], "float32"), bias.name))
        onnx.save(written, path)

    monkeypatch.setattr(quantise, "export", export_another_bias)
    with pytest.raises(TuneyardError, match="float32 ONNX differs from PyTorch"):
        encoder.compress_encoder(classifier, tmp_path / "out", tmp_path, 0.9)


def test_a_constant_or_nan_answer_is_refused_with_every_fault():
    logits = np.random.default_rng(0).normal(size=(64, 3))
    encoder.insist(encoder.judge(logits, logits, logits), 1.0, "here")
    constant = np.tile(logits.mean(axis=0), (64, 1))
    for bad in (constant, np.full_like(logits, math.nan)):
        with pytest.raises(TuneyardError) as caught:
            encoder.insist(encoder.judge(logits, logits + 0.01, bad), 0.9, "here")
        for fault in ("differs from PyTorch by 0.01", "of 64 probe texts", "close to constant"):
            assert fault in caught.value.what


def table_model(table, transposed=False):
    """ONNX: rows of a table, and where asked the same table in a matrix product."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], "look", axis=0)]
    outputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", table.shape[1]])]
    if transposed:
        nodes.append(helper.make_node("MatMul", ["table", "x"], ["y"], "product"))
        outputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [table.shape[0], 1]))
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    inputs += (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [table.shape[1], 1])] if transposed else []
    )
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(deadline=None, max_examples=25)
@given(rows=hnp.arrays(np.float32, (4, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_a_table_row_is_off_by_a_254th_of_its_largest_weight_at_most(rows):
    import onnxruntime

    table = np.zeros((1024, 64), dtype="float32")
    table[:4] = rows
    model = table_model(table)
    assert quantise.quantise_tables(model) == ["table"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": np.arange(8)})
    bound = np.abs(table[:8]).max(axis=1, keepdims=True) / 254
    # Half a step, and float32's own rounding on top (a scale below 1e-38 has few bits or none); a row of
    # zeros stays exactly zero.
    assert (np.abs(found - table[:8]) <= bound * 1.001 + 1e-36 * (bound > 0)).all()


def test_a_table_that_is_also_multiplied_is_left_alone():
    table = np.ones((1024, 64), dtype="float32")
    assert quantise.quantise_tables(table_model(table, transposed=True)) == []
    assert quantise.quantise_tables(table_model(table[:16])) == []

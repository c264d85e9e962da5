"""An encoder classifier as one ONNX file with int8 weights.

Matrices become int8 with a scale per output channel (activations are scaled to uint8 while running),
embedding tables int8 with a scale per row. The tables are half of a small encoder, so without them a model
shrinks by a third only; they are looked up, not multiplied, hence the Gather below instead of an integer
operator.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPSET = 17
# Smaller tables (token types) cost more in extra operators than they save in bytes.
_MIN_TABLE_WEIGHTS = 1 << 16


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute the tracer's warnings on Python branches and the quantiser's advice on what is done here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(model: Any, path: Path) -> None:
    """Write a classifier as float32 ONNX.

    Inputs `input_ids` and `attention_mask`, int64 [batch, sequence]; output `logits`, float32
    [batch, labels].

    Args:
        model: in eval mode, with eager attention: the other kinds add operators against NaN that cost time.
        path: of the file.
    """
    import onnx
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    # Two rows of other lengths, so that the mask is not all ones and is not folded into a constant.
    ids = torch.arange(16).reshape(2, 8) % model.config.vocab_size
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    axes = {0: "batch", 1: "sequence"}
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            Logits().eval(),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,
        )
        fused = fuse_attention(path, model.config)
    sum_residuals(fused.graph)
    onnx.save(fused, path)


def fuse_attention(path: Path, config: Any) -> Any:
    """An exported encoder with each attention as one operator where ONNX Runtime's tool knows its pattern.

    A text by itself spends more time in the forty small operators of an attention, most of which only arrange
    numbers, than in its products: fused, MiniLM's int8 texts per second rise by half.

    Args:
        path: of the exported model, residual additions still Add: the pattern ends at one.
        config: the transformers config.
    """
    from onnx import helper
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    # The usual form keeps of a mask only how long each text is, so it would be wrong for left-padded input.
    options.use_raw_attention_mask(True)
    options.enable_embed_layer_norm = False  # would hide the embedding tables from quantise_tables
    options.enable_skip_layer_norm = False  # see sum_residuals
    options.enable_bias_skip_layer_norm = False
    options.enable_bias_gelu = False  # would tie the product before it to its bias, as float32
    fused = optimize_model(
        str(path),
        "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=options,
        opt_level=0,
    ).model
    if "com.microsoft" not in {entry.domain for entry in fused.opset_import}:
        fused.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return fused


def sum_residuals(graph: Any) -> int:
    """Turn the residual additions before each layer norm, in place, from Add into Sum. Returns how many.

    They mean the same, but when ONNX Runtime loads a model it fuses Add and LayerNormalization into one
    operator that takes several times longer on a CPU than the two (79 against 16 ms over MiniLM's layers,
    8 texts of 192 tokens). It does not know the pattern with Sum.
    """
    producers = {output: node for node in graph.node for output in node.output}
    constants, changed = {tensor.name for tensor in graph.initializer}, 0
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add" and not constants & set(before.input):
            before.op_type = "Sum"
            changed += 1
    return changed


def _tables(graph: Any) -> dict[str, Any]:
    """Float32 matrices of a graph that are only looked up by row, and are large enough."""
    import numpy as np
    import onnx

    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def looked_up(tensor: Any) -> bool:
        return all(
            node.op_type == "Gather" and node.input[0] == tensor.name and not any(a.i for a in node.attribute)
            for node in users.get(tensor.name, [])
        )

    return {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and len(tensor.dims) == 2
        and np.prod(tensor.dims) >= _MIN_TABLE_WEIGHTS
        and looked_up(tensor)
    }


def quantise_tables(model: Any) -> list[str]:
    """Turn the embedding tables of an ONNX model, in place, into int8 rows with a float32 scale each.

    row = int8 * (largest absolute value of the row / 127), so no weight is off by more than 1/254 of its
    row's largest.

    Returns:
        Names of the tables.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = _tables(graph)
    for name, tensor in tables.items():
        weights = numpy_helper.to_array(tensor)
        scale = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1  # a row of zeros, such as the padding token's
        rows = np.rint(weights / scale).astype(np.int8)
        graph.initializer.remove(tensor)
        parts = (
            numpy_helper.from_array(rows, f"{name}.int8"),
            numpy_helper.from_array(scale, f"{name}.scale"),
        )
        graph.initializer.extend(parts)
    nodes = []
    for node in list(graph.node):
        if node.op_type != "Gather" or node.input[0] not in tables:
            nodes.append(node)
            continue
        table, rows, out = node.input[0], node.input[1], node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{table}.int8", rows], [f"{out}.int8"], f"{node.name}.int8", axis=0),
            helper.make_node(
                "Gather", [f"{table}.scale", rows], [f"{out}.scale"], f"{node.name}.scale", axis=0
            ),
            helper.make_node(
                "Cast", [f"{out}.int8"], [f"{out}.float"], f"{node.name}.cast", to=TensorProto.FLOAT
            ),
            helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out], f"{node.name}.mul"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return list(tables)


def _head(graph: Any) -> list[str]:
    """Name that the quantiser gives the classifier's own product: so few weights are not worth any error."""
    return [
        f"{node.name}_MatMul" for node in graph.node if node.op_type == "Gemm" and "logits" in node.output
    ]


def quantise(source: Path, target: Path) -> None:
    """Quantise a float32 ONNX model to int8, as one file.

    Args:
        source: the float32 model.
        target: the int8 model.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    quantise_tables(model)
    # The exporter's stored shapes name the batch axis otherwise than the quantiser's own inference does.
    del model.graph.value_info[:]
    with _quiet():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Attention"],
            nodes_to_exclude=_head(model.graph),
            per_channel=True,
            # Signed: with unsigned weights the integer product is not the fast one (1.4 against 2.1 times
            # PyTorch's throughput on a CPU with VNNI).
            weight_type=QuantType.QInt8,
            # Shape inference does not know the fused operator; what it cannot tell is float32 here.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )

"""Rewrites of an exported float32 encoder that compute the same numbers in less time."""

from __future__ import annotations

from typing import Any

# Each position of their output depends on the same position of their inputs alone.
_BY_POSITION = {"Add", "Sum", "Sub", "Mul", "Div", "Pow", "Erf", "Tanh", "Relu", "Gelu", "MatMul", "LayerNormalization"}


def _producers(graph: Any) -> dict[str, Any]:
    return {output: node for node in graph.node for output in node.output}


def _constants(graph: Any) -> dict[str, int]:
    """Name -> number of dimensions, of what no input changes."""
    found = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = len(node.attribute[0].t.dims)
    return found


def sum_residuals(graph: Any) -> int:
    """Turn the residual additions before each layer norm, in place, from Add into Sum. Returns how many.

    They mean the same, but ONNX Runtime fuses Add and LayerNormalization, when it loads a model, into one
    operator that is several times slower on a CPU than the two (79 against 16 ms for MiniLM's 13, at 8 texts
    of 192 tokens). It does not know the pattern with Sum.
    """
    producers, constants, changed = _producers(graph), _constants(graph), 0
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add" and not constants.keys() & set(before.input):
            before.op_type = "Sum"
            changed += 1
    return changed


class _FirstPosition:
    """Copies of the nodes behind a pooled position, which compute that position alone."""

    def __init__(self, graph: Any) -> None:
        self.producers, self.constants = _producers(graph), _constants(graph)
        self.nodes: list[Any] = []
        self._done: dict[str, str] = {}

    def _applies(self, node: Any) -> bool:
        """Whether a node may be computed for one position: also with the position axis gone, it means the same."""
        if node is None or node.op_type not in _BY_POSITION or len(node.output) != 1:
            return False
        fixed = [name for name in node.input if name in self.constants]
        if node.op_type == "MatMul":
            return fixed == [node.input[1]] and self.constants[node.input[1]] == 2
        if node.op_type == "LayerNormalization":
            axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
            return axis in ([], [-1]) and fixed == list(node.input[1:])
        return all(self.constants[name] <= 1 for name in fixed)

    def of(self, name: str, gather: Any) -> str:
        """Name of a tensor that holds the first position of `name`, [batch, sequence, width]."""
        import onnx

        if name in self.constants:
            return name
        if name not in self._done:
            node = self.producers.get(name)
            copy = onnx.NodeProto()
            if self._applies(node):
                inputs = [self.of(item, gather) for item in node.input]
                copy.CopyFrom(node)
            else:
                inputs = [name, gather.input[1]]
                copy.CopyFrom(gather)
            self._done[name] = f"{name}.first"
            copy.name = f"{self._done[name]}.{copy.op_type}"
            del copy.input[:]
            copy.input.extend(inputs)
            copy.output[0] = self._done[name]
            self.nodes.append(copy)
        return self._done[name]


def _pooled(graph: Any) -> Any:
    """The node that takes one position of the last layer's output, or None."""
    constants, producers = _constants(graph), _producers(graph)
    for node in graph.node:
        axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        source = producers.get(node.input[0]) if node.op_type == "Gather" else None
        if source is not None and source.op_type == "LayerNormalization" and axis == [1]:
            return node if constants.get(node.input[1]) == 0 else None
    return None


def only_first_position(graph: Any) -> int:
    """Compute, in place, behind the last attention only the position that the head reads.

    A classifier of the BERT family reads the first token of the last layer; two thirds of that layer are then
    computed for the other positions in vain. Returns how many nodes now work on one position (0: no such head).
    """
    gather = _pooled(graph)
    if gather is None:
        return 0
    first = _FirstPosition(graph)
    pooled = first.of(gather.input[0], gather)
    at = list(graph.node).index(gather)
    nodes = list(graph.node)
    for node in nodes[at + 1 :]:
        for index, name in enumerate(node.input):
            if name == gather.output[0]:
                node.input[index] = pooled
    ordered = [*nodes[:at], *first.nodes, *nodes[at + 1 :]]
    del graph.node[:]
    graph.node.extend(_needed(ordered, {output.name for output in graph.output}))
    return len(first.nodes)


def _needed(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """The nodes that the wanted tensors depend on, in order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]

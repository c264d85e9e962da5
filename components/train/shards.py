"""Encoded examples as columns of numbers on disk, read back through a memory map: nothing is unpickled.

An objective's encoded example is a dataclass of its own. Each of its fields becomes one array, or two where
values differ in length: all token ids one after the other, and where each example's begin. An example is made
when it is asked for, so that the token ids of a corpus stay in the page cache, once for all processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from components.shared import digest

ABOUT = "about.json"


class Shards(Sequence[Any]):
    """Encoded examples in a folder.

    Attributes:
        lengths: of the examples in tokens, known without making them.
    """

    def __init__(self, kind: type, fields: dict[str, Callable[[int], Any]], lengths: list[int]) -> None:
        self._kind, self._fields, self.lengths = kind, fields, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._kind(**{name: read(at % len(self)) for name, read in self._fields.items()})

    def __iter__(self) -> Iterator[Any]:
        return (self[at] for at in range(len(self)))


def lengths(examples: Sequence[Any]) -> list[int]:
    """Tokens of each example."""
    return examples.lengths if isinstance(examples, Shards) else [len(example) for example in examples]


def _shape(values: Sequence[Any]) -> str:
    """How a field's values are stored; empty where they are nothing that can be."""
    kinds = {type(value) for value in values}
    if kinds in ({int}, {float}):
        return kinds.pop().__name__
    if kinds == {type(None)}:
        return "none"
    if not kinds <= {list, type(None)} and kinds != {tuple}:
        return ""
    inner = {type(part) for value in values if value for part in value}
    if inner <= {int} and tuple not in kinds:
        return "maybe_ids" if type(None) in kinds else "ids"
    if kinds in ({list}, {tuple}) and inner == {tuple}:
        pairs = [part for value in values for part in value]
        whole = all(len(pair) == 2 and type(pair[0]) is type(pair[1]) is int for pair in pairs)
        return f"{kinds.pop().__name__}_of_pairs" if whole else ""
    return "tuple_of_pairs" if kinds == {tuple} and not inner else ""


def write(examples: Sequence[Any], folder: Path, facts: dict[str, Any]) -> bool:
    """Write examples into an empty folder, and facts beside them.

    Returns:
        Whether they could be: examples of one dataclass, whose fields are numbers, or lists or pairs of them.
    """
    import numpy

    kinds = {type(example) for example in examples}
    if len(kinds) != 1 or not dataclasses.is_dataclass(kind := kinds.pop()):
        return False
    shapes: dict[str, str] = {}
    arrays: dict[str, Any] = {"lengths": numpy.array([len(e) for e in examples], dtype=numpy.int64)}
    for field in dataclasses.fields(kind):
        values = [getattr(example, field.name) for example in examples]
        shapes[field.name] = shape = _shape(values)
        if not shape:
            return False
        if shape in ("int", "float"):
            arrays[f"{field.name}.values"] = numpy.array(values, dtype=shape + "64")
        elif shape != "none":
            lists = [value or () for value in values]
            parts: Iterable[Any] = chain.from_iterable(lists)
            size: tuple[int, ...] = (-1,)
            if shape.endswith("_of_pairs"):
                parts, size = chain.from_iterable(parts), (-1, 2)
            arrays[f"{field.name}.values"] = numpy.fromiter(parts, dtype=numpy.int32).reshape(size)
            arrays[f"{field.name}.ends"] = numpy.cumsum([0, *map(len, lists)], dtype=numpy.int64)
        if shape == "maybe_ids":
            arrays[f"{field.name}.there"] = numpy.array([value is not None for value in values])
    for name, array in arrays.items():
        numpy.save(folder / f"{name}.npy", array, allow_pickle=False)
    files = {path.name: digest.of_file(path) for path in sorted(folder.iterdir())}
    about = {"kind": f"{kind.__module__}:{kind.__qualname__}", "shapes": shapes, "files": files, **facts}
    (folder / ABOUT).write_text(json.dumps({**about, "digest": digest.of_value(about)}))
    for path in folder.iterdir():
        path.chmod(0o444)  # who writes into a mapped file changes what others compute with
    return True


def read(folder: Path) -> tuple[Sequence[Any], dict[str, Any]]:
    """The examples of a folder, and what was written beside them. Examples that may change are made at once.

    Raises:
        ValueError, KeyError, OSError: a file is missing, or is not what was written.
    """
    about = json.loads((folder / ABOUT).read_text())
    if about.pop("digest") != digest.of_value(about):
        raise ValueError(f"{ABOUT} is not what was written")
    for name, sha256 in about["files"].items():
        if digest.of_file(folder / name) != sha256:
            raise ValueError(f"{name} ({os.stat(folder / name).st_size} bytes) has another digest")
    module, _, name = about["kind"].partition(":")
    # Whoever reads them has the objective, so its module is loaded: nothing is imported as a file says.
    kind: Any = getattr(sys.modules[module], name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{name} is no kind of example")
    fields = {field: _reader(folder, field, shape) for field, shape in about["shapes"].items()}
    found = Shards(kind, fields, _array(folder, "lengths").tolist())
    return (found if vars(kind)["__dataclass_params__"].frozen else list(found)), about


def _array(folder: Path, name: str) -> Any:
    import numpy

    return numpy.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def _reader(folder: Path, field: str, shape: str) -> Callable[[int], Any]:
    """What gives the field of an example by its number."""
    if shape == "none":
        return lambda at: None
    values = _array(folder, f"{field}.values")
    if shape in ("int", "float"):
        return lambda at: values[at].item()
    ends = _array(folder, f"{field}.ends")

    def ids(at: int) -> Any:
        return values[ends[at] : ends[at + 1]].tolist()

    if shape == "maybe_ids":
        there = _array(folder, f"{field}.there")
        return lambda at: ids(at) if there[at] else None
    if shape.endswith("_of_pairs"):
        around = tuple if shape.startswith("tuple") else list
        return lambda at: around(map(tuple, ids(at)))
    return ids

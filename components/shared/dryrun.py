"""A training without numbers: tensors that have a shape, a type and a storage, and no bytes.

The stage's own code runs on them, so whatever an objective, an adapter or a model keeps is counted, and for
as long as it is kept. Token ids, positions and masks stay real: models ask what is in them. (PyTorch's fake
tensors, which its compiler traces with, do the arithmetic on shapes.)
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.shared import nf4


class Live:
    """Bytes of the storages that exist now, and the most there were at once.

    Attributes:
        bytes: now.
        peak: the most since the last `mark`.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def see(self, tensor: Any) -> None:
        """Count the storage of a tensor until nothing holds it any more."""
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at in self._known:
            return
        size = storage.nbytes()
        self._known[at] = weakref.finalize(storage, self._gone, at, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, at: int, size: int) -> None:
        self._known.pop(at, None)
        self.bytes -= size

    def mark(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes


@contextlib.contextmanager
def shapes_only() -> Iterator[Live]:
    """Within the block tensors of floating point have no bytes, and the storages of all are counted."""
    live = Live()
    try:
        with _fake(), _mode(live), _plain_conversion(), _plain_copies():
            yield live
    finally:
        nf4.forget_tables()  # one that was made in here has no bytes


@functools.cache
def _fake() -> Any:
    """One mode for all dry runs of a process: a table that code keeps belongs to the mode it was made in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def _plain_conversion() -> Iterator[None]:
    """Within the block `module.to(...)` puts new weights in the place of old ones.

    PyTorch swaps the insides of the two, which it refuses to do for a weight that anything points at weakly.
    """
    from torch import nn

    original = nn.Module._apply

    def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        done: dict[int, Any] = {}
        for module in self.modules() if recurse else [self]:
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if id(weight) not in done:
                    changed = fn(weight.detach())
                    same = changed.dtype == weight.dtype and changed.device == weight.device
                    done[id(weight)] = weight if same else nn.Parameter(changed, weight.requires_grad)
                module._parameters[name] = done[id(weight)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else fn(buffer)
        return self

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = original


@contextlib.contextmanager
def _plain_copies() -> Iterator[None]:
    """Within the block a tensor without bytes can be copied: PyTorch's own way asks where its bytes are."""
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensor

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            found = self.detach().clone()
            memo[id(self)] = (
                nn.Parameter(found, self.requires_grad) if isinstance(self, nn.Parameter) else found
            )
        return memo[id(self)]

    FakeTensor.__deepcopy__ = copied
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


def _mode(live: Live) -> Any:
    """The mode that sees each operation before the fake tensors do."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    aten, _made_of_others = torch.ops.aten, torch._C._dispatch_has_kernel_for_dispatch_key

    class Counting(TorchDispatchMode):
        """Whole numbers are computed, all others are not."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func.namespace == "aten" and _made_of_others(func.name(), "CompositeImplicitAutograd"):
                with self:  # what it is made of, without gradients, comes here too
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            unreal = any(isinstance(x, FakeTensor) for x in given)
            if func is aten._local_scalar_dense.default and unreal:
                return 1.0  # a loss or a norm that is looked at
            whole = given and not any(x.is_floating_point() or x.is_complex() for x in given)
            made = not given and _makes_whole(kwargs.get("dtype"), func, args)
            if not unreal and (whole or made) and not _makes_float(kwargs.get("dtype")):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
                args = (args[0], _places(args[1]), *args[2:])
            found = func(*args, **kwargs)
            for tensor in tree_flatten(found)[0]:
                if isinstance(tensor, torch.Tensor):
                    live.see(tensor)
            return found

    return Counting()


def _makes_float(dtype: Any) -> bool:
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def _makes_whole(dtype: Any, func: Any, args: Any) -> bool:
    """Whether an operation without tensors makes whole numbers."""
    if dtype is not None:
        return not _makes_float(dtype)
    name = func.overloadpacket.__name__
    return name in ("arange", "randperm") and all(isinstance(x, int) for x in args)


def _places(indices: Any) -> list[Any]:
    """Indices without masks, whose shape only their content tells."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


@contextlib.contextmanager
def no_weights_read() -> Iterator[None]:
    """Within the block transformers builds its models from their config.json alone.

    Nothing is initialised either: PyTorch draws until all numbers are within bounds, and these never are.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import no_init_weights

    original = PreTrainedModel.__dict__["from_pretrained"]

    def build(cls: Any, folder: str | Path, *args: Any, config: Any = None, **named: Any) -> Any:
        import torch
        from transformers import AutoConfig

        settings = config if config is not None else AutoConfig.from_pretrained(folder, local_files_only=True)
        dtype = named.get("dtype") or named.get("torch_dtype")
        if dtype in (None, "auto"):
            dtype = getattr(settings, "dtype", None) or torch.float32
        model = cls._from_config(settings, dtype=dtype).eval()
        model.tie_weights()
        # As if the file had all of them: what it lacks the training itself says, before anything is computed.
        return (model, {"missing_keys": set()}) if named.get("output_loading_info") else model

    PreTrainedModel.from_pretrained = classmethod(build)
    try:
        with no_init_weights():
            yield
    finally:
        PreTrainedModel.from_pretrained = original

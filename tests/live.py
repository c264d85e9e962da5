"""Bytes of real tensors as they come and go, to hold a dry run against."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Counted(TorchDispatchMode):
    """Bytes of real storages of floating point, now and at most."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # without gradients it arrives here whole, with what it makes inside
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        for tensor in tree_flatten((args, kwargs, found))[0]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.see(tensor)
        return found

    def see(self, tensor):
        storage = tensor.untyped_storage()
        at, size = storage._cdata, storage.nbytes()
        if at not in self.known:
            self.known[at] = weakref.finalize(storage, self.gone, at, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def gone(self, at, size):
        self.known.pop(at)
        self.bytes -= size

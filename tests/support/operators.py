"""What operators a piece of code calls: reads of the device, and what a CUDA graph can't hold."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.item")
# These wait for the device too, or for memory of the host that is not pinned, or return sizes that the values decide.
NOT_IN_A_GRAPH = (
    *READS,
    *("aten.equal", "aten.nonzero", "aten.masked_select", "aten._unique", "aten.unique", "aten.index.Tensor"),
    *("aten.lift_fresh", "aten.scalar_tensor", "aten.repeat_interleave.Tensor"),
)


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for a number of the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).startswith(READS)
        return function(*args, **(kwargs or {}))


class RefuseWhatNoGraphHolds(TorchDispatchMode):
    """Fails where a capture would, and adds up the bytes that operators allocate, which come from PyTorch's allocator.

    A capture takes that memory from its own pool; what others allocate it can't know.
    """

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(NOT_IN_A_GRAPH):
            raise AssertionError(f"{function} can't be captured in a CUDA graph")
        result = function(*args, **(kwargs or {}))
        given = {z.untyped_storage().data_ptr() for z in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(z)}
        for z in torch.utils._pytree.tree_leaves(result):
            if _is(z) and z.untyped_storage().data_ptr() not in given:
                self.num_bytes += z.untyped_storage().nbytes()
        return result


def _is(z: object) -> bool:
    return isinstance(z, torch.Tensor)

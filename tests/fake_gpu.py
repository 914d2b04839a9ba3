"""A GPU that computes nothing: forward passes run on shapes alone, and what would make the host wait for it raises.

A mix of devices raises, a result that the host must know (`item`, `nonzero`, repeats given as a tensor) raises, and so
does a copy between host and device that is not asynchronous. Backward does not run this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


class HostWaits(RuntimeError):
    """A copy for which the host would wait."""


class Watch(TorchDispatchMode):
    """Raises HostWaits at a blocking copy between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            kinds = {x.device.type for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)}
            asynchronous = kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))
            if len(kinds) > 1 and not asynchronous:
                raise HostWaits(f"{func} between {' and '.join(sorted(kinds))}")
        return found


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on a GPU have shapes and no values; autocast works as on one with bf16."""
    with (
        patch("torch.amp.autocast_mode.is_autocast_available", return_value=True),
        patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        patch("torch.cuda.is_bf16_supported", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        FakeTensorMode(allow_non_fake_inputs=False),
        Watch(),
    ):
        yield


def on_gpu(module: nn.Module) -> nn.Module:
    """A module moved to the GPU, in place and without its values. To be called inside `fake_gpu`."""
    return module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=GPU))

"""Attention of a training step by scale groups against one dense mask, forward and backward.

python -m benchmarks.attention --batch 2 --heads 16
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Ruler, show
from models import ScaleSchedule
from models.layers import ScaleCausalAttention, attend, kernel_for
from utils.runtime.distributed import alone
from utils.runtime.entry import entry
from utils.runtime.flags import Parser, whole

SCHEDULES = ["1_2_3_4_5_6_8_10", "1_2_3_4_5_6_8_10_13", "1_2_3_4_5_6_8_10_13_16", "1_2_3_5_7_9_12_16"]


def dense(schedule: ScaleSchedule, device: torch.device):
    """Attention under one (L, L) mask."""
    mask = torch.zeros(schedule.total, schedule.total, dtype=torch.bool, device=device)
    for start, end in zip(schedule.offsets[:-1], schedule.offsets[1:], strict=True):
        mask[start:end, :end] = True
    return lambda q, k, v: attend(q, k, v, mask)


def kinds_of_attention(
    schedule: ScaleSchedule, batch: int, heads: int, dtype: torch.dtype, ruler: Ruler
) -> dict[str, object]:
    """Milliseconds of a layer's attention, forward and backward: by groups, under one mask, and by packed sequences."""
    device, shape = ruler.device, (batch, schedule.total, heads, 64)
    leaves = [F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype).requires_grad_() for _ in range(3)]
    up = torch.randn(shape, device=device).to(dtype).transpose(1, 2)
    kinds = {"groups": ScaleCausalAttention(schedule, device), "one mask": dense(schedule, device)}
    found: dict[str, object] = {}
    for name, kind in kinds.items():

        def call(kind=kind) -> object:
            return torch.autograd.grad(kind(*(x.transpose(1, 2) for x in leaves)), leaves, up)

        found[f"{name} ms"] = 1e3 * ruler.measure(call, 5).seconds
        found[f"{name}: kernels"] = kernels(call, device)
    packed = packed_attention(leaves, schedule, up)
    if packed is not None:
        found["packed ms"] = 1e3 * ruler.measure(packed, 5).seconds
    own = kernel_for(device, dtype)
    return found | {"optional kernel": own.name if own else "none"}


def packed_attention(leaves: list, schedule: ScaleSchedule, up: torch.Tensor) -> Callable[[], object] | None:
    """`torch.nn.attention.varlen` over the spans of all scales at once; None where it does not run."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    batch, device = len(leaves[0]), leaves[0].device

    def starts(lengths: tuple[int, ...]) -> torch.Tensor:
        """Starts of each scale of each image, and the end of all."""
        return torch.tensor([0, *lengths * batch], device=device).cumsum(0).int()

    queries, keys = starts(schedule.lengths), starts(schedule.offsets[1:])
    longest = max(schedule.lengths), schedule.total

    def call() -> object:
        q, k, v = leaves
        seen = [torch.cat([x[:, :end] for end in schedule.offsets[1:]], 1).flatten(0, 1) for x in (k, v)]
        out = varlen_attn(q.flatten(0, 1), *seen, queries, keys, *longest, scale=1.0)
        return torch.autograd.grad(out.unflatten(0, (batch, -1)).transpose(1, 2), leaves, up)

    try:
        call()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return call


def kernels(call: Callable[[], object], device: torch.device) -> str:
    """Names of the attention kernels that ran."""
    if device.type != "cuda":
        return "no GPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    wanted = ("flash", "cudnn", "efficient", "fmha", "math")
    return ", ".join(sorted(name.split("<")[0][:60] for name in names if any(w in name.lower() for w in wanted)))


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.attention")
    parser.add_argument("--batch", type=whole(1), default=2)
    parser.add_argument("--heads", type=whole(1), default=16)
    parser.add_argument("--repeats", type=whole(1), default=15)
    args = parser.parse_args()
    device = alone().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ruler, rows = Ruler(device, dtype), []
    for text in SCHEDULES:
        schedule = ScaleSchedule.parse(text)
        shape = (args.batch, schedule.total, args.heads, 64)
        leaves = [F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype).requires_grad_() for _ in range(3)]
        up = torch.randn(shape, device=device).to(dtype).transpose(1, 2)

        def run(attention) -> tuple[Tensor, ...]:
            out = attention(*(x.transpose(1, 2) for x in leaves))  # noqa: B023
            return torch.autograd.grad(out, leaves, up)  # noqa: B023

        groups, one_mask = ScaleCausalAttention(schedule, device), dense(schedule, device)
        fast, slow, ratio = ruler.compare(lambda: run(groups), lambda: run(one_mask), args.repeats)  # noqa: B023
        rows.append({"L": schedule.total, "groups ms": fast * 1e3, "dense mask ms": slow * 1e3, "speed-up": ratio})
    show(f"attention, batch {args.batch}, {args.heads} heads, forward and backward", rows)


if __name__ == "__main__":
    main()

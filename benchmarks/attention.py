"""Attention of a training step by scale groups against one dense mask, forward and backward.

python -m benchmarks.attention --batch 2 --heads 16
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Ruler, show
from models import ScaleSchedule
from models.layers import ScaleCausalAttention, attend
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

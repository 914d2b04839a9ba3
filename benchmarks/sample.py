"""Sampling: images of a model of released size, and the token sampler alone.

python -m benchmarks.sample --batch 4 --precision fp32
python -m benchmarks.sample --sampler
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor

from benchmarks.common import DECODE_FLOPS, Clock, Ruler, forward_flops, peak_memory, reset_peak, show
from models import DEFAULT_SCHEDULE, VQVAE, FlexVAR, FlexVARConfig, Guidance, ScaleSchedule, flexvar, generate, sampling
from models.head import sample_tokens
from utils.runtime.distributed import alone
from utils.runtime.entry import entry
from utils.runtime.flags import Parser, whole
from utils.runtime.numerics import Precision

DEFAULT = str(DEFAULT_SCHEDULE)


def sort_everything(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The usual sampler: a full sort for top-p, then `multinomial` (rows, V) → (rows,)."""
    logits = logits.clone()
    logits[logits < logits.topk(top_k, dim=-1).values[..., -1:]] = -torch.inf
    ranked, order = logits.sort(dim=-1, descending=False)
    drop = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1:] = False
    logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def sampler_rows(device: torch.device, repeats: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    rows, ruler = [], Ruler(device, torch.float32)
    for n, spread in product((256, 2048), (1.0, 3.0)):
        logits, uniforms = spread * torch.randn(n, 8912, device=device), torch.rand(n, device=device)
        mine, usual, ratio = ruler.compare(
            lambda: sample_tokens(logits, 900, 0.95, uniforms),  # noqa: B023
            lambda: sort_everything(logits, 900, 0.95),  # noqa: B023
            repeats,
        )
        row = {"rows": n, "logits' deviation": spread, "ms": mine * 1e3, "sort everything ms": usual * 1e3}
        rows.append({**row, "speed-up": ratio})
    return rows


def image_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    rows, schedule = [], ScaleSchedule.parse(args.pn)
    config = sampling.SamplingConfig(Guidance("ramp", 2.2), sampling.TOP_K, sampling.TOP_P)
    vae = VQVAE().eval().requires_grad_(False).to(memory_format=torch.channels_last).to(device)
    for depth, batch in product(args.depth, args.batch):
        torch.manual_seed(0)
        model = FlexVAR(FlexVARConfig(depth=depth)).to(device).eval()
        precision = Precision(args.precision, device)
        ruler = Ruler(device, precision.dtype)

        @torch.no_grad()
        def run(model=model, batch=batch, precision=precision) -> None:
            with precision.autocast():
                generate(model, vae, torch.arange(batch), schedule, config, range(batch))

        reset_peak(device)
        timing = ruler.measure(run, args.repeats, warm_up=1)
        flops = batch * (2 * forward_flops(model.config, schedule) + DECODE_FLOPS)
        row = {"depth": depth, "batch": batch, "precision": precision.name, "s/image": timing.seconds / batch}
        row |= {"G/image": timing.products / batch, "floor G/image": flops / ruler.flops / batch}
        row |= {"images/s": batch / timing.seconds, "MFU": flops / ruler.flops / timing.products}
        clock, kept = Clock(device), flexvar.sample_tokens
        model.decode_scale = clock.around(model.decode_scale, "transformer")
        vae.decode = clock.around(vae.decode, "decoder")
        flexvar.sample_tokens = clock.around(kept, "sampler")
        with clock.part("other"):
            run()
        flexvar.sample_tokens = kept
        del model.decode_scale, vae.decode
        row |= {f"{name} s": seconds for name, seconds in clock.seconds.items()}
        rows.append({**row, "peak GiB": peak_memory(device)})
    return rows


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.sample")
    parser.add_argument("--batch", type=whole(1), nargs="+", default=[4])
    parser.add_argument("--depth", type=whole(1), nargs="+", default=[16])
    parser.add_argument("--pn", default=DEFAULT)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--sampler", action="store_true", help="the token sampler alone")
    parser.add_argument("--repeats", type=whole(1), default=3)
    args = parser.parse_args()
    if args.sampler and (args.batch, args.depth, args.pn, args.precision) != ([4], [16], DEFAULT, "auto"):
        parser.error("--batch, --depth, --pn and --precision have no effect with --sampler")
    device = alone().device
    if args.sampler:
        show("sampler, top-k 900, top-p 0.95, 8912 tokens", sampler_rows(device, max(args.repeats, 10)))
    else:
        show("sample, guided, with decode", image_rows(args, device))


if __name__ == "__main__":
    main()

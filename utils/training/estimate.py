"""Estimates of what training costs, before anything is trained: memory, arithmetic, disk.

python -m utils.training.estimate       # a table of the released sizes; train.py --check says it of the given flags

Counted on tensors without values: what autograd keeps for the backward pass, and the products of a forward pass.
Nothing here is measured but the share of its peak that a card reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.flexvar import FlexVAR, FlexVARConfig
from models.head import ROWS_AT_ONCE
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.tokenizer import Tokenizer
from models.vqvae import VQVAE
from utils.config.training import FEEDING, NAIVE, SARConfig
from utils.reporting.tables import markdown
from utils.runtime.entry import entry
from utils.runtime.flags import Parser

IMAGENET = 1_281_167  # images
SHARE = 0.28  # of a card's peak that compiled training reaches: measured on an H100 (docs/benchmarks.md)
CARDS = {"A100": 312e12, "H100": 989e12}  # peak FLOP/s in bf16, dense, as their maker states them
MEMORY = (24, 40, 80)  # GB of a card
FREE = 0.92  # share of a card's memory that is there for tensors: the rest is the context's, and lost between them


@dataclass(frozen=True)
class Estimate:
    """Cost of a training step, in bytes and FLOPs."""

    parameters: int
    fixed: int  # bytes whatever the batch: weights, gradients, Adam's moments, average, half-precision copies, logits
    image: int  # bytes an image of a micro-batch: what autograd keeps
    flops: float  # of one image's step, encoding included

    def micro_batch(self, gigabytes: float) -> int:
        """Images that fit a card at a time; 0: none."""
        return max(0, int((FREE * gigabytes * 1e9 - self.fixed) / self.image))

    def hours(self, images: float, card: str) -> float:
        """Of training on so many images on one card, at SHARE of its peak."""
        return images * self.flops / (SHARE * CARDS[card]) / 3600


class FusedAttention(TorchFunctionMode):
    """Attention by the kernels of a GPU, which keep no weights: without one, torch would choose the plain products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].ndim != 4:
            return func(*args, **kwargs)
        mask, dropout, scale = (kwargs.get(name) for name in ("attn_mask", "dropout_p", "scale"))
        if mask is None and args[0].dtype != torch.float32:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args, dropout_p=dropout or 0.0, scale=scale)[0]
        q, k, v = args
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:2], *mask.shape[-2:])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, bias, True, dropout_p=dropout or 0.0, scale=scale)[0]


@contextmanager
def shapes_only(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors of a GPU have no values, and autocast works as on one, whether or not there is one here."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), FusedAttention():
        torch.set_autocast_enabled("cuda", dtype != torch.float32)
        torch.set_autocast_dtype("cuda", dtype)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


def without_values(module: nn.Module) -> nn.Module:
    """A module on a GPU in shape alone. To be called inside `shapes_only`."""
    return module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))


def kept(model: FlexVAR, vae: Tokenizer, schedule: ScaleSchedule, part: ScaleSchedule, batch: int) -> int:
    """Bytes that autograd keeps of a pass over a part of a schedule: all of it, or its ends, as `--ssr last` does."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return x

    labels, tokens = labels_and_tokens(vae, schedule, batch)
    model.eval()  # what is drawn on the host cannot be drawn here
    first = len(schedule) - 1 if part != schedule else 0
    inputs = model.inputs(tokens, vae.pathway, schedule, None, max(first, 1))
    model.train()
    targets = tokens[:, schedule.offsets[first] :]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = model(labels, inputs, part, targets, first=min(first, 1), start=not first).loss
    total = sum(seen.values())
    del loss  # the storages above must live until they are added up: two at one address would count once
    return total


def labels_and_tokens(vae: Tokenizer, schedule: ScaleSchedule, batch: int) -> tuple[Tensor, Tensor]:
    """Class ids (B,), and tokens of a schedule (B, L) or (B, L, D)."""
    shape = (batch, schedule.total) if vae.config.codebook_size else (batch, schedule.total, vae.config.codebook_dim)
    kind = torch.long if vae.config.codebook_size else torch.float32
    return torch.zeros(batch, dtype=torch.long, device="cuda"), torch.zeros(shape, dtype=kind, device="cuda")


def products(model: FlexVAR, vae: Tokenizer, schedule: ScaleSchedule, part: ScaleSchedule) -> float:
    """FLOPs of a forward of one image over a part of a schedule."""
    model.eval()
    labels, tokens = labels_and_tokens(vae, schedule, 1)
    first = len(schedule) - 1 if part != schedule else 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs = model.inputs(tokens, vae.pathway, schedule, None, max(first, 1))
        model(labels, inputs, part, tokens[:, schedule.offsets[first] :], first=min(first, 1), start=not first)
    return counter.get_total_flops()


def encoding(vae: Tokenizer, schedule: ScaleSchedule) -> float:
    """FLOPs of making tokens of one image."""
    side = schedule.sides[-1] * vae.config.factor
    with FlopCounterMode(display=False) as counter:
        vae.encode(torch.zeros(1, 3, side, side, device="cuda"))
    return counter.get_total_flops()


def step_flops(sar: SARConfig, schedule: ScaleSchedule, forward: Callable[[ScaleSchedule], float]) -> float:
    """FLOPs of one image's step without encoding: a pass with a gradient is three forwards, one without is one.

    Args:
        forward: FLOPs of a forward over a schedule, or over its ends [1, s_N].
    """
    whole, guided = forward(schedule), sar.rollout == "cfg"
    if (
        sar.training_mode == "cca" and sar.cca_lambda
    ):  # images with their classes, and with others; also by a frozen model
        return 2 * (3 + 1) * whole
    if sar.training_mode in NAIVE:  # a cached walk over the scales that feed, then the pass that is trained
        walk = (1 + guided) * forward(ScaleSchedule(schedule.sides[:-1]))
        return 3 * whole + (walk / 2 if sar.training_mode == "sf_alternate" else walk)
    if sar.training_mode != "csfl" or not sar.csf_weight:
        return 3 * whole
    second = whole if sar.ssr == "all" else forward(ScaleSchedule((1, schedule.sides[-1])))
    fed = sar.csf_target in FEEDING  # then the last scale is not sampled
    unconditional = forward(ScaleSchedule(schedule.sides[:-1])) if fed else whole
    return 3 * whole + sar.ssr_steps * (3 * second + guided * unconditional)


def estimate(
    config: FlexVARConfig,
    vae: Tokenizer,
    schedule: ScaleSchedule,
    sar: SARConfig,
    dtype: torch.dtype = torch.bfloat16,
    averages: int = 0,
    cached: bool = False,
    checkpointed: bool = False,
) -> Estimate:
    """The cost of a step on the longest schedule. Of naive student forcing it is that of teacher forcing and one pass.

    Args:
        averages: moving averages that are kept.
        cached: codes come from a cache, so that nothing is encoded.
        checkpointed: only the inputs of blocks are kept.
    """
    with torch.device("meta"):
        model, vae = config.build(), vae.config.build().eval().requires_grad_(False)
    ends = ScaleSchedule((1, schedule.sides[-1]))
    contrast = sar.training_mode == "cca" and sar.cca_lambda > 0  # with a frozen model beside it
    with ExitStack() as stack:
        stack.enter_context(shapes_only(dtype))
        without_values(model)
        without_values(vae)
        model.checkpoint_activations = checkpointed
        one, two = (kept(model, vae, schedule, schedule, n) for n in (1, 2))
        image, copies = two - one, max(0, 2 * one - two)
        if sar.training_mode == "csfl" and sar.csf_weight:
            part, more = (ends if sar.ssr == "last" else schedule), image
            if part is ends:
                more = kept(model, vae, schedule, ends, 2) - kept(model, vae, schedule, ends, 1)
            image += sar.ssr_steps * more
        elif contrast:  # images with their classes and with others, twice by each
            image *= 2

        def forward(part: ScaleSchedule) -> float:
            return products(model, vae, schedule if part == ends else part, part)

        flops = step_flops(sar, schedule, forward)
        flops += 0 if cached else encoding(vae, schedule)
        stored = sum(p.numel() for p in model.parameters())
        tokenizer = sum(p.numel() for p in vae.parameters())
    half = 2 if dtype != torch.float32 else 4
    logits = ROWS_AT_ONCE * config.codebook_size * (4 + 4 + half)
    fixed = stored * (16 + 4 * averages + 4 * contrast) + copies + logits + 4 * tokenizer
    return Estimate(stored, fixed, image, flops)


def lines_of(found: Estimate, what: str, images: float, keep: int, averages: int) -> list[str]:
    """Lines that `train.py --check` prints."""
    fits = ", ".join(f"{found.micro_batch(size)} fit {size} GB" for size in MEMORY)
    hours = ", ".join(f"{found.hours(images, card):,.0f} h on one {card}" for card in CARDS)
    checkpoint = found.parameters * (12 + 4 * averages) / 1e9
    return [
        f"estimate: {what}",
        f"  memory: {found.fixed / 1e9:.1f} GB and {found.image / 1e9:.2f} GB an image; --micro_batch: {fits}",
        f"  time: {found.flops / 1e12:.2f} TFLOP an image; the run's {images:,.0f} images take {hours}, at "
        f"{SHARE:.0%} of the card's peak",
        f"  disk: {checkpoint:.1f} GB a checkpoint, {(keep + 1) * checkpoint:.1f} GB while the next one is written",
    ]


FORMS = {
    "TF": SARConfig(training_mode="teacher_forcing"),
    "SAR, all scales": SARConfig(),
    "SAR, last": SARConfig(ssr="last"),
}
SIZES = tuple(itertools.product((16, 20, 24), FORMS))


def table(sizes: Iterable[tuple[int, str]] = SIZES) -> str:
    """Table of FlexVAR's sizes in bf16: the largest --micro_batch, and hours of ten epochs of ImageNet.

    Args:
        sizes: depths, and names of `FORMS`.
    """
    rows, vae = [], VQVAE()
    encoded = encoding_of(vae)
    for depth, name in sizes:
        found = estimate(FlexVARConfig(depth=depth), vae, DEFAULT_SCHEDULE, FORMS[name], cached=True)
        from_images = replace(found, flops=found.flops + encoded)
        fits = [str(found.micro_batch(size) or "–") for size in MEMORY]
        hours = [f"{found.hours(10 * IMAGENET, c):.0f} ({from_images.hours(10 * IMAGENET, c):.0f})" for c in CARDS]
        rows.append([f"d{depth} {name}", *fits, f"{found.flops / 1e12:.2f}", *hours])
    titles = [f"fit {size} GB" for size in MEMORY]
    return markdown(["", *titles, "TFLOP an image", *(f"h on one {card}" for card in CARDS)], rows)


def encoding_of(vae: Tokenizer) -> float:
    """`encoding`, by itself."""
    with torch.device("meta"):
        vae = vae.config.build().eval()
    with shapes_only(torch.float32), torch.no_grad():
        return encoding(without_values(vae), DEFAULT_SCHEDULE)  # type: ignore[arg-type]


@entry
def main() -> None:
    Parser(__doc__, prog="python -m utils.training.estimate").parse_args()
    print(table())


if __name__ == "__main__":
    main()

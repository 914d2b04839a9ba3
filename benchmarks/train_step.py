"""One training step, whole and in parts: seconds, images/s, share of the device's matrix-product speed, memory.

    python -m benchmarks.train_step --batch 2 --ssr last --precision fp32             # images, encoded on the fly
    python -m benchmarks.train_step --batch 2 --ssr all --precision fp32 --cached     # from a code cache
    python -m benchmarks.train_step --batch 8 --plain          # every logit kept, and the guided half's graph

Everything runs through `train.build` and `Trainer.train_step`, on noise images and freshly initialised weights of the
released sizes. Several values of --batch, --depth or --pn give a row each.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import utils.training.loop as loop_module
from benchmarks.common import ENCODE_FLOPS, Clock, Ruler, forward_flops, peak_memory, random_images, reset_peak, show
from models import DEFAULT_SCHEDULE, ScaleSchedule, VQVAEConfig
from models.head import Samples, guide, sample_tokens
from models.kl_vae import KLConfig
from models.pipeline import to_pil
from models.residual_vqvae import ResidualVQVAEConfig
from models.tokenizer import Tokenizer
from models.weights import save_weights
from sar_trainer import SARTrainer, rollout_sampling
from train import TRAINERS, build
from utils.config.training import DataConfig, TrainConfig
from utils.data.code_cache import CacheConfig, CacheFlags
from utils.data.code_cache import build as build_cache
from utils.data.datasets import CodeBatch
from utils.runtime.distributed import alone
from utils.runtime.entry import entry
from utils.runtime.flags import Parser, parse, whole
from utils.training.estimate import step_flops

DEFAULT = str(DEFAULT_SCHEDULE)
FLOWAR_SIZES = ("--width=768", "--flow_depth=2", "--flow_width=1024")


@dataclass(frozen=True)
class Kind:
    """A generator as it is benchmarked: its tokenizer, of released size or tiny, and its flags."""

    config: VQVAEConfig
    tiny: VQVAEConfig
    flags: tuple[str, ...] = ()
    tiny_flags: tuple[str, ...] = ()
    pn: str = DEFAULT

    def tokenizer(self, tiny: bool) -> Tokenizer:
        """With fresh weights."""
        return (self.tiny if tiny else self.config).build()

    def flags_of(self, tiny: bool) -> list[str]:
        return list(self.tiny_flags if tiny else self.flags)


SMALL = {"base_width": 32, "width_mult": (1, 1, 1, 1, 1), "res_blocks": 1}
CODES = {**SMALL, "codebook_size": 64, "codebook_dim": 8}
KINDS = {
    "flexvar": Kind(VQVAEConfig(), VQVAEConfig(**CODES, z_channels=32)),
    "var": Kind(
        ResidualVQVAEConfig(), ResidualVQVAEConfig(**CODES, z_channels=8, counted_scales=3),
        ("--model=var",), ("--model=var",),
    ),
    "flowar": Kind(
        KLConfig(), KLConfig(**SMALL, z_channels=4, scaling=1.0),
        ("--model=flowar", *FLOWAR_SIZES, "--latent_scaling=0.2325"),
        ("--model=flowar", "--flow_depth=1", "--flow_width=64", "--latent_scaling=1.0"), "1_2_4_8_16",
    ),
}  # fmt: skip


class PlainSAR(SARTrainer):
    """The step without any of its economies: the guided half in the graph, all logits in fp32, every scale drawn."""

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, dict[str, Tensor]]:
        sar, truth, n = self.config.sar, batch.tokens(schedule), len(batch.labels)
        inputs = self.pathway.inputs(truth, schedule)
        labels = torch.cat([batch.labels, torch.full_like(batch.labels, self.model.null_class)])
        logits = self.network(labels, inputs.repeat(2, 1, 1), schedule).float()
        loss = F.cross_entropy(logits[:n].flatten(0, 1), truth.flatten())
        weights = rollout_sampling(sar).guidance.weights(schedule.sides)
        halves = zip(schedule.split(logits[:n]), schedule.split(logits[n:]), strict=True)
        guided = torch.cat([guide(c, u, w) for (c, u), w in zip(halves, weights, strict=True)], dim=1)
        rollout = sample_tokens(
            guided.detach(), sar.sf_top_k, sar.sf_top_p, torch.rand(truth.shape, device=truth.device)
        )
        second = self.network(batch.labels, self.pathway.inputs(rollout, schedule), schedule).float()
        loss = loss + sar.csf_weight * F.cross_entropy(second[:, 1:].flatten(0, 1), rollout[:, 1:].flatten())
        return loss, {"loss": loss.detach()}


def make_trainer(args: argparse.Namespace, depth: int, batch: int, pn: str, directory: Path) -> SARTrainer:
    """A trainer as `train.py` builds it; its tokenizer and data stay in `directory` for the next one."""
    vae, data, kind = directory / "vae.safetensors", directory / "data", KINDS[args.model]
    torch.manual_seed(0)
    if not vae.exists():
        (data / "train/class").mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(to_pil(random_images(8, args.image))):
            image.save(data / f"train/class/{i}.jpg")
        save_weights(kind.tokenizer(args.tiny), vae)
    flags = [f"--workers={args.workers}", f"--vae_ckpt={vae}", f"--depth={depth}"]
    flags += [
        f"--pn={pn}",
        "--schedule=fixed",
        f"--bs={batch}",
        "--ep=100000",
        "--vis_num_samples=0",
        "--num_classes=1000",
        *kind.flags_of(args.tiny),
    ]
    flags += [
        f"--precision={args.precision}",
        f"--training_mode={args.mode}",
        f"--out_dir={directory / 'run'}",
        *args.flags,
    ]
    if args.mode == "csfl":
        flags += [f"--ssr={args.ssr}", f"--rollout={args.rollout}"]
    if args.cached and not (directory / "codes").exists():
        tied = {"pn": pn} if kind.config.tied_to_schedule else {}
        config = CacheConfig(out=str(directory / "codes"), vae_ckpt=str(vae), crops=1, image_size=args.image, **tied)
        build_cache(CacheFlags(config, DataConfig(data_path=str(data), workers=0)), alone())
    flags += [f"--code_cache={directory / 'codes'}"] if args.cached else [f"--data_path={data}"]
    if args.plain:
        TRAINERS["csfl"] = PlainSAR
    return build(parse(TrainConfig, flags), alone())


def parts_of(trainer: SARTrainer, batches, repeats: int) -> dict[str, float]:
    """Seconds a step of each part."""
    clock = Clock(trainer.ranks.device)

    class Timed:
        def __next__(self):
            with clock.part("data"):
                return next(batches)

    trainer.encode = clock.around(trainer.encode, "encode")
    trainer.compute_loss = clock.around(trainer.compute_loss, "forward")
    kept = (Samples.add, torch.Tensor.backward, loop_module.apply_gradients)
    if isinstance(trainer, SARTrainer):
        trainer.rollout_sampler = clock.around(trainer.rollout_sampler, "unconditional half")
        trainer.student = clock.around(trainer.student, "second pass")
    Samples.add = clock.around(Samples.add, "rollout")
    torch.Tensor.backward = clock.around(torch.Tensor.backward, "backward")
    loop_module.apply_gradients = clock.around(loop_module.apply_gradients, "optimiser")
    try:
        for _ in range(repeats):
            with clock.part("other"):
                trainer.train_step(Timed())
    finally:
        Samples.add, torch.Tensor.backward, loop_module.apply_gradients = kept
    return {f"{name} s": seconds / repeats for name, seconds in clock.seconds.items()}


def measure(args: argparse.Namespace, depth: int, batch: int, pn: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(args, depth, batch, pn, Path(directory))
        device = trainer.ranks.device
        ruler, batches = Ruler(device, trainer.precision.dtype), iter(trainer.loader())
        trainer.train_step(batches)
        reset_peak(device)
        timing = ruler.measure(lambda: trainer.train_step(batches), args.repeats, warm_up=1)
        model, sar, schedule = trainer.model.config, trainer.config.sar, trainer.config.model.scales
        flops = batch * (step_flops(sar, schedule, partial(forward_flops, model)) + ENCODE_FLOPS * (not args.cached))
        parameters = sum(p.numel() for p in trainer.model.parameters())
        row = {"depth": depth, "batch": batch, "tokens": ScaleSchedule.parse(pn).total}
        row |= {"precision": trainer.precision.name, "s": timing.seconds, "G": timing.products}
        row |= {"floor G": flops / ruler.flops, "images/s": batch / timing.seconds}
        row |= {"TFLOP/s": flops / timing.seconds / 1e12, "MFU": flops / ruler.flops / timing.products}
        row |= {"peak GiB": peak_memory(device), "of it parameters, gradients, Adam": 16 * parameters / 2**30}
        return {**row, **(parts_of(trainer, batches, args.repeats) if args.parts else {})}


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.train_step")
    parser.add_argument("--batch", type=whole(1), nargs="+", default=[2])
    parser.add_argument("--depth", type=whole(1), nargs="+", default=[16])
    parser.add_argument("--pn", nargs="+", default=[DEFAULT])
    parser.add_argument("--model", default="flexvar", choices=KINDS)
    parser.add_argument("--mode", default="csfl", choices=["csfl", "teacher_forcing"])
    parser.add_argument("--ssr", default="all", choices=["all", "last"])
    parser.add_argument("--rollout", default="cfg", choices=["argmax", "sample", "cfg"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--cached", action="store_true", help="from a code cache instead of images")
    parser.add_argument("--plain", action="store_true", help="the slow form, to compare with")
    parser.add_argument("--parts", action="store_true", help="also the seconds of each part")
    parser.add_argument("--workers", type=whole(0), default=0)
    parser.add_argument("--repeats", type=whole(1), default=3)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of train.py: --flags=--compile")
    args = parser.parse_args()
    if args.mode == "teacher_forcing" and (args.ssr, args.rollout) != ("all", "cfg"):
        parser.error("--ssr and --rollout have no effect without --mode csfl")
    args.image, args.tiny = 256, False
    rows = [measure(args, *setting) for setting in product(args.depth, args.batch, args.pn)]
    show(f"train_step {args.mode} {args.ssr} {args.rollout}{' cached' * args.cached}{' plain' * args.plain}", rows)


if __name__ == "__main__":
    main()

"""The paper's figures, each from checkpoints and held-out images: python -m utils.visualize NAME

Legend: B batch, L tokens of a schedule, s side of a scale.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.pipeline import SARPipeline, class_names, open_pipeline, to_pil
from models.sampling import Draw, evaluating, image_uniforms, walk
from models.scales import shift_all, shift_up
from utils.config import DataConfig
from utils.data import encode_batch, open_dataset, plain_images
from utils.entry import check_output_file, entry
from utils.files import read_json
from utils.flags import Parser, number, whole
from utils.pictures import captioned_grid, coarse_to_fine, plot_curves, read_metrics
from utils.run_record import find_run
from utils.tables import markdown

PAPER_FID = {
    "FlexVAR-d16": 3.05,
    "SAR-d16": 2.89,
    "FlexVAR-d20": 2.41,
    "SAR-d20": 2.35,
    "FlexVAR-d24": 2.21,
    "SAR-d24": 2.14,
}


@dataclass
class HeldOut:
    """Held-out images, their classes and codes, under one model."""

    pipeline: SARPipeline
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    tokens: Tensor  # (B, L) ground truth

    @classmethod
    def of(cls, ckpt: str, args: argparse.Namespace, supervision: str = "latent", split: str = "val") -> HeldOut:
        """With split "train", images that were trained on, not augmented."""
        pipeline = open_pipeline(ckpt, args.vae_ckpt, args.pn)
        schedule, vae = pipeline.schedule, pipeline.vae
        data = DataConfig(dataset=args.dataset, data_path=args.data_path)
        views = open_dataset(data, schedule.sides[-1] * vae.config.factor, 0, split)
        if views is None:
            raise ValueError(f"{args.data_path} has no val/ to take held-out images from")
        cls.check_classes(ckpt, pipeline, views.classes)
        images, labels = plain_images(views, args.n)
        tokens = encode_batch(vae, images, labels, schedule, supervision).tokens(schedule)
        return cls(pipeline, images, labels, tokens)

    @staticmethod
    def check_classes(ckpt: str, pipeline: SARPipeline, classes: list[str]) -> None:
        """Raises ValueError when a run's classes are not those of the data: their labels would mean others."""
        run = find_run(ckpt)
        names = class_names(classes, pipeline.model.config.num_classes)
        if run is not None and run.class_names not in (None, names):
            raise ValueError(
                f"{run.directory} was trained on other classes ({', '.join(run.class_names[:3])} …) than the data's "
                f"({', '.join(names[:3])} …): give the run's own --dataset and --data_path"
            )

    @torch.no_grad()
    def logits(self, fed: Tensor) -> Tensor:
        """Logits (B, L, V) when tokens `fed` (B, L) make the inputs."""
        schedule, model = self.pipeline.schedule, self.pipeline.model
        with evaluating(model):
            return model(self.labels, shift_all(fed, self.pipeline.vae.codebook, schedule), schedule)

    def nll(self, fed: Tensor) -> Tensor:
        """NLL of the true tokens (B, L) when tokens `fed` (B, L) make the inputs."""
        losses = F.cross_entropy(self.logits(fed).flatten(0, 1), self.tokens.flatten(), reduction="none")
        return losses.view_as(self.tokens)

    @torch.no_grad()
    def rolled_out(self, seed: int, top_k: int = 0) -> Tensor:
        """Tokens (B, L) of the model's own autoregressive walk, without guidance; top-k 1 is greedy."""
        pipeline = self.pipeline
        schedule, codebook = pipeline.schedule, pipeline.vae.codebook
        needed = pipeline.model.uniforms_needed(schedule)
        uniforms = image_uniforms(range(seed, seed + len(self.labels)), needed, self.labels.device)
        with evaluating(pipeline.model):
            scales = walk(pipeline.model, codebook, self.labels, schedule, Draw(top_k=top_k, max_pn=None), uniforms)
            return torch.cat([codes for _, codes in scales], dim=1)

    def pictures(self, tokens: Tensor) -> dict[int, Tensor]:
        """What the tokens of each scale decode to: {side: (B, 3, factor·s, factor·s)}."""
        schedule, vae = self.pipeline.schedule, self.pipeline.vae
        with torch.no_grad():
            return {s: vae.decode(c, s) for s, c in zip(schedule.sides, schedule.split(tokens), strict=True)}


def distinct(paths: list[str], parent: bool = False) -> dict[str, str]:
    """Paths by their last name (or their folder's), or in full where those are not distinct."""
    names = [Path(p).parent.name if parent else Path(p).name for p in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def rows_of_scales(rows: dict[str, dict[int, Tensor]]) -> Image.Image:
    """A row a name (and image), a column a scale."""
    captions = [name for name, scales in rows.items() for _ in next(iter(scales.values()))]
    sides = next(iter(rows.values()))
    steps = {s: [p for scales in rows.values() for p in to_pil(scales[s])] for s in sides}
    return coarse_to_fine(steps, captions)


def training_curves(args: argparse.Namespace) -> None:
    """Fig. 1a: a metric of several runs over their steps."""
    curves = {name: read_metrics(Path(run), args.metric) for name, run in distinct(args.runs).items()}
    if not any(steps for steps, _ in curves.values()):
        raise ValueError(f"none of the runs has logged {args.metric}")
    plot_curves({args.metric: curves}, ("step", args.metric), Path(args.out))


def throughput_fid(args: argparse.Namespace) -> None:
    """Fig. 1b: distance over throughput, from evaluation reports; the paper's FIDs as grey lines."""
    reports = {name: read_json(Path(path)) for name, path in distinct(args.reports, parent=True).items()}
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    plot = figure.subplots()
    names = {next((n for n in r if n == "fid" or n.startswith("frechet_distance")), None) for r in reports.values()}
    if len(names) != 1 or None in names or not all("images_per_second" in r for r in reports.values()):
        raise ValueError(f"the reports must hold images_per_second and one kind of distance, found {names}")
    (metric,) = names
    for name, report in reports.items():
        plot.scatter(report["images_per_second"], report[metric], label=name)
    if metric == "fid":
        for name, fid in PAPER_FID.items():
            plot.axhline(fid, color="grey", linewidth=0.6, linestyle=":")
            plot.annotate(
                f"{name} (paper)", (0.98, fid), xycoords=("axes fraction", "data"), fontsize=6, color="grey", ha="right"
            )
    plot.set(xlabel="images per second", ylabel=metric.replace("_", " "))
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    figure.savefig(args.out, dpi=200)


def tf_vs_ar(args: argparse.Namespace) -> None:
    """Fig. 3: greedy predictions from ground truth beside greedy predictions from the model's own, scale by scale."""
    data = HeldOut.of(args.ckpt[0], args)
    forced = data.logits(data.tokens).argmax(-1)
    own = data.rolled_out(args.seed, top_k=1)
    rows = {"ground truth": data.tokens, "teacher-forced": forced, "autoregressive": own}
    rows_of_scales({name: data.pictures(tokens) for name, tokens in rows.items()}).save(args.out)


def trajectory(args: argparse.Namespace) -> None:
    """Fig. 7: models from the same start (the first one's sample up to side 4)."""
    pipelines = {name: open_pipeline(c, args.vae_ckpt, args.pn) for name, c in distinct(args.ckpt).items()}
    first = next(iter(pipelines.values()))
    options = {"cfg": args.cfg, "top_k": 0, "top_p": 0.0, "seed": args.seed}
    classes = list(range(min(args.n, first.model.config.num_classes)))
    start = first.codes(classes, **options)
    steps: dict[int, list[Image.Image]] = {s: [] for s in first.schedule.sides}
    for pipeline in pipelines.values():
        drawn = pipeline.steps(classes, edit=lambda s, codes: start[s] if s <= 4 else codes, **options)
        for s, pictures in drawn.items():
            steps[s] += pictures
    start_side = max(s for s in first.schedule.sides[:-1] if s <= 4)
    shown = {s: pictures for s, pictures in steps.items() if s >= start_side}
    coarse_to_fine(shown, [name for name in pipelines for _ in classes]).save(args.out)


def sf_inputs(args: argparse.Namespace) -> None:
    """Fig. 8: what student forcing sees and says at the last two scales; and, as numbers, how errors grow.

    The table gives the mean |Δ| of decoded greedy predictions against decoded ground truth, in [-1, 1] units, when the
    inputs are ground truth (TF), the teacher's predictions shifted up (SSR), or the model's own rollout (naive SF).
    """
    data = HeldOut.of(args.ckpt[0], args)
    vae, schedule = data.pipeline.vae, data.pipeline.schedule
    forced = data.logits(data.tokens).argmax(-1)
    own = data.rolled_out(args.seed, top_k=1)
    truth = data.pictures(data.tokens)
    said = {"TF": forced, "SSR": data.logits(forced).argmax(-1), "naive SF": data.logits(own).argmax(-1)}
    table = {
        name: {s: (p - truth[s]).abs().mean().item() for s, p in data.pictures(tokens).items()}
        for name, tokens in said.items()
    }
    print(markdown(["side", *table], [[str(s), *(f"{t[s]:.4f}" for t in table.values())] for s in schedule.sides]))

    def seen(tokens: Tensor, i: int) -> list[Image.Image]:
        before, s = schedule.split(tokens)[i - 1], schedule.sides[i]
        vectors = F.normalize(shift_up(before, vae.codebook, schedule.sides[i - 1], s), dim=-1)
        with torch.no_grad():
            return to_pil(vae.decode_vectors(vectors, s))

    tiles, captions = [], []
    predicted = data.pictures(said["naive SF"])
    for i in (len(schedule) - 2, len(schedule) - 1):
        s = schedule.sides[i]
        difference = (predicted[s] - truth[s]).abs() - 1  # 0 is black
        columns = {
            "ground truth": to_pil(truth[s]),
            "TF input": seen(data.tokens, i),
            "SF input": seen(own, i),
            "SF prediction": to_pil(predicted[s]),
            "|Δ|": to_pil(difference),
        }
        for b in range(len(data.labels)):
            tiles += [pictures[b] for pictures in columns.values()]
            captions += [f"{name} {s}×{s}" for name in columns]
    captioned_grid(tiles, captions, columns=5, cell=max(160, tiles[-1].width)).save(args.out)


def supervision(args: argparse.Namespace) -> None:
    """Fig. 2: codes of each scale from area-resized latents, and from resized images."""
    rows = {}
    for kind in ("latent", "image"):
        data = HeldOut.of(args.ckpt[0], args, kind)
        rows[f"from {kind}s"] = data.pictures(data.tokens)
    factor = data.pipeline.vae.config.factor
    resized = {
        s: F.interpolate(data.images, (factor * s, factor * s), mode="area") for s in data.pipeline.schedule.sides
    }
    rows_of_scales({"image": resized, **rows}).save(args.out)


def exposure_bias(args: argparse.Namespace) -> None:
    """Per scale, the NLL of held-out codes after ground-truth inputs and after the model's own (sampled) inputs.

    The gap is what student forcing is meant to close. The model's own picture is another one than the held-out picture,
    so some gap is right: compare checkpoints, not scales.
    """
    rows = []
    for model, ckpt in distinct(args.ckpt).items():
        data = HeldOut.of(ckpt, args)
        schedule = data.pipeline.schedule
        for s, forced, own in zip(schedule.sides, *map(schedule.split, exposure(data, args.seed)), strict=True):
            a, b = forced.mean().item(), own.mean().item()
            rows.append([model, str(s), f"{a:.4f}", f"{b:.4f}", f"{b - a:.4f}"])
    text = markdown(["model", "side", "NLL, ground-truth inputs", "NLL, own inputs", "gap"], rows)
    Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)


def exposure(data: HeldOut, seed: int) -> tuple[Tensor, Tensor]:
    """NLL of the held-out codes (B, L) after ground-truth inputs, and after the model's own."""
    return data.nll(data.tokens), data.nll(data.rolled_out(seed))


IMAGES = ["vae_ckpt", "pn", "dataset", "data_path", "n"]  # flags of figures of held-out images
# Name → how it is drawn, the flags that it reads beside --out, and how many of the first one it takes.
FIGURES = {
    "training-curves": (training_curves, ["runs", "metric"], None),
    "throughput-fid": (throughput_fid, ["reports"], None),
    "tf-vs-ar": (tf_vs_ar, ["ckpt", *IMAGES, "seed"], 1),
    "trajectory": (trajectory, ["ckpt", "vae_ckpt", "pn", "n", "cfg", "seed"], None),
    "sf-inputs": (sf_inputs, ["ckpt", *IMAGES, "seed"], 1),
    "supervision": (supervision, ["ckpt", *IMAGES], 1),
    "exposure-bias": (exposure_bias, ["ckpt", *IMAGES, "seed"], None),
}


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m utils.visualize")
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--ckpt", nargs="+", default=[], help="checkpoints, as sample.py takes them")
    parser.add_argument("--vae_ckpt", default="", help="tokenizer, when the checkpoints bring none along")
    parser.add_argument("--pn", default="", help="scales, when the checkpoints bring none along")
    parser.add_argument("--dataset", default="folder", choices=["folder", "digits", "cifar10"])
    parser.add_argument("--data_path", default="", help="where the held-out images lie")
    parser.add_argument("--n", type=whole(1), default=4, help="images (exposure-bias wants hundreds)")
    parser.add_argument("--seed", type=whole(), default=0)
    parser.add_argument("--cfg", type=number(float, 0), default=0.0, help="trajectory: ramp guidance")
    parser.add_argument("--runs", nargs="+", default=[], help="training-curves: run directories")
    parser.add_argument("--metric", default="val/loss", help="training-curves: what to plot")
    parser.add_argument("--reports", nargs="+", default=[], help="throughput-fid: report.json files")
    parser.add_argument("--out", default="", help="the PNG (exposure-bias: the Markdown table) to write")
    args = parser.parse_args()
    draw, read, most = FIGURES[args.name]
    unread = [n for n, v in vars(args).items() if n not in ("name", "out", *read) and v != parser.get_default(n)]
    if unread:
        parser.error(f"--{unread[0]} has no effect on {args.name}")
    if not getattr(args, read[0]):
        parser.error(f"{args.name} needs --{read[0]}")
    if most is not None and len(getattr(args, read[0])) > most:
        parser.error(f"{args.name} takes one --{read[0]}, got {len(getattr(args, read[0]))}")
    args.out = args.out or f"{args.name}.{'md' if args.name == 'exposure-bias' else 'png'}"
    if args.name != "exposure-bias" and not args.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        parser.error(f"--out must be a .png, .jpg or .webp file, got {args.out!r}")
    check_output_file(args.out, "--out")
    draw(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""The paper's figures, each from checkpoints and held-out images: python -m experiments.figures NAME

Legend: B batch, L tokens of a schedule, s side of a scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.pipeline import open_pipeline, to_pil
from utils.config.training import DataConfig
from utils.evaluations.exposure_bias import Exposure, ValidationSet
from utils.reporting.pictures import coarse_to_fine, plot_curves
from utils.reporting.tables import markdown
from utils.runtime.entry import check_output_file, entry
from utils.runtime.files import read_json
from utils.runtime.flags import Parser, number, whole
from utils.training.log import read_metrics

PAPER_FID = {
    "FlexVAR-d16": 3.05,
    "SAR-d16": 2.89,
    "FlexVAR-d20": 2.41,
    "SAR-d20": 2.35,
    "FlexVAR-d24": 2.21,
    "SAR-d24": 2.14,
}


def held_out(ckpt: str, args: argparse.Namespace, pn: str = "", supervision: str = "") -> ValidationSet:
    """The held-out images that the flags name, under one checkpoint's model."""
    data = DataConfig(dataset=args.dataset, data_path=args.data_path)
    return ValidationSet.of(ckpt, data, args.n, args.vae_ckpt, pn or args.pn, supervision)


def distinct(paths: list[str], parent: bool = False) -> dict[str, str]:
    """Paths by their last name (or their folder's), or in full where those are not distinct."""
    names = [Path(p).parent.name if parent else Path(p).name for p in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def rows_of_scales(rows: dict[str, dict[int, Tensor]]) -> Image.Image:
    """A row a name (and image), a column a scale."""
    captions = [name for name, scales in rows.items() for _ in next(iter(scales.values()))]
    sides = [s for s in next(iter(rows.values())) if all(s in scales for scales in rows.values())]
    if not sides:
        raise ValueError(f"no side is common to {', '.join(rows)}: give them scales that are by --pn")
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
    data = held_out(args.ckpt[0], args)
    forced, own = data.predictions(data.tokens), data.drawn(args.seed, top_k=1)
    rows = {"ground truth": data.tokens, "teacher-forced": forced, "autoregressive": own}
    rows_of_scales({name: data.pictures(tokens) for name, tokens in rows.items()}).save(args.out)


START, WALK = 4, (8, 10, 13, 16)  # of Fig. 7


def walk_of(ckpt: str, args: argparse.Namespace) -> tuple[str, int]:
    """The scales of Fig. 7, and the last one that is held: the coarse ones up to 4, then 8, 10, 13, 16; of a model that
    ends elsewhere, or where --pn names others, those."""
    pipeline = open_pipeline(ckpt, args.vae_ckpt, args.pn)
    sides, free = pipeline.schedule.sides, pipeline.model.config.only_schedule is None
    if free and not args.pn and sides[-1] == WALK[-1] and START in sides:
        sides = (*(s for s in sides if s <= START), *WALK)
    start = max((s for s in sides[:-1] if s <= START), default=0)
    if not start:
        raise ValueError(f"a trajectory starts at a side of at most {START} and goes on: name such scales by --pn")
    return "_".join(map(str, sides)), start


def walked(data: ValidationSet, start: int, cfg: float, seed: int) -> Tensor:
    """Tokens (N, L) of a walk that holds the images' own codes up to side `start`, and draws the rest."""
    truth = data.schedule.by_side(data.pipeline.vae.pathway.own(data.tokens.to(data.pipeline.device)))
    drawn = data.pipeline.codes(
        data.labels.tolist(), cfg=cfg, top_k=0, top_p=0.0, seed=seed,
        edit=lambda s, codes: truth[s] if s <= start else codes,
    )  # fmt: skip
    return torch.cat(list(drawn.values()), dim=1).cpu()


def trajectory(args: argparse.Namespace) -> None:
    """Fig. 7: models walk on from the same held-out images' codes at side 4 (and the coarser ones, their context)."""
    rows: dict[str, dict[int, Tensor]] = {}
    for name, ckpt in distinct(args.ckpt).items():
        pn, start = walk_of(ckpt, args)
        data = held_out(ckpt, args, pn)
        for row, tokens in (("held-out image", data.tokens), (name, walked(data, start, args.cfg, args.seed))):
            if row not in rows:
                rows[row] = {s: p for s, p in data.pictures(tokens).items() if s >= start}
    rows_of_scales(rows).save(args.out)


def student_forced(data: ValidationSet, start: int) -> Tensor:
    """Fig. 8's student forcing: greedy predictions (N, L) of the scales from number `start` on, the first of them by
    the teacher, each of the others fed with the one before. Coarser scales hold ground truth."""
    schedule, fed = data.schedule, data.pipeline.vae.pathway.own(data.tokens).clone()
    for i in range(start, len(schedule)):
        span = schedule.span(i)
        fed[:, span] = data.predictions(fed)[:, span]
    return fed


def sf_inputs(args: argparse.Namespace) -> None:
    """Fig. 8: what student forcing sees and says at the last three scales; and, as numbers, how errors grow.

    The student-forced rows start from the teacher's prediction at the scale before those, and take the model's own
    two steps from there. Beside them, the naive rollout: the model's own from the first scale on. The table gives the
    mean |Δ| of decoded greedy predictions against decoded ground truth, in [-1, 1] units, when the inputs are ground
    truth (TF), the teacher's predictions shifted up (SSR), those of Fig. 8 (SF), or the naive rollout.
    """
    data = held_out(args.ckpt[0], args)
    schedule, truth = data.schedule, data.tokens
    if len(schedule) < 2:
        raise ValueError("the figure shows what one scale feeds the next: this model has one scale only")
    start = max(0, len(schedule) - 4)  # of the default scales, side 8
    forced, naive = data.predictions(truth), data.drawn(args.seed, top_k=1)
    student = student_forced(data, start)
    before = f"SF from {schedule.sides[start]}"
    said = {"TF": forced, "SSR": data.predictions(forced), before: student, "naive rollout": naive}
    decoded, real = {name: data.pictures(tokens) for name, tokens in said.items()}, data.pictures(truth)
    shown = range(start + 1, len(schedule))

    @torch.no_grad()
    def inputs(tokens: Tensor) -> dict[int, Tensor]:
        """Pictures of what tokens feed the last scales with."""
        codes, vae = schedule.by_side(tokens.to(data.pipeline.device)), data.pipeline.vae
        return {schedule.sides[i]: vae.decode_inputs(codes, i, schedule).cpu() for i in shown}

    def columns(pictures: dict[int, Tensor]) -> dict[int, Tensor]:
        return {schedule.sides[i]: pictures[schedule.sides[i]] for i in shown}

    error = {s: (p - real[s]).abs() - 1 for s, p in decoded[before].items()}  # 0 is black
    rows_of_scales(
        {
            "ground truth": columns(real),
            "TF input": inputs(truth),
            f"{before}, input": inputs(student),
            f"{before}, prediction": columns(decoded[before]),
            f"{before}, |Δ|": columns(error),
            "naive rollout, input": inputs(naive),
            "naive rollout, prediction": columns(decoded["naive rollout"]),
        }
    ).save(args.out)
    lines = [
        [str(s), *(f"{(p[s] - real[s]).abs().mean().item():.4f}" for p in decoded.values())] for s in schedule.sides
    ]
    print(markdown(["side", *decoded], lines))


def supervision(args: argparse.Namespace) -> None:
    """Fig. 2: codes of each scale from area-resized latents, and from resized images."""
    rows = {}
    for kind in ("latent", "image"):
        data = held_out(args.ckpt[0], args, supervision=kind)
        rows[f"from {kind}s"] = data.pictures(data.tokens)
    images, factor = data.images, data.pipeline.vae.config.factor
    resized = {s: F.interpolate(images, (factor * s, factor * s), mode="area") for s in data.schedule.sides}
    rows_of_scales({"image": resized, **rows}).save(args.out)


MEASURED = """
NLL of held-out images' codes in nats per token, by what the coarser scales were that the model was fed: true ones; true
ones, but for its own draw of the scale right before (one stagger-scale step); its own throughout. The gaps are what
student forcing is meant to close. After a whole prefix of its own the model draws another picture than the held-out
one, so some of the last gap is right, and a model that ignores its inputs has none: compare checkpoints, not scales,
and look at the likelihood after true inputs first. Draws are unguided, without top-k and top-p.
"""


def exposure_bias(args: argparse.Namespace) -> None:
    """Per scale, the NLL of held-out codes after ground-truth inputs, after one own step, and after own inputs."""
    rows = []
    for model, ckpt in distinct(args.ckpt).items():
        data = held_out(ckpt, args)
        found = Exposure.of(data, args.seed)
        for s, *values in zip(
            data.schedule.sides, found.forced, found.one_step, found.gaps("one_step"), found.own, found.gaps("own"),
            strict=True,
        ):  # fmt: skip
            rows.append([model, str(s), *(f"{value:.4f}" for value in values)])
    titles = ["true inputs", "after one own step", "gap of one step", "own inputs", "gap of own inputs"]
    text = markdown(["model", "side", *titles], rows) + "\n" + MEASURED
    Path(args.out).write_text(text, encoding="utf-8")
    print(text)


IMAGES = ["vae_ckpt", "pn", "dataset", "data_path", "n"]  # flags of figures of held-out images
# Name → how it is drawn, the flags that it reads beside --out, and how many of the first one it takes.
FIGURES = {
    "training-curves": (training_curves, ["runs", "metric"], None),
    "throughput-fid": (throughput_fid, ["reports"], None),
    "tf-vs-ar": (tf_vs_ar, ["ckpt", *IMAGES, "seed"], 1),
    "trajectory": (trajectory, ["ckpt", *IMAGES, "cfg", "seed"], None),
    "sf-inputs": (sf_inputs, ["ckpt", *IMAGES, "seed"], 1),
    "supervision": (supervision, ["ckpt", *IMAGES], 1),
    "exposure-bias": (exposure_bias, ["ckpt", *IMAGES, "seed"], None),
}


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.figures")
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--ckpt", nargs="+", default=[], help="checkpoints, as sample.py takes them")
    parser.add_argument("--vae_ckpt", default="", help="tokenizer, when the checkpoints bring none along")
    parser.add_argument("--pn", default="", help="scales, when the checkpoints bring none along")
    parser.add_argument("--dataset", default="folder", choices=get_args(get_type_hints(DataConfig)["dataset"]))
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

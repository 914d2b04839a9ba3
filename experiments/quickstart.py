"""The whole chain on scikit-learn's digits: tokenizer → codes → FlexVAR → SAR → samples → numbers.

    python -m experiments.quickstart --out out/quickstart

Every stage is one call of the project's own entries under torchrun; a finished stage is not run again.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from models import Guidance, SamplingConfig, ScaleSchedule, generate
from models.pipeline import open_pipeline, to_pil
from models.tokenizer import Tokenizer
from models.weights import load_flexvar, load_tokenizer
from utils.config.training import DataConfig
from utils.data.datasets import open_dataset
from utils.evaluations.c2i import Statistics, frechet_distance
from utils.reporting.pictures import captioned_grid, grid, plot_curves
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.files import write_json
from utils.runtime.flags import Parser, whole
from utils.runtime.numerics import cpu_has_bf16, derive_seed
from utils.tokenizer.losses import resize_to
from utils.tokenizer.scaling import measure_scaling
from utils.training.log import read_metrics

SIDES = "1_2_3_5_8"
SIZE = 32
PER_CLASS = 50
SEED = 0
SHOWN = 10  # samples of each class in the picture, whose blocks are square
# Standard deviation of the Fréchet distance over the seeds of a continuation: of docs/study_digits.md.
SPREAD = 0.5

DATA = ["--dataset=digits", "--workers=0"]
TOKENIZER = [f"--image_size={SIZE}", f"--pn={SIDES}", "--base_width=32", "--width_mult", "1", "1", "2"]
TOKENIZER += ["--res_blocks=1", "--bs=32", "--lr=2e-3", "--wpe=0.1"]
CODEBOOK = ["--codebook_size=128", "--codebook_dim=16"]
FLEXVAR = ["--depth=4", "--width=128", f"--pn={SIDES}", "--schedule=fixed", "--bs=48"]
FROM_SCRATCH = ["--training_mode=teacher_forcing", "--lr=2e-3", "--wp=0.05", "--wpe=0.1"]
FURTHER = ["--lr=3e-4"]
HYBRID_SIDE = 3
HYBRID = ["--model=hybrid", f"--first_side={HYBRID_SIDE}"]
SAR = ["--training_mode=csfl", "--sf_top_k=0", "--sf_top_p=0.98", "--sf_cfg_scale=1.5"]


@dataclass(frozen=True)
class Kind:
    """A --model: its name in a report, and what its stages are told beside the others'."""

    title: str
    tokenizer: list[str]
    model: list[str] = field(default_factory=list)
    cache: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    sar: list[str] = field(default_factory=lambda: SAR)
    steps: int = 450  # from scratch
    further: int = 150  # steps of the two ways to go on
    cfg: float = 0.5  # ramp guidance of its samples
    flow_steps: int = 25  # of Euler's method in its samples
    unit: str = "nats per token"  # of its loss

    @property
    def sampling(self) -> SamplingConfig:
        """Without top-k and top-p."""
        return SamplingConfig(Guidance("ramp", self.cfg), flow_steps=self.flow_steps)

    def scaling(self, tokenizer: Path) -> list[str]:
        """The flag that scales continuous latents, measured on the training digits; of codes there is none."""
        if "--quantiser=none" not in self.tokenizer:
            return []
        vae = load_tokenizer(tokenizer)
        return [f"--latent_scaling={measure_scaling(vae, DataConfig(dataset='digits'), SIZE, 500):.4f}"]  # type: ignore[arg-type]


MODELS = {
    "flexvar": Kind("FlexVAR", ["--z_channels=64", *CODEBOOK]),
    "hybrid": Kind("hybrid model", ["--z_channels=64", *CODEBOOK], HYBRID),
    "var": Kind("VAR", ["--quantiser=residual", *CODEBOOK], ["--model=var"], [f"--pn={SIDES}"]),
    "flowar": Kind(
        "FlowAR",
        ["--quantiser=none", "--z_channels=4", "--kl=1e-4"],
        ["--model=flowar", "--depth=2", "--flow_width=128", "--dropout=0", "--bs=24", "--twd=0.02"],
        [f"--pn={SIDES}"],
        ["--lr=3e-3"],
        ["--training_mode=csfl", "--rollout=sample", "--rollout_steps=4"],
        steps=1300,
        further=60,
        cfg=2.0,
        flow_steps=10,
        unit="squared error",
    ),
}

ROWS = {
    "real": "real held-out digits",
    "reconstruction": "their reconstructions",
    "flexvar": "FlexVAR",
    "flexvar_continued": "FlexVAR, trained further (the control)",
    "sar": "SAR",
}


def launch(command: list[str], processes: int = 0) -> float:
    """Run one of the project's entries under torchrun. Returns its seconds."""
    processes = processes or torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = max(1, (os.cpu_count() or 1) // max(2, processes))  # two runs at a time may share a machine
    env = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    subprocess.run([sys.executable, *(launcher if processes > 1 else []), *command], check=True, env=env)
    return time.perf_counter() - began


def run_stage(name: str, entry: str, flags: list[str], steps: int, out: Path, processes: int = 0) -> tuple[Path, float]:
    """One training run of `steps` steps in out/name. Returns its directory and its seconds."""
    directory = out / name
    cached = any(flag.startswith("--code_cache") for flag in flags)
    command = [entry, *(["--workers=0"] if cached else DATA), f"--seed={SEED}", *flags, f"--steps={steps}"]
    command += [f"--out_dir={directory}", f"--exp_name={name}", f"--save_every_steps={steps}"]
    return directory, launch([*command, "--log_every=25", "--eval_images=497"], processes)


class Judge:
    """A scikit-learn classifier of the real training digits, and the Fréchet distance in its features.

    It is trained on, and its reference statistics come from, the training digits as training sees them: shifted and
    turned a little. Features are the activations of its last hidden layer (64). It sees images `side` pixels wide.
    """

    def __init__(self, views: int = 6, side: int = SIZE):
        self.side = side
        train = open_dataset(DataConfig(dataset="digits"), SIZE, SEED, "train")
        images, labels = gather(train, range(views))
        self.classifier = MLPClassifier((128, 64), max_iter=40, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 40 passes are enough: see the row of real digits
            self.classifier.fit(pixels(images, side), labels)
        self.reference = Statistics.of(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → (B, 64)."""
        x = pixels(images, self.side)
        for weights, bias in list(zip(self.classifier.coefs_, self.classifier.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weights + bias, 0)
        return torch.from_numpy(x)

    def score(self, images: Tensor, labels: np.ndarray) -> dict[str, float]:
        distance = frechet_distance(Statistics.of(self.features(images)), self.reference)
        accuracy = float(self.classifier.score(pixels(images, self.side), labels))
        return {"class_accuracy": accuracy, "frechet_distance": distance}


def pixels(images: Tensor, side: int) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1], at a resolution of `side` → grey 16×16 maps in [0, 1] (B, 256)."""
    grey = resize_to(images.clamp(-1, 1).mean(1, keepdim=True), side)
    small = F.avg_pool2d(grey, 2) if side == 32 else F.interpolate(grey, (16, 16), mode="bilinear")
    return (small.flatten(1).double().numpy() + 1) / 2


def gather(views, epochs: range) -> tuple[Tensor, np.ndarray]:
    """All images of a data set as the given epochs see them."""
    pairs = [views[epoch, i] for epoch in epochs for i in range(len(views))]
    return torch.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])


def sample(directory: Path, vae: Tokenizer, labels: Tensor, sampling: SamplingConfig) -> Tensor:
    """Images of a run's model, the same seeds for every run."""
    model = load_flexvar(directory)
    schedule = model.trim(ScaleSchedule.parse(SIDES))
    seeds = [derive_seed("quickstart", i) for i in range(len(labels))]
    parts = [
        generate(model, vae, labels[i : i + 100], schedule, sampling, seeds[i : i + 100])
        for i in range(0, len(labels), 100)
    ]
    return torch.cat(parts)


def evaluate(runs: dict[str, Path], kind: Kind, out: Path) -> dict[str, dict[str, float]]:
    """Scores of real digits, reconstructions and samples; samples.png on the way."""
    judge, vae = Judge(), open_pipeline(str(runs["flexvar"])).vae
    # Held-out digits, shifted and turned as the training digits are: that is what the models imitate.
    held_out = open_dataset(DataConfig(dataset="digits"), SIZE, SEED + 1, "val")
    held_out.training = True
    real, real_labels = gather(held_out, range(1))
    with torch.no_grad():
        schedule = ScaleSchedule.parse(SIDES)
        reconstruction = vae.decode_at(vae.tokenize(real, schedule.sides), schedule.sides[-1], schedule)
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    samples = {name: sample(runs[name], vae, labels, kind.sampling) for name in ("flexvar", "flexvar_continued", "sar")}
    scores = {"real": judge.score(real, real_labels), "reconstruction": judge.score(reconstruction, real_labels)}
    scores |= {name: judge.score(images, labels.numpy()) for name, images in samples.items()}
    draw_samples(samples, kind.title, out)
    return scores


def draw_samples(samples: dict[str, Tensor], kind: str, out: Path) -> None:
    """A titled block a model, a row a class, in samples.png: equal places are equal seeds."""
    blocks = [part.view(10, PER_CLASS, 3, SIZE, SIZE)[:, :SHOWN].flatten(0, 1) for part in samples.values()]
    pictures = [to_pil(grid(block, SHOWN)[None] * 2 - 1)[0] for block in blocks]
    titles = [{"flexvar": kind, "flexvar_continued": "the control", "sar": "SAR"}[name] for name in samples]
    captioned_grid(pictures, titles, columns=len(pictures), cell=max(pictures[0].size)).save(out / "samples.png")


def draw_curves(runs: dict[str, Path], first: int, kind: Kind, out: Path) -> None:
    """Teacher-forced losses over steps: the model from scratch, and the two ways to go on from it."""

    def curves(names: tuple[str, ...], start: int) -> dict[str, tuple[list[int], list[float]]]:
        found = {}
        for name in names:
            trained = "train/loss_tf" if name == "sar" else "train/loss"
            title = title_of(name, kind.title)
            for metric, label in ((trained, title), ("val/loss", f"{title}, held out")):
                steps, values = read_metrics(runs[name], metric)
                found[label] = ([start + step for step in steps], values)
        return found

    panels = {
        "teacher forcing from scratch": curves(("flexvar",), 0),
        "equal further steps": curves(("flexvar_continued", "sar"), first),
    }
    plot_curves(panels, ("step", f"teacher-forced loss, {kind.unit}"), out / "curves.png")


def title_of(name: str, kind: str) -> str:
    """Title of a row or picture; `kind` is the model's name."""
    return ROWS[name].replace("FlexVAR", kind)


def conclusion(report: dict, kind: str) -> str:
    """The numbers, in words."""
    before, control, sar = (report[name] for name in ("flexvar", "flexvar_continued", "sar"))
    difference = sar["frechet_distance"] - control["frechet_distance"]
    seeds = f"One seed; runs that differ in their seed alone spread by about {SPREAD:g}"
    if abs(difference) < 2 * SPREAD:
        verdict = f"{seeds}: within noise. It says neither that SAR helps nor that it does not."
    else:
        verdict = f"{seeds}: SAR is {'worse' if difference > 0 else 'better'} here by more than that."
    return (
        f"**SAR against equally many further steps of teacher forcing ({report['steps']['sar']}, the control): "
        f"{difference:+.2f} in Fréchet distance** ({sar['frechet_distance']:.2f} against "
        f"{control['frechet_distance']:.2f}; lower is better), "
        f"{sar['class_accuracy'] - control['class_accuracy']:+.3f} in class accuracy. {verdict} Both go on from the "
        f"same {kind} ({before['frechet_distance']:.2f}). More seeds: `python -m experiments.study_digits` and "
        "docs/study_digits.md; photographs: docs/study_cifar10.md."
    )


def write_report(report: dict, out: Path) -> None:
    """report.json and report.md."""
    write_json(out / "report.json", report)
    chosen, more = MODELS[report["model"]], report["steps"]["sar"]
    kind, trained = chosen.title, "flow loss" if chosen.title == "FlowAR" else "cross-entropy in nats per token"
    lines = ["# Quickstart on digits", "", conclusion(report, kind)]
    lines += ["", "| | class accuracy | Fréchet distance |", "|---|---|---|"]
    for name in ROWS:
        scores = report[name]
        lines.append(f"| {title_of(name, kind)} | {scores['class_accuracy']:.3f} | {scores['frechet_distance']:.2f} |")
    lines += ["", "| stage | seconds | steps | held-out loss |", "|---|---|---|---|"]
    for name, seconds in report["seconds"].items():
        loss = report["held_out_loss"].get(name)
        lines.append(
            f"| {name} | {seconds:.0f} | {report['steps'].get(name, '')} | {'' if loss is None else f'{loss:.4f}'} |"
        )
    lines += [
        "",
        "Class accuracy: by a scikit-learn classifier trained on the real training digits. Fréchet distance: in that "
        "classifier's 64 features, against the training digits. It is not FID, and compares only within this table. "
        f"{10 * PER_CLASS} samples a model, equal seeds, ramp guidance {chosen.cfg}, no top-k, no top-p. "
        "The tokenizer's loss is its mean squared error at the finest scale; the others' is the teacher-forced "
        f"{trained}. "
        "On held-out digits it is lower than in training because training is the harder task: digits are shifted and "
        "turned, the class is dropped for one in ten, blocks at random.",
        "",
        "## Samples",
        "",
        f"A row a class; equal places are equal seeds. Left: the {kind} that the others go on from. Middle: the "
        f"control, {more} further steps of teacher forcing. Right: {more} further steps of SAR.",
        "",
        "![samples](samples.png)",
        "",
        "## Losses",
        "",
        "Teacher-forced loss over steps, in training and held out: from scratch, then of the two ways to go on.",
        "",
        "![losses](curves.png)",
        "",
    ]
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")


def check_quickstart(directory: Path) -> None:
    """Raises ValueError when a quickstart that others go on from is not there."""
    for part in ("tokenizer", "flexvar", "codes"):
        if not (directory / part).is_dir():
            raise ValueError(f"no {directory / part}: bash scripts/quickstart.sh makes it, or name --quickstart DIR")


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.quickstart")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--tokenizer_steps", type=whole(1), default=300)
    parser.add_argument("--flexvar_steps", type=whole(0), default=0, help="0: as many as the model needs")
    parser.add_argument("--further_steps", type=whole(0), default=0, help="the same of the two that go on from it")
    parser.add_argument("--processes", type=whole(0), default=0, help="of each training run; 0: one a GPU, or two")
    parser.add_argument("--model", choices=MODELS, default="flexvar")
    args = parser.parse_args()
    check_output_directory(args.out, "--out")
    kind, out = MODELS[args.model], args.out
    first, more = args.flexvar_steps or kind.steps, args.further_steps or kind.further
    runs, seconds, scaling = {}, {}, []
    steps = {"tokenizer": args.tokenizer_steps, "flexvar": first, "flexvar_continued": more, "sar": more}
    vae_ckpt = f"--vae_ckpt={out / 'tokenizer'}"
    # Of a GPU, --precision auto knows by itself.
    half = ["--precision=bf16"] if not torch.cuda.is_available() and cpu_has_bf16() else []
    base = [vae_ckpt, f"--code_cache={out / 'codes'}", *FLEXVAR, *kind.model, *half]
    further = [*base, *FURTHER, f"--init_ckpt={out / 'flexvar'}"]
    stages = {
        "tokenizer": ("train_tokenizer.py", [*TOKENIZER, *kind.tokenizer]),
        "flexvar": ("train.py", [*base, *FROM_SCRATCH, *kind.scratch]),
        "flexvar_continued": ("train.py", [*further, "--training_mode=teacher_forcing"]),
        "sar": ("train.py", [*further, *kind.sar]),
    }
    for name, (program, flags) in stages.items():
        if name == "flexvar":
            scaling = kind.scaling(out / "tokenizer")
        flags = [*flags, *([] if name == "tokenizer" else scaling)]
        watch = [] if name == "tokenizer" else [f"--eval_every={max(1, steps[name] // 6)}"]
        runs[name], seconds[name] = run_stage(name, program, [*flags, *watch], steps[name], out, args.processes)
        if name == "tokenizer":
            codes = [vae_ckpt, f"--out={out / 'codes'}", f"--image_size={SIZE}", f"--seed={SEED}", *kind.cache]
            # As many as half of the epochs of FlexVAR, so that each is seen about twice.
            codes += [f"--crops={min(8, math.ceil(first * 48 / 1300))}", "--shard_images=128", "--batch=128"]
            seconds["codes"] = launch(["-m", "utils.data.code_cache", *DATA, *codes], args.processes)
    began = time.perf_counter()
    report = {
        **evaluate(runs, kind, out),
        "held_out_loss": {name: read_metrics(run, "val/loss")[1][-1] for name, run in runs.items()},
        "model": args.model,
        "steps": steps,
        "seconds": seconds,
    }
    draw_curves(runs, first, kind, out)
    seconds["evaluation"] = time.perf_counter() - began
    write_report(report, out)
    print((out / "report.md").read_text())


if __name__ == "__main__":
    main()

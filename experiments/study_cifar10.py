"""Does SAR lower the distance below what equal further teacher forcing gives? CIFAR-10, several seeds, error bars.

    bash scripts/experiment_cifar10.sh --data_path cifar10                  # two CPU cores; stops and goes on anywhere
    bash scripts/experiment_cifar10.sh --data_path cifar10 --size gpu --part all
    bash scripts/experiment_cifar10.sh --data_path cifar10 --status         # what is done

Tokenizer → codes → FlexVAR by teacher forcing → from that one checkpoint, further steps of every variant → samples at
the guidance that suits each variant best, chosen with other seeds → OUT/report.md, OUT/study.json, OUT/curves.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from evaluate import label_order
from evaluate import run as evaluate
from experiments.quickstart import launch
from experiments.study_digits import table_of
from models.vqvae import to_bytes
from utils.config import DataConfig
from utils.config_sampling import EvalConfig
from utils.data import open_dataset
from utils.distributed import alone
from utils.evaluations.c2i.features import make_extractor
from utils.evaluations.c2i.images import write_npz
from utils.files import read_json, read_tensor, save_array, save_tensors, write_json
from utils.flags import parse
from utils.pictures import plot_curves, read_metrics
from utils.visualize import HeldOut, exposure

PN, SIDE, CLASSES = "1_2_3_4_6_8", 32, 10
GUIDANCES = (0.0, 0.5, 1.0, 2.0)  # ramp
CHOOSING, JUDGING = 1000, 0  # evaluation seeds: the guidance is chosen with the first, numbers come from the second
FEATURES = "efficientnet_lite0"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    tokenizer: tuple[str, ...]
    crops: int  # of the code cache; CIFAR-10's views are an image and its mirror image
    model: tuple[str, ...]
    base: tuple[str, ...]  # teacher forcing to a plateau
    further: int  # steps of every variant
    lr: float  # of those
    samples: int  # judged images of each class
    choosing: int  # images of each class to choose the guidance with
    real: int  # held-out images of the reference, and training images for the classifier


SMALL_TOKENIZER = (
    *("--base_width=32", "--width_mult", "1", "2", "2", "--res_blocks=1", "--z_channels=64"),
    *("--codebook_size=512", "--codebook_dim=16", "--lr=2e-3", "--wpe=0.1"),
)
SIZES = {
    "smoke": Size(
        (*SMALL_TOKENIZER, "--bs=16", "--steps=4"), 1, ("--depth=1", "--width=64", "--bs=16"),
        ("--lr=1e-3", "--steps=3"), 2, 3e-4, 1, 1, 40,
    ),
    "cpu": Size(
        (*SMALL_TOKENIZER, "--bs=32", "--steps=1200", "--usage_every=50"), 2, ("--depth=4", "--width=128", "--bs=64"),
        ("--lr=2e-3", "--wp=0.05", "--wpe=0.1", "--steps=2400"), 200, 3e-4, 200, 20, 2000,
    ),
    "gpu": Size(
        (*SMALL_TOKENIZER, "--bs=128", "--steps=12000"), 2, ("--depth=8", "--width=512", "--bs=256"),
        ("--lr=6e-4", "--wp=0.05", "--wpe=0.1", "--steps=8000"), 2000, 1e-4, 5000, 500, 10000,
    ),
}  # fmt: skip

SAR, ALL = "--training_mode=csfl", ("--sf_top_k=0", "--sf_top_p=0")
GUIDED = (SAR, "--rollout=cfg", *ALL)
DRAWN = ("--rollout=sample", *ALL)
MAIN = {
    "TF continued": ("--training_mode=teacher_forcing",),
    "SAR argmax": (SAR, "--rollout=argmax"),
    "SAR sampled": (SAR, *DRAWN),
    "SAR guided": GUIDED,
    "SF full": ("--training_mode=sf_full", *DRAWN),
    "SF hybrid, from side 4": ("--training_mode=sf_hybrid", "--sf_hybrid_from=4", *DRAWN),
}
TWICE = "TF continued, twice the steps"  # about the time of an SAR run
OTHERS = {
    **{f"SAR guided, γ {gamma}": (*GUIDED, f"--csf_weight={gamma}") for gamma in (0.003, 0.03, 0.1, 1)},
    "SAR guided, last transition": (*GUIDED, "--ssr=last"),
    "SAR guided, ground-truth target": (*GUIDED, "--csf_target=ground_truth"),
    "SF alternate": ("--training_mode=sf_alternate", *DRAWN),
    "SF interleave": ("--training_mode=sf_interleave", *DRAWN),
}
COLUMNS = {
    "guidance": ("guidance", 1),
    "distance": ("Fréchet distance", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "score": ("IS-style score", 2),
    "accuracy": ("class accuracy", 3),
    "held_out": ("held-out NLL", 4),
    "train": ("training NLL", 4),
    "gap": ("exposure gap", 3),
    "entropy": ("entropy", 3),
    "seconds": ("s/step", 2),
}


class Study:
    """The stages, each a call of one of the project's entries, which resume by themselves and end at once when done."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.size, self.seeds = args.out, SIZES[args.size], args.seeds
        folder = (Path(args.data_path) / "train").is_dir()
        self.data = DataConfig(dataset="folder" if folder else "cifar10", data_path=args.data_path, workers=0)
        self.data_flags = [f"--dataset={self.data.dataset}", f"--data_path={args.data_path}"]
        self.data_flags += [f"--workers={args.workers}"]
        variants = {**MAIN, TWICE: MAIN["TF continued"], **(OTHERS if args.part == "all" else {})}
        variants = {name: flags for name, flags in variants.items() if args.only in name}
        self.numbers = {name: i for i, name in enumerate([*MAIN, TWICE, *OTHERS])}
        self.jobs = [(name, flags, seed) for seed in self.seeds for name, flags in variants.items()]
        self.variants = list(variants)

    def run(self, name: str, seed: int) -> Path:
        return self.out / f"runs/{self.numbers[name]:02d}_{seed}"

    def steps(self, name: str) -> int:
        return self.size.further * (2 if name == TWICE else 1)

    # ------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        out, size = self.out, self.size
        common = [f"--pn={PN}", "--vis_num_samples=0", "--eval_images=2000", "--logger_type=none"]
        launch(["train_tokenizer.py", *self.data_flags, f"--image_size={SIDE}", *common, *size.tokenizer,
                f"--out_dir={out / 'tokenizer'}"])  # fmt: skip
        codes = [f"--vae_ckpt={out / 'tokenizer'}", f"--out={out / 'codes'}", f"--image_size={SIDE}", "--batch=128"]
        launch(["-m", "utils.code_cache", *self.data_flags, *codes, f"--crops={size.crops}"])
        model = [*size.model, f"--vae_ckpt={out / 'tokenizer'}", f"--code_cache={out / 'codes'}", "--schedule=fixed"]
        model += [*common, "--workers=0", "--log_every=20"]
        launch(["train.py", *model, "--training_mode=teacher_forcing", *size.base, f"--out_dir={out / 'base'}"])

        def further(job: tuple[str, tuple[str, ...], int]) -> None:
            name, flags, seed = job
            more = [*flags, f"--init_ckpt={out / 'base'}", f"--lr={size.lr}", f"--steps={self.steps(name)}"]
            launch(["train.py", *model, *more, f"--seed={seed}", f"--out_dir={self.run(name, seed)}"], processes=1)

        with ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
            list(pool.map(further, self.jobs))

    # ----------------------------------------------------------------------------------------- evaluating

    def reference(self) -> Path:
        """Held-out photographs, evenly over the split, as an npz; computed features stay beside each evaluation."""
        path = self.out / "real.npz"
        if not path.is_file():
            views = open_dataset(self.data, SIDE, 0, "val")
            n = min(self.size.real, len(views))
            images = torch.stack([views[0, i * len(views) // n][0] for i in range(n)])
            save_array(self.out / "real.npy", to_bytes(images).permute(0, 2, 3, 1).numpy())
            write_npz([self.out / "real.npy"], path)
            (self.out / "real.npy").unlink()
        made = self.out / "reference.npz"
        if not made.is_file():
            self.judge(self.out / "reference", f"--samples={path}", f"--make_reference={made}")
        return made

    def judge(self, directory: Path, *flags: str) -> Path:
        """What evaluate.py does with these flags; what it has done before it does not do again."""
        evaluate(parse(EvalConfig, [f"--features={FEATURES}", f"--out_dir={directory}", *flags]), alone())
        return directory

    def sampled(self, run: Path, directory: Path, each: int, seed: int, *flags: str) -> Path:
        drawn = [f"--ckpt={run}", f"--reference={self.reference()}", "--top_k=0", "--top_p=0", *flags]
        return self.judge(directory, *drawn, f"--num_samples={each}", f"--seed={seed}", "--batch=50")

    def best_guidance(self, name: str) -> float:
        """The one of the smallest distance, over the variant's first seed, with images that no table shows."""
        run = self.out / "base" if name == "before" else self.run(name, self.seeds[0])
        sweep = f"--sweep_cfg={','.join(map(str, GUIDANCES))}"
        directory = self.sampled(run, self.out / f"choice/{run.name}", self.size.choosing, CHOOSING, sweep)
        reports = [read_json(path) for path in sorted(directory.glob("cfg*/report.json"))]
        best = min(reports, key=lambda report: report[f"frechet_distance_{FEATURES}"])
        return best["settings"]["cfg"]

    @cached_property
    def classifier(self) -> LogisticRegression:
        """Of the judge's pooled features of training photographs."""
        path = self.out / "classified.safetensors"
        if not path.is_file():
            views = open_dataset(self.data, SIDE, 0, "train")
            views.training = False
            n = min(self.size.real, len(views))
            pairs = [views[0, i * len(views) // n] for i in range(n)]
            extractor = make_extractor(FEATURES, "", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            images, device = to_bytes(torch.stack([p[0] for p in pairs])), next(extractor.parameters()).device
            pool = torch.cat([extractor(part.to(device)).pool for part in images.split(50)])
            save_tensors(path, {"pool": pool, "labels": torch.tensor([p[1] for p in pairs])})
        pool, labels = read_tensor(path, "pool").numpy(), read_tensor(path, "labels").numpy()
        return LogisticRegression(C=0.01, max_iter=500).fit(pool, labels)

    def accuracy(self, directory: Path, each: int) -> float:
        """Share of the samples that the classifier takes for their class."""
        files = sorted((directory / "features").glob("[0-9]*.safetensors"))
        pool = np.concatenate([read_tensor(file, "pool").numpy() for file in files])
        return float(self.classifier.score(pool, label_order(each * CLASSES, CLASSES, JUDGING).numpy()))

    def row(self, run: Path, cfg: float) -> dict[str, float]:
        """All numbers of one run."""
        directory = self.sampled(run, self.out / f"judged/{run.name}", self.size.samples, JUDGING, f"--cfg={cfg}")
        report = read_json(directory / "report.json")
        names = {"distance": "frechet_distance", "precision": "precision", "recall": "recall"}
        names |= {"score": "inception_style_score"}
        found = {key: report[f"{name}_{FEATURES}"] for key, name in names.items()}
        where = {"dataset": self.data.dataset, "data_path": self.data.data_path}
        data = HeldOut.of(str(run), argparse.Namespace(vae_ckpt="", pn="", n=500, **where))
        forced, own = exposure(data, seed=0)
        entropy = torch.special.entr(data.logits(data.tokens).softmax(-1)).sum(-1)  # (B, L)
        schedule = data.pipeline.schedule
        trained = next(v for n in ("train/loss_tf", "train/loss") if (v := read_metrics(run, n)[1]))
        speeds = read_metrics(run, "train/images_per_second")[1]
        return {
            **found,
            "guidance": cfg,
            "accuracy": self.accuracy(directory, self.size.samples),
            "held_out": read_metrics(run, "val/loss")[1][-1],
            "train": statistics.mean(trained[-3:]),
            "gap": (own.mean() - forced.mean()).item(),
            "entropy": entropy.mean().item(),
            "entropy_side": [part.mean().item() for part in schedule.split(entropy)],
            "gap_side": [(b - a).mean().item() for a, b in zip(*map(schedule.split, (forced, own)), strict=True)],
            "seconds": read_json(run / "config.json")["optim"]["bs"] / statistics.median(speeds),
        }

    def rows(self) -> Iterator[tuple[str, list[dict[str, float]]]]:
        """Variant after variant: the rows of its seeds."""
        yield "before", [self.row(self.out / "base", self.best_guidance("before"))]
        for name in self.variants:
            cfg = self.best_guidance(name)
            yield name, [self.row(self.run(name, seed), cfg) for seed in self.seeds]

    # ------------------------------------------------------------------------------------------ reporting

    def report(self) -> None:
        found = {}
        for name, rows in self.rows():
            found[name] = rows
            write_json(self.out / "study.json", found)
            table = table_of(found, COLUMNS, standard_error)
            (self.out / "report.md").write_text(table + "\n", encoding="utf-8")
        curves = {name: read_metrics(self.run(name, self.seeds[0]), "val/loss") for name in self.variants}
        plot_curves({"further steps": curves}, ("step", "held-out NLL"), self.out / "curves.png")
        print(table)

    def status(self) -> None:
        """What is done."""
        stages = {"tokenizer": self.out / "tokenizer/metrics.jsonl", "codes": self.out / "codes/manifest.json"}
        stages |= {"base": self.out / "base/metrics.jsonl", "reference": self.out / "reference.npz"}
        for name, path in stages.items():
            print(f"{name:>40}  {'there' if path.is_file() else 'to do'}")
        for name, _, seed in self.jobs:
            run = self.run(name, seed)
            steps = read_metrics(run, "train/loss")[0] if (run / "metrics.jsonl").is_file() else []
            step = steps[-1] if steps else 0
            judged = "judged" if (self.out / f"judged/{run.name}/report.json").is_file() else ""
            print(f"{name:>40}  seed {seed}: step {step} of {self.steps(name)} {judged}")


def standard_error(values: list[float], digits: int) -> str:
    """Mean ± standard error over the seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="torchvision's CIFAR-10, or train/ and val/ class folders")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--part", choices=["main", "all"], default="main")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None, help="default: out/cifar10_SIZE")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of the stages that read images")
    parser.add_argument("--status", action="store_true", help="say what is done, and stop")
    args = parser.parse_args()
    args.out = args.out or Path(f"out/cifar10_{args.size}")
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args)
    if args.status:
        return study.status()
    study.train()
    return study.report()


if __name__ == "__main__":
    main()

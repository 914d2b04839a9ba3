"""Does SAR lower the distance below what equal further teacher forcing gives? CIFAR-10, several seeds, error bars.

    bash scripts/experiment_cifar10.sh --data_path cifar10                  # two CPU cores; stops and goes on anywhere
    bash scripts/experiment_cifar10.sh --data_path cifar10 --size gpu --part all
    bash scripts/experiment_cifar10.sh --data_path cifar10 --status         # what is done

Tokenizer → codes → FlexVAR by teacher forcing → from that one checkpoint, further steps of every variant, SAR's and its
rivals' → samples at every guidance, compared at the one that suits each variant best, chosen with other seeds, and at
equal score → OUT/study.json, and report.md with its figures.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.common import machine
from evaluate import label_order
from evaluate import run as evaluate
from experiments.measures import measure, slug
from experiments.plan_cifar10 import (
    BOUNDS,
    CHOOSING,
    CLASSES,
    FORCED,
    JUDGING,
    MAIN,
    OFFLINE,
    OTHERS,
    PN,
    SIDE,
    SIZES,
    VARIANTS,
)
from experiments.quickstart import launch
from experiments.report_cifar10 import write_report
from models.scales import ScaleSchedule
from models.tokenizer import to_bytes
from models.weights import load_tokenizer
from utils.config.sampling import EvalConfig
from utils.config.training import DataConfig
from utils.data.datasets import check_dataset, open_dataset, plain_images
from utils.evaluations.c2i.images import write_npz
from utils.evaluations.c2i.metrics import Statistics, frechet_distance, precision_recall
from utils.runtime.checkpoint import checkpoints, reached
from utils.runtime.distributed import alone
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.files import digest, read_json, read_tensor, save_array, write_json
from utils.runtime.flags import Parser, parse, whole
from utils.runtime.process import cores
from utils.runtime.provenance import git_state


class Study:
    """The stages, each a call of one of the project's entries, which resume by themselves and end at once when done."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.size = args, args.out, SIZES[args.size]
        folder = (Path(args.data_path) / "train").is_dir()
        self.data = DataConfig(dataset="folder" if folder else "cifar10", data_path=args.data_path, workers=0)
        self.data_flags = [f"--dataset={self.data.dataset}", f"--data_path={args.data_path}"]
        self.data_flags += [f"--workers={args.workers}"]
        self.mirrored = ["--augment=flip"] if folder else []
        self.features = {OFFLINE: (f"--features={OFFLINE}",)}
        if args.inception_weights:
            self.features["inception"] = (f"--inception_weights={args.inception_weights}",)
        part = MAIN if args.part == "main" else {**MAIN, **OTHERS}
        seeds = args.seeds or range(self.size.seeds)
        named = args.only or args.seeds  # else the others have one seed
        jobs = [(name, seed) for seed in seeds for name in (args.only or part)]
        self.jobs = [(name, seed) for name, seed in jobs if named or name in MAIN or seed == 0]

    def run(self, name: str, seed: int) -> Path:
        return self.out / f"runs/{slug(name)}_{seed}"

    def steps(self, name: str) -> int:
        return self.size.further * VARIANTS[name].steps

    # ------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        out, size = self.out, self.size
        common = [f"--pn={PN}", "--vis_num_samples=0", "--logger_type=none"]
        tokenizer = [*self.data_flags, f"--image_size={SIDE}", *common, *size.tokenizer]
        launch(["train_tokenizer.py", *tokenizer, "--eval_images=2000", f"--out_dir={out / 'tokenizer'}"])
        codes = [f"--vae_ckpt={out / 'tokenizer'}", f"--out={out / 'codes'}", f"--image_size={SIDE}", "--batch=128"]
        codes += [*self.data_flags, *self.mirrored, f"--crops={size.crops}"]
        launch(["-m", "utils.data.code_cache", *codes])
        model = [*size.model, f"--vae_ckpt={out / 'tokenizer'}", f"--code_cache={out / 'codes'}", "--schedule=fixed"]
        model += [*common, "--workers=0", "--log_every=20", f"--precision={self.args.precision}"]
        base = [*FORCED, *size.base, "--eval_every=500", f"--out_dir={out / 'base'}"]
        launch(["train.py", *model, *base])

        def further(job: tuple[str, int]) -> None:
            name, seed = job
            variant, steps = VARIANTS[name], self.steps(name)
            if reached(self.run(name, seed)) >= steps:
                return
            flags = [*variant.flags, f"--lr={size.lr * variant.lr:g}", f"--steps={steps}", f"--seed={seed}"]
            flags += [f"--init_ckpt={out / 'base'}", f"--eval_every={max(1, size.further // 3)}"]
            launch(["train.py", *model, *flags, f"--out_dir={self.run(name, seed)}"], processes=1)

        two_at_a_time(further, self.jobs)

    # ------------------------------------------------------------------------------- photographs to compare with

    def photographs(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), not augmented and evenly over the split, and their classes."""
        return plain_images(open_dataset(self.data, SIDE, 0, split), n)

    def bounds(self, kind: str) -> Path:
        """Photographs judged as samples are: "training" ones, or "held-out" ones, as they are or "reconstructed"."""
        path, directory = self.out / f"{slug(kind)}.npz", self.out / f"judged/{slug(kind)}"
        if not path.is_file():
            images, _ = self.photographs("train" if "training" in kind else "val", self.size.samples * CLASSES)
            if "reconstructed" in kind:
                vae, pn = load_tokenizer(self.out / "tokenizer"), ScaleSchedule.parse(PN)
                side = pn.sides[-1]
                with torch.no_grad():
                    images = torch.cat([vae.decode_at(vae.tokenize(p, pn.sides), side, pn) for p in images.split(100)])
            write_images(images, path)
        if not (directory / "report.json").is_file():  # written last
            self.judge(directory, f"--samples={path}", f"--reference={self.reference(OFFLINE)}")
        return directory

    def reference(self, features: str) -> Path:
        """Statistics of held-out photographs."""
        made, path = self.out / f"reference_{features}.npz", self.out / "held_out.npz"
        if not path.is_file():
            write_images(self.photographs("val", self.size.real)[0], path)
        if not made.is_file():
            self.judge(self.out / f"reference_{features}", f"--samples={path}", f"--make_reference={made}", of=features)
        return made

    @cached_property
    def reconstructed(self) -> Tensor:
        """Features (N, D) of reconstructed held-out photographs: what a perfect transformer's samples would be like."""
        return pooled(self.bounds("reconstructed held-out photographs"))

    @cached_property
    def classifier(self) -> LogisticRegression:
        """Of the judge's features of reconstructed training photographs: samples are as blurred as those."""
        labels = self.photographs("train", self.size.samples * CLASSES)[1]
        return LogisticRegression(C=0.01, max_iter=500).fit(
            pooled(self.bounds("reconstructed training photographs")), labels
        )

    def bound(self, kind: str) -> dict[str, float]:
        found = scores(self.bounds(kind))
        if "held-out" in kind:
            labels = self.photographs("val", self.size.samples * CLASSES)[1]
            return {**found, "accuracy": float(self.classifier.score(self.reconstructed, labels))}
        return {**found, **self.beside_reconstructions(pooled(self.bounds(kind)))}

    def beside_reconstructions(self, pool: Tensor) -> dict[str, float]:
        """Scores that the transformer alone answers for: features (N, D) against those of reconstructed photographs."""
        distance = frechet_distance(Statistics.of(pool), Statistics.of(self.reconstructed))
        precision, recall = precision_recall(pool, self.reconstructed)
        return {"to_reconstructions": distance, "precision_of_those": precision, "recall_of_those": recall}

    # ----------------------------------------------------------------------------------------- evaluating

    def judge(self, directory: Path, *flags: str, of: str = OFFLINE) -> Path:
        """Runs evaluate.py with these flags; finished parts are not done again."""
        evaluate(parse(EvalConfig, [*self.features[of], f"--out_dir={directory}", *flags]), alone())
        return directory

    def sampled(self, run: Path, directory: Path, each: int, seed: int, *flags: str, of: str = OFFLINE) -> Path:
        drawn = [f"--ckpt={run}", f"--reference={self.reference(of)}", "--top_k=0", "--top_p=0", *flags]
        return self.judge(directory, *drawn, f"--num_samples={each}", f"--seed={seed}", "--batch=50", of=of)

    def best_guidance(self, run: Path) -> float:
        """The one of the smallest distance, with images that no table shows. Other seeds of a variant share it."""
        directory, each = self.out / f"choice/{run.name}", self.size.choosing

        def choose() -> dict:
            points = self.frontier(run, each, CHOOSING, directory)
            return {"guidance": min(points, key=lambda cfg: scores(points[cfg])["distance"])}

        described = {"tried": list(self.size.guidances), "each": each, **saved(run)}
        return kept(directory / "choice.json", described, choose)["guidance"]

    def frontier(self, run: Path, each: int, seed: int, directory: Path) -> dict[float, Path]:
        """Judged samples of every guidance."""
        self.sampled(run, directory, each, seed, f"--sweep_cfg={','.join(map(str, self.size.guidances))}")
        return {cfg: directory / f"cfg{cfg:g}_k0_p0" for cfg in self.size.guidances}

    def row(self, run: Path, cfg: float) -> dict:
        """All numbers of one run; kept beside its samples' features."""
        each, directory = self.size.samples, self.out / f"judged/{run.name}"

        def judge() -> dict:
            points, labels = self.frontier(run, each, JUDGING, directory), label_order(each * CLASSES, CLASSES, JUDGING)
            found = []
            for guidance, place in points.items():
                pool = pooled(place)
                accuracy = float(self.classifier.score(pool, labels))
                beside = self.beside_reconstructions(pool)
                found.append({"guidance": guidance, **scores(place), **beside, "accuracy": accuracy})
            return {**found[self.size.guidances.index(cfg)], "frontier": found, **measure(run, self.data)}

        described = {"run": str(run), "guidance": cfg, "tried": list(self.size.guidances), "each": each, **saved(run)}
        found = kept(directory / "row.json", described, judge)
        if "inception" in self.features:
            again = self.out / f"judged_inception/{run.name}_cfg{cfg:g}"
            self.sampled(run, again, each, JUDGING, f"--cfg={cfg}", of="inception")
            found["fid"] = read_json(again / "report.json")["fid"]
        return found

    def evaluate(self) -> None:
        """study.json, of every run that is finished, whatever was asked for in this call."""
        base = self.out / "base"
        # Of this call: with what a run was trained, its own starts.jsonl says.
        data = {"dataset": self.data.dataset, "data_path": self.data.data_path}
        call = {"last call": " ".join(sys.argv[1:]), **data, **machine(), "commit": git_state()}
        settings = {**call, **asdict(self.size)}
        bounds = {kind: self.bound(kind) for kind in BOUNDS}
        runs = {("before", 0): base}
        for name, seed in itertools.product(VARIANTS, range(100)):
            if reached(self.run(name, seed)) >= self.steps(name):
                runs[name, seed] = self.run(name, seed)
        for features in self.features:
            self.reference(features)  # what all rows share is there before threads ask for it
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, cores() // 2))
        first = {name: run for (name, _), run in reversed(runs.items())}  # of the variant's first seed
        guidance = dict(zip(first, two_at_a_time(self.best_guidance, first.values()), strict=True))
        judged = two_at_a_time(lambda key: self.row(runs[key], guidance[key[0]]), runs)
        rows: dict[str, list[dict]] = {}
        for (name, seed), row in zip(runs, judged, strict=True):
            rows.setdefault(name, []).append({"seed": seed, **row})
        compare_at_equal_score(rows)
        write_json(self.out / "study.json", {"settings": settings, "bounds": bounds, "rows": rows})

    def status(self) -> None:
        """Prints what is done."""
        for name in ("tokenizer", "base"):
            print(f"{name:>40}  step {reached(self.out / name)}")
        for name, path in {"codes": "codes/manifest.json", "reference": f"reference_{OFFLINE}.npz"}.items():
            print(f"{name:>40}  {'there' if (self.out / path).is_file() else 'to do'}")
        for name, seed in self.jobs:
            run = self.run(name, seed)
            judged = "judged" if (self.out / f"judged/{run.name}/row.json").is_file() else ""
            print(f"{name:>40}  seed {seed}: step {reached(run)} of {self.steps(name)} {judged}")


def two_at_a_time(function: Callable[[Any], Any], jobs: Iterable) -> list:
    """Results of all jobs; on a GPU one at a time. A small model keeps but half of a CPU busy."""
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
        return list(pool.map(function, jobs))


def compare_at_equal_score(rows: dict[str, list[dict]]) -> None:
    """Adds to each row the distance at the guidance at which its score is that of its seed's continued teacher forcing,
    at that one's own best guidance: a lower distance there is no matter of guidance."""
    wanted = {row["seed"]: row["score"] for row in rows.get("TF continued", [])}
    for row in (row for group in rows.values() for row in group):
        found = distance_at(row["frontier"], wanted[row["seed"]]) if row["seed"] in wanted else None
        if found is not None:
            row["at_equal_score"] = found


def distance_at(frontier: list[dict], score: float) -> float | None:
    """Least distance at a score, between neighbours on a frontier that have it between them; None: none have."""
    found = []
    for low, high in itertools.pairwise(frontier):
        a, b = low["score"], high["score"]
        if a != b and min(a, b) <= score <= max(a, b):
            share = (score - a) / (b - a)
            found.append((1 - share) * low["distance"] + share * high["distance"])
    return min(found, default=None)


def kept(path: Path, described: dict, compute: Callable[[], dict]) -> dict:
    """Result of `compute`, cached as long as all that it depends on is as `described`."""
    found = read_json(path) if path.is_file() else {}
    if any(found.get(name) != value for name, value in described.items()):
        found = {**described, **compute()}
        write_json(path, found)
    return found


def saved(run: Path) -> dict[str, str]:
    """Digest of the weights that a run ended with."""
    return {"checkpoint": digest(checkpoints(run)[-1] / "manifest.json")}


def write_images(images: Tensor, path: Path) -> None:
    """Images (N, 3, H, W) in [-1, 1] → an npz that evaluate.py takes."""
    array = path.with_suffix(".npy")
    save_array(array, to_bytes(images).permute(0, 2, 3, 1).numpy())
    write_npz([array], path)
    array.unlink()


def pooled(directory: Path) -> Tensor:
    """The features (N, D) that an evaluation left behind."""
    files = sorted((directory / "features").glob("[0-9]*.safetensors"))
    return torch.from_numpy(np.concatenate([read_tensor(file, "pool").numpy() for file in files]))


def scores(directory: Path) -> dict[str, float]:
    """Numbers that an evaluation in the offline features reports."""
    names = {"distance": "frechet_distance", "precision": "precision", "recall": "recall"}
    names |= {"score": "inception_style_score"}
    report = read_json(directory / "report.json")
    return {key: report[f"{name}_{OFFLINE}"] for key, name in names.items()}


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.study_cifar10")
    parser.add_argument("--data_path", required=True, help="torchvision's CIFAR-10, or train/ and val/ class folders")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--part", choices=["main", "all"], default="main")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="variants, instead of a part")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[], help="below 100; default: 0, 1, 2 …, by size")
    parser.add_argument("--out", type=Path, default=None, help="default: out/cifar10_SIZE")
    parser.add_argument("--workers", type=whole(0), default=1, help="loader processes of the stages that read images")
    parser.add_argument("--precision", default="auto", help="of the transformer's training; see train.py")
    parser.add_argument("--inception_weights", default="", help="FID, too; see evaluate.py")
    parser.add_argument("--status", action="store_true", help="say what is done, and stop")
    args = parser.parse_args()
    args.out = args.out or Path(f"out/cifar10_{args.size}")
    if args.only and args.part != "main":
        parser.error("--part has no effect with --only")
    study = Study(args)
    check_dataset(study.data)
    check_output_directory(args.out, "--out")
    if args.status:
        return study.status()
    study.train()
    study.evaluate()
    return write_report(args.out)


if __name__ == "__main__":
    main()

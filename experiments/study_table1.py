"""Table 1 of the paper on digits: image against latent supervision of FlowAR, on two continuous autoencoders.

    bash scripts/quickstart.sh --model flowar --out out/quickstart_flowar
    python -m experiments.study_table1 --quickstart out/quickstart_flowar   # a finished run is not run again

Both autoencoders go on from the quickstart's for equally many steps: one as before, one equivariantly (EQ-VAE). A
FlowAR is trained from scratch on each, with each supervision. Writes table.md, study.json and the runs to
out/study_table1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from experiments.quickstart import (
    DATA,
    FLEXVAR,
    FROM_SCRATCH,
    MODELS,
    PER_CLASS,
    SEED,
    SIDES,
    SIZE,
    TOKENIZER,
    Judge,
    gather,
    launch,
    run_stage,
    sample,
)
from experiments.study import Plan, Scorer, run_study
from models import Guidance, ScaleSchedule
from models.pipeline import open_pipeline
from utils.config.training import DataConfig
from utils.data.datasets import open_dataset
from utils.evaluations.c2i import precision_recall
from utils.runtime.entry import entry

KIND = MODELS["flowar"]
AUTOENCODERS = {"ordinary": [], "equivariant": ["--equivariant"]}
FURTHER_STEPS = 300  # of each autoencoder
SUPERVISIONS = ("image", "latent")
CROPS = 8  # of each digit in the cache
COLUMNS = {
    "class_accuracy": ("class accuracy", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "unguided_distance": ("distance without guidance", 2),
    "reconstruction": ("distance of reconstructions", 2),
}


def names() -> dict[str, tuple[str, str]]:
    """Variants by name: autoencoder and supervision."""
    return {f"{vae} autoencoder, {path}": (vae, path) for vae in AUTOENCODERS for path in SUPERVISIONS}


def variants(model: str) -> dict[str, list[str]]:
    """Flags that the variants differ in, beside their autoencoder's. Raises ValueError for codes."""
    if model != "flowar":
        raise ValueError(f"Table 1 is about continuous latents: --quickstart of --model flowar, not {model}")
    return {name: [f"--supervision={path}"] for name, (_, path) in names().items()}


def prepare(quickstart: Path, out: Path) -> dict[str, list[str]]:
    """Autoencoders and caches. Returns each variant's flags for them."""
    scaling, found = {}, {}
    for vae, flags in AUTOENCODERS.items():
        further = [*TOKENIZER, *KIND.tokenizer, *flags, "--lr=5e-4", f"--init_ckpt={quickstart / 'tokenizer'}"]
        run_stage(f"autoencoder_{vae}", "train_tokenizer.py", further, FURTHER_STEPS, out, processes=1)
        scaling[vae] = KIND.scaling(out / f"autoencoder_{vae}")
    for name, (vae, path) in names().items():
        tokenizer, cache = f"--vae_ckpt={out / f'autoencoder_{vae}'}", out / f"latents_{vae}_{path}"
        command = [*DATA, tokenizer, f"--out={cache}", f"--image_size={SIZE}", f"--seed={SEED}", f"--pn={SIDES}"]
        command += [f"--supervision={path}", f"--crops={CROPS}", "--shard_images=128", "--batch=128"]
        launch(["-m", "utils.data.code_cache", *command], processes=1)
        found[name] = [tokenizer, f"--code_cache={cache}", *scaling[vae]]
    return found


def flags(quickstart: Path) -> list[str]:
    return [*FLEXVAR, *KIND.model, *FROM_SCRATCH, *KIND.scratch]


def scorer(quickstart: Path) -> Scorer:
    judge, schedule = Judge(), ScaleSchedule.parse(SIDES)
    train, held_out = (open_dataset(DataConfig(dataset="digits"), SIZE, SEED, split) for split in ("train", "val"))
    held_out.training = True  # shifted and turned as the training digits are
    reference = judge.features(gather(train, range(1))[0]).float()
    real, real_labels = gather(held_out, range(1))
    labels = torch.arange(10).repeat_interleave(PER_CLASS)

    @torch.no_grad()
    def scores(run: Path) -> dict:
        vae = open_pipeline(str(run)).vae
        guided, unguided = (
            sample(run, vae, labels, replace(KIND.sampling, guidance=g))
            for g in (KIND.sampling.guidance, Guidance("none"))
        )
        decoded = vae.decode_at(vae.tokenize(real, schedule.sides), schedule.sides[-1], schedule)
        precision, recall = precision_recall(judge.features(guided).float(), reference)
        return {
            **judge.score(guided, labels.numpy()),
            "precision": precision,
            "recall": recall,
            "unguided_distance": judge.score(unguided, labels.numpy())["frechet_distance"],
            "reconstruction": judge.score(decoded, real_labels)["frechet_distance"],
        }

    return scores


@entry
def main() -> None:
    run_study(Plan("study_table1", variants, flags, scorer, COLUMNS, steps=1200, prepare=prepare), __doc__)


if __name__ == "__main__":
    main()

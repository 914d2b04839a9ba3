"""Train FlexVAR by teacher forcing or SAR: flags → config → build → fit."""

from __future__ import annotations

import utils.runtime.threads  # noqa: F401  # isort: skip

import warnings
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

from contrastive_alignment import ContrastiveAlignment
from models.class_names import class_names
from models.flexvar import FlexVAR, FlexVARConfig
from models.generators import GENERATORS, recognise
from models.run_record import find_run
from models.scales import DEFAULT_SCHEDULE
from models.tokenizer import Tokenizer
from models.weights import digest_of, find_weights, load_strictly, load_tokenizer, read_state_dict
from noisy_context import NoisyContext
from pretrained.download import offer
from sar_trainer import SARTrainer
from student_forcing import STUDENT_FORCING
from trainer import Trainer
from utils.config.training import ModelConfig, TrainConfig
from utils.data.code_cache import open_cache, read_manifest
from utils.data.datasets import Examples, check_dataset, open_splits
from utils.runtime.checkpoint import last_invariants
from utils.runtime.distributed import Ranks
from utils.runtime.entry import entry, notice
from utils.runtime.flags import changed, parse
from utils.runtime.numerics import Precision, derive_seed
from utils.training.estimate import IMAGENET, estimate, lines_of
from utils.training.loop import start

# Errors of tensors without values, in an estimate: the flags are as good as before.
NO_VALUES = (RuntimeError, AssertionError, AttributeError, TypeError)
TRAINERS = {
    "teacher_forcing": Trainer, "csfl": SARTrainer, "noisy": NoisyContext, "cca": ContrastiveAlignment,
    **STUDENT_FORCING,
}  # fmt: skip


def sized_model(wanted: ModelConfig, vae: Tokenizer, classes: int) -> FlexVARConfig:
    """Sizes of the model that the flags name. Raises ValueError when it does not go with the tokenizer."""
    sizes = {
        "depth": wanted.depth,
        "width": wanted.width,
        "num_classes": classes,
        "codebook_size": vae.config.codebook_size,
        "codebook_dim": vae.config.codebook_dim,
        "aln": wanted.aln,
        "alng": wanted.alng,
    }
    sized = GENERATORS[wanted.model].from_flags(wanted, **sizes)
    sized.check_tokenizer(vae.config, f"--model {wanted.model}", wanted.vae_ckpt)
    return sized


def build_model(config: TrainConfig, vae: Tokenizer, classes_of_data: list[str]) -> FlexVAR:
    """The transformer, from --init_ckpt when there is one and the run has no checkpoint of its own yet."""
    wanted, data_classes = config.model, len(classes_of_data)
    before = last_invariants(config.run.directory)  # a run that goes on reads its own weights: see `Loop.resume`
    weights, saved_classes = None, before.get("model_classes", 0)
    if wanted.init_ckpt and not before:
        weights = read_state_dict(wanted.init_ckpt)
        known = recognise(weights, wanted.init_ckpt)
        weights, saved_classes = dict(known.adapted(weights)), known.num_classes
    reset = wanted.reset_class_embedding and weights is not None
    classes = wanted.num_classes or (0 if reset else saved_classes) or data_classes
    if data_classes > classes:
        hint = ": --reset_class_embedding gives it new ones" if saved_classes == classes and weights else ""
        raise ValueError(f"the data has {data_classes} classes, the model only {classes}{hint}")
    if weights:
        check_init(config, vae, class_names(classes_of_data, classes)[:data_classes])
    if data_classes < classes:
        warnings.warn(f"the data's {data_classes} classes take the ids 0…{data_classes - 1} of {classes}", stacklevel=2)
    torch.manual_seed(derive_seed("init", config.run.seed))
    model = sized_model(wanted, vae, classes).build()
    if reset:  # rows as they were drawn; the unconditional class, the last one, is known
        weights["class_emb.weight"] = torch.cat(
            [model.class_emb.weight[:-1], weights["class_emb.weight"][-1:]]
        ).detach()
    if weights:
        load_strictly(model, weights, wanted.init_ckpt)
    return model


def check_init(config: TrainConfig, vae: Tokenizer, names: list[str]) -> None:
    """Compares the run that --init_ckpt belongs to, if it is one, with this one.

    Raises ValueError for other classes, or another tokenizer unless --vae_ckpt named it: then that is a warning.
    """
    wanted, run = config.model, find_run(config.model.init_ckpt)
    if run is None:
        return
    known = (run.class_names or names)[: len(names)]
    if known != names and not wanted.reset_class_embedding and not config.run.allow_change:
        old, new = next(pair for pair in zip_longest(known, names) if pair[0] != pair[1])
        raise ValueError(
            f"{run.directory} was trained on other classes ({old} where the data has {new}): "
            "--reset_class_embedding draws them anew, --allow_change keeps them"
        )
    run.check_tokenizer(digest_of(vae), wanted.vae_ckpt, named=bool(changed(wanted, ["vae_ckpt"])))


def with_sides(config: TrainConfig) -> TrainConfig:
    """The config with the scales that --pn leaves open: those of the tokenizer's run, or the default ones."""
    if config.model.pn:
        return config
    run = find_run(config.model.vae_ckpt)
    schedule = (run and run.schedule) or DEFAULT_SCHEDULE
    if run and run.schedule:
        notice(f"scales {schedule}, those of the tokenizer's run {run.directory}")
    return replace(config, model=replace(config.model, pn=str(schedule)))


def check(config: TrainConfig) -> None:
    """Checks that the files that the flags name are there; released weights that are not can be fetched. Then prints an
    estimate of what the run costs."""
    init = "" if last_invariants(config.run.directory) else config.model.init_ckpt
    for path in filter(None, (config.model.vae_ckpt, init)):
        offer(path)
        find_weights(path)
    config = with_sides(config)
    if config.speed.code_cache:
        images = read_manifest(Path(config.speed.code_cache))["splits"]["train"]["images"]
    else:
        check_dataset(config.data)
        images = IMAGENET
    try:
        print("\n".join(cost_of(config, images)))
    except NO_VALUES as error:
        notice(f"no estimate of what it costs: {str(error).splitlines()[0]}")


def cost_of(config: TrainConfig, images: int) -> list[str]:
    """Lines on what a run costs in memory, time and disk, by arithmetic."""
    wanted, optim, generator = config.model, config.optim, GENERATORS[config.model.model]
    vae = load_tokenizer(wanted.vae_ckpt, **generator.tokenizer_options(wanted))
    sized = sized_model(wanted, vae, wanted.num_classes or 1000)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = {"auto": "bf16"}.get(optim.precision, optim.precision)
    cached, checkpointed = bool(config.speed.code_cache), config.speed.checkpoint_activations
    found = estimate(
        sized, vae, wanted.scales, config.sar, Precision(name, device).dtype, len(optim.ema), cached, checkpointed
    )
    data = f"{images:,} images" + ("" if cached else ", as many as ImageNet has")
    total = optim.steps * optim.bs if optim.steps else optim.ep * images
    length = f"{optim.steps} steps" if optim.steps else f"{optim.ep:g} epochs of {data}"
    what = (
        f"{config.sar.training_mode} of a {wanted.model} of {found.parameters / 1e6:.0f} M parameters in {name}, "
        f"{wanted.scales.total} tokens, {length}"
    )
    return lines_of(found, what, total, config.run.keep, len(optim.ema))


def build(config: TrainConfig, me: Ranks) -> Trainer:
    """Tokenizer, data, model and trainer, at the run's newest checkpoint if it has one."""
    config = with_sides(config)
    wanted, encode = config.model, None
    vae = load_tokenizer(wanted.vae_ckpt, **GENERATORS[wanted.model].tokenizer_options(wanted))
    vae.tf32, size = config.speed.encode_tf32, wanted.scales.sides[-1] * vae.config.factor
    train_set: Examples
    val_set: Examples | None
    if config.speed.code_cache:
        codes, val_set = open_cache(Path(config.speed.code_cache), vae, wanted.supervision, size, wanted.scales)
        train_set, encode = codes, partial(codes.code_batch, vae)
    else:
        train_set, val_set = open_splits(config.data, size, config.run.seed, config.run.directory)
    if val_set is None and config.watch.eval_every:
        raise ValueError("--eval_every has no effect: the data have no val/ to hold out")
    model = build_model(config, vae, train_set.classes)
    trainer = TRAINERS[config.sar.training_mode](config, model, vae, train_set, val_set, me, encode)
    trainer.resume()
    return trainer


@entry
def main() -> None:
    start(parse(TrainConfig, description=__doc__), build, check)


if __name__ == "__main__":
    main()

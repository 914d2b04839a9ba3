"""Train FlexVAR by teacher forcing or SAR: flags → config → build → fit."""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from models.flexvar import FlexVAR, FlexVARConfig
from models.pipeline import default_names
from models.vqvae import VQVAE
from pretrained.download import offer
from sar_trainer import SARTrainer
from student_forcing import STUDENT_FORCING
from trainer import Trainer
from utils.checkpoint import find_weights, flexvar_config, load_strictly, load_tokenizer, read_state_dict, write_json
from utils.code_cache import open_cache, read_manifest
from utils.config import TrainConfig
from utils.data import check_dataset, open_dataset
from utils.distributed import Ranks, alone, ranks
from utils.flags import parse
from utils.optim import derive_seed

TRAINERS = {"teacher_forcing": Trainer, "csfl": SARTrainer, **STUDENT_FORCING}


def build_model(config: TrainConfig, vae: VQVAE, data_classes: int) -> FlexVAR:
    """The transformer, from --init_ckpt when there is one."""
    wanted = config.model
    weights = read_state_dict(wanted.init_ckpt) if wanted.init_ckpt else None
    saved_classes = flexvar_config(weights, wanted.init_ckpt).num_classes if weights else 0
    classes = wanted.num_classes or saved_classes or data_classes
    if data_classes > classes:
        raise ValueError(f"the data has {data_classes} classes, the model only {classes}")
    if data_classes < classes:
        warnings.warn(f"the data's {data_classes} classes take the ids 0…{data_classes - 1} of {classes}", stacklevel=2)
    torch.manual_seed(derive_seed("init", config.run.seed))
    model = FlexVAR(
        FlexVARConfig(
            depth=wanted.depth,
            width=wanted.width,
            num_classes=classes,
            codebook_size=vae.config.codebook_size,
            codebook_dim=vae.config.codebook_dim,
            aln=wanted.aln,
            alng=wanted.alng,
        )
    )
    if weights:
        load_strictly(model, weights, wanted.init_ckpt)
    return model


def check(config: TrainConfig) -> None:
    """Whether the files that the flags name are there; released weights that are not can be fetched."""
    if config.speed.code_cache:
        read_manifest(Path(config.speed.code_cache))
    else:
        check_dataset(config.data)
    for path in filter(None, (config.model.vae_ckpt, config.model.init_ckpt)):
        offer(path)
        find_weights(path)


def class_names(folders: list[str], num_classes: int) -> list[str]:
    """Names for the samples' captions: the data's, or ImageNet's when the folders are its synsets."""
    if len(folders) == num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return default_names(num_classes)
    return folders + [str(i) for i in range(len(folders), num_classes)]


def changes(old: dict, new: dict) -> list[str]:
    """The flags that differ between two configs, as "--flag old → new"."""
    pairs = [(name, old.get(g, {}).get(name), value) for g, flags in new.items() for name, value in flags.items()]
    return [f"--{name} {before} → {after}" for name, before, after in pairs if before != after]


def build(config: TrainConfig, me: Ranks) -> Trainer:
    """Tokenizer, data, model and trainer, at the run's newest checkpoint if it has one."""
    vae, wanted, encode = load_tokenizer(config.model.vae_ckpt), config.model, None
    size = wanted.scales.sides[-1] * vae.config.factor
    if config.speed.code_cache:
        train_set, val_set = open_cache(Path(config.speed.code_cache), vae, wanted.supervision, size)
        encode = train_set.code_batch
    else:
        train_set, val_set = (open_dataset(config.data, size, config.run.seed, split) for split in ("train", "val"))
    model = build_model(config, vae, len(train_set.classes))
    trainer = TRAINERS[config.sar.training_mode](config, model, vae, train_set, val_set, me, encode)
    trainer.resume()
    return trainer


def main() -> None:
    config = parse(TrainConfig, description=__doc__)
    if config.run.check:
        with alone().user_errors():
            check(config)
        return
    with ranks() as me:
        with me.user_errors():
            trainer = build(config, me)
        names = class_names(trainer.train_set.classes, trainer.model.config.num_classes)
        if me.first:
            record = config.run.directory / "config.json"
            if trainer.step and record.is_file():
                for change in changes(json.loads(record.read_text()), asdict(config)):
                    print(f"resumed with another setting: {change}", file=sys.stderr)
            write_json(record, {**asdict(config), "class_names": names})
        trainer.fit()


if __name__ == "__main__":
    main()

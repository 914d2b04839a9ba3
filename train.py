"""Train FlexVAR by teacher forcing or SAR: flags → config → build → fit."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from models.flexvar import FlexVAR
from models.hybrid import transformer_config
from models.vqvae import VQVAE
from pretrained.download import offer
from sar_trainer import SARTrainer
from student_forcing import STUDENT_FORCING
from trainer import Trainer
from utils.checkpoint import last_facts
from utils.code_cache import open_cache, read_manifest
from utils.config import TrainConfig
from utils.data import check_dataset, open_splits
from utils.distributed import Ranks
from utils.flags import parse
from utils.loop import start
from utils.optim import derive_seed
from utils.weights import find_weights, flexvar_config, load_strictly, load_tokenizer, read_state_dict

TRAINERS = {"teacher_forcing": Trainer, "csfl": SARTrainer, **STUDENT_FORCING}


def build_model(config: TrainConfig, vae: VQVAE, data_classes: int) -> FlexVAR:
    """The transformer, from --init_ckpt when there is one and the run has no checkpoint of its own yet."""
    wanted = config.model
    before = last_facts(config.run.directory)  # a run that goes on reads its own weights: see `Loop.resume`
    weights = read_state_dict(wanted.init_ckpt) if wanted.init_ckpt and not before else None
    saved_classes = flexvar_config(weights, wanted.init_ckpt).num_classes if weights else before.get("model_classes", 0)
    reset = wanted.reset_class_embedding and weights is not None
    classes = wanted.num_classes or (0 if reset else saved_classes) or data_classes
    if data_classes > classes:
        hint = ": --reset_class_embedding gives it new ones" if saved_classes == classes and weights else ""
        raise ValueError(f"the data has {data_classes} classes, the model only {classes}{hint}")
    if data_classes < classes:
        warnings.warn(f"the data's {data_classes} classes take the ids 0…{data_classes - 1} of {classes}", stacklevel=2)
    torch.manual_seed(derive_seed("init", config.run.seed))
    sizes = {
        "depth": wanted.depth,
        "width": wanted.width,
        "num_classes": classes,
        "codebook_size": vae.config.codebook_size,
        "codebook_dim": vae.config.codebook_dim,
        "aln": wanted.aln,
        "alng": wanted.alng,
    }
    if wanted.model == "hybrid":
        sizes |= {
            "first_side": wanted.first_side,
            "shared_positions": wanted.hybrid_shared_positions,
            "cross_scale": wanted.hybrid_cross_scale,
        }
    model = transformer_config(sizes).build()
    if reset:  # rows as they were drawn; the unconditional class, the last one, is known
        weights["class_emb.weight"] = torch.cat(
            [model.class_emb.weight[:-1], weights["class_emb.weight"][-1:]]
        ).detach()
    if weights:
        load_strictly(model, weights, wanted.init_ckpt)
    return model


def check(config: TrainConfig) -> None:
    """Whether the files that the flags name are there; released weights that are not can be fetched."""
    if config.speed.code_cache:
        read_manifest(Path(config.speed.code_cache))
    else:
        check_dataset(config.data)
    init = "" if last_facts(config.run.directory) else config.model.init_ckpt
    for path in filter(None, (config.model.vae_ckpt, init)):
        offer(path)
        find_weights(path)


def build(config: TrainConfig, me: Ranks) -> Trainer:
    """Tokenizer, data, model and trainer, at the run's newest checkpoint if it has one."""
    vae, wanted, encode = load_tokenizer(config.model.vae_ckpt), config.model, None
    size = wanted.scales.sides[-1] * vae.config.factor
    if config.speed.code_cache:
        train_set, val_set = open_cache(Path(config.speed.code_cache), vae, wanted.supervision, size)
        encode = train_set.code_batch
    else:
        train_set, val_set = open_splits(config.data, size, config.run.seed, config.run.directory)
    model = build_model(config, vae, len(train_set.classes))
    trainer = TRAINERS[config.sar.training_mode](config, model, vae, train_set, val_set, me, encode)
    trainer.resume()
    return trainer


def main() -> None:
    start(parse(TrainConfig, description=__doc__), build, check)


if __name__ == "__main__":
    main()

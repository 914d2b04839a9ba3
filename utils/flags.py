"""Frozen dataclasses ↔ command-line flags. An unknown flag, a wrong value or a contradiction is an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import simple_parsing

Config = TypeVar("Config")


def alias(default, *names: str):
    """A field that a released flag name sets, too."""
    return simple_parsing.field(default=default, alias=list(names))


def only_with(group: object, condition: bool, reason: str, names: Sequence[str]) -> None:
    """Fields that differ from their default although nothing would read them are a contradiction."""
    defaults = {f.name: f.default for f in fields(group)}
    changed = [name for name in names if getattr(group, name) != defaults[name]]
    if changed and not condition:
        raise ValueError(f"--{changed[0]} has no effect without {reason}")


def at_least(group: object, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(group, name) < bound:
            raise ValueError(f"--{name} must be at least {bound}, got {getattr(group, name)}")


# Released flags that mean nothing here, and what to use instead.
RETIRED = {
    "--tblr": "--lr is the peak learning rate as it stands: give --lr TBLR·BS/256 for the released scaling",
    "--tlr": "use --lr, the peak learning rate",
    "--sf_use_sampling": "use --rollout sample",
    "--sf_use_cfg": "use --rollout cfg",
    "--sf_cfg": "use --sf_cfg_scale",
    "--ac": "accumulation follows from --bs, --micro_batch and the number of ranks",
    "--lbs": "use --micro_batch",
    "--sche": "the learning rate follows --lr, --wp and --wpe; --wpe 1 is constant",
    "--vis_cosine_steps": "use --vis_every, a fixed number of steps",
    "--vis_top_k": "grids are drawn with top-k 900",
    "--vis_top_p": "grids are drawn with top-p 0.95",
    "--local_out_dir_path": "use --out_dir",
    "--hard_example_mining": "there is no counterpart",
    "--saln": "there is no counterpart: no released model shares adaLN",
    "--anorm": "there is no counterpart: queries and keys are always L2-normalised, as in released models",
}
FP16 = {"0": "fp32", "1": "fp16", "2": "bf16"}


def translate(argv: Sequence[str]) -> list[str]:
    """Released spellings → ours. A secret goes to the environment and is seen by nothing else."""
    words = []
    for word in argv:  # --flag=value → --flag value, for the flags that are handled here
        name, _, value = word.partition("=")
        words += [name, value] if "=" in word and name in ("--fp16", "--wandb_api_key") else [word]
    out, rest = [], iter(words)
    for word in rest:
        name = word.partition("=")[0]
        if name in RETIRED:
            raise ValueError(f"{name} is not a flag here: {RETIRED[name]}")
        if name == "--wandb_api_key":
            os.environ["WANDB_API_KEY"] = next(rest, "")
        elif name == "--fp16":
            value = next(rest, "")
            if value not in FP16:
                raise ValueError(f"--fp16 takes 0, 1 or 2, got {value!r}; or use --precision fp32|fp16|bf16")
            out += ["--precision", FP16[value]]
        else:
            out.append(word)
    return out


def parse(config_class: type[Config], argv: Sequence[str] | None = None, description: str = "") -> Config:
    """Flags → config. Exits with status 2 and names the flag when something is wrong."""
    parser = simple_parsing.ArgumentParser(description=description, allow_abbrev=False, add_config_path_arg=False)
    parser.add_arguments(config_class, dest="config")
    try:
        words = translate(sys.argv[1:] if argv is None else argv)
        if argv is None:
            sys.argv[1:] = words  # loggers store it: it must not hold a secret
        return parser.parse_args(words).config
    except ValueError as error:
        parser.error(str(error))

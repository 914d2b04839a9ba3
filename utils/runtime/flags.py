"""Frozen dataclasses ↔ command-line flags. An unknown flag, a wrong value or a contradiction is an error."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn, TypeVar

import simple_parsing

Config = TypeVar("Config")
LARGEST = 2**63 - 1  # of whole numbers: seeds and counts must fit 64 bits wherever they go


def alias(default, *names: str):
    """A field that a released flag name sets, too."""
    return simple_parsing.field(default=default, alias=list(names))


@dataclass(frozen=True)
class Flags:
    """A group of flags: its numbers are numbers. Subclasses that check more call `super().__post_init__()` first."""

    def __post_init__(self):
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple | list) else [value]:
                check_number(name, number)


def check_number(name: str, value: object) -> None:
    """Raises ValueError for nan, infinities, and whole numbers that need more than 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name} must be a finite number, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"--{name} must fit 64 bits, got {value}")


def default_of(f: Field) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def changed(group: Any, names: Sequence[str] | None = None) -> list[str]:
    """Names of the fields (of these, or all) that differ from their default."""
    defaults = {f.name: default_of(f) for f in fields(group)}
    return [name for name in (defaults if names is None else names) if getattr(group, name) != defaults[name]]


def only_with(group: object, condition: bool, reason: str, names: Sequence[str]) -> None:
    """Fields that differ from their default although nothing would read them are a contradiction."""
    given = [] if condition else changed(group, names)
    if given:
        raise ValueError(f"--{given[0]} has no effect without {reason}")


def without(group: object, condition: bool, reason: str, names: Sequence[str]) -> None:
    """Raises ValueError for fields that differ from their default, beside what makes them useless."""
    given = changed(group, names) if condition else []
    if given:
        raise ValueError(f"--{given[0]} has no effect with {reason}: leave one of them out")


def at_least(group: object, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(group, name) < bound:
            raise ValueError(f"--{name} must be at least {bound}, got {getattr(group, name)}")


def at_most(group: object, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(group, name) > bound:
            raise ValueError(f"--{name} must be at most {bound}, got {getattr(group, name)}")


# Released flags that are none here, and what to use instead.
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
# What others call our flags, released code among them: the first of ours that an entry has is suggested.
SYNONYMS = {
    "--var_ckpt": ("--ckpt", "--init_ckpt"),
    "--vqvae_ckpt": ("--vae_ckpt",),
    "--checkpoint": ("--ckpt", "--init_ckpt"),
    "--model_path": ("--ckpt", "--init_ckpt"),
    "--resume": ("--out_dir",),
    "--pretrained": ("--init_ckpt", "--ckpt"),
    "--batch_size": ("--bs", "--batch"),
    "--output_path": ("--out_dir", "--out"),
    "--output_dir": ("--out_dir", "--out"),
    "--output": ("--out_dir", "--out"),
    "--infer_patch_nums": ("--pn",),
    "--patch_nums": ("--pn",),
    "--scales": ("--pn",),
    "--learning_rate": ("--lr",),
    "--weight_decay": ("--twd",),
    "--grad_clip": ("--tclip",),
    "--clip_grad": ("--tclip",),
    "--warmup": ("--wp",),
    "--warmup_epochs": ("--wp",),
    "--epochs": ("--ep",),
    "--num_epochs": ("--ep",),
    "--num_workers": ("--workers",),
    "--data": ("--data_path",),
    "--data_dir": ("--data_path",),
    "--gamma": ("--csf_weight",),
    "--guidance_scale": ("--cfg",),
    "--cfg_scale": ("--cfg",),
    "--num_images": ("--num_samples", "--n"),
    "--resolution": ("--image_size", "--pn"),
    "--mixed_precision": ("--precision",),
}


def instead_of(flag: str, known: Sequence[str]) -> str:
    """Hint for an unknown flag: what to use, or the nearest of the known ones."""
    if flag in RETIRED:
        return f": {RETIRED[flag]}"
    ours = [name for name in SYNONYMS.get(flag, ()) if name in known][:1]
    words = [name for name in known if name.startswith("--")]
    near = ours or difflib.get_close_matches(flag, words, n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


FP16 = {"0": "fp32", "1": "fp16", "2": "bf16"}


def translate(argv: Sequence[str]) -> list[str]:
    """Released spellings → ours. A secret goes to the environment and is seen by nothing else."""
    words = []
    for word in argv:  # --flag=value → --flag value, for the flags that are handled here
        name, _, value = word.partition("=")
        words += [name, value] if "=" in word and name in ("--fp16", "--wandb_api_key") else [word]
    out, rest = [], iter(words)
    for word in rest:
        if word == "--wandb_api_key":
            os.environ["WANDB_API_KEY"] = next(rest, "")
        elif word == "--fp16":
            value = next(rest, "")
            if value not in FP16:
                raise ValueError(f"--fp16 takes 0, 1 or 2, got {value!r}; or use --precision fp32|fp16|bf16")
            out += ["--precision", FP16[value]]
        else:
            out.append(word)
    return out


def number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """The `type` of a number of at least so much, where a parser's flags are no dataclass."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            check_number("it", value)
        except ValueError:
            value = None
        if value is None or value < least:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} of at least {least} (of 64 bits)")
        return value

    return convert


def whole(least: int = 0) -> Callable[[str], float]:
    """See `number`."""
    return number(int, least)


class Help(simple_parsing.SimpleHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help texts as they stand: argparse would read a % in them as a placeholder."""

    def _get_help_string(self, action: argparse.Action) -> str:
        action = copy(action)
        action.help = (action.help or "").replace("%", "%%")
        return super()._get_help_string(action)


class Parser(simple_parsing.ArgumentParser):
    """The parser of every entry: no abbreviations, and an error is one line that names the flag, with status 2."""

    words: Sequence[str] = ()  # that are being parsed

    def __init__(self, description: str | None = None, prog: str | None = None):
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, add_config_path_arg=False, formatter_class=Help
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None, **options):
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace, **options)

    def error(self, message: str) -> NoReturn:
        flags = [word.partition("=")[0] for word in self.words if word.startswith("--") and word != "--"]
        unknown = [flag for flag in dict.fromkeys(flags) if flag not in self._option_string_actions]
        if unknown:  # before anything that may follow from it
            hints = [f"{flag} is no flag here{instead_of(flag, list(self._option_string_actions))}" for flag in unknown]
            message = "; ".join(hints)
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse(
    config_class: type[Config], argv: Sequence[str] | None = None, description: str = "", prog: str | None = None
) -> Config:
    """Flags → config. Exits with status 2 and names the flag when something is wrong."""
    parser = Parser(description, prog)
    parser.add_arguments(config_class, dest="config")  # type: ignore[type-var]
    try:
        words = translate(sys.argv[1:] if argv is None else argv)
        if argv is None:
            sys.argv[1:] = words  # loggers store it: it must not hold a secret
        return parser.parse_args(words).config
    except ValueError as error:
        parser.error(str(error))

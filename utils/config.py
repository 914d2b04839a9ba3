"""Frozen dataclasses ↔ command-line flags. An unknown flag, a wrong value or a contradiction is an error."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

import simple_parsing

from models.scales import ScaleSchedule

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


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    dataset: Literal["folder", "digits", "cifar10"] = "folder"
    """folder: images in DATA_PATH/train/<class>/*, and val/ beside it; digits: scikit-learn's handwritten digits;
    cifar10: torchvision's, in DATA_PATH."""
    data_path: str = ""  # where the data set lies
    workers: int = 8  # loader processes a rank

    def __post_init__(self):
        at_least(self, workers=0)
        only_with(self, self.dataset != "digits", "a data set on disk", ["data_path"])


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    vae_ckpt: str = "pretrained/FlexVAE.pth"  # tokenizer weights: a file, or a tokenizer run's directory
    init_ckpt: str = alias("", "--continue_training_ckpt")
    """transformer weights to start from (a file or a run's directory); empty: from scratch"""
    depth: int = 16  # transformer blocks
    width: int = 0  # transformer width; 0: 64·depth
    num_classes: int = 0  # classes of the model; 0: as many as --init_ckpt or else the data has
    aln: float = 0.5  # initial scale of the adaLN weights
    alng: float = 1e-3  # initial scale of the adaLN weights of the gates
    label_drop: float = 0.1  # probability of training on the unconditional class
    pn: str = "1_2_3_4_5_6_8_10_13_16"  # sides of the scales; the last one times the tokenizer's factor is the image
    supervision: Literal["latent", "image"] = "latent"
    """codes of a scale: from the latent resized to it, or from the image resized and encoded at it (Table 1)"""
    schedule: Literal["flexvar", "fixed"] = "flexvar"  # flexvar: draw the sides anew each step; fixed: --pn

    def __post_init__(self):
        at_least(self, depth=1, width=0, num_classes=0, label_drop=0)
        sides = self.scales.sides
        if self.schedule == "flexvar" and sides[-1] != 16:
            raise ValueError(f"--schedule flexvar draws sides up to 16, --pn ends at {sides[-1]}: use --schedule fixed")
        if self.label_drop >= 1:
            raise ValueError(f"--label_drop must be below 1, got {self.label_drop}")

    @property
    def scales(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.pn)


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation"""

    bs: int = 768  # images a step, over all ranks
    micro_batch: int = 0  # images of one rank at a time; 0: bs / ranks. Gradients accumulate up to bs
    ep: float = 10.0  # epochs
    max_steps: int = 0  # stop after this many steps; 0: run all epochs
    lr: float = 1e-4  # peak learning rate, as it stands: not scaled by the batch
    wp: float = 0.0  # warm-up, as a fraction of the run
    wpe: float = 1.0  # final learning rate as a fraction of --lr: flat for 5 % of the run, then linear. 1: constant
    twd: float = 0.05  # weight decay of matrices
    tclip: float = 2.0  # largest gradient norm; 0: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    ema: float = 0.0  # decay of the moving average of the weights; 0: none

    def __post_init__(self):
        at_least(self, bs=1, micro_batch=0, max_steps=0, lr=0, wp=0, wpe=0, twd=0, tclip=0, ema=0)
        if self.ep <= 0:
            raise ValueError(f"--ep must be positive, got {self.ep}")
        if self.ema >= 1 or self.wp >= 1:
            raise ValueError(f"--ema and --wp must be below 1, got {self.ema} and {self.wp}")


@dataclass(frozen=True)
class SARConfig:
    """Self-autoregressive refinement"""

    training_mode: Literal["teacher_forcing", "csfl", "sf_full", "sf_alternate", "sf_interleave", "sf_hybrid"] = "csfl"
    """csfl: the SAR objective, L_TF + γ·L_CSF; sf_…: naive student forcing (Table 3), all inputs self-generated, every
    other step's, every other scale's, or those of sides above SF_HYBRID_FROM"""
    sf_hybrid_from: int = 8  # sf_hybrid: teacher forcing up to this side
    csf_weight: float = alias(0.01, "--sigma")  # γ, the weight of the contrastive student-forcing loss
    csf_ramp: float = 0.0  # γ grows from 0 over this fraction of the run
    ssr: Literal["all", "last", "random"] = "all"
    """stagger-scale rollout: second pass over all scales (paper), the last transition (released), or a random one"""
    ssr_steps: int = 1  # with --ssr all: passes on rollouts of rollouts
    rollout: Literal["argmax", "sample", "cfg"] = "cfg"  # how tokens are drawn from the teacher's logits
    csf_target: Literal["teacher", "ground_truth", "teacher_soft"] = "teacher"
    """teacher: the tokens it drew (Eq. 10); ground_truth: the ablation; teacher_soft: KL to its distribution (ours)"""
    sf_top_k: int = 900  # rollout: top-k; 0: off
    sf_top_p: float = 0.95  # rollout: top-p; 0: off
    sf_cfg_scale: float = 2.5  # rollout: scale of the half-ramp guidance

    def __post_init__(self):
        at_least(self, csf_weight=0, csf_ramp=0, ssr_steps=1, sf_top_k=0, sf_top_p=0, sf_cfg_scale=0, sf_hybrid_from=1)
        if self.sf_top_p > 1 or self.csf_ramp > 1:
            raise ValueError(f"--sf_top_p and --csf_ramp are at most 1, got {self.sf_top_p} and {self.csf_ramp}")
        mode = self.training_mode
        rollout = ["rollout", "sf_top_k", "sf_top_p", "sf_cfg_scale"]
        only_with(
            self, mode == "csfl", "--training_mode csfl", ["csf_weight", "csf_ramp", "ssr", "ssr_steps", "csf_target"]
        )
        only_with(self, mode != "teacher_forcing", "--training_mode csfl or sf_…", rollout)
        only_with(self, mode == "sf_hybrid", "--training_mode sf_hybrid", ["sf_hybrid_from"])
        only_with(self, self.rollout != "argmax", "--rollout sample or cfg", ["sf_top_k", "sf_top_p"])
        only_with(self, self.rollout == "cfg", "--rollout cfg", ["sf_cfg_scale"])
        only_with(self, self.ssr == "all", "--ssr all", ["ssr_steps"])


@dataclass(frozen=True)
class LogConfig:
    """Logging"""

    logger_type: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # beside metrics.jsonl, always written
    wandb_project: str = "sar"  # W&B: project
    wandb_entity: str = ""  # W&B: user or team
    wandb_run_name: str = ""  # W&B: name of the run; empty: --exp_name
    wandb_tags: str = ""  # W&B: tags, comma-separated
    wandb_notes: str = ""  # W&B: notes
    log_every: int = 20  # steps between log lines

    def __post_init__(self):
        at_least(self, log_every=1)
        wandb = [f.name for f in fields(self) if f.name.startswith("wandb_")]
        only_with(self, self.logger_type == "wandb", "--logger_type wandb", wandb)


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    exp_name: str = "SAR"  # name of the run
    out_dir: str = ""  # everything the run writes; empty: out/EXP_NAME
    seed: int = 0  # seed of everything random
    save_every_steps: int = 0  # steps between checkpoints; 0: at the end of each epoch. The last step always saves
    keep: int = 2  # newest checkpoints that stay
    check: bool = False  # check the flags and the files they name, then stop

    def __post_init__(self):
        at_least(self, seed=0, save_every_steps=0, keep=1)

    @property
    def directory(self) -> Path:
        return Path(self.out_dir or f"out/{self.exp_name}")


@dataclass(frozen=True)
class WatchConfig:
    """Watching the run"""

    vis_every: int = 0  # steps between sample grids of fixed seeds; 0: only at the end
    vis_num_samples: int = 16  # images in a grid; 0: no grids
    vis_cfg_scale: float = 2.5  # ramp guidance of the grids
    vis_ema: bool = False  # draw the grids with the moving average
    eval_every: int = 0  # steps between held-out losses, when there is a val/; 0: only at the end
    eval_images: int = 1000  # held-out images; 0: no held-out loss

    def __post_init__(self):
        at_least(self, vis_every=0, vis_num_samples=0, vis_cfg_scale=0, eval_every=0, eval_images=0)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `train.py` takes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sar: SARConfig = field(default_factory=SARConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        only_with(self.watch, self.optim.ema > 0, "--ema", ["vis_ema"])


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer"""

    image_size: int = 256  # side of the training images
    base_width: int = 128  # width of the finest level
    width_mult: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # width of each level; every level but one halves the resolution
    res_blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 256  # channels between the convolutions and the quantiser
    codebook_size: int = 8912  # codebook rows
    codebook_dim: int = 32  # codebook width
    pn: str = "1_2_3_4_5_6_8_10_13_16"  # sides that are quantised and decoded
    sides_per_step: int = 2  # random sides trained in a step, beside the finest
    commitment: float = 0.25  # weight of the commitment loss

    def __post_init__(self):
        at_least(
            self,
            image_size=1,
            base_width=32,
            res_blocks=1,
            codebook_size=2,
            codebook_dim=1,
            sides_per_step=0,
            commitment=0,
        )

    @property
    def scales(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.pn)


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Everything `train_tokenizer.py` takes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class SampleConfig:
    """Everything `sample.py` takes."""

    ckpt: str = "pretrained/SARd16-epo179.pth"
    """transformer: a weight file, a run's directory, a pipeline's directory, or a Hub repository"""
    vae_ckpt: str = ""  # tokenizer; empty: the one that CKPT brings along, or pretrained/FlexVAE.pth
    use_ema: bool = False  # a run's moving average instead of its weights
    classes: str = "207"  # class names or ids, comma-separated: "golden retriever,88"
    n: int = 4  # images of each class
    seed: int = 0  # image i is drawn from SEED + i
    cfg: float = 2.5  # guidance scale
    guidance: Literal["ramp", "constant", "none"] = "ramp"  # how guidance grows over the scales
    top_k: int = 900  # top-k; 0: off, 1: greedy
    top_p: float = 0.95  # top-p; 0: off
    pn: str = ""  # scales, like 1_2_3_4; empty: those that CKPT brings along, or the default ten
    batch: int = 16  # images at a time; the images do not depend on it
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    out: str = "samples.png"  # the grid of all images
    captions: bool = True  # class names under the images of the grid
    files: str = ""  # directory for single files, too
    steps: str = ""  # the coarse-to-fine steps, too: a .gif, or a strip in a .png
    image: str = ""  # a picture to edit
    mask: str = ""  # what to repaint of IMAGE: white in this picture of its size
    outpaint: float = 0.0  # shrink IMAGE to this share of the side and paint around it

    def __post_init__(self):
        at_least(self, n=1, seed=0, cfg=0, top_k=0, top_p=0, batch=1)
        if self.image and bool(self.mask) == bool(self.outpaint):
            raise ValueError("--image needs either --mask or --outpaint")
        only_with(self, bool(self.image), "--image", ["mask", "outpaint"])
        only_with(self, not self.image, "sampling from scratch: leave --image out", ["steps"])
        if self.steps and not self.steps.lower().endswith((".gif", ".png")):
            raise ValueError(f"--steps must end in .gif or .png, got {self.steps!r}")


@dataclass(frozen=True)
class EvalConfig:
    """Everything `evaluate.py` takes."""

    ckpt: str = "pretrained/SARd16-epo179.pth"
    """transformer: a weight file, a run's directory, a pipeline's directory, or a Hub repository"""
    vae_ckpt: str = ""  # tokenizer; empty: the one that CKPT brings along, or pretrained/FlexVAE.pth
    use_ema: bool = False  # a run's moving average instead of its weights
    num_samples: int = 50  # images of each class
    num_classes_eval: int = 0  # only the first so many classes; 0: all
    cfg: float = 2.2  # guidance scale
    guidance: Literal["ramp", "constant", "none"] = "ramp"  # how guidance grows over the scales
    top_k: int = 900  # top-k; 0: off, 1: greedy
    top_p: float = 0.95  # top-p; 0: off
    pn: str = ""  # scales; empty: those that CKPT brings along, or the default ten
    eval_scale: int = 0  # decode at this side instead of the finest, against real images at that resolution
    seed: int = 0  # of the class order and of every image
    batch: int = 0  # images at a time; 0: 64 on a GPU, 8 on a CPU. Part of what makes images repeatable to the bit
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of sampling: bf16 on a GPU that has it, else fp32
    sweep_cfg: str = ""  # guidance scales to go through, comma-separated
    sweep_top_k: str = ""  # top-k to go through
    sweep_top_p: str = ""  # top-p to go through
    samples: str = ""  # judge these instead of sampling: an npz with arr_0, or a folder of images
    expect: int = 0  # refuse SAMPLES that hold fewer images than this
    reconstruct: str = ""  # judge the tokenizer's reconstructions of this folder or npz: rFID, PSNR, SSIM
    reference: str = ""
    """real images: an npz (arr_0, mu, sigma, mu_s, sigma_s), one that --make_reference wrote, or a folder; empty:
    pretrained/VIRTUAL_imagenet256_labeled.npz for --features inception, fetched when missing; none for others"""
    reference_sha256: str = ""  # refuse a REFERENCE file with another digest
    image_size: int = 0  # centre-crop the images of folders to this side; 0: as they are
    make_reference: str = ""  # write the statistics of SAMPLES to this npz, and stop
    features: Literal["inception", "efficientnet_lite0"] = "inception"  # only Inception's distance is an FID
    inception_weights: str = ""  # weights-inception-2015-12-05-6726825d.pth; empty: fetched
    split_size: int = 5000  # samples of one split of the Inception Score
    pr_fp16: bool = False  # precision and recall from fp16 distances, as the original evaluator computes them
    save_npz: bool = False  # the samples as an npz for the guided-diffusion evaluator
    save_png: bool = False  # the samples as PNG files
    out_dir: str = "out/eval"  # reports, features, samples; a killed evaluation goes on from here

    def __post_init__(self):
        at_least(self, num_samples=1, num_classes_eval=0, cfg=0, top_k=0, top_p=0, eval_scale=0, seed=0, batch=0)
        at_least(self, expect=0, image_size=0, split_size=1)
        modes = [name for name in ("samples", "reconstruct") if getattr(self, name)]
        if len(modes) > 1:
            raise ValueError("--samples and --reconstruct exclude each other")
        only_with(self, bool(self.samples), "--samples", ["expect", "make_reference"])
        only_with(self, self.features == "inception", "--features inception", ["inception_weights"])
        sampling = ["num_samples", "num_classes_eval", "cfg", "top_k", "top_p", "use_ema", "sweep_cfg"]
        sampling += ["sweep_top_k", "sweep_top_p", "eval_scale", "save_npz", "save_png"]
        only_with(self, not modes, f"sampling: leave --{modes[0] if modes else 'samples'} out", sampling)

    def settings(self) -> list[tuple[float, int, float]]:
        """(cfg, top_k, top_p) of every point of the sweep, or the one setting."""

        def several(text: str, kind: type, one: float) -> list:
            try:
                return [kind(value) for value in text.split(",")] if text else [one]
            except ValueError:
                raise ValueError(f"a sweep is written like 1.5,2.0,2.5, got {text!r}") from None

        lists = several(self.sweep_cfg, float, self.cfg), several(self.sweep_top_k, int, self.top_k)
        return list(itertools.product(*lists, several(self.sweep_top_p, float, self.top_p)))


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
        if argv is None:  # what sys.argv holds, loggers store: it must not hold a secret
            argv = sys.argv[1:] = translate(sys.argv[1:])
        return parser.parse_args(translate(argv)).config
    except ValueError as error:
        parser.error(str(error))


__all__ = [
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SARConfig",
    "SampleConfig",
    "TokenizerConfig",
    "TokenizerTrainConfig",
    "TrainConfig",
    "WatchConfig",
    "parse",
    "translate",
]

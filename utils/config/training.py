"""Every flag of the trainers, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import simple_parsing

from models.generators import GENERATORS
from models.sampling import TOP_K, TOP_P
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from utils.runtime.flags import Flags, alias, at_least, at_most, only_with


@dataclass(frozen=True)
class DataConfig(Flags):
    """Data"""

    dataset: Literal["folder", "digits", "cifar10", "hub", "imagenet_tar"] = "folder"
    """folder: images in DATA_PATH/train/<class>/*, and val/ beside it; digits: scikit-learn's handwritten digits;
    cifar10: torchvision's, in DATA_PATH; hub: a data set of the Hugging Face Hub, DATA_PATH its name or a directory
    that save_to_disk wrote; imagenet_tar: ImageNet's tar files as they are downloaded, in DATA_PATH"""
    data_path: str = ""  # where the data set lies
    image_column: str = ""  # dataset hub: column of the images; empty: the one that holds images
    label_column: str = ""  # dataset hub: column of the classes; empty: the one of class labels; none: all are of one
    augment: Literal["crop", "flip", "var", "flowar"] = "crop"
    """how a folder's training images vary: ADM's random crop and a flip; a flip alone (for small images, which the crop
    would enlarge); VAR's: a random crop of the image resized to 9/8 of the side, without a flip; FlowAR's: such a crop,
    resized bilinearly, with a flip"""
    workers: int = -1  # loader processes a rank; -1: a core each that the node's ranks leave, up to 8
    on_bad_image: Literal["stop", "skip"] = "stop"
    """a file that is no usable image: stop and name it, or take the next good one and list it in a file"""
    bad_image_limit: float = 0.001  # on_bad_image skip: stop when more than this share of the images is bad

    def __post_init__(self):
        super().__post_init__()
        at_least(self, workers=-1, bad_image_limit=0)
        varied = self.dataset in ("folder", "hub", "imagenet_tar")
        only_with(self, varied, "--dataset folder, hub or imagenet_tar", ["on_bad_image", "augment"])
        only_with(self, self.dataset == "hub", "--dataset hub", ["image_column", "label_column"])
        only_with(self, self.on_bad_image == "skip", "--on_bad_image skip", ["bad_image_limit"])
        only_with(self, self.dataset != "digits", "a data set on disk", ["data_path"])
        at_most(self, bad_image_limit=1)


# What a code cache replaces.
DATA_OF_IMAGES = [
    *("dataset", "data_path", "image_column", "label_column", "augment", "on_bad_image", "bad_image_limit"),
]


OF_GENERATORS = {name: [f.name for c in g.flags for f in fields(c)] for name, g in GENERATORS.items()}  # their flags


@dataclass(frozen=True)
class ModelConfig(*(c for g in GENERATORS.values() for c in g.flags), Flags):  # type: ignore[misc]
    """Model"""

    vae_ckpt: str = "pretrained/FlexVAE.pth"  # tokenizer weights: a file, or a tokenizer run's directory
    init_ckpt: str = alias("", "--continue_training_ckpt")
    """transformer weights to start from (a file or a run's directory); empty: from scratch"""
    model: str = simple_parsing.choice(*GENERATORS, default="flexvar")  # the generator: one of models/generators.py
    reset_class_embedding: bool = False  # take INIT_CKPT for other classes: all but their embeddings, drawn anew
    depth: int = 16  # transformer blocks
    width: int = 0  # transformer width; 0: 64·depth
    num_classes: int = 0  # classes of the model; 0: as many as --init_ckpt or else the data has
    aln: float = 0.5  # initial scale of the adaLN weights
    alng: float = 1e-3  # initial scale of the adaLN weights of the gates
    label_drop: float = 0.1  # probability of training on the unconditional class
    pn: str = ""
    """sides of the scales, like 1_2_3_4; the last one times the tokenizer's factor is the image. Empty: those that the
    tokenizer's run was trained at, or 1_2_3_4_5_6_8_10_13_16"""
    supervision: Literal["latent", "image", "image_pixels"] = "latent"
    """codes of a scale: from the latent resized to it, or from the image resized and encoded at it (Table 1);
    image_pixels (FlowAR): the next scale is fed through pixels, too"""
    schedule: Literal["flexvar", "fixed"] = "flexvar"  # flexvar: draw the sides anew each step; fixed: --pn

    def __post_init__(self):
        super().__post_init__()
        at_least(self, depth=1, width=0, num_classes=0, label_drop=0)
        only_with(self, bool(self.init_ckpt), "--init_ckpt", ["reset_class_embedding"])
        for name, flags in OF_GENERATORS.items():
            only_with(self, self.model == name, f"--model {name}", flags)
        check_generator(self.model, self)
        sides = self.scales.sides
        if self.schedule == "flexvar" and sides[-1] != 16:
            raise ValueError(f"--schedule flexvar draws sides up to 16, --pn ends at {sides[-1]}: use --schedule fixed")
        if self.label_drop >= 1:
            raise ValueError(f"--label_drop must be below 1, got {self.label_drop}")
        at_least(self, aln=0, alng=0)

    @property
    def scales(self) -> ScaleSchedule:
        schedule = ScaleSchedule.parse(self.pn) if self.pn else DEFAULT_SCHEDULE
        return GENERATORS[self.model].scales(self, schedule)


def check_generator(name: str, group: Flags) -> None:
    """Raises ValueError for a flag of a group whose value the generator does not go with."""
    for flag, values in GENERATORS[name].goes_with.items():
        if getattr(group, flag, values[0]) not in values:
            raise ValueError(f"--model {name} goes with --{flag} {' or '.join(map(str, values))} only")


@dataclass(frozen=True)
class OptimConfig(Flags):
    """Optimisation"""

    bs: int = 768  # images a step, over all ranks
    micro_batch: int = 0  # images of one rank at a time; 0: bs / ranks. Gradients accumulate up to bs
    ep: float = 10.0  # epochs
    steps: int = 0  # length of the run in steps, in place of --ep
    max_steps: int = 0  # stop after this many steps, wherever the learning rate is then; 0: run to the end
    lr: float = 1e-4  # peak learning rate, as it stands: not scaled by the batch
    wp: float = 0.0  # warm-up, as a fraction of the run
    wpe: float = 1.0  # final learning rate as a fraction of --lr: flat for 5 % of the run, then linear. 1: constant
    lr_decay: Literal["linear", "cosine"] = "linear"  # after the warm-up: flat for 5 % and linear, or a cosine at once
    twd: float = 0.05  # weight decay of matrices
    twde: float = -1.0  # weight decay at the end of the run, which it moves to along a cosine; -1: as --twd
    tclip: float = 2.0  # largest gradient norm; 0: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    ema: tuple[float, ...] = ()  # decay of the moving average of the weights, or several decays; none: no average

    def __post_init__(self):
        super().__post_init__()
        at_least(self, bs=1, micro_batch=0, steps=0, max_steps=0, lr=0, wp=0, wpe=0, twd=0, tclip=0)
        if self.steps and self.ep != type(self).ep:
            raise ValueError(
                f"--steps {self.steps} and --ep {self.ep:g} are two lengths of one run: give --steps 0 to count in "
                f"epochs, or --ep {type(self).ep:g}, the default, to count in steps"
            )
        if self.twde < 0 and self.twde != -1:
            raise ValueError(f"--twde must be at least 0, or -1 for --twd's, got {self.twde}")
        if self.ep <= 0:
            raise ValueError(f"--ep must be positive, got {self.ep}")
        at_most(self, ep=1e6, steps=1e12, max_steps=1e12)
        object.__setattr__(self, "ema", tuple(decay for decay in self.ema if decay != 0))  # 0 is none, too
        if self.wp >= 1:
            raise ValueError(f"--wp must be below 1, got {self.wp}")
        if not all(0 < decay < 1 for decay in self.ema) or len(set(self.ema)) < len(self.ema):
            raise ValueError(f"--ema must be below 1, each decay once, got {' '.join(map(str, self.ema))}")


Mode = Literal[
    "teacher_forcing", "csfl", "sf_full", "sf_alternate", "sf_interleave", "sf_hybrid", "noisy", "cca"
]  # fmt: skip
FEEDING = ("ground_truth", "velocity")  # values of --csf_target for which samples only feed the second pass
NAIVE = ("sf_full", "sf_alternate", "sf_interleave", "sf_hybrid")  # training modes of naive student forcing


@dataclass(frozen=True)
class SARConfig(Flags):
    """Self-autoregressive refinement"""

    training_mode: Mode = "csfl"
    """csfl: the SAR objective, L_TF + γ·L_CSF; sf_…: naive student forcing (Table 3), all inputs self-generated, every
    other step's, every other scale's, or those of the sides from SF_HYBRID_FROM on; rivals: noisy, inputs of which a
    share is replaced; cca, condition-contrastive alignment against a frozen INIT_CKPT"""
    sf_hybrid_from: int = 8  # sf_hybrid: the first side whose input is self-generated (k of Table 3's hybrid@k)
    csf_weight: float = alias(0.01, "--sigma")  # γ, the weight of the contrastive student-forcing loss
    ssr: Literal["all", "last"] = "all"
    """stagger-scale rollout: second pass over all scales (paper), or the last transition (released)"""
    ssr_steps: int = 1  # with --ssr all: passes on rollouts of rollouts
    rollout: Literal["argmax", "sample", "cfg"] = "cfg"  # how tokens are drawn from the teacher's logits
    csf_target: Literal["teacher", "ground_truth", "teacher_soft", "requantised", "velocity"] = "teacher"
    """teacher: the tokens it drew (Eq. 10); ground_truth: the ablation; teacher_soft: KL to its distribution (ours);
    velocity (ours, flowar): its velocities, by L2; requantised (ours, var): the code that brings the second pass's
    canvas to where the teacher's draw would have led"""
    rollout_canvas: Literal["accumulated", "one_step"] = "accumulated"
    """second pass of var: the sum of the rollout's residuals, or the true ones but for the rollout's last"""
    sf_top_k: int = TOP_K  # rollout: top-k; 0: off
    sf_top_p: float = TOP_P  # rollout: top-p; 0: off
    sf_cfg_scale: float = 2.5  # rollout: scale of the guidance
    rollout_steps: int = 25  # flowar: steps of Euler's method in a rollout; with --rollout argmax it is one
    ssr_share: float = 1.0  # share of the second pass's inputs that are the rollout's; the others are true
    noise: Literal["uniform", "neighbour"] = "uniform"  # noisy: replaced by any code, or by one of the nearest
    noise_neighbours: int = 16  # noise neighbour: how many are near
    noise_per: Literal["scale", "image"] = "scale"
    """noisy: the share that is replaced is drawn for each scale from four levels up to NOISE_MAX (Infinity), or for
    each image from 0 to a bound that falls from NOISE_MAX to 0 over the first 75 % of the run (reAR)"""
    noise_max: float = 0.3  # noisy: largest share that is replaced
    cca_beta: float = 0.02  # cca: β, the weight of a log-likelihood's gain
    cca_lambda: float = 50.0  # cca: λ, the weight of other images' classes; 0 is teacher forcing

    def __post_init__(self):
        super().__post_init__()
        at_least(
            self, csf_weight=0, ssr_steps=1, sf_top_k=0, sf_top_p=0, sf_cfg_scale=0, sf_hybrid_from=1, rollout_steps=2
        )
        at_least(self, ssr_share=0, noise_max=0, noise_neighbours=1, cca_beta=0, cca_lambda=0)
        at_most(self, sf_top_p=1, ssr_share=1, noise_max=1)
        mode = self.training_mode
        rollout = ["rollout", "sf_top_k", "sf_top_p", "sf_cfg_scale", "rollout_steps"]
        second_pass = ["ssr", "ssr_steps", "ssr_share", "csf_target", "rollout_canvas"]
        only_with(
            self, mode == "noisy", "--training_mode noisy", ["noise", "noise_neighbours", "noise_per", "noise_max"]
        )
        only_with(self, mode == "cca", "--training_mode cca", ["cca_beta", "cca_lambda"])
        only_with(self, self.cca_lambda > 0, "--cca_lambda above 0", ["cca_beta"])
        only_with(self, self.noise == "neighbour", "--noise neighbour", ["noise_neighbours"])
        only_with(self, self.noise_max > 0, "--noise_max above 0", ["noise", "noise_per"])
        only_with(
            self,
            mode == "csfl",
            "--training_mode csfl",
            ["csf_weight", *second_pass],
        )
        only_with(self, mode == "csfl" or mode in NAIVE, "--training_mode csfl or sf_…", rollout)
        only_with(self, mode == "sf_hybrid", "--training_mode sf_hybrid", ["sf_hybrid_from"])
        weighted = mode != "csfl" or self.csf_weight > 0
        only_with(self, weighted, "--csf_weight above 0", [*rollout, *second_pass])
        only_with(self, self.rollout != "argmax", "--rollout sample or cfg", ["sf_top_k", "sf_top_p", "rollout_steps"])
        only_with(self, self.sf_top_k != 1, "another --sf_top_k than 1, the greedy one", ["sf_top_p"])
        only_with(self, self.rollout == "cfg", "--rollout cfg", ["sf_cfg_scale"])
        only_with(self, self.ssr == "all", "--ssr all", ["ssr_steps"])
        # Requantised targets are of the canvas of one rollout, which deeper ones are not fed with.
        only_with(self, self.csf_target != "requantised", "another --csf_target than requantised", ["ssr_steps"])


@dataclass(frozen=True)
class SpeedConfig(Flags):
    """Speed and memory"""

    code_cache: str = ""  # train from codes that scripts/cache_codes.sh wrote there: no image is read or encoded
    encode_tf32: bool = False  # encode images in TF32: faster on GPUs from Ampere on, and a few codes are others
    compile: bool = False  # torch.compile the blocks, all but their attention
    checkpoint_activations: bool = False  # keep only the blocks' inputs and compute the rest again in backward
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """several ranks: ddp keeps the whole model on each; fsdp shares out parameters, gradients and optimiser state"""


@dataclass(frozen=True)
class LogConfig(Flags):
    """Logging"""

    logger_type: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # beside metrics.jsonl, always written
    wandb_project: str = "sar"  # W&B: project
    wandb_entity: str = ""  # W&B: user or team
    wandb_run_name: str = ""  # W&B: name of the run; empty: as --exp_name
    wandb_tags: str = ""  # W&B: tags, comma-separated
    wandb_notes: str = ""  # W&B: notes
    log_every: int = 20  # steps between log lines

    def __post_init__(self):
        super().__post_init__()
        at_least(self, log_every=1)
        wandb = [f.name for f in fields(self) if f.name.startswith("wandb_")]
        only_with(self, self.logger_type == "wandb", "--logger_type wandb", wandb)


YEAR = 366 * 24 * 60  # minutes


def check_timeout(group: Any) -> None:
    """Raises ValueError unless --timeout_minutes is positive and at most a year."""
    if group.timeout_minutes <= 0:
        raise ValueError(f"--timeout_minutes must be positive, got {group.timeout_minutes}")
    at_most(group, timeout_minutes=YEAR)


@dataclass(frozen=True)
class RunConfig(Flags):
    """Run"""

    exp_name: str = ""  # name of the run; empty: that of its directory
    out_dir: str = ""  # everything the run writes; empty: out/EXP_NAME, or out/SAR
    seed: int = 0  # seed of everything random
    save_every_steps: int = 0  # steps between checkpoints; 0: at the end of each epoch. The last step always saves
    save_every_minutes: float = 0  # save also when the last checkpoint is older than this; 0: never
    keep: int = 2  # newest checkpoints that stay
    keep_every_epochs: int = 0  # save at the end of every so many epochs, and keep that for good; 0: none
    allow_change: bool = False  # go on with a run although its model, data or batch were others
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite: stop before it changes a weight, or drop the step"""
    max_skipped: int = 10  # on_nonfinite skip: stop after dropping this many steps
    timeout_minutes: float = 30  # stop when a rank has not been heard of for so long
    check: bool = False  # check the flags and the files they name, then stop

    def __post_init__(self):
        super().__post_init__()
        at_least(self, seed=0, save_every_steps=0, save_every_minutes=0, keep=1, keep_every_epochs=0, max_skipped=0)
        only_with(self, self.on_nonfinite == "skip", "--on_nonfinite skip", ["max_skipped"])
        check_timeout(self)
        at_most(self, save_every_minutes=YEAR)

    @property
    def directory(self) -> Path:
        return Path(self.out_dir or f"out/{self.exp_name or 'SAR'}")

    @property
    def name(self) -> str:
        return self.exp_name or self.directory.name


@dataclass(frozen=True)
class WatchConfig(Flags):
    """Watching the run"""

    vis_every: int = 0  # steps between sample grids of fixed seeds; 0: only at the end
    vis_num_samples: int = 16  # images in a grid; 0: no grids
    vis_ema: bool = False  # draw the grids with the moving average
    eval_every: int = 0  # steps between held-out losses, when there is a val/; 0: only at the end
    eval_images: int = 1000  # held-out images, evenly over the split; 0: no held-out loss

    def __post_init__(self):
        super().__post_init__()
        at_least(self, vis_every=0, vis_num_samples=0, eval_every=0, eval_images=0)
        only_with(self, self.vis_num_samples > 0, "--vis_num_samples above 0", ["vis_every", "vis_ema"])
        only_with(self, self.eval_images > 0, "--eval_images above 0", ["eval_every"])


def check_watch(watch: WatchConfig, optim: OptimConfig) -> None:
    only_with(watch, bool(optim.ema), "--ema", ["vis_ema"])


@dataclass(frozen=True)
class ModelOptimConfig(OptimConfig):
    """Optimisation of `train.py`"""

    label_smoothing: float = 0.0  # share of a target token's probability that goes to all tokens alike
    scale_weights: Literal["tokens", "equal"] = "tokens"
    """weight of a scale in the loss: that of its tokens, all alike, or the same for each scale"""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, label_smoothing=0)
        if self.label_smoothing >= 1:
            raise ValueError(f"--label_smoothing must be below 1, got {self.label_smoothing}")


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """Run of `train.py`"""

    vis_cfg_scale: float = 2.5  # ramp guidance of the sample grids

    def __post_init__(self):
        super().__post_init__()
        at_least(self, vis_cfg_scale=0)


@dataclass(frozen=True)
class TrainConfig(Flags):
    """Everything `train.py` takes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: ModelOptimConfig = field(default_factory=ModelOptimConfig)
    sar: SARConfig = field(default_factory=SARConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    run: TrainRunConfig = field(default_factory=TrainRunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        super().__post_init__()
        check_watch(self.watch, self.optim)
        guided = self.sar.training_mode in ("csfl", *NAIVE) and self.sar.rollout == "cfg"
        guided = guided and (self.sar.training_mode != "csfl" or self.sar.csf_weight > 0)
        if guided and self.model.label_drop == 0:
            raise ValueError(
                "--rollout cfg guides by the unconditional class, which --label_drop 0 never trains: "
                "use --rollout sample or argmax"
            )
        self.check_self_fed()
        cached = bool(self.speed.code_cache)
        only_with(self.data, not cached, "images: --code_cache is in place of them", DATA_OF_IMAGES)
        only_with(self.speed, not cached, "images: --code_cache is in place of them", ["encode_tf32"])
        only_with(self.run, self.watch.vis_num_samples > 0, "--vis_num_samples above 0", ["vis_cfg_scale"])
        if self.sar.training_mode == "cca":
            self.check_contrast()
        for group in (self.sar, self.speed, self.optim):
            check_generator(self.model.model, group)
        sides = self.model.scales.sides
        if self.sar.training_mode == "csfl" and self.sar.ssr == "last" and sides[0] != 1:
            raise ValueError(f"--ssr last feeds the class to side 1, which --pn, from {sides[0]} on, has not")
        if self.speed.parallel == "fsdp" and self.optim.precision == "fp16":
            raise ValueError("--parallel fsdp does not go with --precision fp16: use bf16 or fp32")

    def check_contrast(self) -> None:
        """Raises ValueError for what contrastive alignment with a frozen start does not go with."""
        if not self.model.init_ckpt or self.speed.parallel == "fsdp":
            raise ValueError("--training_mode cca goes on from an --init_ckpt, and with --parallel ddp only")
        reason = "plain likelihoods, which --training_mode cca compares with those of the frozen start"
        only_with(self.optim, self.sar.cca_lambda == 0, reason, ["label_smoothing", "scale_weights"])
        only_with(self.model, self.sar.cca_lambda == 0, reason, ["reset_class_embedding"])

    def check_self_fed(self) -> None:
        """Raises ValueError when what is called student forcing would be teacher forcing."""
        sar, sides = self.sar, self.model.scales.sides
        if sar.training_mode != "teacher_forcing" and len(sides) < 2:
            raise ValueError(f"--training_mode {sar.training_mode} feeds one scale to the next: --pn has one only")
        if sar.training_mode == "sf_hybrid" and sar.sf_hybrid_from > sides[-1]:
            raise ValueError(
                f"--sf_hybrid_from {sar.sf_hybrid_from} leaves no scale self-fed: the finest side is {sides[-1]}"
            )


# What a run cannot change on the way: the model, and which images come at which step.
FIXED = {
    *("dataset", "augment", "bs", "seed", "training_mode"),
    *("model", *(flag for flags in OF_GENERATORS.values() for flag in flags)),
    *("depth", "width", "num_classes", "pn", "schedule", "supervision", "encode_tf32"),
    *(
        "image_size",
        "quantiser",
        "base_width",
        "width_mult",
        "res_blocks",
        "z_channels",
        "codebook_size",
        "codebook_dim",
    ),
    *("images", "images_sha256", "class_names_sha256", "crop_seed", "crops"),
    *("model_classes", "tokenizer_sha256", "frozen_sha256", "discriminator"),
}


# What may differ from node to node: what of the machine is used, and where files lie, which are compared by content.
OF_A_NODE = {"workers", "compile", "data_path", "code_cache", "vae_ckpt", "init_ckpt", "perceptual_weights"}


def check_changes(old: dict, new: dict, directory: Path, allowed: bool) -> list[str]:
    """Lines on what a run in `directory` does otherwise than its checkpoint. Raises ValueError for what cannot change,
    unless `allowed`."""
    changed = changes(old, new)
    refused = [line for name, line in changed.items() if name in FIXED]
    if refused and not allowed:
        raise ValueError(
            f"{directory} holds a run with other settings: {'; '.join(refused)}. Use another --out_dir, or "
            "--allow_change to go on with its weights"
        )
    return list(changed.values())


def changes(old: dict, new: dict) -> dict[str, str]:
    """Name → "--flag old → new" of what differs between two configs (groups of names). What the old one does not know
    came later, and is no change."""
    known = [(old[g], flags) for g, flags in new.items() if g in old]
    pairs = [(name, before[name], value) for before, flags in known for name, value in flags.items() if name in before]
    return {name: f"--{name} {before} → {after}" for name, before, after in pairs if before != after}

"""Every flag of sample.py and evaluate.py, as frozen dataclasses."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import simple_parsing

from models.sampling import TOP_K, TOP_P
from utils.runtime.flags import Flags, alias, at_least, at_most, check_number, only_with, without

OF_SOME = ("fill_steps", "flow_steps", "guidance_interval")  # settings that some models read
SOME_READ = ("top_k", "top_p", "max_pn", *OF_SOME)  # those, and others that some do not


class Repeated(argparse.Action):
    """A flag that may be repeated: its values as lines of one text."""

    def __call__(self, parser, namespace, value, option_string=None):
        given = getattr(namespace, self.dest, None)
        again = getattr(namespace, f"{self.dest}_given", False)
        setattr(namespace, self.dest, f"{given}\n{value}" if again else value)
        setattr(namespace, f"{self.dest}_given", True)


def split_named_in(named: str) -> tuple[str, str]:
    """NAME@SPLIT → the two; the split is empty where none is named, or where there is such a path."""
    name, at, split = named.rpartition("@")
    return (name, split) if at and not Path(named).exists() else (named, "")


@dataclass(frozen=True)
class DrawConfig(Flags):
    """Model and sampling"""

    ckpt: str = alias("pretrained/SARd16-epo179.pth", "--var_ckpt")
    """transformer: a weight file, a run's directory, a pipeline's directory, or a Hub repository"""
    vae_ckpt: str = ""
    """tokenizer; empty: the one that CKPT brings along, or the released one of its kind in pretrained/"""
    use_ema: bool = False  # a run's moving average instead of its weights
    ema_decay: float = 0.0  # of a run with several moving averages the one of this decay; 0: the first
    cfg: float = 2.5  # guidance scale
    guidance: Literal["ramp", "constant", "none"] = "ramp"  # how guidance grows over the scales
    top_k: int = TOP_K  # top-k; 0: off, 1: greedy
    top_p: float = TOP_P  # top-p; 0: off
    max_pn: int = alias(0, "--maxpn")
    """sides above it, and those that released models were not tuned for, are taken greedily; 0: 16 for released weights
    (files that belong to no run), no such rule for others"""
    fill_steps: int = 8  # steps in which the first side is filled, of models that fill it step by step
    flow_steps: int = 25
    """steps of Euler's method, of models with a flow-matching head; 25 are 24 evaluations, as published"""
    guidance_interval: float = 0.9  # of a flow-matching head: guidance acts at times up to this one
    pn: str = alias("", "--infer_patch_nums")
    """scales, like 1_2_3_4; empty: those that CKPT brings along, or the default ten"""
    seed: int = 0  # of every image (and, in evaluation, of the class order)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32

    def __post_init__(self):
        super().__post_init__()
        self.check_drawing()

    def check_drawing(self) -> None:
        """Raises ValueError for a value out of range, or one that nothing reads."""
        at_least(self, cfg=0, top_k=0, top_p=0, max_pn=0, fill_steps=1, flow_steps=2, guidance_interval=0, seed=0)
        at_least(self, ema_decay=0)
        only_with(self, self.use_ema, "--use_ema", ["ema_decay"])
        at_most(self, top_p=1, fill_steps=10_000, flow_steps=10_000, guidance_interval=1)
        only_with(self, self.guidance != "none", "guidance: leave --guidance none out", ["cfg"])
        only_with(self, self.top_k != 1, "another --top_k than 1, the greedy one", ["top_p", "max_pn"])

    @property
    def options(self) -> dict[str, Any]:
        """Settings of sampling, as a pipeline takes them."""
        return {name: getattr(self, name) for name in ("cfg", "guidance", *SOME_READ)}

    def check_model(self, name: str, reads: Sequence[str]) -> None:
        """Raises ValueError for flags of sampling that a model does not read; it reads those named."""
        without(self, True, f"a {name}", [flag for flag in SOME_READ if flag not in reads])


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """Everything `sample.py` takes."""

    classes: str = simple_parsing.field(default="207", action=Repeated)
    """class names or ids, comma-separated: "golden retriever,88"; quote names with commas as CSV does, or repeat the
    flag"""
    n: int = 4  # images of each class
    batch: int = 16  # images at a time; the images do not depend on it
    out: str = "samples.png"  # the grid of all images
    captions: bool = True  # class names under the images of the grid
    files: str = ""  # directory for single files, too
    steps: str = ""  # the coarse-to-fine steps, too: a .gif, or a strip in a .png
    more_smooth: bool = False  # VAR: mix embeddings instead of drawing them, for smoother pictures
    image: str = ""  # a picture to edit
    mask: str = ""  # what to repaint of IMAGE: white in this picture of its size
    outpaint: float = 0.0  # shrink IMAGE to this share of the side and paint around it

    def __post_init__(self):
        super().__post_init__()
        at_least(self, n=1, batch=1, outpaint=0)
        if self.outpaint >= 1:
            raise ValueError(f"--outpaint must be below 1, got {self.outpaint}")
        if self.image and bool(self.mask) == bool(self.outpaint):
            raise ValueError("--image needs either --mask or --outpaint")
        only_with(self, bool(self.image), "--image", ["mask", "outpaint"])
        only_with(self, not self.image, "sampling from scratch: leave --image out", ["steps", "more_smooth"])
        if not self.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise ValueError(f"--out must be a .png, .jpg or .webp file, got {self.out!r}")
        if self.steps and not self.steps.lower().endswith((".gif", ".png")):
            raise ValueError(f"--steps must end in .gif or .png, got {self.steps!r}")

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "more_smooth": self.more_smooth}


@dataclass(frozen=True)
class EvalConfig(DrawConfig):
    """Everything `evaluate.py` takes."""

    cfg: float = 2.2  # guidance scale
    num_samples: int = 50  # images of each class
    num_classes_eval: int = 0  # only the first so many classes; 0: all
    eval_scale: int = 0  # decode at this side instead of the finest, against real images at that resolution
    depth: int = 0  # refuse a CKPT with another number of transformer blocks; 0: any
    batch: int = alias(0, "--batch_size")
    """images at a time; 0: 64 on a GPU, 8 on a CPU. Part of what makes images repeatable to the bit
    on a CPU"""
    sweep_ema: str = ""  # moving averages to go through, by their decays, comma-separated
    sweep_cfg: str = ""  # guidance scales to go through, comma-separated
    sweep_top_k: str = ""  # top-k to go through
    sweep_top_p: str = ""  # top-p to go through
    compare: tuple[str, ...] = ()  # print the reports of these directories side by side, and stop
    samples: str = ""  # judge these instead of sampling: an npz with arr_0, or a folder of images
    expect: int = 0  # refuse SAMPLES that hold fewer images than this
    reconstruct: str = ""  # judge the tokenizer's reconstructions of this folder or npz: rFID, PSNR, SSIM
    reference: str = ""
    """real images: an npz (arr_0, mu, sigma, mu_s, sigma_s), one that --make_reference wrote, or a folder; imagenet256
    or imagenet512: the field's batches, fetched when missing; empty: imagenet256 for --features inception, none for
    others"""
    reference_sha256: str = ""  # refuse a REFERENCE file with another digest
    image_size: int = 0  # centre-crop the images of folders to this side; 0: as they are
    make_reference: str = ""  # write the statistics of SAMPLES to this npz, and stop
    features: Literal["inception", "efficientnet_lite0", "efficientnet_lite2"] = "inception"
    """only Inception's distance is an FID"""
    inception_weights: str = ""  # weights-inception-2015-12-05-6726825d.pth; empty: fetched
    split_size: int = 5000  # samples of one split of the Inception Score
    pr_fp16: bool = True  # precision and recall from fp16 distances, as the original evaluator computes them
    compile: bool = False  # torch.compile the transformer's blocks and the decoder: pays from 10,000 images on a GPU
    decode_tf32: bool = False  # decode in TF32: three times faster on GPUs from Ampere on, and a few pixels are others
    save_npz: bool = False  # the samples as an npz for the guided-diffusion evaluator
    save_png: bool = False  # the samples as PNG files
    out_dir: str = alias("out/eval", "--output_path")
    """reports, features, samples; a killed evaluation goes on from here"""

    def __post_init__(self):
        super().__post_init__()
        at_least(
            self,
            num_samples=1,
            num_classes_eval=0,
            eval_scale=0,
            batch=0,
            expect=0,
            image_size=0,
            split_size=1,
            depth=0,
        )
        if self.compare:
            without(self, True, "--compare", [f.name for f in fields(self) if f.name != "compare"])
            if len(self.compare) < 2:
                raise ValueError("--compare takes two or more directories with a report.json")
            return
        modes = [name for name in ("samples", "reconstruct") if getattr(self, name)]
        if len(modes) > 1:
            raise ValueError("--samples and --reconstruct exclude each other")
        only_with(self, bool(self.samples), "--samples", ["expect", "make_reference"])
        only_with(self, self.features == "inception", "--features inception", ["inception_weights"])
        sampling = [
            "num_samples",
            "num_classes_eval",
            "cfg",
            "top_k",
            "top_p",
            "use_ema",
            "sweep_ema",
            "sweep_cfg",
            "max_pn",
            "fill_steps",
            "flow_steps",
            "guidance_interval",
        ]
        sampling += ["sweep_top_k", "sweep_top_p", "eval_scale", "save_npz", "save_png", "compile", "decode_tf32"]
        sampling += ["ckpt", "guidance", "precision", "depth"]
        only_with(self, not modes, f"sampling: leave --{modes[0] if modes else 'samples'} out", sampling)
        without(self, bool(self.samples), "--samples", ["vae_ckpt", "pn"])
        without(self, bool(self.reconstruct), "--reconstruct", ["reference", "reference_sha256"])
        compared = ["reference", "reference_sha256", "split_size", "pr_fp16"]
        without(self, bool(self.make_reference), "--make_reference", compared)
        has_reference = bool(self.reference or self.reconstruct) or self.features == "inception"
        only_with(self, has_reference, "--reference", ["reference_sha256", "pr_fp16"])
        for name in ("cfg", "top_k", "top_p"):
            without(self, bool(getattr(self, f"sweep_{name}")), f"--sweep_{name}", [name])
        drawn = self.top_k != 1 or bool(self.sweep_top_k)
        only_with(self, drawn, "another --top_k than 1, the greedy one", ["sweep_top_p"])
        without(self, bool(self.sweep_ema), "--sweep_ema", ["use_ema", "ema_decay"])
        only_with(self, self.guidance != "none", "guidance: leave --guidance none out", ["sweep_cfg"])
        self.averages()
        self.settings()  # all points of a sweep, before the first is drawn

    def check_model(self, name: str, reads: Sequence[str]) -> None:
        super().check_model(name, reads)
        without(self, True, f"a {name}", [f"sweep_{flag}" for flag in ("top_k", "top_p") if flag not in reads])

    def check_sources(self) -> None:
        """Raises ValueError for paths that are not there, and for --image_size where no folder is read. Nothing is
        read or fetched for this."""
        paths = {name: getattr(self, name) for name in ("samples", "reconstruct", "reference", "inception_weights")}
        for name, path in paths.items():
            by_name = path.startswith("hub:") or (name == "reference" and path in ("imagenet256", "imagenet512"))
            if path and not by_name and not Path(split_named_in(path)[0]).exists():
                raise ValueError(f"--{name}: no file or folder {path}")
        folders = any(
            path.startswith("hub:") or Path(split_named_in(path)[0]).is_dir() for path in paths.values() if path
        )
        only_with(self, folders, "a folder of images: npz files hold them as they are", ["image_size"])

    def averages(self) -> list[float | None]:
        """Decays of the moving averages to judge; 0: the first, None: the weights themselves. Raises ValueError."""
        try:
            found = [float(decay) for decay in self.sweep_ema.split(",")] if self.sweep_ema else []
        except ValueError:
            raise ValueError(f"--sweep_ema is written like 0.999,0.9999, got {self.sweep_ema!r}") from None
        if not all(0 < decay < 1 for decay in found):
            raise ValueError(f"--sweep_ema goes through decays between 0 and 1, got {self.sweep_ema!r}")
        return [*found] or [self.ema_decay if self.use_ema else None]

    def settings(self) -> list[tuple[float, int, float]]:
        """(cfg, top_k, top_p) of every point of the sweep, or the one setting. Raises ValueError when out of range."""

        def several(name: str, kind: type, most: float) -> list:
            text = getattr(self, f"sweep_{name}")
            try:
                values = [kind(value) for value in text.split(",")] if text else [getattr(self, name)]
            except ValueError:
                raise ValueError(f"a sweep is written like 1.5,2.0,2.5, got {text!r}") from None
            for value in values:
                check_number(f"sweep_{name}", value)
                if not 0 <= value <= most:
                    raise ValueError(f"--sweep_{name} must be at least 0 and at most {most:g}, got {value}")
            return values

        return list(
            itertools.product(several("cfg", float, 1e9), several("top_k", int, 1e9), several("top_p", float, 1))
        )

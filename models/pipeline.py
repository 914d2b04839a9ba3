"""`SARPipeline`: a tokenizer and a transformer together, from and to the Hugging Face Hub, class names in, PIL out."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor

from models.editing import inpaint, place_on_canvas
from models.flexvar import FlexVAR
from models.hybrid import transformer_config
from models.sampling import Draw, Edit, Guidance, sample_codes
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.vqvae import VQVAE, VQVAEConfig, to_bytes

Classes = str | int | Sequence[str | int]


@lru_cache
def imagenet_classes() -> list[str]:
    """The 1,000 ImageNet class names, in the order of the sorted folders; they come with torchvision."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(name: str | int, names: Sequence[str]) -> int:
    """A class id from an id or a name, whatever its case; an unknown name suggests the nearest."""
    text = str(name).strip()
    if text.lstrip("-").isdigit() and text not in names:
        if not 0 <= int(text) < len(names):
            raise ValueError(f"class id {text} is out of range: this model knows 0…{len(names) - 1}")
        return int(text)
    lower = [n.lower() for n in names]
    if text.lower() in lower:
        return lower.index(text.lower())
    near = difflib.get_close_matches(text.lower(), lower, n=3, cutoff=0.5)
    near = near or [n for n in lower if text.lower() in n][:3]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"no class is named {text!r}{hint}")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] → PIL images."""
    return [to_pil_image(image) for image in to_bytes(images)]


class SARPipeline(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sar",
    pipeline_tag="unconditional-image-generation",
    paper_url="https://arxiv.org/abs/2512.06421",
):
    """Tokenizer and transformer in one `model.safetensors`, their sizes, the scales and class names in `config.json`.

    `SARPipeline.from_pretrained(repo_or_dir)`, `save_pretrained(dir)` and `push_to_hub(repo)` are the Hub's own.
    """

    def __init__(
        self, tokenizer: dict, transformer: dict, sides: Sequence[int], class_names: Sequence[str] | None = None
    ):
        super().__init__()
        self.vae = VQVAE(VQVAEConfig(**{**tokenizer, "width_mult": tuple(tokenizer["width_mult"])}))
        self.model = transformer_config(transformer).build()
        self.schedule = self.model.trim(ScaleSchedule(tuple(sides)))
        self.class_names = list(class_names or default_names(self.model.config.num_classes))
        if len(self.class_names) != self.model.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.model.config.num_classes} classes")
        self.eval()

    @classmethod
    def of(
        cls, vae: VQVAE, model: FlexVAR, schedule: ScaleSchedule, class_names: Sequence[str] | None = None
    ) -> SARPipeline:
        """Around models that are there."""
        with torch.device("meta"):
            pipeline = cls(asdict(vae.config), asdict(model.config), list(schedule.sides), class_names)
        pipeline.vae, pipeline.model = vae, model
        return pipeline.eval()

    @classmethod
    def from_files(
        cls,
        vae_ckpt: str | Path,
        ckpt: str | Path,
        schedule: ScaleSchedule = DEFAULT_SCHEDULE,
        class_names: Sequence[str] | None = None,
    ) -> SARPipeline:
        """From weight files or run directories, released or our own."""
        from utils.weights import load_flexvar, load_tokenizer  # here, since that module builds these models too

        model, vae = load_flexvar(ckpt), load_tokenizer(vae_ckpt)
        if vae.codebook.shape != (model.config.codebook_size, model.config.codebook_dim):
            raise ValueError(
                f"{ckpt} predicts codes of a {model.config.codebook_size} × {model.config.codebook_dim} codebook, "
                f"{vae_ckpt} has one of {vae.config.codebook_size} × {vae.config.codebook_dim}"
            )
        return cls.of(vae, model, schedule, class_names)

    @classmethod
    def _from_pretrained(cls, **kwargs) -> SARPipeline:
        return super()._from_pretrained(**{**kwargs, "strict": True})  # the Hub's default would load half a file

    @property
    def device(self) -> torch.device:
        return self.model.pos_start.device

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return self.schedule.sides[-1] * self.vae.config.factor

    def labels(self, classes: Classes, n: int) -> Tensor:
        """Class names or ids (one, or a list) → class ids (classes · n,), n of each in turn."""
        named = [classes] if isinstance(classes, str | int) else list(classes)
        if not named:
            raise ValueError("name at least one class")
        return torch.tensor([find_class(name, self.class_names) for name in named]).repeat_interleave(n)

    @torch.no_grad()
    def codes(
        self,
        classes: Classes,
        n: int = 1,
        seed: int = 0,
        schedule: ScaleSchedule | None = None,
        edit: Edit | None = None,
        **options,
    ) -> dict[int, Tensor]:
        """Codes {side: (B, s²)} of n images of each class. Image i is drawn from seed + i.

        options: cfg 2.5, guidance "ramp", top_k 900, top_p 0.95, and for a hybrid model fill_steps 8.
        """
        labels = self.labels(classes, n)
        seeds = range(seed, seed + len(labels))
        schedule = schedule or self.schedule
        return sample_codes(self.model, self.vae.codebook, labels, schedule, drawing(**options), seeds, edit)

    @torch.no_grad()
    def __call__(self, classes: Classes, **options) -> list[Image.Image]:
        """Images of the classes; the options are those of `codes`."""
        side, codes = list(self.codes(classes, **options).items())[-1]
        return to_pil(self.vae.decode(codes, side))

    @torch.no_grad()
    def steps(self, classes: Classes, **options) -> dict[int, list[Image.Image]]:
        """The images as they stand after each scale, at its own resolution; the options are those of `codes`."""
        return {s: to_pil(self.vae.decode(codes, s)) for s, codes in self.codes(classes, **options).items()}

    def inpaint(
        self, image: Image.Image, mask: Image.Image, classes: Classes, n: int = 1, seed: int = 0, **options
    ) -> list[Image.Image]:
        """Repaint what is white in the mask, as each class, n times. The rest stays as it is.

        A picture of another size is cropped to the middle square and resized first, and the mask with it.
        """
        if mask.size != image.size:
            raise ValueError(f"the mask is {mask.size}, the image {image.size}: they must have one size")
        labels = self.labels(classes, n)
        pixels = from_pil(image.convert("RGB"), self.side).expand(len(labels), -1, -1, -1)
        masks = (from_pil(mask.convert("L"), self.side) > 0).float().expand(len(labels), -1, -1, -1)
        seeds, draw = range(seed, seed + len(labels)), drawing(**options)
        return to_pil(inpaint(self.model, self.vae, pixels, masks, labels, self.schedule, draw, seeds))

    def outpaint(self, image: Image.Image, share: float, classes: Classes, **options) -> list[Image.Image]:
        """Shrink a picture to `share` of the side and paint around it; the options are those of `inpaint`."""
        canvas, mask = place_on_canvas(from_pil(image.convert("RGB"), self.side), share)
        return self.inpaint(to_pil(canvas)[0], to_pil_image(mask[0]), classes, **options)


def drawing(
    cfg: float = 2.5, guidance: str = "ramp", top_k: int = 900, top_p: float = 0.95, fill_steps: int = 8
) -> Draw:
    """The defaults of a pipeline."""
    return Draw(Guidance(guidance, cfg), top_k, top_p, fill_steps=fill_steps)


def from_pil(image: Image.Image, side: int) -> Tensor:
    """The middle square of a picture, resized, as (1, C, side, side) in [-1, 1]."""
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return to_tensor(image).unsqueeze(0) * 2 - 1


def open_pipeline(ckpt: str, vae_ckpt: str = "", pn: str = "", use_ema: bool = False) -> SARPipeline:
    """A pipeline from a weight file, a training run's directory, a pipeline's directory, or a Hub repository.

    A run's directory brings its tokenizer and scales along, unless others are named.
    """
    from utils.checkpoint import EMA
    from utils.files import read_json
    from utils.weights import find_weights  # here, since that module builds these models too

    path, named = Path(ckpt), ScaleSchedule.parse(pn) if pn else None
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", ckpt) and not path.parent.exists():
        described = {"transformer": "on the Hub"}
    else:
        # A run's description stands beside checkpoints/step_N of a checkpoint, and of a weight file in it.
        places = [path, *list(path.absolute().parents)[:3]]
        records = [p / "config.json" for p in places if (p / "config.json").is_file()]
        described = read_json(records[0]) if records else {}
    if "transformer" in described:
        if vae_ckpt or use_ema:
            raise ValueError(f"{ckpt} is a pipeline: it has its own tokenizer and no moving average")
        try:
            pipeline = SARPipeline.from_pretrained(ckpt)
        except (OSError, RuntimeError) as error:  # the Hub's errors are OSErrors
            raise ValueError(f"{ckpt} is no pipeline on disk, nor one to be had from the Hub: {error}") from None
        pipeline.schedule = pipeline.model.trim(named) if named else pipeline.schedule
        return pipeline
    if use_ema and not path.is_dir():
        raise ValueError(f"--use_ema takes the moving average of a run's directory, and {ckpt} is a file")
    run = described.get("model", {})
    schedule = named or (ScaleSchedule.parse(run["pn"]) if "pn" in run else DEFAULT_SCHEDULE)
    vae = vae_ckpt or run.get("vae_ckpt") or "pretrained/FlexVAE.pth"
    weights = find_weights(ckpt, EMA) if use_ema else ckpt
    return SARPipeline.from_files(vae, weights, schedule, described.get("class_names"))


def default_names(num_classes: int) -> list[str]:
    """ImageNet's names for 1,000 classes, else the ids."""
    return imagenet_classes() if num_classes == 1000 else [str(i) for i in range(num_classes)]


def main() -> None:
    """Convert weight files to a pipeline directory: python -m models.pipeline --vae_ckpt … --ckpt … --out DIR"""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--vae_ckpt", required=True)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--pn", type=ScaleSchedule.parse, default=DEFAULT_SCHEDULE, help="scales, like 1_2_3_4")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    try:
        SARPipeline.from_files(args.vae_ckpt, args.ckpt, args.pn).save_pretrained(args.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

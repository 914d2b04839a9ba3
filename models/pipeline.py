"""`SARPipeline`: a tokenizer and a transformer together, from and to the Hugging Face Hub, class names in, PIL out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from PIL import Image, ImageOps
from torch import Tensor, nn

from models.card import Origin, card
from models.class_names import default_names, find_class
from models.editing import inpaint, place_on_canvas
from models.flexvar import FlexVAR, FlexVARConfig
from models.generators import config_of, tokenizer_of
from models.sampling import TOP_K, TOP_P, Edit, Guidance, Kind, SamplingConfig, sample_codes
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.tokenizer import Tokenizer, to_bytes
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.flags import Parser
from utils.runtime.image_files import upright_rgb

Classes = str | int | Sequence[str | int]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] → PIL images."""
    from torchvision.transforms.functional import to_pil_image  # as long to import as all else that an entry needs

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
        self,
        tokenizer: dict,
        transformer: dict,
        sides: Sequence[int],
        class_names: Sequence[str] | None = None,
        supervision: str = "latent",
        max_pn: int | None = FlexVARConfig.released_max_pn,
    ):
        """`supervision`: how training made codes of images, see `Tokenizer.tokenize`. `max_pn`: see `SamplingConfig`;
        None for models that are none of the released ones."""
        super().__init__()
        self.supervision, self.max_pn = supervision, max_pn
        self.origin = Origin()  # for its model card
        self.vae = tokenizer_of(tokenizer).build()
        self.model = config_of(transformer).build()
        self.schedule = self.model.trim(ScaleSchedule(tuple(sides)))
        self.class_names = list(class_names or default_names(self.model.config.num_classes))
        if len(self.class_names) != self.model.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.model.config.num_classes} classes")
        self.eval()

    @classmethod
    def of(
        cls,
        vae: Tokenizer,
        model: FlexVAR,
        schedule: ScaleSchedule,
        class_names: Sequence[str] | None = None,
        supervision: str = "latent",
        max_pn: int | None = None,
    ) -> SARPipeline:
        """Around models that are there."""
        sizes = asdict(vae.config), asdict(model.config), list(schedule.sides)
        with torch.device("meta"):
            pipeline = cls(*sizes, class_names, supervision, max_pn)
        pipeline.vae, pipeline.model = vae, model
        return pipeline.eval()

    @classmethod
    def from_files(
        cls,
        vae_ckpt: str | Path,
        ckpt: str | Path,
        schedule: ScaleSchedule | None = None,
        class_names: Sequence[str] | None = None,
    ) -> SARPipeline:
        """From weight files or run directories, released or our own.

        Scales and class names are those of the run that `ckpt` belongs to, or the scales of the tokenizer's run, unless
        they are given; for a file that belongs to none, the default ten and ImageNet's. An empty `vae_ckpt` is the
        tokenizer of that run, or the released one. A file that belongs to no run is sampled as released models are:
        see `SamplingConfig.max_pn`.

        Raises ValueError when the two do not fit: other sizes, or other weights than the run was trained on. The latter
        is a warning when `vae_ckpt` was named.
        """
        from models.run_record import find_run
        from models.weights import digest_of, load_flexvar, load_tokenizer  # here, since these build models too

        run, named = find_run(ckpt), bool(vae_ckpt)
        model = load_flexvar(ckpt)
        vae_ckpt = vae_ckpt or (run and run.tokenizer) or model.config.released_tokenizer
        options = model.config.tokenizer_options(run.flags) if run else {}
        vae = load_tokenizer(vae_ckpt, **options)
        model.config.check_tokenizer(vae.config, ckpt, vae_ckpt)
        if run is not None:
            run.check_tokenizer(digest_of(vae), str(vae_ckpt), named)
        tokenizer_run = find_run(vae_ckpt)
        schedule = schedule or (run and run.schedule) or model.config.only_schedule
        schedule = schedule or (tokenizer_run and tokenizer_run.schedule) or DEFAULT_SCHEDULE
        class_names = class_names or (run and run.class_names) or None
        if run is None:
            pipeline = cls.of(vae, model, schedule, class_names, max_pn=model.config.released_max_pn)
        else:
            pipeline = cls.of(vae, model, schedule, class_names, run.supervision)
        pipeline.origin = Origin.of(ckpt, run)
        return pipeline

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> SARPipeline:
        """A pipeline's directory or a Hub repository; a training run's directory opens, too, with its tokenizer.

        Raises ValueError for a weight file: `from_files` takes those.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            raise ValueError(f"{path} is a weight file: SARPipeline.from_files(vae_ckpt, {str(path)!r}) opens it")
        if path.is_dir() and not is_pipeline(path):
            return open_pipeline(str(path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def describe(self) -> str:
        """A line on what was opened."""
        config = self.model.config
        return (
            f"{type(self.model).__name__}-d{config.depth}, {config.num_classes} classes ({self.class_names[0]} …), "
            f"scales {self.schedule}, {self.side}×{self.side} pixels"
        )

    @classmethod
    def _from_pretrained(cls, **kwargs) -> SARPipeline:
        return super()._from_pretrained(**{**kwargs, "strict": True})  # the Hub's default would load half a file

    def card(self, report: dict | None = None) -> ModelCard:
        """Its model card: licence, base, recipe, and the metrics of an evaluation's report, if there is one."""
        return card(self.describe(), type(self.model).__name__, self.origin, report)

    def generate_model_card(self, *args, report: dict | None = None, **kwargs) -> ModelCard:
        """`card`, for `save_pretrained` and `push_to_hub`: their model_card_kwargs={"report": …}."""
        return self.card(report)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def compile_parts(self) -> None:
        """Compile the blocks and the decoder: about a minute at their first use, twice the speed on a GPU."""
        self.model.compile_parts()
        self.vae.compile_parts()

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return self.schedule.sides[-1] * self.vae.config.factor

    def sampling_config(
        self,
        cfg: float = 2.5,
        guidance: Kind = "ramp",
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        max_pn: int = 0,
        **options: Any,
    ) -> SamplingConfig:
        """Settings this model is sampled with; other options are fields of `SamplingConfig`.

        max_pn 0 is the model's own: 16 for released weights, no bound for others.
        """
        return SamplingConfig(Guidance(guidance, cfg), top_k, top_p, max_pn or self.max_pn, **options)

    def greedy_sides(self, draw: SamplingConfig) -> str:
        """A line on the sides that the released models' rule takes greedily; empty when there are none."""
        sides = [str(s) for s in self.schedule.sides if draw.greedy(s)]
        rule = f"released models are sampled at sides up to {draw.max_pn} that they were tuned for"
        return f"sides {', '.join(sides)} are taken greedily: {rule} (--max_pn)" if sides else ""

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

        options: cfg 2.5, guidance "ramp", top_k 900, top_p 0.95, max_pn; of models that read them fill_steps 8,
        flow_steps 25, guidance_interval 0.9, more_smooth: see `sampling_config`.
        """
        labels = self.labels(classes, n)
        seeds = range(seed, seed + len(labels))
        schedule = schedule or self.schedule
        return sample_codes(
            self.model, self.vae.pathway, labels, schedule, self.sampling_config(**options), seeds, edit
        )

    @torch.no_grad()
    def __call__(self, classes: Classes, **options) -> list[Image.Image]:
        """Images of the classes; the options are those of `codes`."""
        codes = self.codes(classes, **options)
        return to_pil(self.vae.decode_at(codes, max(codes), ScaleSchedule(tuple(codes))))

    @torch.no_grad()
    def steps(self, classes: Classes, **options) -> dict[int, list[Image.Image]]:
        """The images as they stand after each scale; the options are those of `codes`."""
        codes = self.codes(classes, **options)
        schedule = ScaleSchedule(tuple(codes))
        return {s: to_pil(self.vae.decode_at(codes, s, schedule)) for s in codes}

    def inpaint(
        self, image: Image.Image, mask: Image.Image, classes: Classes, n: int = 1, seed: int = 0, **options
    ) -> list[Image.Image]:
        """Repaint what is white in the mask, as each class, n times. The rest stays as it is.

        A picture of another size is cropped to the middle square and resized first, and the mask with it.
        """
        image, mask = upright_rgb(image), upright_rgb(mask, "black").convert("L")
        if mask.size != image.size:
            raise ValueError(f"the mask is {mask.size}, the image {image.size}: they must have one size")
        labels = self.labels(classes, n)
        pixels = from_pil(image, self.side).expand(len(labels), -1, -1, -1)
        masks = (from_pil(mask, self.side) > 0).float().expand(len(labels), -1, -1, -1)
        seeds, draw = range(seed, seed + len(labels)), self.sampling_config(**options)
        painted = inpaint(
            self.model, self.vae, pixels, masks, labels, self.schedule, draw, seeds, supervision=self.supervision
        )
        return to_pil(painted)

    def outpaint(self, image: Image.Image, share: float, classes: Classes, **options) -> list[Image.Image]:
        """Shrink a picture to `share` of the side and paint around it; the options are those of `inpaint`."""
        canvas, mask = place_on_canvas(from_pil(upright_rgb(image), self.side), share)
        return self.inpaint(to_pil(canvas)[0], to_pil(mask * 2 - 1)[0], classes, **options)


def from_pil(image: Image.Image, side: int) -> Tensor:
    """The middle square of a picture, resized, as (1, C, side, side) in [-1, 1]."""
    from torchvision.transforms.functional import to_tensor  # as above

    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return to_tensor(image).unsqueeze(0) * 2 - 1


def is_pipeline(directory: Path) -> bool:
    """True for a directory that `save_pretrained` wrote."""
    from utils.runtime.files import read_json

    try:
        return "transformer" in read_json(directory / "config.json")
    except ValueError:
        return False


def open_pipeline(
    ckpt: str, vae_ckpt: str = "", pn: str = "", use_ema: bool = False, ema_decay: float = 0.0
) -> SARPipeline:
    """A pipeline from a weight file, a training run's directory, a pipeline's directory, or a Hub repository.

    A run brings its tokenizer, scales and class names along, unless others are named: see `from_files`. `use_ema` takes
    its moving average, the first or that of `ema_decay`.
    """
    from models.run_record import average_of
    from models.weights import find_weights  # here, since that module builds these models too

    path, named = Path(ckpt), ScaleSchedule.parse(pn) if pn else None
    on_hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", ckpt) and not path.parent.exists()
    if on_hub or is_pipeline(path):
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
    return SARPipeline.from_files(vae_ckpt, find_weights(ckpt, average_of(ckpt, ema_decay)) if use_ema else ckpt, named)


@entry
def main() -> None:
    """Convert weight files to a pipeline directory: python -m models.pipeline --vae_ckpt … --ckpt … --out DIR"""
    parser = Parser(main.__doc__, prog="python -m models.pipeline")
    parser.add_argument("--vae_ckpt", default="", help="tokenizer; empty: the one of CKPT's run")
    parser.add_argument("--ckpt", required=True, help="transformer: a weight file or a run's directory")
    parser.add_argument("--pn", default="", help="scales, like 1_2_3_4; empty: those of CKPT's run, or the default ten")
    parser.add_argument("--out", required=True, help="directory to write")
    args = parser.parse_args()
    pipeline = open_pipeline(args.ckpt, args.vae_ckpt, args.pn)
    check_output_directory(args.out, "--out")
    pipeline.save_pretrained(args.out)
    print(f"wrote {args.out}: {pipeline.describe()}")


if __name__ == "__main__":
    main()

"""Pictures of named classes, their coarse-to-fine steps, and painting, from the command line.

python sample.py --classes "golden retriever,88" --n 8 --out samples.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from models.pipeline import SARPipeline, open_pipeline
from utils.config_sampling import SampleConfig
from utils.flags import parse
from utils.optim import Precision
from utils.pictures import captioned_grid, coarse_to_fine, save_gif

Steps = dict[int, list[Image.Image]]


def open_image(path: str) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from None


def draw(
    config: SampleConfig, pipeline: SARPipeline
) -> tuple[list[Image.Image], list[str], dict[int, list[Image.Image]]]:
    """Images, their captions, and the coarse-to-fine steps if asked for."""
    labels = pipeline.labels([name for name in config.classes.split(",") if name.strip()], config.n).tolist()
    images: list[Image.Image] = []
    steps: Steps = {s: [] for s in pipeline.schedule.sides}
    starts = range(0, len(labels), config.batch)
    bar = tqdm(total=len(starts) * len(pipeline.schedule), unit="scale", disable=None)
    common = {name: getattr(config, name) for name in ("cfg", "guidance", "top_k", "top_p", "fill_steps")}

    def tick(side: int, codes: torch.Tensor) -> torch.Tensor:
        bar.update()
        return codes

    for start in starts:
        part = labels[start : start + config.batch]
        options = {**common, "seed": config.seed + start}
        if config.outpaint:
            images += pipeline.outpaint(open_image(config.image), config.outpaint, part, **options)
        elif config.image:
            images += pipeline.inpaint(open_image(config.image), open_image(config.mask), part, **options)
        elif config.steps:
            for side, pictures in pipeline.steps(part, edit=tick, **options).items():
                steps[side] += pictures
        else:
            images += pipeline(part, edit=tick, **options)
    bar.close()
    images = images or steps[pipeline.schedule.sides[-1]]
    return images, [pipeline.class_names[label] for label in labels], steps


def main() -> None:
    config = parse(SampleConfig, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline = open_pipeline(config.ckpt, config.vae_ckpt, config.pn, config.use_ema).to(device)
        with Precision(config.precision, device).autocast():
            images, captions, steps = draw(config, pipeline)
    except ValueError as error:
        sys.exit(f"error: {error}")
    columns = config.n if len(images) > config.n else max(1, round(len(images) ** 0.5))
    grid = captioned_grid(images, captions if config.captions else [""] * len(images), columns)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    grid.save(config.out)
    written = [config.out]
    if config.files:
        directory = Path(config.files)
        directory.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(directory / f"{i:05d}.png")
        written.append(f"{len(images)} files in {directory}")
    if config.steps:
        path = Path(config.steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".gif":
            save_gif(steps, path)
        else:
            coarse_to_fine(steps, captions).save(path)
        written.append(config.steps)
    print("wrote " + ", ".join(written))


if __name__ == "__main__":
    main()

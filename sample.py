"""Pictures of named classes, their coarse-to-fine steps, and painting, from the command line.

python sample.py --classes "golden retriever,88" --n 8 --out samples.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from models.class_names import split_classes
from models.pipeline import SARPipeline, open_pipeline
from utils.config.sampling import SampleConfig
from utils.reporting.pictures import captioned_grid, coarse_to_fine, grid_size, save_gif, square
from utils.runtime.entry import check_output_directory, check_output_file, entry, notice
from utils.runtime.flags import parse
from utils.runtime.image_files import read_image, read_mask
from utils.runtime.numerics import Precision

Steps = dict[int, list[Image.Image]]


def draw(config: SampleConfig, pipeline: SARPipeline, labels: list[int]) -> tuple[list[Image.Image], Steps]:
    """An image of each label, and the coarse-to-fine steps if asked for. Single files are written as they come."""
    images: list[Image.Image] = []
    steps: Steps = {s: [] for s in pipeline.schedule.sides}
    picture = read_image(config.image) if config.image else None
    mask = read_mask(config.mask) if config.mask else None
    starts = range(0, len(labels), config.batch)
    bar = tqdm(total=len(starts) * len(pipeline.schedule), unit="scale", disable=None)

    def tick(side: int, codes: torch.Tensor) -> torch.Tensor:
        bar.update()
        return codes

    for start in starts:
        part = labels[start : start + config.batch]
        options = {**config.options, "seed": config.seed + start}
        if config.outpaint:
            drawn = pipeline.outpaint(picture, config.outpaint, part, **options)
        elif config.image:
            drawn = pipeline.inpaint(picture, mask, part, **options)
        elif config.steps:
            for side, pictures in pipeline.steps(part, edit=tick, **options).items():
                steps[side] += pictures
            drawn = steps[pipeline.schedule.sides[-1]][start:]
        else:
            drawn = pipeline(part, edit=tick, **options)
        if config.image:
            bar.update(len(pipeline.schedule))  # painting says nothing on the way
        images += drawn
        if config.files:
            for i, image in enumerate(drawn, start):
                image.save(Path(config.files) / file_name(i))
    bar.close()
    return images, steps


LARGEST_SIDE = {".png": 2**31 - 1, ".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383, ".gif": 65_535}  # of a picture
LARGEST_SHEET = 2**29  # pixels: 1.5 GB in memory


def columns_of(config: SampleConfig, images: int) -> int:
    return config.n if images > config.n else square(images)


def check_sheet(flag: str, path: str, images: int, columns: int, side: int) -> None:
    """Raises ValueError when a file of this kind cannot hold a grid of so many pictures."""
    width, height = grid_size(images, columns, side)
    limit = LARGEST_SIDE[Path(path).suffix.lower()]
    if max(width, height) > limit or width * height > LARGEST_SHEET:
        raise ValueError(
            f"{flag} {path} would be {width}×{height} pixels, more than such a file holds: "
            "take fewer images, a .png, or --files DIR for single ones"
        )


def check_outputs(config: SampleConfig, pipeline: SARPipeline, images: int) -> None:
    """Raises ValueError for outputs that could not be written, and for the files of an earlier run in --files."""
    check_output_file(config.out, "--out")
    check_sheet("--out", config.out, images, columns_of(config, images), pipeline.side)
    if config.steps:
        check_output_file(config.steps, "--steps")
        scales = len(pipeline.schedule)
        shown = (images, square(images)) if config.steps.lower().endswith(".gif") else (images * scales, scales)
        check_sheet("--steps", config.steps, *shown, pipeline.side)
    if config.files:
        directory = check_output_directory(config.files, "--files")
        new = {file_name(i) for i in range(images)}
        old = {p.name for p in directory.iterdir() if re.fullmatch(r"\d{5,}\.png", p.name)}
        if old - new:
            raise ValueError(
                f"--files {directory} holds {min(old - new)} of another run: empty it, or name another one"
            )
        for name in old:  # so that what is there after an interruption is of this run
            (directory / name).unlink()


def file_name(i: int) -> str:
    """Name of the i-th single picture."""
    return f"{i:05d}.png"


@entry
def main() -> None:
    config = parse(SampleConfig, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = open_pipeline(config.ckpt, config.vae_ckpt, config.pn, config.use_ema, config.ema_decay).to(device)
    config.check_model(type(pipeline.model).__name__, pipeline.model.reads)
    print(f"{config.ckpt}: {pipeline.describe()}", file=sys.stderr)
    if greedy := pipeline.greedy_sides(pipeline.sampling_config(**config.options)):
        notice(greedy)
    labels = pipeline.labels(split_classes(config.classes, pipeline.class_names), config.n).tolist()
    check_outputs(config, pipeline, len(labels))
    with Precision(config.precision, device).autocast():
        images, steps = draw(config, pipeline, labels)
    captions = [pipeline.class_names[label] for label in labels]
    grid = captioned_grid(images, captions if config.captions else [""] * len(images), columns_of(config, len(images)))
    grid.save(config.out)
    written = [config.out] + ([f"{len(images)} files in {config.files}"] if config.files else [])
    if config.steps:
        path = Path(config.steps)
        if path.suffix.lower() == ".gif":
            save_gif(steps, path)
        else:
            coarse_to_fine(steps, captions).save(path)
        written.append(config.steps)
    print("wrote " + ", ".join(written))


if __name__ == "__main__":
    main()

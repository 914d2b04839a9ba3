"""Images as training and evaluation see them: cropped, flipped, shifted; and the bad ones that a run may skip."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from utils.runtime.image_files import BadImage

View = Callable[[Image.Image, int, random.Random | None], Image.Image]  # size; no rng: the evaluation view


class SkipBad:
    """--on_bad_image skip: bad images are listed in a file, which loaders of all ranks share, up to a share of all."""

    def __init__(self, record: Path, limit: float):
        self.record, self.limit = record, limit

    def note(self, error: BadImage, images: int) -> None:
        """List a bad image, once. Raises BadImage when there are too many."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with self.record.open("a+", encoding="utf-8", errors="surrogateescape") as file:
            file.seek(0)
            known = set(file.read().splitlines())
            if str(error) not in known:
                file.write(f"{error}\n")
                known.add(str(error))
        if len(known) > self.limit * images:
            raise BadImage(
                f"{len(known)} of {images} images are bad, more than --bad_image_limit {self.limit:g} allows; "
                f"{self.record} lists them"
            )


# -------------------------------------------------------------------------------------------------- views


def adm_crop(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """ImageNet's crop. Training: short side drawn from [size, ⌈size/0.88⌉], random crop, flip; else centre crop."""
    short = rng.randint(size, math.ceil(size / 0.88)) if rng else size
    while min(image.size) >= 2 * short:  # halving by box first keeps the bicubic step free of aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    resized = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return mirror(crop(image, size, rng), rng)


def var_crop(
    image: Image.Image, size: int, rng: random.Random | None, by: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """VAR's crop: the short side resized to 9/8 of the side by Lanczos; a random crop, or the centre; no flip."""
    short = round(1.125 * size)
    scale = short / min(image.size)
    resized = (max(short, round(image.width * scale)), max(short, round(image.height * scale)))
    return crop(image.resize(resized, by), size, rng)


def flowar_crop(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """FlowAR's crop: as VAR's, resized bilinearly, and a flip in training."""
    return mirror(var_crop(image, size, rng, Image.Resampling.BILINEAR), rng)


def crop(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """A random square of a picture that is at least as large; without rng the centre."""
    free_x, free_y = image.width - size, image.height - size
    left, top = (rng.randint(0, free_x), rng.randint(0, free_y)) if rng else (free_x // 2, free_y // 2)
    return image.crop((left, top, left + size, top + size))


def centre_crop(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """The centre crop, and a flip in training: for CIFAR-10, and wherever a random crop would enlarge small images."""
    return mirror(adm_crop(image, size, None), rng)


def mirror(image: Image.Image, rng: random.Random | None) -> Image.Image:
    """In training, every other image flipped."""
    flip = rng is not None and rng.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def shift_and_rotate(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """Digits: turned by up to 10° and shifted by up to a sixteenth of the side; black comes in at the edges."""
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if rng is None:
        return image
    reach = size / 16
    shift = (rng.uniform(-reach, reach), rng.uniform(-reach, reach))
    return image.rotate(rng.uniform(-10, 10), resample=Image.Resampling.BILINEAR, translate=shift)  # type: ignore[arg-type]

"""One image: read without trust, made upright RGB, and cropped as training or evaluation sees it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps

View = Callable[[Image.Image, int, random.Random | None], Image.Image]  # size; no rng: the evaluation view

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # of a file: a small one can claim to unpack to gigabytes
MAX_ASPECT = 100  # longer side over shorter: the crop scales the shorter one up


# ------------------------------------------------------------------------------------------------- reading


class BadImage(ValueError):
    """An image file that cannot be used: its path, and why, in a line."""

    def __init__(self, message: str):
        # A loader's worker hands over its whole traceback as the message: the last line says it.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.BadImage: "))


class SkipBad:
    """--on_bad_image skip: bad images are listed in a file, which loaders of all ranks share, up to a share of all."""

    def __init__(self, record: Path, limit: float):
        self.record, self.limit = record, limit

    def note(self, error: BadImage, images: int) -> None:
        """List a bad image, once. Raises BadImage when there are too many."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with self.record.open("a+", encoding="utf-8") as file:
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


def read_image(path: str) -> Image.Image:
    """An RGB picture, upright as its EXIF says. Raises BadImage."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS / 1e6:.0f} million")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(
                    f"{image.width} × {image.height} pixels: one side is over {MAX_ASPECT} times the other"
                )
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits a channel (mode {image.mode})")
            upright = ImageOps.exif_transpose(image)
            if "transparency" in upright.info:
                upright = upright.convert("RGBA")  # a palette's transparent colour keeps its own red, green and blue
            return upright.convert("RGB")
    except Exception as error:  # whatever a decoder raises is this file's fault
        raise BadImage(f"cannot use the image {path}: {error}") from None


def problem(path: str) -> str:
    """What is wrong with an image file; empty when nothing is."""
    try:
        read_image(path)
    except BadImage as error:
        return str(error)
    return ""


# -------------------------------------------------------------------------------------------------- views


def adm_crop(image: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """ImageNet's crop. Training: short side drawn from [size, ⌈size/0.88⌉], random crop, flip; else centre crop."""
    short = rng.randint(size, math.ceil(size / 0.88)) if rng else size
    while min(image.size) >= 2 * short:  # halving by box first keeps the bicubic step free of aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    resized = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    free_x, free_y = image.width - size, image.height - size
    left, top = (rng.randint(0, free_x), rng.randint(0, free_y)) if rng else (free_x // 2, free_y // 2)
    return mirror(image.crop((left, top, left + size, top + size)), rng)


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
    return image.rotate(rng.uniform(-10, 10), resample=Image.Resampling.BILINEAR, translate=shift)

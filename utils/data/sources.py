"""Sources of examples: folders, digits, CIFAR-10, Hub data sets, ImageNet's tar files. A new one is a line in SOURCES.

A source is a sequence of (PIL image, class id) with the names of its classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from utils.config.training import DataConfig
from utils.data.hub import check_hub, open_hub
from utils.data.imagenet_tar import check_tars, open_tar
from utils.data.images import View, adm_crop, centre_crop, flowar_crop, shift_and_rotate, var_crop
from utils.runtime.entry import notice
from utils.runtime.files import digest_of_stats
from utils.runtime.image_files import ClassFolders, class_names_in, flat_hint, name_left_out, walk_images

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


class Source(Protocol):
    """Images of a split, in an order that does not change."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...

    def fingerprint(self) -> str:
        """SHA-256 over the names (or numbers) and labels of the images, in order."""

    def files_digest(self, base: str) -> str:
        """SHA-256 that changes with any image: with its file's size or time of change, or with its pixels."""


@dataclass(frozen=True)
class Kind:
    """A value of --dataset: how it is checked without listing it, and how a split of it is opened."""

    check: Callable[[DataConfig], object]  # raises ValueError
    open: Callable[[DataConfig, str], Source | None]  # "train" or "val"; None when there is nothing held out
    view: View | None = None  # of an image in training; None: by --augment


AUGMENTS: dict[str, View] = {"crop": adm_crop, "flip": centre_crop, "var": var_crop, "flowar": flowar_crop}


def lines_digest(lines: Sequence[tuple[object, int]]) -> str:
    """SHA-256 over names and labels."""
    total = hashlib.sha256()
    for name, label in lines:
        total.update(f"{name} {label}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


# ------------------------------------------------------------------------------------------- in memory


class InMemory:
    """Pictures that are few enough to hold."""

    def __init__(self, pairs: Any, classes: list[str]):
        self.pairs, self.classes = pairs, classes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pairs[index]

    def fingerprint(self) -> str:
        return lines_digest([(i, label) for i, (_, label) in enumerate(self.pairs)])

    def files_digest(self, base: str) -> str:
        total = hashlib.sha256()
        for image, _ in self.pairs:
            total.update(image.tobytes())
        return total.hexdigest()


@lru_cache
def digits(train: bool) -> list[tuple[Image.Image, int]]:
    """scikit-learn's 1,797 handwritten digits: 1,300 to train on, 497 held out, each class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(
        data.images, data.target, train_size=1300, random_state=0, stratify=data.target
    )  # images train, val; labels train, val
    images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
    pictures = np.round(images * (255 / 16)).astype(np.uint8)
    return [(Image.fromarray(p), int(label)) for p, label in zip(pictures, labels, strict=True)]


def open_digits(config: DataConfig, split: str) -> InMemory:
    return InMemory(digits(split == "train"), [str(d) for d in range(10)])


def cifar10(folder: str, training: bool) -> CIFAR10:
    """CIFAR-10, its files checked against their digests. Raises ValueError when they are not as they should be."""
    from torchvision import datasets  # as long to import as all else that an entry needs

    try:
        return datasets.CIFAR10(folder, train=training)
    except RuntimeError:
        fetch = f"torchvision.datasets.CIFAR10({folder!r}, download=True)"
        raise ValueError(f"no CIFAR-10 in {folder}, or not all of it: {fetch} fetches it") from None


def open_cifar10(config: DataConfig, split: str) -> InMemory:
    found = cifar10(config.data_path, split == "train")
    return InMemory(found, found.classes)


# ---------------------------------------------------------------------------------------------- folders


class Folders(ClassFolders):
    """FOLDER/<class>/<image files>."""

    def fingerprint(self) -> str:
        return lines_digest([(Path(name).name, label) for name, label in self.samples])

    def files_digest(self, base: str) -> str:
        return digest_of_stats([path for path, _ in self.samples], base)


def check_folders(config: DataConfig) -> None:
    train = Path(config.data_path) / "train"
    if not train.is_dir():
        raise ValueError(f"no directory {train}{flat_hint(train.parent, train / 'all')}")
    classes = class_names_in(train)
    if not classes:
        raise ValueError(f"{train} holds no class folders{flat_hint(train, train / 'all')}")
    if not walk_images(train / classes[0]).images:
        raise ValueError(f"no images in {train / classes[0]}: --data_path must hold train/<class>/<image files>")


def open_folders(config: DataConfig, split: str) -> Folders | None:
    folder = Path(config.data_path) / split
    if split != "train" and not folder.is_dir():
        return None
    source = Folders(folder)
    if source.left_out:
        notice(name_left_out(source.left_out))
    if source.classes != class_names_in(folder.parent / "train"):
        raise ValueError(f"the classes in {folder} are not those in {folder.parent / 'train'}")
    return source


SOURCES = {
    "folder": Kind(check_folders, open_folders),
    "digits": Kind(lambda config: None, open_digits, shift_and_rotate),
    "cifar10": Kind(lambda config: open_cifar10(config, "train"), open_cifar10, centre_crop),
    "hub": Kind(check_hub, open_hub),
    "imagenet_tar": Kind(check_tars, open_tar),
}

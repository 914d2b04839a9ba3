"""Data sets and the stateless sampler.

An example is named by (epoch, index): which one comes at which step, and how it is augmented, is a function of the
seed alone, so a run can stop anywhere and go on, on any number of ranks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.scales import ScaleSchedule
from models.tokenizer import Tokenizer, from_bytes
from utils.config.training import DataConfig
from utils.data.images import SkipBad, View
from utils.data.sources import AUGMENTS, SOURCES, Source
from utils.runtime.entry import refuse_inside
from utils.runtime.image_files import BadImage
from utils.runtime.process import become_worker, cores

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class CodeBatch:
    """A batch as training sees it: class ids (B,) and the codes of every side, {s: (B, s²)}."""

    labels: Tensor
    codes: dict[int, Tensor]

    def tokens(self, schedule: ScaleSchedule) -> Tensor:
        """The codes of a schedule's scales, one after the other (B, L)."""
        return torch.cat([self.codes[s] for s in schedule.sides], dim=1)


def encode_batch(
    vae: Tokenizer, images: Tensor, labels: Tensor, schedule: ScaleSchedule, supervision: str = "latent"
) -> CodeBatch:
    """Images (B, 3, H, W) → their codes at the sides of a schedule: see `Tokenizer.tokenize`."""
    return CodeBatch(labels, vae.tokenize(images, schedule.sides, supervision))


# ------------------------------------------------------------------------------------------------- data sets


class Examples(Protocol):
    """A split to train on or to validate with: of images, or of cached codes, by (epoch, index)."""

    classes: list[str]
    record: dict[str, object]  # what a run on it cannot change: see `Loop.invariants`

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key, /) -> Any: ...


class ImageDataset(Dataset):
    """(epoch, index) → the image of that index as that epoch sees it, (3, size, size) in [-1, 1], and its label."""

    def __init__(
        self,
        source: Source,
        classes: list[str],
        view: View,
        size: int,
        seed: int,
        training: bool,
        skip: SkipBad | None = None,
        record: Mapping[str, object] | None = None,
    ):
        """`record` names what a run on these images cannot change: see `Loop.invariants`."""
        self.source, self.classes = source, classes
        self.view, self.size = view, size
        self.seed, self.training = seed, training
        self.skip, self.record = skip, dict(record or {})

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        pixels, label = self.pixels(index, [epoch])
        return from_bytes(pixels[0]), label

    def pixels(self, index: int, epochs: Sequence[int]) -> tuple[Tensor, int]:
        """An image, read once, as several epochs see it (epochs, 3, size, size) uint8, and its label."""
        image, label = self.read(index)
        image, pixels = image.convert("RGB"), []
        for epoch in epochs:
            rng = random.Random(f"view/{self.seed}/{epoch}/{index}") if self.training else None
            pixels.append(np.array(self.view(image, self.size, rng)))  # (size, size, 3)
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label; with `skip`, those of the next good one where it is bad."""
        if self.skip is None:
            return self.source[index]
        for place in range(index, index + len(self)):
            try:
                return self.source[place % len(self)]
            except BadImage as error:
                self.skip.note(error, len(self))
        raise BadImage("no image can be read")


class AsBytes(Dataset):
    """Images as a loader hands them over, (B, 3, size, size) uint8, and labels (B,): a quarter of what floats take.

    `from_bytes` makes floats of them, on the device; `Tokenizer.tokenize` takes them as they are.
    """

    def __init__(self, views: ImageDataset):
        self.views = views

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        pairs = [self.views.pixels(index, [epoch]) for epoch, index in keys]
        return torch.cat([pixels for pixels, _ in pairs]), torch.tensor([label for _, label in pairs])

    def __len__(self) -> int:
        return len(self.views)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch


def check_dataset(config: DataConfig) -> None:
    """Checks that the training data lie where the flags say, without listing them all. Raises ValueError."""
    if config.dataset != "digits" and not config.data_path:
        raise ValueError(f"--data_path is missing: where does the data set {config.dataset!r} lie?")
    SOURCES[config.dataset].check(config)


def open_dataset(config: DataConfig, size: int, seed: int, split: str, directory: Path = Path()) -> ImageDataset | None:
    """The training ("train") or held-out ("val") part of a data set; None when nothing is held out.

    With --on_bad_image skip, DIRECTORY/bad_images_SPLIT.txt lists the bad ones.
    """
    check_dataset(config)
    kind = SOURCES[config.dataset]
    source = kind.open(config, split)
    if source is None:
        return None
    listed = directory / f"bad_images_{split}.txt"
    skip = SkipBad(listed, config.bad_image_limit) if config.on_bad_image == "skip" else None
    view, record = kind.view or AUGMENTS[config.augment], {"dataset": config.dataset, "augment": config.augment}
    return ImageDataset(source, source.classes, view, size, seed, split == "train", skip, record)


def open_splits(config: DataConfig, size: int, seed: int, directory: Path) -> tuple[ImageDataset, ImageDataset | None]:
    """Both parts of a data set, for a run that writes to `directory`, which must not lie among the images."""
    folders = [Path(config.data_path, split) for split in ("train", "val")] if config.data_path else []
    refuse_inside(directory, "the output directory", *folders)
    train, val = (open_dataset(config, size, seed, split, directory) for split in ("train", "val"))
    return train, val


def linspace_indices(n: int, total: int) -> list[int]:
    """n places, evenly over a split of `total` images: the first of class folders would be of the first classes."""
    return [i * total // n for i in range(n)]


def plain_batches(views: ImageDataset, n: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """At most n images, not augmented and evenly over the split, `size` at a time: (B, 3, H, W) and labels (B,)."""
    plain = copy(views)
    plain.training = False
    places = linspace_indices(min(n, len(plain)), len(plain))
    for start in range(0, len(places), size):
        pairs = [plain[0, i] for i in places[start : start + size]]
        yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def plain_images(views: ImageDataset, n: int) -> tuple[Tensor, Tensor]:
    """All of `plain_batches` at once."""
    return next(plain_batches(views, n, n))


# --------------------------------------------------------------------------------------------------- order


class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one rank from `start` to the last step, in order.

    The data are one endless sequence of epochs, each a permutation drawn from (seed, epoch). Step t takes the next
    `batch` examples of it; micro-batch j of the step takes the j-th share, and goes to rank j mod world. So ranks
    never overlap, and the batch of a step does not depend on how many ranks there are.
    """

    def __init__(
        self, size: int, seed: int, batch: int, micro_batch: int, rank: int, world: int, start: int, total: int
    ):
        self.size, self.seed, self.batch, self.micro_batch = size, seed, batch, micro_batch
        self.rank, self.world, self.start, self.total = rank, world, start, total
        self.accumulate = accumulation(batch, micro_batch, world)
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)

    def key(self, position: int) -> Key:
        """The example at a position of the endless sequence."""
        epoch, place = divmod(position, self.size)
        return epoch, int(self.order(epoch)[place])

    def __len__(self) -> int:
        return (self.total - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.total):
            for a in range(self.accumulate):
                first = step * self.batch + (a * self.world + self.rank) * self.micro_batch
                yield [self.key(p) for p in range(first, first + self.micro_batch)]


def accumulation(batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches of one rank in a step: batch = micro_batch × ranks × accumulation."""
    if micro_batch < 1 or batch % (micro_batch * world):
        raise ValueError(f"--bs {batch} is not --micro_batch {micro_batch} × {world} ranks × a whole number")
    return batch // (micro_batch * world)


def loader_workers(wanted: int) -> int:
    """Loader processes of a rank: as many as wanted, or for -1 the cores that the ranks of this node leave, up to 8."""
    if wanted >= 0:
        return wanted
    return min(8, max(0, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1))


def make_loader(dataset: Any, sampler: Sampler | Sequence[list[Key]], workers: int, device: torch.device) -> DataLoader:
    """Batches (images of bytes or codes, labels) in the sampler's order. For `workers` see `loader_workers`."""
    workers = loader_workers(workers)
    dataset = AsBytes(dataset) if isinstance(dataset, ImageDataset) else dataset
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=getattr(dataset, "collate", None),  # a data set that reads whole batches has its own
        num_workers=workers,
        worker_init_fn=become_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator]:
    """The batches of a loader. However the block ends, its worker processes have ended when it has."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        end_workers = getattr(batches, "_shutdown_workers", None)  # else it happens whenever nothing holds the iterator
        if end_workers is not None:
            end_workers()

"""Sources of images: sample files, folders, the generator. Each is a sequence of uint8 batches by index."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.config.sampling import EvalConfig
from utils.data.hub import is_hub, open_named
from utils.data.images import adm_crop
from utils.evaluations.c2i.features import Extractor
from utils.runtime.entry import notice
from utils.runtime.files import digest_of_stats, read_array, replacing
from utils.runtime.image_files import image_size, name_left_out, read_image, walk_images


class ImageSource(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: range) -> Tensor:
        """(n, 3, H, W) uint8."""


class NpzImages:
    """`arr_0` (N, H, W, 3) uint8 of an npz file, as the guided-diffusion evaluator reads and writes them."""

    def __init__(self, path: Path):
        self.path = path
        self.array = npz_array(path, "arr_0")
        if self.array is None:
            raise ValueError(f"{path} has no arr_0")
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            found = f"{self.array.dtype} {self.array.shape}"
            raise ValueError(f"arr_0 of {path} must be uint8 (N, H, W, 3), not {found}")

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, indices: range) -> Tensor:
        part = np.array(self.array[indices.start : indices.stop])  # a copy: the file is mapped read-only
        return torch.from_numpy(part).permute(0, 3, 1, 2)


def npz_array(path: Path, name: str) -> np.ndarray | None:
    """One array of an npz file, mapped from disk when it is stored uncompressed; None when there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                with archive.open(info) as member:
                    return np.lib.format.read_array(member, allow_pickle=False)
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2")
            start = info.header_offset + 30 + int(name_length) + int(extra_length)
            file.seek(start)
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[version](file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            order = "F" if fortran else "C"
            if not shape:
                return np.fromfile(file, dtype, count=1).reshape(())
            return np.memmap(path, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload]
    except Exception as error:  # whatever a reader raises is this file's fault
        raise ValueError(f"cannot read {path} as an npz file: {error}") from None


class Pictures(ABC):
    """Pictures of a folder or a data set, centre-cropped when a size is given.

    They come in a permutation of their order there, drawn from `seed`: the Inception Score splits runs of consecutive
    images, which in the order of class folders would be of few classes. Without a size all must have one, or
    ValueError is raised.
    """

    def __init__(self, named: str | Path, names: Sequence, size: int, seed: int):
        """`names` are what `read` and `size_of` take."""
        if not len(names):
            raise ValueError(f"{named} holds no images")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        self.files = [names[i] for i in order]
        self.named, self.size, self.pool = named, size, ThreadPoolExecutor(8)  # whose threads decode at once
        if not size:
            self.check_sizes(names)

    @abstractmethod
    def read(self, name: Any) -> Image.Image:
        """A picture, upright and RGB."""

    @abstractmethod
    def size_of(self, name: Any) -> tuple[int, int]:
        """Width and height of that picture."""

    def check_sizes(self, names: Sequence) -> None:
        """Raises ValueError unless all images are of one size: all, so that no batch size changes the verdict."""
        (width, height), first = self.size_of(names[0]), names[0]
        for name, size in zip(names, self.pool.map(self.size_of, names), strict=True):
            if size != (width, height):
                different = f"{first} is {width}×{height}, {name} {size[0]}×{size[1]}"
                raise ValueError(
                    f"the images in {self.named} differ in size: give --image_size to crop them ({different})"
                )

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: range) -> Tensor:
        arrays = self.pool.map(self.pixels, (self.files[i] for i in indices))
        return torch.from_numpy(np.stack(list(arrays))).permute(0, 3, 1, 2).contiguous()

    def pixels(self, name: Any) -> np.ndarray:
        """A picture (H, W, 3), cropped."""
        image = self.read(name)
        return np.array(adm_crop(image, self.size, None) if self.size else image)


class FolderImages(Pictures):
    """All images below a folder."""

    def __init__(self, folder: Path, size: int = 0, seed: int = 0):
        tree = walk_images(folder)
        if tree.left_out:
            notice(name_left_out(tree.left_out))
        super().__init__(folder, tree.images, size, seed)

    def read(self, name: str) -> Image.Image:
        return read_image(name)

    def size_of(self, name: str) -> tuple[int, int]:
        return image_size(name)


class HubPictures(Pictures):
    """All images of a split of a Hub data set."""

    def __init__(self, named: str, size: int = 0, seed: int = 0):
        self.source = open_named(named)
        super().__init__(named, range(len(self.source)), size, seed)

    def read(self, name: int) -> Image.Image:
        return self.source.picture(name)

    def size_of(self, name: int) -> tuple[int, int]:
        return self.read(name).size


class Resized:
    """Another source at another resolution, by area: real images as an intermediate scale shows them."""

    def __init__(self, source: ImageSource, side: int):
        self.source, self.side = source, side

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: range) -> Tensor:
        images = F.interpolate(self.source.batch(indices).float(), (self.side, self.side), mode="area")
        return images.round().to(torch.uint8)


def fingerprint(path: Path) -> str:
    """SHA-256 over the names, sizes and times of change of a file, or of all images below a folder."""
    if is_hub(str(path)):
        source = open_named(str(path))
        return source.files_digest(str(path.parent))
    files = walk_images(path).images if path.is_dir() else [str(path)]
    return digest_of_stats(files, path.parent)


def describe_images(path: str, config: EvalConfig, extractor: Extractor) -> dict:
    """The invariants of given images' features: change one, and the features are others."""
    described = {"images": path, "image_size": config.image_size, "features": extractor.name, "seed": config.seed}
    return {**described, "images_sha256": fingerprint(Path(path))}


def open_images(path: str | Path, size: int = 0, seed: int = 0) -> ImageSource:
    """An npz file, a folder of images or a Hub data set, these centre-cropped to `size` and in an order of `seed`.

    A Hub data set is `hub:NAME`, or a directory that save_to_disk wrote; `@SPLIT` after it names another split than
    train.
    """
    if is_hub(str(path)):
        return HubPictures(str(path), size, seed)
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, size, seed)
    if not path.is_file():
        raise ValueError(f"no file or folder {path}")
    return NpzImages(path)


def write_npz(parts: Sequence[Path], path: Path) -> None:
    """Join .npy files of images (n, H, W, 3) into the npz that the guided-diffusion evaluator takes."""
    shapes = [read_array(part, mmap=True).shape for part in parts]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(s[0] for s in shapes), *shapes[0][1:])}
    with (
        replacing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(read_array(part).tobytes())

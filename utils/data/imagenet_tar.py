"""ImageNet in its two tar files, as they are downloaded: an index of the members once, then random reads.

DATA_PATH holds ILSVRC2012_img_train.tar (a tar of a tar for each class) and, to hold images out, ILSVRC2012_img_val.tar
with either ILSVRC2012_devkit_t12.tar.gz or val_classes.txt (lines of "file class"). The index lies beside a tar, or in
~/.cache/sar where that cannot be written.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.runtime.entry import notice
from utils.runtime.files import digest_of_stats, read_arrays, save_arrays
from utils.runtime.image_files import BadImage, read_image

if TYPE_CHECKING:
    from utils.config.training import DataConfig

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, LIST = "ILSVRC2012_devkit_t12.tar.gz", "val_classes.txt"
CACHE = Path.home() / ".cache/sar"
VERSION = 1
COLUMNS = {"starts": 1, "sizes": 2, "inner": 3}  # of the rows that `index_of` finds


class TarImages:
    """Images of a tar file, read where they lie, in the order of class folders."""

    def __init__(self, path: Path, index: dict[str, np.ndarray], labels: np.ndarray, classes: list[str]):
        self.path, self.classes = path, classes
        order = np.lexsort((index["names"], labels))
        self.starts, self.sizes, self.labels = index["starts"][order], index["sizes"][order], labels[order]
        self.file: int | None = None  # of this process: see `__getstate__`

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        data = os.pread(self.file, int(self.sizes[index]), int(self.starts[index]))
        if len(data) != self.sizes[index]:
            raise BadImage(f"cannot use the image {index} of {self.path}: the file ends within it")
        return read_image(io.BytesIO(data), name=f"{index} of {self.path}"), int(self.labels[index])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None}  # a worker opens the file itself

    def fingerprint(self) -> str:
        total = hashlib.sha256("\n".join(self.classes).encode())
        for column in (self.starts, self.sizes, self.labels):
            total.update(column.astype("<i8").tobytes())
        return total.hexdigest()

    def files_digest(self, base: str) -> str:
        return digest_of_stats([str(self.path)], base)


def members(path: Path, start: int = 0, size: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of every file in a tar, or in one that lies in a file from `start` on."""
    with path.open("rb") as file:
        whole: io.BufferedIOBase | Part = Part(file, start, size) if size else file
        try:
            with tarfile.open(fileobj=whole, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if member.isfile():
                        yield member.name, start + member.offset_data, member.size
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no whole tar file: {error}") from None


class Part(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def read(self, n: int = -1) -> bytes:
        n = self.size - self.at if n < 0 else min(n, self.size - self.at)
        self.file.seek(self.start + self.at)
        found = self.file.read(max(0, n))
        self.at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + {0: 0, 1: self.at, 2: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def index_of(path: Path) -> dict[str, np.ndarray]:
    """Names, starts and sizes of the images of a tar file, and the number of the tar within it that each lies in."""
    stat, key = path.stat(), hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    places = [path.with_name(f"{path.name}.index.npz"), CACHE / f"{key}.index.npz"]
    stamp = np.array([VERSION, stat.st_size, stat.st_mtime_ns])
    for place in filter(Path.is_file, places):
        found = read_arrays(place)
        if np.array_equal(found.get("stamp"), stamp):
            return found
    notice(f"listing {path}, once")
    rows: list[tuple[str, int, int, int]] = []  # name, start, size, number of the tar within
    tars: list[str] = []
    outer = list(members(path))
    nested = [found for found in outer if found[0].endswith(".tar")]
    for name, start, size in tqdm(nested or [("", 0, 0)], desc=path.name, unit="tar"):
        for file, at, length in members(path, start, size) if nested else outer:
            rows.append((file, at, length, len(tars)))
        tars.append(Path(name).stem)
    found = {
        "stamp": stamp, "names": np.array([os.fsencode(row[0]) for row in rows]), "tars": np.array(tars),
        **{name: np.array([row[i] for row in rows], dtype=np.int64) for name, i in COLUMNS.items()},
    }  # fmt: skip
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(place, found)
            break
        except OSError:  # a data set that cannot be written to: the other place
            continue
    return found


def check_tars(config: DataConfig) -> None:
    path = Path(config.data_path) / TRAIN
    if not path.is_file():
        raise ValueError(f"no {path}: --dataset imagenet_tar reads ImageNet's tar files as they are downloaded")


def open_tar(config: DataConfig, split: str) -> TarImages | None:
    folder = Path(config.data_path)
    found = index_of(folder / TRAIN)
    order = np.argsort(found["tars"], kind="stable")  # classes in the order of their sorted names
    classes = found["tars"][order].tolist()
    if not len(found["names"]) or classes == [""]:
        raise ValueError(f"{folder / TRAIN} holds no tar files of classes")
    if split == "train":
        rank = np.argsort(order)  # number of a tar in the file → class id
        return TarImages(folder / TRAIN, found, rank[found["inner"]], classes)
    if not (folder / VAL).is_file():
        return None
    names = validation_classes(folder)
    if names is None:
        notice(f"{folder / VAL} is left out: neither {DEVKIT} nor {LIST} beside it says its classes")
        return None
    index, ids = index_of(folder / VAL), {name: i for i, name in enumerate(classes)}
    try:
        labels = np.array([ids[names[Path(os.fsdecode(name)).name]] for name in index["names"].tolist()])
    except KeyError as error:
        raise ValueError(
            f"{folder / VAL}: {error} is in no list of classes, or not among the training classes"
        ) from None
    return TarImages(folder / VAL, index, labels, classes)


def validation_classes(folder: Path) -> dict[str, str] | None:
    """File of the validation set → its class (WordNet id); None when no list says so."""
    if (folder / LIST).is_file():
        found: dict[str, str] = {}
        for number, line in enumerate((folder / LIST).read_text(encoding="utf-8-sig").splitlines(), start=1):
            words = line.split()
            if words and len(words) != 2:
                raise ValueError(f"{folder / LIST}, line {number}: lines are of a file and its class, not {line!r}")
            if words:
                found[words[0]] = words[1]
        return found
    if not (folder / DEVKIT).is_file():
        return None
    from scipy.io import loadmat

    parts = {}
    with tarfile.open(folder / DEVKIT) as archive:
        for member in archive:
            if member.name.endswith(("meta.mat", "validation_ground_truth.txt")):
                parts[Path(member.name).name] = archive.extractfile(member).read()
    synsets = loadmat(io.BytesIO(parts["meta.mat"]), squeeze_me=True)["synsets"]
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    numbers = parts["ILSVRC2012_validation_ground_truth.txt"].decode().split()
    return {f"ILSVRC2012_val_{i:08d}.JPEG": wnids[int(n)] for i, n in enumerate(numbers, start=1)}

"""The one reader of pictures and the one walker of folders: whatever sees a user's images sees them through these."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # of a file: a small one can claim to unpack to gigabytes
MAX_ASPECT = 100  # longer side over shorter: the crop scales the shorter one up
ORIENTATION = 0x0112  # EXIF tag; from 5 on the picture lies on its side
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
LEFT_OUT = "__MACOSX"  # what macOS adds to archives; hidden folders are left out, too


# ------------------------------------------------------------------------------------------------- reading


class BadImage(ValueError):
    """An image file that cannot be used: its path, and why, in a line."""

    def __init__(self, message: str):
        # A loader's worker hands over its whole traceback as the message: the last line says it.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.BadImage: "))


def read_image(file: str | Path | BinaryIO, background: str = "white", name: str = "") -> Image.Image:
    """An RGB picture, upright as its EXIF says, transparent parts over `background`. Raises BadImage, with its name."""
    try:
        with Image.open(file) as image:
            return upright_rgb(image, background)
    except Exception as error:  # whatever a decoder raises is this file's fault
        raise BadImage(f"cannot use the image {name or file}: {error}") from None


def upright_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """`read_image` of a picture that is open. Raises ValueError for more than 8 bits a channel, bombs and strips."""
    check_size(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits a channel (mode {image.mode})")
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def read_mask(path: str | Path) -> Image.Image:
    """A mask (mode L): bright where it is white and opaque. Raises BadImage."""
    return read_image(path, background="black").convert("L")


def check_size(image: Image.Image) -> None:
    """Raises ValueError for a picture that is too large or too narrow to be one."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS / 1e6:.0f} million")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} × {image.height} pixels: one side is more than {MAX_ASPECT} times the other")


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `read_image` will give, from the file's header. Raises BadImage."""
    try:
        with Image.open(path) as image:
            check_size(image)
            size = image.size
            return size[::-1] if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else size
    except Exception as error:  # whatever a decoder raises is this file's fault
        raise BadImage(f"cannot use the image {path}: {error}") from None


def problem(path: str) -> str:
    """A line on what is wrong with an image file; empty when nothing is."""
    try:
        read_image(path)
    except BadImage as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------- walking


@dataclass
class Tree:
    """The files below a folder, symbolic links followed, in torchvision's order."""

    images: list[str] = field(default_factory=list)  # paths
    others: Counter[str] = field(default_factory=Counter)  # suffix → files that are no images
    left_out: list[str] = field(default_factory=list)  # hidden folders and files, and __MACOSX


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == LEFT_OUT


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, or the name when it has none."""
    return os.path.splitext(name)[1].lower() or name


def walk_images(folder: str | Path) -> Tree:
    """Finds the images below a folder."""
    tree = Tree()
    for directory, files in sorted(walk_folders(str(folder), tree.left_out, ())):
        for name in sorted(files):
            if is_hidden(name):
                tree.left_out.append(os.path.join(directory, name))
            elif suffix_of(name) in SUFFIXES:
                tree.images.append(os.path.join(directory, name))
            else:
                tree.others[suffix_of(name)] += 1
    return tree


def walk_folders(folder: str, left_out: list[str], above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Every folder below one, with its files. A link to a folder that it lies in is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return
    files = []
    with os.scandir(folder) as entries:
        for found in entries:
            if not found.is_dir():
                files.append(found.name)
            elif is_hidden(found.name):
                left_out.append(found.path)
            else:
                yield from walk_folders(found.path, left_out, (*above, here))
    yield folder, files


def class_names_in(folder: str | Path) -> list[str]:
    """The sorted names of the class folders. Raises ValueError when the folder cannot be read."""
    try:
        return sorted(found.name for found in os.scandir(folder) if found.is_dir() and not is_hidden(found.name))
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None


class FileList(Sequence[tuple[str, int]]):
    """Files of a folder and their class ids, in two arrays and one string of bytes.

    ImageNet's as a list of tuples is 200 MB, and each loader's worker soon has its own, for whoever looks at an object
    writes to it. These are 50 MB, once.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.names, self.ends, self.labels = bytearray(), array("q"), array("i")

    def extend(self, paths: Iterable[str], label: int) -> None:
        """Add files below the folder."""
        for path in paths:
            self.names += os.fsencode(path[len(self.folder) :])
            self.ends.append(len(self.names))
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        """Path and class id of a file; of a slice, a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # counts from the end, and raises IndexError
        start = self.ends[index - 1] if index else 0
        return self.folder + os.fsdecode(bytes(self.names[start : self.ends[index]])), self.labels[index]


class ClassFolders:
    """The images in FOLDER/<class>/ as a sequence of (image, class id), classes in the order of their sorted names.

    Raises ValueError when there are none, or a class has none.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = str(folder)
        self.classes = class_names_in(folder)
        self.samples = FileList(folder)
        beside = [found for found in os.scandir(folder) if found.name not in self.classes]
        self.left_out = [found.path for found in beside if is_hidden(found.name)]
        self.others = Counter(suffix_of(found.name) for found in beside if not is_hidden(found.name))
        empty = []
        for label, name in enumerate(self.classes):
            check_name(os.path.join(folder, name))
            tree = walk_images(os.path.join(folder, name))
            self.samples.extend(tree.images, label)
            self.left_out += tree.left_out
            self.others += tree.others
            empty += [] if tree.images else [name]
        if not self.classes:
            raise ValueError(f"{folder} holds no class folders{flat_hint(folder, Path(folder) / 'all')}")
        if empty:
            raise ValueError(f"{folder} holds no images of the class{'es' * (len(empty) > 1)} {', '.join(empty[:5])}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def flat_hint(folder: str | Path, place: Path) -> str:
    """Hint for a folder without class folders: images that lie in it make one class, in `place`."""
    folder = Path(folder)
    flat = folder.is_dir() and any(suffix_of(found.name) in SUFFIXES for found in os.scandir(folder) if found.is_file())
    if flat:
        return f": for images without classes, move them to {place}/, one class"
    return f": it must be {place.parent}/<class>/<image files>"


def check_name(path: str) -> None:
    """Raises ValueError for a name whose bytes are not UTF-8: it could be written to no record of the run."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of {os.fsencode(path)!r} is not UTF-8: rename it") from None


def name_left_out(left_out: list[str]) -> str:
    """A line that names what the walker left out; empty when that is nothing."""
    if not left_out:
        return ""
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"left out, being hidden: {', '.join(left_out[:3])}{more}"

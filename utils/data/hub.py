"""Hub data sets, by the `datasets` library: from the Hub, a local copy of one, or what `save_to_disk` wrote.

Map-style: an image is read by its index, so that order, resume and ranks are those of folders.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from utils.config.sampling import split_named_in
from utils.runtime.entry import notice
from utils.runtime.files import digest_of_stats
from utils.runtime.image_files import BadImage, read_image

if TYPE_CHECKING:
    from utils.config.training import DataConfig

HELD_OUT = ("validation", "val", "valid", "test")  # names of the split that is held out, the first that is there
NO_CLASSES = "none"  # value of --label_column: all images are of one class
GATED = re.compile(r"gated|authenticat|40[13] client error|client error .40[13]")


class NoLabels(ValueError):
    """No image of a split has a label."""


def library() -> Any:
    """The `datasets` module. Raises ValueError when it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset hub needs the library `datasets`: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def saved_to_disk(path: str | Path) -> bool:
    """True for a directory that `save_to_disk` wrote."""
    path = Path(path)
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def splits_of(name: str) -> dict[str, Any]:
    """Split → a function that opens it. Raises ValueError with what to do when there is none."""
    datasets = library()
    if saved_to_disk(name):
        found = datasets.load_from_disk(name)
        found = found if isinstance(found, dict) else {"train": found}
        return {split: (lambda data=data: data) for split, data in found.items()}
    try:
        names = datasets.get_dataset_split_names(name)
        return {split: (lambda split=split: datasets.load_dataset(name, split=split)) for split in names}
    except Exception as error:  # of the Hub, the file system, a reader: each has its own
        raise ValueError(f"cannot open the Hub data set {name}: {said(error)}") from None


def said(error: Exception) -> str:
    """A line on what went wrong, and what to do."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lowered = text.lower()
    if GATED.search(lowered):
        return f"{text}. It is gated: accept its terms on the Hub, then log in by `hf auth login` or set HF_TOKEN"
    if any(word in lowered for word in ("offline", "connect", "resolve", "reach")):
        return f"{text}. Without a network, give --data_path a directory that Dataset.save_to_disk wrote"
    return text


def split_named(name: str, split: str) -> Any:
    """The training or the held-out split of a data set; None when nothing is held out."""
    found = splits_of(name)
    if split == "train":
        if "train" not in found:
            raise ValueError(f"{name} has no split train, only {', '.join(found)}")
        wanted = "train"
    else:
        wanted = next((n for n in HELD_OUT if n in found), split if split in found else "")
        if not wanted:
            return None
    try:
        return found[wanted]()
    except Exception as error:
        raise ValueError(f"cannot open the split {wanted} of {name}: {said(error)}") from None


def is_hub(named: str) -> bool:
    """True for `hub:NAME`, and for a directory that `save_to_disk` wrote; `@SPLIT` may follow."""
    return named.startswith("hub:") or saved_to_disk(split_named_in(named)[0])


def open_named(named: str) -> HubImages:
    """The images of a split, train unless `@SPLIT` names another, whatever their classes."""
    name, split = split_named_in(named.removeprefix("hub:"))
    found, split = splits_of(name), split or "train"
    if split not in found:
        raise ValueError(
            f"{name} has no split {split}, only {', '.join(found)}: name one as {name}@{next(iter(found))}"
        )
    return HubImages(found[split](), named, label_column=NO_CLASSES)


class HubImages:
    """A split of a data set as a source: see `utils.data.sources`. `classes` are those of the training split."""

    def __init__(
        self, data: Any, name: str, image_column: str = "", label_column: str = "", classes: list[str] | None = None
    ):
        datasets = library()
        self.name, features = name, data.features
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        self.image = image_column or only(
            [column for column, kind in kinds.items() if kind == "Image"], "image", name, "--image_column"
        )
        label = label_column or only(
            [column for column, kind in kinds.items() if kind == "ClassLabel"], "label", name, "--label_column"
        )
        for column in (self.image, label):
            if column not in features and column != NO_CLASSES:
                raise ValueError(f"{name} has no column {column!r}, only {', '.join(features)}")
        if label == NO_CLASSES:
            self.classes, self.labels = ["all"], np.zeros(len(data), dtype=np.int64)
        else:
            values = np.asarray(data.with_format("numpy")[label][:])
            if missing := int(unlabelled(values).sum()):
                kind = NoLabels if missing == len(values) else ValueError
                raise kind(f"{name}: {missing} images have no label (none, or -1) in the column {label!r}")
            self.classes, self.labels = classes_of(features[label], values, label, classes)
        self.data = data.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.picture(index), int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """An image, upright and RGB. Raises BadImage."""
        try:
            found = self.data[int(index)][self.image]
        except Exception as error:  # whatever a reader raises is this row's fault
            raise BadImage(f"cannot read image {index} of {self.name}: {error}") from None
        named = f"{index} of {self.name}"
        if found is None:
            raise BadImage(f"cannot use the image {named}: there is none")
        if found["bytes"] is not None:
            return read_image(io.BytesIO(found["bytes"]), name=named)
        return read_image(found["path"], name=f"{named} ({found['path']})")

    def fingerprint(self) -> str:
        lines = "\n".join([self.name, self.image, *self.classes]).encode()
        return hashlib.sha256(lines + self.labels.astype("<i8").tobytes()).hexdigest()

    def files_digest(self, base: str) -> str:
        files = [file["filename"] for file in self.data.cache_files]
        return digest_of_stats(files, str(Path(files[0]).parent) if files else base)


def only(found: list[str], usual: str, name: str, flag: str) -> str:
    """The one column of a kind, or the one with the usual name. Raises ValueError when that leaves a choice."""
    if len(found) == 1 or usual in found:
        return usual if usual in found else found[0]
    several = f"has several: {', '.join(found)}" if found else "has none that says so"
    more = f", {flag} {NO_CLASSES} for images without classes" if usual == "label" else ""
    raise ValueError(f"which column of {name} is the {usual}? It {several}: name it by {flag}{more}")


def unlabelled(values: np.ndarray) -> np.ndarray:
    """True for each value of a column that is missing, or -1 as in hidden test sets."""
    if values.dtype.kind == "O":
        return np.array([value is None for value in values], dtype=bool)
    if values.dtype.kind == "f":  # whole numbers, of which some are missing
        return np.isnan(values) | (values < 0)
    return values < 0 if values.dtype.kind == "i" else np.zeros(len(values), dtype=bool)


def classes_of(
    feature: Any, values: np.ndarray, column: str, known: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Names of the classes and a label for each image, of a column of class labels, numbers or names.

    The classes are those that are `known`, where they are given. Raises ValueError for one that is not.
    """
    names = getattr(feature, "names", None)
    if names is not None:
        if known is not None and list(names) != known:
            raise ValueError(f"the classes of the held-out column {column!r} are not those of the training split")
        return list(names), values.astype(np.int64)
    numbers = values.dtype.kind in "iu"
    if not numbers and not (values.dtype.kind in "UO" and all(isinstance(value, str) for value in values)):
        raise ValueError(f"the column {column!r} holds {values.dtype}: labels are class labels, whole numbers or names")
    distinct, places = np.unique(values if numbers else values.astype(str), return_inverse=True)
    text = [str(value) for value in distinct]
    every = known
    if every is None:
        every = [str(i) for i in range(int(distinct.max(initial=-1)) + 1)] if numbers else text
    ids = {name: i for i, name in enumerate(every)}
    if strange := sorted(set(text) - set(ids)):
        raise ValueError(
            f"the held-out column {column!r} has classes that no training image has: {', '.join(strange[:5])}"
        )
    return every, np.array([ids[name] for name in text], dtype=np.int64)[places]


def check_hub(config: DataConfig) -> None:
    splits_of(config.data_path)


def open_hub(config: DataConfig, split: str) -> HubImages | None:
    data = split_named(config.data_path, split)
    if data is None:
        return None
    columns = config.image_column, config.label_column
    if split == "train":
        return HubImages(data, config.data_path, *columns)
    classes = HubImages(split_named(config.data_path, "train"), config.data_path, *columns).classes
    try:
        return HubImages(data, config.data_path, *columns, classes)
    except NoLabels as error:
        notice(f"the held-out split is left out: {error}")
        return None

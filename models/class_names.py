"""Class names: ImageNet's, a data set's, and finding a class by its name."""

from __future__ import annotations

import csv
import difflib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache


@lru_cache
def imagenet_classes() -> list[str]:
    """The 1,000 ImageNet class names, in the order of the sorted folders; they come with torchvision."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def default_names(num_classes: int) -> list[str]:
    """ImageNet's names for 1,000 classes, else the ids."""
    return imagenet_classes() if num_classes == 1000 else [str(i) for i in range(num_classes)]


def class_names(folders: list[str], num_classes: int) -> list[str]:
    """Names for the samples' captions: the data's, or ImageNet's when the folders are its synsets."""
    if len(folders) == num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return default_names(num_classes)
    return folders + [str(i) for i in range(len(folders), num_classes)]


def find_class(name: str | int, names: Sequence[str]) -> int:
    """A class id from an id or a name: the exact name, else the one that differs in case only.

    Raises ValueError for an unknown name, with the nearest ones, and for one that several classes bear, with their ids.
    """
    text = str(name)
    if isinstance(name, str):
        for same in (str, str.strip, plain_name):
            found = [i for i, known in enumerate(names) if same(known) == same(text)]
            if len(found) == 1:
                return found[0]
            if found:
                ids = ", ".join(f"{i} ({names[i]})" for i in found)
                raise ValueError(f"several classes are named {text!r}: give the id, one of {ids}")
    if re.fullmatch(r"\s*[-+]?[0-9]+\s*", text):
        if not 0 <= int(text) < len(names):
            raise ValueError(
                f"class id {text.strip()} is out of range: this model knows 0…{len(names) - 1}{some(names)}"
            )
        return int(text)
    plain = {plain_name(known): known for known in names}
    near = difflib.get_close_matches(plain_name(text), plain, n=3, cutoff=0.5)
    near = near or [known for known in plain if plain_name(text) and plain_name(text) in known][:3]
    hint = f"; did you mean {', '.join(plain[known] for known in near)}?" if near else ": these are known" + some(names)
    raise ValueError(f"no class is named {text!r}{hint}")


def plain_name(name: str) -> str:
    """A name without spaces at its ends, case, and differences in how letters are composed."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def some(names: Sequence[str], limit: int = 12) -> str:
    """The first names of a list, in brackets, and how many there are."""
    rest = f", … {len(names)} in all" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{rest})"


def split_classes(text: str, names: Sequence[str]) -> list[str]:
    """The classes that a text names: a line is one name as it stands, or several, comma-separated as in CSV."""
    found = []
    known = {plain_name(name) for name in names}
    for line in text.splitlines():
        whole = line in names or plain_name(line) in known
        found += [line] if whole else next(csv.reader([line], skipinitialspace=True), [])
    return [name for name in found if name.strip() or name in names]

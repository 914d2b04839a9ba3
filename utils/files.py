"""Files that are whole or not there, and files that are read without trust.

Tensors, arrays and JSON are read and written here; npz files of images by utils/evaluations/c2i/images.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under. What is there at the end is flushed to disk and takes the place of `path`; after an error
    nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems flush no directories
            raise
    finally:
        os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Readable JSON."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def seal(content: dict) -> dict:
    """The content with its own SHA-256."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def write_sealed(path: Path, content: dict) -> None:
    """JSON that `read_sealed` takes only as it is."""
    write_json(path, seal(content))


def as_json(content: dict) -> dict:
    """What reading it back will give: lists for tuples."""
    return json.loads(json.dumps(content))


def save_array(path: Path, array: np.ndarray) -> None:
    """A .npy file."""
    with replacing(path) as partial:
        np.save(partial, array)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file."""
    with replacing(path) as partial:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)


# ------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote. Raises ValueError when it is anything else."""
    found = read_json(path)
    content = {name: value for name, value in found.items() if name != "sha256"}
    if found != seal(content):
        raise ValueError(f"{path} is damaged: its SHA-256 is another")
    return content


def read_array(path: Path, mmap: bool = False) -> np.ndarray:
    """A .npy file, without executing anything in it. Raises ValueError when it is none."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception as error:  # whatever a reader raises is this file's fault
        raise ValueError(f"{path} is missing or damaged: {error}") from None


def read_tensors(path: Path, mmap: bool = False) -> dict:
    """What a `.safetensors`, `.pth` or `.pt` file holds, without executing anything in it.

    What the file claims to hold is checked against its size before memory is taken. Raises ValueError when it is
    damaged, or not a file of plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not plain(leaf):
                raise ValueError(f"a tensor of shape {tuple(leaf.shape)} has fewer numbers than that")
    except Exception as error:  # whatever a reader raises is this file's fault
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it asks for code to be run, which is refused"
        raise ValueError(f"{path} is missing, damaged or not a file of plain tensors: {reason}") from None
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a .safetensors file, without reading the others. Raises ValueError when it is not there."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except Exception as error:  # whatever a reader raises is this file's fault
        raise ValueError(f"{path} is missing or damaged: {error}") from None


def check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its own size. (Files from before PyTorch 1.6 are no archives.)"""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries claim more than the file holds")


def plain(tensor: Tensor) -> bool:
    """Whether a tensor holds all of its numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

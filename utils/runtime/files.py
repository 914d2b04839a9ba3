"""Files that are whole or not there, and files that are read without trust.

Tensors, arrays and JSON are read and written here; npz files of images by utils/evaluations/c2i/images.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import time
import uuid
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under. What is there at the end is flushed to disk and takes the place of `path`; after an error
    nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{uuid.uuid4().hex[:12]}_{path.name}")  # two writers do not share it
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # NumPy's says nothing but how many bytes were written
            raise OSError(f"cannot write {path}, is the disk full? {error}") from error
        raise
    flush(path.parent)


def remove_stale(directory: Path) -> None:
    """Removes what killed writers left under temporary names more than an hour ago."""
    for left in directory.glob(".partial_*"):
        with suppress(OSError):
            if left.is_file() and time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory, or a link to one. What cannot go now, as a network file system keeps open files, stays."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


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
    """Value that reading it back will give: lists for tuples."""
    return json.loads(json.dumps(content))


def save_array(path: Path, array: np.ndarray) -> None:
    """A .npy file."""
    with replacing(path) as partial:
        np.save(partial, array)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays by name as .npz, whole or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name. Raises ValueError when it cannot be read; pickled objects are not."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # whatever a reader raises is this file's fault
        raise ValueError(f"cannot read {path}: {error}") from None


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
    """Content that `write_sealed` wrote. Raises ValueError when it is anything else."""
    found = read_json(path)
    content = {name: value for name, value in found.items() if name != "sha256"}
    if found != seal(content):
        raise ValueError(f"{path} is damaged: its SHA-256 is another")
    return content


def read_array(path: Path, mmap: bool = False) -> np.ndarray:
    """A .npy file, without executing anything in it. Raises ValueError when it is none."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception as error:  # whatever a reader raises is this file's fault, but that no more files can be opened
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise ValueError(f"{path} is missing or damaged: {error}") from None


def read_tensors(path: Path, mmap: bool = False) -> dict:
    """Content of a safetensors, `.pth` or `.pt` file, whatever its suffix, without executing anything in it.

    What the file claims to hold is checked against its size before memory is taken. Raises ValueError when it is
    damaged, or not a file of plain tensors, and says what it is instead.
    """
    try:
        kind = content_of(path)
        if kind == SAFETENSORS:
            return load_file(path)
        if kind:
            raise ValueError(kind)
        check_archive(path)
        # An open file: of a path, torch would look at the suffix. Namespace: flags beside the weights, without code.
        with path.open("rb") as file, torch.serialization.safe_globals([Namespace]):
            found = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not plain(leaf):
                raise ValueError(f"a tensor of shape {tuple(leaf.shape)} has fewer numbers than that")
    except Exception as error:  # whatever a reader raises is this file's fault
        raise ValueError(f"{path} is missing, damaged or not a file of plain tensors: {reason(error)}") from None
    return found


SAFETENSORS = "safetensors"
FETCH = "fetch the file itself again"
# How a file begins → what it is. None of these is a weight file.
CONTENTS = {
    b"version https://git-lfs": f"it is a Git LFS pointer, which stands for the file: run git lfs pull, or {FETCH}",
    b"<": f"it is a web page (HTML or XML), not the file that was to be downloaded: {FETCH}",
    b"{": f"it is JSON text, an error message perhaps, not the file that was to be downloaded: {FETCH}",
    b"\x1f\x8b": "it is a gzip archive: unpack it first",
    b"BZh": "it is a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "it is an xz archive: unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it first",
    b"Rar!": "it is a RAR archive: unpack it first",
    b"\x89HDF": "it is an HDF5 file: only PyTorch's files and safetensors are read",
    b"GGUF": "it is a GGUF file: only PyTorch's files and safetensors are read",
    b"\x93NUMPY": "it is a NumPy array: only PyTorch's files and safetensors are read",
    b"\x89PNG": "it is a picture",
    b"\xff\xd8\xff": "it is a picture",
}


def content_of(path: Path) -> str:
    """SAFETENSORS, what else than weights a file is, or nothing: then it may be PyTorch's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return f"it is empty: {FETCH}"
    for begin, kind in CONTENTS.items():
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(begin) or head.startswith(begin):
            return kind
    if head[8:9] == b"{":  # the length of a header, and the header
        whole = 8 + int.from_bytes(head[:8], "little") <= size
        return SAFETENSORS if whole else f"it is the beginning of a safetensors file, cut off at {size} bytes: {FETCH}"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"it is the beginning of a PyTorch file, cut off at {size} bytes: {FETCH}"
    if not head.startswith((b"PK", b"\x80")):  # PyTorch's files are zip archives, or of old pickles
        return "it is no weight file, neither one of PyTorch's nor safetensors"
    return ""


def reason(error: Exception) -> str:
    """A reader's complaint in a line."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL ([\w.]+)", text)
        if asked:
            return (
                f"it asks for code to be run, which is refused: it holds an object of {asked[1]}; if you trust the "
                "file, load it with torch.load(…, weights_only=False) and save its state dict alone"
            )
        return "it asks for code to be run, which is refused, or it is no weight file at all"
    if isinstance(error, SafetensorError) and ("incomplete" in text.lower() or "metadata" in text.lower()):
        return f"it is damaged or cut off ({text.splitlines()[0]}): {FETCH}"
    return text.splitlines()[0] if text else type(error).__name__


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
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        some = ", ".join(entry.filename for entry in entries[:3])
        raise ValueError(f"it is a zip archive (of {some}), not one of PyTorch's: unpack it first")
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries claim more than the file holds")


def plain(tensor: Tensor) -> bool:
    """True when a tensor holds all of its numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def digest_of_stats(files: Iterable[str | Path], base: str | Path) -> str:
    """SHA-256 over files' names below `base`, sizes and times of change: another one when any was changed."""
    total = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        name = os.fsencode(os.path.relpath(file, base))
        total.update(b"%s %d %d\n" % (name, stat.st_size, stat.st_mtime_ns))
    return total.hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

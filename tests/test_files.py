import json
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, on_ranks
from tests.faults.harness import small_disk
from utils.runtime.files import (
    read_array,
    read_json,
    read_tensors,
    remove_stale,
    replacing,
    save_array,
    save_tensors,
    write_json,
)
from utils.training.log import JsonLines

# Reads that may execute what they read, or that skip the checks; writes that may leave half a file.
DOORS = re.compile(
    r"torch\.load\(|np\.load\(|load_file\(|safe_open\(|json\.load|np\.save\(|save_file\(|os\.replace\(|pickle\.load"
)
ALLOWED = {
    "utils/runtime/files.py",
    "utils/runtime/checkpoint.py",  # renames whole directories
    "utils/training/log.py",  # reads and writes JSON lines, not a file of them
    "utils/reporting/pictures.py",
    "experiments/figures.py",
    "benchmarks/compare.py",  # reads a line of JSON in printed text
}


def test_there_is_one_door_to_the_disk():
    sources = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "out")]
    found = {str(p.relative_to(ROOT)) for p in sources if DOORS.search(p.read_text(encoding="utf-8"))}
    assert found <= ALLOWED
    assert "utils/runtime/files.py" in found


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new/folder/x.json"
    write_json(path, {"a": "ä"})
    assert read_json(path) == {"a": "ä"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(OSError, match="disk"), replacing(path) as partial:
        fail_after(partial.write_text, "half")
    assert read_json(path) == {"a": "ä"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def fail_after(function, *args):
    function(*args)
    raise OSError("disk")


def test_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    save_array(tmp_path / "x.npy", np.arange(3))
    assert ["partial" in done[0], *done[1:]] == [True, "rename", str(tmp_path)]


def test_round_trips(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(x, tensors[name]) for name, x in read_tensors(tmp_path / "x.safetensors").items())
    save_array(tmp_path / "x.npy", np.arange(5, dtype=np.uint16))
    assert read_array(tmp_path / "x.npy", mmap=True).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_named(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is (missing or )?damaged"):
        read_json(tmp_path / "x.json")


def stretched(path: Path) -> None:
    """One number that claims to be 10^12."""
    torch.save({"model": {"head.weight": torch.zeros(1).expand(10**6, 10**6)}}, path)


def packed(path: Path) -> None:
    """A deflated archive of 200 MB of zeros in 200 KB."""
    torch.save({"model": {"head.weight": torch.zeros(50_000_000)}}, path.with_suffix(".big"))
    with (
        zipfile.ZipFile(path.with_suffix(".big")) as big,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in big.namelist():
            small.writestr(name, big.read(name))
    path.with_suffix(".big").unlink()


def nowhere(path: Path) -> None:
    """A tensor without numbers."""
    torch.save({"model": {"head.weight": torch.empty(10**6, 10**6, device="meta")}}, path)


def code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": print}))


@pytest.mark.parametrize("make", [stretched, packed, nowhere, code])
def test_files_that_claim_more_than_they_hold_are_refused_before_memory_is_taken(make, tmp_path):
    make(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth is missing, damaged or not a file of plain tensors"):
        read_tensors(tmp_path / "x.pth")


def test_arrays_execute_nothing(tmp_path):
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes(b"\x93NUMPY\x01\x00" + json.dumps({}).encode())
    for name in ("x.npy", "y.npy", "z.npy"):
        with pytest.raises(ValueError, match=name):
            read_array(tmp_path / name)


def test_two_writers_of_one_file_do_not_share_a_name(tmp_path):
    path = tmp_path / "x.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the one that ended last, whole
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_what_killed_writers_left_is_removed_and_what_others_are_writing_is_not(tmp_path):
    for name, age in (("old", 7200), ("new", 60)):
        left = tmp_path / f".partial_{name}_x.txt"
        left.touch()
        os.utime(left, (time.time() - age,) * 2)
    remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".partial_new_x.txt"]


def test_a_disk_that_is_full_names_the_file(tmp_path):
    def full():
        small_disk(50_000)()
        with pytest.raises(OSError, match=r"cannot write .*/a\.npy, is the disk full\?"):
            save_array(tmp_path / "a.npy", np.zeros(100_000))
        log = JsonLines(tmp_path / "metrics.jsonl", 0)
        with pytest.raises(OSError, match=r"cannot write .*/metrics\.jsonl"):
            log.scalars({"x" * 60_000: 1.0}, 1)

    on_ranks(1, full)
    assert list(tmp_path.glob("*.npy")) == []

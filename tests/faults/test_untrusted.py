"""11. Mutated files at every entry: an error that names the file, or a load; nothing executed, nothing slow."""

import os
import pickle
import random
import resource
import time

import numpy as np
import pytest
import torch

from models.pipeline import open_pipeline
from models.weights import load_flexvar, load_tokenizer, save_weights
from tests.conftest import ALONE, config_of
from train import build
from utils.config.training import DataConfig
from utils.data.code_cache import CacheConfig, CacheFlags, CodeCache, read_manifest
from utils.data.code_cache import build as build_cache
from utils.evaluations.c2i.features import Inception
from utils.evaluations.c2i.images import open_images
from utils.runtime.checkpoint import MANIFEST, MODEL, STATE, newest_checkpoint, read_checkpoint, verify

PAYLOADS = [b"\x00", b"\xff" * 8, b'{"a":', b"1e999", b"null", b"../../../../etc/passwd", b"[" * 50, "ä".encode()]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: flipped bits, a piece lost, a piece doubled, a number changed, something foreign put in."""
    data, how = bytearray(data), rng.randrange(5)
    if not data:
        return b"\x00"
    place = rng.randrange(min(len(data), rng.choice([16, 2000, len(data)])))  # headers come first
    if how == 0:
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(place, len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[place : place + rng.choice([1, 8, len(data)])]
    elif how == 2:
        data[place:place] = data[place : place + rng.choice([1, 8, 4096])]
    elif how == 3:
        digits = [i for i in range(min(len(data), 4000)) if 48 <= data[i] < 58]
        for i in rng.sample(digits, min(3, len(digits))):
            data[i : i + 1] = rng.choice([b"9" * 12, b"-", b"0"])
    else:
        data[place:place] = rng.choice(PAYLOADS)
    return bytes(data)


class Watch:
    """Every load either works or raises ValueError, in under 2 s and 4 GB more memory."""

    def __init__(self):
        self.slowest, self.refused, self.taken = 0.0, 0, 0

    def load(self, function, *args) -> None:
        began = time.monotonic()
        try:
            function(*args)
            self.taken += 1
        except ValueError as error:
            assert str(error)  # noqa: PT017
            self.refused += 1
        self.slowest = max(self.slowest, time.monotonic() - began)
        assert self.slowest < 2


@pytest.fixture
def limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(trials, flags, model, vae, tmp_path):
    rng, watch = random.Random(0), Watch()
    save_weights(model, tmp_path / "m.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_weights(vae, tmp_path / "v.safetensors")
    build(config_of(flags), ALONE).fit()
    checkpoint = newest_checkpoint(tmp_path / "run")
    originals = {
        "m.safetensors": load_flexvar, "m.pth": load_flexvar, "old.pth": load_flexvar, "v.safetensors": load_tokenizer,
    }  # fmt: skip
    for name, load in originals.items():
        whole = (tmp_path / name).read_bytes()
        for _ in range(trials):
            (tmp_path / f"x_{name}").write_bytes(mutate(whole, rng))
            watch.load(load, tmp_path / f"x_{name}")
    for name in (MANIFEST, STATE, MODEL):
        whole = (checkpoint / name).read_bytes()
        for _ in range(trials):
            (checkpoint / name).write_bytes(mutate(whole, rng))
            watch.load(verify, checkpoint)
            if name == STATE:
                watch.load(read_checkpoint, checkpoint)  # as if its digest were right
        (checkpoint / name).write_bytes(whole)
    verify(checkpoint)
    return watch


def test_a_few_mutated_files(flags, model, vae, tmp_path, limited_memory):
    fuzz(20, flags, model, vae, tmp_path)


@pytest.mark.faults
def test_200_mutations_of_each_file(flags, model, vae, tmp_path, limited_memory):
    watch = fuzz(200, flags, model, vae, tmp_path)
    print(f"refused {watch.refused}, still whole {watch.taken}, slowest {watch.slowest:.2f} s")


def use_cache(directory) -> None:
    """Open a cache and read all of it."""
    manifest = read_manifest(directory)
    for split in manifest["splits"]:
        cache = CodeCache(directory, split)
        cache.__getitems__([(0, i) for i in range(len(cache))])


@pytest.mark.faults
def test_mutated_caches_samples_and_records(flags, small_vae_file, tmp_path, limited_memory):
    rng, watch = random.Random(1), Watch()
    out = tmp_path / "codes"
    build_cache(CacheFlags(CacheConfig(out=str(out), vae_ckpt=str(small_vae_file), image_size=16, crops=1),
                           DataConfig(dataset="digits", workers=0)), ALONE)  # fmt: skip
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.uint8))
    build(config_of(flags), ALONE).fit()
    cases = [
        (out / "manifest.json", use_cache, out),
        (out / "train/labels.npy", use_cache, out),
        (out / "val/shard_00000.npy", use_cache, out),
        (tmp_path / "samples.npz", lambda path: open_images(path, 8).batch(range(3)), tmp_path / "samples.npz"),
        (tmp_path / "run/config.json", open_pipeline, str(tmp_path / "run")),
    ]
    for path, load, argument in cases:
        whole = path.read_bytes()
        for _ in range(60):
            path.write_bytes(mutate(whole, rng))
            watch.load(load, argument)
        path.write_bytes(whole)
    print(f"refused {watch.refused}, still whole {watch.taken}, slowest {watch.slowest:.2f} s")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def test_no_entry_executes_a_pickle(flags, vae, tmp_path):
    """Every command that takes a file of the user's; the message names it."""
    mark, bomb = tmp_path / "executed", tmp_path / "bomb.pth"
    torch.save({"model": Bomb(mark)}, bomb)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Bomb(mark)))
    save_weights(vae, tmp_path / "v.safetensors")
    for path in (bomb, tmp_path / "raw.pth"):
        for entry in [
            lambda path: load_flexvar(path),
            lambda path: load_tokenizer(path),
            lambda path: open_pipeline(str(path), str(tmp_path / "v.safetensors")),
            lambda path: build(config_of(flags, f"--vae_ckpt={path}"), ALONE),
            lambda path: build(config_of(flags, f"--init_ckpt={path}"), ALONE),
            lambda path: Inception(path),
        ]:
            with pytest.raises(ValueError, match=path.name):
                entry(path)
    with pytest.raises(ValueError, match=r"a\.npz"):
        open_images(tmp_path / "a.npz", 8)
    assert not mark.exists()

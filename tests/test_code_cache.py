import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from models.scales import ScaleSchedule
from tests.conftest import ALONE, ROOT, config_of, on_ranks, run, tool, tool_on_ranks
from train import build as build_trainer
from train import main as train
from utils.config.training import DataConfig
from utils.data import code_cache
from utils.data.code_cache import CacheConfig, CacheFlags, CodeCache, build, main, open_cache
from utils.data.datasets import encode_batch, make_loader, open_dataset
from utils.data.sources import InMemory
from utils.runtime.distributed import Ranks
from utils.runtime.files import read_json, write_json

SCHEDULE = ScaleSchedule((1, 2, 4))


def flags_of(small_vae_file, out, **changed):
    settings = {"image_size": 16, "crops": 3, "batch": 64, "shard_images": 500, **changed}
    config = CacheConfig(out=str(out), vae_ckpt=str(small_vae_file), **settings)
    return CacheFlags(config, DataConfig(dataset="digits", workers=0))


@pytest.fixture(scope="module")
def cache(small_vae_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "codes"
    build(flags_of(small_vae_file, out), ALONE)
    return out


@pytest.fixture(scope="module")
def tiny_vae(small_vae_file):
    from models.weights import load_tokenizer

    return load_tokenizer(small_vae_file)


def test_codes_equal_those_encoded_on_the_fly(cache, tiny_vae):
    schedule = ScaleSchedule((1, 3, 4))
    for split, epochs in (("train", [0, 1, 2, 5]), ("val", [0, 7])):
        cached = open_cache(cache, tiny_vae, "latent", 16, SCHEDULE)[split == "val"]
        views = open_dataset(DataConfig(dataset="digits"), 16, 0, split)
        assert len(cached) == len(views)
        assert cached.classes == views.classes
        keys = [
            (epoch, index) for epoch in epochs for index in (0, 499 if split == "train" else 99, 17, len(views) - 1)
        ]
        codes, labels = next(iter(make_loader(cached, [keys], 0, ALONE.device)))
        found = cached.code_batch(tiny_vae, codes, labels, schedule)
        seen = [(epoch % 3 if split == "train" else 0, index) for epoch, index in keys]
        images, wanted_labels = next(iter(make_loader(views, [seen], 0, ALONE.device)))
        wanted = encode_batch(tiny_vae, images, wanted_labels, schedule)
        assert torch.equal(found.labels, wanted.labels)
        assert torch.equal(found.tokens(schedule), wanted.tokens(schedule))


def test_a_run_from_the_cache_equals_one_from_images(cache, flags, tmp_path, monkeypatch):
    runs = {}
    of_cache = [f"--code_cache={cache}", *(f for f in flags if not f.startswith("--dataset"))]
    for name, some in (("images", flags), ("cache", of_cache)):
        runs[name] = build_trainer(config_of(some, f"--out_dir={tmp_path / name}"), ALONE)
        if name == "cache":  # neither an image nor the tokenizer's encoder is touched
            monkeypatch.setattr(runs[name].vae, "encode", None)
            monkeypatch.setattr("utils.data.sources.digits", None)
        runs[name].fit()
    for (name, a), b in zip(
        runs["images"].model.state_dict().items(), runs["cache"].model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    held_out = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"] for n in runs]
    assert held_out[0] == held_out[1]


def test_the_loaders_workers_read_the_same(cache, tiny_vae):
    cached, keys = open_cache(cache, tiny_vae, "latent", 16, SCHEDULE)[0], [[(0, 3), (1, 800)], [(2, 5), (0, 1299)]]
    for a, b in zip(*(make_loader(cached, keys, n, ALONE.device) for n in (0, 2)), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_two_ranks_write_the_same_files(cache, small_vae_file, tmp_path):
    tool_on_ranks(2, main, f"--out={tmp_path / 'c'}", f"--vae_ckpt={small_vae_file}", "--batch=64",
             "--dataset=digits", "--workers=0", "--image_size=16", "--crops=3", "--shard_images=500")  # fmt: skip
    for path in cache.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "c" / path.relative_to(cache)).read_bytes(), path


class Watched(Ranks):
    """A rank that remembers what was dealt out."""

    dealt: ClassVar[list] = []

    def deal(self, work):
        self.dealt.append(work)
        return super().deal(work)


def test_what_is_missing_of_a_half_built_cache_is_dealt_evenly(cache, small_vae_file, tmp_path):
    """Not shard n to rank n mod 2: with every other shard there, one rank would have all the work."""
    for split, names in (("train", "0 2"), ("val", "")):
        for n in names.split():
            for kind in ("shard", "labels"):
                (tmp_path / "c" / split).mkdir(parents=True, exist_ok=True)
                shutil.copy(cache / split / f"{kind}_0000{n}.npy", tmp_path / "c" / split)
    Watched.dealt.clear()
    build(flags_of(small_vae_file, tmp_path / "c"), Watched(0, 1, torch.device("cpu")))
    assert Watched.dealt == [[1], [0]]  # of training, and of what is held out
    assert (tmp_path / "c/manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()

    class Apart(Ranks):
        def barrier(self):
            """These ranks are no processes."""

    for world in (2, 3):
        shares = [Apart(rank, world, torch.device("cpu")).deal([1, 3, 5, 7, 9]) for rank in range(world)]
        assert sorted(n for share in shares for n in share) == [1, 3, 5, 7, 9]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_killed_build_goes_on_and_ends_the_same(cache, small_vae_file, tmp_path):
    out = tmp_path / "c"
    flags = [f"--out={out}", f"--vae_ckpt={small_vae_file}", "--dataset=digits", "--workers=0", "--image_size=16"]
    flags += ["--crops=3", "--batch=64", "--shard_images=500"]
    command = [sys.executable, "-m", "utils.data.code_cache", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "train/shard_00000.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    written = (out / "train/shard_00000.npy").stat().st_mtime_ns
    with pytest.raises(ValueError, match="no finished code cache"):
        code_cache.read_manifest(out)
    tool(main, *flags, check=True)
    assert (out / "train/shard_00000.npy").stat().st_mtime_ns == written  # kept, not made again
    assert (out / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_a_cache_that_does_not_fit_is_refused(cache, flags, vae, tiny_vae, small_vae_file, tmp_path):
    with pytest.raises(ValueError, match="another tokenizer_sha256"):
        open_cache(cache, vae, "latent", 16, SCHEDULE)
    with pytest.raises(ValueError, match="another supervision"):
        open_cache(cache, tiny_vae, "image", 16, SCHEDULE)
    with pytest.raises(ValueError, match="another image_size: 16, not 32"):
        open_cache(cache, tiny_vae, "latent", 32, SCHEDULE)
    with pytest.raises(ValueError, match="other settings"):
        build(flags_of(small_vae_file, cache, crops=4), ALONE)
    flags = [f for f in flags if not f.startswith("--dataset")]
    status, _, said = tool(train, *flags, f"--code_cache={tmp_path}", "--check")
    assert status == 1
    assert "no finished code cache" in said


def test_damage_is_found(cache, tiny_vae, tmp_path):
    copy = tmp_path / "c"
    shutil.copytree(cache, copy)
    verify = [f"--out={copy}", "--verify"]
    assert "4 shards" in tool(main, *verify, check=True)[1]  # three of training, one held out
    shard = copy / "train/shard_00001.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, _, said = tool(main, *verify)
    assert status == 1
    assert str(shard) in said
    content[-1] ^= 1
    shard.write_bytes(content)
    labels = copy / "val/labels.npy"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x07")
    assert str(labels) in tool(main, *verify)[2]
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard_00001\.npy is missing or damaged"):
        CodeCache(copy, "train")
    status, _, said = tool(main, "--verify")
    assert status == 1
    assert "--out is missing" in said


def test_more_shards_than_files_may_be_open(cache):
    """Systems often allow 1,024; ImageNet has 2,503 shards."""
    wanted = CodeCache(cache, "train")
    keys = [(0, index) for index in range(0, len(wanted), 97)]
    assert len({wanted.shard(index // 500).ctypes.data for _, index in keys}) == 3

    def limited():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        found = CodeCache(cache, "train")
        for key in keys:
            assert torch.equal(found[key][0], wanted[key][0])
        assert len(found.shards) == 1

    on_ranks(1, limited)
    with (
        patch("numpy.load", side_effect=OSError(errno.EMFILE, "Too many open files")),
        pytest.raises(OSError, match="T"),
    ):
        CodeCache(cache, "train")  # which says nothing of the file


@pytest.mark.parametrize("how", ["cut off", "flipped"])
def test_a_damaged_shard_is_made_again(how, cache, small_vae_file, tmp_path):
    shutil.copytree(cache, tmp_path / "c")
    shard, other = (tmp_path / f"c/train/shard_{n:05d}.npy" for n in (1, 2))
    whole, kept = shard.read_bytes(), other.stat().st_mtime_ns
    shard.write_bytes(whole[:-1] if how == "cut off" else whole[:-1] + bytes([whole[-1] ^ 1]))
    build(flags_of(small_vae_file, tmp_path / "c"), ALONE)
    assert shard.read_bytes() == whole
    assert other.stat().st_mtime_ns == kept
    assert (tmp_path / "c/manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_a_folder_of_photographs(tmp_path, small_vae_file, tiny_vae):
    for name in ("train/cat", "train/dog"):
        (tmp_path / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    out = tmp_path / "codes"
    data = f"--data_path={tmp_path}"
    run("bash", "scripts/cache_codes.sh", data, f"--out={out}", f"--vae_ckpt={small_vae_file}", "--image_size=16",
        "--crops=2", "--workers=1", PYTHON=sys.executable, NPROC="1")  # fmt: skip
    settings = read_json(out / "settings.json")
    assert settings.pop("augment") == "crop"
    write_json(out / "settings.json", settings)  # as caches were before that flag: with the crop
    for augment, fits in (("crop", True), ("flip", False)):
        cache = CacheConfig(out=str(out), vae_ckpt=str(small_vae_file), image_size=16, crops=2)
        flags = CacheFlags(cache, DataConfig(data_path=str(tmp_path), augment=augment, workers=0))
        with nullcontext() if fits else pytest.raises(ValueError, match="other settings"):
            build(flags, ALONE)
    cached = open_cache(out, tiny_vae, "latent", 16, SCHEDULE)[0]
    assert cached.classes == ["cat", "dog"]
    assert open_cache(out, tiny_vae, "latent", 16, SCHEDULE)[1] is None
    views = open_dataset(DataConfig(data_path=str(tmp_path)), 16, 0, "train")
    for key in ((0, 0), (1, 1)):
        image, label = views[key]
        batch = encode_batch(tiny_vae, image[None], torch.tensor([label]), cached.sides)
        codes, found = cached[key]
        assert found == label
        assert torch.equal(codes[None].long(), batch.tokens(cached.sides))


@pytest.mark.parametrize("change", ["pixels", "time", "added", "removed", "renamed"])
def test_images_that_changed_under_the_same_names_are_noticed(change, tmp_path, small_vae_file):
    for i in range(4):
        path = tmp_path / f"d/train/a/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(path)
    data = DataConfig(data_path=str(tmp_path / "d"), workers=0)
    flags = CacheFlags(flags_of(small_vae_file, tmp_path / "c").cache, data)
    build(flags, ALONE)
    build(flags, ALONE)  # the same again is no change
    path = tmp_path / "d/train/a/1.png"
    if change == "pixels":
        Image.new("RGB", (16, 16), (1, 200, 9)).save(path)
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "added":
        Image.new("RGB", (16, 16)).save(path.with_name("9.png"))
    elif change == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("1b.png"))
    with pytest.raises(ValueError, match=r"cache of other settings: .*files_sha256"):
        build(flags, ALONE)


def test_changed_arrays_are_noticed_too(tmp_path, small_vae_file, monkeypatch):
    build(flags_of(small_vae_file, tmp_path / "c", crops=1), ALONE)
    real = InMemory.files_digest
    monkeypatch.setattr(InMemory, "files_digest", lambda self, path: real(self, path)[::-1])
    with pytest.raises(ValueError, match="images changed"):
        build(flags_of(small_vae_file, tmp_path / "c", crops=1), ALONE)


def test_a_cache_in_tf32_says_so_and_is_another_one(cache, small_vae_file, tmp_path):
    shutil.copytree(cache, tmp_path / "c")
    flags = flags_of(small_vae_file, tmp_path / "c")
    rounded = replace(flags, cache=replace(flags.cache, encode_tf32=True))
    with pytest.raises(ValueError, match="cache of other settings: encode_tf32"):
        build(rounded, ALONE)
    assert CodeCache(cache, "train").record["encode_tf32"] is False
    build(replace(rounded, cache=replace(rounded.cache, out=str(tmp_path / "other"))), ALONE)
    assert CodeCache(tmp_path / "other", "train").record["encode_tf32"] is True


def test_a_cache_of_before_still_goes_on(cache, small_vae_file, tmp_path):
    shutil.copytree(cache, tmp_path / "c")
    record = read_json(tmp_path / "c/settings.json")
    write_json(tmp_path / "c/settings.json", {k: v for k, v in record.items() if k not in ("files_sha256", "augment")})
    build(flags_of(small_vae_file, tmp_path / "c"), ALONE)


def test_a_run_that_goes_on_from_a_cache_of_other_augmentation_is_refused(tmp_path, small_vae_file, flags):
    for i in range(16):
        for split in ("train", "val"):
            path = tmp_path / f"d/{split}/a/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path)
    for augment in ("crop", "flip"):
        data = DataConfig(data_path=str(tmp_path / "d"), workers=0, augment=augment)
        build(CacheFlags(flags_of(small_vae_file, tmp_path / augment).cache, data), ALONE)
    flags = [f for f in flags if not f.startswith("--dataset")]
    build_trainer(config_of(flags, f"--code_cache={tmp_path / 'crop'}", "--vis_num_samples=0"), ALONE).fit()
    with pytest.raises(ValueError, match="--augment crop → flip"):
        build_trainer(config_of(flags, f"--code_cache={tmp_path / 'flip'}", "--vis_num_samples=0"), ALONE)

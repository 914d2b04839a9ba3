"""The code cache: every image's codes at every side, for several crops, so that training needs no image at all.

    bash scripts/cache_codes.sh --data_path imagenet --out codes     # torchrun over the GPUs; goes on where it stopped
    python train.py --code_cache codes …

DIR/manifest.json says what the codes depend on; DIR/train/ and DIR/val/ hold labels.npy and shards of uint16 codes,
each (images · crops, codes of all sides), the crops of an image one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.run_record import find_run, schedule_of
from models.scales import ScaleSchedule
from models.tokenizer import Tokenizer
from models.weights import digest_of, load_tokenizer
from utils.config.training import DataConfig, check_timeout
from utils.data.datasets import CodeBatch, ImageDataset, Key, batches_of, loader_workers, open_splits
from utils.runtime.distributed import Ranks, ranks
from utils.runtime.entry import check_output_directory, entry, notice
from utils.runtime.files import (
    digest,
    read_array,
    read_json,
    read_sealed,
    remove_stale,
    save_array,
    write_json,
    write_sealed,
)
from utils.runtime.flags import Flags, at_least, changed, only_with, parse
from utils.runtime.process import allow_open_files

MANIFEST, LABELS = "manifest.json", "labels.npy"
BEFORE = {"augment": "crop", "encode_tf32": False}  # what caches of old do not say
VERSION = 2
OTHER_FILES = 512  # that a process may have open beside the shards


@dataclass(frozen=True)
class CacheConfig(Flags):
    """Code cache"""

    out: str = ""  # directory of the cache
    vae_ckpt: str = "pretrained/FlexVAE.pth"  # tokenizer weights: a file, or a tokenizer run's directory
    image_size: int = 0  # side of the training images; 0: the tokenizer run's, or 256
    crops: int = 10  # random crops of each training image; epoch e of training sees crop e mod CROPS
    seed: int = 0  # seed of the crops: a run of the same seed sees the same ones without the cache
    supervision: Literal["latent", "image", "image_pixels"] = "latent"  # see train.py
    pn: str = ""
    """sides of the scales, of a tokenizer whose codes depend on them; empty: its run's, or 1_2_3_4_5_6_8_10_13_16"""
    encode_tf32: bool = False  # see train.py
    batch: int = 32  # crops that are encoded at a time
    shard_images: int = 512  # images of a shard: what a kill loses at most
    timeout_minutes: float = 30  # stop when a rank has not been heard of for so long
    verify: bool = False  # check every file of a finished cache against its SHA-256, then stop

    def __post_init__(self):
        super().__post_init__()
        at_least(self, image_size=0, crops=1, seed=0, batch=1, shard_images=1)
        check_timeout(self)


@dataclass(frozen=True)
class CacheFlags(Flags):
    """Everything `cache_codes.sh` takes."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        super().__post_init__()
        unread = [name for name in changed(self.cache) if name not in ("out", "verify")]
        unread += changed(self.data)
        if self.cache.verify and unread:
            raise ValueError(f"--{unread[0]} has no effect with --verify, which reads --out alone")


# ------------------------------------------------------------------------------------------------- reading


class CodeCache(Dataset):
    """One split of a cache: (epoch, index) → codes (sum of s²,) and label, as `ImageDataset` gives images."""

    def __init__(self, directory: Path, split: str):
        manifest = read_manifest(directory)
        part = manifest["splits"][split]
        self.directory = directory / split
        self.classes: list[str] = manifest["classes"]
        self.sides, self.supervision = ScaleSchedule(tuple(manifest["sides"])), manifest["supervision"]
        names = ("dataset", "augment", "crops", "encode_tf32")
        self.record = {name: {**BEFORE, **manifest, **part}[name] for name in names}
        self.record |= {"crop_seed": manifest["seed"], "images_sha256": manifest["images_sha256"]["train"]}
        self.crops, self.shard_rows = part["crops"], part["shard_images"] * part["crops"]
        self.files = [shard["file"] for shard in part["shards"]]
        self.labels = read_array(self.directory / LABELS)
        if digest(self.directory / LABELS) != part["labels_sha256"]:
            raise ValueError(f"{self.directory / LABELS} is damaged: build the cache again (finished shards are kept)")
        for shard in part["shards"]:  # a missing or short file is found here, not after an hour
            path = self.directory / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path} is missing or damaged: build the cache again (finished shards are kept)")
        self.shards: dict[int, np.ndarray] = {}
        # Each keeps a file open: 2,503 of ImageNet's, where many systems allow 1,024 files. Workers inherit the limit.
        self.most = max(1, allow_open_files(len(self.files) + OTHER_FILES) - OTHER_FILES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        codes, labels = self.__getitems__([key])
        return codes[0], labels[0]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """A batch at once: rows (B, n) as they are stored, and labels (B,) int64."""
        first = self.shard(0)
        codes = np.empty((len(keys), first.shape[1]), dtype=first.dtype)
        for place, (epoch, index) in enumerate(keys):
            number, row = divmod(index * self.crops + epoch % self.crops, self.shard_rows)
            codes[place] = self.shard(number)[row]
        labels = self.labels[[index for _, index in keys]]
        return torch.from_numpy(codes), torch.from_numpy(labels)

    def shard(self, number: int) -> np.ndarray:
        """A shard, mapped when it is first asked for; when too many are, the one mapped first is let go."""
        if number not in self.shards:
            if len(self.shards) >= self.most:
                del self.shards[next(iter(self.shards))]
            self.shards[number] = read_array(self.directory / self.files[number], mmap=True)
        return self.shards[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "shards": {}}  # a loader's worker maps the files itself

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch

    def code_batch(self, vae: Tokenizer, codes: Tensor, labels: Tensor, schedule: ScaleSchedule) -> CodeBatch:
        """Rows of the cache and class ids → the tokens of a schedule's sides."""
        return CodeBatch(labels, vae.from_cache(codes, self.sides, schedule, self.supervision))


def read_manifest(directory: Path) -> dict:
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no finished code cache: bash scripts/cache_codes.sh --out {directory} …")
    manifest = read_sealed(path)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} is of version {manifest.get('version')}, not {VERSION}: build the cache again")
    return manifest


def open_cache(
    directory: Path, vae: Tokenizer, supervision: str, size: int, schedule: ScaleSchedule
) -> tuple[CodeCache, CodeCache | None]:
    """The training and the held-out part of a cache; None when it has no such part.

    Raises ValueError when the codes are of another tokenizer, of images of another size, or of other sides.
    """
    manifest, sides = read_manifest(directory), list(vae.cached_sides(size, schedule).sides)
    wanted = {"tokenizer_sha256": digest_of(vae), "supervision": supervision, "image_size": size, "sides": sides}
    for name, value in wanted.items():
        if manifest[name] != value:
            raise ValueError(f"the codes in {directory} are of another {name}: {manifest[name]}, not {value}")
    return CodeCache(directory, "train"), CodeCache(directory, "val") if "val" in manifest["splits"] else None


def verify(directory: Path) -> int:
    """Check every shard against its digest. Returns how many there are."""
    splits = read_manifest(directory)["splits"]
    files = [(directory / s / shard["file"], shard["sha256"]) for s, part in splits.items() for shard in part["shards"]]
    labels = [(directory / s / LABELS, part["labels_sha256"]) for s, part in splits.items()]
    for path, wanted in tqdm([*files, *labels], desc="verifying", unit="file"):
        if not path.is_file() or digest(path) != wanted:
            raise ValueError(f"{path} is not what its SHA-256 says: delete it and {MANIFEST}, and build again")
    return len(files)


# ------------------------------------------------------------------------------------------------ building


class Crops(Dataset):
    """index → all crops of an image (crops, 3, size, size) uint8 and its label; the image is read once."""

    def __init__(self, views: ImageDataset, crops: int):
        self.views, self.crops = views, crops

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.views.pixels(index, range(self.crops))


def encode_shards(
    views: ImageDataset,
    shards: Sequence[range],
    vae: Tokenizer,
    sides: ScaleSchedule,
    flags: CacheFlags,
    progress: tqdm,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each shard's images: codes (images · crops, sum of s²) and labels (images,).

    One loader for all shards, so that images are read while others are encoded.
    """
    crops, device = config_crops(flags.cache, views), vae.device
    at_once = max(1, flags.cache.batch // crops)
    batches = [list(shard[a : a + at_once]) for shard in shards for a in range(0, len(shard), at_once)]
    workers = loader_workers(flags.data.workers)
    pinned = device.type == "cuda"
    loader = DataLoader(Crops(views, crops), batch_sampler=batches, num_workers=workers, pin_memory=pinned)
    with batches_of(loader) as read:
        for shard in shards:
            rows, classes = [], []
            for _ in range(0, len(shard), at_once):
                images, labels = next(read)  # (n, crops, 3, size, size), (n,)
                images = images.flatten(0, 1).to(device, non_blocking=True)
                rows.append(vae.to_cache(images, sides, flags.cache.supervision).numpy())
                classes.append(labels.numpy())
                progress.update(len(images))
            yield np.concatenate(rows), np.concatenate(classes)


def remove_damaged(out: Path) -> None:
    """Remove the shards of a finished cache that are not as they were written, to be made again."""
    if not (out / MANIFEST).is_file():
        return
    for split, part in read_manifest(out)["splits"].items():
        for shard in part["shards"]:
            path = out / split / shard["file"]
            if path.is_file() and (path.stat().st_size != shard["bytes"] or digest(path) != shard["sha256"]):
                notice(f"{path} is not as it was written: encoding it again")
                path.unlink()


def config_crops(config: CacheConfig, views: ImageDataset) -> int:
    """Crops of each image of a split: held-out images have one, the centre."""
    return config.crops if views.training else 1


def build_split(views: ImageDataset, vae: Tokenizer, sides: ScaleSchedule, flags: CacheFlags, me: Ranks) -> dict:
    """Encode one split, a shard at a time, those that are there already left out. Returns its part of the manifest.

    A shard is written while the next one is encoded.
    """
    config, directory = flags.cache, Path(flags.cache.out) / split_of(views)
    crops = config_crops(config, views)
    directory.mkdir(parents=True, exist_ok=True)
    shards = [
        range(start, min(start + config.shard_images, len(views)))
        for start in range(0, len(views), config.shard_images)
    ]
    codes, labels = ([directory / f"{kind}_{n:05d}.npy" for n in range(len(shards))] for kind in ("shard", "labels"))
    mine = me.deal([n for n in range(len(shards)) if not codes[n].is_file()])
    total = sum(len(shards[n]) for n in mine) * crops

    def save(n: int, rows: np.ndarray, classes: np.ndarray) -> None:
        save_array(labels[n], classes)
        save_array(codes[n], rows)  # last: it stands for the shard being done

    with (
        tqdm(total=total, desc=f"{split_of(views)} codes", unit="crop", disable=not me.first) as progress,
        ThreadPoolExecutor(1) as writer,
    ):
        encoded = encode_shards(views, [shards[n] for n in mine], vae, sides, flags, progress)
        writing: Future | None = None
        for n, (rows, classes) in zip(mine, encoded, strict=True):
            if writing is not None:
                writing.result()  # one shard at a time in memory; raises what went wrong with it
            writing = writer.submit(save, n, rows, classes)
        if writing is not None:
            writing.result()
    me.barrier()
    if not me.first:
        return {}
    save_array(directory / LABELS, np.concatenate([read_array(path) for path in labels]))
    described = [{"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)} for path in codes]
    part = {"images": len(views), "crops": crops, "shard_images": config.shard_images}
    return {**part, "labels_sha256": digest(directory / LABELS), "shards": described}


def cost(images: int, crops: int) -> str:
    """A line on what a cache costs beside what it saves."""
    return (
        f"{images} images × {crops} crops: as much encoding as {crops} epochs of training without a cache. It pays "
        "from the second run on, and in the first where images are read more slowly than they are trained on"
    )


def build(flags: CacheFlags, me: Ranks) -> Path:
    """Write the cache of a data set, or what is missing of it. Returns its manifest."""
    config, out = flags.cache, Path(flags.cache.out)
    check_output_directory(out, "--out")
    vae, run = load_tokenizer(config.vae_ckpt).to(me.device), find_run(config.vae_ckpt)
    vae.tf32 = config.encode_tf32
    size = config.image_size or (run.content["model"].get("image_size") if run else 0) or 256
    schedule = schedule_of(config.pn, config.vae_ckpt)
    only_with(config, vae.config.tied_to_schedule, "a tokenizer whose codes depend on the schedule", ["pn"])
    if vae.config.codebook_size > 2**16:
        raise ValueError(f"codes are stored in 16 bits, this tokenizer has {vae.config.codebook_size}")
    if size % vae.config.factor:
        raise ValueError(f"--image_size must be a multiple of {vae.config.factor}, got {size}")
    views = [v for v in open_splits(flags.data, size, config.seed, out) if v is not None]
    if me.first:
        notice(cost(len(views[0]), config.crops))
    settings: dict[str, Any] = {
        "version": VERSION,
        "tokenizer_sha256": digest_of(vae),
        "supervision": config.supervision,
        "encode_tf32": config.encode_tf32,
        "sides": list(vae.cached_sides(size, schedule).sides),
        "image_size": size,
        "dataset": flags.data.dataset,
        "augment": flags.data.augment,
        "seed": config.seed,
        "crops": config.crops,
        "shard_images": config.shard_images,
        "classes": views[0].classes,
        "images_sha256": {split_of(v): v.source.fingerprint() for v in views},
        "files_sha256": {split_of(v): v.source.files_digest(flags.data.data_path) for v in views},
    }
    record = out / "settings.json"
    if record.is_file():
        before = {**BEFORE, "files_sha256": settings["files_sha256"], **read_json(record)}
        if before != settings:
            other = ", ".join(name for name in settings if before.get(name) != settings[name])
            hint = " (images changed: their sizes or times of change)" if other == "files_sha256" else ""
            raise ValueError(f"{out} holds a cache of other settings: {other}{hint}: use another --out")
    me.barrier()  # every rank has compared before the first one writes
    if me.first:
        for directory in (out, out / "train", out / "val"):
            remove_stale(directory)
        remove_damaged(out)
        write_json(record, settings)
    me.barrier()  # before any rank lists what is missing
    sides = ScaleSchedule(tuple(settings["sides"]))
    parts = {split_of(v): build_split(v, vae, sides, flags, me) for v in views}
    if me.first:
        write_sealed(out / MANIFEST, {**settings, "splits": parts})
    me.barrier()
    return out / MANIFEST


def split_of(views: ImageDataset) -> str:
    return "train" if views.training else "val"


@entry
def main() -> None:
    flags = parse(CacheFlags, description=__doc__, prog="python -m utils.data.code_cache")
    if not flags.cache.out:
        raise ValueError("--out is missing: where is the cache, or where should it be?")
    with ranks(timedelta(minutes=flags.cache.timeout_minutes)) as me:
        if flags.cache.verify:
            print(f"{verify(Path(flags.cache.out))} shards are as they were written")
        else:
            build(flags, me)


if __name__ == "__main__":
    main()

"""Examples a second: the code cache, and photographs through the ADM crop.

python -m benchmarks.data
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import show
from utils.config.training import DataConfig
from utils.data.code_cache import LABELS, MANIFEST, VERSION, CodeCache
from utils.data.datasets import StepSampler, make_loader, open_dataset
from utils.runtime.distributed import alone
from utils.runtime.entry import entry
from utils.runtime.files import digest, save_array, write_sealed
from utils.runtime.flags import Parser, whole


def write_cache(directory: Path, images: int, shard: int = 512, crops: int = 10) -> CodeCache:
    """A cache of random codes, of ImageNet's layout."""
    rng, shards = np.random.default_rng(0), []
    (directory / "train").mkdir(parents=True)
    for n, start in enumerate(range(0, images, shard)):
        path = directory / f"train/shard_{n:05d}.npy"
        rows = min(shard, images - start) * crops
        save_array(path, rng.integers(0, 8912, (rows, 1496), dtype=np.uint16))
        shards.append({"file": path.name, "bytes": path.stat().st_size})
    save_array(directory / "train" / LABELS, rng.integers(0, 1000, images))
    labels = digest(directory / "train" / LABELS)
    part = {"images": images, "crops": crops, "shard_images": shard, "labels_sha256": labels, "shards": shards}
    record = {"dataset": "folder", "augment": "crop", "seed": 0, "images_sha256": {"train": ""}}
    layout = {"supervision": "latent", "sides": list(range(1, 17))}
    manifest = {**record, **layout, "version": VERSION, "classes": [], "splits": {"train": part}}
    write_sealed(directory / MANIFEST, manifest)
    return CodeCache(directory, "train")


def write_photographs(directory: Path, n: int) -> None:
    """Noise at ImageNet's usual size, as JPEG."""
    (directory / "train/class").mkdir(parents=True)
    small = np.random.default_rng(0).integers(0, 256, (n, 47, 62, 3), dtype=np.uint8)
    for i, pixels in enumerate(small):
        Image.fromarray(pixels).resize((500, 375)).save(directory / f"train/class/{i}.jpg", quality=90)


def speed(dataset, batch: int, workers: int, batches: int) -> float:
    """Examples a second through the sampler and the loader."""
    sampler = StepSampler(len(dataset), 0, batch, batch, 0, 1, 0, batches + 5)
    loader = iter(make_loader(dataset, sampler, workers, alone().device))
    for _ in range(5):
        next(loader)
    began = time.perf_counter()
    for _ in loader:
        pass
    return batches * batch / (time.perf_counter() - began)


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.data")
    parser.add_argument("--images", type=whole(1), default=20_000, help="of the cache, with ten crops each")
    parser.add_argument("--batch", type=whole(1), default=256)
    parser.add_argument("--workers", type=whole(0), nargs="+", default=[0, 2])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        cache = write_cache(Path(directory) / "codes", args.images)
        write_photographs(Path(directory) / "photographs", 64)
        photographs = open_dataset(DataConfig(data_path=f"{directory}/photographs"), 256, 0, "train")
        for workers in args.workers:
            row = {"source": "code cache", "workers": workers, "examples/s": speed(cache, args.batch, workers, 300)}
            rows.append(row | {"working set MB": args.images * cache.crops * 2 * 1496 / 1e6})
        for workers in args.workers:
            found = speed(photographs, 32, workers, 8)
            rows.append({"source": "JPEG 500×375, ADM crop", "workers": workers, "examples/s": found})
    show("data", rows)


if __name__ == "__main__":
    main()

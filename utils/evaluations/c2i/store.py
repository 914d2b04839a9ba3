"""Features on disk, a file a chunk of images: so an evaluation can stop anywhere, go on, and never depends on ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.config.sampling import EvalConfig
from utils.evaluations.c2i.features import Extractor
from utils.evaluations.c2i.images import ImageSource
from utils.runtime.distributed import Ranks
from utils.runtime.files import as_json, read_json, read_tensor, remove_stale, save_tensors, write_json

Keep = Callable[[range, Tensor], None]  # what else is done with the images (n, 3, H, W) of a chunk


class FeatureStore:
    """The features of `total` images. Chunk c holds images c·chunk … (c + 1)·chunk - 1, whoever computed it."""

    def __init__(self, directory: Path, total: int, chunk: int, settings: dict, ranks: Ranks):
        self.directory, self.total, self.chunk, self.ranks = directory, total, chunk, ranks
        described = as_json({"total": total, "chunk": chunk, **settings})
        record = directory / "settings.json"
        found = read_json(record) if record.is_file() else None
        ranks.barrier()  # all have looked before the first writes
        if found is not None and found != described:
            changed = [k for k in {**found, **described} if found.get(k) != described.get(k)]
            raise ValueError(
                f"{directory} holds features of other settings ({', '.join(changed)}): use another --out_dir"
            )
        if ranks.first:
            remove_stale(directory)
            if found is None:
                write_json(record, described)

    def path(self, chunk: int) -> Path:
        return self.directory / f"{chunk:06d}.safetensors"

    def indices(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.total))

    @property
    def chunks(self) -> range:
        return range(-(-self.total // self.chunk))

    def missing(self) -> list[int]:
        """Chunks that nobody has finished yet."""
        return [c for c in self.chunks if not self.path(c).is_file()]

    def fill(self, source: ImageSource, extractor: Extractor, name: str, keep: Keep | None = None) -> int:
        """Compute what is missing, shared out among the ranks. Returns how many images that were, over all ranks."""
        missing = self.missing()
        mine = self.ranks.deal(missing)
        device = self.ranks.device
        bar = tqdm(total=sum(len(self.indices(c)) for c in mine), desc=name, unit="image", disable=not self.ranks.first)
        with ThreadPoolExecutor(2) as pool:  # files are written while the device goes on
            jobs: list[Future] = []
            for c in mine:
                images = source.batch(self.indices(c))
                features = extractor(images.to(device))
                jobs.append(pool.submit(self.write, c, features.pool, features.spatial, images, keep))
                if len(jobs) > 4:
                    jobs.pop(0).result()
                bar.update(len(images))
            for job in jobs:
                job.result()
        bar.close()
        self.ranks.barrier()
        return sum(len(self.indices(c)) for c in missing)

    def write(self, chunk: int, pool: Tensor, spatial: Tensor, images: Tensor, keep: Keep | None) -> None:
        """One chunk; its images first, so that a chunk that is there is complete."""
        if keep is not None:
            keep(self.indices(chunk), images)
        save_tensors(self.path(chunk), {"pool": pool, "spatial": spatial})

    def read(self, name: str) -> Iterator[Tensor]:
        """The "pool" or "spatial" features, chunk by chunk, in the order of the images."""
        for c in self.chunks:
            try:
                yield read_tensor(self.path(c), name)
            except ValueError as error:
                raise ValueError(f"{error}: delete it and start again") from None

    def pool(self) -> Tensor:
        """All pooled features (N, D)."""
        return torch.cat(list(self.read("pool")))


def chunk_size(config: EvalConfig, me: Ranks) -> int:
    """Images at a time: --batch, or what suits the device."""
    return config.batch or (64 if me.device.type == "cuda" else 8)

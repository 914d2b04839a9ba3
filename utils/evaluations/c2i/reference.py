"""The real images that samples are compared with: statistics, and pooled features for precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrained.download import HERE
from utils.config.sampling import EvalConfig
from utils.evaluations.c2i.features import Extractor
from utils.evaluations.c2i.images import ImageSource, fingerprint, npz_array, open_images
from utils.evaluations.c2i.metrics import Statistics, check_count
from utils.evaluations.c2i.store import FeatureStore
from utils.runtime.distributed import Ranks
from utils.runtime.files import digest, replacing

BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
# guided-diffusion's reference batches, by the names that --reference takes.
NAMED = {"imagenet256": "256/VIRTUAL_imagenet256_labeled.npz", "imagenet512": "512/VIRTUAL_imagenet512.npz"}
PR_IMAGES = 10_000  # reference images of precision and recall


@dataclass(frozen=True)
class Reference:
    """Of the real images."""

    pool: Statistics
    spatial: Statistics
    features: Tensor  # (M, D) pooled, for precision and recall

    @classmethod
    def of_store(cls, store: FeatureStore, saved: tuple[Statistics, Statistics] | None = None) -> Reference:
        """From features on disk, with the statistics that are `saved`, or those of the features.

        Precision and recall use at most 10,000 images, evenly spaced.
        """
        features = store.pool()
        n = min(PR_IMAGES, len(features))
        picked = torch.arange(n) * len(features) // n
        pool, spatial = saved or (Statistics.of(features), Statistics.of(store.read("spatial")))
        return cls(pool, spatial, features[picked])


def save_reference(reference: Reference, features: str, path: Path) -> None:
    """An npz with mu, sigma, mu_s, sigma_s as in guided-diffusion's, and the pooled features instead of the images."""
    arrays = {
        "mu": reference.pool.mean.numpy(),
        "sigma": reference.pool.covariance.numpy(),
        "mu_s": reference.spatial.mean.numpy(),
        "sigma_s": reference.spatial.covariance.numpy(),
        "pool": reference.features.numpy(),
        "features": np.array(features),
    }
    with replacing(path) as partial, partial.open("wb") as file:  # given a name, NumPy would append .npz to it
        np.savez(file, **arrays)  # type: ignore[arg-type]


def saved_statistics(path: Path) -> tuple[Statistics, Statistics] | None:
    """mu, sigma and mu_s, sigma_s of an npz; None when it holds none."""
    arrays = {name: npz_array(path, name) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    if any(array is None for array in arrays.values()):
        return None
    mu, sigma, mu_s, sigma_s = (torch.from_numpy(np.array(a, dtype=np.float64)) for a in arrays.values())
    if sigma.shape != (len(mu), len(mu)) or sigma_s.shape != (len(mu_s), len(mu_s)):
        raise ValueError(f"{path}: mu and sigma do not fit, {tuple(mu.shape)} and {tuple(sigma.shape)}")
    return Statistics(mu, sigma), Statistics(mu_s, sigma_s)


def load_reference(
    config: EvalConfig,
    extractor: Extractor,
    chunk: int,
    me: Ranks,
    directory: Path,
    view: Callable[[ImageSource], ImageSource] | None,
) -> Reference | None:
    """The reference that --reference names, on the first rank; None on others, and when there is none to speak of.

    Statistics in the file are taken when they belong to these features and to full-size images; else they are computed
    from its images.
    """
    if not config.reference and extractor.name != "inception":
        return None
    named = config.reference or "imagenet256"
    path = fetch_batch(named, me) if named in NAMED else Path(named)
    if config.reference_sha256 and not path.is_file():
        raise ValueError(f"--reference_sha256 needs a reference file, and {path} is none")
    if config.reference_sha256 and digest(path) != config.reference_sha256.lower():
        raise ValueError(f"{path} has the SHA-256 {digest(path)}, not {config.reference_sha256}")
    if path.is_file():
        kind = npz_array(path, "features")
        if kind is not None:  # --make_reference wrote it
            if str(kind) != extractor.name or view is not None:
                what = "at an intermediate scale" if view else f"of {extractor.name}"
                raise ValueError(f"{path} holds statistics of {kind} at full size, not {what}: name the images")
            pool, spatial = saved_statistics(path)
            return Reference(pool, spatial, torch.from_numpy(np.array(npz_array(path, "pool"))))
    source = open_images(path, config.image_size)
    saved = saved_statistics(path) if path.is_file() and extractor.name == "inception" and view is None else None
    source = view(source) if view is not None else source
    check_count(len(source), f"--reference {named}")
    described = {"images": str(path), "count": len(source), "image_size": config.image_size}
    described |= {"shape": list(source.batch(range(1)).shape[-2:]), "features": extractor.name}
    described |= {"images_sha256": fingerprint(path)}
    store = FeatureStore(directory, len(source), chunk, described, me)
    store.fill(source, extractor, "reference")
    return Reference.of_store(store, saved) if me.first else None  # gigabytes that the others do not ask for


def batch_file(name: str) -> Path:
    """Place of a named reference batch."""
    return HERE / Path(NAMED[name]).name


def fetch_batch(name: str, me: Ranks) -> Path:
    """A named reference batch of guided-diffusion (2 GB, or 8), downloaded when it is missing."""
    file, url = batch_file(name), f"{BATCHES}/{NAMED[name]}"
    if me.first and not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
        except OSError as error:
            raise ValueError(
                f"no {file}, and {url} cannot be reached ({error}): "
                "fetch it elsewhere and put it there, or give --reference PATH"
            ) from None
    me.barrier()
    return file

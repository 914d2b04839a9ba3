"""Fetch and check what an evaluation would download: Inception's weights and ImageNet's reference batch.

bash scripts/setup_eval.sh
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from utils.evaluations.c2i.features import make_extractor
from utils.evaluations.c2i.images import npz_array
from utils.evaluations.c2i.reference import fetch_batch, saved_statistics
from utils.runtime.distributed import alone
from utils.runtime.entry import entry
from utils.runtime.flags import Parser


def check_inception(path: str) -> str:
    """Reads the weights, fetched unless a path is given, into the network. Returns a line on them."""
    extractor = make_extractor("inception", path, torch.device("cpu"))
    count = sum(p.numel() for p in extractor.parameters())
    return f"Inception: {count / 1e6:.1f} M parameters, {path or 'in ' + torch.hub.get_dir() + '/checkpoints'}"


def check_reference(path: str) -> str:
    """Reads a reference batch, ImageNet's and fetched unless a path is given, to its end. Returns a line on it."""
    file = Path(path) if path else fetch_batch("imagenet256", alone())
    if not file.is_file():
        raise ValueError(f"no file {file}")
    images, statistics = npz_array(file, "arr_0"), saved_statistics(file)
    if statistics is None or images is None:
        raise ValueError(f"{file} is no reference batch: it must hold arr_0, mu, sigma, mu_s and sigma_s")
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{file} is damaged at {damaged}: delete it and start again")
    sizes = ", ".join(str(len(s.mean)) for s in statistics)
    return f"reference: {len(images)} images of {images.shape[1]}×{images.shape[2]}, statistics of {sizes}, {file}"


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m utils.evaluations.c2i.setup")
    parser.add_argument("--inception_weights", default="", help="check this file; empty: fetch it when it is missing")
    parser.add_argument("--reference", default="", help="check this npz; empty: fetch ImageNet's when it is missing")
    args = parser.parse_args()
    checks: list[tuple[Callable[[str], str], str]] = [
        (check_inception, args.inception_weights),
        (check_reference, args.reference),
    ]
    failed = []
    for check, path in checks:
        try:
            print(check(path))
        except (OSError, ValueError) as error:  # the other one may be there
            failed.append(str(error))
    if failed:
        raise ValueError("; and ".join(failed))


if __name__ == "__main__":
    main()

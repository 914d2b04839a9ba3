"""Samples → FID, sFID, IS, precision and recall of the guided-diffusion protocol, over any number of ranks.

bash scripts/eval_SAR_d16.sh
"""

from __future__ import annotations

import utils.runtime.threads  # noqa: F401  # isort: skip

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.flexvar import FlexVARConfig
from models.pipeline import SARPipeline, is_pipeline, open_pipeline
from models.sampling import sample_codes
from models.tokenizer import exact_convolutions, to_bytes
from models.weights import digest_of, find_weights
from utils.config.sampling import OF_SOME, EvalConfig
from utils.evaluations.c2i.features import Extractor, make_extractor
from utils.evaluations.c2i.images import ImageSource, Resized, describe_images, fingerprint, open_images, write_npz
from utils.evaluations.c2i.metrics import check_count
from utils.evaluations.c2i.reconstruction import evaluate_reconstructions
from utils.evaluations.c2i.reference import NAMED, Reference, batch_file, load_reference, save_reference
from utils.evaluations.c2i.report import compare, score, write_report, write_sweep
from utils.evaluations.c2i.store import FeatureStore, chunk_size
from utils.runtime.distributed import Ranks, ranks
from utils.runtime.entry import check_output_directory, check_output_file, entry, notice, refuse_inside
from utils.runtime.files import digest, read_json, save_array, write_json
from utils.runtime.flags import parse
from utils.runtime.numerics import Precision, derive_seed
from utils.runtime.process import cores
from utils.runtime.provenance import versions


def label_order(total: int, classes: int, seed: int) -> Tensor:
    """The class of every image: each class equally often, in one seeded permutation (total,).

    Sorted classes would break the Inception Score, whose splits are runs of consecutive samples.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(total) % classes)[order]


class Generated:
    """Images of a model; image i's class and seed are functions of i alone."""

    def __init__(self, pipeline: SARPipeline, config: EvalConfig, cfg: float, top_k: int, top_p: float):
        classes = config.num_classes_eval or pipeline.model.config.num_classes
        if classes > pipeline.model.config.num_classes:
            raise ValueError(f"the model knows {pipeline.model.config.num_classes} classes, not {classes}")
        self.labels = label_order(classes * config.num_samples, classes, config.seed)
        self.pipeline, self.seed = pipeline, config.seed
        self.draw = pipeline.sampling_config(**{**config.options, "cfg": cfg, "top_k": top_k, "top_p": top_p})
        sides = pipeline.schedule.sides
        if config.eval_scale and config.eval_scale not in sides:
            raise ValueError(f"--eval_scale {config.eval_scale} is none of the scales {sides}")
        self.side = config.eval_scale or sides[-1]
        self.precision, self.tf32 = Precision(config.precision, pipeline.device), config.decode_tf32

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def batch(self, indices: range) -> Tensor:
        seeds = [derive_seed("eval", self.seed, i) for i in indices]
        vae, model, schedule = self.pipeline.vae, self.pipeline.model, self.pipeline.schedule
        labels = self.labels[indices.start : indices.stop]
        with self.precision.autocast():
            codes = sample_codes(model, vae.pathway, labels, schedule, self.draw, seeds, until=self.side)
        with exact_convolutions(self.tf32):  # outside of autocast: pictures are compared with real ones
            return to_bytes(vae.decode_at(codes, self.side, schedule))


def save_images(config: EvalConfig, directory: Path) -> Callable[[range, Tensor], None] | None:
    """Function that saves a chunk of images, by --save_png and --save_npz."""
    if not (config.save_png or config.save_npz):
        return None
    (directory / "png").mkdir(parents=True, exist_ok=True)
    (directory / "arrays").mkdir(parents=True, exist_ok=True)

    def keep(indices: range, images: Tensor) -> None:
        arrays = images.permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
        if config.save_png:
            for i, array in zip(indices, arrays, strict=True):
                Image.fromarray(array).save(directory / f"png/{i:06d}.png")
        if config.save_npz:
            save_array(directory / f"arrays/{indices.start:06d}.npy", arrays)

    return keep


def evaluate_samples(
    config: EvalConfig,
    setting: tuple[float, int, float],
    decay: float | None,
    pipeline: SARPipeline,
    extractor: Extractor,
    reference: Reference | None,
    me: Ranks,
    directory: Path,
    digests: dict[str, str],
) -> dict:
    """Sample at one setting and judge it. Returns the report (on the first rank)."""
    cfg, top_k, top_p = setting
    source = Generated(pipeline, config, cfg, top_k, top_p)
    described = {
        "checkpoint": config.ckpt,
        **digests,
        "moving_average": config.use_ema if decay is None or not config.sweep_ema else decay,
        "classes": int(source.labels.max()) + 1,
        "images_per_class": config.num_samples,
        "guidance": config.guidance,
        "cfg": cfg,
        "top_k": top_k,
        "top_p": top_p,
        "scales": list(pipeline.schedule.sides),
        "max_pn": source.draw.max_pn,
        **{name: getattr(config, name) for name in OF_SOME if name in pipeline.model.reads},
        "evaluated_side": source.side,
        "seed": config.seed,
        "precision": source.precision.name,
        "decoded_in": "tf32" if source.tf32 else "fp32",
        **({"compiled": True} if config.compile else {}),  # which rounds in other places
        "saved": [name for name in ("npz", "png") if getattr(config, f"save_{name}")],
    }
    features = {"features": extractor.name, **named_weights(config, extractor)}
    store = FeatureStore(directory / "features", len(source), chunk_size(config, me), {**described, **features}, me)
    began = time.perf_counter()
    made = store.fill(source, extractor, "sampling", save_images(config, directory))
    seconds = time.perf_counter() - began
    if not me.first:
        return {}
    if config.save_npz:
        write_npz(sorted((directory / "arrays").glob("[0-9]*.npy")), directory / "samples.npz")
    record = directory / "report.json"
    # With features and decoding. Where all of it was there, the speed was measured when it was made.
    speed = made / seconds if made else read_json(record).get("images_per_second") if record.is_file() else None
    known = {} if speed is None else {"images_per_second": speed}
    return {**score(store, extractor, reference, config), **known, "settings": described}


def open_samples(config: EvalConfig) -> ImageSource:
    """Samples that are there. Raises ValueError when they are fewer than --expect."""
    source = open_images(config.samples, config.image_size, config.seed)
    if len(source) < config.expect:
        raise ValueError(f"{config.samples} holds {len(source)} images, fewer than --expect {config.expect}")
    return source


def evaluate_files(
    config: EvalConfig,
    source: ImageSource,
    extractor: Extractor,
    reference: Reference | None,
    me: Ranks,
    directory: Path,
) -> dict[str, Any]:
    """Samples that are there: an npz or a folder."""
    described = {**describe_images(config.samples, config, extractor), **named_weights(config, extractor)}
    store = FeatureStore(directory / "features", len(source), chunk_size(config, me), described, me)
    store.fill(source, extractor, "samples")
    if not me.first:
        return {}
    if config.make_reference:
        save_reference(Reference.of_store(store), extractor.name, Path(config.make_reference))
        return {"samples": len(source), "settings": described}
    return {**score(store, extractor, reference, config), "settings": described}


def named_weights(config: EvalConfig, extractor: Extractor) -> dict[str, str]:
    """Digest of a feature network whose weights the user named: features depend on it."""
    return {"inception_sha256": digest_of(extractor)} if config.inception_weights else {}


def open_model(config: EvalConfig, decay: float | None, me: Ranks) -> SARPipeline:
    """The model to judge: its weights, or a moving average of them."""
    pipeline = open_pipeline(config.ckpt, config.vae_ckpt, config.pn, decay is not None, decay or 0.0).to(me.device)
    if config.compile:
        pipeline.compile_parts()
    return pipeline


def digests_of(pipeline: SARPipeline) -> dict[str, str]:
    """SHA-256 of the weights that are judged."""
    return {"weights_sha256": digest_of(pipeline.model), "tokenizer_sha256": digest_of(pipeline.vae)}


def prepare(config: EvalConfig, me: Ranks) -> SARPipeline | None:
    """Checks all that is cheap before anything is fetched or computed, and opens the model that is to be sampled."""
    directory, tokenizer = Path(config.out_dir), config.vae_ckpt or FlexVARConfig.released_tokenizer
    config.check_sources()
    refuse_inside(directory, "--out_dir", config.samples, config.reconstruct, config.reference)
    pipeline = None
    if config.reconstruct:
        find_weights(tokenizer)
    elif not config.samples:
        pipeline = open_model(config, config.averages()[0], me)
        config.check_model(type(pipeline.model).__name__, pipeline.model.reads)
        depth = pipeline.model.config.depth
        if config.depth not in (0, depth):
            raise ValueError(f"{config.ckpt} has {depth} transformer blocks, not --depth {config.depth}")
        source = Generated(pipeline, config, *config.settings()[0])
        if greedy := pipeline.greedy_sides(source.draw):
            notice(greedy)
    check_output_directory(directory, "--out_dir")
    if (directory / "checkpoints").is_dir() or is_pipeline(directory):
        what = "a run's directory" if (directory / "checkpoints").is_dir() else "a pipeline"
        raise ValueError(
            f"--out_dir {directory} is {what}, whose config.json an evaluation would replace: name another"
        )
    if config.make_reference:
        check_output_file(config.make_reference, "--make_reference")
    return pipeline


def shared_extractor(config: EvalConfig, me: Ranks) -> Extractor:
    """The network that --features names. The first rank fetches its weights, where they are missing, for all."""
    if not me.first:
        me.barrier()
    extractor = make_extractor(config.features, config.inception_weights, me.device)
    if me.first:
        me.barrier()
    return extractor


def open_reference(
    config: EvalConfig, pipeline: SARPipeline | None, source: ImageSource, extractor: Extractor, me: Ranks
) -> tuple[str, Reference | None, dict[str, object]]:
    """The real images that samples are compared with: their name, they (on the first rank), and how it is done.

    Args:
        source: the samples, of the pipeline or given.
    """
    default = "imagenet256" if config.features == "inception" and not config.make_reference else "none"
    named, view = config.reference or default, None
    path = batch_file(named) if named in NAMED else Path(named)
    settings: dict[str, object] = {"split_size": config.split_size}
    if named == "none":
        return named, None, settings
    check_count(len(source), "the samples")
    if pipeline is None:
        size = source.batch(range(1)).shape[-1]
    else:
        size = pipeline.vae.pixels(pipeline.schedule.sides[-1], pipeline.schedule)
        shown = pipeline.vae.pixels(config.eval_scale, pipeline.schedule) if config.eval_scale else size
        view = partial(Resized, side=shown) if shown != size else None
    if not config.reference and size != 256:
        raise ValueError(
            f"the samples are {size} pixels wide, and the reference batch of ImageNet, which is the default, 256: "
            "name --reference"
        )
    reference = load_reference(config, extractor, chunk_size(config, me), me, Path(config.out_dir) / "reference", view)
    sha256 = (digest(path) if path.is_file() else fingerprint(path)) if me.first else ""
    crop = {"reference_image_size": config.image_size} if config.image_size else {}
    return str(path), reference, {**settings, "reference_sha256": sha256, **crop, "pr_fp16": config.pr_fp16}


def evaluate_model(
    config: EvalConfig, pipeline: SARPipeline, extractor: Extractor, reference: Reference | None, me: Ranks
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Samples at every point of the sweep, or at the one setting, judged: where, and the report (on the first rank)."""
    points = list(product(config.averages(), config.settings()))
    opened, digests, directory = config.averages()[0], digests_of(pipeline), Path(config.out_dir)
    for decay, setting in points:
        if decay != opened:
            pipeline, opened = open_model(config, decay, me), decay
            digests = digests_of(pipeline)
        name = "cfg{:g}_k{}_p{:g}".format(*setting) + (f"_ema{decay:g}" if config.sweep_ema else "")
        place = directory / name if len(points) > 1 else directory
        yield place, evaluate_samples(config, setting, decay, pipeline, extractor, reference, me, place, digests)


def run(config: EvalConfig, me: Ranks) -> None:
    directory, pipeline = Path(config.out_dir), prepare(config, me)
    extractor = shared_extractor(config, me)
    common: dict[str, Any] = {"features": extractor.name, "versions": versions(me)}
    settings: dict[str, object] = {}
    found: Iterable[tuple[Path, dict[str, Any]]]
    if config.reconstruct:
        found = [(directory, evaluate_reconstructions(config, extractor, me, directory))]
    else:
        source = Generated(pipeline, config, *config.settings()[0]) if pipeline else open_samples(config)
        common["reference"], reference, settings = open_reference(config, pipeline, source, extractor, me)
        if pipeline is not None:
            found = evaluate_model(config, pipeline, extractor, reference, me)
        else:
            found = [(directory, evaluate_files(config, source, extractor, reference, me, directory))]
    rows = []
    for place, report in found:  # as they come: a sweep that is killed leaves what it has
        if me.first:
            rows.append({**report, "settings": {**report["settings"], **settings}, **common})
            write_report(rows[-1], place)
    if len(rows) > 1:
        write_sweep(rows, directory)
    if me.first:
        write_json(directory / "config.json", asdict(config))


@entry
def main() -> None:
    config = parse(EvalConfig, description=__doc__)
    if config.compare:
        return print(compare(config.compare))
    with ranks(timedelta(hours=12)) as me:  # while the first one fetches gigabytes, or computes numbers, others wait
        if me.device.type == "cpu":
            # Convolutions differ in the last digits with the number of threads: the same one, however many ranks.
            torch.set_num_threads(cores())
        run(config, me)


if __name__ == "__main__":
    main()

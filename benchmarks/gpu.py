"""Everything worth measuring on a GPU, in one command of at most 25 minutes: a table and JSON for docs/benchmarks.md.

    python -m benchmarks.gpu                     # out/gpu/gpu.json and gpu.md; goes on where it stopped
    python -m benchmarks.gpu --dry_run           # on a CPU, everything tiny: does it run to the end?
    python -m benchmarks.gpu --only steps        # rows whose name contains this

Full-size models with random weights, on noise. A row is written as soon as it is measured; one that does not fit, or
fails, says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.attention import kinds_of_attention
from benchmarks.common import Ruler, forward_flops, machine, peak_memory, reset_peak
from benchmarks.train_step import DEFAULT, KINDS, make_trainer
from models import FlexVARConfig, Guidance, SamplingConfig, ScaleSchedule
from models.sampling import TOP_K, TOP_P, evaluating, sample_codes
from models.scales import draw_schedule
from models.tokenizer import exact_convolutions, to_bytes
from train import sized_model
from trainer import Trainer
from utils.config.training import ModelConfig, SARConfig
from utils.evaluations.c2i.features import EfficientNetLite
from utils.reporting.tables import markdown
from utils.runtime.distributed import alone
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.files import read_json, write_json
from utils.runtime.flags import Parser, parse
from utils.runtime.numerics import Precision
from utils.training.estimate import IMAGENET, MEMORY, estimate

Row = dict[str, object]


@dataclass(frozen=True)
class Stage:
    """Sizes of everything: the real ones, or tiny ones."""

    device: torch.device
    precision: str
    image: int  # pixels of a side
    pn: str
    depths: tuple[int, ...]
    width: int  # 0: 64 · depth
    samples: tuple[int, ...]  # batches
    steps: int  # measured steps of a row
    tiny: bool

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.pn)

    def ruler(self, dtype: torch.dtype) -> Ruler:
        return Ruler(self.device, dtype, 128 if self.tiny else 0)

    @property
    def memory(self) -> float:
        """GB of the card."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory / 1e9
        return float(MEMORY[0])


def stage(dry: bool) -> Stage:
    """The real sizes, or with --dry_run tiny ones on a CPU."""
    if dry:
        return Stage(torch.device("cpu"), "fp32", 64, "1_2_4", (1,), 64, (1, 2), 2, True)
    device = alone().device
    if device.type != "cuda":
        raise ValueError("there is no GPU here: --dry_run tries the command on the CPU, in tiny sizes")
    return Stage(device, "bf16", 256, DEFAULT, (16, 20, 24), 0, (1, 16, 128), 12, False)


@contextmanager
def plain_weights() -> Iterator[None]:
    """Inside, models start from weights that are quick to draw: speed does not depend on them."""

    def fill(x: torch.Tensor, std: float) -> torch.Tensor:
        return x.uniform_(-1.7 * std, 1.7 * std)

    with patch.object(nn.Linear, "reset_parameters", lambda _: None), patch.object(nn.init, "trunc_normal_", fill):
        yield


# ------------------------------------------------------------------------------------------------- rows


MODES, ROLLOUTS = ("teacher_forcing", "csfl"), ("cfg", "argmax", "sample")


@dataclass(frozen=True)
class Step:
    """A training step to be measured."""

    model: str = "flexvar"
    depth: int = 16
    mode: str = "csfl"
    rollout: str = "cfg"
    ssr: str = "all"
    schedule: str = "fixed"
    cached: bool = True
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        what = "TF" if self.mode == "teacher_forcing" else f"SAR {self.rollout} {self.ssr}"
        source = "cached" if self.cached else "images"
        return " ".join(["steps", f"{self.model}-d{self.depth}", what, self.schedule, source, *self.flags])


def steps(depths: tuple[int, ...]) -> list[Step]:
    """The steps that are measured: as they are trained by the scripts, then each choice by itself on the smallest."""
    d, compiled = depths[0], ("--compile",)
    trained = [Step(depth=n, mode=m, schedule="flexvar", flags=compiled) for n in depths for m in MODES]
    plain = [Step(depth=d, mode=m, schedule=s) for m in MODES for s in ("flexvar", "fixed")]
    fixed = [Step(depth=d, flags=compiled)]
    rollouts = [Step(depth=d, rollout=r, ssr=s, flags=compiled) for r in ROLLOUTS for s in ("all", "last")][1:]
    images = [Step(depth=d, cached=False, flags=(*compiled, *f)) for f in ((), ("--encode_tf32",))]
    saving = [Step(depth=d, flags=("--checkpoint_activations",))]
    others = [
        *(Step("var", d, mode, flags=compiled) for mode in MODES),
        Step("flowar", 12, "teacher_forcing"),
        Step("flowar", 12, "csfl", flags=("--rollout_steps=4",)),
    ]
    return [*trained[:2], *plain, *fixed, *trained[2:], *images, *rollouts, *saving, *others]


def measure_step(step: Step, place: Stage, directory: Path) -> Row:
    """Images a second, share of the matrix products' speed, memory, recompiled graphs and waits of a training step."""
    try:
        return measured_step(step, place, directory, 2 if place.tiny else fitting(step, place))
    finally:
        torch._dynamo.reset()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


def fitting(step: Step, place: Stage) -> int:
    """Images that fit the card by the estimate, a multiple of 8; at most 64."""
    sar = SARConfig(training_mode=step.mode, **({"ssr": step.ssr} if step.mode == "csfl" else {}))
    if step.model != "flexvar":
        return 32
    vae, config = KINDS[step.model].tokenizer(False), FlexVARConfig(depth=step.depth)
    return max(8, min(64, estimate(config, vae, place.schedule, sar).micro_batch(place.memory) // 8 * 8))


def measured_step(step: Step, place: Stage, directory: Path, batch: int) -> Row:
    width = [f"--width={place.width}"] if place.width else []
    more = [*step.flags, *width, *(["--schedule=flexvar"] if step.schedule == "flexvar" and not place.tiny else [])]
    args = argparse.Namespace(
        model=step.model, mode=step.mode, rollout=step.rollout, ssr=step.ssr, cached=step.cached, plain=False,
        precision=place.precision, workers=0 if place.tiny else 8, flags=more, image=place.image, tiny=place.tiny,
    )  # fmt: skip
    pn = place.pn if place.tiny else KINDS[step.model].pn
    with plain_weights():
        trainer = make_trainer(args, step.depth, batch, pn, directory / step.model)
        device, ruler = trainer.ranks.device, place.ruler(trainer.precision.dtype)
        batches = iter(trainer.loader())
        for _ in range(3):
            trainer.train_step(batches)
        reset_peak(device)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        waits = count_waits(lambda: trainer.train_step(batches), device)
        timing = ruler.measure(lambda: [trainer.train_step(batches) for _ in range(place.steps)], 1, warm_up=0)
        images = place.steps * batch / timing.seconds
        found: Row = {"batch": batch, "images/s": images, "ms a step": 1e3 * timing.seconds / place.steps}
        if step.model == "flexvar":
            sar = trainer.config.sar
            cost = estimate(
                trainer.model.config,
                trainer.vae.cpu(),
                place.schedule,
                sar,
                trainer.precision.dtype,
                cached=step.cached,
            )
            flops = cost.flops * drawn_share(trainer, place)
            found |= {"TFLOP an image": flops / 1e12, "TFLOP/s": images * flops / 1e12}
            found["share of products' speed"] = images * flops * timing.seconds / timing.products / ruler.flops
            found["estimated GB"] = (cost.fixed + batch * cost.image) / 1e9
        found["peak GB"] = peak_memory(device) * 2**30 / 1e9
        found["new graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        found["waits"] = waits
        return found | {"h for 10 epochs of ImageNet": 10 * IMAGENET / images / 3600}


def drawn_share(trainer: Trainer, place: Stage) -> float:
    """Mean cost of the schedules of the steps that were just measured, of the longest one's."""
    seed, config = trainer.config.run.seed, trainer.model.config
    if trainer.config.model.schedule == "fixed":
        return 1.0
    drawn = [draw_schedule(seed, trainer.step - 1 - i) for i in range(place.steps)]
    return sum(forward_flops(config, s) for s in drawn) / len(drawn) / forward_flops(config, place.schedule)


def count_waits(call: Callable[[], object], device: torch.device) -> int | str:
    """Count of waits of the host for the GPU."""
    if device.type != "cuda":
        call()
        return "no GPU"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return sum("synchroniz" in str(w.message) for w in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parity(place: Stage) -> Row:
    """Half precision, and TF32, against fp32, on a full-size FlexVAR and tokenizer of random weights."""
    torch.manual_seed(0)
    vae = KINDS["flexvar"].tokenizer(place.tiny).to(place.device).eval()
    sizes = {"codebook_size": vae.config.codebook_size, "codebook_dim": vae.config.codebook_dim}
    model = FlexVARConfig(depth=place.depths[0], width=place.width, **sizes).build().to(place.device).eval()
    images = torch.rand(4, 3, place.image, place.image, device=place.device) * 2 - 1
    exact = vae.tokenize(images, place.schedule.sides)
    vae.tf32 = True
    rounded = vae.tokenize(images, place.schedule.sides)
    tokens = torch.cat(list(exact.values()), 1)
    same = (torch.cat(list(rounded.values()), 1) == tokens).float().mean().item()
    labels = torch.arange(4, device=place.device)
    inputs, logits = model.inputs(tokens, vae.pathway, place.schedule), {}
    with torch.no_grad():
        logits["fp32"] = model(labels, inputs, place.schedule)
        with Precision("bf16", place.device).autocast():
            logits["bf16"] = model(labels, inputs, place.schedule).float()
    error = (logits["bf16"] - logits["fp32"]).abs()
    agree = (logits["bf16"].argmax(-1) == logits["fp32"].argmax(-1)).float().mean().item()
    return {
        "largest error of a logit in bf16": error.max().item(),
        "logits' deviation": logits["fp32"].std().item(),
        "likeliest token agrees": agree,
        "codes equal in TF32": same,
    }


@dataclass(frozen=True)
class Sampling:
    """Sampling to be measured."""

    model: str
    depth: int
    batch: int
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"sampling {self.model}-d{self.depth}, {self.batch} at a time{', compiled' * self.compiled}"


def samplings(place: Stage) -> list[Sampling]:
    """The sampling that is measured."""
    least, small, large = (place.samples[i] for i in (0, -2, -1))
    d, flow = place.depths[0], 1 if place.tiny else 6
    eager = [Sampling("flexvar", d, n) for n in place.samples]
    compiled = [Sampling("flexvar", n, large, True) for n in place.depths]
    others = [Sampling("flexvar", d, least, True), Sampling("var", d, small), Sampling("flowar", flow, small)]
    return [*eager, *compiled[:1], *others, *compiled[1:]]


def measure_sampling(place: Stage, what: Sampling) -> Row:
    """Images a second, guided, as in the evaluation: codes in half precision, decoded in fp32 and in TF32."""
    kind, precision = KINDS[what.model], Precision(place.precision, place.device)
    vae = kind.tokenizer(place.tiny).to(place.device).eval().requires_grad_(False)
    schedule = place.schedule if place.tiny else ScaleSchedule.parse(kind.pn)
    flags = [f"--depth={what.depth}", f"--pn={schedule}", "--schedule=fixed"]
    flags += [f"--width={place.width}", *kind.flags_of(place.tiny)]
    with plain_weights():
        model = sized_model(parse(ModelConfig, flags), vae, 1000).build().to(place.device).eval()
    for part in (model, vae) if what.compiled else ():
        part.compile_parts()
    config, ruler = SamplingConfig(Guidance("ramp", 2.2), TOP_K, TOP_P), place.ruler(precision.dtype)

    def codes() -> dict:
        labels = torch.arange(what.batch) % model.config.num_classes
        with torch.no_grad(), precision.autocast():
            return sample_codes(model, vae.pathway, labels, schedule, config, range(what.batch))

    drawn = codes()

    def decode(tf32: bool) -> None:
        with torch.no_grad(), exact_convolutions(tf32):
            to_bytes(vae.decode_at(drawn, schedule.sides[-1], schedule))

    reset_peak(place.device)
    drawing = ruler.measure(codes, 3).seconds
    exact, rounded = (ruler.measure(partial(decode, tf32), 2).seconds for tf32 in (False, True))
    return {
        "images/s": what.batch / (drawing + exact),
        "images/s, decoding in TF32": what.batch / (drawing + rounded),
        "s, codes": drawing,
        "s, decoding": exact,
        "s, decoding in TF32": rounded,
        "peak GB": peak_memory(place.device) * 2**30 / 1e9,
    }


def judging(place: Stage) -> Row:
    """Images a second through the evaluation's network."""
    network, batch = EfficientNetLite().to(place.device), 2 if place.tiny else 128
    images = torch.zeros(batch, 3, place.image, place.image, dtype=torch.uint8, device=place.device)
    with evaluating(network):
        timing = place.ruler(torch.float32).measure(lambda: network(images), 3)
    return {"images/s": batch / timing.seconds}


def rows(place: Stage, directory: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row by name, the most wanted first."""
    yield "parity", lambda: parity(place)
    dtype, sizes = Precision(place.precision, place.device).dtype, (2, 2) if place.tiny else (32, 16)
    yield "attention", lambda: kinds_of_attention(place.schedule, *sizes, dtype, place.ruler(dtype))
    trained = [(step.name, partial(measure_step, step, place, directory)) for step in steps(place.depths)]
    drawn = [(what.name, partial(measure_sampling, place, what)) for what in samplings(place)]
    yield from (*trained[:7], *drawn[:4], *trained[7:], *drawn[4:])
    yield "judging efficientnet_lite0", lambda: judging(place)


def report(found: dict[str, Row]) -> str:
    """A table for each kind of row."""
    parts = []
    for kind in ("parity", "attention", "steps", "sampling", "judging"):
        mine = {name: row for name, row in found.items() if name.startswith(kind)}
        columns = list(dict.fromkeys(column for row in mine.values() for column in row))
        cells = [[name, *(shown(row.get(column, "")) for column in columns)] for name, row in mine.items()]
        if mine:
            parts.append(markdown([kind, *columns], cells))
    about = ", ".join(f"{k} {v}" for k, v in machine().items())
    return (
        f"Measured on {time.strftime('%Y-%m-%d')}: {about}. `python -m benchmarks.gpu`\n\n" + "\n\n".join(parts) + "\n"
    )


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, in tiny sizes")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, default=25, help="begin no row after this long")
    args = parser.parse_args()
    check_output_directory(args.out, "--out")
    place, began = stage(args.dry_run), time.monotonic()
    file, content = args.out / "gpu.json", {"machine": machine(), "dry_run": args.dry_run, "rows": {}}
    if file.is_file():
        before = read_json(file)
        if (before["machine"], before["dry_run"]) != (content["machine"], args.dry_run):
            raise ValueError(f"{file} is of another machine or size: use another --out")
        content = before
    quick = partial(torch.compile, backend="aot_eager") if args.dry_run else torch.compile  # seconds, not minutes
    with tempfile.TemporaryDirectory() as scratch, patch.object(torch, "compile", quick):
        for name, measure in rows(place, Path(scratch)):
            if args.only not in name or "error" not in content["rows"].get(name, {"error": ""}):
                continue
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{args.minutes:g} minutes are over: the same command goes on")
                break
            start = time.monotonic()
            try:
                row = measure()
            except (RuntimeError, ValueError) as error:  # out of memory is one: the other rows are worth having
                row = {"error": str(error).strip().splitlines()[0][:200]}
            content["rows"][name] = row
            print(f"{name} ({time.monotonic() - start:.0f} s): {', '.join(f'{k} {shown(v)}' for k, v in row.items())}")
            write_json(file, content)
    (args.out / "gpu.md").write_text(report(content["rows"]), encoding="utf-8")
    print(f"wrote {args.out / 'gpu.md'}")


if __name__ == "__main__":
    main()

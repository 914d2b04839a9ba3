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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.attention import dense
from benchmarks.common import Ruler, machine, peak_memory, reset_peak
from benchmarks.train_step import DEFAULT, KINDS, make_trainer
from models import FlexVARConfig, Guidance, SamplingConfig, ScaleSchedule, generate
from models.layers import ScaleCausalAttention, kernel_for
from models.sampling import TOP_K, TOP_P, evaluating
from train import sized_model
from utils.config.training import ModelConfig, SARConfig
from utils.evaluations.c2i.features import EfficientNetLite0
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


# ------------------------------------------------------------------------------------------------- rows


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
    """The steps that are measured: each choice by itself on the smallest model, the others as they are trained."""
    d = depths[0]
    drawn = [Step(depth=n, mode=m, schedule="flexvar") for n in depths for m in ("teacher_forcing", "csfl")]
    fixed = [Step(depth=d, mode=m) for m in ("teacher_forcing", "csfl")]
    rollouts = [Step(depth=d, rollout=r, ssr=s) for r in ("argmax", "sample") for s in ("all", "last")]
    last = [Step(depth=d, ssr="last")]
    images = [Step(depth=d, cached=False, flags=f) for f in ((), ("--encode_tf32",))]
    compiled = [Step(depth=d, schedule=s, flags=("--compile",)) for s in ("fixed", "flexvar")]
    saving = [Step(depth=d, flags=("--checkpoint_activations",))]
    others = [
        Step("var", d, "csfl"),
        Step("var", d, "teacher_forcing"),
        Step("flowar", 12, "teacher_forcing"),
        Step("flowar", 12, "csfl", flags=("--rollout_steps=4",)),
    ]
    return [*drawn, *fixed, *rollouts, *last, *images, *compiled, *saving, *others]


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
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        trainer = make_trainer(args, step.depth, batch, pn, Path(folder))
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
            found |= {"TFLOP an image": cost.flops / 1e12, "TFLOP/s": images * cost.flops / 1e12}
            found["share of products' speed"] = images * cost.flops * timing.seconds / timing.products / ruler.flops
            found["estimated GB"] = (cost.fixed + batch * cost.image) / 1e9
        found["peak GB"] = peak_memory(device) * 2**30 / 1e9
        found["new graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        found["waits"] = waits
        return found | {"h for 10 epochs of ImageNet": 10 * IMAGENET / images / 3600}


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


def attention(place: Stage) -> Row:
    """Milliseconds of a layer's attention, forward and backward: by groups, under one mask, and by packed sequences."""
    schedule, dtype = place.schedule, Precision(place.precision, place.device).dtype
    shape = (2 if place.tiny else 32, schedule.total, 2 if place.tiny else 16, 64)
    leaves = [F.normalize(torch.randn(shape, device=place.device), dim=-1).to(dtype).requires_grad_() for _ in range(3)]
    up, ruler = torch.randn(shape, device=place.device).to(dtype).transpose(1, 2), place.ruler(dtype)
    kinds = {"groups": ScaleCausalAttention(schedule, place.device), "one mask": dense(schedule, place.device)}
    found: Row = {}
    for name, attend in kinds.items():

        def call(attend=attend) -> object:
            return torch.autograd.grad(attend(*(x.transpose(1, 2) for x in leaves)), leaves, up)

        found[f"{name} ms"] = 1e3 * ruler.measure(call, 5).seconds
        found[f"{name}: kernels"] = kernels(call, place.device)
    packed = packed_attention(leaves, schedule, up)
    if packed is not None:
        found["packed ms"] = 1e3 * ruler.measure(packed, 5).seconds
    own = kernel_for(place.device, dtype)
    return found | {"optional kernel": own.name if own else "none"}


def packed_attention(leaves: list, schedule: ScaleSchedule, up: torch.Tensor) -> Callable[[], object] | None:
    """`torch.nn.attention.varlen` over the spans of all scales at once; None where it does not run."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    batch, device = len(leaves[0]), leaves[0].device

    def starts(lengths: tuple[int, ...]) -> torch.Tensor:
        """Starts of each scale of each image, and the end of all."""
        return torch.tensor([0, *lengths * batch], device=device).cumsum(0).int()

    queries, keys = starts(schedule.lengths), starts(schedule.offsets[1:])
    longest = max(schedule.lengths), schedule.total

    def call() -> object:
        q, k, v = leaves
        seen = [torch.cat([x[:, :end] for end in schedule.offsets[1:]], 1).flatten(0, 1) for x in (k, v)]
        out = varlen_attn(q.flatten(0, 1), *seen, queries, keys, *longest, scale=1.0)
        return torch.autograd.grad(out.unflatten(0, (batch, -1)).transpose(1, 2), leaves, up)

    try:
        call()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return call


def kernels(call: Callable[[], object], device: torch.device) -> str:
    """Names of the attention kernels that ran."""
    if device.type != "cuda":
        return "no GPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    wanted = ("flash", "cudnn", "efficient", "fmha", "math")
    return ", ".join(sorted(name.split("<")[0][:60] for name in names if any(w in name.lower() for w in wanted)))


def sampling(place: Stage, model_name: str, depth: int, batch: int) -> Row:
    """Images a second, guided, with the decoder."""
    torch.manual_seed(0)
    kind = KINDS[model_name]
    vae = kind.tokenizer(place.tiny).to(place.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    schedule = place.schedule if place.tiny else ScaleSchedule.parse(kind.pn)
    flags = [f"--depth={depth}", f"--pn={'_'.join(map(str, schedule.sides))}", "--schedule=fixed"]
    flags += [f"--width={place.width}", *kind.flags_of(place.tiny)]
    model = sized_model(parse(ModelConfig, flags), vae, 1000).build().to(place.device).eval()
    config = SamplingConfig(Guidance("ramp", 2.2), TOP_K, TOP_P)
    precision = Precision(place.precision, place.device)

    @torch.no_grad()
    def run() -> None:
        with precision.autocast():
            generate(model, vae, torch.arange(batch) % model.config.num_classes, schedule, config, range(batch))

    reset_peak(place.device)
    timing = place.ruler(precision.dtype).measure(run, 3)
    return {"images/s": batch / timing.seconds, "peak GB": peak_memory(place.device) * 2**30 / 1e9}


def judging(place: Stage) -> Row:
    """Images a second through the evaluation's network."""
    network, batch = EfficientNetLite0().to(place.device), 2 if place.tiny else 128
    images = torch.zeros(batch, 3, place.image, place.image, dtype=torch.uint8, device=place.device)
    with evaluating(network):
        timing = place.ruler(torch.float32).measure(lambda: network(images), 3)
    return {"images/s": batch / timing.seconds}


def rows(place: Stage, directory: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row by name, the most wanted first."""
    yield "parity", lambda: parity(place)
    yield "attention", lambda: attention(place)
    for step in steps(place.depths):
        yield step.name, lambda step=step: measure_step(step, place, directory)  # type: ignore[misc]
    for depth in place.depths:
        for batch in place.samples:
            yield (
                f"sampling flexvar-d{depth}, {batch} at a time",
                lambda depth=depth, batch=batch: sampling(place, "flexvar", depth, batch),  # type: ignore[misc]
            )
    for name, depth in (("var", place.depths[0]), ("flowar", 1 if place.tiny else 6)):
        yield (
            f"sampling {name}-d{depth}, {place.samples[1]} at a time",
            lambda name=name, depth=depth: sampling(place, name, depth, place.samples[1]),  # type: ignore[misc]
        )
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
    for name, measure in rows(place, args.out):
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

"""Shared by the benchmarks: a ruler, counted FLOPs, and how a result is printed."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import FlexVARConfig, ScaleSchedule
from utils.runtime.distributed import alone

ENCODE_FLOPS, DECODE_FLOPS = 0.138e12, 0.253e12  # of one 256×256 image through FlexVAE.pth's tokenizer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Medians over the repetitions."""

    seconds: float
    products: float  # in units of the ruler: ten products of 2048³ (8192³ on a GPU)


class Ruler:
    """Times calls against matrix products that run right before and after each: a shared machine's clock wanders."""

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int = 0):
        """`side` of the products; 0: 8192 on a GPU, else 2048."""
        self.device, side = device, side or (8192 if device.type == "cuda" else 2048)
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.flops = 10 * 2 * side**3
        self.product()

    def product(self) -> float:
        """Seconds of ten matrix products, G."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(10):
            self.a @ self.b
        synchronize(self.device)
        return time.perf_counter() - began

    def measure(self, call: Callable[[], object], repeats: int, warm_up: int = 1) -> Timing:
        for _ in range(warm_up):
            call()
        seconds, products, before = [], [], self.product()
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            synchronize(self.device)
            seconds.append(time.perf_counter() - began)
            after = self.product()
            products.append(seconds[-1] / ((before + after) / 2))
            before = after
        return Timing(statistics.median(seconds), statistics.median(products))

    def compare(self, a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
        """Median seconds of two calls that take turns, and the median of b's time over a's."""
        times: list[tuple[float, float]] = []
        for turn in range(repeats + 2):
            pair = []
            for call in (a, b):
                synchronize(self.device)
                began = time.perf_counter()
                call()
                synchronize(self.device)
                pair.append(time.perf_counter() - began)
            if turn > 1:  # the first two warm up
                times.append((pair[0], pair[1]))
        first, second = (statistics.median(pair[i] for pair in times) for i in (0, 1))
        return first, second, statistics.median(pair[1] / pair[0] for pair in times)


class Clock:
    """Seconds spent in named parts; of nested parts, each counts what is its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = 0.0

    def turn(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.turn()
        self.open.append(name)
        yield
        self.turn()
        self.open.pop()

    def around(self, call: Callable, name: str) -> Callable:
        """A function, timed."""

        def timed(*args, **kwargs):
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def forward_flops(config: FlexVARConfig, schedule: ScaleSchedule) -> float:
    """FLOPs of a forward of one image, attention by the pairs that are not masked."""
    width, pairs = config.width, sum(n * end for n, end in zip(schedule.lengths, schedule.offsets[1:], strict=True))
    per_token = 24 * width**2 * config.depth + 2 * width * config.codebook_size
    return schedule.total * per_token + 4 * width * pairs * config.depth


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB: allocated at most on a GPU; resident at most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> dict[str, str | int]:
    device = alone().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return models[0] if models else platform.processor()
    return platform.processor()


def show(title: str, rows: list[dict[str, object]]) -> None:
    """One table, then the same as JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}: {', '.join(f'{k} {v}' for k, v in machine().items())}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(shorten(row.get(name, "")) for name in columns) + " |")
    print("\n" + json.dumps({"benchmark": title, "machine": machine(), "command": sys.argv[1:], "rows": rows}))


def shorten(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def random_images(n: int, side: int) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

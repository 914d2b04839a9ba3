"""The benchmarks' arithmetic, and that each runs; what they measure is in docs/benchmarks.md."""

import json
import sys
import time

import pytest
import torch

from benchmarks.common import Clock, Ruler, forward_flops
from benchmarks.data import speed, write_cache
from benchmarks.sample import sort_everything
from models import FlexVARConfig
from models.head import sample_tokens
from models.scales import DEFAULT_SCHEDULE
from tests.conftest import run


@pytest.mark.parametrize(("depth", "teraflop"), [(16, 0.305), (20, 0.580), (24, 0.986)])
def test_counted_flops_are_the_known_ones(depth, teraflop):
    assert forward_flops(FlexVARConfig(depth=depth), DEFAULT_SCHEDULE) / 1e12 == pytest.approx(teraflop, rel=2e-3)


def test_nested_parts_count_their_own_seconds():
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"):
        time.sleep(0.05)
        clock.around(lambda: time.sleep(0.1), "inner")()
    assert clock.seconds["outer"] == pytest.approx(0.05, abs=0.03)
    assert clock.seconds["inner"] == pytest.approx(0.1, abs=0.03)


def test_the_ruler_relates_two_calls():
    ruler = Ruler(torch.device("cpu"), torch.float32)
    _, _, ratio = ruler.compare(lambda: time.sleep(0.02), lambda: time.sleep(0.06), 3)
    assert ratio == pytest.approx(3, rel=0.3)


def test_the_usual_sampler_draws_from_the_same_distribution():
    """What the sampler is compared with must do the same: the same tokens stay, equally often."""
    torch.manual_seed(0)
    logits, n = torch.randn(1, 50).expand(20_000, -1), 20_000
    counts = [
        torch.bincount(draw, minlength=50) / n
        for draw in (sort_everything(logits, 20, 0.8), sample_tokens(logits, 20, 0.8, torch.rand(n)))
    ]
    assert torch.equal(counts[0] > 0, counts[1] > 0)
    assert (counts[0] - counts[1]).abs().max() < 0.02


def test_reading_a_cache_of_imagenets_layout(tmp_path):
    cache = write_cache(tmp_path, images=600, shard=256, crops=2)
    assert len(cache) == 600
    assert speed(cache, 64, 0, 20) > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "attention --repeats 1",
        "sample --sampler",
        "sample --pn 1_2",
        "data --images 2000",
        "train_step --pn 1_2 --repeats 1 --parts",
    ],
)
def test_each_prints_a_table_and_json(command):
    name, *flags = command.split()
    out = run(sys.executable, "-m", f"benchmarks.{name}", *flags).stdout
    assert "|---|" in out
    result = json.loads(out.splitlines()[-1])
    assert result["rows"]
    assert result["machine"]["torch"] == torch.__version__

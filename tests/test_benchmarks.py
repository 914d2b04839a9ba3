"""The benchmarks' arithmetic, and that each runs; what they measure is in docs/benchmarks.md."""

import json
import sys
import time

import pytest
import torch

from benchmarks.common import Clock, Ruler, forward_flops
from benchmarks.compare import direction, read
from benchmarks.compare import main as compare
from benchmarks.data import speed, write_cache
from benchmarks.gpu import main as gpu
from benchmarks.sample import sort_everything
from models import FlexVARConfig
from models.head import sample_tokens
from models.scales import DEFAULT_SCHEDULE
from tests.conftest import run, tool


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


def test_the_gpu_benchmark_runs_dry_to_the_end_and_goes_on(tmp_path, monkeypatch):
    out = tool(gpu, "--dry_run", "--out", tmp_path, "--only", "steps flexvar-d1 TF", check=True)[1]
    assert "steps flexvar-d1 TF fixed cached (" in out
    before = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    forms = ("fixed cached", "flexvar cached", "flexvar cached --compile")
    assert set(before) == {f"steps flexvar-d1 TF {form}" for form in forms}
    # Compiling, which those rows did, is most of the time.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    out = tool(gpu, "--dry_run", "--out", tmp_path, check=True)[1]
    assert "flexvar-d1 TF fixed cached (" not in out  # it is there
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not [(name, row["error"]) for name, row in rows.items() if "error" in row]
    assert rows.items() >= before.items()
    assert all(row["images/s"] > 0 for name, row in rows.items() if name.startswith(("steps", "sampling", "judging")))
    assert rows["parity"]["likeliest token agrees"] > 0.9
    written = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in written for name in rows)


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, said = tool(gpu, "--out", tmp_path)
    assert status == 1
    assert "there is no GPU here: --dry_run" in said


@pytest.mark.parametrize(
    ("sign", "columns"),
    [
        (1, ["images/s", "images/s, decoding in TF32", "TFLOP/s", "share of products' speed", "codes equal in TF32"]),
        (1, ["likeliest token agrees"]),
        (
            -1,
            [
                "ms a step",
                "s, codes",
                "s, decoding in TF32",
                "peak GB",
                "new graphs",
                "waits",
                "largest error of a logit",
            ],
        ),
        (-1, ["h for 10 epochs of ImageNet", "G/image"]),
        (0, ["batch", "TFLOP an image", "estimated GB", "floor G", "logits' deviation"]),
    ],
)
def test_what_is_better_of_each_column_is_known(sign, columns):
    assert {column: direction(column) for column in columns} == dict.fromkeys(columns, sign)


def test_two_results_are_compared_and_a_regression_is_seen(tmp_path, capsys):
    def write(name, **row):
        content = {
            "machine": {"device": "x"},
            "rows": {"steps": {"images/s": 100.0, "peak GB": 10.0, "batch": 8, **row}},
        }
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    before = write("a.json")
    for change, worse in (
        ({}, False),
        ({"images/s": 96.0}, False),
        ({"images/s": 90.0}, True),
        ({"images/s": 150.0}, False),
        ({"peak GB": 11.0}, True),
        ({"peak GB": 5.0}, False),
        ({"batch": 16}, False),
        ({"error": "CUDA out of memory"}, True),
    ):
        status, out, _ = tool(compare, before, write("b.json", **change))
        assert status == worse, (change, out)
    printed = tmp_path / "printed.txt"
    printed.write_text("| a table |\n\n" + json.dumps({"machine": {"device": "y"}, "rows": [{"batch": 2, "s": 1.0}]}))
    assert read(printed)[1] == {"batch 2": {"batch": 2, "s": 1.0}}
    status, _, said = tool(compare, before, printed)
    assert status == 1
    assert "no row in common" in said

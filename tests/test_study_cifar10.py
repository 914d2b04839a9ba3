import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.plan_cifar10 import CLAIMS, MAIN, PN, VARIANTS
from experiments.report_cifar10 import PAPER, SHOWN, paired, same_guidance_table, verdict
from experiments.study_cifar10 import compare_at_equal_score, distance_at, main
from tests.conftest import run, tool
from utils.config.training import TrainConfig
from utils.runtime.flags import parse


def photographs(folder):
    """Ten classes of coloured noise, 60 images a split."""
    rng = np.random.default_rng(0)
    for i in range(120):
        path = folder / f"{'train' if i % 2 else 'val'}/{i // 2 % 10}/{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 25 * (i // 2 % 10) + 30, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_whole_study_in_a_few_steps(stages_here, tmp_path):
    """Two variants, two seeds; a second start does nothing anew."""
    out = tmp_path / "o"
    flags = [f"--data_path={photographs(tmp_path / 'data')}", "--size=smoke", "--workers=0", f"--out={out}"]
    flags += ["--only", "TF continued", "SAR guided"]
    tool(main, *flags, check=True)
    study = json.loads((out / "study.json").read_text())
    rows = study["rows"]
    assert {name: [row["seed"] for row in rows[name]] for name in rows} == {
        "before": [0],
        "TF continued": [0, 1],
        "SAR guided": [0, 1],
    }
    forced, refined, bounds = rows["TF continued"][0], rows["SAR guided"][0], study["bounds"]
    assert bounds["training photographs"]["distance"] < bounds["reconstructed held-out photographs"]["distance"]
    near, far = (bounds[f"{kind}training photographs"]["to_reconstructions"] for kind in ("reconstructed ", ""))
    assert 0 < near < far  # reconstructions are nearer to reconstructions than photographs are
    assert forced["held_out"] != refined["held_out"]
    assert [point["guidance"] for point in forced["frontier"]] == [0, 1]
    assert forced["distance"] == min(p["distance"] for p in forced["frontier"] if p["guidance"] == forced["guidance"])
    assert sum(n * s**2 for n, s in zip(forced["gap_side"], forced["sides"], strict=True)) / 130 == pytest.approx(
        forced["gap"], abs=1e-6
    )
    assert refined["gflops"] / forced["gflops"] == pytest.approx(7 / 3)  # two trained passes and one that is not
    report = (out / "report.md").read_text()
    assert report.count("±") > 10
    line = next(line for line in report.splitlines() if line.startswith("| SAR beats equally many further"))
    assert any(f"**{said}**" in line for said in ("shown", "not shown", "opposite"))
    assert "| SF full | 16.56 | 4.324 | not run |  | not run |  |" in report
    for picture in ("curves", "samples", "trajectory", "frontier_score", "frontier_recall"):
        assert (out / f"{picture}.png").stat().st_size > 1000
    script = ["bash", "scripts/experiment_cifar10.sh", *flags, "--status"]
    status = run(*script, PYTHON=sys.executable, OMP_NUM_THREADS="1").stdout
    assert status.count("step 2 of 2 judged") == 4
    made = {path: os.stat(path).st_mtime_ns for path in out.glob("judged/**/features/*.safetensors")}
    assert made
    tool(main, *flags, check=True)
    assert {path: os.stat(path).st_mtime_ns for path in made} == made


def test_a_verdict_needs_the_confidence_interval_to_exclude_zero():
    # Three seeds: the interval is ± 4.303 · s/√3, and 2.484 for s = 1.
    assert verdict([-3.6, -2.6, -1.6])[0] == "shown"
    assert verdict([-3.4, -2.4, -1.4])[0] == "not shown"
    assert verdict([1.6, 2.6, 3.6])[0] == "opposite"
    assert verdict([-3.0])[0] == "not run"
    assert verdict([-3.4, -2.4, -1.4])[1] == "4 seeds"  # 3.182 · 1/√4 = 1.59


def test_at_equal_score_distances_lie_between_two_guidances():
    def points(*pairs):
        return [{"score": score, "distance": distance} for score, distance in pairs]

    rising = points((2.0, 50.0), (3.0, 30.0), (5.0, 40.0))
    assert distance_at(rising, 2.5) == 40
    assert distance_at(rising, 3.5) == 32.5
    assert distance_at(rising, 1.9) is None
    rows = {
        "TF continued": [{"seed": 0, "score": 3.5, "distance": 31.0, "frontier": rising}],
        "SAR guided": [
            {"seed": 0, "score": 4.0, "distance": 20.0, "frontier": points((3.0, 22.0), (4.0, 20.0))},
            {"seed": 1, "score": 4.0, "distance": 20.0, "frontier": rising},
        ],
        "noisy context": [{"seed": 0, "score": 9.0, "distance": 9.0, "frontier": points((8.0, 9.0), (9.0, 9.0))}],
    }
    compare_at_equal_score(rows)
    assert rows["SAR guided"][0]["at_equal_score"] == 21
    assert paired(rows, "SAR guided", "TF continued", "at_equal_score") == [21 - 32.5]  # seed 1 has nothing to meet
    assert paired(rows, "noisy context", "TF continued", "at_equal_score") == []


def test_the_plan_names_what_it_compares():
    assert {name for pair in CLAIMS.values() for name in pair} <= set(MAIN)
    assert {name for table in PAPER.values() for name in table} | set(SHOWN) <= set(VARIANTS)
    for name, variant in VARIANTS.items():
        start = ["--init_ckpt=x"] if name == "contrastive alignment" else []
        parse(TrainConfig, [f"--pn={PN}", "--schedule=fixed", *variant.flags, *start])
    assert len(CLAIMS) == len(set(CLAIMS.values()))


def test_differences_are_taken_seed_by_seed():
    rows = {"a": [{"seed": 0, "x": 1.0}, {"seed": 2, "x": 5.0}], "b": [{"seed": 2, "x": 3.0}, {"seed": 1, "x": 9.0}]}
    assert paired(rows, "a", "b", "x") == [2.0]
    assert paired(rows, "a", "c", "x") == []
    assert paired(rows, "a", "b", "y") == []


def test_at_equal_guidance_a_variant_is_beside_its_own_seed():
    def row(seed, *distances):
        return {
            "seed": seed,
            "frontier": [{"guidance": g, "distance": d} for g, d in zip((1, 2), distances, strict=True)],
        }

    rows = {"before": [row(0, 9, 9)], "TF continued": [row(0, 5, 6), row(1, 7, 8)], "SAR": [row(1, 6, 6), row(0, 4, 6)]}
    table = same_guidance_table(rows).splitlines()
    assert table[-1].startswith("| SAR | -1.00 (95 %: ± 0.00) | -1.00 ± 1.00")
    assert len(table) == 3

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run


def check_report(out):
    report = json.loads((out / "report.json").read_text())
    for row in ("real", "reconstruction", "flexvar", "flexvar_continued", "sar"):
        assert set(report[row]) == {"class_accuracy", "frechet_distance"}
    assert {"tokenizer", "flexvar", "flexvar_continued", "sar"} < set(report["seconds"])
    text = (out / "report.md").read_text()
    assert f"{report['sar']['class_accuracy']:.3f}" in text
    assert (out / "samples.png").stat().st_size > 1000
    assert (out / "curves.png").stat().st_size > 1000
    return report


def test_the_whole_chain_in_a_few_steps(tmp_path):
    steps = ["--tokenizer_steps=4", "--flexvar_steps=4", "--further_steps=2", "--processes=1"]
    command = [sys.executable, "-m", "experiments.quickstart", f"--out={tmp_path / 'q'}", *steps]
    run(*command)
    report = check_report(tmp_path / "q")
    assert report["steps"] == {"tokenizer": 4, "flexvar": 4, "flexvar_continued": 2, "sar": 2}
    assert report["real"]["class_accuracy"] >= 0.95
    assert report["real"]["frechet_distance"] < report["reconstruction"]["frechet_distance"]


@pytest.mark.slow
def test_the_study_on_cifar10_in_a_few_steps(tmp_path):
    """Ten classes of coloured noise; one variant, two seeds; a second start does nothing anew."""
    rng = np.random.default_rng(0)
    for i in range(120):
        path = tmp_path / f"data/{'train' if i % 2 else 'val'}/{i // 2 % 10}/{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 25 * (i // 2 % 10) + 30, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = [f"--data_path={tmp_path / 'data'}", "--size=smoke", "--only=SAR sampled", "--seeds", "0", "1"]
    command = ["bash", "scripts/experiment_cifar10.sh", *flags, "--workers=0", f"--out={tmp_path / 'o'}"]
    run(*command, PYTHON=sys.executable)
    found = json.loads((tmp_path / "o/study.json").read_text())
    assert {name: len(rows) for name, rows in found.items()} == {"before": 1, "SAR sampled": 2}
    assert (tmp_path / "o/report.md").read_text().count("±") > 5
    status = run(*command, "--status", PYTHON=sys.executable).stdout
    assert status.count("step 2 of 2 judged") == 2
    made = (tmp_path / "o/judged/02_1/features/000000.safetensors").stat().st_mtime_ns
    run(*command, PYTHON=sys.executable)
    assert (tmp_path / "o/judged/02_1/features/000000.safetensors").stat().st_mtime_ns == made


@pytest.mark.slow
def test_the_quickstart_itself(tmp_path):
    run(
        "bash",
        "scripts/quickstart.sh",
        "--out",
        tmp_path / "q",
        PYTHON=sys.executable,
        OMP_NUM_THREADS=str(os.cpu_count()),
    )
    report = check_report(tmp_path / "q")
    assert report["sar"]["class_accuracy"] >= 0.90

    study = ["-m", "experiments.study_digits", f"--quickstart={tmp_path / 'q'}", f"--out={tmp_path / 's'}"]
    run(sys.executable, *study, "--steps=1", "--seeds", "0", "--only=hybrid")
    table = (tmp_path / "s/table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| before", "| SF hybrid, from side 3"]
    assert table[3].count("|") == table[0].count("|") == 7

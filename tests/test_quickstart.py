import json
import os
import sys

import pytest

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
    assert [line.split(" | ")[0] for line in table[2:]] == ["| before", "| SF hybrid@3", "| SF hybrid@8"]
    assert table[3].count("|") == table[0].count("|") == 8

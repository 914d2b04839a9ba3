import json
import os
import sys

import pytest
import torch
from PIL import Image

from experiments import quickstart
from experiments.quickstart import conclusion, draw_samples
from tests.conftest import run, tool
from utils.training.log import read_metrics


def check_report(out):
    report = json.loads((out / "report.json").read_text())
    for row in ("real", "reconstruction", "flexvar", "flexvar_continued", "sar"):
        assert set(report[row]) == {"class_accuracy", "frechet_distance"}
    assert {"tokenizer", "flexvar", "flexvar_continued", "sar"} < set(report["seconds"])
    text = (out / "report.md").read_text()
    assert f"{report['sar']['class_accuracy']:.3f}" in text
    assert (out / "samples.png").stat().st_size > 1000
    assert (out / "curves.png").stat().st_size > 1000
    assert f"{report['sar']['frechet_distance'] - report['flexvar_continued']['frechet_distance']:+.2f}" in text
    for said in ("One seed", "the control", "lower than in training because", "# Samples", "# Losses"):
        assert said in text
    for name in ("flexvar", "flexvar_continued", "sar"):
        assert len(read_metrics(out / name, "val/loss")[0]) == min(6, report["steps"][name])
    return report


@pytest.mark.parametrize(("sar", "said"), [(5.2, "within noise"), (9.0, "SAR is worse"), (1.0, "SAR is better")])
def test_the_conclusion_is_in_words_and_claims_no_more_than_one_seed_can(sar, said):
    scores = {"class_accuracy": 0.95, "frechet_distance": 4.5}
    report = {"flexvar": scores, "flexvar_continued": scores, "steps": {"sar": 150}}
    report["sar"] = {"class_accuracy": 0.94, "frechet_distance": sar}
    text = conclusion(report, "FlexVAR")
    assert f"{sar - 4.5:+.2f} in Fréchet distance" in text
    assert "-0.010 in class accuracy" in text
    assert said in text


def test_the_picture_shows_the_control_and_titles_each_block(tmp_path, monkeypatch):
    titles = []
    real = quickstart.captioned_grid
    monkeypatch.setattr(quickstart, "captioned_grid", lambda p, t, **k: titles.extend(t) or real(p, t, **k))
    samples = {name: torch.zeros(500, 3, 32, 32) for name in ("flexvar", "flexvar_continued", "sar")}
    draw_samples(samples, "hybrid model", tmp_path)
    assert titles == ["hybrid model", "the control", "SAR"]
    drawn = {}
    monkeypatch.setattr(quickstart, "plot_curves", lambda panels, axes, _: drawn.update(panels=panels, axes=axes))
    monkeypatch.setattr(quickstart, "read_metrics", lambda *_: ([1], [0.5]))
    runs = dict.fromkeys(samples, tmp_path)
    quickstart.draw_curves(runs, 9, quickstart.MODELS["flowar"], tmp_path)
    assert drawn["axes"][1] == "teacher-forced loss, squared error"
    labels = [label for panel in drawn["panels"].values() for label in panel]
    assert any("FlowAR" in label for label in labels)
    assert not any("FlexVAR" in label for label in labels)
    assert Image.open(tmp_path / "samples.png").width > 3 * 10 * 32


def test_the_whole_chain_in_a_few_steps(stages_here, tmp_path):
    steps = ["--tokenizer_steps=4", "--flexvar_steps=4", "--further_steps=2", "--processes=1"]
    tool(quickstart.main, f"--out={tmp_path / 'q'}", *steps, check=True)
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

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from models import FlexVAR, FlexVARConfig
from tests.conftest import tool
from utils import visualize as figures
from utils.visualize import FIGURES
from utils.weights import load_tokenizer, save_weights


@pytest.fixture
def runs(small_vae_file, tmp_path):
    """Two runs of random weights on 16×16 digits, as train.py leaves them."""
    for i, name in enumerate(("flexvar", "sar")):
        torch.manual_seed(i)
        directory = tmp_path / name
        directory.mkdir()
        vae = load_tokenizer(small_vae_file).config
        model = FlexVAR(FlexVARConfig(2, 64, 10, vae.codebook_size, vae.codebook_dim))
        torch.nn.init.normal_(model.head.weight)
        save_weights(model, directory / "model.safetensors")
        described = {"model": {"vae_ckpt": str(small_vae_file), "pn": "1_2_4"}}
        (directory / "config.json").write_text(json.dumps(described))
        lines = [{"step": s, "val/loss": 3.0 / s, "train/loss": 4.0 / s} for s in range(1, 6)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = {"frechet_distance_x": 5.0 + i, "images_per_second": 10.0 * (i + 1)}
        (directory / "report.json").write_text(json.dumps(report))
    return tmp_path / "flexvar", tmp_path / "sar"


def draw(monkeypatch, name, out, *flags):
    monkeypatch.setattr(sys, "argv", ["x", name, "--out", str(out), *(str(f) for f in flags)])
    figures.main()
    return Image.open(out) if out.suffix == ".png" else out.read_text()


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "exposure-bias"])
def test_each_figure_renders(name, runs, tmp_path, monkeypatch):
    flags = {
        "training-curves": ["--runs", *runs],
        "throughput-fid": ["--reports", *(r / "report.json" for r in runs)],
        "trajectory": ["--ckpt", *runs, "--n=2"],
    }.get(name, ["--ckpt", runs[0], "--dataset=digits", "--n=2"])
    picture = np.asarray(draw(monkeypatch, name, tmp_path / "f/figure.png", *flags).convert("L"))
    assert min(picture.shape) > 200
    assert picture.std() > 5


def test_exposure_bias_and_error_growth_are_tables(runs, tmp_path, monkeypatch, capsys):
    text = draw(monkeypatch, "exposure-bias", tmp_path / "t.md", "--ckpt", *runs, "--dataset=digits", "--n=20")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(m, s) for m in ("flexvar", "sar") for s in ("1", "2", "4")]
    assert float(rows[0][4]) == 0  # the first scale has no input to differ in
    assert float(rows[1][3]) - float(rows[1][2]) == pytest.approx(float(rows[1][4]), abs=2e-4)
    draw(monkeypatch, "sf-inputs", tmp_path / "s.png", "--ckpt", runs[0], "--dataset=digits", "--n=2")
    assert "| side | TF | SSR | naive SF |" in capsys.readouterr().out


def test_what_is_missing_is_named(runs, tmp_path):
    for flags, message in [
        (["trajectory"], "trajectory needs --ckpt"),
        (["training-curves", "--runs", runs[0], "--metric=x"], "none of the runs has logged x"),
        (["tf-vs-ar", "--ckpt", runs[0], "--data_path", tmp_path], f"no directory {tmp_path / 'train'}"),
    ]:
        status, _, said = tool(figures.main, *flags)
        assert status != 0
        assert message in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["training-curves", "--runs", "a", "--n=3"], "--n has no effect on training-curves"),
        (["trajectory", "--ckpt", "a", "--data_path=x"], "--data_path has no effect on trajectory"),
        (["supervision", "--ckpt", "a", "--seed=3"], "--seed has no effect on supervision"),
        (["tf-vs-ar", "--ckpt", "a", "b"], "takes one --ckpt, got 2"),
        (["tf-vs-ar"], "needs --ckpt"),
        (["trajectory", "--ckpt", "a", "--cfg=nan"], "--cfg"),
        (["trajectory", "--ckpt", "a", "--n=0"], "--n"),
        (["trajectory", "--ckpt", "a", f"--seed={2**63}"], "--seed"),
        (["trajectory", "--ckpt", "a", "--out=x.txt"], "--out must be"),
    ],
)
def test_flags_that_a_figure_does_not_read_are_errors(flags, said):
    status, _, err = tool(figures.main, *flags)
    assert (status, said in err) == (2, True), err

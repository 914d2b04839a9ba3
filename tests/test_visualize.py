import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments import figures as figures
from experiments.figures import FIGURES
from models import FlexVAR, FlexVARConfig, ScaleSchedule
from models.scales import shift_up
from models.weights import load_flexvar, load_tokenizer, save_weights
from tests.conftest import tool
from utils.config.training import DataConfig
from utils.data.datasets import open_dataset


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
        "trajectory": ["--ckpt", *runs, "--dataset=digits", "--n=2"],
    }.get(name, ["--ckpt", runs[0], "--dataset=digits", "--n=2"])
    picture = np.asarray(draw(monkeypatch, name, tmp_path / "f/figure.png", *flags).convert("L"))
    assert min(picture.shape) > 200
    assert picture.std() > 5


def test_exposure_bias_and_error_growth_are_tables(runs, tmp_path, monkeypatch, capsys):
    text = draw(monkeypatch, "exposure-bias", tmp_path / "t.md", "--ckpt", *runs, "--dataset=digits", "--n=20")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert [(row[0], row[1]) for row in rows] == [(m, s) for m in ("flexvar", "sar") for s in ("1", "2", "4")]
    assert float(rows[0][4]) == float(rows[0][6]) == 0  # the first scale has no input to differ in
    for row in rows:
        true, step, step_gap, own, own_gap = map(float, row[2:])
        assert (step - true, own - true) == pytest.approx((step_gap, own_gap), abs=2e-4)
    assert rows[1][3] == rows[1][5]  # before side 2 there is one scale: one step is the whole prefix
    assert "another picture" in text
    draw(monkeypatch, "sf-inputs", tmp_path / "s.png", "--ckpt", runs[0], "--dataset=digits", "--n=2")
    assert "| side | TF | SSR | SF from 1 | naive rollout |" in capsys.readouterr().out


@pytest.fixture
def shown(monkeypatch):
    """The rows of the figures that are drawn: {caption: {side: pictures}}."""
    seen = {}
    real = figures.rows_of_scales
    monkeypatch.setattr(figures, "rows_of_scales", lambda rows: seen.update(rows) or real(rows))
    return seen


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[s], b[s]) for s in a)


def test_trajectories_walk_on_from_a_real_images_codes(runs, small_vae_file, shown, tmp_path, monkeypatch):
    flags = ["--dataset=digits", "--n=3", "--pn=1_2_3_4_5_6"]
    draw(monkeypatch, "trajectory", tmp_path / "t.png", "--ckpt", *runs, *flags)
    assert list(shown) == ["held-out image", "flexvar", "sar"]
    assert all(list(row) == [4, 5, 6] for row in shown.values())
    val = open_dataset(DataConfig(dataset="digits"), 24, 0, "val")
    images = torch.stack([val[0, i][0] for i in (0, 497 // 3, 2 * 497 // 3)])
    vae = load_tokenizer(small_vae_file)
    real = {s: vae.decode(vae.codes(vae.encode(images), s), s) for s in (4, 5, 6)}
    assert same(shown["held-out image"], real)
    for name in ("flexvar", "sar"):  # the start is real, what follows is each model's own
        assert torch.equal(shown[name][4], real[4])
        assert not torch.equal(shown[name][5], real[5])
    assert not torch.equal(shown["flexvar"][6], shown["sar"][6])


def test_the_papers_trajectory_has_its_scales_in_a_model_of_ten(runs, monkeypatch):
    def generate_scales(ckpt, pn, own):
        record = json.loads((runs[0] / "config.json").read_text())
        record["model"]["pn"] = own
        (runs[0] / "config.json").write_text(json.dumps(record))
        return figures.walk_of(str(ckpt), argparse.Namespace(vae_ckpt="", pn=pn))

    assert generate_scales(runs[0], "", "1_2_3_4_5_6_8_10_13_16") == ("1_2_3_4_8_10_13_16", 4)
    assert generate_scales(runs[0], "", "1_2_3_5_8") == ("1_2_3_5_8", 3)  # another end, no side 4: the model's own
    assert generate_scales(runs[0], "1_4_9_16", "1_2_3_5_8") == ("1_4_9_16", 4)
    assert generate_scales(runs[0], "1_2_4", "1_2_3_5_8") == ("1_2_4", 2)  # the last one is to be drawn
    for pn in ("5_8", "4"):
        with pytest.raises(ValueError, match="starts at a side of at most 4"):
            generate_scales(runs[0], pn, "1_2_3_5_8")


def test_fig_8_starts_from_the_teachers_prediction_and_takes_two_steps(
    runs, small_vae_file, shown, tmp_path, monkeypatch
):
    """By the paper: SF inputs are the TF prediction shifted up, then what two steps of the model itself predict."""
    sides = (1, 2, 3, 4, 5)
    draw(monkeypatch, "sf-inputs", tmp_path / "f.png", "--ckpt", runs[0], "--dataset=digits", "--n=2", "--pn=1_2_3_4_5")
    val = open_dataset(DataConfig(dataset="digits"), 20, 0, "val")
    images, labels = zip(*(val[0, i] for i in (0, 497 // 2)), strict=True)
    vae, model = load_tokenizer(small_vae_file), load_flexvar(runs[0]).eval()
    latent, labels = vae.encode(torch.stack(images)), torch.tensor(labels)
    truth = {s: vae.codes(latent, s) for s in sides}
    own = {}  # from the teacher's prediction at side 2 on
    for i, s in enumerate(sides[1:], start=1):
        feeds = [truth[1]] if i == 1 else [truth[1], *own.values()]
        inputs = [shift_up(c, vae.codebook, a, b) for c, a, b in zip(feeds, sides, sides[1:], strict=False)]
        logits = model(labels, torch.cat(inputs, 1), ScaleSchedule(sides[: i + 1]))
        own[s] = logits[:, -s * s :].argmax(-1)
    assert [list(row) for row in shown.values()] == [[3, 4, 5]] * len(shown)
    assert list(shown)[:4] == ["ground truth", "TF input", "SF from 2, input", "SF from 2, prediction"]
    assert same(shown["SF from 2, prediction"], {s: vae.decode(own[s], s) for s in (3, 4, 5)})

    def decoded_input(codes, a, b):
        return vae.decode_vectors(F.normalize(shift_up(codes, vae.codebook, a, b), dim=-1), b)

    pairs = ((2, 3), (3, 4), (4, 5))
    assert same(shown["SF from 2, input"], {b: decoded_input(own[a], a, b) for a, b in pairs})
    assert same(shown["TF input"], {b: decoded_input(truth[a], a, b) for a, b in pairs})
    assert "naive rollout, prediction" in shown


def test_figures_use_codes_as_the_run_was_trained_on(runs, small_vae_file, shown, tmp_path, monkeypatch):
    """--supervision image: also where a figure, not training, makes codes of images."""
    record = json.loads((runs[0] / "config.json").read_text())
    record["model"]["supervision"] = "image"
    (runs[0] / "config.json").write_text(json.dumps(record))
    draw(monkeypatch, "tf-vs-ar", tmp_path / "t.png", "--ckpt", runs[0], "--dataset=digits", "--n=2")
    val = open_dataset(DataConfig(dataset="digits"), 16, 0, "val")
    images = torch.stack([val[0, i][0] for i in (0, 497 // 2)])
    vae = load_tokenizer(small_vae_file)
    small = {s: F.interpolate(images, (4 * s, 4 * s), mode="area") for s in (1, 2, 4)}
    wanted = {s: vae.decode(vae.codes(vae.encode(small[s]), s), s) for s in (1, 2, 4)}
    assert same(shown["ground truth"], wanted)
    latent = vae.encode(images)
    assert not torch.equal(vae.decode(vae.codes(latent, 2), 2), wanted[2])


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
        (["exposure-bias", "--ckpt", "a", "--cfg=1"], "--cfg has no effect on exposure-bias"),
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


def test_models_of_other_scales_show_those_that_they_share():
    def row(*sides):
        return {s: torch.zeros(1, 3, 8, 8) for s in sides}

    alone = figures.rows_of_scales({"a": row(4, 8, 16)}).width
    assert figures.rows_of_scales({"a": row(4, 5, 8, 16), "b": row(4, 8, 16)}).width == alone
    with pytest.raises(ValueError, match="no side is common to a, b"):
        figures.rows_of_scales({"a": row(4), "b": row(5)})

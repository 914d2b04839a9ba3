import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from evaluate import Generated, label_order, main
from models import SARPipeline
from models.kl_vae import KLConfig
from models.weights import save_weights
from tests.conftest import ALONE, ROOT, config_of, run, tool, tool_on_ranks
from train import build
from utils.config.sampling import EvalConfig
from utils.evaluations.c2i.images import FolderImages, NpzImages, Resized, fingerprint, open_images, write_npz
from utils.evaluations.c2i.report import write_sweep
from utils.runtime.flags import parse

NAME = "efficientnet_lite0"
METRICS = {f"{m}_{NAME}" for m in ("frechet_distance", "spatial_frechet_distance", "precision", "recall")}
METRICS |= {f"inception_style_score_{NAME}"}


def flags(saved, real, out, *more):
    return ["evaluate.py", "--ckpt", saved, f"--features={NAME}", "--reference", real, "--num_samples=2", "--batch=3",
            "--out_dir", out, *more]  # fmt: skip


def judge(_, *more, check=True):
    """`evaluate.py FLAGS`, in this process and on one core: status and stderr."""
    with patch.object(os, "sched_getaffinity", lambda _: {0}):
        return tool(main, *more, check=check)[::2]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def numbers(report):
    return {name: report[name] for name in METRICS}


@pytest.fixture(scope="module")
def alone(saved, real, tmp_path_factory):
    """One process, everything saved."""
    out = tmp_path_factory.mktemp("alone")
    run(sys.executable, *flags(saved, real, out, "--save_npz=true", "--save_png=true"))
    return out


def test_report_has_the_numbers_and_how_they_came_about(alone):
    report = report_of(alone)
    assert set(report) >= METRICS
    assert not {"fid", "sfid", "inception_score"} & set(report)  # these names are Inception's
    assert report["samples"] == 20
    assert report["warning"].startswith("20 samples are fewer than the 1280 dimensions of the features")
    assert "**Warning**: 20 samples" in (alone / "report.md").read_text()
    assert report["images_per_second"] > 0
    assert report["settings"]["cfg"] == 2.2
    assert len(report["settings"]["weights_sha256"]) == len(report["settings"]["tokenizer_sha256"]) == 64
    assert report["versions"]["torch"] == torch.__version__
    text = (alone / "report.md").read_text()
    assert "none of these is an FID" in text


def test_saved_samples_are_the_judged_ones(alone, real, tmp_path):
    images = np.load(alone / "samples.npz")["arr_0"]
    assert images.shape == (20, 64, 64, 3)
    assert images.dtype == np.uint8
    for i in (0, 7, 19):
        assert np.array_equal(images[i], np.asarray(Image.open(alone / f"png/{i:06d}.png")))
    for source in (alone / "samples.npz", alone / "png"):
        out = tmp_path / source.name
        command = ["evaluate.py", f"--features={NAME}", "--samples", source, "--reference", real]
        judge(*command, "--out_dir", out, "--batch=7")
        assert numbers(report_of(out)) == pytest.approx(numbers(report_of(alone)), rel=1e-5, abs=1e-6)


def test_ranks_do_not_change_the_numbers(saved, real, tmp_path):
    """All on one thread: convolutions round differently on several."""
    judge(*flags(saved, real, tmp_path / "one"))
    tool_on_ranks(2, main, *flags(saved, real, tmp_path / "two")[1:])
    one, two = (numbers(report_of(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)


def test_killed_midway_it_finishes_the_rest_only(alone, saved, real, tmp_path):
    command = [str(f) for f in flags(saved, real, tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    features = tmp_path / "features"
    while process.poll() is None and len(list(features.glob("[0-9]*.safetensors"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in features.glob("[0-9]*.safetensors")}
    assert 3 <= len(done) < 7
    run(sys.executable, *command)
    assert len(list(features.glob("[0-9]*.safetensors"))) == 7
    assert all((features / name).stat().st_mtime_ns == when for name, when in done.items())
    assert numbers(report_of(tmp_path)) == pytest.approx(numbers(report_of(alone)), rel=1e-6, abs=1e-9)
    status, said = judge(*command, "--cfg=3", check=False)
    assert status == 1
    assert "other settings (cfg)" in said


def test_every_class_exactly_its_count():
    labels = label_order(50_000, 1000, 0)
    assert labels.bincount().tolist() == [50] * 1000
    assert torch.equal(labels, label_order(50_000, 1000, 0))
    assert not torch.equal(labels, label_order(50_000, 1000, 1))
    assert (labels[:1000].unique().numel()) > 500  # not sorted


def test_reference_statistics_are_made_and_used(alone, saved, real, tmp_path):
    made = tmp_path / "reference.npz"
    command = ["evaluate.py", f"--features={NAME}", "--out_dir", tmp_path / "a"]
    judge(*command, "--samples", real, "--make_reference", made)
    assert {"mu", "sigma", "mu_s", "sigma_s", "pool"} <= set(np.load(made).files)
    judge(*flags(saved, made, tmp_path / "b"))
    assert numbers(report_of(tmp_path / "b")) == pytest.approx(numbers(report_of(alone)), rel=1e-5, abs=1e-6)
    judge(*command[:-1], tmp_path / "c", "--samples", real, "--reference", made)
    same = report_of(tmp_path / "c")
    assert abs(same[f"frechet_distance_{NAME}"]) < 1e-6
    assert same[f"precision_{NAME}"] == same[f"recall_{NAME}"] == 1


def test_sweep_and_intermediate_scale(saved, real, tmp_path):
    judge(*flags(saved, real, tmp_path, "--sweep_cfg=1,3", "--eval_scale=2", "--num_classes_eval=5"))
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["settings"]["cfg"] for row in rows] == [1, 3]
    assert {row["settings"]["evaluated_side"] for row in rows} == {2}
    assert {row["samples"] for row in rows} == {10}
    assert (tmp_path / "sweep.md").read_text().count("\n|") == 3
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert json.loads((tmp_path / "reference/settings.json").read_text())["shape"] == [32, 32]


def test_a_sweep_over_moving_averages_and_guidance(small_vae_file, real, tmp_path):
    run = ["--dataset=digits", "--workers=0", f"--vae_ckpt={small_vae_file}", "--depth=1", "--width=64", "--pn=1_2_4"]
    run += ["--schedule=fixed", "--bs=4", "--max_steps=2", "--lr=0.1", "--eval_images=0", "--vis_num_samples=0"]
    run += ["--ema", "0.5", "0.9", "--logger_type=none", f"--out_dir={tmp_path / 'run'}"]
    build(config_of(run), ALONE).fit()
    more = ["--sweep_ema=0.5,0.9", "--sweep_cfg=1,3", "--num_classes_eval=2", "--image_size=16"]
    judge(*flags(tmp_path / "run", real, tmp_path / "out", *more))
    rows = json.loads((tmp_path / "out/sweep.json").read_text())
    points = [(row["settings"]["moving_average"], row["settings"]["cfg"]) for row in rows]
    assert points == [(0.5, 1), (0.5, 3), (0.9, 1), (0.9, 3)]
    digests = [row["settings"]["weights_sha256"] for row in rows]
    assert (digests[0], digests[2]) == (digests[1], digests[3])
    assert digests[0] != digests[2]
    assert "| moving average |" in (tmp_path / "out/sweep.md").read_text()
    assert (tmp_path / "out/cfg3_k900_p0.95_ema0.9/report.json").is_file()


def test_reports_side_by_side(saved, real, tmp_path, alone):
    judge(*flags(saved, real, tmp_path / "b", "--cfg=3"))
    status, out, _ = tool(main, "--compare", alone, tmp_path / "b/report.json")
    assert status == 0
    head, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert head == [os.path.relpath(p, os.path.commonpath([alone.parent, tmp_path])) for p in (alone, tmp_path / "b")]
    found = {row[0]: row[1:] for row in rows}
    first, second = report_of(alone), report_of(tmp_path / "b")
    for name in METRICS:
        assert found[name] == [f"{first[name]:.4f}", f"{second[name]:.4f}"]
    assert found["cfg"] == ["2.2", "3.0"]
    assert "top_k" not in found  # only what differs
    assert "do not compare" not in out
    assert out.count("20 samples are fewer than the 1280 dimensions") == 2
    changed = {**second, "features": "inception", "fid": 3.5, "warning": ""}
    (tmp_path / "c").mkdir()
    (tmp_path / "c/report.json").write_text(json.dumps(changed))
    _, out, _ = tool(main, "--compare", alone, tmp_path / "b", tmp_path / "c")
    assert "| fid | – | – | 3.5000 |" in out
    assert "different features: their numbers do not compare" in out


def test_what_cannot_be_compared_is_named(alone, tmp_path):
    (tmp_path / "sweep/cfg1").mkdir(parents=True)
    (tmp_path / "sweep/cfg1/report.json").write_text("{}")
    for words, said in [
        (["--compare", alone], "two or more"),
        (["--compare", alone, tmp_path], f"no report {tmp_path / 'report.json'}"),
        (["--compare", alone, tmp_path / "sweep"], f"there are some in {tmp_path / 'sweep/cfg1'}"),
        (["--compare", alone, alone, "--cfg=3"], "--cfg has no effect with --compare"),
    ]:
        status, _, err = tool(main, *words)
        assert (status != 0, said in err) == (True, True), err


@pytest.mark.parametrize("settings", [[("cfg", 1.0), ("cfg", 3.0)], [("top_p", 0.9), ("top_p", 0.95)]])
def test_a_sweeps_plot_shows_distance_against_score(settings, tmp_path, monkeypatch):
    """Not against images/s, which is the machine's. Each point says what was swept."""
    rows = []
    for i, (name, value) in enumerate(settings):
        described = {"cfg": 2.2, "top_k": 900, "top_p": 0.95, name: value}
        rows.append({"fid": 5.0 - i, "inception_score": 200.0 + i, "images_per_second": 9.0, "settings": described})
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    write_sweep(rows, tmp_path)
    (plot,) = figures[0].axes
    assert (plot.get_xlabel(), plot.get_ylabel()) == ("inception score", "fid")
    assert plot.lines[0].get_xydata().tolist() == [[200, 5], [201, 4]]
    assert [text.get_text() for text in plot.texts] == [f"{name} {value:g}" for name, value in settings]


def test_an_intermediate_scale_is_the_last_one_that_is_drawn(saved):
    config = parse(EvalConfig, ["--eval_scale=2", f"--ckpt={saved}"])
    pipeline = SARPipeline.from_pretrained(saved)
    seen = []
    pipeline.model.blocks[0].register_forward_hook(lambda _, x, y: seen.append(x[0].shape[1]))
    images = Generated(pipeline, config, *config.settings()[0]).batch(range(2))
    assert images.shape == (2, 3, 32, 32)
    assert seen == [1, 4]


def test_pictures_are_decoded_in_full_precision_whatever_the_model_runs_in(saved):
    pipeline = SARPipeline.from_pretrained(saved)
    batches = []
    for precision in ("fp32", "bf16"):  # greedy from the same codes: what differs would be the decoder's
        config = parse(EvalConfig, [f"--precision={precision}", f"--ckpt={saved}", "--top_k=1", "--top_p=0.95"])
        source = Generated(pipeline, config, *config.settings()[0])
        with patch("evaluate.sample_codes", lambda *_, **__: {4: torch.arange(32).view(2, 16)}):
            batches.append(source.batch(range(2)))
    assert torch.equal(*batches)


def test_decoding_in_tf32_is_asked_for(saved):
    pipeline, seen = SARPipeline.from_pretrained(saved), []
    real = pipeline.vae.decode_at
    pipeline.vae.decode_at = lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or real(*args)
    for asked in (False, True):
        config = parse(EvalConfig, [f"--ckpt={saved}", *(["--decode_tf32"] if asked else [])])
        Generated(pipeline, config, *config.settings()[0]).batch(range(1))
        assert seen[-1] is asked


def test_compiled_it_judges_the_same_images_and_says_so(saved, real, tmp_path, monkeypatch):
    calls = []
    quick = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, *a, **k: calls.append(f) or quick(f, *a, **k))
    for name, more in (("plain", []), ("compiled", ["--compile", "--decode_tf32"])):
        judge(*flags(saved, real, tmp_path / name, "--top_k=1", "--top_p=0.95", *more))
        assert bool(calls) is (name == "compiled")
    plain, compiled = (report_of(tmp_path / name) for name in ("plain", "compiled"))
    for name, value in numbers(plain).items():
        assert numbers(compiled)[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert compiled["settings"].items() >= {"compiled": True, "decoded_in": "tf32"}.items()
    assert plain["settings"]["decoded_in"] == "fp32"


def test_what_cannot_be_reconstructed_is_refused_before_anything_is(vae, tmp_path):
    torch.save({"model": vae.state_dict()}, tmp_path / "vae.pth")
    kl = KLConfig(32, (1, 1, 1, 1, 1), 1).build()  # of which the scaling is known
    save_weights(kl, tmp_path / "kl.safetensors")
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "wide/a.png")
    for weights, reason in (("vae.pth", "holds images of 64×32: give --image_size"), ("kl.safetensors", "no codebook")):
        flags = [f"--features={NAME}", "--vae_ckpt", tmp_path / weights, "--out_dir", tmp_path / "o"]
        status, _, said = tool(main, *flags, "--reconstruct", tmp_path / "wide")
        assert status == 1
        assert reason in said


def test_tokenizer_report(vae, real, tmp_path):
    torch.save({"model": vae.state_dict()}, tmp_path / "vae.pth")
    command = ["evaluate.py", f"--features={NAME}", "--vae_ckpt", tmp_path / "vae.pth", "--out_dir", tmp_path / "o"]
    judge(*command, "--reconstruct", real)
    report = report_of(tmp_path / "o")
    assert 3 < report["psnr"] < 30
    assert -1 < report["ssim"] < 1
    assert report[f"frechet_distance_{NAME}"] > 0
    assert [row["side"] for row in report["sides"]] == [1, 2, 3, 4]
    assert report["sides"][-1]["psnr"] == pytest.approx(report["psnr"])
    images = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(real.iterdir())])
    with torch.no_grad():  # the second row, by hand
        codes = vae.codes(vae.encode(images / 127.5 - 1), 2)
        made = ((vae.decode(codes, 2).clamp(-1, 1) + 1) * 127.5).round()
    small = torch.nn.functional.interpolate(images.float(), 32, mode="area")
    error = (made - small).square().mean((1, 2, 3))
    row = report["sides"][1]
    assert row["psnr"] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item(), abs=1e-3)
    share = codes.unique(return_counts=True)[1] / codes.numel()
    assert row["codebook_usage"] == pytest.approx(len(share) / len(vae.codebook))
    assert row["perplexity"] == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-4)
    assert Image.open(tmp_path / "o/reconstructions.png").size[1] > 5 * 64  # originals and four sides


def test_other_samples_under_the_same_name_are_not_taken_for_the_old_ones(real, tmp_path):
    rng = np.random.default_rng(1)
    command = ["evaluate.py", f"--features={NAME}", "--samples", tmp_path / "s.npz", "--reference", real]
    np.savez(tmp_path / "s.npz", arr_0=rng.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8))
    judge(*command, "--out_dir", tmp_path / "o")
    np.savez(tmp_path / "s.npz", arr_0=rng.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8))
    status, said = judge(*command, "--out_dir", tmp_path / "o", check=False)
    assert status == 1
    assert "other settings (images_sha256)" in said


def bad_files(folder):
    np.savez(folder / "empty.npz", x=np.zeros(3))
    np.savez(folder / "float.npz", arr_0=np.zeros((5, 8, 8, 3), np.float32))
    np.savez(folder / "flat.npz", arr_0=np.zeros((5, 8, 8), np.uint8))
    np.savez(folder / "few.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(folder / "pickled.npz", arr_0=np.array([{"a": 1}], dtype=object))
    (folder / "text.npz").write_text("hello")
    whole = (folder / "few.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "none").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.npz", "has no arr_0"),
        ("float.npz", r"must be uint8 \(N, H, W, 3\), not float32"),
        ("flat.npz", r"must be uint8 \(N, H, W, 3\)"),
        ("pickled.npz", "cannot read .*pickled.npz"),
        ("text.npz", "cannot read .*text.npz"),
        ("cut.npz", "cannot read .*cut.npz"),
        ("none", "holds no images"),
        ("absent.npz", "no file or folder"),
    ],
)
def test_bad_sample_files_are_named(name, message, tmp_path):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples=few.npz", "--expect=50000"], "holds 5 images, fewer than --expect 50000"),
        (["--num_classes_eval=11"], "the model knows 10 classes, not 11"),
        (["--eval_scale=5"], "--eval_scale 5 is none of the scales"),
        (["--depth=16"], "has 2 transformer blocks, not --depth 16"),
        (["--reference=absent.npz"], "no file or folder absent.npz"),
        (["--features=inception", "--inception_weights=absent.pth"], "absent.pth"),
    ],
)
def test_bad_requests_are_one_line_before_any_sampling(more, message, saved, real, tmp_path):
    bad_files(tmp_path)
    command = flags(saved, real, tmp_path / "out")
    if any(flag.startswith("--samples") for flag in more):
        command = ["evaluate.py", f"--features={NAME}", "--out_dir", tmp_path / "out"]
    more = [flag.replace("few", str(tmp_path / "few")) for flag in more]
    status, said = judge(*command, *more, check=False)
    assert status == 1
    assert message in said.strip().splitlines()[-1]
    assert not (tmp_path / "out/features").exists()


def test_contradictory_flags_are_named(capsys):
    for wrong, message in [
        (["--samples=a", "--reconstruct=b"], "exclude each other"),
        (["--samples=a", "--cfg=3"], "--cfg has no effect without sampling"),
        (["--expect=5"], "--expect has no effect without --samples"),
        ([f"--features={NAME}", "--inception_weights=x"], "--inception_weights has no effect"),
    ]:
        with pytest.raises(SystemExit):
            parse(EvalConfig, wrong)
        assert message in capsys.readouterr().err


def test_image_sources(tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (7, 8, 8, 3), dtype=np.uint8)
    parts = []
    for i in range(0, 7, 3):
        np.save(tmp_path / f"{i}.npy", arrays[i : i + 3])
        parts.append(tmp_path / f"{i}.npy")
    write_npz(parts, tmp_path / "all.npz")
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], arrays)
    np.savez_compressed(tmp_path / "small.npz", arr_0=arrays)
    for name in ("all.npz", "small.npz"):
        source = NpzImages(tmp_path / name)
        assert torch.equal(source.batch(range(2, 5)), torch.from_numpy(arrays[2:5]).permute(0, 3, 1, 2))
    halved = Resized(source, 4).batch(range(1))
    mean = arrays[0].reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert np.abs(halved[0].permute(1, 2, 0).numpy() - mean).max() <= 0.5
    for size in (10, 20):
        Image.new("RGB", (size, 12)).save(tmp_path / f"{size}.png")
    with pytest.raises(ValueError, match="differ in size: give --image_size"):
        FolderImages(tmp_path).batch(range(2))
    assert FolderImages(tmp_path, 8).batch(range(2)).shape == (2, 3, 8, 8)


def test_a_runs_directory_is_not_written_over(saved, real, tmp_path):
    shutil.copytree(saved, tmp_path / "pipeline")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name, what in (("pipeline", "a pipeline"), ("run", "a run's directory")):
        before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / name).rglob("*"))
        status, said = judge(*flags(saved, real, tmp_path / name), check=False)
        assert status == 1
        assert f"--out_dir {tmp_path / name} is {what}, whose config.json" in said
        assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / name).rglob("*")) == before


def test_a_refused_evaluation_leaves_the_flags_of_the_one_that_is_there(alone, saved, real, tmp_path):
    shutil.copytree(alone, tmp_path / "there")
    before = (tmp_path / "there/config.json").read_bytes()
    status, said = judge(
        *flags(saved, real, tmp_path / "there", "--cfg=3", "--save_npz=true", "--save_png=true"), check=False
    )
    assert status == 1
    assert "other settings (cfg)" in said
    assert (tmp_path / "there/config.json").read_bytes() == before
    status, said = judge(
        *flags(saved, real, tmp_path / "there", "--compile", "--save_npz=true", "--save_png=true"), check=False
    )
    assert "other settings (compiled)" in said


def test_a_reference_of_another_crop_is_another_one(real, tmp_path):
    """Pictures of 20 × 40 pixels, whole or cropped, are equally wide."""
    rng = np.random.default_rng(0)
    for folder in ("samples", "reference"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    command = ["evaluate.py", f"--features={NAME}", "--out_dir", tmp_path / "e", "--reference", tmp_path / "reference"]
    judge(*command, "--samples", tmp_path / "samples")
    shutil.rmtree(tmp_path / "e/features")
    status, said = judge(*command, "--samples", tmp_path / "samples", "--image_size=20", check=False)
    assert status == 1
    assert "other settings (image_size, shape)" in said


def test_the_default_reference_is_of_one_size(saved, tmp_path, monkeypatch):
    """At another one, "FID" would be a comparison with pictures of half the size."""
    monkeypatch.setattr("evaluate.make_extractor", lambda *_: SimpleNamespace(name="inception"))
    status, said = judge("evaluate.py", "--ckpt", saved, "--num_samples=2", "--out_dir", tmp_path, check=False)
    assert status == 1
    assert "the samples are 64 pixels wide, and the reference batch of ImageNet, which is the default, 256" in said


def test_at_the_scale_of_full_size_a_file_of_statistics_is_taken_as_it_is(alone, saved, real, tmp_path):
    made = tmp_path / "reference.npz"
    judge("evaluate.py", f"--features={NAME}", "--out_dir", tmp_path / "m", "--samples", real, "--make_reference", made)
    judge(*flags(saved, made, tmp_path / "e", "--eval_scale=4"))
    assert numbers(report_of(tmp_path / "e")) == pytest.approx(numbers(report_of(alone)), rel=1e-5, abs=1e-6)


def test_the_report_holds_what_its_numbers_depend_on(alone, saved, real, tmp_path):
    settings = report_of(alone)["settings"]
    assert settings["split_size"] == 5000
    assert settings["pr_fp16"] is True
    assert settings["reference_sha256"] == fingerprint(real)
    shutil.copytree(alone, tmp_path / "a")
    judge(*flags(saved, real, tmp_path / "a", "--split_size=7", "--save_npz=true", "--save_png=true"))
    text = tool(main, "--compare", alone, tmp_path / "a", check=True)[1]
    assert "| split_size | 5000 | 7 |" in text
    assert "different split_size" in text
    shutil.copytree(real, tmp_path / "moved" / real.name)
    judge(*flags(saved, tmp_path / "moved" / real.name, tmp_path / "b"))
    assert "**Warning**: these" not in tool(main, "--compare", alone, tmp_path / "b", check=True)[1]


def test_too_few_images_are_refused_before_the_work(saved, real, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.FeatureStore", None)
    few = ["--num_samples=1", "--num_classes_eval=3"]
    status, said = judge(*flags(saved, real, tmp_path / "e", *few), check=False)
    assert status == 1
    assert "the samples: to be compared, there must be at least 4 images, not 3" in said


def test_one_picture_is_reconstructed_without_distances(small_vae_file, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (16, 16), (10, 200, 30)).save(tmp_path / "one/a.png")
    command = ["evaluate.py", f"--features={NAME}", f"--vae_ckpt={small_vae_file}", "--out_dir", tmp_path / "e"]
    judge(*command, "--reconstruct", tmp_path / "one", "--pn=1_2_4")
    report = report_of(tmp_path / "e")
    assert report["psnr"] > 0
    assert not [name for name in report if "frechet" in name or name == "precision"]
    assert report["warning"].startswith("1 images are too few for distances")


def test_a_finished_evaluation_knows_its_speed_or_says_none(alone, saved, real, tmp_path):
    more = ["--save_npz=true", "--save_png=true"]
    shutil.copytree(alone, tmp_path / "e")
    judge(*flags(saved, real, tmp_path / "e", *more))
    assert report_of(tmp_path / "e")["images_per_second"] == report_of(alone)["images_per_second"]
    (tmp_path / "e/report.json").unlink()
    judge(*flags(saved, real, tmp_path / "e", *more))
    assert "images_per_second" not in report_of(tmp_path / "e")


def test_a_sweep_of_what_nothing_reads_is_refused(capsys):
    parse(EvalConfig, ["--sweep_top_k=1,9", "--sweep_top_p=0.9,0.96"])
    with pytest.raises(SystemExit):
        parse(EvalConfig, ["--top_k=1", "--sweep_top_p=0.9,0.96"])
    assert "--sweep_top_p has no effect without another --top_k than 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sweep_top_p"):
        parse(EvalConfig, ["--sweep_top_p=0.9,0.96"]).check_model("FlowAR", ("flow_steps",))

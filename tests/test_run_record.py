"""An identity that is recorded is checked at every door: a run's tokenizer, its class names, its scales."""

import os
import shutil

import pytest
import torch
from PIL import Image

from evaluate import main as evaluate
from experiments.figures import main as visualize
from models import VQVAE, SARPipeline, open_pipeline
from models.pipeline import main as convert
from models.run_record import find_run
from models.weights import load_tokenizer, save_weights
from sample import main as sample
from tests.conftest import ALONE, config_of, tool
from train import build, check
from utils.runtime.checkpoint import main as checkpoint
from utils.runtime.files import read_json, write_json


def other_weights(vae_file, path):
    """A tokenizer of the same sizes."""
    torch.manual_seed(9)
    save_weights(VQVAE(load_tokenizer(vae_file).config), path)
    return path


def images(root, classes=("cat", "dog", "emu"), n=6):
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            for i in range(n):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (80 * c, 40 * i, 9)).save(path)
    return root


@pytest.fixture
def plain(flags, tmp_path):
    """Flags of a run on three classes of pictures, without its tokenizer and directory."""
    kept = [f for f in flags if not f.startswith(("--dataset", "--vae_ckpt", "--out_dir", "--vis_num"))]
    return [*kept, "--vis_num_samples=0", f"--data_path={images(tmp_path / 'data')}"]


@pytest.fixture
def a_run(plain, small_vae_file, tmp_path):
    """RUN and the tokenizer that it names, which a test may swap."""
    vae = shutil.copy(small_vae_file, tmp_path / "vae.safetensors")
    build(config_of(plain, f"--vae_ckpt={vae}", f"--out_dir={tmp_path / 'run'}"), ALONE).fit()
    return tmp_path / "run", tmp_path / "vae.safetensors"


def doors(run, tmp_path):
    """Every command that opens a run, by name."""
    out = ["--out", tmp_path / "o.png"]
    mask = Image.new("L", (16, 16), 255)
    mask.save(tmp_path / "mask.png")
    paint = ["--image", tmp_path / "mask.png", "--mask", tmp_path / "mask.png"]
    common = ["--ckpt", run, "--classes=cat", "--n=1", *out]
    offline = ["--features=efficientnet_lite0", "--out_dir", tmp_path / "e", "--num_samples=1"]
    figure = ["--ckpt", run, "--data_path", tmp_path / "data", "--n=2"]
    return {
        "sample": (sample, common),
        "paint": (sample, [*common, *paint]),
        "evaluate": (evaluate, ["--ckpt", run, *offline]),
        "convert": (convert, ["--ckpt", run, "--out", tmp_path / "c"]),
        **{name: (visualize, [name, *figure, *out]) for name in ("tf-vs-ar", "sf-inputs", "supervision", "trajectory")},
        "exposure-bias": (visualize, ["exposure-bias", *figure, "--out", tmp_path / "o.md"]),
    }


DOORS = [
    "sample",
    "paint",
    "evaluate",
    "convert",
    "tf-vs-ar",
    "sf-inputs",
    "supervision",
    "exposure-bias",
    "trajectory",
]


@pytest.mark.parametrize("door", DOORS)
def test_a_tokenizer_that_was_swapped_is_refused_and_one_that_is_named_is_a_warning(door, a_run, tmp_path):
    run, vae = a_run
    main, flags = doors(run, tmp_path)[door]
    assert tool(main, *flags)[0] == 0
    other = other_weights(vae, tmp_path / "other.safetensors")
    shutil.rmtree(tmp_path / "e", ignore_errors=True)
    with pytest.warns(UserWarning, match=r"is not the tokenizer that .*run was trained on"):
        assert tool(main, *flags, "--vae_ckpt", other)[0] == 0
    shutil.copy(other, vae)
    status, _, err = tool(main, *flags)
    assert status == 1
    assert "is not the tokenizer" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("recorded", [True, False])
def test_runs_that_only_their_checkpoints_record_are_compared_too(recorded, a_run):
    run, vae = a_run
    if not recorded:  # as runs of before were written
        config = read_json(run / "config.json")
        write_json(run / "config.json", {k: v for k, v in config.items() if k != "tokenizer"})
    other_weights(vae, vae)
    with pytest.raises(ValueError, match="is not the tokenizer"):
        open_pipeline(str(run))


def test_a_run_finds_its_tokenizer_from_anywhere(plain, small_vae_file, tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    shutil.copy(small_vae_file, tmp_path / "a/vae.safetensors")
    monkeypatch.chdir(tmp_path / "a")
    build(config_of(plain, "--vae_ckpt=vae.safetensors", "--out_dir=run"), ALONE).fit()
    for place in (tmp_path, tmp_path / "a/b", "/"):
        monkeypatch.chdir(place)
        assert open_pipeline(str(tmp_path / "a/run")).side == 16
    shutil.move(tmp_path / "a", tmp_path / "moved")  # both together
    assert open_pipeline(os.path.relpath(tmp_path / "moved/run")).class_names == ["cat", "dog", "emu"]


def test_the_python_api_says_what_it_opened(a_run, tmp_path):
    run, vae = a_run
    opened = {
        "from_files": SARPipeline.from_files(vae, run),
        "without a tokenizer": SARPipeline.from_files("", run),
        "a file": SARPipeline.from_files(vae, next(run.glob("checkpoints/*/model.safetensors"))),
        "from_pretrained": SARPipeline.from_pretrained(run),
        "open_pipeline": open_pipeline(str(run)),
    }
    tool(convert, "--ckpt", run, "--out", tmp_path / "c", check=True)
    opened["converted"] = SARPipeline.from_pretrained(str(tmp_path / "c"))
    for name, pipeline in opened.items():
        assert pipeline.schedule.sides == (1, 2, 4), name
        assert pipeline.class_names == ["cat", "dog", "emu"]
        assert pipeline.describe() == "FlexVAR-d2, 3 classes (cat …), scales 1_2_4, 16×16 pixels"
        assert pipeline("dog")[0].size == (16, 16)
    with pytest.raises(ValueError, match="from_files"):
        SARPipeline.from_pretrained(vae)


@pytest.fixture
def tokenizer_run(small_vae_file, tmp_path):
    """A tokenizer run's directory: sides 1, 2, 4 of 16 pixels."""
    directory = tmp_path / "tok"
    directory.mkdir()
    shutil.copy(small_vae_file, directory / "model.safetensors")
    write_json(directory / "config.json", {"model": {"pn": "1_2_4", "image_size": 16}})
    return directory


def test_a_training_takes_the_sides_of_its_tokenizers_run(plain, tokenizer_run, tmp_path, capsys):
    flags = [f for f in plain if not f.startswith("--pn")] + [
        f"--vae_ckpt={tokenizer_run}",
        f"--out_dir={tmp_path / 'r'}",
    ]
    assert build(config_of(flags), ALONE).config.model.scales.sides == (1, 2, 4)
    assert "scales 1_2_4, those of the tokenizer's run" in capsys.readouterr().err
    assert build(config_of(flags, "--pn=1_4"), ALONE).config.model.scales.sides == (1, 4)
    with pytest.raises(ValueError, match="--schedule flexvar draws sides up to 16"):
        check(config_of([f for f in flags if not f.startswith("--schedule")]))


@pytest.mark.parametrize("classes", [("cat", "dog", "kitten"), ("dog", "emu", "fox"), ("cat", "emu")])
def test_other_classes_than_those_of_the_run_to_start_from_are_refused(classes, a_run, plain, tmp_path):
    run, vae = a_run
    flags = [f for f in plain if not f.startswith("--data_path")]
    flags += [f"--data_path={images(tmp_path / 'others', classes)}", f"--vae_ckpt={vae}", f"--init_ckpt={run}"]
    flags += [f"--out_dir={tmp_path / 'second'}"]
    with pytest.raises(ValueError, match=r"trained on other classes .*--reset_class_embedding"):
        build(config_of(flags), ALONE)
    assert build(config_of(flags, "--reset_class_embedding=true"), ALONE).model.config.num_classes == len(classes)
    if len(classes) == 3:
        build(config_of(flags, "--allow_change=true"), ALONE)
    status, _, err = tool(
        visualize, "supervision", "--ckpt", run, "--data_path", tmp_path / "others", "--out", tmp_path / "x.png"
    )
    assert status == 1
    assert "trained on other classes" in err


def test_another_tokenizer_than_that_of_the_run_to_start_from(a_run, plain, tmp_path, monkeypatch):
    run, vae = a_run
    other = other_weights(vae, tmp_path / "other.safetensors")
    flags = [*plain, f"--init_ckpt={run}", f"--out_dir={tmp_path / 'second'}"]
    with pytest.warns(UserWarning, match="is not the tokenizer"):
        build(config_of(flags, f"--vae_ckpt={other}"), ALONE)
    (tmp_path / "pretrained").mkdir()
    shutil.copy(other, tmp_path / "pretrained/FlexVAE.pth")  # the default, which nobody named
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"is not the tokenizer .*name that one by --vae_ckpt .it was {vae}"):
        build(config_of(flags), ALONE)


def test_what_is_cheap_is_checked_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.make_extractor", None)
    for wrong in (["--ckpt=nowhere.pth"], ["--samples=nowhere"], ["--reconstruct=nowhere"], ["--reference=nowhere"]):
        status, _, err = tool(evaluate, *wrong, "--out_dir", tmp_path / "o")
        assert (status, "nowhere" in err) == (1, True)
    assert not (tmp_path / "o").exists()


def test_image_size_is_of_folders_only(real, tmp_path):
    import numpy as np

    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    command = ["--features=efficientnet_lite0", "--out_dir", tmp_path / "o", "--image_size=16", "--split_size=2"]
    status, _, err = tool(evaluate, *command, "--samples", tmp_path / "a.npz")
    assert (status, "--image_size has no effect without a folder" in err) == (1, True)
    assert tool(evaluate, *command, "--samples", tmp_path / "a.npz", "--reference", real)[0] == 0


def test_find_run_takes_only_ours(a_run, tmp_path):
    run, _ = a_run
    for path in (run, run / "checkpoints", next(run.glob("checkpoints/step_*"))):
        assert find_run(path).directory.resolve() == run.resolve()
    for text in ("[]", "{", '{"model": "x"}', '{"model": {"pn": 3}}', '{"transformer": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert find_run(tmp_path / "weights.pth") is None


def test_a_folder_of_runs_names_them(a_run, tmp_path):
    """`--ckpt out/quickstart` where out/quickstart/sar was meant."""
    (tmp_path / "more").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "more/second")
    out = ["--classes=cat", "--out", tmp_path / "o.png"]
    for main, flags in [(sample, ["--ckpt", tmp_path, *out]), (checkpoint, ["list", tmp_path])]:
        status, _, err = tool(main, *flags)
        assert status == 1
        assert f"the runs below it are {tmp_path / 'more/second'}, {tmp_path / 'run'}" in err

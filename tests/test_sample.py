import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.pipeline import SARPipeline
from models.weights import save_weights
from sample import check_sheet, main
from tests.conftest import tool
from utils.config.sampling import SampleConfig
from utils.reporting.pictures import captioned_grid
from utils.runtime.flags import parse


@pytest.fixture
def saved(vae, model, schedule, tmp_path):
    path = tmp_path / "pipeline"
    SARPipeline.of(vae, model, schedule, [f"animal {letter}" for letter in "abcdefghij"]).save_pretrained(path)
    return path


def sample(saved, *flags, check=True):
    return tool(main, "--ckpt", saved, "--cfg=1.5", *flags, check=check)


def test_grid_files_strip_and_gif(saved, tmp_path):
    out, files = tmp_path / "grid.png", tmp_path / "files"
    common = ["--classes", "animal c,7", "--n=3", "--out", out]
    sample(saved, *common, "--files", files, "--steps", tmp_path / "strip.png", "--batch=4")
    names = sorted(p.name for p in files.iterdir())
    assert names == [f"{i:05d}.png" for i in range(6)]
    grid = Image.open(out)
    assert grid.width >= 3 * 128
    strip = Image.open(tmp_path / "strip.png")
    assert strip.width >= 4 * 128
    assert strip.height >= 6 * 128
    first = {p.name: np.asarray(Image.open(p)) for p in files.iterdir()}
    sample(saved, *common, "--files", files, "--steps", tmp_path / "steps.gif")  # another batch, the same images
    for name in names:
        assert np.array_equal(first[name], np.asarray(Image.open(files / name)))
    assert Image.open(tmp_path / "steps.gif").n_frames == 4


def test_painting_leaves_the_known_region(saved, tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle([0, 32, 63, 63], fill=255)
    picture.save(tmp_path / "in.png")
    mask.save(tmp_path / "mask.png")
    files = tmp_path / "files"
    edit = ["--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--classes=3", "--n=2"]
    sample(saved, *edit, "--files", files, "--out", tmp_path / "g.png")
    painted = np.asarray(Image.open(files / "00001.png"))
    assert np.array_equal(painted[:32], np.asarray(picture)[:32])
    assert not np.array_equal(painted[32:], np.asarray(picture)[32:])
    sample(saved, "--image", tmp_path / "in.png", "--outpaint=0.5", "--classes=3", "--n=1", "--out", tmp_path / "o.png")
    assert (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=animal z"], "did you mean"),
        (["--classes=10"], "10 is out of range"),
        (["--classes="], "at least one class"),
        (["--image=nowhere.png", "--mask=x.png", "--classes=3"], "cannot use the image nowhere.png"),
    ],
)
def test_wrong_requests_are_one_line(saved, flags, message, tmp_path):
    status, _, said = sample(saved, *flags, "--out", tmp_path / "x.png", check=False)
    assert status == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image=a.png"], "--image needs either --mask or --outpaint"),
        (["--mask=a.png"], "--mask has no effect without --image"),
        (["--steps=a.txt"], "must end in .gif or .png"),
        (["--n=0"], "--n must be at least 1"),
        (["--guidance=cosine"], "--guidance"),
    ],
)
def test_contradictory_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(SampleConfig, flags)
    assert message in capsys.readouterr().err


def test_long_captions_are_cut_and_drawn():
    tile = Image.new("RGB", (32, 32), "black")
    sheet = captioned_grid([tile, tile], ["x", "a very long class name that cannot fit under a picture"], columns=2)
    pixels = np.asarray(sheet.convert("L"))
    caption = pixels[-16:]
    assert (caption < 100).sum() > 50  # there is ink under the pictures
    assert (caption[:, :2] > 200).all()


def test_classes_may_be_repeated_and_quoted(vae, model, schedule, tmp_path):
    names = ["crane, bird", "a", "A", *"bcdefgh"]
    SARPipeline.of(vae, model, schedule, names).save_pretrained(tmp_path / "p")
    files = tmp_path / "files"
    common = ["--n=1", "--out", tmp_path / "g.png", "--files", files]
    sample(tmp_path / "p", "--classes", "crane, bird", "--classes", "A,b", "--classes", '"crane, bird"', *common)
    assert len(list(files.iterdir())) == 4
    status, _, err = sample(tmp_path / "p", "--classes=H,A,Ä", *common, check=False)
    assert (status, "no class is named 'Ä'" in err) == (1, True)


@pytest.mark.parametrize("out", ["x.webp", "x.jpg"])
def test_a_grid_that_its_file_cannot_hold_is_refused_before_the_first_image(out, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("sample.draw", None)
    status, _, err = sample(saved, "--classes=0,1", "--n=1100", "--out", tmp_path / out, check=False)
    assert (status, "more than such a file holds" in err) == (1, True)
    check_sheet("--steps", "x.gif", 100, 10, 128)
    with pytest.raises(ValueError, match=r"--steps x\.gif"):
        check_sheet("--steps", "x.gif", 400_000, 632, 128)


def test_files_are_written_as_they_come_and_leftovers_are_refused(saved, tmp_path, monkeypatch):
    files, inner, calls = tmp_path / "files", SARPipeline.__call__, []

    def fails_at_the_third(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a failure")
        return inner(self, *args, **options)

    monkeypatch.setattr(SARPipeline, "__call__", fails_at_the_third)
    common = ["--classes=1", "--out", tmp_path / "g.png", "--files", files, "--batch=2"]
    assert sample(saved, *common, "--n=6", check=False)[0] == 1
    assert sorted(p.name for p in files.iterdir()) == [f"{i:05d}.png" for i in range(4)]
    status, _, err = sample(saved, *common, "--n=2", check=False)
    assert (status, "holds 00002.png of another run" in err) == (1, True)
    assert len(list(files.iterdir())) == 4
    assert sample(saved, *common, "--n=6")[0] == 0
    assert len(list(files.iterdir())) == 6


@pytest.mark.parametrize("path", ["page", "strange", "list", "broken"])
def test_a_config_of_another_program_is_passed_over(path, vae, model, tmp_path):
    text = {"page": "<html>", "strange": '{"model": "resnet50"}', "list": '["a"]', "broken": "{"}[path]
    (tmp_path / "w").mkdir()
    (tmp_path / "config.json").write_text(text)
    save_weights(model, tmp_path / "w/m.safetensors")
    save_weights(vae, tmp_path / "v.safetensors")
    common = ["--vae_ckpt", tmp_path / "v.safetensors", "--pn=1_2", "--classes=0", "--n=1", "--out", tmp_path / "o.png"]
    assert sample(tmp_path / "w/m.safetensors", *common)[0] == 0


def test_fill_steps_are_of_hybrid_models_only(saved, tmp_path):
    status, _, err = sample(saved, "--classes=0", "--fill_steps=3", "--out", tmp_path / "x.png", check=False)
    assert status == 1
    assert "--fill_steps has no effect with a FlexVAR" in err


def test_sides_that_are_taken_greedily_are_said_once(saved, tmp_path):
    """Asked for by --max_pn here; of a file that belongs to no run it is the released models' rule."""
    out = ["--classes=0", "--n=3", "--batch=1", "--out", tmp_path / "x.png"]
    assert sample(saved, *out, "--max_pn=2")[2].count("sides 3, 4 are taken greedily") == 1
    assert "greedily" not in sample(saved, *out)[2]  # this pipeline's own sides

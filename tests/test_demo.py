"""The page, in a real browser where one is installed, and its parts without one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import Studio, main, mask_of
from tests.conftest import ROOT, fill, tool
from tests.test_pipeline import SARPipeline
from utils.runtime.image_files import read_image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="session")
def named(tmp_path_factory, vae):
    """Two pipelines of 64×64 images of ten named classes."""
    from models import FlexVAR, FlexVARConfig, ScaleSchedule

    names = ["ant", "bear", "cat", "dog", "elk", "fox", "goat", "hen", "ibis", "jay"]
    folder = tmp_path_factory.mktemp("named")
    for seed, name in ((12, "first"), (13, "second")):
        model = fill(FlexVAR(FlexVARConfig(depth=2, width=128, num_classes=10, codebook_size=128)), seed)
        SARPipeline.of(vae, model, ScaleSchedule((1, 2, 3, 4)), names).save_pretrained(folder / name)
    return folder


@pytest.fixture
def studio(named, tmp_path):
    return Studio([str(named / "first"), str(named / "second")], tmp_path / "out", torch.device("cpu"))


def test_images_are_the_pipelines_own_and_progress_is_told(studio):
    told = []
    name = studio.names[0]
    found = studio.draw(name, "dog", 1.5, 0, 0.0, 7, 2, "", lambda *step: told.append(step))
    wanted = studio.open(name)("dog", n=2, seed=7, cfg=1.5, top_k=0, top_p=0.0)
    assert list(found) == [1, 2, 3, 4]
    assert [im.tobytes() for im in found[4]] == [im.tobytes() for im in wanted]
    assert told == [(i, 4, name) for i in (1, 2, 3, 4)]
    other = studio.draw(name, "dog", 1.5, 0, 0.0, 7, 2, "1_2_4_5")  # another size
    assert (list(other), other[5][0].size) == ([1, 2, 4, 5], (80, 80))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "dgo"}, "dog"),
        ({"label": "77"}, "out of range|no class"),
        ({"pn": "3_2"}, "must grow"),
        ({"n": 0}, "between 1 and 16"),
        ({"name": "/etc/passwd"}, "none of the models"),
    ],
)
def test_mistakes_are_answered_in_words(change, said, studio):
    words = {"name": studio.names[0], "label": "dog", "cfg": 1.0, "top_k": 0, "top_p": 0.0, "seed": 0, "n": 1, "pn": ""}
    with pytest.raises(ValueError, match=said):
        studio.draw(**{**words, **change})


def test_saved_pictures_carry_their_settings(studio):
    [path] = studio.save([Image.new("RGB", (8, 8))], "dog", cfg=1.5, seed=3)
    assert json.loads(Image.open(path).text["sar"]) == {"cfg": 1.5, "seed": 3, "image": 0}
    assert Path(path).parent == studio.out


def test_a_mask_is_what_was_drawn_over(studio):
    drawn = np.zeros((20, 30, 4), dtype=np.uint8)
    drawn[5:10, 10:20] = 255
    picture, mask = mask_of({"background": Image.new("RGB", (30, 20)), "layers": [Image.fromarray(drawn)]})
    assert picture.size == mask.size
    assert (np.asarray(mask) > 0).sum() == 50
    with pytest.raises(ValueError, match="draw over the part"):
        studio.paint(studio.names[0], picture, Image.new("L", (30, 20)), 1.0, "dog", 1.0, 0, 0.0, 0)
    with pytest.raises(ValueError, match="choose a picture"):
        mask_of({"background": None, "layers": []})


def test_painting_and_the_tokenizer_use_the_models_own(studio, real):
    image = read_image(next(real.iterdir()))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 32, 64))
    painted = np.asarray(studio.paint(studio.names[0], image, mask, 1.0, "fox", 1.0, 0, 0.0, 5))
    assert np.array_equal(painted[:, 32:], np.asarray(image)[:, 32:])
    assert not np.array_equal(painted[:, :32], np.asarray(image)[:, :32])
    assert studio.paint(studio.names[0], image, None, 0.5, "fox", 1.0, 0, 0.0, 5).size == (64, 64)
    assert list(studio.reconstruct(studio.names[0], image)) == [1, 2, 3, 4]


def test_without_gradio_it_says_what_to_install(named, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, said = tool(main, "--ckpt", named / "first", "--out", tmp_path / "out")
    assert status == 1
    assert "pip install gradio" in said


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def page(named, tmp_path_factory):
    """The page in a browser, the folder that it writes to, and its address."""
    from playwright.sync_api import sync_playwright

    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "demo", "--ckpt", named / "first", named / "second", "--out", out]
    server = subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        said = next(line for line in server.stdout if "the page is at" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        with sync_playwright() as play:
            opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = opened.new_page(viewport={"width": 1300, "height": 1600})
            tab.set_default_timeout(60_000)
            tab.goto(address)
            tab.wait_for_selector("#draw")
            yield tab, out, address
            opened.close()
    finally:
        server.kill()
        server.wait()


def choose(tab, box: str, text: str) -> None:
    tab.fill(f"#{box} input", text)
    tab.keyboard.press("Enter")


def written(out: Path) -> list[Path]:
    return sorted(out.glob("*.png"))


@browser
def test_a_named_class_is_drawn_and_can_be_stepped_through(page, studio):
    tab, out, _ = page
    choose(tab, "class", "dog")
    tab.fill("#seed input", "7")
    tab.click("#draw")
    tab.wait_for_selector("#left img")
    tab.wait_for_selector("#files a")
    first = written(out)[0]
    about = json.loads(Image.open(first).text["sar"])
    assert (about["class"], about["seed"], about["image"]) == ("dog", 7, 0)
    options = {"cfg": about["cfg"], "top_k": int(about["top_k"]), "top_p": about["top_p"]}
    wanted = studio.open(studio.names[0])("dog", n=4, seed=7, **options)[0]
    assert Image.open(first).tobytes() == wanted.tobytes()
    before = tab.get_attribute("#left img", "src")
    tab.fill("#step input[type=number]", "1")
    tab.keyboard.press("Tab")
    slider = tab.locator("#step input[type=range]")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("before => document.querySelector('#left img').src != before", arg=before)


@browser
def test_two_models_from_the_same_seeds(page):
    tab, out, _ = page
    before = len(written(out))
    tab.click("#beside input")
    tab.get_by_role("option", name="second").click()
    tab.click("#draw")
    tab.wait_for_selector("#right img")
    tab.wait_for_function("() => document.querySelectorAll('#files a').length >= 8")
    new = written(out)[before:]
    assert len({json.loads(Image.open(p).text["sar"])["model"] for p in new}) == 2


@browser
def test_an_unknown_class_gets_the_suggestion(page):
    tab, *_ = page
    choose(tab, "class", "elkk")
    tab.click("#draw")
    tab.wait_for_selector("text=/elk/ >> nth=0")
    assert "elk" in tab.locator(".toast-body").first.inner_text()
    tab.locator(".toast-close").first.click()
    choose(tab, "class", "dog")


@browser
def test_only_what_is_drawn_over_changes(page, real):
    tab, out, _ = page
    before = set(written(out))
    tab.get_by_role("tab", name="Paint").click()
    canvas = tab.locator("#editor canvas").first
    canvas.wait_for()
    tab.wait_for_timeout(1500)  # until the editor takes files
    tab.set_input_files("#editor input[type=file]", str(next(real.iterdir())))
    tab.locator("#editor >> text=Upload an image").wait_for(state="hidden")
    tab.wait_for_timeout(500)
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.5)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] * 0.5, steps=8)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    tab.click("#paint")
    tab.wait_for_selector("#painted img")
    tab.wait_for_selector("#painted_file a")
    [path] = set(written(out)) - before
    painted, original = np.asarray(Image.open(path)), np.asarray(read_image(next(real.iterdir())))
    changed = (painted != original).any(-1)
    assert 0 < changed.mean() < 0.6
    assert not changed[:8].any()  # far from the stroke


@browser
def test_the_tokenizer_shows_each_scale(page, real):
    tab, *_ = page
    tab.get_by_role("tab", name="Tokenizer").click()
    tab.set_input_files("#picture input[type=file]", str(next(real.iterdir())))
    tab.wait_for_timeout(500)
    tab.click("#reconstruct")
    tab.wait_for_function("() => document.querySelectorAll('#scales img').length >= 4")


@browser
def test_it_writes_to_its_own_folder_and_listens_here_alone(page):
    _, out, address = page
    assert written(out)
    port = address.rpartition(":")[2]
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True).stdout if shutil.which("ss") else ""
    for line in listening.splitlines():
        if f":{port} " in line:
            assert f"127.0.0.1:{port}" in line

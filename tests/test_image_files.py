"""One reader, one walker: training, the check, the cache and evaluation see the same files, and see them alike."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from models.pipeline import from_pil, open_pipeline
from tests.conftest import ALONE, config_of, tool
from train import build
from utils.config.training import DataConfig
from utils.data.check import main
from utils.data.datasets import check_dataset, open_dataset
from utils.evaluations.c2i.images import FolderImages, fingerprint
from utils.runtime.image_files import (
    BadImage,
    ClassFolders,
    image_size,
    read_image,
    read_mask,
    upright_rgb,
    walk_images,
)


def paint(path, colour="red", size=(24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes with every suffix, folders in folders, links, what is hidden, and what is no image."""
    root = tmp_path / "data/train"
    for i, suffix in enumerate((".jpg", ".JPEG", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".TIFF", ".webp")):
        paint(root / f"a/{i}{suffix}")
    paint(root / "a/deep/er/x.png")
    paint(tmp_path / "elsewhere/linked/y.png")
    (root / "a/link").symlink_to(tmp_path / "elsewhere/linked")
    (root / "a/deep/loop").symlink_to(root / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/z.png").symlink_to(tmp_path / "elsewhere/linked/y.png")
    for hidden in (".ipynb_checkpoints/x.png", "__MACOSX/a/x.png", "a/.thumbs/x.png", "a/._0.png"):
        paint(root / hidden)
    (root / "a/notes.txt").write_text("x")
    (root / "a/0.gif").write_bytes(b"GIF89a")
    return root


def test_all_see_the_same_files(tree):
    wanted = {
        f"a/{i}{s}" for i, s in enumerate((".jpg", ".JPEG", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".TIFF", ".webp"))
    }
    wanted |= {"a/deep/er/x.png", "a/link/y.png", "a/z.png", "b/linked/y.png"}
    source = ClassFolders(tree)
    assert {os.path.relpath(path, tree) for path, _ in source.samples} == wanted
    assert {os.path.relpath(path, tree) for path in FolderImages(tree).files} == wanted
    assert len(open_dataset(DataConfig(data_path=str(tree.parent)), 16, 0, "train")) == len(wanted)
    status, out, _ = tool(main, tree.parent)
    assert status == 0
    assert f"{len(wanted)} images, 0 bad, 2 other files; 2 classes of 1…{len(wanted) - 1}" in out
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        assert hidden in out
    assert ".txt" in out
    before = fingerprint(tree)
    (tree / ".ipynb_checkpoints/x.png").unlink()  # what nobody sees changes nothing
    assert fingerprint(tree) == before
    os.utime(tree / "a/link/y.png", ns=(0, 0))
    assert fingerprint(tree) != before


def test_the_order_is_torchvisions(tree):
    for hidden in (tree / ".ipynb_checkpoints", tree / "__MACOSX", tree / "a/.thumbs"):
        for path in sorted(hidden.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        hidden.rmdir()
    (tree / "a/._0.png").unlink()
    (tree / "a/deep/loop").unlink()  # which torchvision would follow for ever
    assert list(ClassFolders(tree).samples) == ImageFolder(str(tree)).samples


def test_folders_that_hold_no_data_set_are_named(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images of the class a"):
        ClassFolders(tmp_path / "train")
    (tmp_path / "none/.hidden").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no class folders"):
        ClassFolders(tmp_path / "none")
    with pytest.raises(ValueError, match="absent"):
        ClassFolders(tmp_path / "absent")


def test_images_without_classes_are_told_where_to_lie(tmp_path, flags):
    """DIR/*.png and DIR/train/*.png: the place is named, and images that lie there are one class to train on."""
    config = DataConfig(data_path=str(tmp_path / "data"))
    paint(tmp_path / "data/x.png")
    with pytest.raises(ValueError, match=f"move them to {tmp_path / 'data/train/all'}/, one class"):
        check_dataset(config)
    paint(tmp_path / "data/train/y.png")
    with pytest.raises(ValueError, match=f"holds no class folders.*move them to {tmp_path / 'data/train/all'}/"):
        check_dataset(config)
    with pytest.raises(ValueError, match="one class"):
        ClassFolders(tmp_path / "data/train")
    for i in range(3):
        paint(tmp_path / f"data/train/all/{i}.png")
    (tmp_path / "data/train/y.png").unlink()
    few = [f for f in flags if not f.startswith("--dataset")]
    trainer = build(config_of(few, f"--data_path={tmp_path / 'data'}", "--max_steps=1"), ALONE)
    trainer.fit()
    assert trainer.model.config.num_classes == 1
    assert open_pipeline(str(tmp_path / "run"))("all", n=1)[0].size == (16, 16)


def test_names_that_are_no_utf8(tmp_path):
    """A file works under any name; a class, whose name goes into records, is refused by it."""
    name = os.fsdecode(b"\xe9")
    paint(tmp_path / f"train/a/{name}.png")
    (tmp_path / f"train/a/bad{name}.png").write_bytes(b"no image")
    config = DataConfig(data_path=str(tmp_path), on_bad_image="skip", bad_image_limit=0.5)
    data = open_dataset(config, 16, 0, "train", tmp_path / "out")
    assert all(data[0, i][0].shape == (3, 16, 16) for i in range(2))
    assert b"\xe9" in (tmp_path / "out/bad_images_train.txt").read_bytes()
    assert len(fingerprint(tmp_path)) == 64
    paint(tmp_path / f"train/{name}/x.png")
    with pytest.raises(ValueError, match=r"\\xe9' is not UTF-8: rename it"):
        ClassFolders(tmp_path / "train")


def rgba(tmp_path, mode):
    """Left half opaque red, right half transparent green."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (4, 0, 8, 8))
    path = tmp_path / f"{mode}.png"
    (image if mode == "RGBA" else image.convert("LA")).save(path)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_used(mode, tmp_path):
    path = rgba(tmp_path, mode)
    assert read_image(path).getpixel((6, 4)) == (255, 255, 255)
    assert read_image(path).getpixel((1, 4)) != (255, 255, 255)
    assert read_mask(path).getpixel((6, 4)) == 0
    assert upright_rgb(Image.open(path)).tobytes() == read_image(path).tobytes()


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_turn_is_seen_alike_by_all(turn, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    seen = read_image(tmp_path / "x.png")
    assert seen.size == image_size(tmp_path / "x.png") == ((16, 8) if turn < 5 else (8, 16))
    wanted = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    wanted |= {5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).transpose(1, 0, 2)}
    assert np.array_equal(np.asarray(seen), (wanted | {8: np.rot90(pixels)})[turn])
    assert torch.equal(from_pil(upright_rgb(Image.open(tmp_path / "x.png")), 8), from_pil(seen, 8))


def test_painting_reads_as_training_does(saved, tmp_path):
    from models import SARPipeline

    pipeline, pixels = SARPipeline.from_pretrained(saved), np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255  # upside down it is black over white
    exif = Image.Exif()
    exif[0x112] = 3
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))  # white everywhere, opaque in one corner only
    mask.paste((255, 255, 255, 255), (0, 0, 8, 8))
    painted = np.asarray(pipeline.inpaint(Image.open(tmp_path / "x.png"), mask, [3])[0])
    assert (painted[8:32] == 0).all()
    assert (painted[32:] == 255).all()
    for wrong in (Image.new("I;16", (64, 64)), Image.new("F", (64, 64))):
        with pytest.raises(ValueError, match="8 bits"):
            pipeline.inpaint(wrong, mask, [3])
        with pytest.raises(ValueError, match="8 bits"):
            pipeline.outpaint(wrong, 0.5, [3])


@pytest.mark.parametrize("sizes", [[(24, 24)] * 9 + [(24, 32)], [(24, 32), *[(24, 24)] * 9], [(24, 32), (32, 24)] * 5])
def test_one_verdict_on_sizes_whatever_the_batch(sizes, tmp_path):
    for i, size in enumerate(sizes):
        paint(tmp_path / f"{i}.png", size=size)
    with pytest.raises(ValueError, match=f"differ in size: give --image_size .*{sizes[0][0]}×{sizes[0][1]}"):
        FolderImages(tmp_path)
    assert FolderImages(tmp_path, 16).batch(range(10)).shape == (10, 3, 16, 16)


def test_an_unreadable_file_among_samples_is_named_at_once(tmp_path):
    paint(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"bad\.png"):
        FolderImages(tmp_path)


def test_images_of_class_folders_come_in_a_seeded_permutation(tmp_path):
    for c in "abcd":
        for i in range(25):
            paint(tmp_path / f"{c}/{i:02d}.png", size=(2, 2))
    orders = [FolderImages(tmp_path, seed=seed).files for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == walk_images(tmp_path).images
    assert len({os.path.basename(os.path.dirname(f)) for f in orders[0][:25]}) == 4

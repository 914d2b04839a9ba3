import io
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ALONE, config_of, run, tool
from train import build
from utils.config.training import DataConfig
from utils.data.check import main
from utils.data.datasets import make_loader, open_dataset
from utils.data.images import adm_crop
from utils.runtime.image_files import BadImage, read_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a hundred bytes that claims to be of this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "empty.jpg": b"",
    "truncated.jpg": encoded(PICTURE)[:700],
    "truncated.png": encoded(PICTURE, "PNG")[:-200],
    "header_only.jpg": encoded(PICTURE)[:20],
    "text.jpg": b"hello",
    "page.jpeg": b"<html>404 not found</html>",
    "zeros.png": bytes(5000),
    "bomb.png": bomb(50_000, 50_000),
    "wide.png": encoded(Image.new("RGB", (2000, 3)), "PNG"),
    "sixteen_bits.png": encoded(Image.fromarray(np.zeros((8, 8), dtype=np.uint16)), "PNG"),
    "float.tiff": encoded(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*BAD, "missing.jpg", "folder.jpg"])
def test_what_is_no_usable_image_is_named(name, tmp_path):
    if name == "folder.jpg":
        (tmp_path / name).mkdir()
    elif name in BAD:
        (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(BadImage, match=f"cannot use the image .*{name}: ."):
        read_image(str(tmp_path / name))


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    return encoded(PICTURE, exif=exif)


ODD = {
    "cmyk.jpg": encoded(PICTURE.convert("CMYK")),
    "grey.jpg": encoded(PICTURE.convert("L")),
    "palette.png": encoded(PICTURE.quantize(8), "PNG"),
    "transparent_palette.png": encoded(PICTURE.quantize(8), "PNG", transparency=b"\x00\x80"),
    "alpha.png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "bits.png": encoded(PICTURE.convert("1"), "PNG"),
    "pixel.png": encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "column.png": encoded(Image.new("RGB", (1, 90)), "PNG"),
    "moving.gif": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(9)]),
    "picture.webp": encoded(PICTURE, "WEBP"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_become_rgb_crops(name, tmp_path):
    (tmp_path / name).write_bytes(ODD[name])
    image = read_image(str(tmp_path / name))
    assert image.mode == "RGB"
    for rng in (None, random.Random(0)):
        assert adm_crop(image, 32, rng).size == (32, 32)


def test_a_picture_is_turned_upright(tmp_path):
    (tmp_path / "x.jpg").write_bytes(oriented())
    assert read_image(str(tmp_path / "x.jpg")).size == (40, 60)


def folder(root, good=30, bad=()):
    """Two classes, the bad ones in the middle of the first."""
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(good // 2):
            PICTURE.rotate(i).save(root / f"train/{name}/{i:03d}.png")
    for name in bad:
        (root / f"train/a/005_{name}").write_bytes(BAD[name])
    return str(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_training_with_its_path(workers, flags, tmp_path):
    data = folder(tmp_path / "data", bad=["truncated.jpg"])
    more = ["--dataset=folder", f"--data_path={data}", f"--workers={workers}", "--max_steps=10", "--vis_num_samples=0"]
    done = run(sys.executable, "train.py", *flags, *more, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: cannot use the image {data}/train/a/005_trunc")
    assert "Traceback" not in done.stderr


def test_bad_images_are_skipped_alike_by_everyone_and_listed(tmp_path):
    config = DataConfig(
        data_path=folder(tmp_path / "data", bad=["truncated.jpg", "empty.jpg"]),
        on_bad_image="skip",
        bad_image_limit=0.1,
    )
    views = [open_dataset(config, 16, 0, "train", tmp_path / f"run{n}") for n in (0, 2)]
    order = [[(0, i) for i in range(a, a + 8)] for a in range(0, 32, 8)]
    loaded = [list(make_loader(v, order, n, ALONE.device)) for v, n in zip(views, (0, 2), strict=True)]
    for (a, label_a), (b, label_b) in zip(*loaded, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(label_a, label_b)
    listed = [(tmp_path / f"run{n}/bad_images_train.txt").read_text().splitlines() for n in (0, 2)]
    assert set(listed[0]) == set(listed[1])
    assert len(set(listed[0])) == 2
    # 005_empty.jpg and 005_truncated.jpg follow 005.png: the next good one, 006.png, stands for both.
    assert torch.equal(loaded[0][0][1][6:8], torch.tensor([0, 0]))
    assert views[0].read(6)[0].tobytes() == views[0].read(8)[0].tobytes() != views[0].read(9)[0].tobytes()


def test_too_many_bad_images_stop(tmp_path):
    config = DataConfig(data_path=folder(tmp_path / "data", bad=["text.jpg"]), on_bad_image="skip")
    views = open_dataset(config, 16, 0, "train", tmp_path)
    with pytest.raises(BadImage, match=r"1 of 31 images are bad, more than --bad_image_limit 0.001"):
        list(make_loader(views, [[(0, i) for i in range(31)]], 0, ALONE.device))


def test_a_run_that_skips_trains(flags, tmp_path):
    data = folder(tmp_path / "data", bad=["text.jpg"])
    skip = ["--on_bad_image=skip", "--bad_image_limit=0.05"]
    more = ["--dataset=folder", f"--data_path={data}", "--max_steps=4", "--vis_num_samples=0", *skip]
    build(config_of(flags, *more), ALONE).fit()
    assert "005_text.jpg" in (tmp_path / "run/bad_images_train.txt").read_text()


def test_scanning_a_data_set(tmp_path):
    data = folder(tmp_path / "data", bad=["truncated.jpg", "bomb.png"])
    (tmp_path / "data/train/a/notes.txt").write_text("x")
    status, out, _ = tool(main, data)
    assert status == 1
    assert "train: 32 images, 2 bad, 1 other files; 2 classes of 15…17" in out
    assert sum("cannot use the image" in line for line in out.splitlines()) == 2
    assert tool(main, folder(tmp_path / "good"))[0] == 0
    assert "error: " in tool(main, tmp_path / "x")[2]

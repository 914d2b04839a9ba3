import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from models.scales import ScaleSchedule
from models.tokenizer import from_bytes
from utils.config.training import DataConfig
from utils.data import datasets as data
from utils.data.datasets import (
    StepSampler,
    accumulation,
    check_dataset,
    encode_batch,
    loader_workers,
    make_loader,
    open_dataset,
)
from utils.data.images import adm_crop
from utils.data.sources import digits

CPU = torch.device("cpu")


def keys(rank, world, start=0, total=10, micro=4, size=50, batch=16, seed=0):
    return list(StepSampler(size, seed, batch, micro, rank, world, start, total))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_each_step_without_overlap(world):
    alone = keys(0, 1)
    per_rank = [keys(rank, world) for rank in range(world)]
    accumulate = 16 // 4 // world
    for step in range(10):
        wanted = sorted(itertools.chain(*alone[step * 4 : step * 4 + 4]))
        found = [k for mine in per_rank for k in itertools.chain(*mine[step * accumulate : (step + 1) * accumulate])]
        assert sorted(found) == wanted
        assert len(set(found)) == 16


def test_each_epoch_shows_each_image_once():
    seen = list(itertools.chain(*keys(0, 1, total=25, batch=16, size=50)))  # 400 examples: eight epochs of 50
    for epoch in range(8):
        part = seen[epoch * 50 : (epoch + 1) * 50]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(50))
    orders = [tuple(i for _, i in seen[e * 50 : e * 50 + 50]) for e in range(8)]
    assert len(set(orders)) == 8
    assert keys(0, 1, seed=1) != keys(0, 1)


def test_a_later_start_goes_on_where_the_order_was():
    assert keys(1, 2, start=6) == keys(1, 2)[6 * 2 :]


@pytest.mark.parametrize(
    ("wanted", "cores", "ranks", "found"),
    [
        (-1, 2, "", 1),
        (-1, 2, "2", 0),
        (-1, 1, "1", 0),
        (-1, 96, "8", 8),
        (-1, 16, "8", 1),
        (8, 2, "", 8),
        (0, 96, "", 0),
    ],
)
def test_loader_workers_are_no_more_than_there_are_cores_for(wanted, cores, ranks, found, monkeypatch):
    monkeypatch.setattr(data, "cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert loader_workers(wanted) == found
    assert DataConfig().workers == -1


def test_wrong_batch_is_named():
    assert accumulation(768, 24, 8) == 4
    with pytest.raises(ValueError, match=r"--bs 100 is not --micro_batch 24 × 2 ranks"):
        accumulation(100, 24, 2)


def test_small_images_of_a_folder_can_go_without_the_crop(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a/0.png")

    def seen(augment, split):
        views = open_dataset(DataConfig(data_path=str(tmp_path), augment=augment), 32, 0, split)
        return [views[epoch, 0][0] for epoch in range(20)]

    whole = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    kept = [image.equal(whole) for image in seen("flip", "train")]
    mirrored = [image.equal(whole.flip(-1)) for image in seen("flip", "train")]
    assert all(a or b for a, b in zip(kept, mirrored, strict=True))
    assert any(kept)
    assert any(mirrored)
    assert all(image.equal(whole) for image in seen("flip", "val"))
    cropped = [image.equal(whole) or image.equal(whole.flip(-1)) for image in seen("crop", "train")]
    assert sum(cropped) < 15  # one side in six is the image's own


@pytest.mark.parametrize("shape", [(300, 400), (1000, 700), (256, 256), (90, 1500), (40, 50)])
def test_crop_has_the_right_size_and_is_a_function_of_the_seed(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    a, b = (adm_crop(image, 256, random.Random(5)) for _ in range(2))
    assert a.size == (256, 256)
    assert np.array_equal(np.asarray(a), np.asarray(b))
    assert not np.array_equal(np.asarray(a), np.asarray(adm_crop(image, 256, random.Random(6))))
    assert adm_crop(image, 256, None).size == (256, 256)


def test_crop_scale_and_flip():
    ramp = np.tile(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (512, 1, 3))
    image = Image.fromarray(ramp)  # 640 × 512: exactly one box-halving at size 256
    centre = np.asarray(adm_crop(image, 256, None), dtype=float)[:, :, 0]
    # 512 rows → 256, so 640 columns → 320, of which the middle 256 stay: 32/320 … 288/320 of the ramp
    assert centre[128, 0] == pytest.approx(255 * 32.5 / 320, abs=1.5)
    assert centre[128, -1] == pytest.approx(255 * 287.5 / 320, abs=1.5)
    views = [np.asarray(adm_crop(image, 256, random.Random(i)), dtype=float)[128, :, 0] for i in range(200)]
    flipped = sum(v[0] > v[-1] for v in views)
    assert 70 < flipped < 130
    # short side r in 256…291: the crop shows 256/r of the height, so its slope tells r
    spans = [abs(v[-1] - v[0]) / 255 * 1.25 * 256 / 255 for v in views]
    assert min(spans) == pytest.approx(256 / 291, abs=0.01)
    assert max(spans) == pytest.approx(1.0, abs=0.01)


def test_folders_in_the_imagenet_layout(tmp_path):
    for split, name, value in [("train", "b", 200), ("train", "a", 100), ("val", "a", 50), ("val", "b", 60)]:
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("L", (40, 60), value).save(tmp_path / split / name / "x.png")
    config = DataConfig(data_path=str(tmp_path))
    train = open_dataset(config, 32, 0, "train")
    assert train.classes == ["a", "b"]
    image, label = train[0, 0]
    assert label == 0
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image, torch.full((3, 32, 32), 100 / 127.5 - 1))
    assert len(open_dataset(config, 32, 0, "val")) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(), "--data_path is missing"),
        (DataConfig(data_path="/nowhere"), "no directory /nowhere/train"),
        (DataConfig(dataset="cifar10", data_path="/nowhere"), "no CIFAR-10 in /nowhere"),
    ],
)
def test_missing_data_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(config, 32, 0, "train")


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="train"):
        open_dataset(DataConfig(data_path=str(tmp_path)), 32, 0, "train")


def test_damaged_images_and_other_classes_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "train" / name / "x.jpg", quality=95)
    path = tmp_path / "train/b/x.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    config = DataConfig(data_path=str(tmp_path))
    train = open_dataset(config, 32, 0, "train")
    with pytest.raises(ValueError, match=r"cannot use the image .*b/x\.jpg"):
        train[0, 1]
    (tmp_path / "val/b").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "val/b/x.png")
    with pytest.raises(ValueError, match=r"the classes in .*val are not those in .*train"):
        open_dataset(config, 32, 0, "val")


def test_digits():
    assert len(digits(True)) == 1300
    assert len(digits(False)) == 497
    train = open_dataset(DataConfig(dataset="digits"), 32, 0, "train")
    assert torch.equal(train[0, 5][0], train[0, 5][0])
    assert not torch.equal(train[0, 5][0], train[1, 5][0])  # another epoch, another view
    held_out = open_dataset(DataConfig(dataset="digits"), 32, 0, "val")
    assert torch.equal(held_out[0, 5][0], held_out[1, 5][0])
    image, label = train[0, 0]
    assert image.shape == (3, 32, 32)
    assert image.min() >= -1
    assert image.max() <= 1
    assert 0 <= label < 10
    counts = np.bincount([label for _, label in digits(False)])
    assert counts.min() >= 45


def test_batches_follow_the_sampler_with_and_without_workers():
    train = open_dataset(DataConfig(dataset="digits"), 16, 0, "train")
    order = [[(0, 3), (0, 7)], [(1, 3), (0, 9)]]
    plain = list(make_loader(train, order, 0, CPU))
    forked = list(make_loader(train, order, 1, CPU))
    for (a, la), (b, lb) in zip(plain, forked, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert plain[1][0].dtype == torch.uint8
    assert torch.equal(from_bytes(plain[1][0][0]), train[1, 3][0])


def test_codes_of_a_batch(vae, expected):
    schedule = ScaleSchedule((1, 2, 3, 4))
    batch = encode_batch(vae, expected["images"], expected["labels"], schedule)
    assert torch.equal(batch.tokens(schedule), expected["vae.codes"])
    assert torch.equal(batch.tokens(ScaleSchedule((1, 4))), expected["vae.codes"][:, [0, *range(14, 30)]])


def test_supervision_from_resized_images(vae, expected):
    schedule = ScaleSchedule((1, 2, 4))
    batch = encode_batch(vae, expected["images"], expected["labels"], schedule, "image")
    small = expected["images"].view(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert torch.equal(batch.codes[2], vae.codes(vae.encode(small), 2))
    assert torch.equal(batch.codes[4], expected["vae.codes"][:, 14:])
    assert not torch.equal(batch.codes[2], expected["vae.codes"][:, 1:5])


def test_half_of_cifar10_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"no CIFAR-10 in .*or not all of it"):
        check_dataset(DataConfig(dataset="cifar10", data_path=str(tmp_path)))

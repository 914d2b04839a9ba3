"""Hub data sets and ImageNet's tar files are read as folders of the same images are."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from evaluate import main as evaluate
from tests.conftest import ALONE, config_of, tool
from tests.test_trainer import assert_same, weights_of
from train import build
from utils.config.sampling import EvalConfig
from utils.config.training import DataConfig
from utils.data import check, code_cache, imagenet_tar
from utils.data.datasets import make_loader, open_dataset
from utils.data.hub import is_hub, open_named, said
from utils.data.sources import SOURCES
from utils.runtime.image_files import BadImage

CLASSES = ["n01", "n02", "n03"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8))


def encoded(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Twelve training pictures in three classes, and three held out."""
    path = tmp_path_factory.mktemp("data") / "folders"
    for split, n in (("train", 12), ("val", 3)):
        for i in range(n):
            file = path / split / CLASSES[i * 3 // n] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(i + 100 * (split == "val")))
    return path


def rows(n: int, first: int = 0, **more) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES), **more})
    content = {"image": [{"bytes": encoded(first + i), "path": None} for i in range(n)]}
    return datasets.Dataset.from_dict({**content, "label": [i * 3 // n for i in range(n)]}, features)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    """The same as a Hub data set, written by save_to_disk."""
    path = tmp_path_factory.mktemp("data") / "hub"
    datasets.DatasetDict({"train": rows(12), "validation": rows(3, 100)}).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, on_disk) -> Path:
    """The same as parquet files, in the layout that the Hub has them in."""
    path = tmp_path_factory.mktemp("data") / "parquet"
    for split, data in datasets.load_from_disk(str(on_disk)).items():
        data.to_parquet(str(path / f"data/{split}-00000-of-00001.parquet"))
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path, folders) -> Path:
    """The same as ImageNet's tar files; the tars of classes not in their order."""
    path = tmp_path / "tars"
    path.mkdir()
    with tarfile.open(path / imagenet_tar.TRAIN, "w") as outer:
        for name in (CLASSES[1], CLASSES[0], CLASSES[2]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for file in sorted((folders / "train" / name).iterdir()):
                    add(archive, f"{name}_{file.name}", file.read_bytes())
            add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(path / imagenet_tar.VAL, "w") as archive:
        for i in range(3):
            add(archive, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encoded(100 + i))
    return path


def as_folders(folders: Path, split: str) -> list[tuple[torch.Tensor, int]]:
    views = open_dataset(DataConfig(data_path=str(folders)), 16, 0, split)
    return [views[1, i] for i in range(len(views))]


def test_every_value_of_the_flag_is_a_source():
    assert set(get_args(get_type_hints(DataConfig)["dataset"])) == set(SOURCES)


@pytest.mark.parametrize("layout", ["on_disk", "parquet"])
def test_a_hub_data_set_gives_what_folders_give(layout, folders, request):
    config = DataConfig(dataset="hub", data_path=str(request.getfixturevalue(layout)))
    for split in ("train", "val"):
        views = open_dataset(config, 16, 0, split)
        assert views.classes == CLASSES
        for i, (pixels, label) in enumerate(as_folders(folders, split)):
            assert torch.equal(views[1, i][0], pixels)
            assert views[1, i][1] == label
    # Through worker processes, and in any order.
    loaded = next(iter(make_loader(open_dataset(config, 16, 0, "train"), [[(1, 7), (1, 2)]], 2, torch.device("cpu"))))
    wanted = as_folders(folders, "train")
    assert torch.equal(loaded[0] / 127.5 - 1, torch.stack([wanted[7][0], wanted[2][0]]))


def test_columns_are_found_or_named(tmp_path):
    def opened(data: datasets.Dataset, **columns: str):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        data.save_to_disk(tmp_path / "d")
        return open_dataset(DataConfig(dataset="hub", data_path=str(tmp_path / "d"), **columns), 16, 0, "train")

    data = rows(6)
    assert opened(data.rename_columns({"image": "photo", "label": "kind"})).classes == CLASSES  # the only ones
    images = [{"bytes": encoded(i), "path": None} for i in range(6)]
    two = data.add_column("other", images).cast_column("other", datasets.Image())
    assert len(opened(two)) == 6  # one has the usual name
    two = two.rename_column("image", "one")
    with pytest.raises(ValueError, match=r"has several: one, other.*--image_column|several: other, one"):
        opened(two)
    assert len(opened(two, image_column="other")) == 6
    plain = data.remove_columns("label")
    with pytest.raises(ValueError, match="--label_column none for images without classes"):
        opened(plain)
    assert opened(plain, label_column="none").classes == ["all"]
    named = plain.add_column("species", ["wolf", "ant", "ant", "wolf", "cat", "ant"])
    views = opened(named, label_column="species")
    assert (views.classes, [views[0, i][1] for i in range(6)]) == (["ant", "cat", "wolf"], [2, 0, 0, 2, 1, 0])
    numbered = plain.add_column("n", [4, 0, 1, 1, 0, 2])
    assert opened(numbered, label_column="n").classes == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="no column 'klass', only image, label"):
        opened(data, label_column="klass")
    hidden = rows(6).cast_column("label", datasets.Value("int64")).remove_columns("label").add_column("l", [-1] * 6)
    with pytest.raises(ValueError, match="6 images have no label"):
        opened(hidden, label_column="l")
    for labels in (["ant"] * 5 + [None], [1] * 5 + [None]):  # past the first, of text and of numbers
        with pytest.raises(ValueError, match=r"1 images have no label .* in the column 'l'"):
            opened(plain.add_column("l", labels), label_column="l")


def held_out(tmp_path, train: list, val: list, split: str = "validation", **columns: str):
    """The held-out part of a data set whose labels stand in the column `kind`."""
    made = {}
    for name, labels in (("train", train), (split, val)):
        made[name] = rows(len(labels)).remove_columns("label").add_column("kind", labels)
    datasets.DatasetDict(made).save_to_disk(tmp_path / "d")
    return open_dataset(DataConfig(dataset="hub", data_path=str(tmp_path / "d"), **columns), 16, 0, "val")


@pytest.mark.parametrize(
    ("train", "val", "wanted"),
    [
        (["ant", "cat", "wolf"], ["wolf", "cat"], [2, 1]),
        (["wolf", "ant", "cat"], ["ant"], [0]),
        ([0, 1, 2], [1, 0], [1, 0]),
        ([3, 0, 1], [2], [2]),  # no training image has it, but there is such a class
    ],
)
def test_a_held_out_class_is_the_training_one_of_that_name(train, val, wanted, tmp_path):
    views = held_out(tmp_path, train, val, label_column="kind")
    assert [views[0, i][1] for i in range(len(val))] == wanted
    assert len(views.classes) == (4 if train[0] == 3 else 3)


@pytest.mark.parametrize(("train", "val"), [(["ant", "cat"], ["cat", "dog"]), ([0, 1], [0, 5])])
def test_a_held_out_class_that_was_never_trained_is_named(train, val, tmp_path):
    with pytest.raises(ValueError, match=f"classes that no training image has: {val[1]}"):
        held_out(tmp_path, train, val, label_column="kind")


def test_a_test_split_without_labels_is_left_out(tmp_path, capsys):
    assert held_out(tmp_path, [0, 1], [-1, -1], "test", label_column="kind") is None
    assert "the held-out split is left out: " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(ValueError, match="1 images have no label"):
        held_out(tmp_path, [0, 1], [0, -1], "test", label_column="kind")


def test_a_cache_is_of_one_image_column(tmp_path):
    images = [{"bytes": encoded(i + 50), "path": None} for i in range(4)]
    rows(4).add_column("b", images).cast_column("b", datasets.Image()).save_to_disk(tmp_path / "d")
    config = {"dataset": "hub", "data_path": str(tmp_path / "d")}
    a, b = (open_dataset(DataConfig(**config, image_column=c), 16, 0, "train").source for c in ("image", "b"))
    assert a.fingerprint() != b.fingerprint()


def test_a_path_may_hold_an_at_sign(on_disk, tmp_path):
    path = tmp_path / "me@uni/set"
    shutil.copytree(on_disk, path)
    assert len(open_named(str(path))) == 12
    assert len(open_named(f"{path}@validation")) == 3
    assert is_hub(str(path))
    EvalConfig(samples=f"{path}@validation", features="efficientnet_lite0").check_sources()


@pytest.mark.parametrize(
    ("said_by_it", "gated"),
    [
        ("401 Client Error: Unauthorized for url https://x", True),
        ("Client error '403 Forbidden' for url", True),
        ("no data files in /data/run401", False),
    ],
)
def test_only_what_is_gated_is_called_so(said_by_it, gated):
    assert ("log in" in said(ValueError(said_by_it))) == gated


def test_a_bad_row_is_named_and_can_be_skipped(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    images = [{"bytes": b"no picture" if i == 3 else encoded(i), "path": None} for i in range(5)]
    datasets.Dataset.from_dict({"image": images, "label": [0] * 5}, features).save_to_disk(tmp_path / "d")
    config = {"dataset": "hub", "data_path": str(tmp_path / "d")}
    views = open_dataset(DataConfig(**config), 16, 0, "train")
    with pytest.raises(BadImage, match="cannot use the image 3 of"):
        views[0, 3]
    config |= {"on_bad_image": "skip", "bad_image_limit": 0.5}
    views = open_dataset(DataConfig(**config), 16, 0, "train", tmp_path / "run")
    assert views[0, 3][1] == 0
    assert "image 3 of" in (tmp_path / "run/bad_images_train.txt").read_text()
    status, out, _ = tool(check.main, tmp_path / "d")
    assert status == 1
    assert "cannot use the image 3 of" in out


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("Dataset 'x/y' is a gated dataset on the Hub. You must be authenticated to access it.", "hf auth login"),
        ("Couldn't reach 'x/y' on the Hub (ConnectionError)", "save_to_disk"),
    ],
)
def test_a_data_set_that_cannot_be_had_says_what_to_do(message, advice, monkeypatch):
    def fail(name):
        raise ConnectionError(message)

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(ValueError, match="cannot open the Hub data set x/y") as error:
        open_dataset(DataConfig(dataset="hub", data_path="x/y"), 16, 0, "train")
    assert advice in str(error.value)


def run_flags(flags: list[str], *data: str) -> list[str]:
    return [*[f for f in flags if not f.startswith("--dataset")], *data, "--num_classes=3", "--logger_type=none"]


def test_a_killed_run_on_a_hub_data_set_goes_on_as_if_it_had_not_been(flags, on_disk, tmp_path):
    common = run_flags(flags, "--dataset=hub", f"--data_path={on_disk}", "--bs=4", "--vis_num_samples=0")
    for name, stops in (("whole", [5]), ("pieces", [2, 5])):  # five steps of four in twelve images: over an epoch
        for stop in stops:
            build(config_of(common, f"--max_steps={stop}", f"--out_dir={tmp_path / name}"), ALONE).fit()
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces"))


def test_ranks_share_a_hub_data_set_as_they_share_folders(flags, folders, on_disk, tmp_path):
    for rank in range(2):
        keys = []
        for dataset, path in (("folder", folders), ("hub", on_disk)):
            data = run_flags(flags, f"--dataset={dataset}", f"--data_path={path}", "--bs=4", "--micro_batch=2")
            trainer = build(config_of(data, f"--out_dir={tmp_path / dataset}"), ALONE)
            trainer.ranks = type(ALONE)(rank, 2, ALONE.device)
            keys.append([trainer.keys(step, rank) for step in range(6)])
        assert keys[0] == keys[1]


@pytest.mark.parametrize("kind", ["hub", "imagenet_tar"])
def test_a_code_cache_of_each_equals_that_of_folders(kind, folders, on_disk, tars, small_vae_file, tmp_path):
    (tars / imagenet_tar.LIST).write_text("".join(f"ILSVRC2012_val_{i + 1:08d}.JPEG {CLASSES[i]}\n" for i in range(3)))
    places = {"folder": folders, "hub": on_disk, "imagenet_tar": tars}
    found = {}
    for name in ("folder", kind):
        out = tmp_path / name
        more = ["--vae_ckpt", small_vae_file, "--image_size=16", "--crops=2", "--shard_images=5", "--workers=0"]
        tool(code_cache.main, "--dataset", name, "--data_path", places[name], "--out", out, *more, check=True)
        cache = code_cache.CodeCache(out, "train")
        found[name] = [cache[epoch, i] for epoch in range(2) for i in range(len(cache))]
    for (codes, label), (wanted, of) in zip(found[kind], found["folder"], strict=True):
        assert torch.equal(codes, wanted)
        assert label == of


@pytest.mark.parametrize("listed", ["val_classes.txt", "devkit"])
def test_imagenets_tar_files_give_what_folders_give(listed, folders, tars):
    if listed == "devkit":  # numbered otherwise than the classes are, with an inner node among them
        synsets = np.array(
            [(3, "n01", 0), (1, "n02", 0), (2, "n03", 0), (4, "n00", 3)],
            dtype=[("ILSVRC2012_ID", int), ("WNID", "U9"), ("num_children", int)],
        )
        out = io.BytesIO()
        savemat(out, {"synsets": synsets})
        with tarfile.open(tars / imagenet_tar.DEVKIT, "w:gz") as archive:
            add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", out.getvalue())
            truth = b"3\n1\n2\n"
            add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    else:
        lines = [f"ILSVRC2012_val_{i + 1:08d}.JPEG {CLASSES[i]}\n" for i in range(3)]
        (tars / imagenet_tar.LIST).write_text("\ufeff" + "\r\n".join(line.strip() for line in lines))
    config = DataConfig(dataset="imagenet_tar", data_path=str(tars))
    for split in ("train", "val"):
        views = open_dataset(config, 16, 0, split)
        assert views.classes == CLASSES
        pairs = as_folders(folders, split)
        assert len(views) == len(pairs)
        assert all(torch.equal(views[1, i][0], x) and views[1, i][1] == y for i, (x, y) in enumerate(pairs))
    assert (tars / f"{imagenet_tar.TRAIN}.index.npz").is_file()


def test_the_index_is_made_once_and_again_when_the_tar_changes(tars, monkeypatch, tmp_path):
    config = DataConfig(dataset="imagenet_tar", data_path=str(tars))
    assert len(open_dataset(config, 16, 0, "train")) == 12
    with monkeypatch.context() as patched:
        patched.setattr(imagenet_tar, "members", None)
        assert len(open_dataset(config, 16, 0, "train")) == 12
        assert open_dataset(config, 16, 0, "val") is None  # nobody says its classes
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add(archive, "n04_0.png", encoded(50))
    with tarfile.open(tars / imagenet_tar.TRAIN, "a") as outer:
        add(outer, "n04.tar", inner.getvalue())
    views = open_dataset(config, 16, 0, "train")
    assert (len(views), views.classes) == (13, [*CLASSES, "n04"])
    index = tars / f"{imagenet_tar.TRAIN}.index.npz"
    index.unlink()
    index.mkdir()  # a place that cannot be written to
    monkeypatch.setattr(imagenet_tar, "CACHE", tmp_path / "cache")
    assert len(open_dataset(config, 16, 0, "train")) == 13
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1


@pytest.mark.parametrize("line", ["a.JPEG,n01", "a.JPEG", "a.JPEG n01 n02"])
def test_a_list_of_other_lines_is_named(line, tars):
    (tars / imagenet_tar.LIST).write_text(f"b.JPEG n01\n{line}\n")
    with pytest.raises(ValueError, match="line 2: lines are of a file and its class"):
        open_dataset(DataConfig(dataset="imagenet_tar", data_path=str(tars)), 16, 0, "val")


def test_a_cut_tar_is_named(tars):
    path = tars / imagenet_tar.TRAIN
    config = DataConfig(dataset="imagenet_tar", data_path=str(tars))
    views = open_dataset(config, 16, 0, "train")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match=r"the file ends within it|cannot use the image"):
        views[0, len(views) - 1]
    with pytest.raises(ValueError, match="no whole tar file"):
        open_dataset(config, 16, 0, "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"no .*ILSVRC2012_img_train\.tar"):
        open_dataset(config, 16, 0, "train")


def test_evaluation_reads_a_hub_data_set(on_disk, folders, tmp_path):
    for name, samples in (("hub", on_disk), ("folder", folders / "train")):
        more = ["--features=efficientnet_lite0", "--image_size=16", f"--reference={folders / 'train'}"]
        status, out, said = tool(evaluate, f"--samples={samples}", *more, f"--out_dir={tmp_path / name}")
        assert status == 0, out + said
    found, wanted = ((tmp_path / name / "report.json").read_text() for name in ("hub", "folder"))
    assert '"images": 12' in found or "12" in found
    assert wanted

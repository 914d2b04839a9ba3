from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.backbones import fold_batch_norms
from tests.conftest import ALONE, tool
from utils.evaluations.c2i import features as module
from utils.evaluations.c2i import reference
from utils.evaluations.c2i.features import Inception, make_extractor
from utils.evaluations.c2i.setup import main as set_up


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """torch-fidelity's network with random weights, and the file of them."""
    torch.manual_seed(0)

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    net = Blank("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), path)
    return net, path


def test_pool_and_probabilities_are_torch_fidelitys_and_the_tap_is_where_it_should_be(plain):
    net, path = plain
    images = torch.randint(256, (3, 3, 40, 48), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    ours = Inception(path)
    found = ours(images)
    seen = {}
    net.Mixed_6d.branch1x1.conv.register_forward_hook(lambda _, x, y: seen.update(raw=y))
    pool, logits = net(images)
    assert torch.equal(found.pool, pool)
    assert torch.allclose(ours.probabilities(pool), logits.softmax(1), atol=1e-6)
    norm = net.Mixed_6d.branch1x1.bn
    mapped = F.relu(F.batch_norm(seen["raw"], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.001))
    assert found.spatial.shape == (3, 2023)
    for c, y, x in [(0, 0, 0), (6, 3, 11), (4, 16, 16)]:  # H, W, C order
        assert torch.allclose(found.spatial[:, (y * 17 + x) * 7 + c], mapped[:, c, y, x], atol=1e-6)
    assert (found.spatial >= 0).all()
    assert found.spatial.max() > 0


def test_features_do_not_depend_on_the_batch(plain):
    ours = Inception(plain[1])
    images = torch.randint(256, (4, 3, 32, 32)).to(torch.uint8)
    together, alone = ours(images), ours(images[2:3])
    assert torch.allclose(together.pool[2], alone.pool[0], rtol=1e-5, atol=1e-6)


def test_wrong_weights_are_named_and_nothing_is_executed(plain, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "cut.pth").write_bytes(plain[1].read_bytes()[:1000])
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, message in [
        ("bomb.pth", "bomb.pth is missing, damaged or not"),
        ("cut.pth", "cut.pth"),
        ("other.pth", "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            Inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_offline_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(module.torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"--inception_weights PATH, or use --features efficientnet_lite0"):
        make_extractor("inception", "", torch.device("cpu"))


def test_the_download_is_checked_by_its_digest(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        module.torch.hub, "load_state_dict_from_url", lambda url, **options: asked.update(options, url=url)
    )
    module.fetch("https://example.org/weights-inception-2015-12-05-6726825d.pth", "Inception", "give a path")
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True


@pytest.mark.parametrize(("number", "tapped"), [(0, 14), (2, 17)])
def test_efficientnet_knows_what_it_sees(number, tapped):
    """Real ImageNet weights: a flat sky-blue picture and a chessboard are told apart, with a class each."""
    extractor = make_extractor(f"efficientnet_lite{number}", "", torch.device("cpu"))
    sky = torch.zeros(3, 64, 64)
    sky[2] = 235
    sky[1] = 150
    sky[0] = 90
    board = ((torch.arange(64)[:, None] // 8 + torch.arange(64)[None] // 8) % 2 * 255).float().expand(3, -1, -1)
    found = extractor(torch.stack([sky, board]).to(torch.uint8))
    assert found.pool.shape == (2, 1280)
    assert found.spatial.shape == (2, tapped * tapped * 7)
    p = extractor.probabilities(found.pool)
    assert torch.allclose(p.sum(1), torch.ones(2), atol=1e-5)
    assert p.argmax(1)[0] != p.argmax(1)[1]
    assert extractor.name == f"efficientnet_lite{number}"


def batch_file(path, **more):
    """A small file like ImageNet's reference batch."""
    sizes = {"mu": (5,), "sigma": (5, 5), "mu_s": (3,), "sigma_s": (3, 3)}
    arrays = {name: np.zeros(shape) for name, shape in sizes.items()}
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8), **{**arrays, **more})
    return path


def test_what_evaluation_downloads_can_be_checked_ahead(plain, tmp_path):
    files = ["--inception_weights", plain[1], "--reference", batch_file(tmp_path / "batch.npz")]
    status, out, _ = tool(set_up, *files)
    assert status == 0
    assert "Inception: 23.9 M parameters" in out
    assert "reference: 2 images of 8×8, statistics of 5, 3" in out
    broken = bytearray((tmp_path / "batch.npz").read_bytes())
    broken[400] ^= 1  # within arr_0
    (tmp_path / "broken.npz").write_bytes(broken)
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    for name, said in (("broken", "damaged at arr_0.npy"), ("other", "is no reference batch"), ("none", "no file")):
        status, out, err = tool(set_up, *files[:2], "--reference", tmp_path / f"{name}.npz")
        assert (status, said in err) == (1, True), err
        assert "Inception" in out  # the other one is checked all the same


def test_offline_both_are_named_with_what_to_do(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise URLError("no net")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(reference, "HERE", tmp_path)
    status, _, err = tool(set_up)
    assert status == 1
    (line,) = err.strip().splitlines()
    assert "weights-inception-2015-12-05-6726825d.pth" in line
    assert f"no {tmp_path / 'VIRTUAL_imagenet256_labeled.npz'}" in line
    assert "fetch it elsewhere" in line


BATCHES = {"imagenet256": "256/VIRTUAL_imagenet256_labeled.npz", "imagenet512": "512/VIRTUAL_imagenet512.npz"}


@pytest.mark.parametrize(("name", "file"), BATCHES.items())
def test_references_by_name_are_fetched_once(name, file, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(reference, "HERE", tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: asked.append(url) or Path(path).touch())
    for _ in range(2):
        found = reference.fetch_batch(name, ALONE)
    assert found == tmp_path / Path(file).name
    assert [url.endswith(f"/imagenet/{file}") for url in asked] == [True]


def test_batch_norms_fold_into_the_convolutions_before_them():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    )
    net(torch.randn(8, 3, 9, 9) * 3 + 1)  # statistics of its own
    images = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        wanted = net.eval()(images)
        found = fold_batch_norms(net)(images)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    assert (found - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 stands behind no convolution"):
        fold_batch_norms(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3)))

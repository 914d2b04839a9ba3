import warnings

import pytest
import torch

from utils.evaluations.c2i import features
from utils.tokenizer.perceptual import EfficientNetDistance, make_perceptual

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_efficientnet_distance_grows_with_the_damage_and_pulls_images_together():
    distance = make_perceptual("efficientnet_lite0", "")
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
    found = [distance(IMAGES + amount * noise, IMAGES).item() for amount in (0, 0.05, 0.5)]
    assert found[0] == 0 < found[1] < found[2]
    made = (IMAGES + 0.2 * noise).requires_grad_()
    before = distance(made, IMAGES)
    step = torch.autograd.grad(before, made)[0]
    assert distance(made - 1e-2 * step / step.abs().max(), IMAGES) < before
    assert not any(p.requires_grad for p in distance.parameters())


def test_it_stays_in_evaluation_mode():
    distance = EfficientNetDistance()
    distance.train()
    assert not any(module.training for module in distance.modules())
    distance(IMAGES[:, :, :16, :16], IMAGES[:, :, :16, :16])  # the smallest it takes


def test_lpips_takes_torchvisions_weights_from_a_file(tmp_path, monkeypatch):
    """Equal to the package's own network whose layers were replaced by hand; what does not fit is named."""
    import lpips
    from torchvision.models import vgg16

    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda x, **options: x.data.normal_(0, 0.03))
    monkeypatch.setattr(torch.nn.init, "normal_", lambda x, *options: x)  # of the classifier, which nobody reads
    layers = vgg16(weights=None).features
    state = {f"features.{name}": x for name, x in layers.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    torch.save({"features.0.weight": state["features.0.weight"]}, tmp_path / "half.pth")
    with torch.no_grad():
        found = make_perceptual("lpips", str(tmp_path / "vgg.pth"))(IMAGES, IMAGES.flip(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
        for name, layer in own.net.named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.load_state_dict(layers[int(name.rpartition(".")[2])].state_dict())
        assert found.item() == pytest.approx(own(IMAGES, IMAGES.flip(0)).mean().item(), rel=1e-5)
        assert found > 0
    with pytest.raises(ValueError, match=r"half.pth does not fit this model:\n  missing: slice1.0.bias"):
        make_perceptual("lpips", str(tmp_path / "half.pth"))


def test_lpips_says_where_its_weights_can_come_from(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(features.torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"VGG weights from .*: give --perceptual_weights PATH"):
        make_perceptual("lpips", "")

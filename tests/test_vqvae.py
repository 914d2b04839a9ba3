import copy

import pytest
import torch

from models.vqvae import VQVAE, Quantizer, VQVAEConfig
from tests.conftest import ALONE, config_of, manifest, worst
from train import build


def test_latent_codes_and_reconstruction_equal_the_released_ones(vae, expected):
    latent = vae.encode(expected["images"])
    assert worst(latent, expected["vae.latent"]) < 1e-5
    codes = torch.cat([vae.codes(latent, s) for s in (1, 2, 3, 4)], dim=1)
    assert torch.equal(codes, expected["vae.codes"])
    assert worst(vae.decode(codes[:, -16:], 4), expected["vae.reconstruction"]) < 2e-5


def test_full_size_keys_and_shapes_are_those_of_the_released_file():
    with torch.device("meta"):
        own = {name: list(t.shape) for name, t in VQVAE().state_dict().items()}
    assert own == manifest()["FlexVAE.pth"]["tensors"]
    assert VQVAEConfig().factor == 16


def test_nearest_row_by_the_obvious_loop():
    torch.manual_seed(0)
    quantizer = Quantizer(VQVAEConfig(codebook_size=50, codebook_dim=4))
    torch.nn.init.normal_(quantizer.embedding.weight)
    with torch.no_grad():
        quantizer.embedding.weight[20] = quantizer.embedding.weight[7] * 3  # the same direction: a tie
    rows = torch.stack([r / r.norm() for r in quantizer.embedding.weight])
    z = torch.nn.functional.normalize(torch.cat([torch.randn(30, 4), rows[7:8]]), dim=-1)
    wanted = [min(range(50), key=lambda i: ((v - rows[i]) ** 2).sum().item()) for v in z]
    assert quantizer.nearest(z)[:-1].tolist() == wanted[:-1]
    assert quantizer.nearest(z[-1:]).item() in (7, 20)
    assert torch.allclose(quantizer.rows().norm(dim=-1), torch.ones(50))


def test_autocast_does_not_change_codes(vae, expected):
    latent = vae.encode(expected["images"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.codes(latent, 4), expected["vae.codes"][:, 14:])


def test_wrong_image_side_is_named(vae):
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("asked", [False, True])
def test_images_are_encoded_in_tf32_only_when_asked(asked, vae, expected, schedule, flags, monkeypatch):
    seen, encode = [], VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or encode(*args))
    trainer = build(config_of(flags, *(["--encode_tf32"] if asked else [])), ALONE)
    trainer.micro_loss(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))
    assert seen == [asked]


@pytest.mark.parametrize("supervision", ["latent", "image"])
def test_codes_do_not_depend_on_who_asks(vae, expected, schedule, supervision):
    """In half precision or not, training or not, with gradients or without: codes are the frozen tokenizer's own."""
    wanted = vae.tokenize(expected["images"], schedule.sides, supervision)
    caller = copy.deepcopy(vae).requires_grad_().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = caller.tokenize(expected["images"], schedule.sides, supervision)
    assert all(torch.equal(found[s], wanted[s]) for s in schedule.sides)
    if supervision == "latent":
        assert torch.equal(torch.cat(list(wanted.values()), 1), expected["vae.codes"])
        with torch.autocast("cpu", torch.bfloat16):  # what the caller's precision would make of it
            assert worst(vae.encode(expected["images"]).float(), expected["vae.latent"]) > 1e-3

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ALONE
from train_tokenizer import MultiScaleLoss, build
from utils.config import TokenizerTrainConfig
from utils.flags import parse
from utils.weights import load_tokenizer

SMALL = [
    "--dataset=digits", "--workers=0", "--image_size=16", "--base_width=32", "--width_mult", "1", "1", "1",
    "--res_blocks=1", "--z_channels=32", "--codebook_size=32", "--codebook_dim=8", "--pn=1_2_4", "--bs=8",
    "--lr=2e-3", "--log_every=5", "--eval_images=16", "--vis_num_samples=4",
]  # fmt: skip


def config_of(*more):
    return parse(TokenizerTrainConfig, [*SMALL, *more])


def test_loss_at_one_scale_by_the_obvious_formula(tmp_path):
    torch.manual_seed(0)
    vae = build(config_of(f"--out_dir={tmp_path}"), ALONE).model
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = MultiScaleLoss(vae, 0.25)(images, [2])
    z = F.normalize(F.interpolate(vae.encode(images), 2, mode="area"), dim=1)  # (3, D, 2, 2)
    rows = vae.codebook[torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 8), vae.codebook).argmin(1)]
    rows = rows.view(3, 2, 2, 8).permute(0, 3, 1, 2)
    pixel = (vae.decoder(vae.post_quant_conv(rows)) - F.interpolate(images, 8, mode="area")).square().mean()
    gap = (rows - z).square().mean()
    assert found["pixel"].item() == pytest.approx(pixel.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((pixel + 1.25 * gap).item(), rel=1e-5)


def test_gradients_reach_encoder_decoder_and_codebook(tmp_path):
    vae = build(config_of(f"--out_dir={tmp_path}"), ALONE).model
    MultiScaleLoss(vae, 0.25)(torch.rand(2, 3, 16, 16), [1, 4])["pixel"].backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0  # straight through the quantiser
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    assert vae.quantize.embedding.weight.grad is None
    MultiScaleLoss(vae, 0.25)(torch.rand(2, 3, 16, 16), [1, 4])["codebook"].backward()
    assert vae.quantize.embedding.weight.grad.abs().sum() > 0


def test_a_run_learns_and_loads_as_a_tokenizer(tmp_path):
    trainer = build(config_of("--max_steps=25", f"--out_dir={tmp_path}"), ALONE)
    before = trainer.held_out()
    trainer.fit()
    after = trainer.held_out()
    assert after["loss"] == after["mse_side/4"] < before["mse_side/4"]
    loaded = load_tokenizer(tmp_path)
    assert loaded.config == trainer.model.config
    assert torch.equal(loaded.codebook, trainer.model.codebook)
    assert (tmp_path / "samples/step_0000025.png").exists()


def test_sides_of_a_step_end_with_the_finest(tmp_path):
    trainer = build(config_of("--sides_per_step=1", f"--out_dir={tmp_path}"), ALONE)
    drawn = []
    for trainer.step in range(20):
        drawn.append(tuple(trainer.sides()))
    assert set(drawn) == {(1, 4), (2, 4)}


def test_wrong_sizes_are_named(tmp_path):
    with pytest.raises(ValueError, match="--pn ends at 4, but 32 pixels make 8 latents a side"):
        build(config_of("--image_size=32", f"--out_dir={tmp_path}"), ALONE)

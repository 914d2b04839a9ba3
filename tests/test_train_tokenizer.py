import copy

import pytest
import torch

from models.weights import load_tokenizer
from tests.conftest import ALONE, tool_on_ranks
from train_tokenizer import build, check, main
from utils.config.tokenizer import TokenizerTrainConfig
from utils.runtime.checkpoint import checkpoints, read_checkpoint
from utils.runtime.files import save_tensors
from utils.runtime.flags import parse
from utils.training.log import read_metrics

SMALL = [
    "--dataset=digits", "--workers=0", "--image_size=16", "--base_width=32", "--width_mult", "1", "1", "1",
    "--res_blocks=1", "--z_channels=32", "--codebook_size=32", "--codebook_dim=8", "--pn=1_2_4", "--bs=8",
    "--lr=2e-3", "--log_every=5", "--eval_images=16", "--vis_num_samples=4", "--logger_type=none",
]  # fmt: skip
# All that a run can keep: a discriminator that begins on the way, windows of counts, a moving average.
EVERYTHING = [
    "--disc_weight=0.1", "--disc_start=2", "--disc_width=16", "--disc_layers=1", "--perceptual=efficientnet_lite0",
    "--usage_every=4", "--ema=0.9", "--max_steps=8", "--save_every_steps=5", "--log_every=1", "--codebook_size=64",
]  # fmt: skip


def config_of(*more):
    return parse(TokenizerTrainConfig, [*SMALL, *more])


def test_a_run_learns_and_loads_as_a_tokenizer(tmp_path):
    trainer = build(config_of("--max_steps=25", f"--out_dir={tmp_path}"), ALONE)
    before = trainer.validate()
    trainer.fit()
    after = trainer.validate()
    assert after["loss"] == after["mse_side/4"] < before["mse_side/4"]
    assert 0 < after["usage_side/1"] <= after["usage_side/4"] <= 1
    assert 1 <= after["perplexity_side/4"] <= 32
    loaded = load_tokenizer(tmp_path)
    assert loaded.config == trainer.model.config
    assert torch.equal(loaded.codebook, trainer.model.codebook)
    assert (tmp_path / "samples/step_0000025.png").exists()


def test_held_out_usage_is_of_all_images_together(tmp_path):
    trainer = build(config_of(f"--out_dir={tmp_path}", "--micro_batch=4"), ALONE)
    found = trainer.validate()
    images = torch.stack([trainer.val_set[0, i * len(trainer.val_set) // 16][0] for i in range(16)])
    with torch.no_grad():
        chosen = trainer.model.codes(trainer.model.encode(images), 4).unique()
    assert found["usage_side/4"] == pytest.approx(len(chosen) / 32)


def test_sides_of_a_step_end_with_the_finest(tmp_path):
    trainer = build(config_of("--sides_per_step=1", f"--out_dir={tmp_path}"), ALONE)
    drawn = []
    for trainer.step in range(20):
        drawn.append(tuple(trainer.sides()))
    assert set(drawn) == {(1, 4), (2, 4)}


def test_a_resumed_run_with_a_discriminator_is_identical(tmp_path):
    """Stopped after the discriminator began, within a window of counts: weights, moments, counts and log lines."""
    whole = build(config_of(*EVERYTHING, f"--out_dir={tmp_path / 'whole'}"), ALONE)
    whole.fit()
    stopped = build(config_of(*EVERYTHING, f"--out_dir={tmp_path / 'run'}"), ALONE)
    batches = iter(stopped.loader())
    for _ in range(5):
        stopped.train_step(batches)
    stopped.save()
    stopped.checkpoints.finish()
    again = build(config_of(*EVERYTHING, f"--out_dir={tmp_path / 'run'}"), ALONE)
    assert again.step == 5
    assert again.use.counts.sum() > 0
    again.fit()
    (state, weights), (wanted_state, wanted) = (
        read_checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("run", "whole")
    )
    assert set(weights) == {f"{n}.safetensors" for n in ("model", "ema", "discriminator", "codebook_use")}
    for name, tensors in wanted.items():
        assert all(torch.equal(weights[name][key], x) for key, x in tensors.items()), name
    moments = zip(state.optimizer["state"].values(), wanted_state.optimizer["state"].values(), strict=True)
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in moments)
    name = "train/usage_side/4"
    assert read_metrics(tmp_path / "run", name)[1] == read_metrics(tmp_path / "whole", name)[1]


def test_every_loss_runs_in_half_precision(tmp_path):
    """A step of all terms changes weights (one that is not finite would be dropped), and its parts are near fp32's."""
    found = {}
    for precision in ("fp32", "bf16"):
        flags = [*EVERYTHING, "--entropy=0.1", "--disc_start=0", "--max_steps=1", f"--precision={precision}"]
        trainer = build(config_of(*flags, f"--out_dir={tmp_path / precision}"), ALONE)
        before = trainer.model.encoder.conv_in.weight.clone()
        trainer.train_step(iter(trainer.loader()))
        assert not torch.equal(before, trainer.model.encoder.conv_in.weight)
        found[precision] = {name: total for name, (total, _) in trainer.meter.state().items()}
    for name in ("l2", "codebook", "perceptual", "entropy", "loss_disc"):
        assert found["bf16"][name] == pytest.approx(found["fp32"][name], rel=0.1), name


def test_the_discriminator_waits_for_its_start(tmp_path):
    trainer = build(config_of(*EVERYTHING, f"--out_dir={tmp_path}"), ALONE)
    fresh = copy.deepcopy(trainer.auxiliary["discriminator"].state_dict())
    batches = iter(trainer.loader())
    for _ in range(2):
        trainer.train_step(batches)
    assert all(torch.equal(x, fresh[name]) for name, x in trainer.auxiliary["discriminator"].state_dict().items())
    trainer.train_step(batches)
    assert not any(
        torch.equal(x, fresh[name])
        for name, x in trainer.auxiliary["discriminator"].state_dict().items()
        if name.endswith("weight")
    )


def test_unused_rows_are_revived_where_latents_are(tmp_path):
    """At a window's end, rows that no side chose in it become vectors of that step; the others only learn."""
    flags = ["--usage_every=3", "--codebook_size=256", "--ema=0.5", "--lr=0", f"--out_dir={tmp_path}"]
    trainer = build(config_of(*flags), ALONE)
    before, batches = trainer.model.quantize.embedding.weight.detach().clone(), iter(trainer.loader())
    for _ in range(2):
        trainer.train_step(batches)
    assert torch.equal(trainer.model.quantize.embedding.weight, before)
    chosen = trainer.use.counts.sum(0) > 0
    trainer.train_step(batches)
    after = trainer.model.quantize.embedding.weight.detach()
    kept = (after == before).all(1)
    assert kept[chosen].all()
    assert not kept.all()
    assert torch.allclose(after[~kept].norm(dim=1), torch.ones((~kept).sum()), atol=1e-5)
    assert torch.equal(trainer.ema_model.quantize.embedding.weight[~kept], after[~kept])
    assert trainer.use.counts.sum() == 0
    assert trainer.meter.state()["revived"] == [float((~kept).sum()), 1.0]


def test_a_dropped_step_revives_nothing(tmp_path):
    trainer = build(config_of("--usage_every=1", "--codebook_size=256", f"--out_dir={tmp_path}"), ALONE)
    before = trainer.model.quantize.embedding.weight.detach().clone()
    trainer.offers.append(torch.ones(256, 8))
    trainer.on_step_end(torch.tensor(1.0))
    assert torch.equal(trainer.model.quantize.embedding.weight, before)
    trainer.offers.append(torch.ones(256, 8))
    trainer.on_step_end(torch.tensor(0.0))
    assert not torch.equal(trainer.model.quantize.embedding.weight, before)


def test_two_ranks_train_as_one(tmp_path):
    """Equal micro-batches: the same weights, discriminator, counts and revived rows."""
    flags = [*SMALL, *EVERYTHING, "--micro_batch=4", "--max_steps=5", "--lr=1e-4"]
    tool_on_ranks(2, main, *flags, f"--out_dir={tmp_path / 'two'}")
    build(config_of(*flags[len(SMALL) :], f"--out_dir={tmp_path / 'one'}"), ALONE).fit()
    (_, two), (_, one) = (read_checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("two", "one"))
    for name, tensors in one.items():
        for key, x in tensors.items():
            assert torch.allclose(two[name][key].double(), x.double(), atol=1e-5), (name, key)
    for name in ("val/loss", "train/loss", "train/loss_disc", "train/revived", "train/usage_side/4"):
        assert read_metrics(tmp_path / "two", name)[1] == pytest.approx(
            read_metrics(tmp_path / "one", name)[1], rel=1e-3
        )


def test_it_starts_from_weights(tmp_path):
    first = build(config_of(f"--out_dir={tmp_path / 'a'}", "--seed=5"), ALONE)
    save_tensors(tmp_path / "vae.safetensors", first.model.state_dict())
    init = f"--init_ckpt={tmp_path / 'vae.safetensors'}"
    second = build(config_of(init, f"--out_dir={tmp_path / 'b'}"), ALONE)
    assert all(torch.equal(x, second.model.state_dict()[n]) for n, x in first.model.state_dict().items())
    with pytest.raises(ValueError, match=r"quantize.embedding.weight \(32, 8\) in the file, \(64, 8\) here"):
        build(config_of(init, "--codebook_size=64", f"--out_dir={tmp_path / 'c'}"), ALONE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size=32"], "--pn ends at 4, but 32 pixels make 8 latents a side"),
        (["--disc_weight=1", "--disc_layers=3"], "--disc_layers 3 needs images of 24 pixels"),
        (["--image_size=8", "--pn=1_2", "--perceptual=efficientnet_lite0"], "efficientnet_lite0 needs images of 16"),
    ],
)
def test_wrong_sizes_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(config_of(*flags, f"--out_dir={tmp_path}"), ALONE)


def test_pictures_that_equivariance_makes_smaller_are_large_enough_for_the_losses(tmp_path):
    flags = [flag for flag in SMALL if not flag.startswith("--codebook")]
    flags += ["--quantiser=none", "--equivariant", "--perceptual=efficientnet_lite0", f"--out_dir={tmp_path}"]
    with pytest.raises(ValueError, match="needs images of 16 pixels, with --equivariant four times as large"):
        build(parse(TokenizerTrainConfig, flags), ALONE)


def test_a_discriminator_cannot_come_or_go_on_the_way(tmp_path):
    flags = ["--max_steps=1", f"--out_dir={tmp_path}", "--vis_num_samples=0", "--eval_images=0"]
    build(config_of(*flags), ALONE).fit()
    more = ["--disc_weight=1", "--disc_width=16", "--disc_layers=1"]
    with pytest.raises(ValueError, match=r"discriminator none → 16 wide, 1 layers"):
        build(config_of(*flags, *more), ALONE)
    with pytest.raises(ValueError, match=r"lacks discriminator.safetensors, unlike this run"):
        build(config_of(*flags, *more, "--allow_change=true"), ALONE)
    flags[1] += "2"
    build(config_of(*flags, *more), ALONE).fit()
    with pytest.raises(ValueError, match=r"has discriminator.safetensors, unlike this run"):
        build(config_of(*flags, "--allow_change=true"), ALONE)


def test_the_check_looks_at_files_and_networks(tmp_path):
    check(config_of())
    with pytest.raises(ValueError, match="no weight file"):
        check(config_of(f"--init_ckpt={tmp_path / 'none.pth'}"))
    with pytest.raises(ValueError, match=r"none\.pth"):
        check(config_of("--perceptual=lpips", f"--perceptual_weights={tmp_path / 'none.pth'}"))


RESIDUAL = ["--quantiser=residual", *(f for f in SMALL if not f.startswith("--z_channels"))]


def test_a_residual_tokenizer_of_few_scales_trains_on_two_ranks(tmp_path):
    """They use three of the four φ: DDP waits for the gradient of each that asks for one."""
    tool_on_ranks(2, main, *RESIDUAL, "--max_steps=3", f"--out_dir={tmp_path}")
    assert len(checkpoints(tmp_path)) == 1


def test_a_residual_tokenizer_learns_all_its_scales(tmp_path):
    """With VAR's loss: see tests/test_parity.py for its value and gradients."""
    config = parse(TokenizerTrainConfig, [*RESIDUAL, "--max_steps=40", "--usage_every=10", f"--out_dir={tmp_path}"])
    trainer = build(config, ALONE)
    assert trainer.sides() == [1, 2, 4]
    before = trainer.validate()
    trainer.fit()
    after = trainer.validate()
    assert after["loss"] == after["mse_side/4"] < 0.7 * before["mse_side/4"]
    assert after["mse_side/4"] < after["mse_side/1"]  # each scale adds to the same picture
    loaded = load_tokenizer(tmp_path)
    assert loaded.config == trainer.model.config
    assert (loaded.config.z_channels, loaded.config.counted_scales) == (8, 10)
    assert (tmp_path / "samples/step_0000040.png").exists()


def test_the_residual_loss_reaches_every_part(tmp_path):
    trainer = build(parse(TokenizerTrainConfig, [*RESIDUAL, f"--out_dir={tmp_path}"]), ALONE)
    images, labels = next(iter(trainer.loader()))
    trainer.micro_loss(images, labels)[0].backward()
    still = [name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()]
    # Three scales use the first, the third and the last φ.
    assert still == [f"quantize.quant_resi.qresi_ls.1.{name}" for name in ("weight", "bias")]


@pytest.mark.parametrize("flag", ["--z_channels=16", "--sides_per_step=1", "--entropy=0.1"])
def test_flags_that_a_residual_tokenizer_does_not_read_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(TokenizerTrainConfig, [*RESIDUAL, flag])
    assert flag.split("=")[0] in capsys.readouterr().err

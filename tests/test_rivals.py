"""Rivals of SAR: by their definitions; at their zero setting teacher forcing or SAR, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from models.scales import ScaleSchedule, shift_all
from noisy_context import NoisyContext
from tests.conftest import ALONE, config_of, worst
from tests.test_sar_trainer import batch_of
from tests.test_trainer import assert_same, weights_of
from train import build
from utils.data.datasets import open_dataset

NOISY = "--training_mode=noisy"


@pytest.fixture
def noisy(flags, vae, model):
    """A noisy trainer around the reference models."""

    def make(*more):
        config = config_of(flags, "--pn=1_2_3_4", NOISY, *more)
        trainer = NoisyContext(config, model, vae, open_dataset(config.data, 64, 0, "train"), None, ALONE)
        model.eval()
        return trainer

    return make


def trained(flags, directory, *more):
    build(config_of(flags, "--logger_type=none", f"--out_dir={directory}", *more), ALONE).fit()
    return weights_of(directory)


@pytest.mark.parametrize(
    ("zero", "wanted"),
    [
        ([NOISY, "--noise_max=0"], ["--training_mode=teacher_forcing"]),
        (["--ssr_share=1"], []),
        (["--scale_weights=tokens", "--training_mode=teacher_forcing"], ["--training_mode=teacher_forcing"]),
    ],
    ids=["noise", "share", "weights"],
)
def test_the_zero_setting_is_what_it_rivals(zero, wanted, flags, tmp_path):
    assert_same(trained(flags, tmp_path / "a", *zero), trained(flags, tmp_path / "b", *wanted))


@pytest.mark.parametrize(
    "more", [[NOISY], [NOISY, "--noise=neighbour", "--noise_per=image", "--noise_max=1"], ["--ssr_share=0.5"]]
)
def test_draws_are_of_seed_and_step_and_a_resumed_run_goes_on(more, flags, tmp_path):
    whole = trained(flags, tmp_path / "whole", *more)
    trained(flags, tmp_path / "pieces", *more, "--max_steps=2")
    assert_same(trained(flags, tmp_path / "pieces", *more), whole)
    other = trained(flags, tmp_path / "tf", "--training_mode=teacher_forcing")
    assert any(not torch.equal(other[name], whole[name]) for name in whole)


def test_context_is_corrupted_and_targets_are_true(noisy, model, vae, expected, schedule):
    trainer, batch = noisy("--noise_max=1"), batch_of(expected, schedule)
    truth = batch.tokens(schedule)
    torch.manual_seed(3)
    loss, metrics = trainer.compute_loss(batch, schedule)
    torch.manual_seed(3)
    fed = trainer.corrupt(truth, schedule)
    assert metrics["corrupted"] == (fed != truth).float().mean() > 0.2
    logits = model(batch.labels, shift_all(fed, vae.codebook, schedule), schedule)
    assert worst(loss, F.cross_entropy(logits.flatten(0, 1), truth.flatten())) < 1e-5
    # Of the corrupted tokens only what they feed depends: the first scale's logits are those of the truth.
    plain = model(batch.labels, shift_all(truth, vae.codebook, schedule), schedule)
    assert worst(logits[:, :1], plain[:, :1]) < 1e-6
    assert not torch.allclose(logits[:, 1:], plain[:, 1:], atol=1e-3)


def test_shares_per_scale_have_four_levels_and_per_image_fall(noisy, expected):
    levels = noisy().shares(2000, 4)
    assert {round(x, 6) for x in levels.flatten().tolist()} == {0.0, 0.1, 0.2, 0.3}
    assert all(abs((levels == x).float().mean() - 0.25) < 0.02 for x in levels.unique())
    falling = noisy("--noise_per=image", "--noise_max=0.8", "--max_steps=0", "--steps=100")
    for falling.step, most in ((0, 0.8), (30, 0.48), (75, 0.0), (99, 0.0)):
        shares = falling.shares(4000, 3)
        assert torch.equal(shares[:, 0], shares[:, 2])
        assert shares.max() == pytest.approx(most, abs=0.01)
        assert shares.mean() == pytest.approx(most / 2, abs=0.02)


@pytest.mark.parametrize("kind", ["uniform", "neighbour"])
def test_replaced_tokens_are_as_many_and_as_near_as_asked(kind, noisy, vae):
    trainer = noisy(f"--noise={kind}", "--noise_max=0.6", *(["--noise_neighbours=3"] if kind == "neighbour" else []))
    trainer.shares = lambda batch, scales: torch.full((batch, scales), 0.4)
    long, truth = ScaleSchedule((1, 20, 30)), torch.randint(128, (8, 1301))
    fed = trainer.corrupt(truth, long)
    changed = (fed != truth).float().mean().item()
    assert changed == pytest.approx(0.4 * (127 / 128 if kind == "uniform" else 1), abs=0.02)
    rows = vae.codebook
    distances = (rows[truth] - rows[fed]).square().sum(-1)[fed != truth]
    if kind == "neighbour":
        all_pairs = torch.cdist(rows, rows).square()
        third = all_pairs.sort(dim=1).values[:, 3]  # of the nearest, itself left out
        assert (distances <= third[truth][fed != truth] + 1e-5).all()
    else:
        assert len(fed[fed != truth].unique()) == 128


def test_a_share_of_the_second_passes_inputs_is_true(flags, vae, model, expected, schedule):
    from sar_trainer import SARTrainer

    def inputs_of(share):
        config = config_of(
            flags, "--pn=1_2_3_4", "--rollout=argmax", f"--ssr_share={share}", "--csf_target=ground_truth"
        )
        trainer = SARTrainer(config, model, vae, open_dataset(config.data, 64, 0, "train"), None, ALONE)
        model.eval()
        seen, real = [], trainer.inputs
        trainer.inputs = lambda tokens, *more: seen.append(tokens) or real(tokens, *more)
        torch.manual_seed(0)
        trainer.compute_loss(batch_of(expected, schedule), schedule)
        return seen

    truth, rollout = inputs_of(1.0)
    fed = inputs_of(0.5)[1]
    assert torch.equal(inputs_of(0.0)[1][:, :14], truth[:, :14])
    apart = (rollout != truth)[:, :14]
    assert ((fed == rollout) | (fed == truth))[:, :14].all()
    assert 0.2 < (fed != truth)[:, :14][apart].float().mean() < 0.8


def test_equal_weights_give_each_scale_the_same(flags, vae, model, expected, schedule):
    from trainer import Trainer

    config = config_of(flags, "--pn=1_2_3_4", "--training_mode=teacher_forcing", "--scale_weights=equal")
    trainer = Trainer(config, model, vae, open_dataset(config.data, 64, 0, "train"), None, ALONE)
    model.eval()
    batch = batch_of(expected, schedule)
    truth = batch.tokens(schedule)
    loss, metrics = trainer.compute_loss(batch, schedule)
    logits = model(batch.labels, shift_all(truth, vae.codebook, schedule), schedule)
    each = [
        F.cross_entropy(a.flatten(0, 1), b.flatten())
        for a, b in zip(schedule.split(logits), schedule.split(truth), strict=True)
    ]
    assert worst(loss, torch.stack(each).mean()) < 1e-5
    for s, wanted in zip(schedule.sides, each, strict=True):
        assert metrics[f"loss_side/{s}"] == pytest.approx(wanted.item(), rel=1e-5)
    found = torch.autograd.grad(loss, model.head.weight)[0]
    assert worst(found, torch.autograd.grad(torch.stack(each).mean(), model.head.weight)[0]) < 1e-4


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("flowar", [NOISY]),
        ("hybrid", [NOISY]),
        ("var", [NOISY]),
        ("flowar", ["--scale_weights=equal"]),
        ("hybrid", ["--scale_weights=equal"]),
        ("var", ["--ssr_share=0.5"]),
    ],
)
def test_what_a_generator_does_not_know_is_refused(model, more, capsys):
    with pytest.raises(SystemExit):
        config_of([f"--model={model}", "--schedule=fixed", *more])
    assert f"--model {model} goes with" in capsys.readouterr().err

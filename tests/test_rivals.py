"""Rivals of SAR: by their definitions; at their zero setting teacher forcing or SAR, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F

from contrastive_alignment import ContrastiveAlignment
from models.residual_pathway import as_vectors
from models.residual_vqvae import ResidualVQVAEConfig
from models.scales import ScaleSchedule, shift_all
from models.weights import digest_of, save_weights
from noisy_context import NoisyContext
from tests.conftest import ALONE, config_of, worst
from tests.test_sar_trainer import batch_of
from tests.test_trainer import assert_same, weights_of
from train import build
from utils.data.datasets import CodeBatch, open_dataset

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


def saved_start(flags, directory):
    """A model that runs go on from."""
    trainer = build(config_of(flags, "--logger_type=none", "--training_mode=teacher_forcing"), ALONE)
    save_weights(trainer.model, directory / "start.safetensors")
    return str(directory / "start.safetensors")


@pytest.mark.parametrize(
    ("zero", "wanted"),
    [
        ([NOISY, "--noise_max=0"], ["--training_mode=teacher_forcing"]),
        (["--ssr_share=1"], []),
        (["--training_mode=cca", "--cca_lambda=0", "--init_ckpt=START"], ["--training_mode=teacher_forcing"]),
        (["--scale_weights=tokens", "--training_mode=teacher_forcing"], ["--training_mode=teacher_forcing"]),
    ],
    ids=["noise", "share", "contrast", "weights"],
)
def test_the_zero_setting_is_what_it_rivals(zero, wanted, flags, tmp_path):
    start = saved_start(flags, tmp_path)
    zero = [flag.replace("START", start) for flag in zero]
    wanted = [*wanted, *(flag for flag in zero if flag.startswith("--init_ckpt"))]
    assert_same(trained(flags, tmp_path / "a", *zero), trained(flags, tmp_path / "b", *wanted))


@pytest.mark.parametrize(
    "more",
    [
        [NOISY],
        [NOISY, "--noise=neighbour", "--noise_per=image", "--noise_max=1"],
        ["--ssr_share=0.5"],
        ["--training_mode=cca", "--init_ckpt=START"],
    ],
    ids=["noise", "neighbours", "share", "contrast"],
)
def test_draws_are_of_seed_and_step_and_a_resumed_run_goes_on(more, flags, tmp_path):
    start = saved_start(flags, tmp_path)
    more = [flag.replace("START", start) for flag in more]
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
    held_out = trainer.compute_loss(batch, schedule)[0]
    model.training = True  # but its parts, which would drop paths
    loss, metrics = trainer.compute_loss(batch, schedule)
    logits = model(batch.labels, shift_all(truth, vae.codebook, schedule), schedule)
    each = [
        F.cross_entropy(a.flatten(0, 1), b.flatten())
        for a, b in zip(schedule.split(logits), schedule.split(truth), strict=True)
    ]
    assert worst(loss, torch.stack(each).mean()) < 1e-5
    assert worst(held_out, F.cross_entropy(logits.flatten(0, 1), truth.flatten())) < 1e-5  # as of any other run
    for s, wanted in zip(schedule.sides, each, strict=True):
        assert metrics[f"loss_side/{s}"] == pytest.approx(wanted.item(), rel=1e-5)
    found = torch.autograd.grad(loss, model.head.weight)[0]
    assert worst(found, torch.autograd.grad(torch.stack(each).mean(), model.head.weight)[0]) < 1e-4


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("flowar", [NOISY]),
        ("hybrid", [NOISY]),
        ("hybrid", ["--training_mode=cca", "--init_ckpt=x"]),
        ("flowar", ["--scale_weights=equal"]),
        ("hybrid", ["--scale_weights=equal"]),
        ("var", ["--ssr_share=0.5"]),
    ],
)
def test_what_a_generator_does_not_know_is_refused(model, more, capsys):
    with pytest.raises(SystemExit):
        config_of([f"--model={model}", "--schedule=fixed", *more])
    assert f"--model {model} goes with" in capsys.readouterr().err


def test_on_a_residual_pathway_targets_make_up_for_the_noise():
    """Infinity's: what the corrupted canvas lacks is what the next scale is asked for."""
    torch.manual_seed(0)
    vae = ResidualVQVAEConfig(
        32, (1, 1, 1), 1, z_channels=8, codebook_size=512, codebook_dim=8, counted_scales=3
    ).build()
    schedule, pathway = ScaleSchedule((1, 2, 4)), vae.pathway
    truth = torch.randint(512, (6, 21))
    fed = truth.clone()
    assert torch.equal(pathway.corrected(fed, truth, schedule), truth)  # nothing is corrupted
    fed[:3, 1:5] = torch.randint(512, (3, 4))  # scale 2 is corrupted, of three images
    targets = pathway.corrected(fed, truth, schedule)
    assert torch.equal(targets[:, :5], truth[:, :5])  # nothing that came before those was corrupted
    assert torch.equal(targets[3:], truth[3:])
    lacks = list(pathway.canvases(truth, schedule, None))[-1] - list(pathway.canvases(fed, schedule, None))[-1]
    wanted = pathway.embed(truth[:, 5:]) + as_vectors(lacks)  # at the finest side
    far, near = ((pathway.embed(codes[:, 5:]) - wanted).square().sum(-1)[:3] for codes in (truth, targets))
    assert (near <= far).all()
    assert (near < far).float().mean() > 0.2


@pytest.fixture
def contrastive(flags, vae, model, tmp_path):
    """A trainer of CCA around the reference models, against a copy with other weights."""

    def make(*more):
        frozen = copy.deepcopy(model)
        with torch.no_grad():
            for p in frozen.parameters():
                p.mul_(0.98)
        save_weights(frozen, tmp_path / "frozen.safetensors")
        start = f"--init_ckpt={tmp_path / 'frozen.safetensors'}"
        config = config_of(flags, "--pn=1_2_3_4", "--training_mode=cca", start, *more)
        data = open_dataset(config.data, 64, 0, "train")
        trainer = ContrastiveAlignment(config, model, vae, data, None, ALONE)
        model.eval()
        return trainer, frozen.eval()

    return make


def test_the_contrastive_loss_and_its_gradient_are_the_papers(contrastive, vae, model, expected, schedule):
    trainer, frozen = contrastive("--cca_beta=0.3", "--cca_lambda=2")
    batch = batch_of(expected, schedule)
    null = model.null_class
    labels = torch.tensor([3, null, 7, 7, 1])
    tokens = batch.tokens(schedule)[[0, 1, 0, 1, 1]]
    batch = CodeBatch(labels, dict(zip(schedule.sides, schedule.split(tokens), strict=True)))
    inputs = shift_all(tokens, vae.codebook, schedule)

    def log_p(network, of):
        return network(of, inputs, schedule).double().log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))

    def delta(of):
        return log_p(model, of) - log_p(frozen, of).detach()

    others = labels.roll(1)  # 1, 3, null, 7, 7
    keep = torch.tensor([True, False, False, False, True])  # another class, and neither of the two dropped
    wanted = -F.logsigmoid(0.3 * delta(labels)).mean() - 2 * F.logsigmoid(-0.3 * delta(others)[keep]).mean()
    found, metrics = trainer.compute_loss(batch, schedule)
    assert worst(found, wanted) < 1e-4
    assert worst(metrics["gain"], delta(labels).mean()) < 1e-3
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert worst(a, b) < 1e-3


def test_without_a_single_other_class_only_the_first_half_counts(contrastive, vae, model, expected, schedule):
    trainer, _ = contrastive()
    batch = batch_of(expected, schedule)
    same = CodeBatch(torch.full_like(batch.labels, 4), batch.codes)
    loss, metrics = trainer.compute_loss(same, schedule)
    loss.backward()
    assert torch.isfinite(loss)
    assert metrics["gain_of_others"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_it_is_compared_with_cannot_change_on_the_way(contrastive):
    trainer, frozen = contrastive()
    before = trainer.invariants()["frozen_sha256"]
    assert before == digest_of(frozen)
    assert trainer.invariants()["frozen_sha256"] != digest_of(trainer.model)
    assert all(not p.requires_grad for p in trainer.frozen.parameters())


def test_a_run_refuses_another_start_than_it_began_with(flags, tmp_path):
    start = saved_start(flags, tmp_path)
    more = ["--training_mode=cca", f"--init_ckpt={start}"]
    trained(flags, tmp_path / "run", *more, "--max_steps=1")
    other = build(
        config_of(
            flags, "--logger_type=none", "--training_mode=teacher_forcing", f"--out_dir={tmp_path}/b", "--seed=5"
        ),
        ALONE,
    )
    save_weights(other.model, tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match="holds a run with other settings: --frozen_sha256"):
        trained(flags, tmp_path / "run", *more)


def test_contrast_needs_other_classes(contrastive, flags, tmp_path):
    with pytest.raises(ValueError, match="two images or more"):
        contrastive("--micro_batch=1")[0].invariants()


def test_no_row_is_its_own_neighbour_and_all_others_can_be(noisy, vae, monkeypatch):
    twice = vae.quantize.embedding.weight.detach().clone()
    twice[5] = twice[3]
    monkeypatch.setattr(vae.quantize.embedding.weight, "data", twice)
    rows = noisy("--noise=neighbour").model.config.codebook_size
    near = noisy("--noise=neighbour", f"--noise_neighbours={rows - 1}").neighbours
    assert (near.sort(1).values == torch.tensor([[j for j in range(rows) if j != i] for i in range(rows)])).all()
    with pytest.raises(ValueError, match="has fewer others"):
        _ = noisy("--noise=neighbour", f"--noise_neighbours={rows}").neighbours

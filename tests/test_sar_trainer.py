from itertools import product

import pytest
import torch
import torch.nn.functional as F

from models.head import Prediction, sample_tokens
from models.sampling import Guidance
from models.scales import ScaleSchedule, shift_all, shift_up
from sar_trainer import SARTrainer
from tests.conftest import ALONE, config_of, worst
from train import TRAINERS, build
from trainer import Trainer
from utils.data.datasets import CodeBatch, open_dataset


@pytest.fixture
def reference(flags, vae, model):
    """A SAR trainer around the reference models, at rest."""

    def make(*more):
        config = config_of(flags, "--pn=1_2_3_4", *more)
        train = open_dataset(config.data, 64, 0, "train")
        trainer = SARTrainer(config, model, vae, train, None, ALONE)
        model.eval()
        return trainer

    return make


def batch_of(expected, schedule):
    codes = dict(zip(schedule.sides, schedule.split(expected["vae.codes"]), strict=True))
    return CodeBatch(expected["labels"], codes)


def teacher_with(tokens, logits=None):
    """A teacher's pass whose rollout is given, not sampled."""
    return Prediction(torch.zeros(()), torch.zeros(()), torch.zeros(()), sampled=tokens, logits=logits)


def plain_step(trainer, model, batch, schedule, seed):
    """A SAR step written out: every logit of every pass kept, every scale drawn, nothing shared or left out."""
    sar, labels, truth = trainer.config.sar, batch.labels, batch.tokens(schedule)
    inputs = shift_all(truth, trainer.pathway.codebook, schedule)
    logits = model(labels, inputs, schedule)
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    with torch.no_grad():
        guided = logits.detach()
        if sar.rollout == "cfg":
            null, n = model(torch.full_like(labels, model.null_class), inputs, schedule), len(schedule)
            parts = zip(schedule.split(logits), schedule.split(null), strict=True)
            weights = [sar.sf_cfg_scale * 0.5 * (1 + i / (n - 1)) for i in range(n)]
            guided = torch.cat([c + w * (c - u) for w, (c, u) in zip(weights, parts, strict=True)], dim=1)
        torch.manual_seed(seed)
        uniforms = torch.rand(truth.shape)
        top_k = 1 if sar.rollout == "argmax" else sar.sf_top_k
        rollout = sample_tokens(guided, top_k, sar.sf_top_p, uniforms)
    if sar.ssr == "all":
        scored, second = slice(1, None), model(labels, shift_all(rollout, trainer.pathway.codebook, schedule), schedule)
        second = second[:, 1:]
    else:
        scored, sides = schedule.span(-1), schedule.sides
        fed = shift_up(rollout[:, schedule.span(-2)], trainer.pathway.codebook, sides[-2], sides[-1])
        second = model(labels, fed, ScaleSchedule((1, sides[-1])), start=False)[:, 1:]
    if sar.csf_target == "teacher_soft":
        p, q = second.log_softmax(-1), guided[:, scored].log_softmax(-1)
        csf = (q.exp() * (q - p)).sum(-1).mean()
    else:
        target = (rollout if sar.csf_target == "teacher" else truth)[:, scored]
        csf = F.cross_entropy(second.flatten(0, 1), target.flatten())
    return loss + sar.csf_weight * csf


@pytest.mark.parametrize("rows", [7, 2048])  # of logits at a time: many chunks, or one
def test_a_step_equals_the_plain_one_in_loss_and_gradient(rows, reference, model, expected, schedule, monkeypatch):
    monkeypatch.setattr("models.head.ROWS_AT_ONCE", rows)
    batch = batch_of(expected, schedule)
    for ssr, rollout, target in product(
        ("all", "last"), ("argmax", "sample", "cfg"), ("teacher", "ground_truth", "teacher_soft")
    ):
        drawn = [] if rollout == "argmax" else ["--sf_top_k=50", "--sf_top_p=0.9"]
        scale = ["--sf_cfg_scale=2"] if rollout == "cfg" else []
        trainer = reference(
            f"--ssr={ssr}", f"--rollout={rollout}", f"--csf_target={target}", "--csf_weight=0.7", *drawn, *scale
        )
        wanted = plain_step(trainer, model, batch, schedule, seed=5)
        wanted.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        torch.manual_seed(5)
        found, _ = trainer.compute_loss(batch, schedule)
        found.backward()
        assert worst(found.detach().view(1), wanted.detach().view(1)) < 1e-5, (ssr, rollout, target)
        for name, p in model.named_parameters():
            assert worst(p.grad, gradients[name]) < 1e-4, (name, ssr, rollout, target)
        model.zero_grad()


@pytest.mark.parametrize("mode", [["--rollout=cfg"], ["--training_mode=sf_full", "--rollout=cfg"]])
def test_half_precision_loses_no_gradient_to_the_pass_without_one(mode, flags, vae, model, expected, schedule):
    """Autocast remembers the weights it cast: in older torch, those of a pass without gradient were lost to all."""
    gradients = {}
    for precision in ("fp32", "bf16"):
        config = config_of(flags, "--pn=1_2_3_4", *mode, f"--precision={precision}")
        train = open_dataset(config.data, 64, 0, "train")
        trainer = TRAINERS[config.sar.training_mode](config, model, vae, train, None, ALONE)
        model.eval()
        torch.manual_seed(0)
        with trainer.precision.autocast():
            trainer.compute_loss(batch_of(expected, schedule), schedule)[0].backward()
        gradients[precision] = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
    for name, exact in gradients["fp32"].items():
        assert gradients["bf16"][name] is not None, name
        assert (gradients["bf16"][name].abs().max() > 0) == (exact.abs().max() > 0), name


@pytest.mark.parametrize("ssr", ["all", "last"])
def test_both_second_passes_equal_the_released_ones(ssr, reference, expected, schedule):
    trainer = reference("--rollout=argmax", f"--ssr={ssr}", "--csf_weight=0.25")
    seen, network = {}, trainer.network

    def spy(labels, inputs, sides, targets, first, sampler, start):
        seen["inputs"], seen["logits"] = inputs, network(labels, inputs, sides, start=start)
        return network(labels, inputs, sides, targets, first, sampler, start)

    trainer.network = spy
    with torch.no_grad():
        loss, metrics = trainer.compute_loss(batch_of(expected, schedule), schedule)
    assert worst(metrics["loss_csf"].view(1), expected[f"student.csf_loss_{ssr}"]) < 1e-5
    assert worst(metrics["loss_tf"].view(1), expected["teacher.loss"]) < 1e-5
    assert loss.item() == pytest.approx(metrics["loss_tf"].item() + 0.25 * metrics["loss_csf"].item(), rel=1e-6)
    if ssr == "all":
        assert worst(seen["inputs"], expected["student.inputs"]) < 1e-5
        assert worst(seen["logits"], expected["student.logits_all"]) < 1e-5
    else:
        assert worst(seen["logits"][:, 1:], expected["student.logits_last"]) < 1e-5


def roll_out(trainer, expected, schedule):
    """The tokens (B, L) that a trainer samples from its teacher pass."""
    tokens, inputs, labels = expected["vae.codes"], expected["teacher.inputs"], expected["labels"]
    sampler = trainer.rollout_sampler(labels, inputs, schedule)
    return trainer.predict(labels, inputs, tokens, schedule, sampler=sampler).sampled


def test_rollouts_by_their_definitions(reference, model, expected, schedule):
    cond, uncond = expected["teacher.logits"], expected["teacher.logits_null_class"]
    weights = [2.0 * 0.5 * (1 + i / 3) for i in range(4)]
    guided = torch.cat(
        [(1 + w) * c - w * u for w, c, u in zip(weights, schedule.split(cond), schedule.split(uncond), strict=True)], 1
    )
    for flags, logits in [
        (["--rollout=sample", "--sf_top_k=20", "--sf_top_p=0.9"], cond),
        (["--rollout=cfg", "--sf_top_k=20", "--sf_top_p=0.9", "--sf_cfg_scale=2"], guided),
    ]:
        trainer = reference(*flags)
        torch.manual_seed(3)
        found = roll_out(trainer, expected, schedule)
        torch.manual_seed(3)
        assert torch.equal(found, sample_tokens(logits, 20, 0.9, torch.rand(2, 30)))
    assert Guidance("half_ramp", 2.0).weights(schedule.sides) == pytest.approx(weights)
    argmax = roll_out(reference("--rollout=argmax"), expected, schedule)
    assert torch.equal(argmax, expected["student.rollout_argmax"])


def test_only_the_scales_that_the_second_pass_needs_are_drawn(reference, model, expected, schedule):
    lengths = []  # of the unconditional pass
    model.register_forward_hook(lambda *args: lengths.append(args[1][2].total) if args[1][0][0] == 10 else None)
    for flags, drawn, passed in [
        (["--ssr=all"], range(30), 30),
        (["--ssr=all", "--csf_target=ground_truth"], range(14), 14),
        (["--ssr=last"], range(5, 30), 30),
        (["--ssr=last", "--csf_target=ground_truth"], range(5, 14), 14),
    ]:
        rollout = roll_out(reference(*flags), expected, schedule)
        assert (rollout[0] >= 0).nonzero().flatten().tolist() == list(drawn)
        assert lengths.pop() == passed


def test_ground_truth_target(reference, expected, schedule):
    trainer = reference("--rollout=argmax", "--csf_target=ground_truth", "--csf_weight=1")
    _, metrics = trainer.compute_loss(batch_of(expected, schedule), schedule)
    logits, truth = expected["student.logits_all"][:, 1:], expected["vae.codes"][:, 1:]
    wanted = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    assert metrics["loss_csf"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_no_gradient_flows_through_the_rollout(reference, model, expected, schedule):
    trainer = reference("--rollout=cfg", "--csf_weight=1")
    rollout = roll_out(trainer, expected, schedule)
    trainer.student(expected["labels"], teacher_with(rollout), expected["vae.codes"], schedule).loss.backward()
    found = model.head.weight.grad.clone()
    model.zero_grad()
    inputs = shift_all(rollout, trainer.pathway.codebook, schedule)
    logits = model(expected["labels"], inputs, schedule)
    F.cross_entropy(logits[:, 1:].flatten(0, 1), rollout[:, 1:].flatten()).backward()
    assert worst(found, model.head.weight.grad) < 1e-5


def test_the_unconditional_half_runs_once_and_without_gradient(reference, model, expected, schedule):
    trainer = reference("--rollout=cfg", "--csf_weight=1")
    calls = []
    model.register_forward_hook(lambda *args: calls.append((args[1][0].tolist(), torch.is_grad_enabled())))
    trainer.compute_loss(batch_of(expected, schedule), schedule)
    assert calls == [([10, 10], False), ([3, 7], True), ([3, 7], True)]


@pytest.mark.parametrize("drop", ["0", "0.5"])
def test_weight_zero_is_teacher_forcing_bit_for_bit(drop, flags, tmp_path):
    runs = {}
    for name, mode in [("tf", ["--training_mode=teacher_forcing"]), ("sar", ["--csf_weight=0"])]:
        config = config_of(flags, *mode, f"--label_drop={drop}", f"--out_dir={tmp_path / name}")
        runs[name] = build(config, ALONE)
        runs[name].fit()
    assert type(runs["tf"]) is Trainer
    assert type(runs["sar"]) is SARTrainer
    for (name, a), b in zip(
        runs["tf"].model.state_dict().items(), runs["sar"].model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_dropped_classes_are_shared_by_both_passes(reference, model):
    trainer = reference("--rollout=sample", "--label_drop=0.5")
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[1][0].clone()))
    torch.manual_seed(1)
    trainer.micro_loss(torch.rand(8, 3, 64, 64) * 2 - 1, torch.arange(8))
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert 0 < (seen[0] == 10).sum() < 8


def test_what_is_logged(reference, expected, schedule):
    trainer = reference("--rollout=argmax")
    _, metrics = trainer.compute_loss(batch_of(expected, schedule), schedule)
    assert metrics["rollout_agreement"] == 1
    hits = (expected["student.rollout_argmax"] == expected["vae.codes"]).float().mean()
    assert metrics["rollout_accuracy"] == hits
    assert {"student_loss_side/2", "student_loss_side/4", "loss_side/1", "loss_tf", "loss_csf"} <= set(metrics)
    assert "student_loss_side/1" not in metrics
    assert not any(value.requires_grad for value in metrics.values())


def test_one_scale_has_no_second_pass(reference, expected):
    trainer, one = reference("--rollout=argmax", "--csf_weight=1"), ScaleSchedule((4,))
    _, metrics = trainer.compute_loss(CodeBatch(expected["labels"], {4: expected["vae.codes"][:, 14:]}), one)
    assert "loss_csf" not in metrics


def test_soft_targets_are_a_kl_and_one_hot_ones_the_hard_loss(reference, expected, schedule):
    trainer, labels = reference("--csf_target=teacher_soft"), expected["labels"]
    rollout = expected["student.rollout_argmax"]
    hot = F.one_hot(rollout, 128).float() * 1e4  # as logits: all the mass on one token
    soft = trainer.student(labels, teacher_with(rollout, hot), expected["vae.codes"], schedule).loss
    assert worst(soft.detach().view(1), expected["student.csf_loss_all"]) < 1e-5
    teacher, student = (expected[n][:, 1:].log_softmax(-1) for n in ("teacher.logits", "student.logits_all"))
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    found = trainer.student(labels, teacher_with(rollout, expected["teacher.logits"]), expected["vae.codes"], schedule)
    assert found.loss.item() == pytest.approx(kl.item(), rel=1e-4)


def test_soft_targets_of_deeper_rollouts_go_with_scales_weighted_alike(reference, model, expected, schedule):
    """What is drawn then has no token to stand in for what counts less."""
    found = []
    for weights in ("tokens", "equal"):
        trainer = reference(
            "--csf_target=teacher_soft", "--ssr_steps=2", f"--scale_weights={weights}", "--csf_weight=1"
        )
        found.append(trainer.compute_loss(batch_of(expected, schedule), schedule)[0].item())
    assert found[0] != found[1]


def test_deeper_rollouts_feed_on_the_students_own_tokens(reference, model, expected, schedule):
    trainer, labels = reference("--rollout=argmax", "--ssr_steps=2"), expected["labels"]
    rollout = expected["student.rollout_argmax"]
    found = trainer.student(labels, teacher_with(rollout), expected["vae.codes"], schedule).loss
    drawn = expected["student.logits_all"].argmax(-1)
    again = shift_all(torch.cat([rollout[:, :1], drawn[:, 1:]], 1), trainer.pathway.codebook, schedule)
    second = F.cross_entropy(model(labels, again, schedule)[:, 1:].flatten(0, 1), rollout[:, 1:].flatten())
    wanted = (expected["student.csf_loss_all"] + second) / 2
    assert worst(found.detach().view(1), wanted.detach()) < 1e-5


def test_deeper_rollouts_are_guided_like_the_first(reference, model, expected, schedule):
    flags = ["--rollout=cfg", "--ssr_steps=3", "--sf_top_k=20", "--sf_top_p=0.9", "--sf_cfg_scale=2"]
    trainer, labels, truth = reference(*flags), expected["labels"], expected["vae.codes"]
    rollout = expected["student.rollout_argmax"]
    torch.manual_seed(3)
    found = trainer.student(labels, teacher_with(rollout), truth, schedule).loss
    torch.manual_seed(3)
    weights = [2.0 * 0.5 * (1 + i / 3) for i in range(4)]
    fed, losses = rollout, []
    with torch.no_grad():
        for _ in range(3):
            inputs = shift_all(fed, trainer.pathway.codebook, schedule)
            cond, uncond = (model(who, inputs, schedule) for who in (labels, torch.full_like(labels, 10)))
            losses.append(F.cross_entropy(cond[:, 1:].flatten(0, 1), rollout[:, 1:].flatten()))
            pairs = zip(weights, schedule.split(cond), schedule.split(uncond), strict=True)
            guided = torch.cat([(1 + w) * c - w * u for w, c, u in pairs], dim=1)
            drawn = sample_tokens(guided[:, 1:14], 20, 0.9, torch.rand(2, 29)[:, :13])  # side 4 feeds nothing
            fed = torch.cat([rollout[:, :1], drawn, rollout[:, 14:]], dim=1)
    assert found.item() == pytest.approx(sum(losses).item() / 3, rel=1e-5)

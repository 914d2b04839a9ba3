import pytest
import torch
import torch.nn.functional as F

from models.sampling import Guidance, SamplingConfig, evaluating, generate_scales
from models.scales import ScaleSchedule, shift_all, shift_up
from student_forcing import STUDENT_FORCING
from tests.conftest import ALONE, config_of, train_on_two_ranks, worst
from trainer import Trainer
from utils.data.datasets import CodeBatch, open_dataset
from utils.runtime.checkpoint import newest_checkpoint


@pytest.fixture
def reference(flags, vae, model):
    """A student-forcing trainer around the reference models."""

    def make(mode, *more):
        config = config_of(flags, "--pn=1_2_3_4", f"--training_mode={mode}", *more)
        train = open_dataset(config.data, 64, 0, "train")
        trainer = STUDENT_FORCING[mode](config, model, vae, train, None, ALONE)
        model.eval()
        return trainer

    return make


@pytest.fixture
def batch(expected, schedule):
    codes = dict(zip(schedule.sides, schedule.split(expected["vae.codes"]), strict=True))
    return CodeBatch(expected["labels"], codes)


TEN = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# Table 3's schedules → the sides whose input is self-generated, by the paper's words: of ten scales, hybrid@8 leaves
# four and hybrid@16 one; scales of even number are the interleaved schedule's.
SELF_FED = [
    ("sf_full", (), TEN, {2, 3, 4, 5, 6, 8, 10, 13, 16}),
    ("sf_interleave", (), TEN, {2, 4, 6, 10, 16}),
    ("sf_hybrid", (8,), TEN, {8, 10, 13, 16}),
    ("sf_hybrid", (16,), TEN, {16}),
    ("sf_hybrid", (9,), TEN, {10, 13, 16}),  # a side that is none of the scales
    ("sf_hybrid", (1,), TEN, {2, 3, 4, 5, 6, 8, 10, 13, 16}),  # the first scale has no input to generate
    ("sf_hybrid", (16,), (1, 2, 5, 9, 14), set()),  # a drawn schedule without such a side
]


@pytest.mark.parametrize(("mode", "k", "sides", "wanted"), SELF_FED)
def test_which_sides_are_self_fed(mode, k, sides, wanted, reference):
    trainer = reference(mode, "--pn=1_2_3_4_16", *(f"--sf_hybrid_from={side}" for side in k))
    fed = trainer.self_fed(ScaleSchedule(sides))
    assert {s for s, yes in zip(sides, fed, strict=True) if yes} == wanted


def test_alternate_turns_with_the_steps(reference, schedule):
    alternate = reference("sf_alternate")
    steps = []
    for alternate.step in range(4):
        steps.append(any(alternate.self_fed(schedule)))
    assert steps == [False, True, False, True]


def test_the_last_hybrid_schedule_feeds_its_last_scale_from_a_draw(reference, model, vae, batch, schedule):
    """hybrid@k with k the finest side: ground truth all the way, then the model's draw at the side before."""
    trainer = reference("sf_hybrid", "--sf_hybrid_from=4", "--rollout=argmax")
    fed, truth = trainer.roll_out(batch, schedule), batch.tokens(schedule)
    forced = model(batch.labels, shift_all(truth, vae.codebook, schedule), schedule).argmax(-1)
    assert torch.equal(fed[:, :5], truth[:, :5])
    assert torch.equal(fed[:, 5:14], forced[:, 5:14])
    assert not torch.equal(fed[:, 5:14], truth[:, 5:14])


@pytest.mark.parametrize("rollout", ["sample", "argmax", "cfg"])
def test_full_feeds_what_generate_would_feed_under_the_same_seeds(rollout, reference, model, vae, batch, schedule):
    drawn = [] if rollout == "argmax" else ["--sf_top_k=20", "--sf_top_p=0.9"]
    trainer = reference("sf_full", f"--rollout={rollout}", *drawn)
    torch.manual_seed(5)
    fed = trainer.roll_out(batch, schedule)
    torch.manual_seed(5)
    uniforms = torch.rand(2, 30)
    guidance = Guidance("half_ramp", 2.5) if rollout == "cfg" else Guidance("none")
    with torch.no_grad(), evaluating(model):
        top_k = 1 if rollout == "argmax" else 20
        config = SamplingConfig(guidance, top_k, 0.9)
        scales = generate_scales(model, vae.pathway, batch.labels, schedule, config, uniforms)
        wanted = torch.cat([codes for _, codes in scales], dim=1)
    assert torch.equal(fed[:, :14], wanted[:, :14])  # the finest scale feeds nothing
    assert worst(shift_all(fed, vae.codebook, schedule), shift_all(wanted, vae.codebook, schedule)) == 0


def test_the_parallel_loss_equals_the_autoregressive_passes_own(reference, model, vae, batch, schedule):
    """Eq. 3 as the paper writes it: the logits of the autoregressive pass itself, with gradient."""
    trainer = reference("sf_full", "--rollout=argmax")
    loss, _ = trainer.compute_loss(batch, schedule)
    (found,) = torch.autograd.grad(loss, model.head.weight)
    state, inputs, logits = model.init_cache(batch.labels, schedule.total), None, []
    for i, s in enumerate(schedule.sides):
        logits.append(model.decode_scale(state, inputs, s))
        if i < 3:
            codes = logits[-1].detach().argmax(-1)
            inputs = shift_up(codes, vae.codebook, s, schedule.sides[i + 1])
    own = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), batch.tokens(schedule).flatten())
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert worst(found, torch.autograd.grad(own, model.head.weight)[0]) < 1e-4


def test_mixed_inputs_hold_ground_truth_where_they_should(reference, batch, schedule):
    fed = reference("sf_interleave", "--rollout=argmax").roll_out(batch, schedule)
    truth = batch.tokens(schedule)
    drawn, kept = [0, 2], [1, 3]  # scales 1 and 3 feed scales 2 and 4; scale 2 feeds scale 3 as ground truth
    for i in kept:
        assert torch.equal(fed[:, schedule.span(i)], truth[:, schedule.span(i)])
    assert any(not torch.equal(fed[:, schedule.span(i)], truth[:, schedule.span(i)]) for i in drawn)


def test_without_self_fed_scales_the_loss_is_teacher_forcing_exactly(reference, expected, batch, schedule):
    trainer = reference("sf_alternate")  # step 0 is teacher-forced
    loss, _ = trainer.compute_loss(batch, schedule)
    assert torch.equal(loss, Trainer.compute_loss(trainer, batch, schedule)[0])
    assert worst(loss.detach().view(1), expected["teacher.loss"]) < 1e-5


def test_interleave_with_one_scale_is_teacher_forcing(reference, batch):
    one = ScaleSchedule((4,))
    trainer = reference("sf_interleave")
    loss, _ = trainer.compute_loss(batch, one)
    assert torch.equal(loss, Trainer.compute_loss(trainer, batch, one)[0])


@pytest.mark.parametrize(
    ("mode", "scales"), [("sf_full", 3), ("sf_interleave", 3), ("sf_hybrid", 3), ("sf_alternate", 0)]
)
def test_a_step_costs_a_rollout_without_gradient_and_one_forward(mode, scales, reference, model, batch, schedule):
    more = ["--sf_hybrid_from=2"] if mode == "sf_hybrid" else []
    trainer = reference(mode, "--rollout=argmax", *more)
    calls = []
    model.blocks[0].register_forward_hook(lambda _, x, y: calls.append((x[0].shape[1], torch.is_grad_enabled())))
    trainer.compute_loss(batch, schedule)
    assert calls == [*[(n, False) for n in schedule.lengths[:scales]], (schedule.total, True)]


def test_every_mode_trains_on_two_ranks(flags, tmp_path):
    own = {mode: ["--sf_hybrid_from=2"] if mode == "sf_hybrid" else [] for mode in STUDENT_FORCING}
    runs = {mode: [*flags, f"--training_mode={mode}", *more, "--max_steps=2"] for mode, more in own.items()}
    train_on_two_ranks(tmp_path, runs)
    for mode in STUDENT_FORCING:
        assert newest_checkpoint(tmp_path / mode).name == "step_0000002"

import json
import math

import pytest
import torch

from models import FlexVAR
from tests.conftest import ALONE, config_of
from tests.test_trainer import TF, assert_same, weights_of
from train import build
from utils.runtime.checkpoint import newest_checkpoint


def spoiled(trainer, step, how):
    """A trainer whose step `step` is not finite."""
    inner = trainer.micro_loss

    def micro_loss(images, labels):
        loss, metrics = inner(images, labels)
        if trainer.step == step:
            if how == "loss":
                loss = loss * torch.nan
            elif how == "gradient":  # a finite loss: the derivative of sqrt at 0 is infinite
                loss = loss + (trainer.model.head.weight.sum() * 0).abs().sqrt()
        return loss, {**metrics, "loss": loss.detach()}

    trainer.micro_loss = micro_loss
    return trainer


@pytest.mark.parametrize(("how", "named"), [("loss", "the loss of rank 0"), ("gradient", "the gradient")])
def test_it_stops_before_the_weights_change(how, named, flags, tmp_path):
    common = [*flags, TF, "--max_steps=6", "--log_every=100", "--save_every_steps=2", "--ema=0.9"]
    trainer = spoiled(build(config_of(common), ALONE), 4, how)
    with pytest.raises(FloatingPointError, match=rf"{named} is not finite at step 4, images (\d+ of epoch 0, )+"):
        trainer.fit()
    assert newest_checkpoint(tmp_path / "run").name == "step_0000004"
    assert_same(trainer.model.state_dict(), weights_of(tmp_path / "run"))
    build(config_of(common), ALONE).fit()  # and goes on
    assert newest_checkpoint(tmp_path / "run").name == "step_0000006"


def test_no_later_step_changes_them_either(flags):
    """On a GPU the host hears of it a step later."""
    trainer = spoiled(build(config_of(flags, TF), ALONE), 1, "loss")
    batches = iter(trainer.loader())
    trainer.train_step(batches)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train_step(batches)
    trainer.train_step(batches)
    assert_same(before, trainer.model.state_dict())


def test_dropped_steps_are_counted_named_and_limited(flags, tmp_path, capsys):
    more = [*flags, TF, "--max_steps=6", "--on_nonfinite=skip", "--max_skipped=1", "--log_every=3"]
    trainer = spoiled(build(config_of(more, "--save_every_steps=4"), ALONE), 2, "loss")
    trainer.fit()
    assert "is not finite at step 2, images" in (said := capsys.readouterr().err)
    assert "dropped the step, number 1 of at most 1" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(x) for line in lines for x in line.values())
    again = build(config_of(more, "--max_steps=8"), ALONE)
    assert again.guard.skipped == 1  # counted over the whole run
    with pytest.raises(FloatingPointError, match="step 7"):
        spoiled(again, 7, "loss").fit()


def test_a_dropped_step_leaves_weights_and_moments_alone(flags):
    trainer = spoiled(build(config_of(flags, TF, "--on_nonfinite=skip"), ALONE), 1, "gradient")
    batches = iter(trainer.loader())
    trainer.train_step(batches)
    before = [x.clone() for x in (*trainer.model.parameters(), *moments(trainer))]
    trainer.train_step(batches)
    assert all(torch.equal(a, b) for a, b in zip(before, (*trainer.model.parameters(), *moments(trainer)), strict=True))
    trainer.train_step(batches)
    assert not torch.equal(before[0], next(trainer.model.parameters()))


def moments(trainer):
    return [x for state in trainer.optimizer.state.values() for x in state.values()]


def test_fp16_may_overflow(flags):
    """The scaler starts at 2^16 and lowers itself; only the loss counts."""
    trainer = build(config_of(flags, TF, "--precision=fp16", "--max_steps=4"), ALONE)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer.fit()
    assert trainer.precision.scaler.get_scale() < 2.0**60


def test_weights_with_nan_are_refused_when_loaded(flags, model, tmp_path):
    bad = FlexVAR(model.config)
    bad.class_emb.weight.data[0, 0] = torch.inf
    torch.save({"model": bad.state_dict()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"not finite: class_emb\.weight"):
        build(config_of(flags, f"--init_ckpt={tmp_path / 'bad.pth'}", "--width=128"), ALONE)

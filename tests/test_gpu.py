"""What a CPU can say of a GPU: on a fake one, nothing mixes devices and the hot path never waits for a result."""

import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_tokenizer
from models import Guidance, SamplingConfig
from models.sampling import generate_scales
from tests.conftest import ALONE, config_of
from tests.fake_gpu import GPU, HostWaits, fake_gpu, on_gpu
from tests.test_every_generator import MORE, files, flags_of  # noqa: F401
from tests.test_train_tokenizer import SMALL
from train import build
from trainer import Trainer
from utils.config.tokenizer import TokenizerTrainConfig
from utils.evaluations.c2i.features import EfficientNetLite
from utils.runtime.flags import parse
from utils.runtime.numerics import Precision

SAR = [["--rollout=argmax"], ["--rollout=sample"], [], ["--ssr=last"], ["--csf_target=teacher_soft"], ["--ssr_steps=2"]]


@pytest.fixture(autouse=True)
def share(monkeypatch):
    """The hybrid model's masked share, which it draws on the host."""
    monkeypatch.setattr("models.hybrid.draw_share", lambda: 0.8)


def trainer_on_gpu(flags: list[str]) -> Trainer:
    """A trainer built on the CPU. Its models are moved inside the fake GPU: see `moved`."""
    trainer = build(config_of(flags, "--logger_type=none"), ALONE)
    trainer.model.train()
    return trainer


def moved(trainer: Trainer) -> None:
    on_gpu(trainer.model), on_gpu(trainer.vae)
    trainer.pathway = trainer.vae.pathway
    trainer.ranks = dataclasses.replace(ALONE, device=GPU)
    trainer.precision = Precision("bf16", GPU)


def test_the_fake_gpu_sees_what_it_should():
    with fake_gpu():
        x = torch.ones(3, device=GPU)
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x.sum().item(),
            lambda: x.nonzero(),
            lambda: x.cpu(),
            lambda: torch.ones(3).to(GPU),
            lambda: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=GPU)),
        ):
            with pytest.raises((RuntimeError, HostWaits)):
                wrong()
        assert torch.ones(3).to(GPU, non_blocking=True).device == GPU
        with torch.autocast("cuda", torch.bfloat16):
            assert (torch.ones(3, 3, device=GPU) @ torch.ones(3, 3, device=GPU)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MORE)
def test_a_step_of_every_generator(kind, files, tmp_path):  # noqa: F811
    check_step([*flags_of(kind, files), f"--out_dir={tmp_path}"])


@pytest.mark.parametrize("more", SAR, ids="_".join)
def test_a_step_of_every_rollout(more, flags):
    check_step([*flags, *more])


@pytest.mark.parametrize("mode", ["teacher_forcing", "sf_full", "sf_interleave", "sf_hybrid"])
def test_a_step_of_every_training_mode(mode, flags):
    check_step([*flags, f"--training_mode={mode}", *(["--sf_hybrid_from=2"] if mode == "sf_hybrid" else [])])


def check_step(flags: list[str]) -> None:
    """Encoding and the whole loss, in bf16."""
    trainer = trainer_on_gpu(flags)
    side = trainer.config.model.scales.sides[-1] * trainer.vae.config.factor
    with fake_gpu():
        moved(trainer)
        images, labels = torch.rand(4, 3, side, side, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
        loss, metrics = trainer.micro_loss(images, labels)
        assert loss.device == GPU
        assert all(value.device == GPU for value in metrics.values())


@pytest.mark.parametrize("kind", MORE)
def test_sampling(kind, files, tmp_path):  # noqa: F811
    trainer = trainer_on_gpu([*flags_of(kind, files), f"--out_dir={tmp_path}"])
    with fake_gpu():
        moved(trainer)
        labels, draw = (
            torch.zeros(3, dtype=torch.long, device=GPU),
            SamplingConfig(Guidance("ramp", 2.0), 5, 0.9, flow_steps=4),
        )
        model, schedule = trainer.model.eval(), trainer.config.model.scales
        noise = model.draw_noise(range(3), schedule, GPU)
        with trainer.precision.autocast(), torch.no_grad():
            codes = dict(generate_scales(model, trainer.pathway, labels, schedule, draw, noise))
            images = trainer.vae.decode_at(codes, schedule.sides[-1], schedule)
        assert (images.shape, images.device) == ((3, 3, 16, 16), GPU)


CODES = ["--codebook_size=32", "--codebook_dim=8"]
TOKENIZERS = {
    "adversarial": [*CODES, "--z_channels=32", "--disc_weight=0.1", "--disc_layers=1"],
    "residual": [*CODES, "--quantiser=residual"],
    "continuous": ["--quantiser=none", "--z_channels=4"],
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_step_of_the_tokenizer(kind, tmp_path):
    sizes = [f for f in SMALL if not f.startswith(("--codebook", "--z_channels"))]
    flags = [*sizes, *TOKENIZERS[kind], f"--out_dir={tmp_path}"]
    trainer = train_tokenizer.build(parse(TokenizerTrainConfig, flags), ALONE)
    with fake_gpu():
        for module in (trainer.model, *trainer.auxiliary.values()):
            on_gpu(module)
        trainer.counted = trainer.use.counts.clone()
        trainer.precision = Precision("bf16", GPU)
        images, labels = torch.rand(4, 3, 16, 16, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
        assert trainer.micro_loss(images, labels)[0].device == GPU


def test_a_tokenizer_that_comes_to_a_gpu_lies_row_by_row(vae):
    moving = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    first = moving.encoder.conv_in.weight
    assert not first.is_contiguous()
    with FakeTensorMode():
        moving._apply(lambda t: torch.empty_strided(t.shape, t.stride(), device=GPU))  # as `to` does
        assert moving.encoder.conv_in.weight.is_contiguous()


def test_features_of_the_evaluation():
    network = EfficientNetLite()
    with fake_gpu(), torch.no_grad():
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
        assert on_gpu(network).pooled(images).device == network.tapped.device == GPU

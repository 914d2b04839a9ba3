import pytest
import torch
import torch.nn.functional as F

from models import SamplingConfig, SARPipeline
from models.head import sample_tokens
from models.sampling import generate_scales, image_uniforms
from models.scales import ScaleSchedule, shift_all
from utils.config.training import DataConfig
from utils.data.datasets import encode_batch, open_dataset, plain_images
from utils.evaluations import exposure_bias
from utils.evaluations.exposure_bias import Exposure, ValidationSet


@pytest.fixture
def data(saved):
    return ValidationSet.of(str(saved), DataConfig(dataset="digits"), n=11)


def test_the_three_likelihoods_by_their_definitions(saved, data):
    """Written out: every logit kept, one pass a case, all images at once."""
    pipeline, schedule = SARPipeline.from_pretrained(saved), ScaleSchedule((1, 2, 3, 4))
    images, labels = plain_images(open_dataset(DataConfig(dataset="digits"), 64, 0, "val"), 11)
    truth = encode_batch(pipeline.vae, images, labels, schedule).tokens(schedule)
    assert torch.equal(data.tokens, truth)
    assert torch.equal(data.labels, labels)
    model, codebook = pipeline.model, pipeline.vae.codebook
    uniforms = image_uniforms(range(5, 16), schedule.total, torch.device("cpu"))

    @torch.no_grad()
    def nll(fed):
        logits = model(labels, shift_all(fed, codebook, schedule), schedule)
        losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view_as(truth)
        return [part.mean().item() for part in schedule.split(losses)], logits

    forced, logits = nll(truth)
    drawn = sample_tokens(logits, 0, 0.0, uniforms)  # each scale after true coarser ones
    one_step = [forced[0]]
    for i in range(1, 4):
        fed, before = truth.clone(), schedule.span(i - 1)
        fed[:, before] = drawn[:, before]
        one_step.append(nll(fed)[0][i])
    free = SamplingConfig()
    with torch.no_grad():
        own = torch.cat(
            [c for _, c in generate_scales(model, pipeline.vae.pathway, labels, schedule, free, uniforms)], dim=1
        )
    found = Exposure.of(data, seed=5)
    assert found.forced == pytest.approx(forced, rel=1e-5)
    assert found.one_step == pytest.approx(one_step, rel=1e-5)
    assert found.own == pytest.approx(nll(own)[0], rel=1e-5)
    assert found.gaps("one_step")[0] == found.gaps("own")[0] == 0
    assert found.one_step[1] == pytest.approx(found.own[1], rel=1e-6)  # one scale before it: the same case
    assert found.one_step[3] != pytest.approx(found.own[3], rel=1e-3)
    assert torch.equal(data.predictions(truth), logits.argmax(-1))
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert data.entropy() == pytest.approx([part.mean().item() for part in schedule.split(entropy)], rel=1e-4)


def test_numbers_do_not_depend_on_the_batch(data, monkeypatch):
    before = Exposure.of(data, seed=0)
    monkeypatch.setattr(exposure_bias, "BATCH", 3)
    after = Exposure.of(data, seed=0)
    for kind in ("forced", "one_step", "own"):
        assert getattr(after, kind) == pytest.approx(getattr(before, kind), rel=1e-5)


def test_many_images_never_meet_in_memory(saved, monkeypatch):
    """No pass sees more than a batch, and no tensor of logits holds more than a chunk of it."""
    monkeypatch.setattr(exposure_bias, "BATCH", 4)
    data, seen = ValidationSet.of(str(saved), DataConfig(dataset="digits"), n=30), []
    data.pipeline.model.blocks[0].register_forward_hook(lambda _, x, y: seen.append(len(x[0])))
    heads = []
    data.pipeline.model.head.register_forward_hook(lambda _, x, y: heads.append(y.numel()))
    Exposure.of(data, seed=0)
    assert max(seen) == 4
    assert max(heads, default=0) <= 4 * 16 * 128  # of the walk's last scale


def test_codes_are_made_as_the_model_was_trained_on_them(saved, tmp_path):
    pipeline = SARPipeline.from_pretrained(saved)
    SARPipeline.of(pipeline.vae, pipeline.model, pipeline.schedule, supervision="image").save_pretrained(tmp_path / "p")
    data, digits = (
        ValidationSet.of(str(tmp_path / "p"), DataConfig(dataset="digits"), n=3),
        DataConfig(dataset="digits"),
    )
    images, labels = plain_images(open_dataset(digits, 64, 0, "val"), 3)
    wanted = encode_batch(pipeline.vae, images, labels, pipeline.schedule, "image").tokens(pipeline.schedule)
    assert torch.equal(data.tokens, wanted)
    assert not torch.equal(ValidationSet.of(str(saved), digits, n=3).tokens, wanted)

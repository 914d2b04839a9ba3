import copy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from models import Guidance, SamplingConfig
from models.editing import hold_known, inpaint, place_on_canvas
from models.pipeline import SARPipeline, to_pil


@pytest.fixture
def half(expected):
    """The reference images, and a mask of their right halves."""
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 32:] = 1
    return expected["images"], mask


def paint(model, vae, images, masks, labels, schedule, seeds=(0, 1)):
    return inpaint(
        model, vae, images, masks, torch.tensor(labels), schedule, SamplingConfig(Guidance("ramp", 1.5), 20, 0.9), seeds
    )


def test_the_known_region_is_unchanged_and_the_rest_is_painted(vae, model, half, schedule):
    images, masks = half
    painted = paint(model, vae, images, masks, [1, 2], schedule)
    assert torch.equal(painted[..., :32], images[..., :32])
    assert (painted[..., 32:] - images[..., 32:]).abs().mean() > 0.05
    trained = copy.deepcopy(vae).requires_grad_()  # no graph, whatever the tokenizer's weights want
    assert not paint(model, trained, images, masks, [1, 2], schedule).requires_grad
    again = paint(model, vae, images, masks, [1, 2], schedule, seeds=(5, 6))
    assert not torch.equal(again, painted)
    assert painted.abs().max() <= 1


def test_masks_of_all_and_nothing(vae, model, half, schedule):
    images, masks = half
    assert torch.equal(paint(model, vae, images, torch.zeros_like(masks), [1, 2], schedule), images)
    everything = paint(model, vae, images, torch.ones_like(masks), [1, 2], schedule)
    other = paint(model, vae, -images, torch.ones_like(masks), [1, 2], schedule)
    assert torch.equal(everything, other)  # nothing of the picture is left


def test_which_codes_are_held(vae, half, schedule):
    images, masks = half
    edit = hold_known(vae, images, masks, schedule)
    latent = vae.encode(images)
    for s in schedule.sides:
        drawn = torch.full((2, s * s), -1)
        held = edit(s, drawn).view(2, s, s) >= 0
        known = vae.codes(latent, s).view(2, s, s)
        assert torch.equal(edit(s, drawn).view(2, s, s)[held], known[held])
        # half of the one coarsest cell is masked, and its bound is just below a half: it is repainted
        columns = {1: [False], 2: [True, False], 3: [True, False, False], 4: [True, True, False, False]}[s]
        assert held[0, 0].tolist() == columns


def test_held_codes_are_those_of_the_models_training(vae, model, half, schedule):
    images, masks = half
    pipeline = SARPipeline.of(vae, model, schedule, supervision="image")
    edit = hold_known(vae, images, masks, schedule, pipeline.supervision)
    for s in schedule.sides:
        small = F.interpolate(images, (16 * s, 16 * s), mode="area")
        drawn = torch.full((2, s * s), -1)
        held = edit(s, drawn) >= 0
        assert torch.equal(edit(s, drawn)[held], vae.codes(vae.encode(small), s)[held])
    with patch("models.editing.hold_known", wraps=hold_known) as holding:  # as a pipeline paints
        pipeline.inpaint(to_pil(images[:1])[0], to_pil_image(masks[0]), 3)
    assert holding.call_args.args[-1] == "image"


def test_out_painting_keeps_the_picture_in_the_middle(vae, model, expected, schedule):
    canvas, mask = place_on_canvas(expected["images"], 0.5)
    assert mask[0, 0].sum() == 64 * 64 - 32 * 32
    painted = paint(model, vae, canvas, mask, [1, 2], schedule)
    assert torch.equal(painted[..., 16:48, 16:48], canvas[..., 16:48, 16:48])
    with pytest.raises(ValueError, match=r"got 1\.5"):
        place_on_canvas(expected["images"], 1.5)


def test_wrong_sizes_are_named(vae, model, half, schedule):
    images, masks = half
    with pytest.raises(ValueError, match=r"mask must be \(2, 1, 64, 64\)"):
        paint(model, vae, images, masks[..., :32], [1, 2], schedule)
    with pytest.raises(ValueError, match="these scales make 64×64 images"):
        paint(model, vae, images[..., :32], masks[..., :32], [1, 2], schedule)
    pipeline = SARPipeline.of(vae, model, schedule)
    with pytest.raises(ValueError, match="they must have one size"):
        pipeline.inpaint(Image.new("RGB", (64, 64)), Image.new("L", (32, 32)), 3)

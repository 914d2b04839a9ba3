"""d16 and the VQ-16 tokenizer, filled by the reference recipe, against the slow forms of tests/reference.py.

The slow forms equal the released implementation where its numbers are there (the small models, first test).
"""

import pytest
import torch

from models import DEFAULT_SCHEDULE, VQVAE, FlexVAR, Guidance, SamplingConfig
from models.sampling import sample_codes
from models.scales import shift_all
from tests import reference
from tests.conftest import fill, worst


@torch.no_grad()
def test_the_slow_forms_equal_the_released_implementation(vae, model, expected):
    v, m, sides = vae.state_dict(), model.state_dict(), (1, 2, 3, 4)
    latent = reference.encode(v, expected["images"])
    assert worst(latent, expected["vae.latent"]) < 1e-5
    codes = [reference.codes_of(v, latent, s) for s in sides]
    assert torch.equal(torch.cat(codes, 1), expected["vae.codes"])
    assert worst(reference.decode(v, codes[-1], 4), expected["vae.reconstruction"]) < 2e-5
    inputs = reference.inputs_of(reference.codebook_of(v), codes, sides)
    assert worst(torch.cat(inputs, 1), expected["teacher.inputs"]) < 1e-5
    assert worst(reference.forward(m, expected["labels"], inputs, sides), expected["teacher.logits"]) < 1e-5
    tokens = reference.greedy(m, reference.codebook_of(v), expected["labels"], sides, 1.5)
    assert torch.equal(torch.cat(tokens, 1), expected["sample.greedy.ramp1.5.tokens"])


@pytest.fixture(scope="module")
def d16():
    with torch.device("meta"):
        vae, model = VQVAE(), FlexVAR()
    vae, model = (module.to_empty(device="cpu") for module in (vae, model))
    for name, buffer in [*vae.named_buffers(), *model.named_buffers()]:
        assert name.endswith(("codebook_used", "zero_k_bias"))
        buffer.zero_()
    return fill(vae, 11), fill(model, 12)


@torch.no_grad()
def test_codes_logits_and_greedy_tokens_at_all_ten_scales(d16):
    vae, model = d16
    v, m, schedule = vae.state_dict(), model.state_dict(), DEFAULT_SCHEDULE
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(13)) * 2 - 1
    labels = torch.tensor([207])
    latent, slow_latent = vae.encode(images), reference.encode(v, images)
    assert worst(latent, slow_latent) < 1e-5
    codes = [reference.codes_of(v, slow_latent, s) for s in schedule.sides]
    for s, wanted in zip(schedule.sides, codes, strict=True):
        assert torch.equal(vae.codes(slow_latent, s), wanted)
    assert worst(vae.decode(codes[-1], 16), reference.decode(v, codes[-1], 16)) < 2e-5
    inputs = reference.inputs_of(reference.codebook_of(v), codes, schedule.sides)
    found = model(labels, shift_all(torch.cat(codes, 1), vae.codebook, schedule), schedule)
    assert worst(found, reference.forward(m, labels, inputs, schedule.sides)) < 1e-5
    slow = reference.greedy(m, reference.codebook_of(v), labels, schedule.sides, 2.5)
    fast = sample_codes(model, vae.pathway, labels, schedule, SamplingConfig(Guidance("ramp", 2.5), 1), [0])
    for s, wanted in zip(schedule.sides, slow, strict=True):
        assert torch.equal(fast[s], wanted), s

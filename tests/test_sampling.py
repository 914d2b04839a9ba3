import pytest
import torch

from models.head import sample_tokens
from models.sampling import (
    Guidance,
    SamplingConfig,
    evaluating,
    generate,
    generate_scales,
    image_uniforms,
    sample_codes,
)
from models.scales import ScaleSchedule, shift_all
from tests.conftest import worst

CASES = {
    "ramp1.5": (Guidance("ramp", 1.5), (1, 2, 3, 4)),
    "constant1.5": (Guidance("constant", 1.5), (1, 2, 3, 4)),
    "none": (Guidance("none"), (1, 2, 3, 4)),
    "larger": (Guidance("ramp", 1.5), (1, 2, 3, 4, 6)),
    "fewer_steps": (Guidance("ramp", 1.5), (1, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_and_images_equal_the_released_ones(case, vae, model, expected):
    guidance, sides = CASES[case]
    schedule = ScaleSchedule(sides)
    codes = sample_codes(model, vae.pathway, expected["labels"], schedule, SamplingConfig(guidance, 1), [0, 1])
    tokens = torch.cat([codes[s] for s in sides], dim=1)
    assert torch.equal(tokens, expected[f"sample.greedy.{case}.tokens"])
    images = generate(model, vae, expected["labels"], schedule, SamplingConfig(guidance, 1), [0, 1])
    assert torch.equal(images, vae.decode(codes[sides[-1]], sides[-1]))
    if f"sample.greedy.{case}.images" in expected:
        wanted = expected[f"sample.greedy.{case}.images"]
        stride = images.shape[-1] // wanted.shape[-1]  # a part of the larger ones is stored
        assert worst(images[..., ::stride, ::stride], wanted) < 2e-5


def kept_by_definition(logits, top_k, top_p):
    """One row: top-k with ties, then the tokens whose ascending cumulative probability exceeds 1 - p."""
    kept = list(range(len(logits)))
    if top_k:
        bound = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = [i for i in kept if logits[i] >= bound]
    mass = {i: torch.tensor(logits[i], dtype=torch.float64).exp().item() for i in kept}
    total = sum(mass.values())
    if top_p:
        cumulative, nucleus = 0.0, []
        for i in sorted(kept, key=lambda i: mass[i]):
            cumulative += mass[i] / total
            if cumulative > 1 - top_p + 1e-9:
                nucleus.append(i)
        kept = nucleus or [max(kept, key=lambda i: mass[i])]
    total = sum(mass[i] for i in kept)
    return {i: mass[i] / total for i in kept}


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.0), (0, 0.8), (5, 0.0), (5, 0.9), (40, 0.5), (999, 0.95), (3, 0.01), (2, 1.0)]
)
def test_tokens_are_drawn_from_the_defined_distribution(top_k, top_p):
    torch.manual_seed(top_k)
    logits = torch.randn(40) * 2
    n = 20_000
    uniforms = (torch.arange(n) + 0.5) / n  # an even grid: frequencies are exact to 1/n
    tokens = sample_tokens(logits.expand(n, -1), top_k, top_p, uniforms)
    wanted = kept_by_definition(logits.tolist(), top_k, top_p)
    frequencies = tokens.bincount(minlength=40) / n
    for i in range(40):
        assert frequencies[i].item() == pytest.approx(wanted.get(i, 0.0), abs=2e-4)


def test_top_k_keeps_ties():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert set(sample_tokens(logits.expand(4000, -1), 2, 0.0, uniforms).tolist()) == {0, 1, 2, 3}
    assert set(sample_tokens(torch.zeros(4000, 7), 3, 0.9, uniforms).tolist()) == set(range(7))


@pytest.mark.parametrize("top_k", [0, 50])
def test_extreme_uniforms_land_on_kept_tokens(top_k):
    torch.manual_seed(0)
    logits = torch.randn(500, 8912) * 3
    for u in (0.0, 1 - 2**-24):
        tokens = sample_tokens(logits, top_k, 0.9, torch.full((500,), u))
        chosen = logits.gather(1, tokens[:, None])
        assert (chosen >= logits.topk(top_k or 8912).values[:, -1:]).all()


def test_logits_are_never_written():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 100)
    before = logits.clone()
    for top_k, top_p in [(1, 0.0), (10, 0.9), (0, 0.9), (10, 0.0), (0, 0.0)]:
        sample_tokens(logits, top_k, top_p, torch.rand(3, 5))
        assert torch.equal(logits, before)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.5), (5, 1.5), (5, -0.1)])
def test_wrong_cutoffs_are_named(top_k, top_p):
    with pytest.raises(ValueError, match="top_k"):
        sample_tokens(torch.zeros(1, 4), top_k, top_p, torch.rand(1))


def test_guidance_weights_by_their_definitions():
    sides = tuple(range(1, 13))  # twelve scales: the ramp passes its end at the tenth
    ramp = Guidance("ramp", 2.0).weights(sides)
    assert ramp == pytest.approx([2.0 * i / 9 for i in range(12)])
    assert Guidance("ramp", 2.0).weights((1, 2, 4)) == pytest.approx([0, 1, 2])
    assert Guidance("ramp", 2.0).weights((5,)) == [0.0]
    assert Guidance("ramp", 2.0).weights((1, 8, 16, 24), max_pn=8) == pytest.approx([0, 2 / 3, 2.0, 2.0])
    assert Guidance("half_ramp", 3.0).weights((1, 2, 3)) == pytest.approx([1.5, 2.25, 3.0])
    assert Guidance("half_ramp", 1.0).weights((1, 2, 3)) == [0, 0, 0]
    assert Guidance("constant", 2.5).weights((1, 2)) == [1.5, 1.5]
    assert Guidance("none").weights((1, 2)) == [0, 0]
    with pytest.raises(ValueError, match="'cosine'"):
        Guidance("cosine", 1.0)


@torch.no_grad()
def test_cached_logits_equal_the_masked_forward(vae, model, expected):
    schedule = ScaleSchedule((1, 2, 3, 5, 8, 13))  # over 160 tokens: both kinds of attention group
    labels, uniforms = expected["labels"], image_uniforms([3, 4], schedule.total, torch.device("cpu"))
    scales = generate_scales(
        model, vae.pathway, labels, schedule, SamplingConfig(top_k=20, top_p=0.9, max_pn=None), uniforms
    )
    codes = torch.cat([c for _, c in scales], dim=1)
    inputs = shift_all(codes, vae.codebook, schedule)
    masked = model(labels, inputs, schedule)
    state = model.init_cache(labels, schedule.total)
    parts = [None, *inputs.split(schedule.lengths[1:], dim=1)]
    stepped = [model.decode_scale(state, part, s) for part, s in zip(parts, schedule.sides, strict=True)]
    assert worst(torch.cat(stepped, dim=1), masked) < 1e-5
    redrawn = sample_tokens(masked, 20, 0.9, uniforms)
    greedy = torch.isin(
        torch.tensor(schedule.sides).repeat_interleave(torch.tensor(schedule.lengths)), torch.tensor([13])
    )
    assert torch.equal(redrawn[:, ~greedy], codes[:, ~greedy])


def test_an_image_depends_on_its_own_seed_only(vae, model, schedule):
    def draw(labels, seeds):
        how = SamplingConfig(Guidance("ramp", 2.0), 50, 0.95)
        return sample_codes(model, vae.pathway, torch.tensor(labels), schedule, how, seeds)[4]

    together = draw([1, 2, 3, 1], [10, 11, 12, 13])
    assert torch.equal(draw([3], [12])[0], together[2])
    assert torch.equal(draw([2, 1], [11, 10]), together[[1, 0]])
    assert not torch.equal(together[0], together[3])


def test_odd_and_large_sides_are_taken_greedily(vae, model):
    schedule, labels = ScaleSchedule((1, 4, 7)), torch.tensor([1])

    def draw(seed, max_pn=16, edit=None):
        return sample_codes(model, vae.pathway, labels, schedule, SamplingConfig(max_pn=max_pn), [seed], edit)

    held = {}

    def hold(s, codes):  # the same codes at sides 1 and 4, whatever the seed
        return held.setdefault(s, codes) if s != 7 else codes

    assert torch.equal(draw(0, edit=hold)[7], draw(1, edit=hold)[7])
    assert not torch.equal(draw(0)[4], draw(1)[4])
    held.clear()
    assert torch.equal(draw(0, max_pn=3)[4], draw(0, max_pn=3)[4])
    first = draw(0, max_pn=3)
    held[1] = first[1]
    assert torch.equal(draw(5, max_pn=3, edit=lambda s, c: held.get(s, c))[4], first[4])


def test_without_a_bound_every_side_is_drawn(vae, model):
    schedule, labels = ScaleSchedule((1, 7)), torch.tensor([1])
    config = SamplingConfig()
    draws = [sample_codes(model, vae.pathway, labels, schedule, config, [seed])[7] for seed in (0, 1)]
    assert (draws[0] != draws[1]).float().mean() > 0.3


def test_a_walk_that_stops_early_draws_the_same_and_computes_no_more(vae, model, schedule):
    labels, sides = torch.tensor([1, 2]), []
    model.blocks[0].register_forward_hook(lambda _, x, y: sides.append(x[0].shape[1]))
    draw = SamplingConfig(Guidance("ramp", 2.0), 20, 0.9)
    whole = sample_codes(model, vae.pathway, labels, schedule, draw, [3, 4])
    sides.clear()
    part = sample_codes(model, vae.pathway, labels, schedule, draw, [3, 4], until=2)
    assert sides == [1, 4]
    assert list(part) == [1, 2]
    assert all(torch.equal(part[s], whole[s]) for s in part)


def test_logits_that_are_not_numbers_give_tokens_all_the_same():
    tokens = sample_tokens(torch.full((3, 7), torch.nan), 5, 0.9, torch.rand(3))
    assert ((tokens >= 0) & (tokens < 7)).all()


def test_modes_come_back_even_after_an_exception(vae, model, schedule):
    model.train()

    def fail(s, codes):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, vae, torch.tensor([1]), schedule, SamplingConfig(top_k=1), [0], edit=fail)
    assert model.training
    with evaluating(model):
        assert not model.training
    assert model.training


def test_wrong_requests_are_named(vae, model, schedule):
    for labels, seeds, message in [([10], [0], "10 is out of range"), ([1, 2], [0], "2 labels, 1 seeds")]:
        with pytest.raises(ValueError, match=message):
            generate(model, vae, torch.tensor(labels), schedule, SamplingConfig(top_k=1), seeds)

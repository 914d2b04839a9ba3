import pytest
import torch
import torch.nn.functional as F

from models.residual_pathway import phi_of, soft_embeddings
from models.residual_vqvae import ResidualVQVAE, ResidualVQVAEConfig
from models.scales import ScaleSchedule
from models.weights import load_tokenizer, read_state_dict, save_weights
from tests import recipes
from tests.conftest import manifest

# Which φ a scale gets, by the number of scales: read off the released implementation.
PHI = {
    3: "023", 4: "0123", 5: "01223", 6: "001233", 7: "0012233", 8: "00112233", 9: "001122233", 10: "0011122333",
    11: "00011222333",
}  # fmt: skip
SCHEDULE = ScaleSchedule((1, 2, 3, 4, 5))  # five scales: the middle one is a tie


@pytest.fixture(scope="module")
def residual() -> ResidualVQVAE:
    config = ResidualVQVAEConfig(32, (1, 1, 2), 1, z_channels=8, codebook_size=64, codebook_dim=8, counted_scales=5)
    return recipes.fill(config.build(), 5, recipes.var_value).requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return recipes.plain_images(3, 3, 20)


@pytest.mark.parametrize("scales", PHI)
def test_ties_between_ticks_fall_as_released(scales):
    assert "".join(str(phi_of(i, scales)) for i in range(scales)) == PHI[scales]


def test_one_scale_is_no_division_by_zero(residual, images):
    codes = residual.tokenize(images[..., :4, :4], (1,))
    assert residual.decode_at(codes, 1, ScaleSchedule((1,))).shape == (3, 3, 4, 4)


def residual_of(vae, i, codes, sides):
    """φ(bicubic(E[c])), one image and one scale at a time."""
    rows, table = vae.quantize.embedding.weight, PHI[len(sides)]
    conv = vae.quantize.quant_resi["qresi_ls"][int(table[i])]
    out = []
    for image in codes:
        grid = torch.stack([rows[c] for c in image]).T.reshape(1, -1, sides[i], sides[i])
        if sides[i] != sides[-1]:
            grid = F.interpolate(grid, (sides[-1], sides[-1]), mode="bicubic")
        out.append((grid + F.conv2d(grid, conv.weight, conv.bias, padding=1)) / 2)
    return torch.cat(out)


def vectors(maps, s):
    return F.adaptive_avg_pool2d(maps, s).flatten(2).transpose(1, 2)


def test_codes_and_inputs_by_their_definitions(residual, images):
    sides, rows = SCHEDULE.sides, residual.quantize.embedding.weight
    latent, codes = residual.encode(images), residual.tokenize(images, SCHEDULE.sides)
    canvas, inputs = torch.zeros_like(latent), []
    for i, s in enumerate(sides):
        if i:
            inputs.append(vectors(canvas, s))
        rest = vectors(latent - canvas, s)
        distance = (rest.unsqueeze(2) - rows).square().sum(-1)  # (B, s², V)
        assert torch.equal(distance.argmin(-1), codes[s])
        canvas = canvas + residual_of(residual, i, codes[s], sides)
        assert torch.allclose(residual.decode_at(codes, s, SCHEDULE), residual.decode_maps(canvas), atol=1e-4)
    tokens = torch.cat(list(codes.values()), dim=1)
    pathway = residual.pathway
    assert torch.allclose(pathway.inputs(tokens, SCHEDULE), torch.cat(inputs, 1), atol=1e-5)
    assert torch.allclose(pathway.inputs(tokens, SCHEDULE, first=3), torch.cat(inputs[2:], 1), atol=1e-5)
    filled = pathway.canvas(SCHEDULE)
    added = [filled.add(i, codes[s]) for i, s in enumerate(sides)]
    assert added[-1] is None
    assert torch.allclose(torch.cat(added[:-1], 1), pathway.inputs(tokens, SCHEDULE), atol=1e-6)


def test_both_readings_of_the_second_pass_by_their_definitions(residual):
    generator = torch.Generator().manual_seed(1)
    drawn, truth = (torch.randint(64, (2, SCHEDULE.total), generator=generator) for _ in range(2))
    own, true = ([residual_of(residual, i, p, SCHEDULE.sides) for i, p in enumerate(SCHEDULE.split(x))]
                 for x in (drawn, truth))  # fmt: skip
    inputs = residual.pathway.inputs
    readings = {
        "accumulated": (inputs(drawn, SCHEDULE), [sum(own[:i]) for i in range(1, 5)]),
        "one step": (inputs(drawn, SCHEDULE, truth), [sum(true[: i - 1]) + own[i - 1] for i in range(1, 5)]),
    }
    rows = residual.quantize.embedding.weight
    for name, (found, canvases) in readings.items():
        wanted = [
            F.adaptive_avg_pool2d(c, s).flatten(2).transpose(1, 2) for c, s in zip(canvases, (2, 3, 4, 5), strict=True)
        ]
        assert torch.allclose(found, torch.cat(wanted, 1), atol=1e-5), name
        targets = residual.pathway.requantised(drawn, truth, SCHEDULE, one_step=name == "one step")
        assert torch.equal(targets[:, :1], drawn[:, :1])
        for i, canvas in enumerate(canvases, start=1):
            left = vectors(sum(true[:i]) + own[i] - canvas, SCHEDULE.sides[i])
            nearest = (left.unsqueeze(2) - rows).square().sum(-1).argmin(-1)
            assert torch.equal(targets[:, SCHEDULE.span(i)], nearest), (name, i)
    assert torch.allclose(readings["accumulated"][0][:, :4], readings["one step"][0][:, :4])  # at scale 2 they agree
    assert not torch.allclose(readings["accumulated"][0][:, 4:13], readings["one step"][0][:, 4:13], atol=1e-3)


def test_half_precision_and_training_do_not_change_codes_or_inputs(residual, images):
    tokens = torch.cat(list(residual.tokenize(images, SCHEDULE.sides).values()), 1)
    wanted = residual.pathway.inputs(tokens, SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.cat(list(residual.tokenize(images, SCHEDULE.sides).values()), 1), tokens)
        assert torch.equal(residual.pathway.inputs(tokens, SCHEDULE), wanted)


def test_soft_embeddings_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    logits, rows, gumbel = (torch.randn(*shape, generator=generator) for shape in ((2, 7), (7, 3), (2, 7)))
    logits[0, 2] = -torch.inf
    for progress, tau in ((0.0, 0.27), (0.5, 0.27 * 0.525), (1.0, 0.0135)):
        weights = ((logits * (1 + progress) + gumbel) / tau).double().exp()
        wanted = (weights / weights.sum(1, keepdim=True)) @ rows.double()
        assert torch.allclose(soft_embeddings(logits, rows, progress, gumbel).double(), wanted, atol=1e-5)


def test_images_of_another_size_and_supervision_are_named(residual, images):
    with pytest.raises(ValueError, match=r"the scales end at side 4, the latent has \(5, 5\)"):
        residual.tokenize(images, (1, 4))
    with pytest.raises(ValueError, match="--supervision latent"):
        residual.tokenize(images, SCHEDULE.sides, "image")


def test_full_size_keys_and_shapes_are_those_of_the_released_file():
    with torch.device("meta"):
        vae = ResidualVQVAE()
    assert {name: list(t.shape) for name, t in vae.state_dict().items()} == manifest()["vae_ch160v4096z32.pth"][
        "tensors"
    ]
    assert round(sum(p.numel() for p in vae.parameters()) / 1e5) == 1089


@pytest.mark.parametrize("counted", [None, 3, 10])
def test_usage_statistics_may_be_of_any_number_of_scales(counted, residual, images, tmp_path):
    weights = dict(residual.state_dict())
    del weights["quantize.ema_vocab_hit_SV"]
    if counted is not None:
        weights["quantize.ema_vocab_hit_SV"] = torch.rand(counted, 64)
    torch.save(weights, tmp_path / "vae.pth")
    loaded = load_tokenizer(tmp_path / "vae.pth")
    wanted = residual.tokenize(images, SCHEDULE.sides)
    assert all(torch.equal(loaded.tokenize(images, SCHEDULE.sides)[s], wanted[s]) for s in wanted)
    own = ResidualVQVAEConfig(**{**vars(residual.config), "counted_scales": 5}).build()
    own.load_state_dict(torch.load(tmp_path / "vae.pth"), strict=True)
    save_weights(loaded, tmp_path / "again.safetensors")
    assert read_state_dict(tmp_path / "again.safetensors").keys() >= weights.keys() - {"quantize.ema_vocab_hit_SV"}


def test_another_number_of_phi_is_refused(residual, tmp_path):
    weights = {k: v for k, v in residual.state_dict().items() if "qresi_ls.3" not in k}
    torch.save(weights, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="its scales share 3 convolutions; 4 are known here"):
        load_tokenizer(tmp_path / "vae.pth")


def test_known_codes_make_up_for_what_coarser_scales_were_given(residual, images):
    """Held codes, after strange ones at the coarse scales, bring the canvas nearer to the latent than its own would."""
    latent, codes = residual.encode(images), residual.tokenize(images, SCHEDULE.sides)
    known = residual.known(images, SCHEDULE, "latent")
    followed, kept = (residual.pathway.canvas(SCHEDULE) for _ in range(2))
    for i, s in enumerate(SCHEDULE.sides):
        strange = torch.full((3, s * s), 7)
        mine = strange if i < 2 else known.at(s)
        known.add(s, mine)
        followed.add(i, mine)
        kept.add(i, strange if i < 2 else codes[s])
    errors = [(c.maps - latent).square().mean().item() for c in (followed, kept)]
    assert errors[0] < 0.85 * errors[1]

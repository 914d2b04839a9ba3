import pytest
import torch
import torch.nn.functional as F

from models.kl_vae import KLAutoencoder, KLConfig, from_diffusers, to_tokens
from models.scales import ScaleSchedule
from models.weights import load_tokenizer, save_weights
from tests import recipes
from tests.conftest import manifest, tool
from utils.config.training import DataConfig
from utils.data.datasets import open_dataset, plain_batches
from utils.tokenizer import scaling

SCHEDULE = ScaleSchedule((1, 2, 4))
FILES = {
    "kl16.ckpt (MAR)": (KLConfig(), 66_456_019, 0.2325),
    "kl-f16 (latent-diffusion)": (KLConfig(decoder_attention=(4,)), 69_610_963, 0.0),
    "kl-f8 / eq-vae-ldm (latent-diffusion)": (
        KLConfig(width_mult=(1, 2, 4, 4), z_channels=4, encoder_attention=()), 83_653_863, 0.18215,
    ),
}  # fmt: skip


def kl(**more) -> KLAutoencoder:
    sizes = {"base_width": 32, "width_mult": (1, 1, 2), "res_blocks": 1, "z_channels": 4, "encoder_attention": (2,)}
    return recipes.fill(KLConfig(**{**sizes, "scaling": 0.7, **more}).build(), 5, recipes.flowar_value)


@pytest.mark.parametrize("name", FILES)
def test_full_size_keys_shapes_and_scaling_are_those_of_the_published_files(name):
    config, parameters, factor = FILES[name]
    with torch.device("meta"):
        vae = config.build()
    wanted = manifest()[name]["tensors"]
    assert {key: list(t.shape) for key, t in vae.state_dict().items()} == wanted
    assert sum(p.numel() for p in vae.parameters()) == parameters
    assert KLConfig(**KLConfig.sizes_of(vae.state_dict())) == config
    assert config.scaling == factor
    assert (config.patch, config.factor, config.codebook_dim) == ((2, 16, 16) if "f8" in name else (1, 16, 16))


def test_diffusers_names_are_latent_diffusions():
    wanted = manifest()["kl-f8 / eq-vae-ldm (latent-diffusion)"]["tensors"]
    given = {
        name: torch.empty(shape, device="meta")
        for name, shape in manifest()["eq-vae / sd-vae (diffusers)"]["tensors"].items()
    }
    assert {name: list(t.shape) for name, t in from_diffusers(given).items()} == wanted


def as_diffusers(weights: dict, old: bool) -> dict:
    """A state dict of three levels under diffusers' names, by a table of its own."""
    found = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        words = rest.split(".")
        if words[0] in ("down", "up"):
            level = int(words[1]) if words[0] == "down" else 2 - int(words[1])
            inner = {"block": f"resnets.{words[3]}", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[
                words[2]
            ]
            tail = words[4:] if words[2] == "block" else words[3:]
            rest = ".".join([f"{words[0]}_blocks.{level}", inner, *tail])
        elif words[0] == "mid":
            names = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
            attention = dict(zip(("q", "k", "v", "proj_out"), names, strict=True), norm="group_norm")
            if words[1] == "attn_1":
                rest = ".".join(["mid_block.attentions.0", attention[words[2]], words[3]])
                tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
            else:
                rest = ".".join([f"mid_block.resnets.{int(words[1][-1]) - 1}", *words[2:]])
        rest = rest.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
        found[f"{part}.{rest}" if rest else name] = tensor
    return found


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict with losses", "diffusers", "old diffusers"])
def test_every_container_and_layout_gives_the_same_autoencoder(layout, tmp_path):
    vae = kl(encoder_attention=())
    weights = dict(vae.state_dict())
    content = {
        "bare": weights,
        "model": {"model": weights},
        "state_dict with losses": {
            "state_dict": {**weights, "loss.logvar": torch.zeros(()), "loss.net.w": torch.ones(2)}
        },
        "diffusers": as_diffusers(weights, old=False),
        "old diffusers": as_diffusers(weights, old=True),
    }[layout]
    torch.save(content, tmp_path / "vae.ckpt")
    found = load_tokenizer(tmp_path / "vae.ckpt", scaling=0.7)
    assert isinstance(found, KLAutoencoder)
    assert found.config == vae.config
    assert all(torch.equal(t, weights[name]) for name, t in found.state_dict().items())


def test_what_else_is_in_a_file_is_refused(tmp_path):
    torch.save({**kl().state_dict(), "discriminator.w": torch.ones(1)}, tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=r"unexpected: discriminator\.w"):
        load_tokenizer(tmp_path / "vae.ckpt")


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_patches_of_resized_latents(patch):
    vae, images = kl(patch=patch), recipes.plain_images(1, 2, 16 * patch)
    mean, log_variance = vae.moments(images)
    found = vae.from_moments({4: (mean, log_variance)}, SCHEDULE.sides, sample=False)
    for s in SCHEDULE.sides:
        maps = F.adaptive_avg_pool2d(mean * 0.7, s * patch)
        for place in range(s * s):
            row, column = divmod(place, s)
            square = maps[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            assert torch.allclose(found[s][:, place], square.flatten(1), atol=1e-6)
    assert torch.allclose(vae.decode_at(found, 4, SCHEDULE), vae.decode_maps(mean), atol=1e-4)


def test_inputs_go_up_and_down_again():
    vae, tokens = kl(patch=2), torch.randn(2, SCHEDULE.total, 16)
    inputs = vae.pathway.inputs(tokens, SCHEDULE)
    second = F.pixel_shuffle(tokens[:, 1:5].transpose(1, 2).unflatten(2, (2, 2)), 2)  # (2, 4, 4, 4)
    full = F.interpolate(second, (8, 8), mode="bicubic")
    assert torch.allclose(inputs[:, 4:], to_tokens(full, 2), atol=1e-6)
    first = F.interpolate(
        F.pixel_shuffle(tokens[:, :1].transpose(1, 2).unflatten(2, (1, 1)), 2), (8, 8), mode="bicubic"
    )
    assert torch.allclose(inputs[:, :4], to_tokens(F.adaptive_avg_pool2d(first, 4), 2), atol=1e-6)
    canvas = vae.pathway.canvas(SCHEDULE)
    assert torch.equal(canvas.add(1, tokens[:, 1:5]), inputs[:, 4:])
    assert canvas.add(2, tokens[:, 5:]) is None


def test_noise_is_fresh_comes_before_resizing_and_depends_on_the_seed_alone():
    vae, images = kl(), recipes.plain_images(1, 2, 16)
    torch.manual_seed(3)
    drawn = vae.tokenize(images, SCHEDULE.sides)
    torch.manual_seed(3)
    again = vae.tokenize(images.to(memory_format=torch.channels_last), SCHEDULE.sides)
    assert all(torch.allclose(drawn[s], again[s], atol=1e-5) for s in drawn)
    assert not torch.allclose(vae.tokenize(images, SCHEDULE.sides)[4], drawn[4], atol=1e-2)
    maps = vae.pathway.maps(drawn[4], 4)
    assert torch.allclose(drawn[2], to_tokens(F.adaptive_avg_pool2d(maps, 2), 1), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        assert torch.allclose(vae.tokenize(images, SCHEDULE.sides)[4], drawn[4], atol=1e-5)


def test_image_supervision_encodes_each_size(tmp_path):
    vae, images = kl(), recipes.plain_images(1, 2, 16)
    found = vae.from_moments(vae.moments_of(images, SCHEDULE.sides, "image"), SCHEDULE.sides, sample=False)
    for s in SCHEDULE.sides:
        mean, _ = vae.moments(F.interpolate(images, (4 * s, 4 * s), mode="area"))
        assert torch.allclose(found[s], to_tokens(mean * 0.7, 1), atol=1e-5)


def test_through_pixels_a_scale_is_fed_with_the_picture_before_it(tmp_path):
    vae, images = kl(through_pixels=True), recipes.plain_images(1, 2, 16)
    torch.manual_seed(0)
    tokens = torch.cat(list(vae.tokenize(images, SCHEDULE.sides, "image_pixels").values()), dim=1)
    fed = vae.pathway.inputs(tokens, SCHEDULE)
    shrunk = F.interpolate(F.interpolate(images, (8, 8), mode="area"), (16, 16), mode="bicubic")
    wanted = to_tokens(vae.moments(shrunk)[0] * 0.7, 1)
    assert torch.allclose(fed[:, 4:], wanted, atol=1e-5)  # the mean, whatever noise the targets have
    targets = vae.pathway.own(tokens)
    assert (targets.shape[-1], tokens.shape[-1]) == (4, 8)
    # Samples say nothing of what feeds the next scale: their picture does.
    drawn = vae.pathway.inputs(targets, SCHEDULE)
    picture = vae.decode_at({2: targets[:, 1:5]}, 2, SCHEDULE)
    raised = F.interpolate(picture, (16, 16), mode="bicubic")
    assert torch.allclose(drawn[:, 4:], to_tokens(vae.moments(raised)[0] * 0.7, 1), atol=1e-5)
    assert torch.equal(vae.pathway.canvas(SCHEDULE).add(1, targets[:, 1:5]), drawn[:, 4:])
    held = vae.known(images, SCHEDULE, "image_pixels")
    assert torch.equal(held.at(4), vae.known(images, SCHEDULE, "image").at(4))


@pytest.mark.parametrize("supervision", ["latent", "image", "image_pixels"])
def test_a_cache_holds_moments_in_half_precision(supervision):
    vae, images = kl(), recipes.plain_images(1, 2, 16)
    rows = vae.to_cache(images, SCHEDULE, supervision)
    assert rows.dtype == torch.float16
    assert rows.shape[1] == {"latent": 8 * 16, "image": 8 * 21, "image_pixels": 16 * 21}[supervision]
    torch.manual_seed(1)
    found = vae.from_cache(rows, SCHEDULE, SCHEDULE, supervision)
    torch.manual_seed(1)
    wanted = vae.tokenize(images, SCHEDULE.sides, supervision)
    assert all(torch.allclose(found[s], wanted[s], atol=1e-2) for s in SCHEDULE.sides)


def test_the_divergence_and_the_reconstruction_reach_every_part():
    vae, images = kl().train(), recipes.plain_images(1, 3, 16)
    torch.manual_seed(0)
    found = vae.quantise(images, (4,))
    mean, log_variance = vae.moments(images)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert found.commitment.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.equal(found.real[0], images)
    (F.mse_loss(found.images[0], images) + found.commitment).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_equivariance_turns_and_resizes_latent_and_image_alike():
    vae, images = kl().eval(), recipes.blocky_images(1, 2, 32)
    vae.equivariant, seen = True, {"turned": 0, "resized": 0, "plain": 0}
    for seed in range(120):
        torch.manual_seed(seed)
        with torch.no_grad():
            found = vae.quantise(images, (8,))
        real = found.real[0]
        assert real.shape == found.images[0].shape
        if torch.equal(real, images):
            seen["plain"] += 1
            continue
        upright = F.interpolate(images, real.shape[-2:], mode="bilinear", antialias=True)
        turns = [k for k in range(4) if torch.allclose(real, upright.rot90(k, (2, 3)), atol=1e-5)]
        assert turns, seed
        seen["turned" if turns[0] else "resized"] += 1
    assert 40 <= seen["turned"] <= 80
    assert 5 <= seen["resized"] <= 30
    assert seen["plain"] >= 25


def test_equivariance_goes_with_tokens_of_several_latents():
    """Of 8× down-sampling a token is 2 × 2 latents; what is resized has any number of latents."""
    vae = KLConfig(32, (1, 1, 1, 1), 1, z_channels=4).build().eval()
    vae.equivariant, sides = True, set()
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            sides.add(vae.quantise(recipes.blocky_images(1, 1, 64), (4,)).real[0].shape[-1] // 8)
    assert any(side % 2 for side in sides)
    with pytest.raises(ValueError, match="image sides must be multiples of 16, got"):
        vae.moments(torch.zeros(1, 3, 24, 24))


def test_a_published_scaling_is_not_that_of_ones_own_training(tmp_path):
    """Of equal sizes, but other weights."""
    vae = KLConfig(32, (1, 1, 1, 1), 1, z_channels=4).build()
    save_weights(vae, tmp_path / "published.safetensors")
    assert load_tokenizer(tmp_path / "published.safetensors").scaling == 0.18215
    (tmp_path / "run").mkdir()
    save_weights(vae, tmp_path / "run/own.safetensors")
    (tmp_path / "run/config.json").write_text('{"model": {"pn": "1_2_4"}}')
    own = tmp_path / "run/own.safetensors"
    with pytest.raises(ValueError, match="give it by --latent_scaling"):
        _ = load_tokenizer(own).scaling
    assert load_tokenizer(own, scaling=0.3).scaling == 0.3
    with pytest.raises(ValueError, match="--latent_patch must be at least 0"):
        load_tokenizer(own, scaling=0.3, patch=-1)


def test_measured_scaling_is_one_over_the_deviation_of_drawn_latents(small_kl_file):
    status, out, err = tool(
        scaling.main, "--vae_ckpt", small_kl_file, "--dataset=digits", "--workers=0", "--image_size=16", "--images=200"
    )
    assert status == 0, err
    vae = load_tokenizer(small_kl_file, scaling=1.0)
    views = open_dataset(DataConfig(dataset="digits"), 16, 0, "train")
    torch.manual_seed(0)
    drawn = torch.cat([vae.tokenize(x, (4,))[4] for x, _ in plain_batches(views, 200, 50)])
    assert float(out.split()[-1]) == pytest.approx(1 / drawn.std().item(), rel=0.02)


def test_an_unknown_scaling_is_asked_for(small_kl_file):
    vae = load_tokenizer(small_kl_file)
    with pytest.raises(ValueError, match=r"by python -m utils\.tokenizer\.scaling, and give it by --latent_scaling"):
        vae.tokenize(torch.zeros(1, 3, 16, 16), (4,))

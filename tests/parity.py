"""Compare the project with golden data of the released implementations, a line a tensor.

    python -m tests.parity DIR      # a directory with config.json and expected.safetensors, or one of such directories

Weights and images are made by the recipes of the data, unless the directory holds them. Status 1 when anything is off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models import FlexVAR, FlexVARConfig, Guidance, SamplingConfig, ScaleSchedule, VQVAEConfig
from models.flow_head import FlowPrediction, FlowSampler, FlowTarget
from models.flowar import FlowAR, FlowARConfig
from models.head import Sampler
from models.kl_vae import KLAutoencoder, KLConfig, PixelPathway
from models.residual_vqvae import ResidualVQVAEConfig
from models.sampling import generate, generate_scales, sample_codes
from models.tokenizer import Tokenizer
from models.var import VARConfig
from models.weights import load_flexvar, load_tokenizer
from tests.recipes import blocky_images, fill, flexvar_value, flowar_value, plain_images, var_value

Values = Iterator[tuple[str, Tensor]]


def tolerance_of(name: str, wanted: Tensor) -> float:
    """Largest error, of the largest value. Codes and tokens are exact; soft weights magnify roundings."""
    if not wanted.is_floating_point():
        return 0.0
    if "smooth." in name:
        return 5e-3
    if name.startswith(("sample.guided", "sample.unguided", "sample.odd", "sample.uniform", "other.sample", "sar.")):
        return 1e-5 if name in ("sar.time", "sar.noise") else 2e-4  # FlowAR: everything sampled, and what follows it
    return 2e-5 if ".grad" in name or is_image(name) else 1e-5


def is_image(name: str) -> bool:
    return name.endswith(("image", "images", "reconstruction", "reconstruction_raw"))


def subsampled(name: str, found: Tensor) -> Tensor:
    """What directories with "subsample" store of a tensor."""
    if is_image(name):
        return found[..., ::8, ::8]
    if "logits" in name:
        return found[:, ::17, ::64]
    if name.endswith("inputs"):
        return found[:, ::7]
    return found[:, :, ::4] if name == "vae.f_hat" else found


def stored_part(name: str, found: Tensor, wanted: Tensor, subsample: bool) -> Tensor:
    """What FlowAR's data store: the first images; of conditions the last tokens, of the first stack the first ones."""
    found = found[: len(wanted)]
    if name == "teacher.encoder":
        found = found[:, :85]
    elif name in ("teacher.condition_null", "other.condition", "sar.condition"):
        found = found[:, -256:]
    if subsample and found.shape != wanted.shape:
        return found[..., ::8, ::8] if found.ndim == 4 else found[:, ::17]
    return found


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, of the largest wanted value; the share of differing codes, of codes."""
    if not wanted.is_floating_point():
        return (found != wanted).double().mean().item()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def cross_entropy(logits: Tensor, tokens: Tensor, **options: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), **options).view(1)


def joined(codes: dict[int, Tensor]) -> Tensor:
    return torch.cat(list(codes.values()), dim=1)


# ------------------------------------------------------------------------------------------------ FlexVAR


def flexvar_models(config: dict, directory: Path) -> tuple[Tokenizer, FlexVAR]:
    """From the directory's files, or by the recipe."""
    files = directory / "FlexVAE.pth", directory / "FlexVAR.pth"
    if all(f.is_file() for f in files):
        return load_tokenizer(files[0]), load_flexvar(files[1]).eval()
    sizes, own, seed = config["vae"], config["flexvar"], config["seed"]
    rows, dim = sizes["codebook_size"], sizes["codebook_dim"]
    vae = VQVAEConfig(sizes["ch"], tuple(sizes["ch_mult"]), 2, sizes["z_channels"], rows, dim)
    model = FlexVARConfig(own["depth"], own["width"], own["num_classes"], rows, dim)
    return fill(vae.build(), seed, flexvar_value), fill(model.build(), seed + 1, flexvar_value)  # type: ignore[return-value]


@torch.no_grad()
def flexvar_values(config: dict, directory: Path) -> Values:
    """The project's values of all tensors of FlexVAR's golden data."""
    vae, model = flexvar_models(config, directory)
    images, labels = plain_images(config["seed"] + 2, len(config["labels"]), config["image_size"]), config["labels"]
    labels, schedule = torch.tensor(labels), ScaleSchedule(tuple(config["patch_nums"]))
    null, pathway = torch.full_like(labels, model.null_class), vae.pathway
    tokens = joined(vae.tokenize(images, schedule.sides))
    yield from {"images": images, "labels": labels, "vae.latent": vae.encode(images), "vae.codes": tokens}.items()
    codes = schedule.by_side(tokens)
    yield "vae.reconstruction", vae.decode_at(codes, schedule.sides[-1], schedule)
    inputs = model.inputs(tokens, pathway, schedule)
    logits = model(labels, inputs, schedule)
    yield from {"teacher.inputs": inputs, "teacher.logits": logits}.items()
    yield "teacher.logits_null_class", model(null, inputs, schedule)
    yield "teacher.loss", cross_entropy(logits, tokens)
    rollout = model(labels, inputs, schedule, tokens, sampler=Sampler(0, schedule.total)).sampled
    fed, rest = model.inputs(rollout, pathway, schedule), rollout[:, schedule.lengths[0] :]
    second, ends = model(labels, fed, schedule), ScaleSchedule((1, schedule.sides[-1]))
    yield from {"student.rollout_argmax": rollout, "student.inputs": fed, "student.logits_all": second}.items()
    yield "student.csf_loss_all", cross_entropy(second[:, schedule.lengths[0] :], rest)
    last = model(labels, model.inputs(rollout, pathway, schedule, first=len(schedule) - 1), ends, first=1, start=False)
    yield "student.logits_last", last
    yield "student.csf_loss_last", cross_entropy(last, rollout[:, schedule.span(-1)])
    runs = {"ramp1.5": (schedule, Guidance("ramp", 1.5)), "constant1.5": (schedule, Guidance("constant", 1.5))}
    runs |= {"none": (schedule, Guidance())}
    runs |= {name: (ScaleSchedule(tuple(config[name])), Guidance("ramp", 1.5)) for name in ("larger", "fewer_steps")}
    for name, (sides, guidance) in runs.items():
        drawn = sample_codes(model, pathway, labels, sides, SamplingConfig(guidance, top_k=1), range(len(labels)))
        yield f"sample.greedy.{name}.tokens", joined(drawn)
        yield f"sample.greedy.{name}.images", vae.decode_at(drawn, sides.sides[-1], sides)


# ---------------------------------------------------------------------------------------------------- VAR


def var_values(config: dict, directory: Path) -> Values:
    """The project's values of all tensors of VAR's golden data."""
    seeds, sizes, own, side = config["seeds"], config["vae"], config["var"], config["image_size"]
    if not config.get("attn_l2_norm", True):
        raise SystemExit("attention without normalised queries and keys is not known here")
    schedule, rows, dim = ScaleSchedule(tuple(config["patch_nums"])), sizes["vocab_size"], sizes["z_channels"]
    other = {"width_mult": tuple(sizes["ch_mult"])} if "ch_mult" in sizes else {}
    vae_sizes = ResidualVQVAEConfig(sizes["ch"], **other, z_channels=dim, codebook_size=rows, codebook_dim=dim)
    vae = fill(vae_sizes.build(), seeds["vae"], var_value)
    common = {"depth": own["depth"], "width": own["embed_dim"], "num_classes": own["num_classes"]}
    common |= {"codebook_size": rows, "codebook_dim": dim, "sides": schedule.sides}
    model = fill(VARConfig(**common).build(), seeds["var"], var_value)
    images, labels = blocky_images(seeds["images"], len(config["labels"]), side), torch.tensor(config["labels"])
    yield from {"images": images, "labels": labels}.items()
    yield from residual_values(vae, images, schedule, config.get("other_patch_nums"))
    yield from gradients(vae, images, schedule)
    yield from var_passes(model, vae, images, labels, schedule)
    yield from var_samples(model, vae, labels, schedule)
    if "shared" in seeds:
        shared = fill(VARConfig(**common, shared_aln=True).build(), seeds["shared"], var_value)
        tokens = joined(vae.tokenize(images, schedule.sides))
        with torch.no_grad():
            logits = shared(labels, shared.inputs(tokens, vae.pathway, schedule), schedule)
        yield "shared.teacher.logits", logits
        sampling = SamplingConfig(Guidance("ramp", 1.5), top_k=1)
        drawn = sample_codes(shared, vae.pathway, labels, schedule, sampling, range(len(labels)))
        yield "shared.sample.greedy.ramp1.5.tokens", joined(drawn)


@torch.no_grad()
def residual_values(vae: Tokenizer, images: Tensor, schedule: ScaleSchedule, other: list[int] | None) -> Values:
    """Codes and canvases, of the schedule and of another one."""
    codes = vae.tokenize(images, schedule.sides)
    yield from {"vae.latent": vae.encode(images), "vae.codes": joined(codes)}.items()
    yield "vae.f_hat", torch.stack(canvases_of(vae, codes, schedule), dim=1)
    yield "vae.reconstruction_raw", vae.decode_at(codes, schedule.sides[-1], schedule)
    if other:
        sides = ScaleSchedule(tuple(other))
        codes = vae.tokenize(images, sides.sides)
        yield "vae.other_schedule.codes", joined(codes)
        yield "vae.other_schedule.f_hat", canvases_of(vae, codes, sides)[-1]


def canvases_of(vae: Tokenizer, codes: dict[int, Tensor], schedule: ScaleSchedule) -> list[Tensor]:
    """The canvas (B, D, S, S) after each scale."""
    canvas, found = vae.pathway.canvas(schedule), []
    for i, s in enumerate(schedule.sides):
        canvas.add(i, codes[s])
        found.append(canvas.maps)
    return found


def gradients(vae: Tokenizer, images: Tensor, schedule: ScaleSchedule) -> Values:
    """The quantiser's loss with commitment 0.25, and its gradients."""
    with torch.no_grad():
        latent = vae.encode(images)
    latent.requires_grad_()
    found = vae.distances(latent, schedule)  # type: ignore[operator]
    loss = found.codebook + 0.25 * found.commitment
    wanted = {"latent": latent, "codebook": vae.codebook, "phi0": vae.quantize.phi(0, len(schedule)).weight}  # type: ignore
    pulls = torch.autograd.grad(loss, list(wanted.values()))
    yield "vae.vq_loss", loss.detach().view(1)
    for name, pull in zip(wanted, pulls, strict=True):
        yield f"vae.vq_loss.grad_{name}", pull


@torch.no_grad()
def var_passes(model: FlexVAR, vae: Tokenizer, images: Tensor, labels: Tensor, schedule: ScaleSchedule) -> Values:
    """Both passes of a SAR step, the second in both readings."""
    pathway, tokens = vae.pathway, joined(vae.tokenize(images, schedule.sides))
    inputs = model.inputs(tokens, pathway, schedule)
    logits = model(labels, inputs, schedule)
    yield from {"teacher.inputs": inputs, "teacher.logits": logits}.items()
    yield "teacher.logits_null_class", model(torch.full_like(labels, model.null_class), inputs, schedule)
    yield "teacher.loss", model(labels, inputs, schedule, tokens).loss.view(1)
    model.head.train().label_smoothing = 0.1
    yield "teacher.loss_smooth0.1", model(labels, inputs, schedule, tokens).loss.view(1)
    model.head.eval()
    rollout = model(labels, inputs, schedule, tokens, sampler=Sampler(0, schedule.total)).sampled
    yield "student.rollout_argmax", rollout
    rest = rollout[:, schedule.lengths[0] :]
    for name, truth in (("accumulated", None), ("one_step", tokens)):
        fed = model.inputs(rollout, pathway, schedule, truth)
        yield f"student.{name}.inputs", fed
        yield f"student.{name}.logits", model(labels, fed, schedule)
        yield f"student.{name}.csf_loss", model(labels, fed, schedule, rest, first=1).loss.view(1)


@torch.no_grad()
def var_samples(model: FlexVAR, vae: Tokenizer, labels: Tensor, schedule: ScaleSchedule) -> Values:
    """Greedy samples, and a smooth one without its noise; images as released: clamped, in [0, 1]."""
    runs = {f"greedy.{name}": SamplingConfig(g, top_k=1) for name, g in
            (("ramp1.5", Guidance("ramp", 1.5)), ("none", Guidance()))}  # fmt: skip
    runs["smooth"] = SamplingConfig(Guidance("ramp", 1.5), 8, 0.9, more_smooth=True)
    for name, sampling in runs.items():
        noiseless = patch.object(torch.Tensor, "exponential_", lambda x, **_: x.fill_(1.0))  # whose -log is 0
        with noiseless:
            drawn = sample_codes(model, vae.pathway, labels, schedule, sampling, range(len(labels)))
            image = generate(model, vae, labels, schedule, sampling, range(len(labels)))
        if name != "smooth":
            yield f"sample.{name}.tokens", joined(drawn)
        yield f"sample.{name}.f_hat", canvases_of(vae, drawn, schedule)[-1]
        yield f"sample.{name}.image", image.clamp(-1, 1).add(1).mul(0.5)


# ------------------------------------------------------------------------------------------------- FlowAR


def flowar_inputs(config: dict) -> dict[str, Tensor]:
    """Images, noise and times, drawn in the order of the recipe."""
    batch, side, other = (config["inputs"][name] for name in ("batch", "image_size", "ldm_image_size"))
    generator, schedule = (
        torch.Generator().manual_seed(config["inputs"]["seed"]),
        ScaleSchedule(tuple(config["scales"])),
    )
    z, tokens = config["vae"]["z_channels"], (batch, schedule.total, config["vae"]["z_channels"])
    full, scales = schedule.sides[-1], len(schedule)

    ldm = config["inputs"].get("ldm_batch") or config["tensors"]["ldm.images"][1][0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "images": uniform(batch, 3, side, side) * 2 - 1,
        "vae.noise": normal(batch, z, full, full),
        "flow.time": uniform(batch, scales),
        "flow.noise": normal(*tokens),
        "sample.noise": normal(*tokens),
        "sar.time": uniform(batch, scales),
        "sar.noise": normal(*tokens),
        "ldm.images": uniform(ldm, 3, other, other) * 2 - 1,
    }


def kl_of(config: dict, patch: int) -> KLAutoencoder:
    """A KL autoencoder by the recipe."""
    mults, size = tuple(config["ch_mult"]), config["resolution"]
    at = {part: config.get(f"{part}_attention_at", config.get("attention_at", [])) for part in ("encoder", "decoder")}
    levels = {f"{part}_attention": tuple(i for i in range(len(mults)) if size >> i in a) for part, a in at.items()}
    sizes = KLConfig(
        config["ch"], mults, config.get("num_res_blocks", 2), config["z_channels"], **levels, patch=patch,
        scaling=config["scaling"],
    )  # fmt: skip
    return fill(sizes.build(), config["seed"], flowar_value)  # type: ignore[return-value]


def flowar_of(config: dict, scales: list[int], dim: int) -> FlowAR:
    """A FlowAR by the recipe."""
    names = {"depth": "depth", "width": "width", "attention_heads": "heads", "flow_depth": "head_depth"}
    names |= {"flow_width": "head_width", "flow_cross": "cross"}
    sizes = {own: config[name] for own, name in names.items()}
    return fill(FlowARConfig(**sizes, codebook_dim=dim, sides=tuple(scales)).build(), config["seed"], flowar_value)  # type: ignore[return-value]


@torch.no_grad()
def flowar_values(config: dict, directory: Path) -> Values:
    """The project's values of all tensors of FlowAR's golden data."""
    given, labels = flowar_inputs(config), torch.tensor(config["inputs"]["labels"])
    schedule = ScaleSchedule(tuple(config["scales"]))
    yield from {**given, "labels": labels}.items()
    vae = kl_of(config["vae"], patch=1)
    mean, log_variance = vae.moments(given["images"])
    yield "vae.moments", torch.cat([mean, log_variance], dim=1)
    latents = vae.latents(mean, log_variance, given["vae.noise"])
    yield "vae.latents", latents
    yield "vae.reconstruction", vae.decode_maps(latents / vae.scaling)
    pathway, drawn = vae.pathway, {schedule.sides[-1]: (latents / vae.scaling, torch.zeros_like(latents))}
    tokens = joined(vae.from_moments(drawn, schedule.sides, sample=False))
    inputs = pathway.inputs(tokens, schedule)
    yield from {"scales.targets": tokens, "scales.inputs": inputs}.items()
    point = FlowTarget(tokens, given["flow.time"], given["flow.noise"])
    model, second = (flowar_of(config[name], config["scales"], tokens.shape[2]) for name in ("flowar", "other"))
    yield from flowar_passes(model, labels, inputs, point, schedule)
    yield from flowar_samples(config["sampling"], model, vae, labels, schedule, given["sample.noise"])
    yield "other.condition", second(labels, inputs, schedule)
    found = second(labels, inputs, schedule, point)
    yield from {"other.velocity": found.velocity, "other.loss": found.loss.view(1)}.items()
    settings = config["sampling"]
    yield "other.sample.latents", walked(second, vae, labels, schedule, given["sample.noise"],
                                         settings["cfg"], settings["steps"], settings["guidance"])  # fmt: skip
    yield from flowar_second_pass(config["sar"]["steps"], model, vae, labels, inputs, point, schedule, given)
    yield from flowar_image_supervision(vae, given["images"], schedule)
    ldm = kl_of(config["ldm"], config["ldm"]["patch_size"])
    mean, log_variance = ldm.moments(given["ldm.images"])
    yield "ldm.moments", torch.cat([mean, log_variance], dim=1)
    yield "ldm.reconstruction", ldm.decode_maps(mean)
    tokens = joined(ldm.from_moments({schedule.sides[-1]: (mean, log_variance)}, schedule.sides, sample=False))
    yield from {"ldm.targets": tokens, "ldm.inputs": ldm.pathway.inputs(tokens, schedule)}.items()


def flowar_passes(model: FlowAR, labels: Tensor, inputs: Tensor, point: FlowTarget, schedule: ScaleSchedule) -> Values:
    """Teacher forcing: what the first stack says, what conditions the head, and the flow loss."""
    seen: list[Tensor] = []
    hook = model.encoder_norm.register_forward_hook(lambda _, x, y: seen.append(y))
    condition, null = model(labels, inputs, schedule), torch.full_like(labels, model.null_class)
    hook.remove()
    yield from {"teacher.encoder": seen[0], "teacher.condition": condition}.items()
    yield "teacher.condition_null", model(null, inputs, schedule)
    found = model(labels, inputs, schedule, point)
    yield from {"flow.velocity": found.velocity, "flow.loss": found.loss.view(1)}.items()
    yield "flow.loss_scales", torch.stack([part.mean() for part in schedule.split(found.losses)])
    yield "flow.loss_null", model(null, inputs, schedule, point).loss.view(1)


def walked(
    model: FlowAR, vae: Tokenizer, labels: Tensor, schedule: ScaleSchedule, noise: Tensor, cfg: float, steps: int,
    interval: float,
) -> Tensor:  # fmt: skip
    """Samples of all scales (B, L, D) from given noise."""
    draw = SamplingConfig(Guidance("ramp", cfg), flow_steps=steps, guidance_interval=interval)
    return torch.cat([x for _, x in generate_scales(model, vae.pathway, labels, schedule, draw, noise)], dim=1)  # type: ignore[arg-type]


def flowar_samples(
    settings: dict, model: FlowAR, vae: KLAutoencoder, labels: Tensor, schedule: ScaleSchedule, noise: Tensor
) -> Values:
    """Guided, unguided, with an odd number of steps, on the uniform grid."""
    cfg, interval = settings["cfg"], settings["guidance"]
    guided = walked(model, vae, labels, schedule, noise, cfg, settings["steps"], interval)
    yield "sample.guided.latents", guided
    yield "sample.guided.images", vae.decode_at(schedule.by_side(guided), schedule.sides[-1], schedule)
    yield "sample.unguided.latents", walked(model, vae, labels, schedule, noise, 1.0, settings["steps"], interval)
    yield "sample.odd_steps.latents", walked(model, vae, labels, schedule, noise, cfg, settings["odd_steps"], 1.0)
    uniform = settings["uniform_cfg"], settings["uniform_steps"], settings["uniform_guidance"]
    yield "sample.uniform.latents", walked(model, vae, labels, schedule, noise, *uniform)


def flowar_second_pass(
    steps: int, model: FlowAR, vae: KLAutoencoder, labels: Tensor, inputs: Tensor, point: FlowTarget,
    schedule: ScaleSchedule, given: dict[str, Tensor],
) -> Values:  # fmt: skip
    """Rollouts, and the three readings of the second pass's loss."""

    def passed(steps: int) -> FlowPrediction:
        sampler = FlowSampler(0, schedule.total, given["sample.noise"], steps)
        return model(labels, inputs, schedule, point, sampler=sampler)  # type: ignore[return-value]

    teacher, first = passed(steps), schedule.lengths[0]
    yield from {"sar.rollout": teacher.sampled, "sar.rollout_mean": passed(1).sampled}.items()
    fed = vae.pathway.inputs(teacher.sampled, schedule)
    yield from {"sar.inputs": fed, "sar.condition": model(labels, fed, schedule)}.items()
    fresh = FlowTarget(teacher.sampled[:, first:], given["sar.time"][:, 1:], given["sar.noise"][:, first:])
    yield "sar.csf_loss_sample", model(labels, fed, schedule, fresh, first=1).loss.view(1)
    for kind in ("velocity", "ground_truth"):
        wanted = teacher.targets(kind, point.tokens, schedule, first=1)
        yield f"sar.csf_loss_{kind}", model(labels, fed, schedule, wanted, first=1).loss.view(1)


def flowar_image_supervision(vae: KLAutoencoder, images: Tensor, schedule: ScaleSchedule) -> Values:
    """Targets from resized images, and both readings of what feeds the next scale."""
    moments = vae.moments_of(images, schedule.sides, "image")
    tokens = joined(vae.from_moments(moments, schedule.sides, sample=False))
    yield from {"image.targets": tokens, "image.inputs": vae.pathway.inputs(tokens, schedule)}.items()
    both = joined(
        vae.from_moments(vae.moments_of(images, schedule.sides, "image_pixels"), schedule.sides, sample=False)
    )
    yield "image.inputs_in_pixels", PixelPathway(vae).inputs(both, schedule)


# ------------------------------------------------------------------------------------------------- compare


def compare(directory: Path) -> list[str]:
    """Prints a line for each tensor of a directory. Returns the names of those that are off or were not computed."""
    config = json.loads((directory / "config.json").read_text())
    expected = load_file(directory / "expected.safetensors")
    made = flowar_values if "flowar" in config else var_values if "var" in config else flexvar_values
    values = made(config, directory)
    off, seen = [], set()
    for name, found in values:
        seen.add(name)
        if name not in expected:
            continue
        wanted = expected[name]
        if "flowar" in config:
            found = stored_part(name, found, wanted, config.get("subsample", False))
        elif config.get("subsample") and found.shape != wanted.shape:
            found = subsampled(name, found)
        same = found.shape == wanted.shape
        error, limit = error_of(found, wanted) if same else float("inf"), tolerance_of(name, wanted)
        verdict = "ok" if error <= limit else "OFF" if same else f"OFF: {tuple(found.shape)}, not {tuple(wanted.shape)}"
        print(f"{directory.name + '/' + name:58} {error:9.2e} ≤ {limit:7.0e}  {verdict}", flush=True)
        off += [name] if verdict != "ok" else []
    missed = sorted(expected.keys() - seen)
    for name in missed:
        print(f"{directory.name + '/' + name:58} not computed here")
    return off + missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    root = parser.parse_args().directory
    places = [root] if (root / "config.json").is_file() else sorted(p.parent for p in root.glob("*/config.json"))
    places = [p for p in places if (p / "expected.safetensors").is_file()]
    if not places:
        parser.error(f"{root} holds no config.json with expected.safetensors beside it")
    off = [name for place in places for name in compare(place)]
    print(f"{len(off)} off: {', '.join(off)}" if off else "all as released")
    sys.exit(bool(off))


if __name__ == "__main__":
    main()

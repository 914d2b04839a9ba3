"""Weight files, released or our own, and the models they hold.

Loads are strict. The known differences of released files are in KNOWN, by name.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.flexvar import FlexVAR
from models.generators import recognise, recognise_tokenizer
from models.run_record import find_run
from models.tokenizer import Tokenizer
from pretrained.download import FILES
from utils.runtime.checkpoint import EMA, MANIFEST, MODEL, newest_checkpoint, runs_below, verify
from utils.runtime.distributed import shard_like
from utils.runtime.entry import notice
from utils.runtime.files import read_tensors, save_tensors

StateDict = dict[str, Tensor]

# Buffers of released transformer files that depend on the schedule a file was saved with: not part of the model.
KNOWN = {"attn_bias_for_masking"}
# Buffers that say what a model is, where no shape does.
LAYOUTS = {"layout", "lvl_1L"}


def find_weights(path: str | Path, name: str = MODEL) -> Path:
    """A weight file as it is; of a run's or a checkpoint's directory, the newest weights in it."""
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            verify(path, name)
        found = (newest_checkpoint(path, name) or path) / name
        if not found.is_file():
            raise ValueError(f"{path} holds no {name}{runs_below(path)}")
        return found
    if not path.is_file():
        fetch = f": python pretrained/download.py {path.name} fetches it" if path.name in FILES else ""
        raise ValueError(f"no weight file {path}{fetch}")
    return path


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a weight file, `.safetensors` or `.pth`, out of whichever container holds them."""
    path = find_weights(path)
    return without_prefixes(unwrap(read_tensors(path), path))


def unwrap(found: object, path: Path) -> StateDict:
    """Released containers: {'model' or 'state_dict': state dict}, {'trainer': {'var_wo_ddp': …}}, or a bare one.

    Of a FlowAR training checkpoint, {'model': …, 'model_ema': …}, the average.
    """
    if isinstance(found, dict) and isinstance(found.get("trainer"), dict):
        found = found["trainer"].get("var_wo_ddp")
    elif isinstance(found, dict):
        names = [name for name in ("model_ema", "model", "state_dict") if isinstance(found.get(name), dict)]
        if names[:1] == ["model_ema"]:
            notice(f"{path}: the moving average of its weights, model_ema")
        found = found[names[0]] if names else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds no state dict in a layout known here")
    return found


def without_prefixes(weights: StateDict) -> StateDict:
    """The tensors under the names of the model itself, where DDP's or torch.compile's prefix is on every one."""
    for prefix in ("module.", "_orig_mod.", "module."):  # a compiled model in DDP, or the other way round
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def load_strictly(module: nn.Module, weights: StateDict, source: str | Path, assign: bool = False) -> None:
    """Load every tensor by name and shape, or say all that differs and load nothing.

    With `assign` the file's tensors become the module's, as fp32; else they are copied into the module's.
    """
    weights = {name: tensor for name, tensor in weights.items() if name not in KNOWN}
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "another shape": shapes,
        "another layout": [name for name in LAYOUTS & own.keys() & weights.keys() if differs(own[name], weights[name])],
        "not finite": [name for name, x in weights.items() if x.is_floating_point() and not x.isfinite().all()],
    }
    if any(kinds.values()):
        lines = [f"\n  {kind}: {some(names)}" for kind, names in kinds.items() if names]
        raise ValueError(f"{source} does not fit this model:" + "".join(lines))
    if assign:
        weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
    weights = {name: shard_like(tensor, own[name]) for name, tensor in weights.items()}
    module.load_state_dict(weights, assign=assign)


def differs(own: Tensor, other: Tensor) -> bool:
    """True when a buffer has another value; one without values, of a model about to take the file's, has not."""
    return not own.is_meta and not torch.equal(own.cpu(), other.cpu())


def some(names: list[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    rest = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def tokenizer_file(path: str | Path) -> Path:
    """The file that a tokenizer is read from. Of a run's directory it is the moving average, where there is one."""
    path = Path(path)
    newest = path if (path / MANIFEST).is_file() else newest_checkpoint(path, MODEL) if path.is_dir() else None
    if newest is None or not (newest / EMA).is_file():
        return find_weights(path)
    notice(f"tokenizer {path}: the moving average of its weights (the last weights are in {newest / MODEL})")
    return find_weights(newest, EMA)


def load_tokenizer(path: str | Path, **options: float) -> Tokenizer:
    """A tokenizer from a file or a tokenizer run's directory: frozen, in evaluation mode, sizes as in the file.

    `options` are fields of its config that no file tells: `scaling` and `patch` of a KL autoencoder.

    Of a run with a moving average of its weights it is the average. Its weights are laid out channels last, which
    convolutions are faster in on a CPU.
    """
    path = tokenizer_file(path)
    weights = read_state_dict(path)
    config = recognise_tokenizer(weights, path)
    known = {name: options[name] for name in options.keys() & {f.name for f in fields(config)}}
    if any(known.values()):
        config = replace(config, **known)  # type: ignore[arg-type]
    if not options.get("scaling") and find_run(path) is not None:
        config = config.unpublished()
    with torch.device("meta"):  # the weights come from the file: draw none
        vae = config.build()
    weights = dict(config.adapted(weights))
    load_strictly(vae, weights, path, assign=True)
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_flexvar(path: str | Path) -> FlexVAR:
    """A transformer from a file or a run's directory, sizes as in the file."""
    weights = read_state_dict(path)
    config = recognise(weights, path)
    with torch.device("meta"):
        model = config.build()
    weights = dict(config.adapted(weights))
    load_strictly(model, weights, path, assign=True)
    return model


def digest_of(module: nn.Module) -> str:
    """SHA-256 over a model's tensors, in the order of their names: equal in every container of the same weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's state dict as safetensors."""
    save_tensors(path, model.state_dict())

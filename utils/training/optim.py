"""Parameter groups, the learning rate, the moving average of the weights, and clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from utils.config.training import OptimConfig
from utils.runtime.distributed import full_tensor, shard_like, to_local
from utils.runtime.numerics import Precision

HOLD = 0.05  # of the run at the peak before the learning rate falls


def make_optimizer(models: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with weight decay on matrices only: not on 1-D parameters, nor on those in a model's `no_decay`
    (positions, temperatures)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim >= 2 and not name.endswith(getattr(model, "no_decay", ()))
                (decay if is_matrix else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": config.twd}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put a checkpoint's moments back, this rank's share where the parameters are sharded."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        for name, x in moments.items():
            moments[name] = shard_like(x, parameters[i]) if x.ndim else x  # the count of steps is a number
    optimizer.load_state_dict(state)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # what the command says, not what the checkpoint says


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Linear warm-up over the first `wp` of the run, then to `wpe` of the peak.

    By `lr_decay`: flat for 5 % of what is left and then linear, or along a cosine at once.
    """
    warm = config.wp * total
    if step < warm:
        return config.lr * (0.005 + 0.995 * step / warm)
    progress = (step - warm) / max(total - 1 - warm, 1)  # 0 … 1 after the warm-up
    fall = max(0.0, (progress - HOLD) / (1 - HOLD))
    if config.lr_decay == "cosine":
        fall = 0.5 * (1 - math.cos(math.pi * progress))
    return config.lr * (1 - (1 - config.wpe) * fall)


def weight_decay(step: int, total: int, config: OptimConfig) -> float:
    """Weight decay of matrices: from `twd` along a cosine to `twde`."""
    progress = step / max(total - 1, 1)
    return config.twde + (config.twd - config.twde) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, step: int, total: int, config: OptimConfig) -> None:
    """Give the optimiser the learning rate and weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, config)
    if config.twde >= 0:  # the first group are the matrices: see `make_optimizer`
        optimizer.param_groups[0]["weight_decay"] = weight_decay(step, total, config)


class MovingAverage:
    """A copy of a model whose weights follow the model's: average ← decay·average + (1 - decay)·weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        average, current = ([to_local(p) for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(average, current, 1 - self.decay)


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale the accumulated gradients down to a norm of `limit` (0: as they are). Returns their norm before that."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf")))


def apply_gradients(optimizer: torch.optim.Optimizer, precision: Precision, skip: torch.Tensor) -> None:
    """One optimiser step, unless `skip` is 1.0: decided on the device, as a gradient scaler does it."""
    if not precision.scaler.is_enabled():  # an enabled one finds out itself, from the gradients
        optimizer.found_inf = skip  # type: ignore[attr-defined]
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)

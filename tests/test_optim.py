import math

import pytest
import torch

from models.generators import config_of
from utils.config.training import OptimConfig
from utils.runtime.numerics import Precision, derive_seed
from utils.training.optim import learning_rate, make_optimizer, set_rates, weight_decay


@pytest.mark.parametrize("first", [{}, {"first_side": 2}])
def test_weight_decay_reaches_matrices_only(first):
    sizes = {"depth": 2, "width": 64, "num_classes": 3, "codebook_size": 8}
    model = config_of(sizes | first).build()
    decay, plain = make_optimizer([model], OptimConfig(twd=0.05)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert decay["betas"] == (0.9, 0.95)
    decayed = {names[id(p)] for p in decay["params"]}
    assert decayed == {n for n in names.values() if n.endswith(".weight")}
    kept = {names[id(p)] for p in plain["params"]}
    assert {"pos_start", "pos_1LC", "blocks.0.attn.scale_mul_1H11", "blocks.0.attn.q_bias", "head.bias"} <= kept
    assert bool(first) == ({"pos_first", "mask_token"} <= kept)
    assert decayed | kept == set(names.values())


def test_learning_rate_is_constant_by_default():
    config = OptimConfig(lr=1e-4)
    assert {learning_rate(step, 1000, config) for step in range(1000)} == {1e-4}


def test_released_learning_rate():
    config = OptimConfig(lr=3e-4, wp=0.02, wpe=0.1)
    rates = [learning_rate(step, 1000, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005 * 3e-4)
    assert rates[10] == pytest.approx((0.005 + 0.995 / 2) * 3e-4)
    assert rates[20] == rates[60] == pytest.approx(3e-4)
    assert rates[999] == pytest.approx(3e-5)
    falling = torch.tensor(rates[70:])
    assert (falling[1:] < falling[:-1]).all()
    steps = falling[1:] - falling[:-1]
    assert torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-3)


def test_precision():
    cpu = torch.device("cpu")
    assert Precision("auto", cpu).name == "fp32"
    assert Precision("fp16", cpu).scaler.is_enabled()
    assert not Precision("bf16", cpu).scaler.is_enabled()
    with Precision("bf16", cpu).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_seeds_differ_in_every_part_of_their_key():
    keys = [("step", seed, step, micro) for seed in range(3) for step in range(30) for micro in range(5)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_weight_decay_moves_along_a_cosine_of_matrices_alone():
    config = OptimConfig(twd=0.05, twde=0.08)
    found = [weight_decay(step, 101, config) for step in (0, 25, 50, 100)]
    assert found == pytest.approx([0.05, 0.05 + 0.03 * (1 - math.cos(math.pi / 4)) / 2, 0.065, 0.08])
    optimizer = make_optimizer([torch.nn.Linear(3, 2)], config)
    set_rates(optimizer, 100, 101, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.08, 0.0]


def test_a_cosine_falls_at_once_after_the_warm_up():
    config = OptimConfig(lr=4e-4, wp=0.25, wpe=0.025, lr_decay="cosine")
    rates = [learning_rate(step, 401, config) for step in (0, 50, 101, 250, 400)]
    assert rates[:2] == pytest.approx([2e-6, 4e-4 * (0.005 + 0.995 * 50 / 100.25)])
    assert rates[3] == pytest.approx(1e-5 + (4e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 149.75 / 299.75)))
    assert rates[4] == pytest.approx(1e-5)
    assert rates[2] < 4e-4

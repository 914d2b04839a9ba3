import pytest
import torch

from models.generators import config_of
from utils.config.training import OptimConfig
from utils.runtime.numerics import Precision, derive_seed
from utils.training.optim import learning_rate, make_optimizer


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

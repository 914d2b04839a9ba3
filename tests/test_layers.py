import math

import pytest
import torch

from models.layers import COARSE_TOKENS, CachedAttention, ScaleCausalAttention
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule


def dense(q, k, v, schedule):
    """The slow, obvious form: a full score matrix, a token sees its own scale and all coarser ones."""
    scale = torch.cat([torch.full((n,), i) for i, n in enumerate(schedule.lengths)])
    scores = q @ k.transpose(-2, -1)
    scores = scores.masked_fill(scale[:, None] < scale[None, :], -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "sides", [DEFAULT_SCHEDULE.sides, (1, 2, 3, 4), (1, 16), (16,), (1,), (4, 5, 6, 8), (13, 16), (1, 2, 3, 32)]
)
def test_grouped_attention_and_its_gradients_equal_the_dense_mask(sides):
    torch.manual_seed(0)
    schedule = ScaleSchedule(sides)
    q, k, v, up = (torch.randn(2, 3, schedule.total, 8, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = ScaleCausalAttention(schedule, q.device)(q, k, v)
    found_gradients = torch.autograd.grad(found, leaves, up)
    wanted = dense(q, k, v, schedule)
    assert torch.allclose(found, wanted, atol=1e-12)
    for a, b in zip(found_gradients, torch.autograd.grad(wanted, leaves, up), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_no_mask_is_larger_than_the_coarse_group():
    attention = ScaleCausalAttention(DEFAULT_SCHEDULE, torch.device("cpu"))
    assert len(attention.mask) == 155 <= COARSE_TOKENS
    assert attention.lengths == [155, 100, 169, 256]


def test_cached_attention_equals_the_dense_mask():
    torch.manual_seed(0)
    schedule = ScaleSchedule((1, 2, 5))
    q, k, v = (torch.randn(2, 3, schedule.total, 8) for _ in range(3))
    cache = CachedAttention(schedule.total)
    parts = [cache(*qkv) for qkv in zip(*(schedule.split(x, dim=2) for x in (q, k, v)), strict=True)]
    assert torch.allclose(torch.cat(parts, dim=2), dense(q, k, v, schedule), atol=1e-5)
    with pytest.raises(AssertionError, match="holds 30 tokens"):
        cache(q[:, :, :1], k[:, :, :1], v[:, :, :1])

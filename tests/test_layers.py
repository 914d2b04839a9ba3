import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from models import layers
from models.layers import COARSE_TOKENS, CachedAttention, GeluLinear, Prefixes, ScaleCausalAttention
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from tests.conftest import worst


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


def test_attention_leaves_its_output_as_the_next_product_reads_it():
    schedule = ScaleSchedule((1, 2, 5, 13))  # a coarse group and a finer scale
    q, k, v = (torch.randn(2, schedule.total, 3, 8).transpose(1, 2) for _ in range(3))
    assert ScaleCausalAttention(schedule, q.device)(q, k, v).transpose(1, 2).is_contiguous()


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


@pytest.mark.parametrize(("package", "name"), [("flash_attn", "flash-attn"), ("xformers", "xformers")])
def test_an_installed_kernel_is_found_and_gets_its_own_layout(package, name, monkeypatch):
    shapes = []

    def function(q, k, v, **scale):
        shapes.append(q.shape)
        assert list(scale.values()) == [1.0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    stub = types.SimpleNamespace(flash_attn_func=function, memory_efficient_attention=function)
    monkeypatch.setitem(sys.modules, "xformers.ops", stub)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=stub))
    monkeypatch.setitem(sys.modules, package if package == "flash_attn" else "xformers.ops", stub)
    found = layers.find_kernel()
    assert found.name == name
    schedule, (q, k, v) = ScaleSchedule((1, 2, 5, 13)), (torch.randn(2, 3, 199, 8) for _ in range(3))
    wanted = ScaleCausalAttention(schedule, q.device)(q, k, v)
    monkeypatch.setattr(layers, "kernel_for", lambda device, dtype: found)
    assert torch.allclose(ScaleCausalAttention(schedule, q.device)(q, k, v), wanted, atol=1e-6)
    assert shapes == [(2, 169, 3, 8)]  # side 13 alone: the coarse group needs a mask, which PyTorch's own takes


def test_no_kernel_is_found_where_none_is_and_none_runs_on_a_cpu(monkeypatch):
    for package in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, package, None)
    assert layers.find_kernel() is None
    kernel = layers.Kernel("some", None, {torch.float16: (7, 0), torch.bfloat16: (8, 0)})
    monkeypatch.setattr(layers, "KERNEL", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert layers.kernel_for(torch.device("cpu"), torch.bfloat16) is None
    assert layers.kernel_for(torch.device("cuda"), torch.float32) is None
    assert layers.kernel_for(torch.device("cuda"), torch.bfloat16) is kernel


@pytest.mark.parametrize(
    ("package", "capability", "dtype", "runs"),
    [
        ("flash-attn", (7, 5), torch.float16, False),
        ("flash-attn", (8, 0), torch.bfloat16, True),
        ("flash-attn", (9, 0), torch.float16, True),
        ("flash-attn", (10, 0), torch.bfloat16, False),
        ("flash-attn", (12, 0), torch.bfloat16, False),
        ("xformers", (6, 1), torch.float16, False),
        ("xformers", (7, 5), torch.float16, True),
        ("xformers", (7, 5), torch.bfloat16, False),
    ],
)
def test_a_kernel_runs_only_on_cards_that_can(package, capability, dtype, runs, monkeypatch):
    stub = types.SimpleNamespace(flash_attn_func=print, memory_efficient_attention=print)
    monkeypatch.setitem(sys.modules, "flash_attn", stub if package == "flash-attn" else None)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=stub))
    monkeypatch.setitem(sys.modules, "xformers.ops", stub)
    monkeypatch.setattr(layers, "KERNEL", layers.find_kernel())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (layers.kernel_for(torch.device("cuda"), dtype) is not None) == runs
    assert layers.kernel_for(torch.device("cuda"), torch.float32) is None


def test_prefixes_are_views_whose_gradients_add_up():
    schedule = ScaleSchedule((1, 2, 5, 13, 14))
    attention = ScaleCausalAttention(schedule, torch.device("cpu"))
    q, k, v = (torch.randn(2, 3, schedule.total, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shared = Prefixes.apply(k, (30, 199, schedule.total))
    assert [x.shape[2] for x in shared] == [30, 199, schedule.total]
    assert {x.untyped_storage().data_ptr() for x in shared} == {k.untyped_storage().data_ptr()}
    mask = torch.zeros(schedule.total, schedule.total, dtype=torch.bool)
    for start, end in zip(schedule.offsets[:-1], schedule.offsets[1:], strict=True):
        mask[start:end, :end] = True
    up = torch.randn_like(q)
    found = torch.autograd.grad(attention(q, k, v), (q, k, v), up)
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask, scale=1.0), (q, k, v), up)
    assert all(worst(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_linear_keep_only_what_goes_in(dtype):
    torch.manual_seed(0)
    leaves = (
        torch.randn(2, 7, 12, requires_grad=True),
        torch.randn(5, 12, requires_grad=True),
        torch.randn(5, requires_grad=True),
    )
    up, kept = torch.randn(2, 7, 5), []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            found = GeluLinear.apply(*leaves)
        wanted = F.linear(F.gelu(leaves[0], approximate="tanh"), *leaves[1:])
    assert [x.shape for x in kept] == [leaves[0].shape, leaves[1].shape]
    assert found.dtype == wanted.dtype == dtype
    pairs = [(found, wanted)]
    pairs += zip(*(torch.autograd.grad(x, leaves, up.to(dtype)) for x in (found, wanted)), strict=True)
    assert all(worst(x.float(), y.float()) < (1e-6 if dtype == torch.float32 else 2e-2) for x, y in pairs)

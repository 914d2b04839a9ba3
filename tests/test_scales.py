import pytest
import torch
import torch.nn.functional as F

from models.scales import DEFAULT_SCHEDULE, ScaleSchedule, draw_schedule, shift_all, shift_up


def test_layout():
    schedule = ScaleSchedule.parse("1_2_3")
    assert schedule.lengths == (1, 4, 9)
    assert schedule.offsets == (0, 1, 5, 14)
    assert schedule.total == 14
    assert schedule.span(1) == slice(1, 5)
    assert schedule.span(-1) == slice(5, 14)
    assert [len(part) for part in schedule.split(torch.arange(14), dim=0)] == [1, 4, 9]
    assert DEFAULT_SCHEDULE.total == 680
    assert ScaleSchedule.parse("1,2,3") == ScaleSchedule.parse("1-2-3") == schedule


@pytest.mark.parametrize("text", ["", "1_x", "2_1", "0_1", "1_1", "1__2", "1.5"])
def test_wrong_schedules_are_named(text):
    with pytest.raises(ValueError, match="schedule"):
        ScaleSchedule.parse(text)


def test_draw_has_the_published_statistics():
    draws = [draw_schedule(0, step) for step in range(20_000)]
    assert draws == [draw_schedule(0, step) for step in range(20_000)]  # pure
    assert draws[:50] != [draw_schedule(1, step) for step in range(50)]
    totals = torch.tensor([d.total for d in draws], dtype=torch.float)
    assert totals.max() <= 680
    assert totals.mean() == pytest.approx(590.6, abs=2.5)
    assert sum(d == DEFAULT_SCHEDULE for d in draws) / 20_000 == pytest.approx(0.05, abs=0.006)
    assert sum(16 not in d.sides for d in draws) / 20_000 == pytest.approx(1 / 3, abs=0.03)
    assert all(d.sides[0] == 1 for d in draws)
    assert {len(d) for d in draws} <= set(range(4, 11))


def test_shift_up_is_a_bicubic_resize_of_the_embedding_map():
    torch.manual_seed(0)
    codebook, codes = torch.randn(20, 6), torch.randint(20, (2, 9))
    found = shift_up(codes, codebook, 3, 5)
    for b in range(2):
        grid = torch.stack([codebook[c] for c in codes[b]]).view(3, 3, 6).permute(2, 0, 1)
        wanted = F.interpolate(grid[None], size=5, mode="bicubic", align_corners=False)[0]
        assert torch.allclose(found[b], wanted.permute(1, 2, 0).reshape(25, 6), atol=1e-6)


def test_codes_are_enlarged_in_full_precision_whatever_the_caller_works_in():
    codebook, codes = torch.randn(20, 6), torch.randint(20, (2, 9))
    wanted = shift_up(codes, codebook, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shift_up(codes, codebook, 3, 5), wanted)


def test_shift_all_joins_the_scales_and_ignores_the_last():
    torch.manual_seed(0)
    schedule, codebook, codes = ScaleSchedule((1, 2, 4)), torch.randn(20, 6), torch.randint(20, (2, 21))
    found = shift_all(codes, codebook, schedule)
    assert torch.equal(found[:, :4], shift_up(codes[:, :1], codebook, 1, 2))
    assert torch.equal(found[:, 4:], shift_up(codes[:, 1:5], codebook, 2, 4))
    codes[:, 5:] = 0
    assert torch.equal(found, shift_all(codes, codebook, schedule))
    assert shift_all(codes[:, :1], codebook, ScaleSchedule((1,))).shape == (2, 0, 6)

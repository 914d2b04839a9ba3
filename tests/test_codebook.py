import pytest
import torch

from utils.tokenizer.codebook import CodebookUse, histogram, perplexity, revive, usage


def test_histogram_counts():
    codes = torch.tensor([[0, 2, 2], [2, 3, 0]])
    assert histogram(codes, 5).tolist() == [2, 0, 3, 1, 0]


def test_usage_and_perplexity():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert usage(counts).tolist() == [1, 0.25, 0.5, 0]
    assert perplexity(counts).tolist()[:3] == pytest.approx([4, 1, 2])


def test_metrics_are_of_each_side_and_unused_of_all():
    use = CodebookUse((1, 2), 3)
    use.counts += torch.tensor([[1, 0, 0], [0, 1, 0]])
    assert use.metrics()["usage_side/2"].item() == pytest.approx(1 / 3)
    assert use.unused().tolist() == [False, False, True]
    assert list(use.state_dict()) == ["counts"]


def test_revive_replaces_dead_rows_only_and_takes_nothing_that_is_not_finite():
    rows, average = torch.zeros(3, 2), torch.ones(3, 2)
    offers = torch.tensor([[1.0, 2.0], [3.0, 4.0], [torch.nan, 5.0]])
    n = revive([rows, average], torch.tensor([False, True, True]), offers)
    assert n == 1
    assert rows.tolist() == [[0, 0], [3, 4], [0, 0]]
    assert average.tolist() == [[1, 1], [3, 4], [1, 1]]

import pytest
import torch

from utils.evaluations.c2i import Statistics, frechet_distance


def test_frechet_distance_of_known_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    a = Statistics(torch.zeros(3, dtype=torch.float64), 4 * eye)
    b = Statistics(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64), 9 * eye)
    assert frechet_distance(a, b) == pytest.approx(9 + 3 * (2 - 3) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_by_the_matrix_square_root():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(0)
    x, y = torch.randn(200, 6) @ torch.randn(6, 6), torch.randn(300, 6) @ torch.randn(6, 6) + 0.5
    a, b = Statistics.of(x), Statistics.of(y)
    root = torch.from_numpy(scipy_linalg.sqrtm((a.covariance @ b.covariance).numpy()).real)
    trace = (a.covariance + b.covariance - 2 * root).trace()
    wanted = (a.mean - b.mean).square().sum() + trace
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-8)
    with pytest.raises(ValueError, match="at least 2"):
        Statistics.of(x[:1])

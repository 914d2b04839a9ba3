import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DATA
from utils.evaluations.c2i import Statistics, frechet_distance, inception_score, precision_recall, psnr, ssim
from utils.evaluations.c2i.metrics import squared_distances


@pytest.fixture(scope="module")
def published():
    """Features, and what the guided-diffusion evaluator gives for them. (sFID is the FID of other features.)"""
    features = load_file(DATA / "metrics_pool.safetensors")
    return features, json.loads((DATA / "metrics_expected.json").read_text())


def test_distance_and_score_equal_the_original_evaluators(published):
    features, wanted = published
    sample, reference = features["pool_sample"], features["pool_ref"]
    assert frechet_distance(Statistics.of(sample), Statistics.of(reference)) == pytest.approx(wanted["fid"], rel=1e-6)
    p = (sample @ features["softmax_weight"]).softmax(1)
    assert inception_score([p]) == pytest.approx(wanted["inception_score"], rel=1e-5)
    assert inception_score(p.split(77), 200) == pytest.approx(wanted["inception_score_split200"], rel=1e-5)


def test_precision_and_recall_equal_the_original_evaluators(published):
    features, wanted = published
    sample, reference = features["pool_sample"], features["pool_ref"]
    assert precision_recall(sample, reference, fp16=True) == pytest.approx((wanted["precision"], wanted["recall"]))
    assert precision_recall(sample, reference) == pytest.approx((wanted["precision"], wanted["recall"]), abs=0.005)


def test_streamed_statistics_do_not_depend_on_the_parts(published):
    features = published[0]["pool_sample"]
    whole = Statistics.of(features)
    assert torch.allclose(whole.covariance, torch.cov(features.double().T), rtol=1e-9, atol=1e-12)
    parts = Statistics.of(features.split(13))
    assert torch.allclose(whole.mean, parts.mean, rtol=1e-12)
    assert torch.allclose(whole.covariance, parts.covariance, rtol=1e-9, atol=1e-12)


def test_a_set_against_itself(published):
    features = published[0]["pool_ref"]
    assert abs(frechet_distance(Statistics.of(features), Statistics.of(features))) < 1e-6
    assert precision_recall(features, features) == (1.0, 1.0)


@pytest.mark.parametrize(("samples", "others"), [(10, 60), (60, 10), (10, 10), (30, 30), (31, 31), (5, 400)])
def test_few_features_are_compared_as_many_are(samples, others):
    """With 30 features: their covariance's root is the centred features themselves, in whatever parts they come."""
    torch.manual_seed(0)
    a, b = torch.randn(samples, 30).relu(), torch.randn(others, 30) * torch.rand(30) + 1
    distance = frechet_distance(Statistics.of(a.split(4)), Statistics.of(b))
    values = [Statistics.of(x) for x in (a, b)]
    parts = [torch.linalg.eigh(s.covariance) for s in values]
    roots = [vectors * found.clamp_min(0).sqrt() @ vectors.T for found, vectors in parts]
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    shift = (values[0].mean - values[1].mean).square().sum()
    wanted = shift + sum(s.covariance.trace() for s in values) - 2 * cross
    assert distance == pytest.approx(wanted.item(), rel=1e-6)
    assert all((s.root is not None) == (n <= 30) for s, n in zip(values, (samples, others), strict=True))


def test_distance_of_known_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    a = Statistics(torch.zeros(3, dtype=torch.float64), 4 * eye)
    b = Statistics(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64), 9 * eye)
    assert frechet_distance(a, b) == pytest.approx(9 + 3 * (2 - 3) ** 2)
    with pytest.raises(ValueError, match="at least 2"):
        Statistics.of(torch.zeros(1, 3))


def test_score_by_the_obvious_formula():
    torch.manual_seed(0)
    p = torch.randn(10, 4).softmax(1)
    scores = []
    for part in (p[:5], p[5:]):
        marginal = part.mean(0)
        kl = sum((x * (x / marginal).log()).sum().item() for x in part) / 5
        scores.append(math.exp(kl))
    assert inception_score([p], 5) == pytest.approx(sum(scores) / 2, rel=1e-6)
    assert inception_score([torch.eye(4)], 5000) == pytest.approx(4)  # a zero probability is no NaN


def test_precision_and_recall_by_the_obvious_loops(monkeypatch):
    torch.manual_seed(1)
    samples, reference = torch.randn(40, 3) * 1.3, torch.randn(30, 3)

    def radius(point, points):
        return sorted((point - other).square().sum().item() for other in points)[3]  # itself is the first

    def inside(points, manifold):
        reach = [radius(m, manifold) for m in manifold]
        hits = [any((p - m).square().sum().item() <= r for m, r in zip(manifold, reach, strict=True)) for p in points]
        return sum(hits) / len(hits)

    wanted = inside(samples, reference), inside(reference, samples)
    assert 0.1 < wanted[0] < 1
    assert precision_recall(samples, reference) == pytest.approx(wanted)
    monkeypatch.setattr("utils.evaluations.c2i.metrics.BLOCK_FLOATS", 70)  # two rows at a time
    assert precision_recall(samples, reference) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(samples[:3], reference)


def test_an_overflow_of_fp16_is_done_again_in_fp32():
    torch.manual_seed(0)
    far = torch.randn(20, 8) * 300  # squared distances beyond 65504
    assert not squared_distances(far, far, True).isfinite().all()
    assert precision_recall(far, far, fp16=True) == (1.0, 1.0)


def test_psnr_and_ssim_by_their_definitions():
    torch.manual_seed(0)
    a = torch.randint(256, (2, 1, 16, 14)).to(torch.uint8)
    b = (a.int() + torch.randint(-20, 21, a.shape)).clamp(0, 255).to(torch.uint8)
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    assert torch.allclose(psnr(a, b), 20 * torch.log10(255 / error.sqrt()))
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    w = torch.tensor(weights, dtype=torch.float64) / total
    values = []
    for y in range(6):
        for x in range(4):
            p, q = (image[0, 0, y : y + 11, x : x + 11].double() for image in (a, b))
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
            cov = (w * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b)[0].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))


@pytest.mark.slow
def test_fifty_thousand_samples_in_time_and_memory():
    import resource
    import time

    torch.manual_seed(0)
    pool, reference = torch.rand(50_000, 2048), torch.rand(10_000, 2048)
    spatial, spatial_reference = torch.rand(50_000, 2023), torch.rand(10_000, 2023)
    weight = torch.randn(2048, 1008) * 0.1
    began = time.perf_counter()
    frechet_distance(Statistics.of(pool.split(4096)), Statistics.of(reference))
    frechet_distance(Statistics.of(spatial.split(4096)), Statistics.of(spatial_reference))
    inception_score((part @ weight).softmax(1) for part in pool.split(4096))
    precision_recall(pool, reference)
    seconds = time.perf_counter() - began
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, {gib:.1f} GiB")
    assert seconds < 300
    assert gib < 8


def test_ssim_of_large_pictures_takes_little_time():
    """Its window is a product of two lines: 256×256 pixels took half a second with the square one."""
    a = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()
    before = time.process_time()
    for _ in range(3):
        ssim(a, a.flip(0))
    assert (time.process_time() - before) / 3 < 0.2

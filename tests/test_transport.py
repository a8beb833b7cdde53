"""Distances against GeomLoss, POT, SciPy and finite differences, on ordinary and on degenerate clouds."""

import functools

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from geomloss import SamplesLoss

import transport
from transport import (
    DistanceConfig,
    blur_unit,
    box_diameter,
    cloud_distance,
    cloud_spread,
    gaussian_w2,
    l2,
    policy_distance,
    sinkhorn,
)

DTYPES = (torch.float32, torch.float64)


def cloud(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(K=4, A=6, B=5, spread=1.0, shift=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return spread * cloud(B, K, A, seed=1), spread * cloud(B, K, A, seed=2) + shift


def collinear() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = pair(A=1)
    return x * torch.arange(1.0, 4.0, dtype=x.dtype), y * torch.arange(1.0, 4.0, dtype=x.dtype)


def duplicated() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = pair()
    return x[:, [0, 0, 1, 1]], y[:, [2, 2, 2, 3]]


# name -> the two clouds, [B, K, A], and the largest distance that their points may have
CLOUDS = {
    "ordinary": (pair(), 8.0),
    "tanh": (tuple(torch.tanh(2 * z) for z in pair()), box_diameter(1, 6)),
    "one sample": (pair(K=1), 8.0),
    "eight samples": (pair(K=8, A=3), 8.0),
    "one dimension": (pair(A=1), 6.0),
    "one state": (pair(B=1), 8.0),
    "collinear": (collinear(), 20.0),
    "duplicated": (duplicated(), 8.0),
    "tiny spread": (pair(spread=1e-3), 5.0),
    "collapsed, apart": (pair(spread=0.0, shift=0.5), 5.0),
    "far apart": (pair(shift=10.0), 40.0),
    "small box": (pair(spread=0.1), box_diameter(0.4, 6)),
    "large box": (pair(spread=5.0), box_diameter(20.0, 6)),
    "diameter below blur": (pair(spread=1e-3), 0.02),
}
each_cloud = pytest.mark.parametrize("name", CLOUDS)


def geomloss(x, y, blur=0.05, diameter=None, scaling=0.5) -> torch.Tensor:
    return SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter, scaling=scaling, backend="tensorized")(x, y)


def with_gradients(distance, x, y) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value and both gradients of a weighted sum over the states, so that no state's gradient may go to another."""
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    value = distance(x, y)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype)
    return (value.detach(), *torch.autograd.grad((weights * value).sum(), (x, y)))


def optimal(x, y) -> np.ndarray:
    """Half of W2 squared by POT, [B]."""
    return np.array([ot.emd2([], [], ot.dist(a, b) / 2) for a, b in zip(x.numpy(), y.numpy(), strict=True)])


# --- against GeomLoss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["tensorized", "auto"])
@pytest.mark.parametrize("diameter", [None, 9.0])
def test_geomloss_backends_are_geomloss(backend, diameter, dtype):
    x, y = (z.to(dtype) for z in pair())
    ours = with_gradients(lambda x, y: sinkhorn(x, y, 0.1, backend, diameter), x, y)
    for got, expected in zip(ours, with_gradients(lambda x, y: geomloss(x, y, 0.1, diameter), x, y), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(ours[0], sinkhorn(x, y, blur=0.1, diameter=diameter))
    assert ours[0].min() > 0.5


@each_cloud
@pytest.mark.parametrize("blur, scaling", [(0.01, 0.5), (0.05, 0.5), (0.5, 0.5), (0.05, 0.9)])
def test_fused_is_geomloss_in_double_precision(name, blur, scaling):
    (x, y), diameter = CLOUDS[name]
    ours = with_gradients(lambda x, y: sinkhorn(x, y, blur, "fused", diameter, scaling), x, y)
    peer = with_gradients(lambda x, y: geomloss(x, y, blur, diameter, scaling), x, y)
    for got, expected in zip(ours, peer, strict=True):
        assert (got - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
    if name != "diameter below blur":
        assert peer[0].min() > 1e-8  # the comparison is about something


@each_cloud
def test_fused_is_geomloss_in_single_precision(name):
    """Against GeomLoss in float64: in float32 its own error, from expanding the square, is of the tolerance's size."""
    (x, y), diameter = CLOUDS[name]
    ours = with_gradients(lambda x, y: sinkhorn(x, y, 0.05, "fused", diameter), x.float(), y.float())
    peer = with_gradients(lambda x, y: geomloss(x, y, 0.05, diameter), x.float().double(), y.float().double())
    for got, expected, tolerance in zip(ours, peer, (1e-5, 1e-4, 1e-4), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("diameter", [0.05, 0.1, 0.8, 1.6, 1.6 + 1e-9, 1.6 - 1e-9, 51.2])
def test_the_schedule_is_geomloss_at_powers_of_two(diameter):
    x, y = pair()
    assert torch.allclose(sinkhorn(x, y, 0.05, "fused", diameter), geomloss(x, y, 0.05, diameter), rtol=1e-9)


# --- the optimal assignment ------------------------------------------------------------------------------------------


@each_cloud
def test_exact_is_the_optimal_transport(name):
    (x, y), _ = CLOUDS[name]
    assert sinkhorn(x, y, backend="exact").numpy() == pytest.approx(optimal(x, y), rel=1e-9, abs=1e-15)
    single = sinkhorn(x.float(), y.float(), backend="exact")
    assert single.dtype == torch.float32 and single.numpy() == pytest.approx(optimal(x, y), rel=1e-4)


def test_exact_gradient_against_finite_differences():
    x, y = (z.requires_grad_() for z in pair(K=5, A=3, B=3))
    assert torch.autograd.gradcheck(lambda x, y: sinkhorn(x, y, backend="exact"), (x, y))


def test_what_the_schedule_costs_the_gradient():
    """At GeomLoss's default a third of it state by state, and next to nothing of its mean."""
    x, y = pair(B=2000, spread=0.3, shift=0.1)
    exact = with_gradients(lambda x, y: sinkhorn(x, y, backend="exact"), x, y)[1]
    for blur, scaling, least, most in ((0.05, 0.5, 0.3, 0.45), (0.05, 0.9, 0.05, 0.15), (0.01, 0.95, 0.0, 0.02)):
        found = with_gradients(lambda x, y, b=blur, s=scaling: sinkhorn(x, y, b, "fused", box_diameter(1, 6), s), x, y)[
            1
        ]
        assert least <= (found - exact).norm() / exact.norm() <= most
        assert (found - exact).mean((0, 1)).norm() < 0.01 * exact.mean((0, 1)).norm()


@pytest.mark.parametrize("backend", ["tensorized", "fused"])
def test_a_small_blur_converges_to_the_exact_value(backend):
    """To 1% with 4 samples: a schedule that halves the scale leaves the descent that far from its end."""
    x, y = (torch.tanh(z) for z in pair(B=64))
    exact = sinkhorn(x, y, backend="exact")
    errors = [
        ((sinkhorn(x, y, blur, backend, box_diameter(1, 6)) - exact).abs() / exact).mean() for blur in (1, 0.3, 0.01)
    ]
    assert errors[0] > 10 * errors[1] and errors[1] > 1.5 * errors[2] and errors[2] < 0.01


def test_fused_gradient_against_finite_differences():
    """The envelope theorem holds where the descent has ended, which it has under a blur as wide as the clouds."""
    x, y = (z.requires_grad_() for z in pair(K=3, A=2, B=2, spread=0.5))

    def distance(x, y):
        return sinkhorn(x, y, 1.0, "fused", 2.0**6)

    assert torch.autograd.gradcheck(distance, (x, y), eps=1e-4, atol=2e-3, rtol=0.01)


# --- degenerate clouds and invariances -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["tensorized", "fused", "exact"])
def test_identical_clouds(backend, dtype):
    for x in (cloud(3, 4, 6, dtype=dtype), torch.full((3, 4, 6), 0.3, dtype=dtype), cloud(3, 1, 6, dtype=dtype)):
        value, *gradients = with_gradients(lambda x, y: sinkhorn(x, y, 0.05, backend, 5.0), x, x)
        assert value.abs().max() < 1e-6
        assert all(gradient.isfinite().all() and gradient.abs().max() < 1e-5 for gradient in gradients)


@pytest.mark.parametrize("backend", ["tensorized", "fused", "exact"])
def test_translation_of_one_sample_and_of_clouds(backend):
    """A translation v costs ||v||^2 / 2 whatever the blur, and its gradient is v shared among the samples."""
    v = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    for K in (1, 4):
        x = 0.01 * cloud(2, K, 3)
        x.requires_grad_()
        value = sinkhorn(x, (x - v).detach(), 0.05, backend, 5.0)
        assert value.detach().numpy() == pytest.approx(v.square().sum().item() / 2, rel=1e-6)
        value.sum().backward()
        assert (K * x.grad - v).abs().max() < 1e-6


# --- gradients, and what the fused path may not do -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tensorized", "fused", "exact"])
def test_gradients_go_only_where_they_are_wanted(backend):
    x, y = pair()
    sinkhorn = functools.partial(transport.sinkhorn, diameter=9.0)
    assert not sinkhorn(x, y, backend=backend).requires_grad
    y.requires_grad_()
    both = torch.autograd.grad(sinkhorn(x.clone().requires_grad_(), y, backend=backend).sum(), y)[0]
    assert torch.equal(torch.autograd.grad(sinkhorn(x, y, backend=backend).sum(), y)[0], both)
    with torch.no_grad():
        assert not sinkhorn(x, y, backend=backend).requires_grad
        assert not torch.is_grad_enabled()  # GeomLoss by itself switches gradients on
    assert sinkhorn(x, y, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["fused", "exact"])
def test_fused_and_exact_work_without_any_numbers(backend):
    """On the meta device there are no values: whatever reads one, as a wait for a GPU does, fails."""
    x = torch.empty(5, 4, 6, device="meta", requires_grad=True)
    y = torch.empty(5, 4, 6, device="meta")
    value = sinkhorn(x, y, 0.05, backend, 9.0)
    value.sum().backward()
    assert value.shape == (5,) and x.grad.shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        sinkhorn(x, y, 0.05, "tensorized").sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "exact"])
def test_fused_and_exact_in_a_cuda_graph(backend):
    x, y = (torch.tanh(z).float().cuda() for z in pair(B=256))
    x.requires_grad_()

    def step():
        value = sinkhorn(x, y, 0.05, backend, box_diameter(1, 6))
        return value, *torch.autograd.grad(value.sum(), x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.tanh(cloud(256, 4, 6, seed=7)).float())
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    on_cpu = sinkhorn(x.detach().cpu(), y.cpu(), 0.05, backend, box_diameter(1, 6))
    assert torch.allclose(captured[0].cpu(), on_cpu, atol=1e-5)


# --- policies ---------------------------------------------------------------------------------------------------------


def between(w2_noise, x, y, seed=0, B=2000, K=4, A=6, **settings) -> torch.Tensor:
    """The default distance of two samplers with noise of a seed."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(B, K, A, generator=generator, dtype=torch.float64)

    z = noise()
    return policy_distance(DistanceConfig(w2_noise=w2_noise, **settings), 1.0, x, y, z, x(z), noise)


@pytest.mark.parametrize("w2_noise", ["same", "independent", "debiased"])
def test_a_policys_gradient_against_finite_differences_of_the_value(w2_noise):
    """By the parameters of the actor, through all of its samples; the reference's are constants."""
    mean, log_std = (z.requires_grad_() for z in (0.1 * cloud(3, seed=1), 0.3 * cloud(3, seed=2)))
    other = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def distance(mean, log_std):
        return between(w2_noise, lambda z: mean + log_std.exp() * z, lambda z: other * z - 0.2, B=5, A=3)

    assert torch.autograd.gradcheck(distance, (mean, log_std))
    assert torch.autograd.grad(distance(mean, log_std), other, allow_unused=True) == (None,)


@pytest.mark.parametrize("w2_noise", ["same", "independent", "debiased"])
def test_the_slope_by_the_spread_at_equal_policies(w2_noise):
    """0 but with independent noise, where it is the floor over the spread, because the cost is homogeneous."""
    std = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = between(w2_noise, lambda z: std * z, lambda z: 0.3 * z)
    slope = torch.autograd.grad(value, std)[0].item() / 6
    if w2_noise == "independent":
        assert slope == pytest.approx(value.item() / 0.3 / 6, rel=0.02) and slope == pytest.approx(0.2, abs=0.01)
    else:
        assert slope == pytest.approx(0, abs=0.01) and value.item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("w2_noise, spread", [("same", 0.2), ("debiased", 0.114), ("independent", 0.063)])
def test_a_jko_step_under_a_quadratic_value(w2_noise, spread):
    """-Q = ||a - c||^2 / 2 and w = 2 take each action a third of the way to c, and so 0.3 of spread to 0.2.

    That is what the same noise gives with one sample; the others, with four, hold on to less.
    """
    mean, std = torch.zeros(6, dtype=torch.float64, requires_grad=True), torch.tensor(0.3, dtype=torch.float64)
    std.requires_grad_()
    optimizer, K = torch.optim.Adam([mean, std], 0.01), 1 if w2_noise == "same" else 4
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        distance = between(w2_noise, lambda z: mean + std * z, lambda z: 0.3 * z, seed=step, B=100, K=K)
        loss = ((mean - 0.6).square().sum() + 6 * std.square()) / 2 + 2 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.detach().numpy() == pytest.approx(0.2, abs=0.01)
    assert std.item() == pytest.approx(spread, abs=0.01)


# --- spread, scale, closed forms -------------------------------------------------------------------------------------


def test_cloud_spread():
    x = 0.01 * cloud(4096, 4, 6)
    x[:2048] *= 3
    by_hand = np.sqrt(np.var(x.numpy(), axis=1, ddof=1).mean(-1)).mean()
    assert cloud_spread(x).item() == pytest.approx(by_hand, rel=1e-9)
    assert cloud_spread(x + 5.0 * cloud(4096, 1, 6, seed=3)).item() == pytest.approx(0.02, rel=0.05)
    assert cloud_spread(x[:, :1]) == 0 and cloud_spread(x).dim() == 0
    assert not cloud_spread(x.requires_grad_()).requires_grad


def test_a_blur_beyond_the_spread_hides_the_distance_and_a_relative_one_does_not():
    for K, share in ((4, 0.40), (16, 0.16)):
        x, y = pair(K=K, B=200, spread=0.01)
        true = optimal(x, y).mean()
        seen = sinkhorn(x, y, 0.05, "fused", box_diameter(1, 6)).mean()
        assert 0.05 / cloud_spread(y) > 4
        assert seen / true == pytest.approx(share, abs=0.03)
        relative = DistanceConfig(sinkhorn_backend="fused", blur_relative="spread")
        assert cloud_distance(relative, 1.0, x, y, blur_unit(relative, y, 1.0)) / true == pytest.approx(1, abs=0.05)
        assert blur_unit(relative, y, 1.0) == cloud_spread(y) and blur_unit(DistanceConfig(), y, 1.0) == 1


def general_w2(mean1, cov1, mean2, cov2) -> float:
    root = scipy.linalg.sqrtm(cov1)
    cross = np.real(scipy.linalg.sqrtm(root @ cov2 @ root))
    return 0.5 * (((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * cross))


def test_gaussian_w2_is_the_general_formula():
    mean1, mean2 = cloud(7, 4, seed=1), cloud(7, 4, seed=2)
    std1, std2 = cloud(7, 4, seed=3).exp(), cloud(7, 4, seed=4).exp()
    value = gaussian_w2(mean1, std1, mean2, std2)
    for i, rows in enumerate(zip(mean1.numpy(), std1.numpy(), mean2.numpy(), std2.numpy(), strict=True)):
        m1, s1, m2, s2 = rows
        assert value[i].item() == pytest.approx(general_w2(m1, np.diag(s1**2), m2, np.diag(s2**2)), rel=1e-9)
    shared = gaussian_w2(mean1, std1[0], mean2, torch.ones(1, dtype=torch.float64))
    assert torch.allclose(shared, gaussian_w2(mean1, std1[:1].expand(7, 4), mean2, torch.ones(7, 4).double()))


def test_l2_is_the_mean_over_elements():
    a, b = cloud(5, 6, seed=1), cloud(5, 6, seed=2)
    assert l2(a, b).item() == pytest.approx(sum((p - q) ** 2 for p, q in zip(a.ravel(), b.ravel(), strict=True)) / 30)
    halves = sinkhorn(a.unsqueeze(1), b.unsqueeze(1), backend="exact")
    assert l2(a, b).item() == pytest.approx(2 / 6 * halves.mean().item())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "backend"),
    [
        ((5, 6), (5, 6), "exact"),
        ((5, 4, 6), (1, 4, 6), "tensorized"),
        ((5, 4, 6), (5, 4, 1), "exact"),
        ((3, 4, 2), (3, 5, 2), "fused"),
        ((2, 11, 3), (2, 11, 3), "exact"),
    ],
)
def test_clouds_that_do_not_fit_are_refused(x, y, backend):
    """Most of these would broadcast to a number that means nothing."""
    with pytest.raises(ValueError, match="at most 10 samples" if x[1] == 11 else "are not .B, K, A."):
        sinkhorn(torch.zeros(x), torch.ones(y), backend=backend, diameter=9.0)

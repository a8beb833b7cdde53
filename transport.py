"""Distances between policies, from samples of their actions or in closed form.

One convention holds for the whole module: a Wasserstein distance is returned as **half of W2 squared**, the optimal
transport cost for c(x, y) = ||x - y||^2 / 2. GeomLoss with p=2 returns that, and published weights rely on it.

Two choices decide what a distance between two policies means; docs/pogo_theory.md derives both and measures what each
is wrong by.

- Which samples (`policy_distance`). Samples of independent noise lie apart even if the policies are equal, and the
  further apart the wider they are: that distance is smallest for an actor far narrower than its reference. With the
  same noise on both sides it is zero and stationary at equal policies, and a JKO step under it is exact.
- Which solver (`sinkhorn`). `exact` is the optimal assignment. The others are debiased Sinkhorn divergences (Feydy et
  al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", 2019, equation 3), entropic at the
  temperature blur^2. A blur hides what is smaller than itself: two clouds of standard deviation 0.01 in 6 dimensions
  under blur 0.05 have two fifths of their true distance with 4 samples. And GeomLoss's schedule, which halves the scale
  in each step (`scaling` 0.5), ends before the descent does: values are 1% off with 4 samples, gradients a third.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from utils import Basic, Positive, Range

Backend = Literal["exact", "fused", "tensorized", "online", "auto"]
Noise = Literal["same", "independent", "debiased"]
Samples = Annotated[int, Range(1, 64)]
MAX_EXACT = 10  # samples a cloud; work and memory grow as 2^K K
SMALLEST_SPREAD = 1e-3  # of max_action: a cloud narrower than this counts as this wide where a blur is relative to it


# -- Clouds of samples ------------------------------------------------------------------------------------------------


def sinkhorn(
    x: Tensor,
    y: Tensor,
    blur: float = 0.05,
    backend: Backend = "tensorized",
    diameter: float | None = None,
    scaling: float = 0.5,
) -> Tensor:
    """Half of W2 squared between clouds of equally weighted samples, one problem a batch entry.

    `exact` is the optimal assignment without any blur, for at most MAX_EXACT samples. `tensorized`, `online` (needs
    pykeops) and `auto` are GeomLoss's. `fused` solves the same problem by the same schedule in a few batched kernels,
    and holds B (2K)^2 A numbers at its peak: meant for small K. A CUDA graph can capture `exact` and `fused`, which
    never wait for the device. Second derivatives are not meaningful.

    Args:
        x, y: [B, K, A] float32 or float64 samples, K of each state's policy. Gradients flow to both.
        blur: in units of actions; the final temperature is blur^2. `exact` ignores it, diameter and scaling.
        diameter: where the schedule of temperatures begins; for actions in a box, `box_diameter`. One that is too small
            costs accuracy. `fused` needs it; where it is None, GeomLoss measures the box around both batches.
        scaling: ratio of the scales of two steps of the schedule, between 0 and 1; nearer to 1 is slower and nearer to
            the optimum.

    Returns:
        [B]. Never negative but for rounding and an unfinished descent; 0 for equal clouds.

    Raises:
        ValueError: shapes that do not fit, or too many samples for `exact`.
    """
    if x.dim() != 3 or x.shape != y.shape:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} are not [B, K, A], both the same")
    if backend == "exact" and x.shape[1] > MAX_EXACT:
        raise ValueError(f"backend exact takes at most {MAX_EXACT} samples a state, not {x.shape[1]}")
    if not torch.is_grad_enabled():  # neither GeomLoss nor an autograd.Function looks at this
        x, y = x.detach(), y.detach()
    if backend == "exact":
        partner = y.gather(1, _assignment(x, y).unsqueeze(-1).expand_as(y))
        return (x - partner).square().sum(-1).mean(-1) / 2
    if backend == "fused":
        return _FusedSinkhorn.apply(x, y, blur, diameter, scaling)
    from geomloss import SamplesLoss

    solver = SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter, scaling=scaling, debias=True, backend=backend)
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # GeomLoss leaves gradients switched on behind it
        return solver(x, y)


def box_diameter(max_action: float, action_dim: int) -> float:
    """The largest distance between two actions of [-max_action, max_action]^action_dim."""
    return 2 * max_action * math.sqrt(action_dim)


def cloud_spread(x: Tensor) -> Tensor:
    """Standard deviation of the samples of a state, averaged over the states: [B, K, A] -> 0-d, without gradient.

    The root of the variance over K (divided by K - 1) averaged over A, then the mean over B. 0 for K = 1.
    """
    variance = x.detach().var(dim=1, correction=min(1, x.shape[1] - 1))
    return variance.mean(-1).sqrt().mean()


# -- The optimal assignment -------------------------------------------------------------------------------------------


@functools.cache
def _subsets(K: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For k = 1..K, of each subset of k out of K points: its points, and where in the list of k - 1 lies what is left.

    Both [K over k, k]: without its i-th point a subset is the `rest[subset, i]`-th of the list before. Kept, because
    making them waits for the device.
    """
    levels, place = [], {(): 0}
    for k in range(1, K + 1):
        subsets = list(itertools.combinations(range(K), k))
        rest = [[place[subset[:i] + subset[i + 1 :]] for i in range(k)] for subset in subsets]
        levels.append((torch.tensor(subsets, device=device), torch.tensor(rest, device=device)))
        place = {subset: number for number, subset in enumerate(subsets)}
    return levels


@torch.no_grad()
def _assignment(x: Tensor, y: Tensor) -> Tensor:
    """Partner of each point of x in y under the optimal assignment, [B, K] of int64; x, y: [B, K, A].

    By dynamic programming over subsets (Bellman, 1962): the k first points of x go to a set of k points of y at the
    least over j in the set of cost[k, j] plus what the others cost without j.
    """
    levels = _subsets(x.shape[1], x.device)
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square_().sum(-1)  # [B, i, j]
    least, choices = cost.new_zeros(len(x), 1), []
    for k, (points, rest) in enumerate(levels):
        least, choice = (least[:, rest] + cost[:, k][:, points]).min(-1)  # [B, subsets of k + 1 points]
        choices.append(choice)
    subset, partners = torch.zeros_like(choices[-1]), []  # [B, 1]
    for (points, rest), choice in zip(reversed(levels), reversed(choices), strict=True):
        last = choice.gather(1, subset)
        partners.append(points[subset, last])
        subset = rest[subset, last]
    return torch.cat(partners[::-1], 1)


# -- The fused Sinkhorn -----------------------------------------------------------------------------------------------


def _temperatures(blur: float, diameter: float, scaling: float = 0.5) -> list[float]:
    """The schedule of GeomLoss for p=2: diameter^2 twice, then scaling^2 of the last down to blur^2."""
    steps = math.ceil((math.log(blur) - math.log(diameter)) / math.log(scaling))
    return [diameter**2, *(diameter**2 * scaling ** (2 * k) for k in range(steps)), blur**2]


def _logsumexp_scores(potential: Tensor, cost: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum_j exp(potential_j - cost_ij / temperature), and the logarithm of each term's share of the sum.

    Layout as in `_FusedSinkhorn`; the potential is in units of the temperature. A sum is any of its scores less that
    score's log share: `log_softmax` is one kernel, `logsumexp` nine.
    """
    scores = torch.add(potential.permute(1, 0, 3, 2, 4), cost, alpha=-1 / temperature)
    log_shares = scores.log_softmax(0)
    return scores.sub_(log_shares)[:1], log_shares


class _FusedSinkhorn(torch.autograd.Function):
    """Debiased Sinkhorn of all problems x-x, x-y, y-x, y-y at once: (x, y [B, K, A], blur, diameter, scaling) -> [B].

    The four share every kernel, stacked as

        cost[j, i, h, g, b] = ||z_g[i] - z_h[j]||^2 / 2      f[0, i, h, g, b]      z_0 = x, z_1 = y

    where f is the potential of point i of cloud g towards cloud h, and an iteration (Feydy, "Geometric data analysis,
    beyond convolutions", 2020, algorithm 3.5) averages it with

        -t log sum_j exp((f[0, j, g, h, b] - cost[j, i, h, g, b]) / t)

    at the temperatures t of the schedule; a last one without averaging follows. The batch stands last because the
    kernels run along it. Weights 1/K would add one number to all four potentials, which the debiased difference
    cancels, so that none are carried.

    The gradient holds the potentials of the last iteration fixed (envelope theorem). With the shares p of its sums,
    which add up to one, the terms x_i cancel: K dS/dx_i = sum_j p_xx[j, i] x_j - sum_j p_xy[j, i] y_j.
    """

    @staticmethod
    def forward(ctx, x, y, blur, diameter, scaling):
        K = x.shape[1]
        z = torch.stack([x.permute(2, 1, 0), y.permute(2, 1, 0)], dim=2)  # [A, K, 2, B]
        cost = (z[:, :, None, :, None] - z[:, None, :, None]).square_().sum(0).div_(2)
        schedule = _temperatures(blur, diameter, scaling)
        start, _ = _logsumexp_scores(cost.new_zeros(1, 1, 1, 1, 1), cost, schedule[0])
        potential = -start
        for now, after in zip(schedule, schedule[1:] + schedule[-1:], strict=True):
            total, _ = _logsumexp_scores(potential, cost, now)
            potential = (potential - total).mul_(now / (2 * after))  # the average, in units of the next temperature
        total, log_shares = _logsumexp_scores(potential, cost, schedule[-1])
        gradients = (_gradient(log_shares, z, g) if ctx.needs_input_grad[g] else None for g in (0, 1))
        ctx.save_for_backward(*gradients)
        total = total.sum((0, 1))  # [h, g, B]
        return (total[0, 0] + total[1, 1] - total[0, 1] - total[1, 0]).mul_(schedule[-1] / K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        by_clouds = (None if saved is None else grad[:, None, None] * saved for saved in ctx.saved_tensors)
        return *by_clouds, None, None, None


def _gradient(log_shares: Tensor, z: Tensor, g: int) -> Tensor:
    """Derivative of the divergence by the points of cloud g, [B, K, A]; arguments as in `_FusedSinkhorn`."""
    # Below exp(-50) nothing changes the result, and a CPU takes ten times as long for numbers near the smallest.
    shares = log_shares[:, :, :, g].clamp_min(-50).exp_()  # [j, i, h, B]
    means = (shares * z.unsqueeze(2)).sum(1)  # [A, i, h, B]
    return (means[:, :, g] - means[:, :, 1 - g]).div_(z.shape[1]).permute(2, 1, 0)


# -- Policies ---------------------------------------------------------------------------------------------------------

Sampler = Callable[[Tensor], Tensor]  # noise [B, K, A] -> actions [B, K, A]


@dataclass
class DistanceConfig:
    w2_weights: Basic[tuple[float, ...]] = (0.4, 0.5, 0.5)  # weight of each actor's distance: more keeps it nearer
    w2_noise: Noise = "same"  # noise of an actor and its reference: same, independent, or debiased (docs/pogo.md)
    sinkhorn_K: Samples = 4  # samples of a policy in a state, between which distances are measured
    sinkhorn_backend: Backend = "exact"  # solver: exact, fused, or GeomLoss's tensorized, online (needs pykeops), auto
    sinkhorn_blur: Positive = 0.05  # entropic smoothing of distances, in units of actions; the exact solver has none
    sinkhorn_scaling: Annotated[float, Range(0.01, 0.999)] = 0.5  # ratio of Sinkhorn's scales; larger: more accurate
    blur_relative: Literal["none", "spread"] = "none"  # spread: measure the blur in units of the reference's spread


def blur_unit(config: DistanceConfig, reference: Tensor, max_action: float) -> Tensor:
    """What the blur is measured in, 0-d, in units of actions; reference: [B, K, A]."""
    if config.blur_relative == "none":
        return reference.new_ones(())
    return cloud_spread(reference).clamp_min(SMALLEST_SPREAD * max_action)


def cloud_distance(config: DistanceConfig, max_action: float, x: Tensor, y: Tensor, unit: Tensor) -> Tensor:
    """Half of W2 squared between clouds [B, K, A] of a box's actions, averaged over states, 0-d; unit: `blur_unit`."""
    settings = (config.sinkhorn_blur, config.sinkhorn_backend, box_diameter(max_action, x.shape[-1]))
    if config.blur_relative == "none" or config.sinkhorn_backend == "exact":
        return sinkhorn(x, y, *settings, config.sinkhorn_scaling).mean()
    # The divergence for blur * unit is unit^2 times that of the clouds divided by the unit.
    diameter = settings[2] / (SMALLEST_SPREAD * max_action)
    return sinkhorn(x / unit, y / unit, *settings[:2], diameter, config.sinkhorn_scaling).mean() * unit.square()


def policy_distance(
    config: DistanceConfig,
    max_action: float,
    policy: Sampler,
    reference: Sampler,
    z: Tensor,
    x: Tensor,
    noise: Callable[[], Tensor],
) -> Tensor:
    """Half of W2 squared between two policies, estimated from K samples in each state, 0-d.

    With d the `cloud_distance`, x, x' draws of the policy and y, y' of the reference, all of independent noise:

        same          d(x, reference at the noise of x)
        independent   d(x, y)
        debiased      d(x, y) - d(x, x') / 2 - d(y, y') / 2

    Args:
        policy, reference: samplers; the reference gets no gradient.
        z, x: [B, K, A] noise, and the policy's actions at it.
        noise: makes fresh noise of z's shape.
    """
    with torch.no_grad():
        y = reference(z if config.w2_noise == "same" else noise())
        unit = blur_unit(config, y, max_action)
    distance = cloud_distance(config, max_action, x, y, unit)
    if config.w2_noise == "debiased":
        own = cloud_distance(config, max_action, x, policy(noise()), unit)
        with torch.no_grad():
            others = cloud_distance(config, max_action, y, reference(noise()), unit)
        distance = distance - own / 2 - others / 2
    return distance


# -- Closed forms -----------------------------------------------------------------------------------------------------


def gaussian_w2(mean1: Tensor, std1: Tensor, mean2: Tensor, std2: Tensor) -> Tensor:
    """Half of W2 squared between diagonal Gaussians, [..., A] -> [...]; standard deviations are not negative.

    (||mean1 - mean2||^2 + ||std1 - std2||^2) / 2: the Bures-Wasserstein formula where the covariances commute
    (Dowson & Landau, "The Frechet distance between multivariate normal distributions", 1982).
    """
    return ((mean1 - mean2).square() + (std1 - std2).square()).sum(-1) / 2


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean over elements of (a - b)^2, 0-d: the distance D_0 of POGO's first actor to the data's actions.

    It is 2 / A times the mean of half W2 squared between the two point masses.
    """
    return (a - b).square().mean()

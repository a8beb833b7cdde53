"""Distances between policies, from samples of their actions or in closed form.

One convention holds for the whole module: a Wasserstein distance is returned as **half of W2 squared**, the optimal
transport cost for c(x, y) = ||x - y||^2 / 2. GeomLoss with p=2 returns that, and published weights rely on it.

The Sinkhorn divergence (Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
2019, equation 3) is the debiased entropic cost S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 at the temperature
blur^2. What to know when reading its values:

- The blur hides what is smaller than itself; far above the clouds' spread only the distance of their means is left.
  Two clouds of standard deviation 0.01 in 6 dimensions under blur 0.05 have two fifths of their true distance with 4
  samples, a sixth with 16, so that a collapsed policy is hardly held. Log `blur / cloud_spread(y)`; past 1, use a
  smaller blur or one relative to the clouds, the argument `scale`.
- Halving the scale in each step, as GeomLoss does by default, ends the descent early: however small the blur, values
  stay about 1% below the optimum with 4 samples, 4% with 16. `exact` has no such error.
- Two independent draws of one policy lie at a positive distance: `sinkhorn(draw_1, draw_2)` is the floor below which
  a distance says nothing about a movement of the policy.
"""

import functools
import importlib.util
import itertools
import math
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["tensorized", "online", "auto", "fused", "exact"]
BACKENDS = get_args(Backend)
MAX_EXACT = 6  # samples a cloud, 720 assignments; 7 would take seven times as long and as much memory


# ---------------------------------------------------------------------------------------------------------------------
# Clouds of samples
# ---------------------------------------------------------------------------------------------------------------------


def sinkhorn(
    x: Tensor,
    y: Tensor,
    blur: float = 0.05,
    backend: Backend = "tensorized",
    diameter: float | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Half of W2 squared between clouds of equally weighted samples, one problem a batch entry.

    `tensorized`, `online` (needs pykeops) and `auto` are GeomLoss's. `fused` solves the same problem by the same
    schedule in a few batched kernels; with a diameter it never waits for the device, so that a CUDA graph can capture
    it. It holds B (2K)^2 A numbers at its peak: meant for small K. `exact` is the optimal assignment without any
    blur, for at most 6 samples. Gradients follow from the envelope theorem; second derivatives are not meaningful.

    Args:
        x, y: [B, K, A] float32 or float64 samples, K of each state's policy. Gradients flow to both. GeomLoss's
            backends take clouds of different K too.
        blur: in units of actions (of `scale`, where given); the final temperature is blur^2. `exact` ignores it.
        backend: one of BACKENDS.
        diameter: in the same units, where the schedule of temperatures begins (each step halves it until blur). For
            actions in a box, `box_diameter`. One that is too small costs accuracy, one too large a step for each
            factor of two. None measures the bounding box of both batches, as GeomLoss does: this waits for the
            device, and lets the value of one entry depend on the others.
        scale: a positive number or tensor, 0-d or [B], taken as a constant: the result is that for blur * scale and
            diameter * scale. `max_action` or `cloud_spread(y).clamp_min(smallest)` make a blur relative, the latter
            without waiting for the device, with `box_diameter(...) / smallest` as its diameter.

    Returns:
        [B]. Never negative but for rounding and an unfinished descent; 0 for equal clouds.

    Raises:
        ValueError: shapes, dtypes, blur, diameter, scale or backend that do not fit; without a diameter, also samples
            that are not finite.
        ImportError: backend `online` without pykeops.
    """
    _check_clouds(x, y, backend)
    if not 0 < blur < math.inf or diameter is not None and not 0 < diameter < math.inf:
        raise ValueError(f"blur {blur} and diameter {diameter} must be positive and finite")
    if scale is not None:  # the divergence for blur * scale is scale^2 times that of the clouds divided by scale
        unit = _unit(scale, x)
        return sinkhorn(x / unit, y / unit, blur, backend, diameter) * unit.flatten().square()
    if not torch.is_grad_enabled():  # neither GeomLoss nor an autograd.Function looks at this
        x, y = x.detach(), y.detach()
    if backend == "exact":
        return _assignment(x, y)
    diameter = _diameter(x, y) or blur if diameter is None else diameter
    if backend == "fused":
        return _FusedSinkhorn.apply(x, y, blur, diameter)
    return _geomloss(backend, x, y, blur, diameter)


def box_diameter(max_action: float, action_dim: int) -> float:
    """The largest distance between two actions of [-max_action, max_action]^action_dim."""
    return 2 * max_action * math.sqrt(action_dim)


def cloud_spread(x: Tensor) -> Tensor:
    """Standard deviation of the samples of a state, averaged over the states; what a blur is to be compared with.

    Args:
        x: [B, K, A] samples.

    Returns:
        0-d, without gradient, in units of actions: the root of the variance over K (divided by K - 1) averaged over A,
        then the mean over B. 0 for K = 1.

    Raises:
        ValueError: x is not three-dimensional.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have the shape [B, K, A], not {list(x.shape)}")
    variance = x.detach().var(dim=1, correction=min(1, x.shape[1] - 1))
    return variance.mean(-1).sqrt().mean()


def _check_clouds(x: Tensor, y: Tensor, backend: str) -> None:
    """Raises ValueError for what `sinkhorn` cannot take."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x and y must both be float32 or both float64, not {x.dtype} and {y.dtype}")
    fault = None
    if x.dim() != 3 or y.dim() != 3 or not x.numel() or not y.numel():
        fault = "x and y must have the shape [B, K, A] and hold samples"
    elif x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        fault = "x and y must agree in B and A"
    elif backend in ("fused", "exact") and x.shape[1] != y.shape[1]:
        fault = f"backend {backend} needs as many samples in x as in y (tensorized does not)"
    elif backend == "exact" and x.shape[1] > MAX_EXACT:
        fault = f"backend exact takes at most {MAX_EXACT} samples a state (fused with a small blur comes near)"
    if fault:
        raise ValueError(f"{fault}: x is {list(x.shape)}, y is {list(y.shape)}")


def _unit(scale: float | Tensor, x: Tensor) -> Tensor:
    """The argument `scale` of `sinkhorn` as [1, 1, 1] or [B, 1, 1]."""
    if isinstance(scale, Tensor):
        if scale.dim() > 1 or scale.numel() not in (1, len(x)):
            raise ValueError(f"scale must be 0-d or [B] with B = {len(x)}, not {list(scale.shape)}")
        return scale.detach().to(x).view(-1, 1, 1)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale {scale} must be positive")
    return x.new_full((1, 1, 1), scale)


def _diameter(x: Tensor, y: Tensor) -> float:
    """The diagonal of the box around all points of both batches, as GeomLoss measures it. Waits for the device."""
    points = torch.cat([x.detach().flatten(0, 1), y.detach().flatten(0, 1)])
    diameter = (points.amax(0) - points.amin(0)).norm().item()
    if not math.isfinite(diameter):
        raise ValueError("x or y holds samples that are not finite")
    return diameter


def _geomloss(backend: str, x: Tensor, y: Tensor, blur: float, diameter: float) -> Tensor:
    """GeomLoss's debiased Sinkhorn divergence, [B]."""
    if backend == "online" and importlib.util.find_spec("pykeops") is None:
        raise ImportError("backend 'online' needs pykeops: pip install pykeops, or use tensorized or fused")
    from geomloss import SamplesLoss

    with torch.set_grad_enabled(torch.is_grad_enabled()):  # GeomLoss leaves gradients switched on behind it
        return SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter, debias=True, backend=backend)(x, y)


@functools.cache
def _permutations(K: int, device: torch.device) -> Tensor:
    """All orders of K things, [K!, K], in lexical order; kept, because making them waits for the device."""
    return torch.tensor(list(itertools.permutations(range(K))), device=device)


def _assignment(x: Tensor, y: Tensor) -> Tensor:
    """Half the mean squared distance under the best of all assignments, [B]; x, y: [B, K, A]."""
    orders = _permutations(x.shape[1], x.device)
    with torch.no_grad():
        cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)  # [B, i, j]
        totals = cost[:, orders[0], orders].sum(-1)  # [B, K!]; the first order is the identity
        best = orders[totals.argmin(-1)]  # [B, K]
    partner = y.gather(1, best.unsqueeze(-1).expand_as(y))
    return (x - partner).square().sum(-1).mean(-1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# The fused Sinkhorn
# ---------------------------------------------------------------------------------------------------------------------


def _temperatures(blur: float, diameter: float) -> list[float]:
    """The schedule of GeomLoss for p=2, scaling 0.5: diameter^2 twice, then a quarter of the last down to blur^2."""
    steps = math.ceil((math.log(blur) - math.log(diameter)) / math.log(0.5))
    return [diameter**2, *(diameter**2 / 4**k for k in range(steps)), blur**2]


def _logsumexp_scores(potential: Tensor, cost: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum_j exp(potential_j - cost_ij / temperature), and the logarithm of each term's share of the sum.

    Layout as in `_FusedSinkhorn`; the potential is in units of the temperature. A sum is any of its scores less that
    score's log share: `log_softmax` is one kernel, `logsumexp` nine.
    """
    scores = torch.add(potential.permute(1, 0, 3, 2, 4), cost, alpha=-1 / temperature)
    log_shares = scores.log_softmax(0)
    return scores.sub_(log_shares)[:1], log_shares


class _FusedSinkhorn(torch.autograd.Function):
    """Debiased Sinkhorn of all problems x-x, x-y, y-x, y-y at once: (x, y [B, K, A], blur, diameter) -> [B].

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
    def forward(ctx, x, y, blur, diameter):
        K = x.shape[1]
        z = torch.stack([x.permute(2, 1, 0), y.permute(2, 1, 0)], dim=2)  # [A, K, 2, B]
        cost = (z[:, :, None, :, None] - z[:, None, :, None]).square_().sum(0).div_(2)
        schedule = _temperatures(blur, diameter)
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
        return *(None if saved is None else grad[:, None, None] * saved for saved in ctx.saved_tensors), None, None


def _gradient(log_shares: Tensor, z: Tensor, g: int) -> Tensor:
    """Derivative of the divergence by the points of cloud g, [B, K, A]; arguments as in `_FusedSinkhorn`."""
    # Below exp(-50) nothing changes the result, and a CPU takes ten times as long for numbers near the smallest.
    shares = log_shares[:, :, :, g].clamp_min(-50).exp_()  # [j, i, h, B]
    means = (shares * z.unsqueeze(2)).sum(1)  # [A, i, h, B]
    return (means[:, :, g] - means[:, :, 1 - g]).div_(z.shape[1]).permute(2, 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms
# ---------------------------------------------------------------------------------------------------------------------


def gaussian_w2(mean1: Tensor, std1: Tensor, mean2: Tensor, std2: Tensor) -> Tensor:
    """Half of W2 squared between diagonal Gaussians, comparable with `sinkhorn`.

    (||mean1 - mean2||^2 + ||std1 - std2||^2) / 2: the Bures-Wasserstein formula where the covariances commute
    (Dowson & Landau, "The Frechet distance between multivariate normal distributions", 1982).

    Args:
        mean1, mean2: [..., A]; std1, std2: [..., A] or what broadcasts with them, not negative.

    Returns:
        [...], differentiable.

    Raises:
        ValueError: shapes that do not broadcast.
    """
    try:
        mean1, std1, mean2, std2 = torch.broadcast_tensors(mean1, std1, mean2, std2)
    except RuntimeError:
        shapes = ", ".join(str(list(each.shape)) for each in (mean1, std1, mean2, std2))
        raise ValueError(f"mean1, std1, mean2 and std2 do not broadcast: {shapes}") from None
    return ((mean1 - mean2).square() + (std1 - std2).square()).sum(-1) / 2


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean over elements of (a - b)^2, 0-d: the distance D_0 of POGO's first actor to the data's actions.

    It is 2 / A times the mean of half W2 squared between the two point masses. a, b: the same shape, else ValueError.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, not {list(a.shape)} and {list(b.shape)}")
    return (a - b).square().mean()

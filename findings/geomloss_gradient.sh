#!/usr/bin/env bash
# GeomLoss's Sinkhorn divergence is 3 to 5% off in value at its default annealing, and its gradient 60 to 75%.
#
# Versions: geomloss 0.3.1, torch 2.13.0 (CPU build), scipy 1.16.3. Seen with SamplesLoss("sinkhorn", p=2, blur=0.05)
# on 32 pairs of clouds in 6 dimensions, N(0, 0.3^2), against the optimal assignment, median over the pairs: with 16
# points a cloud the value is 3% off and the gradient 59%, cosine 0.8; with 64 points 5% and 76%, cosine 0.7. A scaling
# of 0.9 still leaves 40 to 51% of the gradient, 0.99 9 to 32%. With 4 points it is 30% by default and right from 0.9 on.
# We had guessed that a value right to some percent has a gradient right to some percent, as scaling is called a
# trade of time for precision. Whoever moves points or policies along this gradient should check it, or assign exactly.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q geomloss==0.3.1 torch==2.13.0 scipy==1.16.3
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import torch
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment


def exact(x, y):
    values, gradients = [], []
    for a, b in zip(x, y):
        cost = torch.cdist(a, b) ** 2 / 2
        rows, columns = linear_sum_assignment(cost.numpy())
        values.append(cost[rows, columns].mean())
        gradients.append((a - b[columns]) / len(a))
    return torch.stack(values), torch.stack(gradients).flatten(1)


def sinkhorn(x, y, **settings):
    x = x.clone().requires_grad_()
    values = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized", **settings)(x, y)
    values.sum().backward()
    return values.detach(), x.grad.flatten(1)


off = {}
for points in (4, 16, 64):
    generator = torch.Generator().manual_seed(0)
    x, y = (0.3 * torch.randn(32, points, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    value, gradient = exact(x, y)
    for name, settings in {"default": {}, "0.9": {"scaling": 0.9}, "0.99": {"scaling": 0.99}}.items():
        own, slope = sinkhorn(x, y, **settings)
        in_value = ((own - value).abs() / value).median().item()
        in_gradient = ((slope - gradient).norm(dim=1) / gradient.norm(dim=1)).median().item()
        cosine = torch.cosine_similarity(slope, gradient).median().item()
        off[points, name] = in_value, in_gradient
        print(f"{points:2} points, scaling {name:7}: value {in_value:.3f}, gradient {in_gradient:.3f}, cosine {cosine:.3f}")
for points in (16, 64):
    value, gradient = off[points, "default"]
    assert value < 0.08 and gradient > 0.4 and off[points, "0.9"][1] > 0.25, "the gradient is nearer now"
assert off[4, "0.9"][1] < 0.02
PY

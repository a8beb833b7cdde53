#!/usr/bin/env bash
# torch.cdist is exact for 25 rows and takes another formula from 26 on: a point's distance to itself is no longer 0.
#
# Version: torch 2.13.0 (CPU build), one thread. Seen in float32: cdist(x, x) of 25 rows has a zero diagonal; of 26 rows
# a third to a half of the diagonal is above 0, up to 0.004 for standard normal rows of 29 numbers and 0.35 for the same
# rows shifted by 100. 500 positions of a random walk with steps of 0.03, 20 from the origin, as a maze's in metres: only
# 70 to 72% have the nearest neighbour that exact distances give. compute_mode="donot_use_mm_for_euclid_dist" is exact.
# We had guessed that the default trades speed for last digits, not that nearest neighbours of a path change, nor that 25
# rows in a test say nothing of 26 in a run.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.1
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import torch

EXACT = "donot_use_mm_for_euclid_dist"
generator = torch.Generator().manual_seed(0)
rows = torch.randn(26, 29, generator=generator)
for shift, most in ((0, 1e-3), (100, 0.1)):
    few, many = (torch.cdist(x, x).diagonal() for x in (rows[:25] + shift, rows + shift))
    exact = torch.cdist(rows + shift, rows + shift, compute_mode=EXACT).diagonal()
    share = (many > 0).float().mean().item()
    print(f"shift {shift}: 25 rows {few.max():.4f}, 26 rows {many.max():.4f} ({share:.0%} above 0), exact {exact.max():.4f}")
    assert few.max() == 0 and exact.max() == 0, "25 rows or the exact mode have changed"
    assert many.max() > most and share > 0.1, "26 rows are as exact as 25 now"

walk = 20 + torch.cumsum(0.02 * torch.randn(500, 2, generator=generator), 0)
nearest = [torch.cdist(walk, walk, compute_mode=mode).fill_diagonal_(9).argmin(1) for mode in (
    "use_mm_for_euclid_dist_if_necessary", EXACT)]
same = (nearest[0] == nearest[1]).float().mean().item()
print(f"same nearest neighbour: {same:.0%}")
assert same < 0.9, "the default finds the nearest neighbours of a path now"
PY

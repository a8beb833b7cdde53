#!/usr/bin/env bash
# torch.randn on a CPU gives a seed's numbers only from size 16 on in blocks: 17 numbers do not begin with those of 16.
#
# Versions: torch 2.13.0 (CPU build), numpy 2.4.1. Seen with one seed: the first n of m numbers equal torch.randn(n) for
# n and m below 16 and for multiples of 16; torch.randn(17) shares one number with torch.randn(16), as the last 16 of a
# size that is no multiple of 16 are drawn again. Two draws of 8 are not one of 16, two of 16 are one of 32. A tensor
# that is not contiguous gets yet other numbers from normal_(). float64 equals float32 to rounding below 16 numbers and
# not at all from 16 on. torch.rand and NumPy's generator keep the beginning at every size.
# We had guessed that a seed is a stream of numbers and the size says how many are taken. One sample more in a batch
# changes the noise of others, and a float64 oracle has other noise than the float32 code it checks.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch


def normal(*sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.cat([torch.randn(size, dtype=dtype) for size in sizes])


def uniform(size):
    torch.manual_seed(0)
    return torch.rand(size)


def numpy_normal(size):
    return np.random.default_rng(0).standard_normal(size)


torch.manual_seed(0)
strided = torch.empty(64)[::2].normal_()
same = {
    "8 of 15": torch.equal(normal(15)[:8], normal(8)),
    "15 of 16": torch.equal(normal(16)[:15], normal(15)),
    "16 of 17": torch.equal(normal(17)[:16], normal(16)),
    "16 of 32": torch.equal(normal(32)[:16], normal(16)),
    "8 and 8 are 16": torch.equal(normal(8, 8), normal(16)),
    "16 and 16 are 32": torch.equal(normal(16, 16), normal(32)),
    "strided": torch.equal(strided, normal(32)),
    "float64, 8": torch.allclose(normal(8, dtype=torch.float64).float(), normal(8)),
    "float64, 16": torch.allclose(normal(16, dtype=torch.float64).float(), normal(16)),
    "rand, 16 of 17": torch.equal(uniform(17)[:16], uniform(16)),
    "NumPy, 16 of 17": bool(np.array_equal(numpy_normal(17)[:16], numpy_normal(16))),
}
print(same)
print("shared by 16 and 17:", int((normal(17)[:16] == normal(16)).sum()))
yes = {"8 of 15", "16 of 32", "16 and 16 are 32", "float64, 8", "rand, 16 of 17", "NumPy, 16 of 17"}
assert {name for name, value in same.items() if value} == yes, "torch.randn depends on the size in another way now"
PY

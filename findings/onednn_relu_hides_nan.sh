#!/usr/bin/env bash
# oneDNN's fused relu, which torch.compile puts behind a linear layer on a CPU, makes 0 of nan; torch.relu keeps nan.
#
# Version: torch 2.13.0 (CPU build), one row of nan in a batch of two. F.linear and torch.relu give nan in that row. The
# operator that inductor lowers a frozen linear layer and its relu to, mkldnn._linear_pointwise with "relu", gives 0.
# We had guessed that a fused activation has the values of the one it stands for. A network that has diverged looks
# healthy behind such a layer: losses stay finite, and a check for nan in them does not fire.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import torch

x = torch.ones(2, 3)
x[0] = torch.nan
weight, bias = torch.ones(4, 3), torch.ones(4)
usual = torch.relu(torch.nn.functional.linear(x, weight, bias))
plain = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
fused = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
print(torch.__version__, torch.backends.cpu.get_cpu_capability())
print("torch.relu of F.linear:", usual[0].tolist())
print("oneDNN without activation:", plain[0].tolist())
print("oneDNN with its relu:", fused[0].tolist())
assert usual[0].isnan().all() and plain[0].isnan().all(), "torch.relu no longer keeps nan"
assert (fused[0] == 0).all(), "the fused relu keeps nan now"
assert torch.equal(fused[1], usual[1])
PY

#!/usr/bin/env bash
# The first optimizer that a process makes imports PyTorch's compiler: 800 modules, 70 MB and a second or two of a core.
#
# Versions: torch 2.13.0 (CPU build), numpy 2.4.1. Seen: after `import torch`, which imports torch.optim too, neither
# torch._dynamo nor sympy is there. `torch.optim.SGD([parameter])` imports both, though nothing is compiled, and Adam,
# AdamW and RMSprop do likewise: some 820 modules, 72 MB more of peak memory, 1.6 s of processor time on an AMD EPYC.
# The function that Adam calls, torch.optim.adam.adam, takes its step without them, and so does torch._fused_adam_.
# We had guessed that an eager optimizer costs its moments. In a process that trains for a minute, or in each of eight
# workers, it is a share that profiles of the training loop do not show, as it is spent before the first step.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PY'
import subprocess
import sys

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
PARTS = {
    "import": "pass",
    "adam(), the function": (
        "from torch.optim.adam import adam;"
        "x, g, m, v, n = [torch.zeros(3)], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())];"
        "adam(x, g, m, v, [], n, amsgrad=False, beta1=0.9, beta2=0.999, lr=0.1, weight_decay=0.0, eps=1e-8,"
        " maximize=False); assert (x[0] < 0).all()"
    ),
    "_fused_adam_": (
        "x, g, m, v, n = ([torch.zeros(3)], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [torch.ones(())]);"
        "torch._fused_adam_(x, g, m, v, [], n, lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,"
        " amsgrad=False, maximize=False); assert (x[0] < 0).all()"
    ),
    **{name: f"torch.optim.{name}([torch.zeros(3)], lr=0.1)" for name in OPTIMIZERS},
}
TELL = "; print(len(sys.modules), 'torch._dynamo' in sys.modules, 'sympy' in sys.modules, peak())"
found = {}
for name, code in PARTS.items():
    begin = "import resource, sys, torch; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; "
    done = subprocess.run([sys.executable, "-c", begin + code + TELL], capture_output=True, text=True, check=True)
    modules, compiler, sympy, megabytes = done.stdout.split()
    found[name] = (int(modules), compiler == "True", sympy == "True", int(megabytes))
    print(f"{name:22} {modules} modules, torch._dynamo {compiler}, sympy {sympy}, peak {megabytes} MB")
modules, _, _, megabytes = found["import"]
for name, (own, compiler, sympy, peak) in found.items():
    heavy = name in OPTIMIZERS
    assert compiler == sympy == heavy, f"{name} imports other things now"
    if heavy:
        assert own > modules + 500 and peak > megabytes + 40, f"{name} imports less now"
PY

#!/usr/bin/env bash
# torch.exp on a CPU takes ten and more times as long where its float32 result underflows, even where that is exactly 0.
#
# Versions: torch 2.13.0 (CPU build), numpy 2.2.6. Seen on an AMD EPYC with AVX2, one thread, 65,536 numbers, against
# the time for numbers in [-30, 0]: torch.exp 31 times in [-103, -88], where results are subnormal, and 10 times in
# [-200, -150], where they are 0; torch.exp2 6 and 5 times, from a shorter time; NumPy's exp 1.9 times and 1.0.
# We had guessed that a vectorised exp takes the same time everywhere. Whoever masks logits by adding -1e4 and takes exp
# of them pays this for every masked entry.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import statistics
import time

import numpy as np
import torch

torch.set_num_threads(1)


def seconds(run):
    turns = []
    for _ in range(15):
        begin = time.perf_counter()
        for _ in range(20):
            run()
        turns.append(time.perf_counter() - begin)
    return statistics.median(turns)


ranges = {"usual": (-30.0, 0.0), "subnormal": (-103.0, -88.0), "zero": (-200.0, -150.0)}
numbers = {name: torch.linspace(*ends, 65536) for name, ends in ranges.items()}
assert (numbers["zero"].exp() == 0).all()
scaled = {name: x / float(np.log(2.0)) for name, x in numbers.items()}
arrays = {name: x.numpy() for name, x in numbers.items()}
runs = {
    "torch.exp": lambda name: numbers[name].exp(),
    "torch.exp2": lambda name: scaled[name].exp2(),
    "numpy.exp": lambda name: np.exp(arrays[name]),
}
rates = {}
for name, run in runs.items():
    base = seconds(lambda: run("usual"))
    rates[name] = {where: seconds(lambda: run(where)) / base for where in ("subnormal", "zero")}
    print(name, {where: round(ratio, 1) for where, ratio in rates[name].items()}, "times its usual time")
print(torch.__version__, torch.backends.cpu.get_cpu_capability())
found = rates["torch.exp"]
assert found["zero"] > 3 and found["subnormal"] > 3, "torch.exp no longer slows down where it underflows"
assert rates["numpy.exp"]["zero"] < 3, "numpy.exp slows down too"
PY

#!/usr/bin/env bash
# d3rlpy's fit(n_steps=15_000) trains for 10,000 steps, and fit(n_steps=5_000) for none.
#
# Versions: d3rlpy 2.8.1, torch 2.13.0, numpy 2.4.1. Seen: n_steps is cut to whole epochs of n_steps_per_epoch, 10,000 by
# default (here 10 of 15, and none of 5, with epochs of 10). There is no error or warning; the second returns an empty
# list, and the policy is as it was initialised. We had guessed that the last epoch is a short one. A quick trial below
# 10,000 steps scores an untrained network.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q d3rlpy==2.8.1 torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" -W ignore - <<'PY' 2>&1 | grep -v -i -e debug -e info -e gym -e 'skip building'
import d3rlpy
import numpy as np

generator, rows = np.random.default_rng(0), 100
ends = np.arange(rows) % 50 == 49
data = d3rlpy.dataset.MDPDataset(
    generator.normal(size=(rows, 3)).astype(np.float32),
    generator.uniform(-1, 1, (rows, 2)).astype(np.float32),
    generator.normal(size=rows).astype(np.float32),
    ends,
)
quiet = {"show_progress": False, "logger_adapter": d3rlpy.logging.NoopAdapterFactory()}
found = {}
for asked in (15, 5, 20):
    algorithm = d3rlpy.algos.TD3PlusBCConfig(batch_size=8).create(device=False)
    algorithm.build_with_dataset(data)
    before = algorithm.predict(data.episodes[0].observations)
    history = algorithm.fit(data, n_steps=asked, n_steps_per_epoch=10, **quiet)
    moved = not np.array_equal(before, algorithm.predict(data.episodes[0].observations))
    found[asked] = (algorithm.grad_step, len(history), moved)
    print(f"asked {asked} steps: trained {algorithm.grad_step}, epochs {len(history)}, policy changed: {moved}")
assert found == {15: (10, 1, True), 5: (0, 0, False), 20: (20, 2, True)}, "fit counts otherwise now"
PY

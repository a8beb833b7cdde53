#!/usr/bin/env bash
# dm_control's observations, flattened through Shimmy, stand in another order than dm_control's own flat ones.
#
# Versions: shimmy 2.0.1, gymnasium 1.0.0, dm_control 1.0.50, mujoco 3.17.0. Seen: walker-walk flattened by dm_control
# (flat_observation) is orientations, height, velocity; gymnasium's FlattenObservation over Shimmy's environment gives
# height, orientations, velocity, since a Dict space sorts its keys. Both have 24 numbers, and nothing tells them apart.
# So it is in 15 of the 28 benchmarking tasks. We had guessed that the same task shows the same vector. A policy
# or a dataset of one played through the other sees its numbers permuted.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q shimmy==2.0.1 gymnasium==1.0.0 dm_control==1.0.50 mujoco==3.17.0 numpy==2.4.1 \
    imageio==2.37.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import gymnasium
import numpy as np
import shimmy
from dm_control import suite
from gymnasium.wrappers import FlattenObservation

gymnasium.register_envs(shimmy)


def flat(domain, task):
    """The first observation of one seed, flattened by both."""
    own = suite.load(domain, task, {"random": 0}, environment_kwargs={"flat_observation": True}).reset()
    there = FlattenObservation(gymnasium.make(f"dm_control/{domain}-{task}-v0"))
    return own.observation["observations"], there.reset(seed=0)[0]


own, there = flat("walker", "walk")
parts = {"orientations": own[:14], "height": own[14:15], "velocity": own[15:]}
assert own.shape == there.shape == (24,) and np.array_equal(np.sort(own), np.sort(there)), "other observations now"
print("one vector:", np.array_equal(own, there), "the same numbers:", np.array_equal(np.sort(own), np.sort(there)))
assert np.array_equal(there, np.concatenate([parts[name] for name in sorted(parts)])), "Shimmy has another order now"
assert not np.array_equal(own, there), "both have one order now"
names = [list(suite.load(*task).observation_spec()) for task in suite.BENCHMARKING]
permuted = sum(keys != sorted(keys) for keys in names)
print(f"{permuted} of {len(names)} benchmarking tasks name their parts in another order than the alphabet's")
assert permuted > len(names) / 2, "most tasks are in the alphabet's order now"
PY

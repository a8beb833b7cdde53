#!/usr/bin/env bash
# OGBench's mazes draw starts and goals from NumPy's global generator: reset(seed=...) fixes neither, and the worker
# processes of a vector environment all begin in one and the same place, whatever seeds they are given.
#
# Versions: ogbench 1.2.2, gymnasium 1.4.0, mujoco 3.17.0, Python 3.11 on Linux, where AsyncVectorEnv forks. Seen in
# pointmaze-medium-v0, task 1: two resets with seed 0 give two starts and two goals; resets with seeds 0 and 1 give the
# same, where np.random.seed(5) stands before each. Four environments in AsyncVectorEnv, seeds 0 to 3, begin at one
# point with one goal, since each process has a copy of the global generator; SyncVectorEnv's begin at four.
# We had guessed that seeds fix a reset, as Gymnasium asks for and as its own environments do, and that four seeds in
# four processes are four episodes. Evaluations over n workers may be of one start, n times.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ogbench==1.2.2 gymnasium==1.4.0 mujoco==3.17.0
cat > "$folder/look.py" <<'PY'
import gymnasium
import numpy as np
import ogbench  # noqa: F401  registers the mazes

TASK = {"task_id": 1}


def make():
    import ogbench  # noqa: F401

    return gymnasium.make("pointmaze-medium-v0")


def start_and_goal(seed):
    observation, info = env.reset(seed=seed, options=TASK)
    return np.concatenate([observation[:2], info["goal"][:2]])


def starts(vector):
    with_goals, info = vector([make] * 4).reset(seed=[0, 1, 2, 3], options=TASK)
    return len(np.unique(np.hstack([with_goals[:, :2], np.stack(info["goal"])[:, :2]]), axis=0))


if __name__ == "__main__":
    env = make()
    twice = [start_and_goal(0), start_and_goal(0)]
    others = []
    for seed in (0, 1):
        np.random.seed(5)
        others.append(start_and_goal(seed))
    counts = starts(gymnasium.vector.SyncVectorEnv), starts(gymnasium.vector.AsyncVectorEnv)
    print("seed 0 twice:", *np.round(twice, 3), "seeds 0 and 1 after np.random.seed(5):", *np.round(others, 3))
    print(f"four seeds: {counts[0]} places in one process, {counts[1]} in four")
    assert (twice[0] != twice[1]).all(), "a seed fixes a reset now"
    assert (others[0] == others[1]).all(), "the global generator decides no more"
    assert counts == (4, 1), "four processes begin in as many places as one now"
PY
"$folder/venv/bin/python" "$folder/look.py"

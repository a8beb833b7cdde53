#!/usr/bin/env bash
# OGBench's single-task mazes pay one step later than its goal mazes: a success at the last step counts as a failure.
#
# Versions: ogbench 1.2.2, gymnasium 1.4.0, mujoco 3.17.0. Seen: a point is put just outside the goal and steps in.
# pointmaze-medium-v0 gives reward 1 and terminates at that step, pointmaze-medium-singletask-task1-v0 gives -1 and goes
# on, and pays (reward 0, terminated, success 1) at the next step. We had guessed that both judge the state that a step
# leads to. A dataset's rewards relabelled from next states are therefore a step earlier than the environment's.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ogbench==1.2.2 gymnasium==1.4.0 mujoco==3.17.0
"$folder/venv/bin/python" - <<'PY' 2>&1 | grep -v -i warn
import gymnasium
import numpy as np
import ogbench  # noqa: F401  registers the environments

found = {}
for name, options in (("pointmaze-medium-v0", {"task_id": 1}), ("pointmaze-medium-singletask-task1-v0", None)):
    env = gymnasium.make(name)
    env.reset(seed=1, options=options)
    maze = env.unwrapped
    goal = np.array(maze.cur_goal_xy)
    maze.set_xy(goal - np.array([maze._goal_tol + 0.05, 0]))
    steps = []
    for _ in range(2):
        _, reward, terminated, _, _ = env.step(np.array([1.0, 0.0]))
        inside = bool(np.linalg.norm(maze.get_xy() - goal) <= maze._goal_tol)
        steps.append((inside, float(reward), bool(terminated)))
    found[name] = steps
    print(name, "(inside the goal, reward, terminated):", steps)
assert found["pointmaze-medium-v0"][0] == (True, 1.0, True), "the goal maze pays otherwise now"
late = [(True, -1.0, False), (True, 0.0, True)]
assert found["pointmaze-medium-singletask-task1-v0"] == late, "the single task pays otherwise now"
PY

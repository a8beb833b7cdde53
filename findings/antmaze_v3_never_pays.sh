#!/usr/bin/env bash
# gymnasium-robotics' AntMaze_UMaze-v3 pays nothing to an ant that stands on its goal: the goal moves away first.
#
# Versions: gymnasium-robotics 1.4.2, gymnasium 1.4.0, mujoco 3.17.0. Seen: with the ant set onto desired_goal, a step of
# v3 gives reward 0 and a new goal in the next observation; v4 and v5 give reward 1, and the goal stays.
# We had guessed that all three pay at the goal, and differ in their model of the ant. Scores of v3 are no success rates.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium-robotics==1.4.2 gymnasium==1.4.0 mujoco==3.17.0
"$folder/venv/bin/python" - <<'PY' 2>&1 | grep -E '^v[0-9]|Error'
import gymnasium
import gymnasium_robotics
import numpy as np

gymnasium.register_envs(gymnasium_robotics)
found = {}
for version in ("v3", "v4", "v5"):
    env = gymnasium.make(f"AntMaze_UMaze-{version}")
    observation, _ = env.reset(seed=0)
    goal, ant = np.array(observation["desired_goal"]), env.unwrapped.ant_env
    place = ant.data.qpos.copy()
    place[:2] = goal
    ant.set_state(place, np.zeros_like(ant.data.qvel))
    rewards, moved = [], False
    for _ in range(2):
        observation, reward, *_ = env.step(np.zeros(8))
        rewards.append(float(reward))
        moved = moved or not np.allclose(observation["desired_goal"], goal)
    found[version] = (rewards, moved)
    print(version, "rewards on the goal", rewards, "goal moved", moved)
assert found["v3"] == ([0.0, 0.0], True), "v3 pays now"
assert found["v4"] == found["v5"] == ([1.0, 1.0], False), "v4 or v5 pays otherwise now"
PY

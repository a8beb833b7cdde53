#!/usr/bin/env bash
# Gymnasium's vector wrappers forget every environment's episode so far when one alone is reset by its reset_mask.
#
# Versions: gymnasium 1.4.0, numpy 2.4.1. Seen with AutoresetMode.DISABLED and two environments that pay 1 a step, for 3
# and 5 steps: RecordEpisodeStatistics tells of 2 steps for the longer one, as the shorter one was reset after 3, and
# NormalizeReward's running returns begin anew in both. With autoreset the lengths are right. No error.
# We had guessed that a wrapper forgets what the mask names: its code says so, but the vector environment takes the mask
# out of the options before the wrapper looks for it. Returns of staggered episodes come out too low. A mend is proposed
# upstream (Gymnasium #1696, open).
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import functools

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics

LENGTHS = (3, 5)


class Steps(gymnasium.Env):
    """Pays 1 a step, and ends after `length` of them."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.done = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.done += 1
        return np.zeros(1, np.float32), 1.0, self.done == self.length, False, {}


def vector(mode):
    return SyncVectorEnv([functools.partial(Steps, length) for length in LENGTHS], autoreset_mode=mode)


def first_episodes(mode):
    """What is told of each environment's first episode."""
    envs, told = RecordEpisodeStatistics(vector(mode)), {}
    envs.reset(seed=0)
    while len(told) < len(LENGTHS):
        *_, ended, _, info = envs.step(np.zeros((2, 1), np.float32))
        for number in np.flatnonzero(ended):
            told.setdefault(int(number), int(info["episode"]["l"][number]))
        if mode == AutoresetMode.DISABLED and ended.any():
            envs.reset(options={"reset_mask": ended})
    return [told[number] for number in range(len(LENGTHS))]


for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
    print(mode.value, "lengths told:", first_episodes(mode), "of", list(LENGTHS))
assert first_episodes(AutoresetMode.NEXT_STEP) == list(LENGTHS), "autoreset counts otherwise now"
assert first_episodes(AutoresetMode.DISABLED) == [3, 2], "a partial reset is counted otherwise now"

envs = NormalizeReward(vector(AutoresetMode.DISABLED), gamma=1.0)
envs.reset(seed=0)
for _ in range(3):
    *_, ended, _, _ = envs.step(np.zeros((2, 1), np.float32))
before = envs.accumulated_reward.copy()
envs.reset(options={"reset_mask": ended})
print("NormalizeReward's returns so far:", before, "after a reset of the first alone:", envs.accumulated_reward)
assert before[1] == 3 and envs.accumulated_reward[1] == 0, "NormalizeReward keeps the others' returns now"
PY

#!/usr/bin/env bash
# A test set of Minari's split_dataset hands out episodes of the training set, where it is asked for them by number.
#
# Versions: minari 0.5.4, gymnasium 1.4.0, numpy 2.4.1. Seen: ten episodes are split into seven and three. test[0],
# test[1], test[2] and test.iterate_episodes() give the three; test.iterate_episodes([0, 1, 2]) gives those that had
# these numbers in the whole dataset, whichever set they went to. filter_episodes' subsets do the same. No error.
# We had guessed that numbers count within the subset in both, as len(test) and test[k] do, or that one of another set
# is refused. A loop over test.iterate_episodes(range(n)) scores a model on what it was trained on.
# Ends with 0 while this is so and with 1 once it has changed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "minari[hdf5]==0.5.4" gymnasium==1.4.0 numpy==2.4.1 pillow==13.0.0
export MINARI_DATASETS_PATH="$folder/data"
"$folder/venv/bin/python" -W ignore - <<'PY'
import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

LENGTH, space = 3, gymnasium.spaces.Box(-1, 1, (1,), np.float32)


def episode(number):
    """An episode of zeros, whose rewards are its number."""
    ends = np.arange(LENGTH) == LENGTH - 1
    zeros = np.zeros((LENGTH + 1, 1), np.float32)
    rewards = np.full(LENGTH, float(number))
    return EpisodeBuffer(number, None, None, zeros, zeros[1:], rewards, ends, np.zeros(LENGTH, bool))


whole = minari.create_dataset_from_buffers(
    "own/ten-v0", [episode(k) for k in range(10)], observation_space=space, action_space=space
)


def numbers(episodes):
    return [int(each.rewards[0]) for each in episodes]


train, test = minari.split_dataset(whole, sizes=[7, 3], seed=0)
held_out, asked = numbers(test.iterate_episodes()), numbers(test.iterate_episodes([0, 1, 2]))
print("of the test set:", held_out, "by test[k]:", numbers(test[k] for k in range(3)))
print("test.iterate_episodes([0, 1, 2]):", asked, "of the training set:", [k for k in asked if k not in held_out])
assert held_out == numbers(test[k] for k in range(3)) and len(test) == 3, "subsets count otherwise now"
assert asked == [0, 1, 2] and not set(asked) <= set(held_out), "numbers count within the subset now"
few = whole.filter_episodes(lambda each: each.rewards[0] >= 8)
print("filtered:", numbers(few.iterate_episodes()), "iterate_episodes([0, 1]):", numbers(few.iterate_episodes([0, 1])))
assert numbers(few.iterate_episodes([0, 1])) == [0, 1], "filtered sets count otherwise now"
PY

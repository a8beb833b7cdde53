"""`make_dataset.py --check`: good files pass, each planted fault is named, and no file can do harm."""

import copy
import functools
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import benchmark_data.check as check_module
import dmc_utils
from benchmark_data.check import check, cut_rows, default_picture, episode_returns, find_dataset, run_check
from benchmark_data.check_files import open_data
from benchmark_data.check_robots import ROBOTS
from utils import UserError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CELLS = [(0.0, 0.0), (4.0, 4.0), (20.0, 0.0), (12.0, 8.0)]  # centres of free cells of the medium maze


# --- tiny datasets: linear bodies that obey their velocities and are driven by their actions -------------------------


def body(rng, rows, columns, q, v, dt, action_dim, driven, gain, turned=()):
    """Observations [rows + 1, columns] whose columns q integrate v, and the actions [rows, .] that drive them."""
    observations = np.zeros((rows + 1, columns))
    actions = rng.uniform(-1, 1, (rows, action_dim))
    force = gain * rng.normal(size=(action_dim, len(driven)))
    for action, column in enumerate(turned):
        force[action, list(driven).index(column)] = 2 * gain
    for t in range(rows):
        observations[t + 1] = observations[t]
        observations[t + 1, driven] = 0.8 * observations[t, driven] + actions[t] @ force
        observations[t + 1, v] -= 0.2 * observations[t, q]
        observations[t + 1, q] += dt / 2 * (observations[t, v] + observations[t + 1, v])
    return observations, actions


def stacked(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def flags(rows, last):
    array = np.zeros(rows, bool)
    array[-1] = last
    return array


@functools.cache
def point_arrays():
    rng, parts = np.random.default_rng(0), []
    for centre in CELLS * 2:
        actions = rng.uniform(-1, 1, (201, 2)).astype(np.float32)
        xy = np.array(centre) + 1.5 * np.sin(np.cumsum(0.2 / 1.5 * actions[:-1], axis=0))
        xy = np.concatenate([[centre], xy])
        parts.append({"observations": xy.astype(np.float32), "actions": actions, "terminals": flags(201, True)})
    return stacked(parts)


@functools.cache
def ant_arrays():
    rng, parts = np.random.default_rng(1), []
    q, v = [0, 1, *range(7, 15)], [15, 16, *range(21, 29)]
    for centre in CELLS * 2:
        o, actions = body(rng, 201, 29, q, v, 0.1, 8, v, 0.3, ROBOTS["antmaze"].turned)
        o[:, :2] += centre
        o[:, 7:15] += rng.uniform(-3, 3, 8)  # every episode begins in another posture
        o, actions = o[:201].astype(np.float32), actions.astype(np.float32)
        parts.append({"observations": o, "actions": actions, "terminals": flags(201, True)})
    return stacked(parts)


def runner_episode(rng, name, rows, falls):
    """One episode in D4RL's layout; a hopper that falls does so some 50 rows after `rows`."""
    half, dt, cost, healthy = {"hopper": (5, 0.008, 1e-3, 1.0), "halfcheetah": (8, 0.05, 0.1, 0.0)}[name]
    q, v, turned = list(range(half)), list(range(half + 1, 2 * half + 1)), ROBOTS[name].turned
    o, actions = body(rng, rows + 80 * falls, 2 * half + 1, q, v, dt, 3 if half == 5 else 6, [half, *v], 0.05, turned)
    if falls:
        sinking = 0.05 * np.maximum(np.arange(len(o)) - rows, 0)
        o[:, half + 1] -= sinking
        o[1:, 0] -= np.cumsum(dt / 2 * (sinking[1:] + sinking[:-1]))
    o[:, half] += 1.0 + np.sin(np.arange(len(o)) / 50)
    if half == 5:
        o[:, 0] += 1.25
    end = int(np.argmax(o[:, 0] <= 0.7)) if falls else rows
    o, actions = o[: end + 1].astype(np.float32), actions[:end].astype(np.float32)
    speed = (o[1:, half] + o[:-1, half]) / 2
    rewards = (speed + healthy - cost * np.square(actions).sum(axis=1)).astype(np.float32)
    columns = {"observations": o[:-1], "next_observations": o[1:], "actions": actions, "rewards": rewards}
    states = np.concatenate([np.zeros((end, 1)), o[:-1]], axis=1)  # x is not observed; velocities stay below 10
    columns |= {"infos/qpos": states[:, : half + 1], "infos/qvel": states[:, half + 1 :]}
    return columns | {"terminals": flags(end, falls), "timeouts": flags(end, not falls)}


@functools.cache
def hopper_arrays():
    rng = np.random.default_rng(2)
    return stacked([runner_episode(rng, "hopper", rows, rows != 1000) for rows in (1000, 300, 400, 1000, 200)])


@functools.cache
def cheetah_arrays():
    rng = np.random.default_rng(3)
    return stacked([runner_episode(rng, "halfcheetah", 1000, False) for _ in range(3)])


@functools.cache
def walker_arrays():
    """Two whole episodes of random actions in dm_control, one dictionary a file."""
    env, rng, episodes = dmc_utils.make_env("walk"), np.random.default_rng(4), []
    for seed in range(2):
        observation, info = env.reset(seed=seed)
        rows = [(observation, np.zeros(6), [0.0], [1.0], info["physics"])]
        for _ in range(dmc_utils.EPISODE_STEPS):
            action = rng.uniform(-1, 1, 6).astype(np.float32)
            observation, reward, _, _, info = env.step(action)
            rows.append((observation, action, [reward], [1.0], info["physics"]))
        keys = ("observation", "action", "reward", "discount", "physics")
        episodes.append(
            {key: np.array(values, np.float32) for key, values in zip(keys, zip(*rows, strict=True), strict=True)}
        )
    return episodes


LAYOUTS = {
    "point": ("pointmaze-medium-stitch-v0.npz", point_arrays),
    "ant": ("antmaze-medium-stitch-v0.npz", ant_arrays),
    "hopper": ("hopper_medium-v2.hdf5", hopper_arrays),
    "halfcheetah": ("halfcheetah_medium_expert-v2.hdf5", cheetah_arrays),
    "walker": ("walker_walk-td3-medium", walker_arrays),
}


def save(path, arrays):
    """Write arrays in the layout that the path's name asks for; a list of dictionaries is a folder of episodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(arrays, list):
        (path / "data").mkdir(parents=True, exist_ok=True)
        for index, episode in enumerate(arrays):
            np.savez_compressed(path / "data" / f"episode_{index:06d}_1000.npz", **episode)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, compression="gzip" if np.ndim(array) else None)
    return path


def made(folder, layout, change=lambda arrays: None):
    name, arrays = LAYOUTS[layout]
    arrays = copy.deepcopy(arrays())
    change(arrays)
    return save(folder / name, arrays)


def faults(path):
    return [finding.line() for finding in check(path).findings if finding.severity == "fault"]


# --- good files pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_files_pass(layout, tmp_path):
    path = made(tmp_path, layout)
    report = check(path, tmp_path / "picture.png")
    assert report.good and faults(path) == []
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    facts = dict(report.facts)
    rows = {"point": "1,608", "ant": "1,608", "halfcheetah": "3,000", "walker": "2,002"}
    assert facts["rows"] == rows.get(layout, facts["rows"])
    assert facts["episodes"].startswith({"hopper": "5", "halfcheetah": "3", "walker": "2"}.get(layout, "8") + ", ")
    assert ("returns" in facts) == (layout not in ("point", "ant"))
    assert max(map(len, report.text().replace(str(tmp_path), "").splitlines())) <= 100


def quick(path):
    return path.name.endswith("-val.npz") and "medium-navigate" in path.name or path.name == "hopper_medium-v2.hdf5"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=[] if quick(path) else pytest.mark.slow)
        for pattern in ("ogbench/*.npz", "d4rl/*.hdf5", "walker/collected_data/*")
        for path in sorted(SHARED.glob(pattern))
    ],
)
def test_real_files_pass(path):
    assert faults(path) == []


# --- planted faults are named ----------------------------------------------------------------------------------------


def rolled(key, by):
    def change(arrays):
        for part in arrays if isinstance(arrays, list) else [arrays]:
            # The walker study's row 0 is a reset, with neither action nor reward.
            rows = slice(1, None) if isinstance(arrays, list) else slice(None)
            part[key][rows] = np.roll(part[key][rows], by, axis=0)

    return change


def one(change):
    """The change in one of the walker's episodes."""
    return lambda arrays: change(arrays[1])


def set_rows(key, rows, value):
    def change(arrays):
        arrays[key][rows] = value

    return change


def add_rows(key, rows, value):
    def change(arrays):
        arrays[key][rows] += value

    return change


def as_float64(*keys):
    def change(arrays):
        for part in arrays if isinstance(arrays, list) else [arrays]:
            part.update({key: part[key].astype(np.float64) for key in keys})

    return change


def moved_flag(key, row, to):
    def change(arrays):
        assert arrays[key][row]
        arrays[key][[row, to]] = False, True

    return change


def swapped_tails(first, second, rows):
    """Exchange the last rows of two episodes; `first` and `second` are dictionaries' places or rows past the end."""

    def change(arrays):
        if isinstance(arrays, list):
            for key in arrays[first]:
                a, b = arrays[first][key], arrays[second][key]
                a[-rows:], b[-rows:] = b[-rows:].copy(), a[-rows:].copy()
            return
        for array in arrays.values():
            one, other = np.arange(first - rows, first), np.arange(second - rows, second)
            array[np.concatenate([one, other])] = array[np.concatenate([other, one])]

    return change


def lost_rows(rows):
    def change(arrays):
        for key in arrays:
            arrays[key] = np.delete(arrays[key], rows, axis=0)

    return change


def fewer(key, rows):
    return lambda arrays: arrays.update({key: arrays[key][:-rows]})


def ends_zeroed(arrays):
    arrays["rewards"][arrays["terminals"] | arrays["timeouts"]] = 0


def stuck_ends(arrays):
    last = arrays["terminals"] | arrays["timeouts"]
    arrays["next_observations"][last] = arrays["observations"][last]


PLANTED = [
    # shifted rewards
    ("hopper", rolled("rewards", 1), "shifted rewards.*one row late.*5 of 5 episodes"),
    ("halfcheetah", rolled("rewards", -1), "shifted rewards.*one row early"),
    ("hopper", rolled("rewards", 2), "shifted rewards.*2 rows late"),
    ("hopper", set_rows("rewards", slice(0, 999), hopper_arrays()["rewards"][1:1000]), "shifted rewards.*1 of 5"),
    ("hopper", add_rows("rewards", slice(None), 1.0), r"offset rewards: they lie \+1 off"),
    ("halfcheetah", lambda a: a.update(rewards=a["rewards"] * 2), "rewards are scaled by about 2"),
    ("halfcheetah", lambda a: a.update(rewards=a["rewards"] * 1.1), "rewards are scaled by about 1.1"),
    ("hopper", add_rows("rewards", slice(None), -0.05), "offset rewards: they lie -0.05"),
    ("hopper", set_rows("rewards", slice(-500, None), 0), "rewards in some rows .* they are 0 .*first: row 2,5"),
    ("hopper", set_rows("rewards", slice(1100, 1200), 0.5), "rewards in some rows are not .* gives .*first: row 1,10"),
    ("hopper", lambda a: ends_zeroed(a), "rewards in episodes' last rows .* they are 0 .5 places, first: row 999,"),
    ("hopper", lambda a: a["rewards"].__imul__(-1), "rewards do not go with the robot's velocity"),
    ("hopper", lambda a: np.random.default_rng(0).shuffle(a["rewards"]), "rewards do not go with the robot's velocity"),
    ("hopper", rolled("infos/qpos", 1), "shifted infos/qpos: the state of a row stands one row late"),
    ("halfcheetah", rolled("infos/qvel", -1), "shifted infos/qvel: .* one row early"),
    (
        "hopper",
        add_rows("infos/qpos", (700, 2), 0.1),
        "infos/qpos and observations of a row are not one state .row 700",
    ),
    ("hopper", lambda a: a["infos/qvel"].__imul__(2), "infos/qvel and observations of a row are not one state"),
    ("hopper", lambda a: a.update({"infos/qvel": a["infos/qvel"][:, 1:]}), "wrong shape: infos/qvel"),
    ("walker", rolled("reward", 1), "shifted rewards.*one row late.*2 of 2 episodes"),
    ("walker", one(rolled("reward", -2)), "shifted rewards.*2 rows early.*1 of 2 episodes"),
    ("walker", one(lambda a: a.update(reward=a["reward"] / 2)), "rewards are not those of walker-walk"),
    # swapped episode ends
    ("point", moved_flag("terminals", 602, 640), "swapped episode end: terminals .* row 640, .* at row 602"),
    ("ant", moved_flag("terminals", 602, 601), "swapped episode end: terminals .* row 601, .* at row 602"),
    ("hopper", moved_flag("timeouts", 999, 1100), "swapped episode end: timeouts .* row 1,100, .* at row 999"),
    ("halfcheetah", moved_flag("timeouts", 999, 950), "swapped episode end: timeouts .* row 950, .* at row 999"),
    ("ant", swapped_tails(402, 804, 50), "swapped episode ends: .*row 351.*row 753"),
    ("halfcheetah", swapped_tails(1000, 3000, 50), "swapped episode ends: .*row 949.*row 2,949"),
    ("walker", swapped_tails(0, 1, 100), "swapped episode ends: .*000000_1000.npz row 900.*000001_1000.npz row 900"),
    ("hopper", lambda a: a["timeouts"].__setitem__(999, False), "episode end without a flag"),
    ("ant", set_rows("terminals", 100, True), "misplaced episode end.*row 100"),
    ("hopper", set_rows("timeouts", 100, True), "misplaced episode end.*row 100"),
    (
        "hopper",
        lambda a: a.update(terminals=a["timeouts"], timeouts=a["terminals"]),
        "terminals is set where .* stands",
    ),
    ("hopper", lambda a: a.update(terminals=a["timeouts"], timeouts=a["terminals"]), "timeouts is set where .* fallen"),
    ("halfcheetah", lambda a: a.update(terminals=a["timeouts"], timeouts=a["terminals"]), "never terminates"),
    ("walker", one(set_rows("discount", 500, 0.0)), "discount is not 1"),
    ("point", lambda a: a["terminals"].fill(False), "no episode end is flagged"),
    # cut files
    ("ant", fewer("actions", 5), "different numbers of rows, some were cut: .*actions 1,603"),
    ("hopper", fewer("next_observations", 1), "different numbers of rows"),
    ("point", lost_rows(slice(1500, None)), "the last row does not end an episode: the file was cut"),
    ("walker", one(lost_rows(slice(700, None))), "episode length: 700 rows, not 1,001"),
    # float64
    ("point", as_float64("observations"), "observations is float64, not float32"),
    ("hopper", as_float64("actions", "rewards"), "rewards is float64, not float32"),
    ("walker", as_float64("observation"), "observation is float64, not float32.*2 places"),
    # not finite, out of range
    ("ant", set_rows("observations", (700, 3), np.nan), "observations holds NaN .row 700, episode 3 step 97"),
    ("hopper", set_rows("rewards", 700, np.inf), "rewards holds infinity"),
    ("walker", one(set_rows("action", (7, 0), np.nan)), "actions holds NaN .episode_000001_1000.npz row 7"),
    ("walker", one(set_rows("physics", (7, 0), np.nan)), "physics holds NaN"),
    ("hopper", set_rows("actions", (7, 0), 1.01), r"actions outside \[-1, 1\], up to 1.01"),
    ("walker", one(set_rows("reward", 7, 1.5)), r"rewards outside \[0, 1\]"),
    # position jumps
    (
        "point",
        add_rows("observations", slice(700, 804), 1.0),
        "position jump: rows of one episode.*antmaze v0.*row 700",
    ),
    (
        "ant",
        add_rows("observations", (slice(700, 804), 0), 0.5),
        "position jump: .*0.[45].* in x, y in one step .row 700",
    ),
    ("ant", add_rows("observations", (700, 1), 3.0), "position jump: a row lies apart .*row 700"),
    ("hopper", add_rows("observations", (700, 0), 0.3), "position jump .*0.3 in height"),
    ("walker", one(add_rows("observation", (slice(700, None), 14), 0.5)), "position jump: .*0.5.* in height"),
    ("walker", one(add_rows("physics", (slice(700, None), 1), 5.0)), "position jump: .* in height and x"),
    ("walker", one(add_rows("observation", (700, 3), 0.3)), "position jump or shifted rows: observation and physics"),
    ("point", add_rows("observations", (slice(603, 804), 0), 90.0), "positions inside a wall or outside the maze"),
    ("ant", lost_rows(slice(700, 720)), "position jump: .*row 700"),
    # shifted actions and observations
    ("ant", rolled("actions", 1), "shifted actions.*one row late"),
    ("hopper", rolled("actions", -1), "shifted actions.*one row early"),
    ("ant", lambda a: a["actions"].__imul__(-1), "actions are negated"),
    ("halfcheetah", lambda a: a["actions"].__imul__(-1), "actions are negated"),
    ("hopper", lambda a: a["actions"][:, 1].__imul__(-1), "actions push joints the other way.*: columns 1"),
    ("point", lambda a: a["actions"].__imul__(-1), "actions are negated"),
    ("ant", lambda a: np.random.default_rng(0).shuffle(a["actions"]), "actions do not explain the changes"),
    ("halfcheetah", lambda a: a["actions"].fill(0), "actions do not explain the changes"),
    ("walker", rolled("action", 1), "shifted actions.*2 of 2 episodes"),
    ("walker", one(rolled("action", -1)), "shifted actions: row t holds the action that leaves row t.*1 of 2"),
    ("walker", one(rolled("action", 3)), "the simulator does not reach physics"),
    ("walker", one(lambda a: a["action"][0].fill(0.5)), "row 0 is not a reset"),
    ("hopper", lambda a: a.update(next_observations=a["observations"]), "shifted next_observations.*row t itself"),
    ("hopper", stuck_ends, "next_observations repeat the observation of the same row.*5 places, first: row 999,"),
    # keys, shapes, types
    ("hopper", lambda a: a.pop("rewards"), "key missing: no array 'rewards'"),
    ("walker", one(lambda a: a.pop("physics")), "key missing: no array 'physics'"),
    ("point", lambda a: a.update(observations=a["observations"][:, 0]), "wrong shape: observations"),
    ("ant", lambda a: a.update(observations=a["observations"][:, 2:]), "wrong shape: antmaze has 29"),
    ("walker", one(lambda a: a.update(action=a["action"][:, :5])), "wrong shape: action has 5 numbers"),
    ("hopper", lambda a: a.update(terminals=a["terminals"] * 2), "terminals holds something other than 0 and 1"),
    ("point", lambda a: a.update(actions=a["actions"].astype(np.int32)), "actions is int32"),
    ("point", lambda a: a.update(qpos=a["observations"] + 1), "qpos and observations of a row are not at the same"),
    ("ant", lambda a: a.update(qvel=a["observations"][:50]), "different numbers of rows: qvel"),
]


@pytest.mark.parametrize(("layout", "change", "words"), PLANTED, ids=[f"{p[0]}: {p[2][:40]}" for p in PLANTED])
def test_planted_faults_are_named(layout, change, words, tmp_path):
    found = faults(made(tmp_path, layout, change))
    assert any(re.search(words, line) for line in found), found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_cut_files_are_named(layout, share, tmp_path):
    path = made(tmp_path, layout)
    file = sorted(path.glob("data/*"))[1] if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert any("cut short" in line for line in faults(path))


@pytest.mark.parametrize("layout", ["ant", "hopper"])
def test_damaged_bytes_are_named(layout, tmp_path):
    path = made(tmp_path, layout)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert any("damaged" in line for line in faults(path))


def test_findings_of_many_files_are_one_line(tmp_path):
    path = made(tmp_path, "walker", as_float64("observation", "physics"))
    report = check(path)
    assert [finding.count for finding in report.findings] == [2, 2] and report.verdict == "2 faults"
    assert report.text().splitlines()[0].endswith(": 2 faults")


# --- what is no fault ------------------------------------------------------------------------------------------------


def notes(path):
    report = check(path)
    assert report.good, report.text()
    return " | ".join(finding.line() for finding in report.findings)


def test_official_replay_files_are_good(tmp_path):
    """D4RL's own converter leaves float64 everywhere and some episode ends without a flag."""
    arrays = {key: a if a.dtype == bool else a.astype(np.float64) for key, a in hopper_arrays().items()}
    arrays = copy.deepcopy(arrays) | {"infos/action_log_probs": np.zeros(len(arrays["rewards"]))}
    arrays["timeouts"][999] = False
    path = save(tmp_path / "hopper_medium_replay-v2.hdf5", arrays)
    found = notes(path)
    assert "float64" in found and "episode ends without a flag" in found
    assert dict(check(path).facts)["episodes"].startswith("5, ")
    del arrays["infos/action_log_probs"]  # then it is somebody else's file
    assert any("float64" in line for line in faults(save(tmp_path / "hopper_medium_replay-v2.hdf5", arrays)))


def test_official_files_may_be_cut_at_a_number_of_rows(tmp_path):
    path = made(tmp_path, "halfcheetah", lost_rows(slice(2500, None)))
    assert "last row does not end an episode, as in official files" in notes(path)


def test_files_without_timeouts_are_cut_at_the_time_limit(tmp_path):
    def old(arrays):
        for key in ("timeouts", "next_observations"):
            del arrays[key]

    assert "no timeouts: episodes are cut every 1000 steps" in notes(made(tmp_path, "halfcheetah", old))
    assert len(open_data(tmp_path / LAYOUTS["halfcheetah"][0]).starts) == 3


def goal_maze(arrays, shift):
    """An ant's file as D4RL has it: 1 where the next row lies within 0.5 of the goal, terminals the same."""
    near = np.linalg.norm(arrays["observations"][:, :2], axis=1) <= 0.5
    rewards = np.roll(np.append(near[1:], False), shift).astype(np.float64)
    columns = {"observations": arrays["observations"], "actions": arrays["actions"], "rewards": rewards}
    return columns | {"terminals": rewards, "timeouts": arrays["terminals"], "infos/goal": np.zeros((len(near), 2))}


def crossing_ants():
    """Ants that run through the goal at 0.25 a row, in all directions."""
    arrays = copy.deepcopy(ant_arrays())
    for episode in range(8):
        rows = slice(201 * episode, 201 * (episode + 1))
        angle = episode * np.pi / 4
        course = np.outer(np.sin(np.arange(201) / 40) * 10, [np.cos(angle), np.sin(angle)])
        arrays["observations"][rows, :2] = course
        arrays["observations"][rows, 15:17] = np.gradient(course, axis=0) / 0.1
    return arrays


def test_d4rl_mazes(tmp_path):
    arrays = crossing_ants()
    found = notes(save(tmp_path / "antmaze-medium-play-v2.hdf5", goal_maze(arrays, 0)))
    assert "rewards is float64" in found and "terminals is stored as float64" in found
    for shift, words in ((-1, "one row early"), (2, "2 rows late")):
        found = faults(save(tmp_path / "antmaze-medium-play-v2.hdf5", goal_maze(arrays, shift)))
        assert any("shifted rewards" in line and words in line for line in found), found
    # The fault of v0: timeouts in other rows than the episodes' ends.
    late = goal_maze(ant_arrays(), 0)
    late["timeouts"] = np.roll(late["timeouts"], -60)
    found = " | ".join(faults(save(tmp_path / "antmaze-medium-diverse-v0.hdf5", late)))
    assert "swapped episode end" in found and "7 places" in found
    late["timeouts"][:] = False
    late["timeouts"][-1] = True
    found = " | ".join(faults(save(tmp_path / "antmaze-medium-diverse-v0.hdf5", late)))
    assert "position jump" in found and "7 places" in found


def test_maze2d_is_one_walk_cut_by_timeouts(tmp_path):
    rng = np.random.default_rng(0)
    o, actions = body(rng, 1500, 4, [0, 1], [2, 3], 0.01, 2, [2, 3], 0.3)
    arrays = {"observations": o[:-1].astype(np.float32), "actions": actions.astype(np.float32)}
    arrays |= {"rewards": np.zeros(1500, np.float32), "terminals": np.zeros(1500, bool)}
    arrays["timeouts"] = np.arange(1500) % 150 == 100
    assert "misplaced" not in notes(save(tmp_path / "maze2d-umaze-sparse-v1.hdf5", arrays))
    arrays["observations"][700:, :2] += 2
    assert any("position jump" in line for line in faults(save(tmp_path / "maze2d-umaze-sparse-v1.hdf5", arrays)))


def test_teleporters_are_no_jumps(tmp_path):
    name = "pointmaze-teleport-stitch-v0.npz"
    exits = open_data(save(tmp_path / name, point_arrays())).teleport_exits
    arrays = copy.deepcopy(point_arrays())
    steps = 0.2 * np.sin(np.arange(101))[:, None] * [1.0, 0.5]
    arrays["observations"][100:201] = exits[0] + steps
    assert not any("jump" in line and "row 100," in line for line in faults(save(tmp_path / name, arrays)))
    arrays["observations"][100:201] += 3
    assert any("jump" in line and "row 100," in line for line in faults(save(tmp_path / name, arrays)))


def test_unknown_robots_get_general_checks(tmp_path):
    arrays = copy.deepcopy(hopper_arrays())
    del arrays["next_observations"]
    arrays["observations"] = np.column_stack([arrays["observations"], np.full(len(arrays["rewards"]), 3, np.float32)])
    arrays["observations"][500, 2] += 50
    found = notes(save(tmp_path / "thing.hdf5", arrays))
    assert "unknown robot" in found and "20 times" in found and "never change: 11" in found


def test_copies_are_noted(tmp_path):
    def copied(arrays):
        arrays["observations"][201:402] = arrays["observations"][:201]
        arrays["observations"][300:302], arrays["actions"][300:302] = (
            arrays["observations"][300],
            arrays["actions"][300],
        )
        arrays["observations"][1005:1206] = arrays["observations"][:201]

    found = notes(made(tmp_path, "point", copied))
    assert "observations are those of an earlier one" in found and "rows that repeat the row before" in found


# --- names, manifests, the command -----------------------------------------------------------------------------------


def manifest(path, dataset_id, files):
    entries = {
        str(file.relative_to(path.parent)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    path.write_text(json.dumps({"id": dataset_id, "files": entries}))


@pytest.mark.parametrize("layout", ["point", "hopper", "walker"])
def test_manifest_must_agree(layout, tmp_path, monkeypatch):
    folder = tmp_path / "local" / ("collected_data" if layout == "walker" else "")
    path = made(folder, layout)
    assert any("incomplete: it lies in a folder local/ without the manifest" in line for line in faults(path))
    files = sorted(path.glob("data/*")) or [path]
    dataset_id = "local/" + (path.name if layout == "walker" else path.stem.replace("_", "-"))
    beside = folder / f"{path.name if path.is_dir() else path.stem}.json"
    manifest(beside, dataset_id, files)
    monkeypatch.chdir(folder)  # paths may be relative
    report = check(path.name)
    assert report.good and report.findings == []
    assert dict(report.facts)["dataset"] == f"{dataset_id}, by its manifest"
    assert notes(path / "data" if path.is_dir() else path) == ""
    manifest(beside, "local/something-else", files)
    assert any("belongs to local/something-else" in line for line in faults(path))
    manifest(beside, dataset_id, files)
    entries = json.loads(beside.read_text())
    next(iter(entries["files"].values()))["sha256"] = "0" * 64
    beside.write_text(json.dumps(entries))
    assert any("SHA-256 is not what the manifest" in line for line in faults(path))
    for content in ("{}", "[" * 100_000, '{"files": ' * 100_000):
        beside.write_text(content)
        assert any("cannot be read" in line for line in faults(path))
    manifest(beside, dataset_id, files)
    entries = json.loads(beside.read_text())
    entries["files"]["other.npz"] = {"bytes": 3, "sha256": ""}
    beside.write_text(json.dumps(entries))
    assert any("incomplete: a file that the manifest" in line and "other.npz" in line for line in faults(path))


def test_single_episodes_and_their_names(tmp_path):
    path = made(tmp_path, "walker")
    file = path / "data" / "episode_000001_1000.npz"
    assert notes(file) == "" and dict(check(file).facts)["dataset"].startswith("walker_walk-td3-medium")
    other = file.rename(file.with_name("episode_000001_900.npz"))
    assert any("the file name says 900 steps" in line for line in faults(other))
    run = path.rename(tmp_path / "walker_run-td3-medium")
    assert any("rewards are not those of walker-run" in line for line in faults(run))
    unnamed = run.rename(tmp_path / "mine")
    assert not any("rewards" in line for line in faults(unnamed))


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = made(tmp_path / "data", "point")
    assert run_check(path) == 0
    shown = capsys.readouterr().out
    assert "good" in shown and "8, 201 rows each" in shown and "free cells visited" in shown
    picture = default_picture(path)
    assert picture.is_file() and str(picture) in " ".join(shown.split())
    bad = made(tmp_path, "ant", add_rows("observations", (slice(700, 804), 0), 9.0))
    assert run_check(bad, "jump.png") == 1 and (tmp_path / "jump.png").is_file()
    assert "fault position jump" in capsys.readouterr().out


def test_an_id_stands_for_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hopper = made(tmp_path / "local", "hopper")
    manifest(hopper.with_suffix(".json"), "local/hopper-medium-v2", [hopper])
    assert run_check("local/hopper-medium-v2", dataset_dir=tmp_path) == 0
    assert "local/hopper-medium-v2, by its manifest" in capsys.readouterr().out
    point = made(tmp_path, "point")
    assert find_dataset("pointmaze-medium-stitch-v0", tmp_path) == point
    assert find_dataset(str(point)) == point
    walker = made(tmp_path / "collected_data", "walker")
    assert find_dataset("walker_walk-td3-medium", tmp_path) == walker
    for name, words in (
        (
            "local/halfcheetah-medium-v2",
            "make it with `python make_dataset.py --dataset local/halfcheetah-medium-v2 --dataset_dir .*`, or give a",
        ),
        ("hopper-expert-v2", "hopper-expert-v2: not at .*hopper_expert-v2.hdf5; put the official file there"),
        ("hopper-experts-v2", "no such file or folder, and no dataset id; did you mean hopper-expert-v2. Give a"),
        ("local/antmaze-medium-naviate-v0", "no dataset id; did you mean local/antmaze-medium-navigate-v0. Give a"),
        ("swimmer-medium-v2", "no such file or folder, and no dataset id; give a"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run_check(name, dataset_dir=tmp_path)
        assert "\n" not in str(error.value)


def test_files_of_d4rls_antmazes_have_names_of_their_own(tmp_path):
    name = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
    path = save(tmp_path / name, goal_maze(crossing_ants(), 0))
    assert find_dataset("antmaze-umaze-v2", tmp_path) == path
    assert dict(check(path).facts)["dataset"] == "antmaze-umaze-v2, by its name"


def test_names_that_are_no_datasets_are_noted(tmp_path):
    """What a name does not tell is not checked, or taken from the numbers; the report says so."""
    point = save(tmp_path / "mine.npz", point_arrays())
    assert dict(check(point).facts)["dataset"] == "unknown: 'mine' is no dataset id of --list"
    assert dict(check(made(tmp_path, "point")).facts)["dataset"] == "pointmaze-medium-stitch-v0, by its name"
    assert "neither walls nor the recipe's rows an episode are checked" in notes(point)
    hopper = save(tmp_path / "mine.hdf5", hopper_arrays())
    assert "the name tells no robot" in notes(hopper) and dict(check(hopper).facts)["layout"] == "D4RL, hopper"
    assert "the name tells no task" in notes(save(tmp_path / "mine", walker_arrays()))


def test_the_report_comes_without_a_picture_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").write_text("")  # where a picture goes that nobody asked for
    assert run_check(made(tmp_path, "point")) == 0
    assert "cannot write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("file/x.png", "cannot write there .Not a directory.; choose another"),
        ("folder.png", "cannot write there .it is a folder.; choose another"),
        ("x" * 300 + ".png", "cannot write there .File name too long.; choose another"),
        ("pointmaze-medium-stitch-v0.npz", "give a name that ends in .png"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_the_work(picture, words, tmp_path, monkeypatch):
    path = made(tmp_path, "point")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    content = path.read_bytes()
    monkeypatch.setattr(check_module, "check", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=f"^--picture {tmp_path / picture}: {words}") as error:
        run_check(path, tmp_path / picture)
    assert "\n" not in str(error.value) and path.read_bytes() == content


def test_no_folder_is_left_for_a_picture_that_is_not_drawn(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(UserError, match="not a dataset"):
        run_check(tmp_path / "other.npz", tmp_path / "new" / "x.png")
    assert not (tmp_path / "new").exists()
    assert run_check(made(tmp_path, "point"), tmp_path / "new" / "x.PNG") == 0
    assert (tmp_path / "new" / "x.PNG").is_file()


def test_a_folder_of_one_dataset_means_that_one(tmp_path, capsys):
    point = made(tmp_path / "a" / "local", "point")
    manifest(point.with_suffix(".json"), "local/pointmaze-medium-stitch-v0", [point])
    save(point.with_name("pointmaze-medium-stitch-v0-val.npz"), point_arrays())
    save(point.parent / ".hopper_medium-v2.tmp" / "hopper_medium-v2.hdf5", hopper_arrays())  # it is being made
    walker = made(tmp_path / "b" / "local" / "collected_data", "walker")
    for folder in (point.parent, point.parent.parent):
        assert find_dataset(folder) == point
    for folder in (tmp_path / "b", walker.parent, walker):
        assert find_dataset(folder) == walker
    assert find_dataset(walker / "data") == walker / "data"
    assert run_check(tmp_path / "a", tmp_path / "x.png") == 0
    assert capsys.readouterr().out.startswith(f"{point}: good")
    made(tmp_path / "b", "hopper")
    with pytest.raises(UserError, match="holds 2 datasets; check one of them: "):
        find_dataset(tmp_path / "b")


@pytest.mark.parametrize(
    ("keep", "mark", "whole", "rows"),
    [(2900, False, 4, 94), (2900, True, 4, 94), (1353, False, 2, 0), (2806, False, 4, 0), (500, True, 1, 500)],
)
def test_returns_are_of_whole_episodes(keep, mark, whole, rows, tmp_path):
    """D4RL leaves an end that the file's size cut unmarked, make_dataset.py marks it as a timeout."""

    def cut(arrays):
        for key in arrays:
            arrays[key] = arrays[key][:keep]
        arrays["timeouts"][-1] = mark

    path = made(tmp_path, "hopper", cut)
    data, report = open_data(path), dict(check(path).facts)
    assert cut_rows(data) == rows
    np.testing.assert_allclose(
        episode_returns(data), np.add.reduceat(data.columns["rewards"].astype(float), data.starts)[:whole]
    )
    assert (f"the last one is cut, at {rows} rows" in report["episodes"]) == bool(rows)
    assert (f"of the {whole} whole ones" in report["returns"]) == (rows == 94)


def test_pictures_of_different_datasets_have_different_names(tmp_path):
    made(tmp_path / "a" / "collected_data", "walker")
    folder = tmp_path / "a" / "collected_data" / "walker_walk-td3-medium"
    episode = folder / "data" / "episode_000001_1000.npz"
    names = ("x.npz", "x.hdf5", "x-val.npz", "local/x.npz", "other/local/x.npz", "other/x.npz")
    paths = [folder, episode, *(tmp_path / name for name in names)]
    assert len({default_picture(path) for path in paths}) == len(paths)
    assert default_picture(folder / "data") == default_picture(folder)
    assert default_picture(tmp_path / "other" / ".." / "x.npz") == default_picture(tmp_path / "x.npz")
    assert re.fullmatch("x-[0-9a-f]{8}.png", default_picture(tmp_path / "x.npz").name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.npz", "no such file or folder"),
        ("text.txt", "not a dataset; --check takes"),
        ("empty", "no episode_<index>_<steps>.npz"),
        ("several", "holds 2 datasets; check one of them: .*collected_data/a, "),
        ("other.npz", "not a dataset of this kind: it holds weights"),
        ("pipe.npz", "not a dataset; --check takes"),
    ],
)
def test_what_is_no_dataset(name, words, tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for dataset in ("a", "b"):
        save(tmp_path / "several" / "collected_data" / dataset, [{"observation": np.zeros(3)}])
    with pytest.raises(UserError, match=words) as error:
        run_check(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_pages_saved_as_datasets(tmp_path):
    for name in ("a.npz", "a.hdf5"):
        (tmp_path / name).write_text("<html>404</html>")
        assert any("begins with b'<html>" in line for line in faults(tmp_path / name))


# --- files that mean harm --------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_pickled_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **point_arrays() | {"actions": np.array([Bomb()], dtype=object)}, allow_pickle=True)
    assert any("actions holds object" in line for line in faults("x.npz"))
    assert not Path("exploded").exists()


def test_arrays_get_no_memory_that_their_bytes_cannot_fill(tmp_path):
    rows = 10**13
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for key in ("observations", "actions"):
            file.create_dataset(key, (rows, 3), "f4", chunks=(1024, 3))
        file["rewards"] = np.zeros(3, np.float32)
    assert any("observations declares" in line and "cannot hold" in line for line in faults(tmp_path / "x.hdf5"))
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 2), np.float32)) | {"shape": (rows, 2)}
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("observations.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
    assert any("observations declares" in line for line in faults(tmp_path / "x.npz"))


def test_nothing_outside_the_file_is_read(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros((5, 11), np.float32)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(bytes(60))
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["observations"] = h5py.ExternalLink("other.hdf5", "observations")
        layout = h5py.VirtualLayout((5, 3), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "observations", (5, 11))[:, :3]
        file.create_virtual_dataset("actions", layout)
        file.create_dataset("rewards", (15,), "f4", external=[(str(raw), 0, 60)])
        file["terminals"] = np.zeros(5, [("a", "i4"), ("b", "f4")])
        file.create_group("timeouts")
        file["next_observations"] = h5py.Empty("f4")
    found = " | ".join(faults(tmp_path / "x.hdf5"))
    for words in ("observations is a link", "actions keeps its numbers in another file", "rewards keeps its numbers"):
        assert words in found
    assert "terminals holds" in found and "next_observations holds no array" in found


@pytest.mark.parametrize("layout", ["point", "hopper"])
def test_any_damage_gives_a_report(layout, tmp_path):
    """Bytes changed anywhere, the directories of the file included, end in a report and never in an exception."""
    name, arrays = LAYOUTS[layout]
    path = save(tmp_path / name, {key: array[:40] for key, array in arrays().items()})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            check(path)
        except UserError as error:  # damage may hide every known key
            assert "not a dataset" in str(error)

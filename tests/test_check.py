"""`make_dataset.py --check`: good files of every family pass, and faults are named."""

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data import check as check_module
from benchmark_data import local
from benchmark_data.check import check, find, run_check
from benchmark_data.walker import play_episode
from offline_data import find_dataset
from utils import UserError


def steps(env, observation, rows, rng):
    """One episode in D4RL's layout, of at most `rows` steps."""
    parts = {key: [] for key in ("observations", "actions", "next_observations", "rewards", "infos/qpos", "infos/qvel")}
    data, done = env.unwrapped.data, False
    for _ in range(rows):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        state = data.qpos.copy(), data.qvel.copy()
        following, reward, done, *_ = env.step(action)
        for key, value in zip(parts, (observation, action, following, reward, *state), strict=True):
            parts[key].append(value)
        observation = following
        if done:
            break
    arrays = {key: np.array(values, np.float64 if "infos" in key else np.float32) for key, values in parts.items()}
    last = np.arange(len(arrays["rewards"])) == len(arrays["rewards"]) - 1
    return arrays | {"terminals": last & done, "timeouts": last & (not done)}


def stacked(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@functools.cache
def recorded(dataset_id):
    """Arrays of a dataset's file; for the walker study a list, one dictionary an episode."""
    rng, parts = np.random.default_rng(0), []
    if dataset_id in dmc_utils.OFFICIAL_IDS:
        random = SimpleNamespace(act=lambda observation, rng: rng.uniform(-1, 1, 6).astype(np.float32))
        return [play_episode(dmc_utils.WalkerEnv("walk"), random, np.random.SeedSequence(seed)) for seed in range(2)]
    if dataset_id in d4rl_utils.OFFICIAL_IDS:
        env, limit = d4rl_utils.make_env(dataset_id), find_dataset(dataset_id).max_episode_steps
        while sum(len(part["rewards"]) for part in parts) < 1500:
            parts.append(steps(env, env.reset(seed=len(parts))[0], limit, rng))
        arrays = stacked(parts)
        left_out = {"antmaze": ("next_observations",), "walker2d": ("infos/qpos", "infos/qvel")}
        return {key: a for key, a in arrays.items() if key not in left_out.get(dataset_id.split("-")[0], ())}
    env = ogbench_utils.make_env(dataset_id)
    for seed in range(4):
        start, _ = ogbench_utils.seeded_reset(env, seed, {"task_id": seed + 1})
        parts.append(steps(env.unwrapped, start, 201, rng))
    arrays = stacked(parts)
    states = {key: arrays[f"infos/{key}"].astype(np.float32) for key in ("qpos", "qvel")}
    return {key: arrays[key] for key in ("observations", "actions")} | {"terminals": arrays["timeouts"]} | states


FAMILIES = {
    "point": "pointmaze-medium-stitch-v0",
    "ant": "antmaze-medium-stitch-v0",
    "humanoid": "humanoidmaze-medium-stitch-v0",
    "hopper": "hopper-medium-v2",
    "halfcheetah": "halfcheetah-medium-v2",
    "walker2d": "walker2d-medium-v2",
    "d4rl ant": "antmaze-umaze-v2",
    "walker": "walker_walk-td3-medium",
}


def file_name(dataset_id):
    return Path(find_dataset(dataset_id).files[0]).name


def save(path, arrays):
    """Write arrays in the layout that the path's name asks for."""
    if isinstance(arrays, list):
        (path / "data").mkdir(parents=True)
        for index, episode in enumerate(arrays):
            np.savez_compressed(path / "data" / f"episode_{index:06d}_1000.npz", **episode)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


def made(folder, family, change=lambda parts: None):
    """A family's dataset, `change` having been applied to its arrays: a list of dictionaries."""
    arrays = copy.deepcopy(recorded(FAMILIES[family]))
    change(arrays if isinstance(arrays, list) else [arrays])
    return save(folder / file_name(FAMILIES[family]), arrays)


def faults(path):
    return check(path).faults


def column(part, name):
    return name if name in part else name[:-1]  # the walker study writes action, not actions


def shifted(parts):
    for part in parts:
        rows = slice(1, None) if "physics" in part else slice(None)  # its row 0 is a reset
        key = column(part, "actions")
        part[key][rows] = np.roll(part[key][rows], 1, axis=0)


def negated(parts):
    for part in parts:
        part[column(part, "actions")] *= -1


def shuffled(parts):
    for part in parts:
        rows = np.random.default_rng(0).permutation(len(part[column(part, "observations")]) - 2) + 1
        for key in part:
            if key not in ("terminals", "timeouts"):
                part[key][1:-1] = part[key][rows]


def not_finite(parts):
    key = column(parts[-1], "observations")
    parts[-1][key][100, 1] = np.nan


def late_end(parts):
    for key in ("terminals", "timeouts"):
        ends = np.flatnonzero(parts[0].get(key, ())[:-1])
        if len(ends):
            parts[0][key][[ends[0], ends[0] + 7]] = False, True
            return


FAULTS = {
    "shifted": (shifted, "actions are shifted: the action of a row stands one row late"),
    "negated": (negated, "actions are negated"),
    "shuffled": (shuffled, "shuffled"),
    "NaN": (not_finite, "row 100 holds NaN"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_good_files_pass(family, tmp_path):
    report = check(made(tmp_path, family))
    assert report.findings == [], report.text()
    assert float(re.search(r"by (\S+) .median", report.facts["replay"])[1]) < 1e-5
    assert report.facts["dataset"] in report.text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, family, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "SAMPLE", 300)
    change, words = FAULTS[fault]
    found = faults(made(tmp_path, family, change))
    assert any(re.search(words, line) for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_files_are_named(family, tmp_path):
    path = made(tmp_path, family)
    file = max(path.glob("data/*")) if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    (fault,) = faults(path)
    assert "cut short" in fault and fault.startswith(f"data/{file.name}: ") == path.is_dir()


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("point", "antmaze-medium-stitch-v0.npz", "2 observation and 2 action numbers a row, not"),
        ("ant", "antmaze-large-stitch-v0.npz", "does not reach the next row.*another maze's"),
        ("point", "pointmaze-large-stitch-v0.npz", "does not reach the next row.*another maze's"),
        ("halfcheetah", "walker2d_medium-v2.hdf5", "does not reach the next row.*another robot's"),
        ("walker", "walker_run-td3-medium", "rewards are not the simulator's.*another task's"),
    ],
)
def test_another_datasets_rows_are_named(family, name, words, tmp_path):
    path = made(tmp_path, family).rename(tmp_path / name)
    assert any(re.search(words, line) for line in faults(path)), faults(path)


def moved(key, by, rows=slice(None)):
    def change(parts):
        parts[-1][key][rows] = np.roll(parts[-1][key][rows], by, axis=0)

    return change


def scaled(parts):
    parts[0]["rewards"] *= 1.1


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("ant", moved("actions", 1, slice(300, 350)), "one row late, in 50 of 800 sampled rows, first row 300"),
        ("hopper", moved("rewards", 1), "rewards are not the simulator's"),
        ("walker", moved("reward", -1, slice(1, None)), "rewards are not the simulator's"),
        ("halfcheetah", scaled, "rewards are not the simulator's"),
        ("ant", late_end, "a mark in terminals is missing or a row off"),
        ("d4rl ant", late_end, "an episode has 707 rows, beyond the time limit of 700, from row 0"),
        ("hopper", moved("next_observations", 1), "next_observations are not .* next rows: .* shifted"),
    ],
)
def test_other_faults(family, change, words, tmp_path):
    report = check(path := made(tmp_path, family, change))
    assert len(report.faults) == 1 and re.search(words, report.faults[0]) and "1 fault\n" in report.text(), (
        report.text()
    )
    assert run_check(path) == 1


def test_ends_are_where_next_observations_say(tmp_path):
    missing, misplaced = faults(made(tmp_path, "hopper", late_end))
    assert "does not follow from it, and no flag ends the episode" in missing and "misplaced episode end" in misplaced


def test_wrong_rows_after_ends_are_found(tmp_path, monkeypatch):
    """They are few of a file's rows, so they are sampled beside the others."""
    monkeypatch.setattr(check_module, "SAMPLE", 100)

    def no_next(parts):
        parts[0]["next_observations"][parts[0]["terminals"]] = 0

    assert "does not reach the next row" in " ".join(faults(made(tmp_path, "hopper", no_next)))


@pytest.mark.parametrize("dataset_id", ["antmaze-medium-stitch-v0", "hopper-medium-v2"])
def test_rows_of_another_mujoco_are_good(dataset_id, tmp_path, monkeypatch):
    """Official D4RL files come from MuJoCo 2. Its own physics cannot be had here: other contacts stand for it."""
    module = d4rl_utils if dataset_id.startswith("hopper") else ogbench_utils
    make_env = module.make_env

    def make_other(*args):
        env = make_env(*args)
        env.unwrapped.model.geom_friction *= 0.95
        env.unwrapped.model.dof_damping *= 0.98
        return env

    arrays = recorded(dataset_id)
    monkeypatch.setattr(module, "make_env", make_other)
    report = check(save(tmp_path / file_name(dataset_id), arrays))
    assert not report.faults and "another version of MuJoCo" in report.findings[0][1]
    shifted([changed := copy.deepcopy(arrays)])
    (tmp_path / "shifted").mkdir()
    found = faults(save(tmp_path / "shifted" / file_name(dataset_id), changed))
    assert len(found) == 1 and "actions are shifted" in found[0], found


def test_a_local_dataset_needs_its_manifest(tmp_path):
    path = local.generate("local/pointmaze-medium-stitch-v0", 2, 0, tmp_path, progress=False)
    assert check(path).findings == [] and check(path.with_name(f"{path.stem}-val.npz")).findings == []
    with np.load(path) as file:
        np.savez(path, **file)  # not compressed
    assert any("no manifest" in line for line in faults(path))
    assert find("local/pointmaze-medium-stitch-v0", tmp_path)[1:] == (path, tmp_path)
    full = path.with_name("pointmaze-medium-stitch-full-v0.npz")
    full.touch()
    assert find("local/pointmaze-medium-stitch-full-v0", tmp_path)[1:] == (full, tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("missing.npz", "no such file or folder, and no dataset id"),
        ("hopper-medium-v2", "not at .*hopper_medium-v2.hdf5; `python make_dataset.py --list` says"),
        ("mine.npz", "no dataset's file or folder is called so"),
    ],
)
def test_what_is_no_dataset(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.npz").write_text("hello")
    with pytest.raises(UserError, match=words) as error:
        run_check(given, dataset_dir=tmp_path)
    assert "\n" not in str(error.value) and given in str(error.value)

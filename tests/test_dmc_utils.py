"""The walker environment against dm_control itself, and episode files, good and bad."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dmc_utils
from dmc_utils import GENERATED_IDS, OFFICIAL_IDS, WalkerEnv, episode_path, load_episodes, read_episode, write_episode
from offline_data import find_dataset
from utils import UserError


def flat(observation):
    return np.concatenate([np.ravel(part) for part in observation.values()])


def play(task, seed=0):
    """An episode of random actions, laid out row by row with nothing of the product but its environment."""
    env, rng = WalkerEnv(task), np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    rows = {key: np.zeros((1001, columns), np.float32) for key, columns in dmc_utils.EPISODE_COLUMNS.items()}
    rows["observation"][0], rows["physics"][0], rows["discount"][0] = observation, info["physics"], 1.0
    for t in range(1, 1001):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        observation, reward, terminated, _, info = env.step(action)
        rows["observation"][t], rows["physics"][t] = observation, info["physics"]
        rows["action"][t], rows["reward"][t], rows["discount"][t] = action, reward, 1.0 - terminated
    return rows


@pytest.fixture(scope="module")
def episode():
    return play("walk")


@pytest.mark.parametrize("task", dmc_utils.TASKS)
def test_a_step_is_dm_controls(task):
    env, rng = WalkerEnv(task), np.random.default_rng(0)
    observation, _ = env.reset(seed=3)
    reference = WalkerEnv(task).suite_env
    seeds = np.random.default_rng(3)
    reference.task.random.seed(seeds.integers(2**32, dtype=np.uint32))
    step = reference.reset()
    np.testing.assert_array_equal(observation, flat(step.observation).astype(np.float32))
    for _ in range(200):
        action = rng.uniform(-1.2, 1.2, 6)  # both leave the clipping to the simulator
        step = reference.step(action)
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(observation, flat(step.observation).astype(np.float32))
        np.testing.assert_array_equal(info["physics"], reference.physics.get_state())
        assert reward == pytest.approx(step.reward, abs=1e-14)
        assert (terminated, truncated) == (False, step.last())


@pytest.mark.parametrize("task", dmc_utils.TASKS)
def test_reward_is_dm_controls_at_every_height_and_speed(task):
    env = WalkerEnv(task)
    physics, rewards = env.suite_env.physics, []
    for height in (-1.2, -0.6, -0.11, -0.1, 0.0, 0.5):  # of the root, which hangs 1.3 m up
        for speed in (-2.0, 0.0, 0.4, 1.0, 5.0, 8.0, 9.0):
            for angle in (0.0, 1.5, 3.1):
                state = np.zeros(18)
                state[0], state[2], state[10] = height, angle, speed
                env.set_physics(state)
                rewards.append(env._reward())
                assert rewards[-1] == pytest.approx(env.suite_env.task.get_reward(physics), abs=1e-14)
    assert min(rewards) < 0.02 and max(rewards) == 1.0


def test_an_episode_is_1000_steps_and_nothing_terminates():
    env = WalkerEnv("run")
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(6))
    env.reset(seed=1)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(6))


def test_the_seed_alone_decides_an_episode():
    def run(env, seed):
        rng = np.random.default_rng(0)
        states = [env.reset(seed=seed)[1]["physics"]]
        return np.stack(states + [env.step(rng.uniform(-1, 1, 6))[4]["physics"] for _ in range(50)])

    env = WalkerEnv("walk")
    first = run(env, 5)
    assert not np.array_equal(env.reset()[1]["physics"], first[0])  # its generator goes on
    env.step(np.ones(6))  # left in the middle of an episode
    np.testing.assert_array_equal(run(env, 5), first)
    np.testing.assert_array_equal(run(WalkerEnv("walk"), 5), first)
    assert not np.array_equal(run(env, 6)[0], first[0])


def test_set_physics_goes_on_from_a_state():
    env = WalkerEnv("walk")
    env.reset(seed=0)
    for _ in range(30):
        observation, _, _, _, info = env.step(np.full(6, 0.3))
    expected = env.step(np.full(6, -0.5))
    other = WalkerEnv("walk")
    np.testing.assert_array_equal(other.set_physics(info["physics"]), observation)
    found = other.step(np.full(6, -0.5))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert found[1] == pytest.approx(expected[1], abs=1e-12)
    with pytest.raises(ValueError):
        env.set_physics(np.zeros(17))


def test_no_display_is_needed():
    """Without MUJOCO_GL, even where warnings are errors; and MUJOCO_GL stays unset."""
    code = "import os, dmc_utils as d; print(d.WalkerEnv('run').reset(seed=0)[0].shape, 'MUJOCO_GL' in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    root = Path(dmc_utils.__file__).parent
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (answer.stdout, answer.stderr) == ("(24,) False\n", "")
    environment["MUJOCO_GL"] = "bogus"
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert "UserError: dm_control cannot be imported (RuntimeError" in answer.stderr


def test_transitions_take_the_observation_of_the_row_before(episode, tmp_path):
    write_episode(episode_path(find_dataset(OFFICIAL_IDS[0]).paths(tmp_path)[0], 0), episode)
    transitions = dmc_utils.load_study_data([OFFICIAL_IDS[0]], tmp_path).transitions()
    for i in (1, 2, 500, 1000):
        row = [array[i - 1] for array in transitions]
        expected = [episode["observation"][i - 1], episode["action"][i], episode["reward"][i, 0]]
        expected += [episode["discount"][i, 0], episode["observation"][i]]
        for found, value in zip(row, expected, strict=True):
            np.testing.assert_array_equal(found, value)
    assert [array.shape for array in transitions] == [(1000, 24), (1000, 6), (1000,), (1000,), (1000, 24)]
    np.testing.assert_array_equal(transitions.next_observations[:-1], transitions.observations[1:])


def test_round_trip(episode, tmp_path):
    path, again = episode_path(tmp_path, 7), episode_path(tmp_path, 8)
    assert path.relative_to(tmp_path).as_posix() == "data/episode_000007_1000.npz"
    write_episode(path, episode)
    write_episode(again, dict(reversed(episode.items())))
    found = read_episode(path)
    for key, columns in dmc_utils.EPISODE_COLUMNS.items():
        assert (found[key].shape, found[key].dtype) == ((1001, columns), np.float32)
        np.testing.assert_array_equal(found[key], episode[key])
    assert again.read_bytes() == path.read_bytes()


BAD_ROWS = {
    "observation has type float64": lambda rows: rows | {"observation": rows["observation"].astype(np.float64)},
    r"observation has shape \(1001, 17\)": lambda rows: rows | {"observation": rows["observation"][:, :17]},
    "reward row 0 holds NaN": lambda rows: rows | {"reward": rows["reward"] * np.nan},
    r"action row 1 lies outside \[-1, 1\]": lambda rows: rows | {"action": np.sign(rows["action"]) * 1.01},
    "row 0 has an action or a reward": lambda rows: rows | {"action": np.roll(rows["action"], -1, axis=0)},
    "no array 'physics'": lambda rows: {key: array for key, array in rows.items() if key != "physics"},
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows(fault, episode, tmp_path):
    path = episode_path(tmp_path, 0)
    path.parent.mkdir()
    np.savez(path, **BAD_ROWS[fault](episode))
    with pytest.raises(UserError, match=f"episode_000000_1000.npz: {fault}.*move the file away"):
        load_episodes(tmp_path)


def test_files_that_are_cut_or_absent(episode, tmp_path):
    made = tmp_path / "local/collected_data/walker_run-td3-medium"
    write_episode(episode_path(made, 0), episode)
    os.truncate(episode_path(made, 0), 1000)
    with pytest.raises(UserError, match="cut short.*--overwrite"):
        load_episodes(made)
    with pytest.raises(UserError, match="no such file"):
        read_episode(episode_path(tmp_path, 0))
    with pytest.raises(UserError, match="no episode_.*--data_dir"):
        load_episodes(tmp_path)


def test_ids_and_folders(tmp_path):
    assert OFFICIAL_IDS[1:3] == ("walker_walk-td3-medium-replay", "walker_run-td3-medium")
    name = OFFICIAL_IDS[1]
    assert find_dataset(name).paths(tmp_path)[0] == tmp_path / "collected_data" / name
    # --data_dir <dataset_dir>/local finds a collected_data of its own.
    assert find_dataset(f"local/{name}").paths(tmp_path)[0] == tmp_path / "local" / "collected_data" / name
    assert find_dataset(GENERATED_IDS[0]).manifest_path(tmp_path).name == "walker_walk-td3-medium.json"
    assert find_dataset(name).paths()[0].parent.parent == Path(dmc_utils.__file__).parent / "datasets"


def test_datasets_that_are_not_there(tmp_path, episode):
    official, local = OFFICIAL_IDS[0], GENERATED_IDS[0]
    with pytest.raises(UserError, match=f"put the study's.*local/{official}"):
        find_dataset(official).ensure(tmp_path)[0]
    write_episode(episode_path(find_dataset(official).paths(tmp_path)[0], 0), episode)
    assert find_dataset(official).ensure(tmp_path)[0] == tmp_path / "collected_data" / official
    # A generation that was cut leaves episodes, but no manifest.
    write_episode(episode_path(find_dataset(local).paths(tmp_path)[0], 0), episode)
    with pytest.raises(UserError, match=f"no complete dataset.*make_dataset.py --dataset {local} --dataset_dir"):
        find_dataset(local).ensure(tmp_path)[0]

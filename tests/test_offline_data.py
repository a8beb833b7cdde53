"""Transitions by dataset id: what is in memory, the antmaze shift, OGBench's single tasks, Minari."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_d4rl_utils import ANTMAZE, HOPPER, many_columns, maze_columns, put

import offline_data
from offline_data import OfflineData, data_scores, load_transitions, make_env, normalized_score
from utils import UserError

# --- D4RL ------------------------------------------------------------------------------------------------------------


def test_facts_and_memory(tmp_path):
    data = load_transitions(HOPPER, put(tmp_path / "data", many_columns()))
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["dataset"], facts["env"], facts["reward_shift"]) == (HOPPER, "Hopper-v4", 0.0)
    assert facts["transitions"] == len(data) == len(data.rewards) and facts["episodes"] == len(data.returns)
    assert facts["terminations"] == data.terminated.sum() and facts["mean_return"] == data.returns.mean()
    assert (data.observation_dim, data.action_dim, data.max_action) == (11, 3, 1.0)


def test_normalizer(monkeypatch):
    observations = np.random.default_rng(0).normal(1e4, [1.0, 1e-3, 0.0], (5000, 3)).astype(np.float32)
    ones = np.ones(5000, dtype=np.float32)
    data = OfflineData("", "", 1.0, observations, ones[:, None], ones, observations, ones > 2, ones > 2, ones, 0.0)
    monkeypatch.setattr(offline_data, "_BLOCK_ROWS", 999)
    mean, scale = data.normalizer()
    exact = observations.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(scale, exact.std(axis=0) + 1e-3, rtol=1e-5)
    assert mean.dtype == scale.dtype == np.float32 and scale[2] == np.float32(1e-3)


def test_tensors_and_buffer_hold_the_same_rows_without_a_copy(tmp_path):
    data = load_transitions(HOPPER, put(tmp_path / "data", many_columns()))
    tensors, buffer = data.tensors(), data.replay_buffer()
    assert set(tensors) == set(buffer.FIELDS) and len(buffer) == buffer.capacity == len(data)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), getattr(data, name).astype(np.float32))
        assert tensor.dtype == torch.float32 and tensor.shape == getattr(buffer, name).shape
    for name in ("observations", "next_observations", "actions", "rewards"):
        assert getattr(buffer, name).data_ptr() == getattr(data, name).ctypes.data
    batch = buffer.sample(8, torch.Generator().manual_seed(0))
    assert batch["observations"].shape == (8, 11) and batch["terminated"].shape == (8,)


def test_antmaze_rewards_are_shifted_unless_asked_otherwise(tmp_path):
    folder = put(tmp_path / "data", maze_columns(), ANTMAZE)
    shifted, plain = load_transitions(ANTMAZE, folder), load_transitions(ANTMAZE, folder, antmaze_reward_shift=0)
    assert set(shifted.rewards) == {-1, 0} and set(plain.rewards) == {0, 1}
    assert (shifted.reward_shift, plain.reward_shift) == (-1.0, 0.0)
    np.testing.assert_array_equal(shifted.returns, plain.returns)  # scores are of the environment's rewards
    hopper = load_transitions(HOPPER, put(tmp_path / "data", many_columns()), antmaze_reward_shift=-5)
    np.testing.assert_array_equal(hopper.rewards[:1], many_columns()["rewards"][~many_columns()["timeouts"]][:1])


@pytest.mark.parametrize("name, columns", [(HOPPER, many_columns()), (ANTMAZE, maze_columns())])
def test_equal_rewards_are_refused(tmp_path, name, columns):
    columns = columns | {"rewards": np.zeros_like(columns["rewards"])}
    with pytest.raises(UserError, match=f"--dataset {name}: every reward is 0, there is nothing to learn"):
        load_transitions(name, put(tmp_path / "data", columns, name))


@pytest.mark.parametrize("name", ["hopper-medium-v1", "foo", "", None])
def test_unknown_ids(name, tmp_path):
    for ask in (load_transitions, make_env):
        with pytest.raises(UserError, match="is not a D4RL MuJoCo or AntMaze dataset"):
            ask(name, tmp_path)


# --- OGBench's single tasks ------------------------------------------------------------------------------------------


def singletask_file(folder: Path, name: str, dims: tuple[int, int]) -> None:
    """40 episodes of places all over the goals, with qpos, as train and val file."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(10, 22, (40 * 101, dims[0])).astype(np.float32)
    arrays = {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (len(observations), dims[1])).astype(np.float32),
        "terminals": np.arange(len(observations)) % 101 == 100,
        "qpos": observations[:, :15],
        "qvel": observations[:, 15:],
    }
    for end in ("", "-val"):
        np.savez(folder / f"{name}{end}.npz", **arrays)


@pytest.mark.parametrize(
    "name, task, dims",
    [("antmaze-medium-navigate", "", (29, 8)), ("pointmaze-large-stitch", "-task4", (2, 2))],
)
def test_single_tasks_are_relabelled_as_ogbench_does(tmp_path, name, task, dims):
    import ogbench

    singletask_file(tmp_path, f"{name}-v0", dims)
    dataset_id = f"{name}-singletask{task}-v0"
    data = load_transitions(dataset_id, tmp_path)
    _, expected, _ = ogbench.make_env_and_datasets(
        dataset_id, dataset_path=str(tmp_path / f"{name}-v0.npz"), disable_env_checker=True
    )
    for key in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(getattr(data, key), expected[key])
    np.testing.assert_array_equal(data.terminated, expected["masks"] == 0)
    assert data.terminated.any() and data.reward_shift == 0.0
    np.testing.assert_array_equal(data.truncated, (expected["terminals"] == 1) & ~data.terminated)
    # An evaluation would end at the goal: -1 for each step before it.
    steps = [np.append(reached, True).argmax() for reached in data.terminated.reshape(40, 100)]
    np.testing.assert_array_equal(data.returns, -np.array(steps))
    scores = np.where(data.returns == -100, 0, 100)
    assert 0 < scores.mean() < 100
    np.testing.assert_array_equal(data_scores(data), scores)  # of recordings far shorter than an evaluation
    np.testing.assert_array_equal(normalized_score(dataset_id, np.where(scores, data.returns, -1000)), scores)


@pytest.mark.parametrize("name", ["antmaze-medium-navigate-singletask-task6-v0", "-singletask-v0", "x-singletask-v1"])
def test_ids_of_no_single_task(name, tmp_path):
    with pytest.raises(UserError, match="is not an OGBench"):
        load_transitions(name, tmp_path)


# --- Minari ----------------------------------------------------------------------------------------------------------


def test_minari_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for ask in (load_transitions, make_env):
        with pytest.raises(UserError, match="minari/mujoco/hopper/medium-v0: needs .*requirements/data.txt"):
            ask("minari/mujoco/hopper/medium-v0")


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    buffers = pytest.importorskip("minari.data_collector.episode_buffer")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episodes = [
        buffers.EpisodeBuffer(
            id=number,
            observations=rng.normal(size=(steps + 1, 11)),
            actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
            rewards=list(np.arange(steps, dtype=float)),
            terminations=[False] * (steps - 1) + [number == 0],
            truncations=[False] * (steps - 1) + [number == 1],
            infos={},
        )
        for number, steps in enumerate((5, 4, 3))
    ]
    options = {"env": "Hopper-v4", "eval_env": "Hopper-v4", "data_format": "hdf5"}
    for name, scores in (("test/scored-v0", {"ref_min_score": 2.0, "ref_max_score": 12.0}), ("test/bare-v0", {})):
        minari.create_dataset_from_buffers(name, episodes, **options, **scores)
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    return tmp_path, episodes


@pytest.mark.filterwarnings("ignore")
def test_minari_episodes(minari_folder):
    folder, episodes = minari_folder
    name = "minari/test/scored-v0"
    data = load_transitions(name, folder)
    assert np.flatnonzero(data.terminated).tolist() == [4] and np.flatnonzero(data.truncated).tolist() == [8, 11]
    for key, rows in (("observations", slice(None, -1)), ("next_observations", slice(1, None))):
        expected = np.concatenate([episode.observations[rows] for episode in episodes]).astype(np.float32)
        np.testing.assert_array_equal(getattr(data, key), expected)
    assert data.returns.tolist() == [10.0, 6.0, 3.0] and (data.env_id, data.max_action) == ("Hopper-v4", 1.0)
    np.testing.assert_allclose(normalized_score(name, [2.0, 7.0, 12.0], folder), [0, 50, 100])
    assert make_env(name, folder).reset(seed=0)[0].shape == (11,)
    with pytest.raises(UserError, match="minari/test/bare-v0: the dataset has no reference returns"):
        normalized_score("minari/test/bare-v0", 1.0, folder)
    with pytest.raises(UserError, match="minari/test/none-v0: Minari cannot load it"):
        load_transitions("minari/test/none-v0", folder)
    with pytest.raises(UserError, match="after minari/ comes Minari's id"):
        load_transitions("minari/../x", folder)

"""Transitions by dataset id: what is in memory, the antmaze shift, OGBench's single tasks, Minari."""

import json
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from test_d4rl_utils import ANTMAZE, HOPPER, many_columns, maze_columns, put

import offline_data
from benchmark_data.local import generate
from dataset_files import sha256
from offline_data import (
    OfflineData,
    data_scores,
    find_dataset,
    load_transitions,
    made_here,
    make_env,
    normalized_score,
)
from utils import UserError


def test_facts_and_memory(tmp_path):
    data = load_transitions(HOPPER, put(tmp_path / "data", many_columns()))
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["dataset"], facts["env"], facts["reward_shift"]) == (HOPPER, "Hopper-v4", 0.0)
    assert facts["transitions"] == len(data) == len(data.rewards) and facts["episodes"] == len(data.returns)
    assert facts["terminations"] == data.terminated.sum() and facts["mean_return"] == data.returns.mean()
    assert (data.observation_dim, data.action_dim, data.max_action) == (11, 3, 1.0)
    buffer = data.replay_buffer()
    for name in buffer.FIELDS:
        np.testing.assert_array_equal(getattr(buffer, name).numpy(), getattr(data, name).astype(np.float32))
    for name in ("observations", "next_observations", "actions", "rewards"):  # without a copy
        assert getattr(buffer, name).data_ptr() == getattr(data, name).ctypes.data
    equal = many_columns() | {"rewards": np.zeros(500, np.float32)}
    with pytest.raises(UserError, match=f"dataset {HOPPER}: every reward is 0, there is nothing to learn"):
        load_transitions(HOPPER, put(tmp_path / "equal", equal))
    alive = equal | {"rewards": np.ones(500, np.float32), "terminals": np.arange(500) % 50 == 49}
    assert load_transitions(HOPPER, put(tmp_path / "alive", alive)).terminated.sum() == 10  # a step more is worth more


def test_normalizer(monkeypatch):
    observations = np.random.default_rng(0).normal(1e4, [1.0, 1e-3, 0.0], (5000, 3)).astype(np.float32)
    ones = np.ones(5000, dtype=np.float32)
    data = OfflineData("", "", observations, ones[:, None], ones, observations, ones > 2, ones > 2, ones)
    monkeypatch.setattr(offline_data, "_BLOCK_ROWS", 999)
    mean, scale = data.normalizer()
    exact = observations.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(scale, exact.std(axis=0) + 1e-3, rtol=1e-5)
    assert mean.dtype == scale.dtype == np.float32 and scale[2] == np.float32(1e-3)


def test_antmaze_rewards_are_shifted_unless_asked_otherwise(tmp_path):
    folder = put(tmp_path / "data", maze_columns(), ANTMAZE)
    shifted, plain = load_transitions(ANTMAZE, folder), load_transitions(ANTMAZE, folder, antmaze_reward_shift=0)
    assert set(shifted.rewards) == {-1, 0} and set(plain.rewards) == {0, 1}
    assert (shifted.reward_shift, plain.reward_shift) == (-1.0, 0.0)
    np.testing.assert_array_equal(shifted.returns, plain.returns)  # scores are of the environment's rewards
    hopper = load_transitions(HOPPER, put(tmp_path / "data", many_columns()), antmaze_reward_shift=-5)
    np.testing.assert_array_equal(hopper.rewards, many_columns()["rewards"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("foo", "is not a dataset of OGBench, D4RL or Minari"),
        ("antmaze-medium-navigate-v0", "has no rewards; a single task of it has, as antmaze-.*-singletask-v0"),
        ("walker_walk-td3-medium", "is not read as transitions with rewards"),
        ("antmaze-medium-navigate-singletask-task6-v0", "did you mean 'antmaze-medium-navigate-singletask-task"),
    ],
)
def test_ids_without_transitions(name, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_transitions(name, tmp_path)


def test_every_listed_id_is_found_and_stays_in_its_folder(tmp_path):
    for dataset_id, dataset in offline_data.DATASETS.items():
        assert find_dataset(dataset_id) is dataset and dataset.id == dataset_id
        for path in (*dataset.paths(tmp_path), dataset.manifest_path(tmp_path)):
            assert path.resolve().is_relative_to(tmp_path / "local" if dataset.local else tmp_path)
    for name in ("../hopper-medium-v2", "local/../hopper-medium-v2", "minari/../x", "minari//etc/x"):
        with pytest.raises(UserError):
            find_dataset(name).ensure(tmp_path)


def test_data_that_were_changed_are_not_what_their_manifest_says(tmp_path):
    path = generate("local/hopper-medium-v2", 300, 0, tmp_path, progress=False)
    assert made_here(["local/hopper-medium-v2"], tmp_path)["data_sha256"] == sha256(path)[:12]
    with h5py.File(path, "r+") as file:
        file["rewards"][:] = 0.1 * file["rewards"][:]
    with pytest.raises(UserError, match="hopper_medium-v2.hdf5 has changed since it was made"):
        made_here(["local/hopper-medium-v2"], tmp_path)


def singletask_file(folder: Path, name: str, dims: tuple[int, int]) -> None:
    """40 episodes that wander from places all over the goals, with qpos, as train and val file."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(-0.9, 0.9, (40, 101, dims[0]))
    steps[:, 0] = rng.uniform(10, 22, (40, dims[0]))
    observations = steps.cumsum(axis=1).reshape(40 * 101, dims[0]).astype(np.float32)
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
    "name, task, dims", [("antmaze-medium-navigate", "", (29, 8)), ("pointmaze-large-stitch", "-task4", (2, 2))]
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


def test_minari_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for ask in (load_transitions, make_env):
        with pytest.raises(UserError, match="minari/mujoco/hopper/medium-v0: needs .*requirements/data.txt"):
            ask("minari/mujoco/hopper/medium-v0")


def buffer(lengths, observation_dim=11, low=-1.0, high=1.0, seed=0):
    """Minari's episodes of random rows, of so many steps each; the first one ends in a termination."""
    buffers, rng = pytest.importorskip("minari.data_collector.episode_buffer"), np.random.default_rng(seed)
    low, high = np.broadcast_to(low, 3), np.broadcast_to(high, 3)
    return [
        buffers.EpisodeBuffer(
            id=number,
            observations=rng.normal(size=(steps + 1, observation_dim)),
            actions=rng.uniform(low, high, (steps, 3)).astype(np.float32),
            rewards=list(np.arange(steps, dtype=float)),
            terminations=[False] * (steps - 1) + [number == 0],
            truncations=[False] * (steps - 1) + [number == 1],
            infos={},
        )
        for number, steps in enumerate(lengths)
    ]


@pytest.fixture
def put_minari(tmp_path, monkeypatch):
    """Writes a dataset into a folder of Minari's layout, which is returned."""
    minari = pytest.importorskip("minari")

    def write(name, episodes, **options):
        with monkeypatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
            options = {"env": "Hopper-v4", "eval_env": "Hopper-v4"} | options
            minari.create_dataset_from_buffers(name, episodes, data_format="hdf5", **options)
        return tmp_path

    return write


pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::UserWarning")


def test_minari_episodes(put_minari, monkeypatch):
    episodes, name = buffer((5, 4, 5)), "minari/test/scored-v0"
    folder = put_minari("test/scored-v0", episodes, ref_min_score=2.0, ref_max_score=12.0)
    data = load_transitions(name, folder)
    assert np.flatnonzero(data.terminated).tolist() == [4] and np.flatnonzero(data.truncated).tolist() == [8, 13]
    for key, rows in (("observations", slice(None, -1)), ("next_observations", slice(1, None))):
        expected = np.concatenate([episode.observations[rows] for episode in episodes]).astype(np.float32)
        np.testing.assert_array_equal(getattr(data, key), expected)
    np.testing.assert_array_equal(data.actions, np.concatenate([episode.actions for episode in episodes]))
    assert data.returns.tolist() == [10.0, 10.0]  # 4 steps are neither the longest nor terminated
    assert (data.env_id, data.max_action, "score" in data.facts()) == ("Hopper-v4", 1.0, False)
    np.testing.assert_allclose(normalized_score(name, [2.0, 7.0, 12.0], folder), [0, 50, 100])
    assert make_env(name, folder).reset(seed=0)[0].shape == (11,)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # without a network its client waits before it tries again
    with pytest.raises(UserError, match="minari/test/none-v0: Minari cannot load it"):
        load_transitions("minari/test/none-v0", folder)
    with pytest.raises(UserError, match="after minari/ comes Minari's id"):
        load_transitions("minari/../x", folder)


@pytest.mark.parametrize("references", [{}, {"ref_min_score": 3.0, "ref_max_score": 3.0}])
def test_without_references_the_return_is_the_score(put_minari, capsys, references):
    folder, name = put_minari("test/bare-v0", buffer((5, 5)), **references), "minari/test/bare-v0"
    data = load_transitions(name, folder)
    assert "has no reference returns: where a score is shown, it is the return" in capsys.readouterr().err
    assert data_scores(data, folder).tolist() == data.returns.tolist() == [10.0, 10.0]
    assert data.facts()["score"] == "the return, as the data have no references"


class BoxEnv(gymnasium.Env):
    """Remembers the actions that reach it."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(np.float32([-2, 0, -0.1]), np.float32([0, 4, 0.1]))
    taken: list = []

    def reset(self, **options):
        return np.zeros(11), {}

    def step(self, action):
        self.taken.append(action)
        return np.zeros(11), 0.0, False, False, {}


def test_every_action_number_is_scaled_by_its_own_bounds(put_minari, monkeypatch):
    entry = gymnasium.envs.registration.EnvSpec("Box-v0", f"{__name__}:BoxEnv")
    monkeypatch.setitem(gymnasium.registry, "Box-v0", entry)
    low, high = BoxEnv.action_space.low, BoxEnv.action_space.high
    episodes = buffer((5, 5), low=low, high=high)
    folder = put_minari("test/box-v0", episodes, env="Box-v0", eval_env="Box-v0")
    data, env = load_transitions("minari/test/box-v0", folder), make_env("minari/test/box-v0", folder)
    assert np.abs(data.actions).max() <= data.max_action == 1.0
    env.reset(seed=0)
    for action, recorded in zip(data.actions, np.concatenate([episode.actions for episode in episodes]), strict=True):
        env.step(action)
        np.testing.assert_allclose(BoxEnv.taken[-1], recorded, atol=1e-6)


def test_a_faulty_episode_of_minari_is_named(put_minari):
    episodes = buffer((5, 6))
    episodes[1].actions[3] = 1.1
    fault = r"actions row 8 lies outside \[-1, 1\]; use another dataset"
    with pytest.raises(UserError, match=f"^dataset minari/test/bad-v0: {fault}$"):
        load_transitions("minari/test/bad-v0", put_minari("test/bad-v0", episodes))


@pytest.mark.parametrize(
    "observations, actions, words",
    [
        (11, "unbounded", "actions are without bounds"),
        (11, "other", r"actions are Box\(-2.0, 2.0.*, those of its environment Box\(-1.0, 1.0"),
        (12, "own", r"its observations have 12 numbers, those of its environment Hopper-v4 have the shape \(11,\)"),
    ],
)
def test_minari_data_that_are_not_the_environments(put_minari, observations, actions, words):
    from gymnasium.spaces import Box

    bound = {"unbounded": np.inf, "other": 2.0, "own": 1.0}[actions]
    spaces = {"action_space": Box(-bound, bound, (3,)), "observation_space": Box(-np.inf, np.inf, (observations,))}
    folder = put_minari("test/other-v0", buffer((5, 6), observations), **spaces)
    with pytest.raises(UserError, match=words):
        load_transitions("minari/test/other-v0", folder)

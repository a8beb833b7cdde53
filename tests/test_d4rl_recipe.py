"""Local D4RL datasets: the layout, who acts when, where episodes end, replaying what was recorded, and bad policies."""

import json
import re

import h5py
import numpy as np
import pytest

from benchmark_data import d4rl, experts, recorded
from benchmark_data.d4rl import SNAPSHOTS, D4RLFamily, recipe_parts, record_episode
from benchmark_data.generation import Plan, make
from d4rl_utils import DATASETS, make_env

SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6)}
MEDIUM, REPLAY = "local/hopper-medium-v2", "local/hopper-medium-replay-v2"
load_arrays, episode_ends = DATASETS[REPLAY].read, DATASETS[REPLAY].episode_ends


def random_policy(robot: str, step: int) -> experts.Policy:
    """A small network of random weights, different for each robot and step."""
    rng = np.random.default_rng([len(robot), step])
    sizes = {"hidden.0": (SIZES[robot][0], 16), "hidden.1": (16, 8)}
    sizes |= dict.fromkeys(("mean", "log_std"), (8, SIZES[robot][1]))
    weights = {f"{name}.weight": rng.normal(0, 0.5, size).astype(np.float32) for name, size in sizes.items()}
    weights |= {f"{name}.bias": rng.normal(0, 0.1, size[1]).astype(np.float32) for name, size in sizes.items()}
    return experts.Policy(robot, step, weights, "relu")


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for robot, snapshots in SNAPSHOTS.items():
        for step in (*snapshots.earlier, *snapshots.medium, snapshots.expert):
            path = experts.policy_path(folder, robot, step)
            experts.write_policy(path, random_policy(robot, step))
            experts.card_path(path).write_text('{"algorithm": "SAC"}')
    return folder


@pytest.fixture(scope="module")
def generate(experts_dir, tmp_path_factory):
    """Make a dataset in a folder of its own; returns its file."""

    def run(dataset_id, size, jobs=1, seed=0):
        plan = Plan(dataset_id, size, seed, experts_dir, jobs, progress=False)
        return make(D4RLFamily(), plan, tmp_path_factory.mktemp("data"))

    return run


@pytest.fixture(scope="module")
def replay_file(generate):
    return generate(REPLAY, 1500)


def test_bytes_depend_on_the_seed_and_not_on_the_jobs(generate, replay_file, monkeypatch):
    assert generate(REPLAY, 1500, jobs=2).read_bytes() == replay_file.read_bytes()
    with h5py.File(replay_file) as file:
        assert "policy" not in file["metadata"]  # more than one acted
    other = load_arrays(generate(REPLAY, 100, seed=1))["observations"]
    assert not np.array_equal(other, load_arrays(replay_file)["observations"][:100])


@pytest.mark.parametrize("size, episodes, whole", [(1500, 2, 1), (50, 1, 1), (2000, 2, 2)])
def test_an_episode_that_the_size_cut_counts_as_no_return(generate, size, episodes, whole):
    dataset = DATASETS["local/halfcheetah-medium-v2"]
    path = generate(dataset.id, size)  # its episodes have 1000 steps
    manifest, rewards = json.loads(path.with_suffix(".json").read_text()), dataset.read(path)["rewards"]
    returns = np.array([part.sum() for part in np.split(rewards.astype(np.float64), [1000])])[:whole]
    assert manifest["episodes"] == episodes
    # --check counts as the manifest does.
    np.testing.assert_allclose(recorded.read(path, dataset).returns(), returns)
    for name in ("mean", "std", "min"):
        assert manifest["returns"][name] == pytest.approx(getattr(returns, name)())


def test_the_file_says_what_the_cards_say(experts_dir, tmp_path):
    """Of policies of one's own: the algorithm, and the share of the expert's return."""
    dataset_id, snapshots = "local/halfcheetah-medium-v2", SNAPSHOTS["halfcheetah"]
    for step, mean in ((snapshots.medium[0], 30.0), (snapshots.expert, 50.0)):
        path = experts.policy_path(tmp_path, "halfcheetah", step)
        experts.write_policy(path, random_policy("halfcheetah", step))
        returns = {"deterministic": {"mean": 2 * mean}, "stochastic": {"mean": mean}}
        experts.card_path(path).write_text(json.dumps({"algorithm": "TD3 of Zoë", "returns": returns}))
    path = make(D4RLFamily(), Plan(dataset_id, 20, 0, tmp_path, progress=False), tmp_path)
    with h5py.File(path) as file:
        assert file["metadata/algorithm"][()].decode() == "TD3 of Zoë" and file["infos/qpos"].dtype == np.float64
        assert b"not the official file" in file["metadata/note"][()] and "policy" in file["metadata"]  # one acted
        recipe = file["metadata/recipe"][()].decode()
        places = [
            [layer[part].id.get_offset() for layer in file["metadata/policy"].values() if isinstance(layer, h5py.Group)]
            for part in ("weight", "bias")
        ]
        assert max(places[0]) < min(places[1])  # the order that the bytes of earlier files have
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["recipe"] == recipe and "TD3 of Zoë" in recipe and "SAC" not in json.dumps(manifest)
    assert "return 0.300 of the expert's mean action and 0.600 of the expert's sampled ones" in recipe


@pytest.mark.parametrize(
    "robot, shares", [("hopper", (455, 550)), ("halfcheetah", (524, 585)), ("walker2d", (493, 535))]
)
def test_the_documented_shares_are_those_of_the_shipped_cards(robot, shares):
    text = d4rl._medium_share(robot, experts.DEFAULT_EXPERTS_DIR)
    assert [int(number) for number in re.findall(r"0\.(\d{3})", text)] == list(shares)


def test_medium_is_the_first_half_of_medium_expert(generate):
    medium, both = (load_arrays(generate(f"local/hopper-{level}-v2", 400)) for level in ("medium", "medium-expert"))
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(medium[key][:200], both[key][:200])


def test_replay_covers_training_in_its_order():
    parts = recipe_parts(DATASETS[REPLAY])
    assert [part.steps for part in parts] == [(), (10_000,), (30_000,), (50_000,), (110_000,), (120_000,)]
    # Of 120,000 steps: 10,000 at random, then each to the snapshot that is nearest.
    np.testing.assert_allclose([part.end * 120_000 for part in parts], [10e3, 20e3, 40e3, 80e3, 115e3, 120e3])


def test_parts_follow_each_other_in_whole_episodes(generate, monkeypatch):
    """Who acted shows in the actions: each policy here always takes one of its own."""
    actions = {step: np.full(3, step / 1e6, dtype=np.float32) for step in (110_000, 120_000, 270_000)}

    def read_policy(path):
        policy = experts.Policy("hopper", step := int(path.stem.split("_")[1]), random_policy("hopper", step).weights)
        object.__setattr__(policy, "act", lambda observation, rng: actions[step])
        return policy

    monkeypatch.setattr(experts, "read_policy", read_policy)
    monkeypatch.setattr(d4rl, "BLOCK_ROWS", 100)
    path = generate("local/hopper-medium-expert-v2", 800)
    arrays = load_arrays(path)
    ends = episode_ends(arrays)
    actors = np.rint(arrays["actions"][:, 0] * 1e6).astype(int)
    for episode in np.split(actors, ends[:-1] + 1):
        assert len(set(episode)) == 1
    by_episode = actors[ends]
    first_expert = int(np.argmax(by_episode == 270_000))
    assert set(by_episode[first_expert:]) == {270_000}
    assert abs(int((by_episode == 110_000).sum()) - int((by_episode == 120_000).sum())) <= first_expert // 4 + 1
    half = int((actors != 270_000).sum())
    longest = np.diff(ends, prepend=-1).max()
    assert 400 <= half < 400 + longest  # the episode that passes the middle is finished
    marked = arrays["terminals"] | arrays["timeouts"]
    np.testing.assert_array_equal(np.flatnonzero(marked), ends)
    assert not arrays["timeouts"][:-1].any() and marked[-1]


class Countdown:
    """A simulator that falls at a given step."""

    def __init__(self, falls_at):
        self.falls_at, self.steps = falls_at, 0
        self.unwrapped, self.data = self, self
        self.qpos, self.qvel = np.zeros(2), np.zeros(2)
        self.action_space = make_env(MEDIUM).action_space

    def reset(self, seed):
        self.steps = 0
        return np.zeros(3), {}

    def step(self, action):
        self.steps += 1
        return np.full(3, self.steps), 1.0, self.steps == self.falls_at, False, {}


@pytest.mark.parametrize("falls_at, rows, terminal", [(7, 7, True), (999, 999, True), (1000, 1000, False)])
def test_terminals_and_timeouts_are_apart(falls_at, rows, terminal):
    """A fall at step 1000 is a timeout, as D4RL's collection has it."""
    episode = record_episode(Countdown(falls_at), None, np.random.default_rng(0))
    assert len(episode["rewards"]) == rows and episode["infos/qpos"].shape == (rows, 2)
    assert (episode["terminals"][-1], episode["timeouts"][-1]) == (terminal, not terminal)
    assert not episode["terminals"][:-1].any() and not episode["timeouts"][:-1].any()
    np.testing.assert_array_equal(episode["observations"][1:], episode["next_observations"][:-1])


@pytest.mark.parametrize("robot", SIZES)
def test_recorded_actions_from_recorded_states_give_the_recorded_next_ones(robot, generate):
    dataset_id = f"local/{robot}-medium-expert-v2"
    path = generate(dataset_id, 1200)
    data = recorded.read(path, DATASETS[dataset_id])
    with h5py.File(path) as file:
        states = np.concatenate([file["infos/qpos"][()], file["infos/qvel"][()]], axis=1)
    observations, rewards = data.simulator.step(states, data.actions)
    # The promise is 1e-4; states in float64 keep far more, and float32 would keep less in halfcheetah.
    np.testing.assert_allclose(observations.astype(np.float32), data.next_observations, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rewards, data.rewards, rtol=0, atol=1e-6)
    inside = np.flatnonzero(~data.ends)
    np.testing.assert_array_equal(data.next_observations[inside], data.observations[inside + 1])

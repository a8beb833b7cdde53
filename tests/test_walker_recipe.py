"""Walker episodes made on this machine: who plays them, the files, the manifest. The policies here are tiny ones."""

import numpy as np
import pytest

from benchmark_data import experts, generation, walker
from benchmark_data.walker import SHARES, WalkerFamily, play_episode, snapshot_steps
from dataset_files import sha256
from dmc_utils import DATASETS, GENERATED_IDS, WalkerEnv, load_episodes

FAMILY = WalkerFamily()
REPLAY = "local/walker_run-td3-medium-replay"
MEDIUM = "local/walker_run-td3-medium"
# Mean return of the study's own dataset of each name.
STUDY_RETURNS = {
    "local/walker_walk-td3-medium": 962.8,
    "local/walker_walk-td3-medium-replay": 929.8,
    "local/walker_run-td3-medium": 318.4,
    "local/walker_run-td3-medium-replay": 251.5,
}


def tiny_policy(task, step):
    rng = np.random.default_rng(step)
    shapes = {"hidden.0": (24, 8), "mean": (8, 6), "log_std": (8, 6)}
    weights = {f"{name}.weight": rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": np.zeros(shape[1]) for name, shape in shapes.items()}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    return experts.Policy(f"walker_{task}", step, weights, "relu", -5.0, 2.0)


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for dataset_id in SHARES:
        for path in FAMILY.policies(dataset_id, folder):
            experts.write_policy(path, tiny_policy(DATASETS[dataset_id].task, int(path.stem.split("_")[-1])))
            experts.card_path(path).write_text('{"algorithm": "SAC"}')
    return folder


def make(dataset_id, folder, experts_dir, size=3):
    return generation.make(FAMILY, generation.Plan(dataset_id, size, 0, experts_dir, progress=False), folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory, experts_dir):
    """A dataset folder with three episodes of run's medium-replay."""
    folder = tmp_path_factory.mktemp("datasets")
    make(REPLAY, folder, experts_dir)
    return folder


def test_an_episode_depends_on_the_seed_and_not_on_those_before(made, tmp_path, experts_dir):
    last = load_episodes(DATASETS[REPLAY].paths(made)[0])[2]
    for seed in (0, 1):
        plan = generation.Plan(REPLAY, 3, seed, experts_dir)
        walker._env.cache_clear()
        walker._make_episode((plan, 2, snapshot_steps(REPLAY, 3)[2], tmp_path / str(seed)))
        (alone,) = load_episodes(tmp_path / str(seed))
        assert all(np.array_equal(alone[key], last[key]) == (seed == 0) for key in ("physics", "action"))


def test_no_two_episodes_start_alike(made, experts_dir, tmp_path):
    """Neither within a dataset nor in two of one task: they share snapshots."""
    make(MEDIUM, tmp_path, experts_dir, size=1)
    episodes = load_episodes(DATASETS[REPLAY].paths(made)[0]) + load_episodes(DATASETS[MEDIUM].paths(tmp_path)[0])
    assert len({episode["physics"][0].tobytes() for episode in episodes}) == len(episodes)


def test_manifest(made, experts_dir):
    manifest, (folder,) = DATASETS[REPLAY].manifest(made), DATASETS[REPLAY].paths(made)
    assert {path.name for path in folder.parent.iterdir()} == {
        folder.name,
        f"{folder.name}.json",
        f".{folder.name}.lock",
    }
    returns = [episode["reward"].sum(dtype=np.float64) for episode in load_episodes(folder)]
    assert (manifest["id"], manifest["seed"], manifest["num_episodes"]) == (REPLAY, 0, 3)
    assert (manifest["episodes"], manifest["transitions"]) == (3, 3000)
    assert manifest["returns"] == pytest.approx(experts.describe_returns(returns))
    assert manifest["policies"] == {path.name: sha256(path) for path in FAMILY.policies(REPLAY, experts_dir)}
    assert "trained with SAC" in manifest["recipe"] and "td3" in manifest["recipe"]


@pytest.mark.parametrize("dataset_id", GENERATED_IDS)
def test_snapshots_play_in_the_order_of_training_in_their_shares(dataset_id):
    shares = SHARES[dataset_id]
    assert sum(shares.values()) == pytest.approx(1.0) and list(shares) == sorted(shares)
    for size in (1, 2, 3, 7, 100, 1000):
        steps = snapshot_steps(dataset_id, size)
        assert len(steps) == size and steps == sorted(steps)
    for step, share in shares.items():
        assert steps.count(step) / 1000 == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("dataset_id", GENERATED_IDS)
def test_the_shipped_policies_are_at_the_studys_level(dataset_id):
    """By their cards, of 100 episodes each."""
    paths = FAMILY.policies(dataset_id, experts.DEFAULT_EXPERTS_DIR)
    means = [experts.read_card(path)["returns"]["stochastic"]["mean"] for path in paths]
    assert np.dot(means, list(SHARES[dataset_id].values())) == pytest.approx(STUDY_RETURNS[dataset_id], rel=0.02)


def test_a_shipped_policy_plays_as_its_card_says():
    path = experts.policy_path(experts.DEFAULT_EXPERTS_DIR, "walker_walk", 200_000)
    episode = play_episode(WalkerEnv("walk"), experts.read_policy(path), np.random.SeedSequence(0))
    expected = experts.read_card(path)["returns"]["stochastic"]["mean"]
    assert episode["reward"].sum() == pytest.approx(expected, rel=0.1)

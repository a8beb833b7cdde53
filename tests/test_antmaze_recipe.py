"""Local D4RL antmazes: the layout, the ways, rewards and ends, replaying what was recorded, and a run that reads it."""

import json

import h5py
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

import offline_data
import pogo_main
from benchmark_data import check, experts
from benchmark_data.antmaze import ROW, AntMazeFamily, EpisodeMaker
from benchmark_data.generation import Plan, make
from d4rl_utils import DATASETS
from runs import chain

UMAZE, PLAY = "local/antmaze-umaze-v2", "local/antmaze-large-play-v2"


@pytest.fixture(scope="module")
def policy():
    return experts.read_policy(experts.DEFAULT_EXPERTS_DIR / "ant-xy_400000.safetensors")


@pytest.fixture(scope="module")
def umaze(tmp_path_factory):
    """A whole episode and a cut one: file and columns."""
    plan = Plan(UMAZE, 1000, 0, experts.DEFAULT_EXPERTS_DIR, progress=False)
    path = make(AntMazeFamily(), plan, tmp_path_factory.mktemp("data"))
    with h5py.File(path) as file:
        return path, {key: file[key][()] for key in ROW}


def test_the_layout_is_d4rls(umaze):
    path, columns = umaze
    assert {key: column.dtype for key, column in columns.items()} == ROW
    assert {len(column) for column in columns.values()} == {1000} and columns["infos/goal"].shape == (1000, 2)
    assert np.flatnonzero(columns["timeouts"]).tolist() == [699, 999]  # the time limit, and the end of the file
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert (manifest["episodes"], manifest["goal_reached"]) == (2, 1.0)


def test_a_row_is_paid_where_its_step_ends_at_the_goal(umaze):
    _, columns = umaze
    place, goal = columns["next_observations"][:, :2], columns["infos/goal"]
    np.testing.assert_array_equal(columns["rewards"], np.linalg.norm(place - goal, axis=1) <= 0.5)
    np.testing.assert_array_equal(columns["terminals"], columns["rewards"] == 1)
    assert columns["rewards"][:700].sum() > 1  # it goes on at the goal
    first = columns["observations"][[0, 700], :2]
    assert (np.abs(first) < 0.2).all() and (goal[0] != goal[700]).all()
    assert (goal[[0, 700]] >= [0, 8]).all() and (goal[[0, 700]] <= [1.5, 9.5]).all()


def test_recorded_actions_replay(umaze):
    path, columns = umaze
    report = check.check(path)
    assert not report.findings and "1,000 rows" in report.facts["replay"]
    misses = float(report.facts["replay"].split()[-2])
    assert misses < 1e-5 and np.abs(columns["actions"]).max() <= 1
    states = np.concatenate([columns["infos/qpos"], columns["infos/qvel"]], axis=1)
    np.testing.assert_array_equal(states.astype(np.float32), columns["observations"])


def test_an_episode_does_not_depend_on_those_that_its_process_made_before(umaze, policy):
    second = EpisodeMaker(DATASETS[UMAZE], policy).make(np.random.SeedSequence(0, spawn_key=(1,)))
    np.testing.assert_array_equal(second["infos/qpos"][:300], umaze[1]["infos/qpos"][700:])


@pytest.mark.parametrize("name", [name for name in AntMazeFamily.ids if name != UMAZE])
def test_starts_destinations_and_ways(name, policy):
    """Every destination's way, followed from cell to cell without a body, arrives, and no cell on it is a wall."""
    maker, rng = EpisodeMaker(DATASETS[name], policy), np.random.default_rng(0)
    play = name.endswith("play-v2")
    assert not play or not set(maker.starts) & set(maker.destinations)
    assert play or maker.starts == maker.destinations and len(maker.starts) == (maker.maze.cells != "#").sum()
    for _ in range(20):
        start = maker.starts[rng.integers(len(maker.starts))]
        xy, destination = maker.maze._middle(np.array(start)), maker.draw_destination(rng)
        assert maker.maze.cells[maker.cell(destination)] != "#" and maker.cell(xy) == start
        aim = start
        for _ in range(2000):
            aim = maker.next_aim(aim, xy, destination)
            xy = xy + 0.1 * maker.direction(aim, xy, destination, rng)
            assert maker.maze.cells[maker.cell(xy)] != "#"
            if np.linalg.norm(xy - destination) <= 0.5:
                break
        assert np.linalg.norm(xy - destination) <= 0.5


def test_destinations_change_where_they_are_reached(policy):
    maker = EpisodeMaker(DATASETS[PLAY], policy)
    episode = maker.make(np.random.SeedSequence(3))
    assert len(episode["rewards"]) == 1000 and len(np.unique(episode["infos/goal"], axis=0)) == 1
    start = maker.maze.cells[maker.cell(episode["observations"][0, :2].astype(float))]
    assert start != "#" and np.ptp(episode["observations"][:, :2], axis=0).max() > 8


def test_a_run_reads_it_and_is_scored_by_goals_reached(umaze, tmp_path, monkeypatch):
    path, columns = umaze
    monkeypatch.setattr(chain, "make_env", lambda *ids: TimeLimit(offline_data.make_env(*ids), 3))
    data = offline_data.load_transitions(UMAZE, path.parent.parent)
    assert len(data) == 1000 and data.truncated.sum() + (columns["terminals"] & columns["timeouts"]).sum() == 2
    np.testing.assert_array_equal(data.rewards, columns["rewards"] - 1)
    flags = (
        f"--env {UMAZE} --dataset_dir {path.parent.parent} --run_dir {tmp_path / 'run'} --device cpu --eval_workers 0"
    )
    sizes = "--max_timesteps 4 --eval_freq 4 --eval_episodes 1 --final_runs 1 --batch_size 8 --hidden_dim 8"
    floors, finish = [], pogo_main.POGORun.finish
    monkeypatch.setattr(pogo_main.POGORun, "finish", lambda run: floors.append(run.agent.q_floor) or finish(run))
    pogo_main.main([*flags.split(), *sizes.split()])
    assert (tmp_path / "run" / "finished.json").exists() and floors == [pytest.approx(-100)]

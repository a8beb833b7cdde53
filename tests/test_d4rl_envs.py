"""Environments that policies are evaluated in, scores, and the evaluation of several policies at once."""

import functools
import os
import signal

import gymnasium
import numpy as np
import pytest
import torch

import d4rl_utils
import offline_data
from d4rl_utils import AntMaze, QuickRunner, make_env
from offline_data import normalized_score
from runs.evaluation import Evaluator, episode_seeds
from utils import ProcessDied, UserError


def test_scores_are_d4rls():
    """Returns that D4RL's table of references gives 0 and 100, for every level and the local ones."""
    known = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3)}
    for name in (*d4rl_utils.OFFICIAL_IDS, *d4rl_utils.GENERATED_IDS):
        low, high = known.get(name.removeprefix("local/").split("-")[0], (0.0, 1.0))
        np.testing.assert_allclose(normalized_score(name, [low, high]), [0, 100], atol=1e-9)
    np.testing.assert_allclose(normalized_score("hopper-medium-v2", (3234.3 - 20.272305) / 2), 50)
    assert normalized_score("antmaze-umaze-v2", [[0, 1], [1, 1]]).tolist() == [[0, 100], [100, 100]]


def test_a_single_task_scores_success():
    returns = [-1000.0, -999.0, 0.0]
    assert normalized_score("antmaze-large-navigate-singletask-v0", returns).tolist() == [0, 100, 100]
    assert normalized_score("humanoidmaze-giant-stitch-singletask-task2-v0", -1000.0) == 100  # of 4000


@pytest.mark.parametrize("robot", ["hopper", "halfcheetah", "walker2d"])
def test_the_quick_runner_is_gymnasiums_to_the_last_bit(robot):
    reference, quick = make_env(f"{robot}-medium-v2"), QuickRunner(f"{robot}-medium-v2")
    rng = np.random.default_rng(0)
    for episode in range(6):
        ended = False
        seen = [env.reset(seed=episode)[0] for env in (reference, quick)]
        while not ended:
            np.testing.assert_array_equal(*seen)
            action = rng.uniform(-1, 1, reference.action_space.shape).astype(np.float32) * np.float32(episode % 3 / 2)
            (one, *rest, _), (two, *others, _) = reference.step(action), quick.step(action)
            assert rest == others
            seen, ended = [one, two], rest[1] or rest[2]
    assert robot != "halfcheetah" or rest[2]  # the time limit


@pytest.mark.parametrize("maze, size", [("medium", "medium"), ("large", "large")])
def test_the_ant_maze_is_ogbenchs_but_for_the_task(maze, size):
    """OGBench copied D4RL's ant and these two mazes: the same walls in the same place, the same dynamics."""
    import ogbench  # noqa: F401  registers the environments

    ours, theirs = AntMaze(maze).unwrapped, gymnasium.make(f"antmaze-{size}-v0", disable_env_checker=True).unwrapped

    def walls(model):
        boxes = model.geom_type == 6
        return {(*np.round(place, 6), *size) for place, size in zip(model.geom_pos[boxes], model.geom_size[boxes])}  # noqa: B905

    assert {place[:2] for place in walls(ours.model)} == {place[:2] for place in walls(theirs.model)}
    assert {place[2:] for place in walls(ours.model)} == {(1.0, 2.0, 2.0, 1.0)}  # D4RL's walls are 2 m high
    ours.reset(seed=0), theirs.reset(seed=0)
    theirs.set_state(ours.data.qpos.copy(), ours.data.qvel.copy())
    ours.set_state(ours.data.qpos.copy(), ours.data.qvel.copy())
    for action in np.random.default_rng(0).uniform(-1, 1, (40, 8)):
        np.testing.assert_allclose(ours.step(action)[0], theirs.step(action)[0], atol=1e-9)


def test_the_small_maze_has_d4rls_walls():
    env = AntMaze("umaze")
    boxes = env.unwrapped.model.geom_pos[env.unwrapped.model.geom_type == 6]
    assert len(boxes) == 18
    free = {(x, y) for x in (0, 4, 8) for y in (0, 4, 8)} - {(0, 4), (4, 4)}
    assert not free & {(x, y) for x, y, _ in boxes} and {(0, 4), (4, 4)} <= {(x, y) for x, y, _ in boxes}


@pytest.mark.parametrize("name, goal", [("umaze", (0, 8)), ("medium-play", (20, 20)), ("large-diverse", (32, 24))])
def test_ant_maze_episodes(name, goal):
    env = make_env(f"antmaze-{name}-v2")
    observation, info = env.reset(seed=3)
    assert observation.shape == env.observation_space.shape == (29,) and env.action_space.shape == (8,)
    assert np.abs(observation[:2]).max() <= 0.1 and not info["success"]
    place = env.get_wrapper_attr("goal")
    assert (place >= goal).all() and (place <= np.add(goal, 1.5)).all()
    places = [env.reset(seed=seed) and env.get_wrapper_attr("goal") for seed in (3, 4)]
    assert (places[0] == place).all() and (places[1] != place).all()
    again = env.reset(seed=3)[0]
    np.testing.assert_array_equal(again, observation)
    assert env.step(np.zeros(8))[1:4] == (0.0, False, False)
    env.unwrapped.set_xy(place + [0.45, 0.0])
    _, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_ant_maze_time_limits():
    limits = [make_env(f"antmaze-{name}-v2")._max_episode_steps for name in ("umaze-diverse", "large-play")]
    assert limits == [700, 1000]


class Counter(gymnasium.Env):
    """An episode of `seed % 7 + 2` steps, whose reward is the action times the step; some seeds end badly."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, fault: str = ""):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        self.seed, self.length, self.time, self.over = seed, seed % 7 + 2, 0, False
        return np.array([seed % 1000, 0.0]), {}

    def step(self, action):
        assert not self.over, "stepped after its end"
        if self.seed == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 101:
            raise ZeroDivisionError("in the simulator")
        if self.seed == 102:
            raise UserError("no such maze; choose another")
        self.time += 1
        self.over = self.time == self.length
        info = {"success": self.time == 3} if self.fault == "success" else {}
        return np.array([self.length, self.time]), float(action[0]) * self.time, self.over, False, info


def numbered(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Policy p returns p + 1."""
    assert observations.dtype == np.float32 and observations.shape == (*alive.shape, 2) and alive.any()
    return np.ones(alive.shape)[..., None] * np.arange(1, len(alive) + 1)[:, None, None]


SEEDS = [0, 1, 5, 6, 13, 3]
LENGTHS = np.array([seed % 7 + 2 for seed in SEEDS])


@pytest.mark.parametrize("num_envs", [18, 100, 7, 3])
def test_every_policy_meets_every_seed(num_envs):
    with Evaluator(functools.partial(Counter, "success"), num_envs) as evaluator:
        found = evaluator.evaluate(numbered, 3, SEEDS)
        np.testing.assert_array_equal(found.lengths, np.tile(LENGTHS, (3, 1)))
        np.testing.assert_array_equal(found.returns, np.outer([1, 2, 3], LENGTHS * (LENGTHS + 1) / 2))
        np.testing.assert_array_equal(found.successes, np.tile(LENGTHS >= 3, (3, 1)))
        one = evaluator.evaluate(lambda o, a: torch.full((1, 1, 1), 0.5, requires_grad=True), 1, [6])
        assert one.returns.tolist() == [[18.0]]  # tensors too; an evaluator is used again


def test_what_policies_must_not_return():
    with Evaluator(Counter, 12) as evaluator:
        with pytest.raises(UserError, match="policy 1 gave an action that is not finite"):
            evaluator.evaluate(
                lambda o, a: np.where(np.arange(2)[:, None, None], np.nan, np.zeros((2, 6, 1))), 2, SEEDS
            )
        # What is returned for episodes that are over is not looked at.
        found = evaluator.evaluate(lambda o, a: np.where(a, 1.0, np.nan)[..., None], 2, SEEDS)
        np.testing.assert_array_equal(found.lengths[1], LENGTHS)
        assert found.successes is None


def actors(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Two policies of a hopper: they depend on the state, to the last bit."""
    weights = np.random.default_rng(0).normal(size=(2, 11, 3)).astype(np.float32) * 0.3
    return np.tanh(np.einsum("pen,pna->pea", observations, weights))


def test_results_do_not_depend_on_the_workers_nor_on_other_episodes():
    make = functools.partial(offline_data.make_env, "hopper-medium-v2")
    seeds = episode_seeds(0, 4)
    with Evaluator(make, 8) as alone, Evaluator(make, 8, num_workers=2) as shared:
        first = alone.evaluate(actors, 2, seeds)
        for evaluator in (alone, shared, shared):
            found = evaluator.evaluate(actors, 2, seeds)
            np.testing.assert_array_equal(found.returns, first.returns)
            np.testing.assert_array_equal(found.lengths, first.lengths)
        np.testing.assert_array_equal(alone.evaluate(actors, 2, seeds[2:]).returns, first.returns[:, 2:])
    # The same episode, stepped by hand in Gymnasium's own environment.
    env, ended, total = make_env("hopper-medium-v2"), False, 0.0
    observation = env.reset(seed=seeds[1])[0]
    while not ended:
        states = np.broadcast_to(observation.astype(np.float32), (2, 4, 11))
        observation, reward, terminated, truncated, _ = env.step(actors(states, np.ones((2, 4), bool))[1, 1])
        total, ended = total + reward, terminated or truncated
    assert total == first.returns[1, 1]


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (102, UserError, "^no such maze; choose another$"),
        (100, ProcessDied, "evaluation worker 1 died .killed by SIGKILL.*fewer"),
        (101, RuntimeError, "(?s)in evaluation worker.*ZeroDivisionError: in the simulator"),
    ],
)
def test_failures_in_workers_are_told(seed, error, words):
    with Evaluator(Counter, 2, num_workers=1) as evaluator:  # the second episode is the worker's
        os.kill(evaluator._processes[0].pid, signal.SIGINT)  # Ctrl-C is the parent's affair
        with pytest.raises(error, match=words):
            evaluator.evaluate(numbered, 1, [0, seed])

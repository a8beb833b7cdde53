"""The online command: what it writes, how it resumes, whose actions it reads, and what it says about bad input."""

import functools
import json
import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from running import digest, error_line

import make_dataset
import offline_trainer
import online_trainer
from ogbench_utils import MazeDataset, make_env, seeded_reset
from online_trainer import OnlineRun, OnlineTrainerConfig
from opso import episodes as opso_episodes
from opso import evaluation as opso_evaluation
from opso.episodes import GoalEnv, episode_code, rollout
from opso.evaluation import VIDEO_SKIP, Evaluation
from opso.policy import MazePolicy
from opso.search import Planner, spaced_rows
from policy import Policy
from runs.cli import parse_config, run_cli
from runs.directory import load_checkpoint, lock_run, save_checkpoint
from runs.evaluation import Evaluator
from runs.metrics import read_metrics
from utils import RandomStreams, UserError

DATASET = "local/pointmaze-medium-stitch-v0"
STEPS = 12  # of an episode
PRETRAINING = {
    **{"context_length": 16, "d_model": 16, "hidden_dim": 16, "d_state": 8, "batch_size": 4, "bank_size": 100},
    **{"updates_per_epoch": 2, "num_epochs": 1, "eval_freq": 1, "eval_batches": 1, "eval_states": 32, "eval_goals": 16},
    "max_trajectories": 7,
}
TINY = {
    **{"max_trajectories": 6, "max_episodes": 6, "num_envs": 2, "batch_size": 2, "transitions_per_window": 8},
    **{"fit_updates": 3, "updates_per_round": 2, "random_steps": 0, "replay_episodes": 4, "epsilon_start": 0.4},
    **{"epsilon_end": 0.1, "action_noise_start": 0.3, "action_noise_end": 0.05, "eval_freq": 1, "eval_episodes": 2},
    **{"eval_episodes_between": 1, "horizon": 5, "subgoal_steps": 4, "graph_nodes": 400, "replan_every": 3},
    **{"metric_steps": 5, "metric_updates": 4, "metric_dim": 8, "num_links": 5, "device": "cpu", "seed": 0, "lr": 1e-3},
    **{"aim_steps": 5.0, "patience": 4, "escape_steps": 2, "idm_updates": 3, "idm_updates_per_round": 2},
    **{"route_goals": 5, "eval_workers": 0, "eval_acting": "value"},
}
NO_INTERACTION = {"inverse_dynamics_data": "offline", "max_episodes": 0}


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    with pytest.MonkeyPatch.context() as patch:
        for module in (online_trainer, opso_evaluation):
            patch.setattr(module, "max_episode_steps", lambda dataset: STEPS)
        patch.setattr(online_trainer, "METRIC_PAIRS", 32)
        yield


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset.generate(DATASET, size=8, seed=0, dataset_dir=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def pretrained(dataset_dir, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "pretrained"
    flags = ["--no_plot_maps", "--no_tensorboard", "--dataset", DATASET, "--dataset_dir", str(dataset_dir)]
    offline_trainer.main([*flags, "--run_dir", str(run_dir), *words(PRETRAINING)])
    return run_dir


def words(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def arguments(dataset_dir, pretrained):
    """Builds a command line: a run's directory, switches, and settings other than TINY."""

    def build(run_dir, *switches, **settings) -> list[str]:
        places = {"dataset": DATASET, "dataset_dir": dataset_dir, "offline_run_dir": pretrained, "run_dir": run_dir}
        return [*words(places | TINY | settings), *switches]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    online_trainer.main(arguments(run_dir))
    return run_dir


def train(flags: list[str]) -> None:
    """A run without its pictures, which take longer than it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineRun, "plot", lambda run: None)
        online_trainer.main([*flags, "--no_tensorboard"])


def last(run_dir: Path) -> dict:
    return load_checkpoint(run_dir / "checkpoints/last.pth")


def tensors(state, name="") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists by their path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, item in items for key, value in tensors(item, f"{name}/{part}").items()}


def differing(first: dict, second: dict) -> set[str]:
    """The paths of the tensors that are not the same bits."""
    first, second = tensors(first), tensors(second)
    assert set(first) == set(second)
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_outputs(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "versions.json", "metrics.csv", "best_model.pth", "checkpoints/last.pth",
        "online_training_curves.png", "paths.png", "finished.json",
    } <= names  # fmt: skip
    assert any("tfevents" in name for name in names)
    assert not any(name.endswith(".tmp") or "part" in name for name in names)
    for picture in ("online_training_curves.png", "paths.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    summary, metrics = json.loads((finished / "finished.json").read_text()), read_metrics(finished)
    assert summary["dataset"] == DATASET and summary["env_steps"] == 6 * STEPS
    assert summary["eval/success_rate"] == metrics["eval/success_rate"][-1]
    assert metrics["step"] == [0, 2, 4, 6]
    assert metrics["env_steps"] == [0, 2 * STEPS, 4 * STEPS, 6 * STEPS]
    for column in ("critic_loss", "v_loss", "state_loss", "train_loss", "idm_loss", "eval/success_rate"):
        assert np.isfinite(metrics[column]).tolist() == [False, True, True, True], column  # no action is known before
    assert np.isfinite(metrics["metric_loss"][0]) and np.isnan(metrics["metric_loss"][1:]).all()  # fitted once
    for column in ("success_rate", "goal_biased_share"):
        assert np.isnan(metrics[column][0]) and all(0 <= value <= 1 for value in metrics[column][1:]), column
    assert np.isfinite(metrics["episode_reward"][1:]).all()
    by_task = [metrics[f"eval/success_task{task}"] for task in range(1, 6)]
    assert np.allclose(metrics["eval/success_rate"], np.mean(by_task, axis=0), equal_nan=True)


def test_the_first_steps_are_random_where_no_action_is_known(arguments, tmp_path):
    """Three rounds, the first two begin before random_steps; with the dataset's actions none is random.

    The schedules begin with the first round that is not.
    """
    for data, epsilon in (("online", [1.0, 1.0, 0.4]), ("offline", [0.4, 0.25, 0.1])):
        run = tmp_path / data
        settings = {"inverse_dynamics_data": data, "random_steps": 2 * STEPS + 1, "eval_freq": 3}
        train(arguments(run, **settings))
        assert read_metrics(run)["epsilon"][1:] == pytest.approx(epsilon)
        actions = last(run)["replay"]["actions"]
        wide = (actions.abs() > 0.8).float().mean()
        assert actions.abs().max() <= 1 and (wide > 0.05) == (data == "online")


# -- the same bits ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whoever_steps_and_another_does_not(finished, arguments, tmp_path):
    train(arguments(tmp_path / "again", eval_workers=1))
    for name in ("checkpoints/last.pth", "best_model.pth", "metrics.csv", "finished.json"):
        assert digest(finished / name) == digest(tmp_path / "again" / name), name
    train(arguments(tmp_path / "other", seed=1, eval_freq=2, eval_episodes=1))
    first, other = last(finished), last(tmp_path / "other")
    assert differing(first["agent"]["encoder"], other["agent"]["encoder"]) == set()
    assert not torch.equal(first["replay"]["states"], other["replay"]["states"])
    names = differing(first["agent"]["heads"], other["agent"]["heads"])
    assert names == set(tensors(first["agent"]["heads"]))
    names = differing(first["agent"]["metric"], other["agent"]["metric"])
    assert names == set(tensors(first["agent"]["metric"])) - {"/aim_steps"}  # the data's alone
    train(arguments(tmp_path / "fewer", eval_freq=2, eval_episodes=1))  # how often it evaluates changes no number
    assert differing(first, last(tmp_path / "fewer")) == set()
    rows, fewer = read_metrics(finished), read_metrics(tmp_path / "fewer")
    assert [np.isnan(value) for value in fewer["eval/success_rate"]] == [True, True, False, False]
    for column in ("train_loss", "v_loss", "episode_reward", "goal_biased_share"):
        assert np.array_equal(rows[column], fewer[column], equal_nan=True), column


@pytest.mark.parametrize("stop_at,more", [(0, {}), (2, {"random_steps": 3 * STEPS}), (6, {"idm_updates_per_round": 0})])
def test_a_resumed_run_equals_the_uninterrupted_one(stop_at, more, arguments, tmp_path, monkeypatch):
    """Cut before the first episode, among random ones, a round past the checkpoint with the replay wrapped round."""
    settings = {"max_episodes": 8, "eval_freq": 2, "replay_episodes": 3, "random_steps": STEPS} | more
    settings |= {"eval_freq": 1} if stop_at == 2 else {}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(arguments(whole, **settings))
    collect = OnlineRun.collect

    def interrupted(run, ended):
        if run.episodes == stop_at:
            raise KeyboardInterrupt
        return collect(run, ended)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnlineRun, "collect", interrupted)
        train(arguments(cut, **settings))
    assert last(cut)["episodes"] == {0: 0, 2: 2, 6: 4}[stop_at] and not (cut / "finished.json").exists()
    train(arguments(cut, "--resume", **settings))
    for name in ("checkpoints/last.pth", "best_model.pth", "metrics.csv", "finished.json"):
        assert digest(whole / name) == digest(cut / name), name


def test_a_run_cut_after_its_last_checkpoint_evaluates_the_same(finished, arguments, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("finished.json", "paths.png"):
        (run / name).unlink()
    online_trainer.main(arguments(run, "--resume"))
    assert (run / "finished.json").read_text() == (finished / "finished.json").read_text()
    assert (run / "paths.png").exists() and digest(run / "metrics.csv") == digest(finished / "metrics.csv")


def test_the_best_model_acts_by_itself(arguments, tmp_path):
    """From best_model.pth alone come the episodes of the run's own evaluation, bit by bit."""
    settings = NO_INTERACTION | {"eval_episodes": 1}
    with open_run(arguments(tmp_path / "run", **settings)) as run:
        run.train()
    assert list(run.evaluation.episodes) == [1, 2, 3, 4, 5]
    for name in ("best_model.pth", "checkpoints/last.pth"):
        policy = MazePolicy(tmp_path / "run" / name)
        rows = policy.state["node_rows"]
        assert policy.dataset == DATASET and torch.equal(policy.state["nodes"], run.data.observations[rows])
        with Evaluator(functools.partial(GoalEnv, DATASET, STEPS), 20) as evaluator:
            again = Evaluation(evaluator, DATASET, RandomStreams(policy.config["seed"]).evaluation_seed)
            assert again.run_all(policy.agent, policy.graph, 1, ("search", "value")) == run.metrics
        for (episode,), (other,) in zip(run.evaluation.episodes.values(), again.episodes.values(), strict=True):
            assert episode.actions.shape == (STEPS, 2) and np.abs(episode.actions).max() > 0
            assert (episode.subgoals < len(rows)).any()  # not the goal all the time
            assert all(map(np.array_equal, vars(episode).values(), vars(other).values()))
    assert "optimizer" not in load_checkpoint(tmp_path / "run/best_model.pth")["agent"]


def test_a_file_is_evaluated_as_its_run_evaluated_it(finished, tmp_path, capsys):
    shutil.copy(finished / "checkpoints/last.pth", tmp_path / "policy.pth")
    episodes = parse_config(OnlineTrainerConfig, ["--config", str(finished / "config.yaml")]).eval_episodes
    flags = ["--eval_episodes", str(episodes), "--eval_workers", "0", "--eval_acting", "value"]
    online_trainer.main(["--evaluate", str(tmp_path / "policy.pth"), *flags])
    written = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    expected = json.loads((finished / "finished.json").read_text())
    assert written["eval/value/success_rate"] == read_metrics(finished)["eval/value/success_rate"][-1]
    assert written == {key: value for key, value in expected.items() if key != "env_steps"}
    assert (tmp_path / "evaluation/paths.png").stat().st_size > 10_000
    assert f"eval/success_rate: {expected['eval/success_rate']:.3f}" in capsys.readouterr().out


# -- a policy from a file ---------------------------------------------------------------------------------------------


def test_a_policy_acts_as_its_planner_does(finished):
    """A run's directory stands for its last checkpoint; a new goal or `reset` begins an episode."""
    policy, env = MazePolicy(finished), make_env(DATASET)
    assert policy.path == finished / "checkpoints/last.pth"
    observation, info = seeded_reset(env, 3, {"task_id": 2})
    goal, states = info["goal"], [observation + 0.1 * step for step in range(8)]
    planner = Planner(policy.agent, policy.graph, goal[None], [0])
    expected = [planner.act(state[None], np.array([0]))[0] for state in states]
    for _ in range(2):
        actions = [policy.act(state, goal) for state in states]
        assert np.array_equal(actions, expected) and actions[0].shape == (2,) and actions[0].dtype == np.float32
        policy.reset()
    two = policy.act(np.stack([states[0]] * 2), np.stack([goal, goal + 4]))
    assert two.shape == (2, 2) and np.allclose(two[0], expected[0], atol=1e-5) and not np.allclose(two[0], two[1])
    noisy = [policy.act(states[0], goal, deterministic=False) for _ in range(2)]
    assert not np.array_equal(*noisy) and np.abs(noisy).max() <= 1
    for wrong in ((states[0][:1], goal), (states[0], goal[:1]), (np.stack(states), goal)):
        with pytest.raises(ValueError):
            policy.act(*wrong)
    env.close()


def test_a_policy_of_either_stage_encodes_and_values(finished, pretrained):
    """`Policy`, that of all systems, finds it."""
    states = np.random.default_rng(0).normal(0, 4, (5, 2)).astype(np.float32)
    model = last(pretrained)["agent"]["target"]
    for policy in (Policy(finished), Policy(pretrained), Policy(pretrained / "best_model.pth")):
        z, value = policy.encode(states), policy.value(states, states[0])
        assert z.shape == (5, 16) and value.shape == (5,) and policy.value(states[1], states[0]).shape == ()
        assert np.allclose(policy.value(states[1], states[0]), value[1], atol=1e-5) and value.std() > 0
        assert np.allclose(policy.encode(states[2]), z[2], atol=1e-5)
    online, offline = MazePolicy(finished), MazePolicy(pretrained)
    assert torch.equal(offline.encoder.state_dict()["mean"], model["encoder.mean"])
    assert np.allclose(online.encode(states), offline.encode(states), atol=1e-6)  # it is frozen
    assert np.array_equal(Policy(finished).act(states[0], states[1]), online.act(states[0], states[1]))
    with pytest.raises(ValueError, match="needs a goal"):
        Policy(finished).act(states[0])
    with pytest.raises(UserError, match="learns no action"):
        offline.act(states[0], states[1])


def test_what_is_no_policy_is_named(tmp_path, finished):
    save_checkpoint(tmp_path / "policy.pth", {key: value for key, value in last(finished).items() if key != "nodes"})
    for path, name in ((tmp_path / "absent.pth", "absent"), (tmp_path / "policy.pth", "nodes")):
        with pytest.raises(UserError, match=name):
            MazePolicy(path)


# -- the metric and the graph -----------------------------------------------------------------------------------------


def open_run(flags: list[str]) -> OnlineRun:
    return OnlineRun(parse_config(OnlineTrainerConfig, [*flags, "--no_tensorboard"]))


def test_whole_episodes_are_left_out_where_nodes_would_lie_too_far_apart():
    """Ten episodes of 100 rows, aim 10: nodes lie 5 apart at most, 20 an episode."""
    end = torch.arange(1000) // 100 * 100 + 99

    def kept(most, aim_steps=10.0):
        return spaced_rows(end, most, aim_steps).tolist()

    assert kept(1000) == list(range(1000)) and kept(500) == list(range(0, 1000, 2))
    assert kept(200) == list(range(0, 1000, 5)) == kept(200, aim_steps=30.0)
    assert kept(199) == [row for row in range(0, 1000, 5) if row // 100 % 2 == 0]
    assert kept(60) == [row for row in range(0, 1000, 5) if row // 100 in (0, 4, 8)]
    assert kept(60, aim_steps=60.0) == list(range(0, 1000, 17))
    assert kept(20) == list(range(0, 100, 5)) and len(kept(10)) == 10
    end = torch.arange(10**6) // 1000 * 1000 + 999
    assert torch.equal(spaced_rows(end, 150_000, 15.0), torch.arange(0, 10**6, 7))
    assert len(spaced_rows(end, 100_000, 15.0)) < 80_000  # half of the episodes


def test_as_many_trajectories_as_the_pretraining_unless_told_otherwise(arguments, tmp_path):
    for given, expected in (({}, 6), ({"max_trajectories": "null"}, 7)):
        run = open_run(arguments(tmp_path / str(expected), **given))
        run.close()
        assert len(run.data.episode_end.unique()) == expected


def test_what_depends_on_the_robot_is_filled_in():
    numbers = ("subgoal_steps", "metric_steps", "metric_updates", "fit_updates", "random_steps", "idm_updates")
    for dataset, expected in (
        ("pointmaze-large-navigate-v0", (10, 10, 1500, 1500, 2000, 1500)),
        ("antmaze-medium-navigate-v0", (25, 25, 3000, 12_000, 32_000, 6000)),
        ("humanoidmaze-medium-navigate-v0", (25, 25, 3000, 12_000, 32_000, 6000)),
    ):
        config = online_trainer.resolve(OnlineTrainerConfig(dataset=dataset))
        assert tuple(getattr(config, name) for name in numbers) == expected
        config = online_trainer.resolve(OnlineTrainerConfig(dataset=dataset, metric_steps=3))
        assert config.metric_steps == 3 and config.subgoal_steps == expected[0]


# -- whose actions ----------------------------------------------------------------------------------------------------


def with_actions(change):
    """MazeDataset.load with actions that `change` has rewritten."""
    load = MazeDataset.load

    def changed(*arguments, **options):
        data = load(*arguments, **options)
        change(data.actions)
        return data

    return changed


def test_the_strict_regime_never_reads_the_datasets_actions(finished, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(MazeDataset, "load", with_actions(lambda actions: actions.fill_(torch.nan)))
    train(arguments(tmp_path / "run"))
    for name in ("checkpoints/last.pth", "best_model.pth", "metrics.csv"):
        assert digest(finished / name) == digest(tmp_path / "run" / name), name


def test_inferred_actions_lie_between_the_datasets_states_and_are_what_is_learned(arguments, tmp_path, monkeypatch):
    """The dataset's rows teach the inverse dynamics as if their actions were known, own ones only its model."""
    run = open_run(arguments(tmp_path / "run", max_episodes=4))
    drawn, update = [], run.agent.update

    def checked(batch, values, scale):
        assert len(batch["z"]) == 16
        drawn.append((values and len(values[0]["z"]), {tuple(action) for action in batch["actions"].tolist()}))
        return update(batch, values, scale)

    monkeypatch.setattr(run.agent, "update", checked)
    assert not run.codes.actions.any()
    run.train()
    run.close()
    own = {tuple(action) for action in run.replay.actions.tolist()}
    assert [count for count, _ in drawn] == [32, None, None] + [32, None]  # values: of the fit, of the last round
    assert not any(own & actions for _, actions in drawn)
    rows, states = run.codes.transitions, run.agent.state(run.codes.states)
    expected = run.agent.idm(states[rows], states[rows + 1]).clamp(-1, 1)
    assert torch.allclose(run.codes.actions[rows], expected, atol=1e-5) and expected.std() > 0
    ends = torch.ones(len(states), dtype=torch.bool).index_fill(0, rows, False)
    assert ends.sum() == 6 and not run.codes.actions[ends].any()


def test_known_actions_and_own_ones_teach_the_policy_and_values_learn_as_often_as_asked(
    arguments, tmp_path, monkeypatch
):
    more = {"inverse_dynamics_data": "offline", "max_episodes": 4, "fit_updates": 5, "value_every": 2}
    run = open_run(arguments(tmp_path / "run", **more))
    drawn, update = [], run.agent.update

    def checked(batch, values, scale):
        own = {tuple(action) for action in run.replay.actions.tolist()}
        drawn.append((len(batch["z"]), values is not None, bool(own & {tuple(a) for a in batch["actions"].tolist()})))
        assert values is None or torch.equal(values[0]["actions"], batch["actions"])
        return update(batch, values, scale)

    monkeypatch.setattr(run.agent, "update", checked)
    run.train()
    run.close()
    assert drawn == [(16, number % 2 == 0, False) for number in range(5)] + 2 * [(32, True, True), (32, False, True)]


def test_where_random_rounds_take_all_episodes_it_learns_at_the_end(arguments, tmp_path):
    train(arguments(tmp_path / "run", random_steps=10**6, eval_freq=1))
    metrics = read_metrics(tmp_path / "run")
    assert metrics["epsilon"][1:] == [1.0, 1.0, 1.0]
    for column in ("idm_loss", "train_loss", "eval/success_rate"):
        assert np.isfinite(metrics[column]).tolist() == [False, False, False, True], column


def test_the_offline_regime_reads_them_for_the_inverse_dynamics_alone(arguments, tmp_path, monkeypatch, capsys):
    train(arguments(tmp_path / "run", **NO_INTERACTION))
    with monkeypatch.context() as patch:
        patch.setattr(MazeDataset, "load", with_actions(lambda actions: actions.mul_(-1)))
        train(arguments(tmp_path / "other", **NO_INTERACTION))
    first, other = last(tmp_path / "run")["agent"], last(tmp_path / "other")["agent"]
    names = differing(first["heads"], other["heads"])
    assert names == {name for name in tensors(first["heads"]) if "inverse_dynamics" in name}
    assert differing(first["target"], other["target"]) == set()
    with monkeypatch.context() as patch:
        patch.setattr(MazeDataset, "load", with_actions(lambda actions: actions.fill_(torch.nan)))
        line = exits(capsys, *arguments(tmp_path / "nan", "--no_tensorboard", **NO_INTERACTION))
    assert "loss is nan" in line and "--lr" in line and not (tmp_path / "nan/best_model.pth").exists()


# -- episodes ---------------------------------------------------------------------------------------------------------


class Counter(gymnasium.Env):
    """Counts its steps; succeeds, ends or is cut after so many, and may not be stepped after that."""

    spec = EnvSpec("Counter-v0")
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, event: str, at: int):
        self.event, self.at = event, at

    def reset(self, *, seed=None, options=None):
        self.time, self.options = 0, options
        self.first = np.random.default_rng(seed).random()
        return np.array([self.first, 0.0]), {"goal": np.array([9.0, 8.0])}

    def step(self, action):
        assert self.time < self.at
        self.time += 1
        success, terminated, truncated = (
            self.time == self.at and self.event == event for event in ("success", "terminated", "truncated")
        )
        return np.array([self.first, self.time]), float(action[0]), terminated, truncated, {"success": success}


class Acting:
    """Keeps what it is shown; environment k acts by 10 k + 1 and aims at node 100 + k."""

    def __init__(self, goals):
        assert goals.tolist() == [[9.0, 8.0]] * 3
        self.seen, self.chosen = [], np.zeros(3, dtype=int)

    def act(self, observations, live):
        self.seen.append((live.tolist(), observations[:, 1].tolist()))
        self.chosen[live] = 100 + live
        return (10.0 * live[:, None] + 1).astype(np.float32)


def test_each_environment_plays_to_its_own_end(monkeypatch):
    envs, ended = [Counter("truncated", 3), Counter("success", 1), Counter("terminated", 2)], []
    built = iter(envs)
    monkeypatch.setattr(opso_episodes, "make_env", lambda dataset, **more: next(built))
    codes = [episode_code(5), episode_code(6, 2), episode_code(5)]
    with Evaluator(functools.partial(GoalEnv, DATASET), 3) as evaluator:
        played, policy = rollout(evaluator, codes, Acting, ended.append)
    assert policy.seen == [([0, 1, 2], [0, 0, 0]), ([0, 2], [1, 1]), ([0], [2])] and ended == [1, 1, 1]
    assert [(episode.success, episode.reward) for episode in played] == [(False, 3.0), (True, 11.0), (False, 42.0)]
    for env, (episode, steps) in enumerate(zip(played, (3, 1, 2), strict=True)):
        assert episode.observations[:, 1].tolist() == list(range(steps + 1)) and episode.goal.tolist() == [9.0, 8.0]
        assert episode.actions.tolist() == [[10.0 * env + 1]] * steps
        assert episode.subgoals.tolist() == [100 + env] * steps
        assert envs[env].options == ({"task_id": 2} if env == 1 else {})
    first = [episode.observations[0, 0] for episode in played]
    assert first[0] == first[2] != first[1]  # the seed alone decides


class Filmed(gymnasium.Wrapper):
    """Its picture is where it is."""

    def render(self):
        return self.env.unwrapped.get_xy().copy()


class Writer(list):
    """Stands for imageio and its writer: keeps the pictures, and writes a file as it closes."""

    append_data = list.append

    def get_writer(self, path, fps):
        self.path = path
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path.write_bytes(b"film")


def test_the_video_replays_the_evaluated_actions(arguments, tmp_path, monkeypatch):
    writer, runs = Writer(), []
    for module in (opso_evaluation, online_trainer):
        monkeypatch.setattr(module, "open_video", lambda dataset: (Filmed(make_env(dataset)), writer))
    monkeypatch.setattr(Evaluation, "plot", lambda evaluation, *arguments: runs.append(evaluation))
    online_trainer.main(arguments(tmp_path / "run", "--record_video", "--no_tensorboard", **NO_INTERACTION))
    expected = [episodes[0].observations[1::VIDEO_SKIP, :2] for episodes in runs[0].episodes.values()]
    assert len(expected) == 5 and np.allclose(np.array(writer), np.concatenate(expected), atol=1e-5)
    assert (tmp_path / "run/evaluation.mp4").read_bytes() == b"film"
    assert not (tmp_path / "run/evaluation.part.mp4").exists()


def test_a_resumed_run_reads_its_own_settings(finished, arguments, tmp_path, monkeypatch, capsys):
    """With no --run_dir, those of the usual directory; a finished run is said before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    usual = Path("logs/online") / DATASET / "online/seed_0"
    shutil.copytree(finished, usual)
    monkeypatch.setattr(MazeDataset, "load", None)
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "argv", ["online_trainer.py", "--resume", "--dataset", DATASET])
        run_cli(online_trainer.main)
    out = capsys.readouterr().out
    words = "this run is finished, its results are in finished.json"
    assert stop.value.code == 0 and words in out and str(usual) in out


def test_a_run_of_another_command_is_recognised(pretrained, arguments, capsys):
    assert "another command" in exits(capsys, *arguments(pretrained))
    assert "another command" in exits(capsys, *arguments(pretrained, "--resume"))
    line = exits(capsys, "--evaluate", str(pretrained / "best_model.pth"))
    assert "not a policy of online_trainer.py" in line and "best_model.pth" in line


# -- bad input --------------------------------------------------------------------------------------------------------


exits = functools.partial(error_line, online_trainer.main)


def test_bad_settings_name_the_flag(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    line = exits(capsys, *arguments(run, max_episodes=0, inverse_dynamics_data="online"))
    assert "--max_episodes 0" in line and "--inverse_dynamics_data" in line
    assert "sum to 1" in exits(capsys, *arguments(run, p_self=0.1, p_future=0.1, p_random=0.1))
    assert "pointmaze-medium-stitch-v0" in exits(capsys, *arguments(run, dataset="pointmaze-medium-stich-v0"))
    assert not run.exists()


def test_a_missing_pretrained_model_names_the_command_that_makes_it(arguments, tmp_path, capsys):
    absent, run = tmp_path / "absent", tmp_path / "run"
    line = exits(capsys, *arguments(run, offline_run_dir=absent, seed=3))
    assert str(absent / "checkpoints/last.pth") in line
    assert f"`python offline_trainer.py --dataset {DATASET} --seed 3`" in line
    assert not run.exists()


def faulty(state: dict) -> dict[str, dict]:
    """Checkpoints that are no use, by the words that name what is wrong with them."""
    target, config = state["agent"]["target"], state["config"]
    no_mean = {name: value for name, value in target.items() if name != "encoder.mean"}
    return {
        "local/pointmaze-medium-navigate-v0": state | {"dataset": "local/pointmaze-medium-navigate-v0"},
        "encoder.mean": state | {"agent": state["agent"] | {"target": no_mean}},
        "checkpoints/last.pth": state | {"config": config | {"hidden_dim": 32}},
        "last.pth": {name: value for name, value in state.items() if name != "config"},
    }


def test_a_wrong_pretrained_model_is_named(pretrained, finished, arguments, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "wrong"
    path = folder / "checkpoints/last.pth"
    for words, state in faulty(last(pretrained)).items():
        save_checkpoint(path, state)
        line = exits(capsys, *arguments(run, offline_run_dir=folder))
        assert "python offline_trainer.py" in line and words in line, (words, line)
    path.write_bytes(b"not a checkpoint")
    assert str(path) in exits(capsys, *arguments(run, offline_run_dir=folder))
    assert "not a model of offline_trainer.py" in exits(capsys, *arguments(run, offline_run_dir=finished))
    assert not run.exists()


def test_a_run_does_not_go_on_from_another_pretrained_model(arguments, finished, pretrained, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    (run / "finished.json").unlink()
    shutil.copytree(pretrained, other)
    path = other / "checkpoints" / "last.pth"
    state = load_checkpoint(path)
    for weights in state["agent"]["target"].values():
        weights.mul_(1.5)
    save_checkpoint(path, state)
    line = exits(capsys, *arguments(run, "--resume", offline_run_dir=str(other)))
    assert "another pretrained model" in line and "--offline_run_dir" in line
    state = last(run)
    state["nodes"] += 1
    save_checkpoint(run / "checkpoints/last.pth", state)
    assert "other data" in exits(capsys, *arguments(run, "--resume"))


def test_what_cannot_be_resumed_is_refused(finished, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "finished.json").unlink()
    assert "--resume" in exits(capsys, *arguments(run))
    settings = (run / "config.yaml").read_bytes()
    with lock_run(run):
        assert "another process" in exits(capsys, *arguments(run, "--resume", device="auto"), code=3)
    assert (run / "config.yaml").read_bytes() == settings
    state = last(run)
    state["agent"].pop("metric")
    save_checkpoint(run / "checkpoints/last.pth", state)
    line = exits(capsys, *arguments(run, "--resume"))
    assert "metric" in line and str(run / "checkpoints/last.pth") in line and "--run_dir" in line
    assert digest(run / "best_model.pth") == digest(finished / "best_model.pth")

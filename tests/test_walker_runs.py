"""The study's commands: every method's outputs, resume, test and agent, and what batches are made of."""

import csv
import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from running import digest, error_line

import make_dataset
import walker.agent as agent_module
from dmc_utils import TASKS, WalkerEnv, load_study_data, parse_datasets, rewards_in_task
from policy import Policy
from runs.cli import parse_config
from runs.directory import load_checkpoint
from runs.metrics import read_metrics
from utils import RunFinished, UserError
from walker import study_run, train_cds, train_cqlsac, train_dt, train_il, train_model, train_morel, train_td3bc
from walker.agent import Agent
from walker.study_run import StudyRun

TINY = {
    **{"max_timesteps": 6, "eval_freq": 3, "log_freq": 2, "eval_episodes": 2, "test_episodes": 2, "eval_workers": 0},
    **{"batch_size": 8, "hidden_dim": 8, "device": "cpu", "USE_DATASET_STR": "local/walk_m,local/run_m"},
}
IN_MODEL = {"model_updates": 3, "eval_freq": 1, "imagined_envs": 8, "horizon": 3, "value_warmup": 1}
METHODS = {
    "bc": (train_il, {}),
    "td3bc": (train_td3bc, {}),
    "cql": (train_cqlsac, {"cql_n_actions": 2}),
    "dt": (train_dt, {"context": 3, "layers": 1}),
    "model": (train_model, IN_MODEL),
    "vae": (train_model, IN_MODEL | {"model": "vae"}),
    "morel": (train_morel, IN_MODEL),
    "cds": (train_cds, {"cql_n_actions": 2}),
}


class ShortEpisodes(gymnasium.Wrapper):
    """Cut after a few steps, so that an evaluation takes no time."""

    def reset(self, **options):
        self.steps = 0
        return self.env.reset(**options)

    def step(self, action):
        self.steps += 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated or self.steps >= 5, info


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    """And no curves, but of cloning."""
    plot = study_run.plot_study_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_module, "WalkerEnv", lambda task: ShortEpisodes(WalkerEnv(task)))
        patch.setattr(study_run, "plot_study_curves", lambda *most: most[2].startswith("bc:") and plot(*most))
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        make_dataset.generate(f"local/walker_{task}-td3-medium", size=2, dataset_dir=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def arguments(data_dir):
    def build(method, run_dir, *flags, **changed):
        settings = TINY | METHODS[method][1] | {"data_dir": data_dir, "run_dir": run_dir} | changed
        words = [f"--{name}={value}" for name, value in settings.items()]
        return [*words, "--no_tensorboard", *map(str, flags)]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished run of every method."""
    folder = tmp_path_factory.mktemp("runs")
    for method, (module, _) in METHODS.items():
        module.main(["train", *arguments(method, folder / method)])
    return folder


def test_a_diverging_value_stops_the_run(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("walker.study_run.largest_q", lambda *_: 1e-9)
    with pytest.raises(UserError, match="q_data is .*, beyond the limit of 1e-09 .--q_limit.; lower"):
        train_cds.main(["train", *arguments("cds", tmp_path / "run")])
    assert not (tmp_path / "run/finished.json").exists()


@pytest.fixture(scope="module")
def data(data_dir):
    return load_study_data(parse_datasets("local/walk_m,local/run_m"), data_dir)


def test_the_faulty_pairing_puts_an_action_beside_what_it_led_to(data):
    right, faulty = data.transitions(), data.transitions(faulty_pairing=True)
    assert len(faulty.rewards) == 4 * 999
    for episode in range(4):
        own, other = slice(1000 * episode, 1000 * episode + 999), slice(999 * episode, 999 * (episode + 1))
        assert np.array_equal(faulty.observations[other], right.next_observations[own])
        assert np.array_equal(faulty.actions[other], right.actions[own])
        assert np.array_equal(faulty.rewards[other], right.rewards[own])
        later = slice(1000 * episode + 1, 1000 * (episode + 1))
        assert np.array_equal(faulty.next_observations[other], right.next_observations[later])


def test_relabelled_rewards_are_the_simulators(data):
    run, states = WalkerEnv("run"), data.physics[0, 1:200]
    assert np.abs(rewards_in_task(WalkerEnv("walk"), states) - data.rewards[0, :199]).max() < 1e-4
    paid_by_run = rewards_in_task(run, states)
    for row in (20, 80, 150):  # the same transition, played in the other task
        run.set_physics(data.physics[0, row])
        assert abs(run.step(data.actions[0, row])[1] - paid_by_run[row]) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_its_outputs(method, finished):
    run_dir = finished / method
    summary = json.loads((run_dir / "finished.json").read_text())
    assert summary["steps"] == 6 and summary["datasets"] == parse_datasets(TINY["USE_DATASET_STR"])
    assert method != "bc" or (run_dir / "training_curves.png").stat().st_size > 10_000
    with open(run_dir / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    played = ["walk"] if method == "cds" else TASKS
    assert len(rows) == 2 * len(played) * 2
    for name in ("last", "best"):
        for task in played:
            returns = [float(row["return"]) for row in rows if (row["agent"], row["task"]) == (name, task)]
            assert np.mean(returns) == pytest.approx(summary[f"{name}/{task}/return"], abs=1e-9)
    metrics = read_metrics(run_dir)
    assert np.isfinite(metrics["eval/walk/return"][-1]) and metrics["step"][-1] == 6


@pytest.mark.parametrize("method", ["bc", "cql", "dt", "morel", "cds"])  # td3bc is as cql, the other models as morel
def test_a_run_that_was_cut_goes_on_to_the_same_bits(method, finished, arguments, tmp_path, monkeypatch, capsys):
    module = METHODS[method][0]
    run_dir, saves = tmp_path / "run", []
    stop_at = 5 if method == "morel" else 2  # in its second iteration of PPO; at a row of metrics

    def cut(run, save=StudyRun.save):
        save(run)
        saves.append(run.step)
        if run.step == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StudyRun, "is_save_due", lambda run: True)
        patch.setattr("walker.study_run.StudyRun.save", cut)
        with pytest.raises(KeyboardInterrupt):
            module.main(arguments(method, run_dir))
    assert saves[-1] == stop_at and not (run_dir / "finished.json").exists()
    assert f"update {saves[-1]}:" not in capsys.readouterr().out  # what is told of is saved
    module.main(arguments(method, run_dir, "--resume"))
    for name in ("metrics.csv", "evaluation.csv", "checkpoints/best.pth", "checkpoints/last.pth", "finished.json"):
        assert digest(run_dir / name) == digest(finished / method / name), name


@pytest.mark.parametrize("method", ["bc", "dt", "cds"])
def test_a_run_is_played_again_as_at_its_end(method, finished, arguments, capsys):
    figures = METHODS[method][0].main(["test", *arguments(method, finished / method)])
    summary = json.loads((finished / method / "finished.json").read_text())
    assert figures == {name: pytest.approx(summary[name], abs=1e-9) for name in figures}
    assert len(figures) == (2 if method == "cds" else 4)
    for name, path in (("last", ""), ("best", "checkpoints/best.pth")):
        means = agent_module.main(["--load", str(finished / method / path), "--eval_workers", "0", "--device", "cpu"])
        assert means == {task: summary[f"{name}/{task}/return"] for task in (["walk"] if method == "cds" else TASKS)}


def test_the_task_bit_tells_the_tasks_apart(finished, arguments, tmp_path):
    train_il.main(arguments("bc", tmp_path / "run", ADD_TASK_BIT="False", TEST_AFTER_TRAINING="False"))
    for run_dir, inputs in ((finished / "bc", 25), (tmp_path / "run", 24)):
        agent, actions = Agent(), []
        agent.load(run_dir)
        assert agent.policy.network.net[0].weight.shape[1] == inputs
        for task in TASKS:
            agent.set_task(task)
            actions.append(agent.act(np.ones(24)))
        assert np.array_equal(*actions) == (inputs == 24)
    with pytest.raises(ValueError, match="walk, run"):
        agent.set_task("stand")


@pytest.fixture
def open_run(arguments, tmp_path):
    """A run that has not trained, of some method and settings."""
    opened = []

    def build(run_class, config_class, method, **changed):
        config = parse_config(config_class, arguments(method, tmp_path / f"run_{len(opened)}", **changed))
        opened.append(run_class(config))
        return opened[-1]

    yield build
    for run in opened:
        run.close()


def test_inputs_are_standardised_and_carry_the_bit(open_run, data):
    run = open_run(train_il.CloningRun, train_il.CloningConfig, "bc")
    inputs = run.buffer.observations
    assert inputs.shape == (4000, 25)
    assert torch.allclose(inputs[:, :24].mean(0), torch.zeros(24), atol=1e-4)
    assert float((inputs[:, :24].std(0) - 1).abs().max()) < 0.05
    assert inputs[:2000, 24].unique().tolist() == [0.0] and inputs[2000:, 24].unique().tolist() == [1.0]
    assert np.abs(inputs[:, :24].numpy() * run.std + run.mean - data.transitions().observations).max() < 1e-4
    assert not run.buffer.terminated.any() and run.buffer.truncated.nonzero()[:, 0].tolist() == [999, 1999, 2999, 3999]


def test_noise_is_new_in_every_batch_and_never_on_the_bit(open_run):
    run = open_run(train_il.CloningRun, train_il.CloningConfig, "bc", random_noise=0.5)
    inputs = torch.zeros(4000, 25)
    first, second = run.with_noise(inputs), run.with_noise(inputs)
    assert float(first[:, :24].std()) == pytest.approx(0.5, rel=0.02) and not torch.equal(first, second)
    assert float(first[:, 24].abs().max()) == 0
    batch = run.make_batch()
    assert set(batch["observations"][:, 24].tolist()) <= {0.0, 1.0}
    assert float((batch["observations"][:, None, :24] - run.buffer.observations[:, :24]).abs().amax(-1).amin()) > 1e-3
    for off in (0.0, -1.0):
        quiet = open_run(train_il.CloningRun, train_il.CloningConfig, "bc", random_noise=off)
        assert torch.equal(quiet.with_noise(inputs), inputs)


def test_windows_of_the_transformer_are_rows_of_one_episode(open_run, data):
    run = open_run(train_dt.TransformerRun, train_dt.TransformerConfig, "dt", batch_size=400, context=30)
    faulty = open_run(train_dt.TransformerRun, train_dt.TransformerConfig, "dt", context=30, faulty_pairing="true")
    assert torch.equal(faulty.episodes["observations"][:, :999], run.episodes["observations"][:, 1:1000])
    assert torch.equal(faulty.episodes["actions"], run.episodes["actions"])
    walk, running = np.quantile(data.rewards.sum(1).reshape(2, 2), 0.9, axis=1)
    assert run.learner.policy.targets == pytest.approx({"walk": walk, "run": running}, abs=1e-2)
    batch = run.make_batch()
    assert batch["observations"].shape == (400, 30, 25)
    to_go = np.cumsum(data.rewards[:, ::-1], 1)[:, ::-1] / 1000
    standard = (data.observations - run.mean) / run.std
    ends = 0
    for row in range(400):
        valid, times = batch["valid"][row].numpy(), batch["times"][row].numpy()
        assert np.array_equal(valid, times < 1000) and np.array_equal(np.diff(times), np.ones(29))
        ends += not valid.all()
        first = batch["observations"][row, 0, :24].numpy()
        episode = np.abs(standard[:, times[0]] - first).max(1).argmin()
        kept = times[valid]
        assert np.abs(batch["observations"][row, valid, :24].numpy() - standard[episode, kept]).max() < 1e-5
        assert np.array_equal(batch["actions"][row, valid].numpy(), data.actions[episode, kept])
        assert np.abs(batch["returns"][row, valid].numpy() - to_go[episode, kept]).max() < 1e-4
    assert 2 <= ends <= 30  # 29 of 1000 starts are so late


def test_shared_transitions_are_the_most_valuable_and_paid_by_the_main_task(open_run, data):
    settings = {"main_task": "run", "batch_size": 40, "share_candidates": 5, "reward_scale": 0.5}
    run = open_run(train_cds.CDSRun, train_cds.CDSConfig, "cds", **settings)
    assert len(run.buffer) == len(run.others) == 2000
    assert set(run.buffer.observations[:, 24].tolist()) == set(run.others.observations[:, 24].tolist()) == {1.0}
    assert np.allclose(run.buffer.rewards.numpy(), 0.5 * data.rewards[2:].reshape(-1))
    assert np.allclose(run.others.rewards[:1000].numpy(), 0.5 * rewards_in_task(WalkerEnv("run"), data.physics[0, 1:]))
    assert run.describe().count("run") and f"walk {data.rewards[:2].sum(1).mean():.1f}" in run.describe()  # their own
    drawn, sample = [], run.others.sample
    run.others.sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
    batch = run.make_batch()
    with torch.no_grad():
        values = run.learner.critic(drawn[0]["observations"], drawn[0]["actions"]).amin(0)
        shared = run.learner.critic(batch["observations"][20:], batch["actions"][20:]).amin(0)
    assert len(values) == 100 and len(shared) == 20
    assert torch.allclose(shared.sort().values, values.sort().values[-20:], atol=1e-6)
    targets = run.learner.critic_target(batch["observations"], batch["actions"]).detach().numpy()
    level = pytest.approx(sum(0.99**step * 0.5 * data.rewards[2:].mean() for step in range(2000)), rel=0.02)
    assert values.numpy() == level and targets == level and float(run.learner.temperature.alpha()) == pytest.approx(0.1)
    for share in (0.0, 1.0):
        run.config.shared_part = share
        assert len(run.make_batch()["rewards"]) == 40


def test_each_twentieth_episode_is_held_out_from_the_model(open_run, monkeypatch):
    monkeypatch.setattr(train_model, "HELD_OUT_EVERY", 4)
    run = open_run(train_model.ModelRun, train_model.ModelConfig, "model")
    assert len(run.seen) == 3000 and torch.equal(run.held_out["observations"], run.buffer.observations[3000:])
    figures = run.evaluate()
    assert figures["held_out/change_error"] > 0 and figures["held_out/reward_error"] > 0


def test_how_often_a_run_evaluates_changes_no_training_number(finished, arguments, tmp_path):
    for method in ("dt", "cds"):  # the one draws dropout from torch's own generator, the other in its evaluations
        module = METHODS[method][0]
        module.main(arguments(method, tmp_path / method, "--no_TEST_AFTER_TRAINING", eval_freq=2, eval_episodes=1))
        found, expected = (load_checkpoint(folder / method / "checkpoints/last.pth") for folder in (tmp_path, finished))
        for name, value in expected["acting"]["weights"].items():
            assert torch.equal(found["acting"]["weights"][name], value), (method, name)


def test_the_agents_command(finished, capsys, tmp_path):
    flags = ["--episodes", "3", "--eval_workers", "0", "--device", "cpu"]
    again = ["--load", str(finished / "bc/checkpoints/last.pth"), "--seed", "1", "--episodes", "1"]
    means = agent_module.main([*flags, *again])
    assert "±" not in (words := capsys.readouterr().out) and "bc, last, walk: " in words and "over 1 episode\n" in words
    assert means["walk"] != json.loads((finished / "bc/finished.json").read_text())["last/walk/return"]
    means = agent_module.main([*flags, "--run_dir", str(tmp_path)])
    assert "random, run:" in capsys.readouterr().out
    assert json.loads((tmp_path / "finished.json").read_text())["last/run/return"] == means["run"]
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["agent"], row["task"]) == ("last", "run")]
    returns = [float(row["return"]) for row in rows]
    assert len(returns) == 3 and np.isclose(np.mean(returns), means["run"])
    with pytest.raises(RunFinished):
        agent_module.main([*flags, "--run_dir", str(tmp_path)])


def test_the_one_policy_of_all_systems_acts_as_the_agent(finished):
    observations = np.random.default_rng(0).normal(size=(3, 24))
    for method in ("bc", "dt"):
        policy, agent = Policy(finished / method, task="run"), Agent()
        agent.load(finished / method / "checkpoints/last.pth")
        agent.set_task("run")
        for _ in range(3):
            expected = agent.act_vec(observations)
            assert np.array_equal(policy.act(observations), expected)
        policy.reset()
        assert policy.act(observations[0]).shape == (6,)
    with pytest.raises(ValueError, match="task 'fly'"):
        Policy(finished / "bc", task="fly")
    with pytest.raises(ValueError, match=r"observations have the shape \(1, 3\), not \[n, 24\]"):
        policy.act(np.zeros(3))
    for words, flags in (("deterministically", {"deterministic": False}), ("no goal", {"goal": observations})):
        with pytest.raises(ValueError, match=words):
            policy.act(observations, **flags)


def test_bad_input_is_one_line(finished, arguments, tmp_path, capsys, data_dir):
    line = functools.partial(error_line, train_il.main, capsys)
    assert "the first word is train or test; did you mean 'test'?" in line("tset")
    assert "none of walk_m" in line(*arguments("bc", tmp_path / "a", USE_DATASET_STR="fly_m"))
    assert "no such file; train first" in line("test", *arguments("bc", tmp_path / "a"))
    assert "lr was 0.001 and is now 0.5" in line(*arguments("bc", finished / "bc", lr=0.5))
    dt = functools.partial(error_line, train_dt.main, capsys)
    assert "--heads 3: must divide --hidden_dim 8" in dt(*arguments("dt", tmp_path / "a", heads=3))
    model = functools.partial(error_line, train_model.main, capsys)
    assert "nothing is left for PPO" in model(*arguments("model", tmp_path / "a", model_updates=6))
    assert "--minibatches 13" in model(*arguments("model", tmp_path / "a", minibatches=13))
    one_task = arguments("cds", tmp_path / "a", USE_DATASET_STR="local/walk_m")
    assert "give data of both tasks" in error_line(train_cds.main, capsys, *one_task)
    assert "unknown device" in error_line(agent_module.main, capsys, "--device=nonsense", "--episodes=1")
    torch.save({"acting": {"mean": torch.zeros(3)}}, tmp_path / "y.pth")
    line = error_line(agent_module.main, capsys, "--load", tmp_path / "y.pth")
    assert "not a file of the walker study's agents" in line


def test_default_directories_tell_settings_apart():
    def name(run_class, config_class, *flags):
        return str(run_class.default_run_dir(parse_config(config_class, list(flags))))

    cloning = functools.partial(name, train_il.CloningRun, train_il.CloningConfig)
    assert cloning() == "logs/walker/bc/local_all/seed_0"
    assert cloning("--USE_DATASET_STR", "run_m,walk_m") == "logs/walker/bc/walk_m+run_m/seed_0"
    flags = ("--random_noise", "0.1", "--no_ADD_TASK_BIT", "--faulty_pairing", "--USE_DATASET_STR", "__all__")
    assert cloning(*flags) == "logs/walker/bc/all_noise_0.1_no_task_bit_faulty_pairing/seed_0"
    assert cloning("--exp_name", "v2_t3.2", "--seed", "4") == "logs/walker/bc/v2_t3.2/seed_4"
    assert name(train_cds.CDSRun, train_cds.CDSConfig, "--main_task", "run") == "logs/walker/cds/local_all_run/seed_0"
    assert name(train_model.ModelRun, train_model.ModelConfig) == "logs/walker/model/local_all_mlp/seed_0"

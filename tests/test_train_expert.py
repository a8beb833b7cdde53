"""Training experts: runs write policies and cards, continue exactly after a kill, and evaluations change nothing."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import train_expert
from benchmark_data.experts import evaluate_policy, make_expert_env, read_card, read_policy
from runs.directory import hold_run, load_checkpoint
from runs.metrics import read_metrics
from train_expert import ExpertRun, SeededEpisodes, TrainExpertConfig, build_model, extract_policy
from utils import RunFinished, UserError

needs_sb3 = pytest.mark.skipif(importlib.util.find_spec("stable_baselines3") is None, reason="needs stable-baselines3")
TINY = {
    "env": "hopper",
    "max_timesteps": 500,
    "start_steps": 150,
    "hidden_dims": (8, 8),
    "batch_size": 16,
    "snapshot_every": 250,
    "log_every": 100,
    "checkpoint_every": 60,
    "eval_episodes": 2,
    "card_episodes": 3,
    "tensorboard": False,
}


# Trains until step 300, and ends there as with kill -9.
KILLED_RUN = """
import os, signal, sys
import train_expert

log = train_expert.ExpertRun.log

def killed(self, step, row):
    if step == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, step, row)

train_expert.ExpertRun.log = killed
train_expert.main(sys.argv[1:])
"""


def flags(settings):
    """A dict of settings as command-line arguments."""
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return arguments


def train(run_dir, **settings):
    train_expert.main(flags(TINY | settings | {"run_dir": str(run_dir)}))
    return run_dir


def run_files(run_dir):
    """Every file that a run's numbers depend on: name -> bytes. Versions of packages and pictures aside."""
    patterns = ("metrics.csv", "checkpoints/*", "policies/*", "finished.json")
    return {str(path.relative_to(run_dir)): path.read_bytes() for glob in patterns for path in run_dir.glob(glob)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that was never stopped."""
    return train(tmp_path_factory.mktemp("experts") / "run")


# --- what a run writes -----------------------------------------------------------------------------------------------


@needs_sb3
def test_a_run_writes_policies_cards_and_curves(finished, capsys):
    assert {path.name for path in (finished / "policies").iterdir()} == {
        f"hopper_{step}{suffix}" for step in (250, 500) for suffix in (".safetensors", ".json")
    }
    last = finished / "policies" / "hopper_500.safetensors"
    policy, card = read_policy(last), read_card(last)
    assert (policy.env, policy.step, policy.activation, policy.stochastic) == ("hopper", 500, "relu", True)
    assert (card["seed"], card["hidden"], card["recipe"]["lr"]) == (0, [8, 8], 3e-4)
    assert card["algorithm"].startswith("SAC of stable-baselines3 ")
    assert {kind: result["episodes"] for kind, result in card["returns"].items()} == {
        "deterministic": 3,
        "stochastic": 3,
    }
    assert card["returns"]["deterministic"]["mean"] == round(evaluate_policy(policy, 3)["mean"], 4)
    metrics = read_metrics(finished)
    assert metrics["step"] == [100, 200, 250, 300, 400, 500]
    assert np.isfinite(metrics["eval_return"]).tolist() == [False, False, True, False, False, True]
    assert np.isfinite(metrics["critic_loss"]).tolist() == [False, True, True, True, True, True]
    summary = json.loads((finished / "finished.json").read_text())
    best = metrics["step"][int(np.nanargmax(metrics["eval_return"]))]
    assert (summary["steps"], summary["best_step"]) == (500, best)
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunFinished):
        train(finished)


@needs_sb3
def test_evaluating_again_keeps_the_origin(finished, tmp_path, capsys):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"hopper_250{suffix}").write_bytes((finished / "policies" / f"hopper_250{suffix}").read_bytes())
    path = tmp_path / "hopper_250.safetensors"
    before = read_card(path)
    train_expert.main(["--evaluate", str(path), "--card_episodes", "5"])
    after = read_card(path)
    assert after["returns"]["stochastic"]["episodes"] == 5
    assert all(after[key] == before[key] for key in ("algorithm", "recipe", "seed", "sha256"))
    assert "hopper_250, stochastic: return" in capsys.readouterr().out
    train_expert.main(["--evaluate", str(path), "--card_episodes", "1"])  # a quick look replaces no better measurement
    assert read_card(path) == after and "keeps its returns over 5 episodes" in capsys.readouterr().out
    path.with_suffix(".json").unlink()
    train_expert.main(["--evaluate", str(path), "--card_episodes", "1"])
    assert read_card(path)["seed"] == "not recorded"


# --- continuing ------------------------------------------------------------------------------------------------------


@needs_sb3
def test_a_killed_run_continues_exactly(finished, tmp_path, repository):
    """kill -9 in one process, --resume in another: the files equal those of the run that was never stopped."""
    arguments = flags(TINY | {"run_dir": str(tmp_path)})
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], cwd=repository, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "policies" / "hopper_250.json").exists() and not (tmp_path / "finished.json").exists()
    assert 60 <= load_checkpoint(tmp_path / "checkpoints" / "last.pth")["step"] < 300
    with pytest.raises(UserError, match="--resume"):
        train(tmp_path)
    with pytest.raises(UserError, match="discount was 0.99 and is now 0.9"):
        train(tmp_path, resume=True, discount=0.9)
    with pytest.raises(UserError, match="--max_timesteps 10:"):
        train(tmp_path, resume=True, max_timesteps=10)
    train(tmp_path, resume=True)
    assert run_files(tmp_path) == run_files(finished)


@needs_sb3
def test_several_steps_an_update_continue_exactly(tmp_path, monkeypatch):
    """An episode can end and the next begin between two updates: no checkpoint may fall there."""
    recipe = replace(train_expert.RECIPES["hopper"], interval=4)
    monkeypatch.setitem(train_expert.RECIPES, "hopper", recipe)
    whole = train(tmp_path / "whole", snapshot_every=200)
    save = ExpertRun.save
    stops = iter(range(100))

    def save_and_stop(self):
        save(self)
        if next(stops) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ExpertRun, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", snapshot_every=200)
    monkeypatch.setattr(ExpertRun, "save", save)
    train(tmp_path / "stopped", snapshot_every=200, resume=True)
    assert run_files(tmp_path / "stopped") == run_files(whole)


@needs_sb3
def test_a_run_holds_its_directory_and_its_policies_alone(tmp_path):
    run = tmp_path / "run"
    left = run / "policies" / "hopper_9.safetensors"  # of a run that ended before its first checkpoint
    left.parent.mkdir(parents=True)
    left.write_bytes(b"another policy")
    with hold_run(run), pytest.raises(UserError, match="another process"):
        train(run)
    assert [path.name for path in run.iterdir()] == ["policies"] and left.exists()
    train(run, max_timesteps=250)
    assert {path.name for path in left.parent.iterdir()} == {"hopper_250.safetensors", "hopper_250.json"}


@needs_sb3
def test_td3_continues_exactly(tmp_path, monkeypatch):
    settings = {"algorithm": "td3", "max_timesteps": 350, "env": "walker_run", "eval_episodes": 1, "card_episodes": 1}
    # Walker episodes have 1000 steps; shorter ones give checkpoints.
    monkeypatch.setattr(
        train_expert,
        "make_expert_env",
        lambda env: gymnasium.wrappers.TimeLimit(make_expert_env(env), 60),
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, **settings)
    policy = read_policy(whole / "policies" / "walker_run_350.safetensors")
    assert not policy.stochastic and policy.noise == 0.1
    assert "TD3" in read_card(whole / "policies" / "walker_run_350.safetensors")["algorithm"]
    log = ExpertRun.log

    def interrupted(self, step, row):
        if step == 300:
            raise KeyboardInterrupt
        log(self, step, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ExpertRun, "log", interrupted)
        train(cut, **settings)
    assert load_checkpoint(cut / "checkpoints" / "last.pth")["step"] == 240
    np.random.seed(123)
    torch.manual_seed(123)
    train(cut, resume=True, **settings)
    assert run_files(cut) == run_files(whole)


@needs_sb3
def test_a_foreign_checkpoint_is_refused(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pth").write_bytes((finished / "checkpoints" / "last.pth").read_bytes())
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError):
        train(tmp_path, resume=True, hidden_dims=(9, 9))
    other = TrainExpertConfig(**TINY | {"run_dir": str(tmp_path / "new"), "hidden_dims": (9, 9)})
    with contextlib.closing(ExpertRun(other)) as run, pytest.raises(UserError, match="last.pth: not a checkpoint of"):
        run.load(tmp_path / "checkpoints" / "last.pth")


@needs_sb3
def test_evaluations_change_no_training_number(finished, tmp_path):
    other = train(tmp_path, snapshot_every=70, eval_episodes=1)
    assert (other / "policies" / "hopper_70.safetensors").exists()
    name = "policies/hopper_500.safetensors"
    assert (other / name).read_bytes() == (finished / name).read_bytes()
    stored = [load_checkpoint(run / "checkpoints" / "last.pth")["model"] for run in (other, finished)]
    assert torch.equal(stored[0]["buffer"]["observations"], stored[1]["buffer"]["observations"])
    assert torch.equal(stored[0]["torch"], stored[1]["torch"]) and stored[0]["actions"] == stored[1]["actions"]


# --- the model -------------------------------------------------------------------------------------------------------


@needs_sb3
@pytest.mark.parametrize(("env", "algorithm"), [("hopper", "sac"), ("ant-xy", "sac"), ("hopper", "td3")])
def test_a_policy_acts_as_the_model_does(env, algorithm):
    config = TrainExpertConfig(env=env, algorithm=algorithm, hidden_dims=(32, 16), max_timesteps=100)
    environment = SeededEpisodes(make_expert_env(env), 0)
    model = build_model(config, environment, 0)
    policy = extract_policy(model, config, 0)
    observations = np.random.default_rng(0).standard_normal((20, policy.observation_dim)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(policy.act(observations), expected, atol=1e-5)
    if algorithm == "sac":
        tensor = torch.from_numpy(observations)
        _, log_std, _ = model.actor.get_action_dist_params(tensor)
        noise = np.random.default_rng(1).standard_normal(expected.shape)
        before = np.arctanh(expected.astype(np.float64)) + log_std.detach().double().exp().numpy() * noise
        np.testing.assert_allclose(policy.act(observations, np.random.default_rng(1)), np.tanh(before), atol=1e-4)
    environment.close()


@needs_sb3
def test_sparing_critic_gradients_changes_no_number(monkeypatch):
    parameters = []
    for spare in (train_expert.spare_critic_gradients, lambda critic: None):
        monkeypatch.setattr(train_expert, "spare_critic_gradients", spare)
        config = TrainExpertConfig(**TINY)
        environment = SeededEpisodes(make_expert_env("hopper"), 0)
        model = build_model(config, environment, 0)
        model.learn(200)
        parameters.append(torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]))
        environment.close()
    assert torch.equal(*parameters)


@needs_sb3
def test_recipes_reach_the_model():
    for env, recipe in train_expert.RECIPES.items():
        if env == "humanoid-xy":  # 3 x 1024: seconds to build
            continue
        environment = SeededEpisodes(make_expert_env(env), 0)
        model = build_model(TrainExpertConfig(env=env), environment, 0)
        assert model.target_entropy == -recipe.entropy * environment.action_space.shape[0]
        assert model.actor.optimizer.param_groups[0]["lr"] == recipe.lr
        assert model.replay_buffer.buffer_size == recipe.steps
        assert model.observation_space.dtype == np.float32
        environment.close()


def test_every_environment_has_a_recipe():
    assert set(train_expert.RECIPES) == set(train_expert.ENVIRONMENTS)


def test_episodes_start_from_their_own_seeds():
    env = SeededEpisodes(make_expert_env("hopper"), 0)
    starts = [env.reset()[0] for _ in range(3)]
    assert starts[0].dtype == np.float32 and not np.array_equal(starts[0], starts[1])
    env.next_episode = 1
    np.testing.assert_array_equal(env.reset()[0], starts[1])
    done, total, steps = False, 0.0, 0
    while not done:
        _, reward, terminated, truncated, _ = env.step(np.zeros(3, np.float32))
        done, total, steps = terminated or truncated, total + reward, steps + 1
    assert env.finished == [(pytest.approx(total), steps)]
    env.close()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "cartpole"], "--env cartpole.*hopper"),
        (["--algorithm", "ppo"], "--algorithm.*sac"),
        (["--lr", "0"], "--lr 0"),
        (["--discount", "1.5"], "--discount 1.5"),
        (["--seed", "-1"], "--seed -1"),
        (["--hidden_dims", "0"], "--hidden_dims 0"),
        (["--env", "humanoid-xy", "--log_every", "6"], "--log_every 6.*multiple of 4"),
        (["--evaluate", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--stepps", "3"], "--stepps"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        train_expert.main(arguments)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(UserError, match="pip install -r requirements/experts.txt"):
        train_expert.main(["--env", "hopper"])
    assert not os.listdir(tmp_path)


@needs_sb3
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    class Poor(gymnasium.RewardWrapper):
        def reward(self, reward):
            return float("nan")

    monkeypatch.setattr(train_expert, "make_expert_env", lambda env: Poor(make_expert_env(env)))
    with pytest.raises(UserError, match="critic's loss is nan.*--lr"):
        train(tmp_path)

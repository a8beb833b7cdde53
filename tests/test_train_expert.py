"""Training experts: runs write policies and cards, go on after an interruption, and evaluations change nothing."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch

from benchmark_data import train_expert
from benchmark_data.experts import ENVIRONMENTS, evaluate_policy, read_card, read_policy
from benchmark_data.train_expert import ExpertRun, TrainExpertConfig, build_model, extract_policy
from runs.directory import load_checkpoint
from runs.metrics import read_metrics
from utils import RunFinished, UserError

needs_sb3 = pytest.mark.skipif(importlib.util.find_spec("stable_baselines3") is None, reason="needs stable-baselines3")
TINY = {
    "env": "hopper",
    "max_timesteps": 125,
    "start_steps": 30,
    "hidden_dim": 8,
    "batch_size": 16,
    "snapshot_every": 62,
    "log_every": 25,
    "eval_episodes": 2,
    "card_episodes": 3,
    "tensorboard": False,
}


def train(run_dir, **settings):
    train_expert.main([f"--{name}={value}" for name, value in (TINY | settings | {"run_dir": run_dir}).items()])
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that was never stopped."""
    return train(tmp_path_factory.mktemp("experts") / "run")


@needs_sb3
def test_a_run_writes_policies_cards_and_curves(finished, capsys):
    assert {path.name for path in (finished / "policies").iterdir()} == {
        f"hopper_{step}{suffix}" for step in (62, 124, 125) for suffix in (".safetensors", ".json")
    }
    last = finished / "policies" / "hopper_125.safetensors"
    policy, card = read_policy(last), read_card(last)
    assert (policy.env, policy.step, policy.activation) == ("hopper", 125, "relu")
    assert (card["seed"], card["recipe"]["hidden_dim"], card["recipe"]["lr"]) == (0, 8, 3e-4)
    assert card["algorithm"].startswith("SAC of stable-baselines3 ")
    episodes = {kind: result["episodes"] for kind, result in card["returns"].items()}
    assert episodes == {"deterministic": 3, "stochastic": 3}
    assert card["returns"]["deterministic"]["mean"] == round(evaluate_policy(policy, 3)["mean"], 4)
    metrics = read_metrics(finished)
    assert metrics["step"] == [25, 50, 62, 75, 100, 124, 125]
    assert np.isfinite(metrics["eval_return"]).tolist() == [False, False, True, False, False, True, True]
    assert np.isfinite(metrics["critic_loss"]).tolist() == [False, True, True, True, True, True, True]
    summary = json.loads((finished / "finished.json").read_text())
    best = metrics["step"][int(np.nanargmax(metrics["eval_return"]))]
    assert (summary["steps"], summary["best_step"]) == (125, best)
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunFinished):
        train(finished)


@needs_sb3
def test_an_interrupted_run_goes_on_and_says_that_it_is_not_bit_exact(tmp_path, monkeypatch, capsys):
    record = ExpertRun.record

    def interrupted(self):
        if self.step == 75:
            raise KeyboardInterrupt
        record(self)

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="--resume, without --overwrite, continues"),
    ):
        patch.setattr(ExpertRun, "record", interrupted)
        train(tmp_path)
    stored = load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert stored["step"] == 62 and len(stored["buffer"]["rewards"]) == 61  # the last is not stored yet
    with pytest.raises(UserError, match="--resume"):
        train(tmp_path)
    with pytest.raises(UserError, match="discount was 0.99 and is now 0.9"):
        train(tmp_path, resume=True, discount=0.9)
    with pytest.raises(UserError, match="--max_timesteps 10:"):
        train(tmp_path, resume=True, max_timesteps=10)
    capsys.readouterr()
    train(tmp_path, resume=True)
    assert "continuing from step 62; not bit-exact" in capsys.readouterr().err
    assert read_metrics(tmp_path)["step"] == [25, 50, 62, 75, 100, 124, 125]
    after = load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert after["step"] == 125 and len(after["buffer"]["rewards"]) == 124
    assert torch.equal(after["buffer"]["rewards"][:61], stored["buffer"]["rewards"])


@needs_sb3
def test_a_checkpoint_holds_the_whole_model(finished):
    """Loaded into a model of another seed: the same networks, optimizers, temperature and buffer."""
    stored = load_checkpoint(finished / "checkpoints" / "last.pth")
    config = TrainExpertConfig(**TINY)
    model = build_model(config, ENVIRONMENTS["hopper"](), 1)
    train_expert.load_model_state(model, stored)
    again = train_expert.model_state(model)
    flat = [torch.utils._pytree.tree_leaves(state) for state in (again, {name: stored[name] for name in again})]
    assert len(flat[0]) > 40
    for mine, theirs in zip(*flat, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    policy = extract_policy(model, config, 125)
    expected = read_policy(finished / "policies" / "hopper_125.safetensors")
    np.testing.assert_array_equal(policy.weights["mean.weight"], expected.weights["mean.weight"])


@needs_sb3
@pytest.mark.parametrize("env", ["hopper", "ant-xy"])
def test_a_policy_acts_as_the_model_does(env):
    config = TrainExpertConfig(env=env, hidden_dim=32, max_timesteps=100)
    environment = ENVIRONMENTS[env]()
    model = build_model(config, environment, 0)
    policy = extract_policy(model, config, 0)
    observations = np.random.default_rng(0).standard_normal((20, policy.sizes[0])).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(policy.act(observations), expected, atol=1e-5)
    _, log_std, _ = model.actor.get_action_dist_params(torch.from_numpy(observations))
    noise = np.random.default_rng(1).standard_normal(expected.shape)
    before = np.arctanh(expected.astype(np.float64)) + log_std.detach().double().exp().numpy() * noise
    np.testing.assert_allclose(policy.act(observations, np.random.default_rng(1)), np.tanh(before), atol=1e-4)
    environment.close()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(UserError, match="pip install -r requirements/experts.txt"):
        train_expert.main(["--env", "hopper"])
    with pytest.raises(UserError, match="--env cartpole.*hopper"):
        train_expert.main(["--env", "cartpole"])
    assert not os.listdir(tmp_path)

"""The POGO command: what it writes and prints, how it resumes, and what it says about bad input."""

import functools
import importlib.util
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import digest, error_line, short_chain_episodes

import make_dataset
import pogo_main
from pogo_main import POGORun, POGOTrainerConfig
from policy import Policy
from runs import chain
from runs import policy as chain_policy
from runs.cli import parse_config
from runs.directory import load_checkpoint, save_checkpoint
from runs.evaluation import episode_seeds, report_steps
from runs.metrics import read_episodes, read_metrics
from runs.run import data_values
from utils import UserError

DATASET = "local/hopper-medium-v2"
TINY = {
    **{"env": DATASET, "max_timesteps": 12, "eval_freq": 6, "log_freq": 3, "eval_episodes": 2, "final_runs": 2},
    **{"hidden_dim": 8, "batch_size": 8, "eval_workers": 0, "device": "cpu", "seed": 0},
}
STEPS = 12  # of an episode
WEIGHTS = ["--w2_weights", "0.4", "1"]


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    with short_chain_episodes(STEPS):
        yield


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset.generate(DATASET, size=400, dataset_dir=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def arguments(dataset_dir):
    def build(run_dir, *flags, **changed) -> list[str]:
        settings = TINY | {"dataset_dir": str(dataset_dir), "run_dir": str(run_dir)} | changed
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return [*words, *WEIGHTS, *flags]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    pogo_main.main(arguments(run_dir))
    return run_dir


def train(flags: list[str]) -> None:
    """A run without its picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(POGORun, "plot", lambda run: None)
        pogo_main.main([*flags, "--no_tensorboard"])


def train_until(stop_at: int, flags: list[str], method: str = "record") -> str:
    """Train, and interrupt the run where it would count its next update (or save) after so many; the words on that."""
    whole = getattr(POGORun, method)

    def interrupted(run, *arguments):
        if run.step == stop_at:
            raise KeyboardInterrupt
        return whole(run, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(POGORun, method, interrupted)
        train(flags)
    return str(caught.value)


OUTPUTS = ("checkpoints/last.pth", "training/metrics.csv", "training/evaluations.csv", "finished.json")


exits = functools.partial(error_line, pogo_main.main)


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_outputs(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {*OUTPUTS, "config.yaml", "versions.json", "training_curves.png"} <= names
    assert any("tfevents" in name for name in names) and not any(name.endswith(".tmp") for name in names)
    assert (finished / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "finished.json").read_text())
    assert summary["steps"] == 12 and summary["dataset"] == DATASET and summary["w2_weights"] == [0.4, 1.0]
    assert {f"actor_{i}/{mode}/score" for i in (0, 1) for mode in chain.MODES} <= set(summary)
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and {"python", "platform", "mujoco", "commit"} <= set(versions)
    metrics = read_metrics(finished / "training")
    for name in ("moved", "q_gain", "spread"):
        assert summary[f"actor_1/{name}"] == metrics[f"chain/actor_1/{name}"][-1]
    assert metrics["step"] == [3, 6, 9, 12]
    for column in ("critic_loss", "q_data", "actor_0/q_scale", "actor_1/distance", "chain/actor_1/floor"):
        assert np.isfinite(metrics[column]).all(), column
    assert np.isnan(metrics["eval/actor_1/stochastic/score"]).tolist() == [True, False, True, False]


def test_a_longer_chain_holds_the_shorter_one(finished, arguments, tmp_path):
    """What actor 0 does and scores, with noise too, is the same to the bit without the actor after it."""
    train(arguments(tmp_path / "one") + ["--w2_weights", "0.4"])
    alone, both = (read_episodes(run / "training" / "evaluations.csv") for run in (tmp_path / "one", finished))
    assert alone == [episode for episode in both if episode["actor"] == 0] and len(alone) > 4


@pytest.mark.parametrize(
    "gains, promised, words",
    [
        ([3.0, 5.0, 4.0], 1.5, "moved 0.1 (spread 0.05), Q promised +1.5, scored +4.00 ± 0.24 over actor 0: helped"),
        ([-3.0, -5.0, -4.0], 1.5, "scored -4.00 ± 0.24 over actor 0: hurt"),
        ([9.0, -9.0, 0.0], -0.2, "over actor 0: cannot help here, Q promises nothing for it"),
    ],
)
def test_a_step_is_told_by_what_it_moved_promised_and_scored(gains, promised, words, capsys):
    metrics = {
        f"chain/actor_1/{name}": value for name, value in (("moved", 0.1), ("q_gain", promised), ("spread", 0.05))
    }
    scores = np.array([[50.0] * 3, [0.0] * 3, np.add(50, gains), [0.0] * 3])
    report_steps(metrics, scores)
    assert ("over actor 0: too few episodes to tell" in capsys.readouterr().out) == (promised > 0)
    report_steps(metrics, scores[:, :1])
    assert "±" not in capsys.readouterr().out
    found = report_steps(metrics, np.tile(scores, 4))
    assert words in capsys.readouterr().out and found["actor_1/gain"] == pytest.approx(np.mean(gains))


def test_every_episode_is_kept_and_the_scores_are_theirs(finished):
    rows = read_episodes(finished / "training/evaluations.csv")
    assert len(rows) == 2 * 4 * 2 + 4 * 4
    assert max(row["length"] for row in rows) == STEPS  # the time limit is met
    final = [row for row in rows if row["evaluation"] == "final"]
    assert {row["step"] for row in final} == {12} and {row["episode"] for row in final} == {0, 1, 2, 3}
    summary = json.loads((finished / "finished.json").read_text())
    for actor in (0, 1):
        for mode in chain.MODES:
            own = [row for row in final if (row["actor"], row["mode"]) == (actor, mode)]
            assert all(row["score"] == pytest.approx(100 * (row["return"] + 20.272305) / 3254.572305) for row in own)
            assert summary[f"actor_{actor}/{mode}/score"] == pytest.approx(np.mean([row["score"] for row in own]))
    last = [row for row in rows if row["evaluation"] == "training" and row["step"] == 12]
    metrics = read_metrics(finished / "training")
    expected = np.mean([row["return"] for row in last if (row["actor"], row["mode"]) == (1, "deterministic")])
    assert metrics["eval/actor_1/deterministic/return"][-1] == pytest.approx(expected)


def test_evaluation_equals_stepping_one_environment_by_hand(arguments, tmp_path, dataset_dir):
    run = POGORun(parse_config(POGOTrainerConfig, [*arguments(tmp_path / "run"), "--no_tensorboard"]))
    seeds = episode_seeds(5, 2)
    played = run.rollout(seeds, 7, "evaluate")
    env = chain.make_env(DATASET)
    for actor in (0, 1):
        for episode, seed in enumerate(seeds):
            observation, total, over = env.reset(seed=seed)[0], 0.0, False
            while not over:
                state = torch.as_tensor((np.float32(observation) - run.mean) / run.std)
                z = torch.zeros(1, run.data.action_dim)
                action = run.acting()[actor](state.unsqueeze(0), z)[0].detach().numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                total, over = total + reward, terminated or truncated
            assert played.returns[2 * actor, episode] == pytest.approx(total, rel=1e-4)
    run.close()
    assert not np.allclose(played.returns[0], played.returns[1])  # noise does something


def test_an_actors_noise_depends_on_no_others_episodes():
    """However long these make a round, the next one begins with noise of its own."""

    def noise_after(steps: int) -> torch.Tensor:
        def evaluate(policies, count, seeds, desc, begin_round):
            for start, length in ((0, steps), (1, 1)):
                begin_round(start)
                acted = [policies(np.zeros((2, 1, 3), np.float32), None) for _ in range(length)]
            return acted[-1][1]

        evaluator, ones = SimpleNamespace(evaluate=evaluate), torch.ones(3)
        return chain.rollout(evaluator, [lambda s, z: z], 2, ones, ones, [0, 1], 7, "")

    assert torch.equal(noise_after(3), noise_after(5)) and noise_after(3).any()


def test_actors_can_be_updated_less_often(arguments, tmp_path):
    train(arguments(tmp_path / "run", "--no_save_model", policy_freq=2, log_freq=1))
    metrics = read_metrics(tmp_path / "run/training")
    assert not list(tmp_path.rglob("*.pth"))
    assert np.isfinite(metrics["critic_loss"]).all()
    assert np.isfinite(metrics["actor_1/loss"]).tolist() == [True, False] * 6


def test_directories_carry_env_weights_and_seed_and_may_keep_every_checkpoint(arguments, tmp_path):
    config = POGOTrainerConfig(env="halfcheetah-medium-v2", w2_weights=(0.2, 0.25, 10.0), seed=3)
    assert str(POGORun.run_name(config)) == "halfcheetah-medium-v2/w2_0.2_0.25_10/seed_3"
    assert str(POGORun.default_run_dir(config)) == f"logs/{POGORun.run_name(config)}"
    train(arguments(tmp_path / "run", "--keep_checkpoints", "--checkpoint_dir", str(tmp_path / "kept")))
    kept = tmp_path / "kept" / DATASET / "w2_0.4_1/seed_0"
    assert sorted(path.name for path in kept.iterdir()) == ["last.pth", "step_12.pth", "step_6.pth"]
    assert (
        digest(kept / "last.pth") == digest(kept / "step_12.pth") and load_checkpoint(kept / "step_6.pth")["step"] == 6
    )
    assert Policy(tmp_path / "run").act(np.zeros(11, np.float32)).shape == (3,)


def test_ctrl_c_says_how_to_go_on_and_the_last_line_what_was_done_since(arguments, tmp_path, capsys):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pogo_main, "generate_if_missing", lambda *_: signal.raise_signal(signal.SIGINT))
        exits(capsys, *arguments(run_dir), code=130, starts="interrupted: nothing was saved")
    assert not train_until(6, arguments(run_dir), method="save")
    assert "Update 6" not in capsys.readouterr().out  # what is told of is saved
    assert "the same command with --resume" in train_until(8, arguments(run_dir))
    train(arguments(run_dir, "--resume"))
    assert "the last 6 of 12 updates in " in capsys.readouterr().out


# -- the same bits ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, arguments, tmp_path, capsys):
    train(arguments(tmp_path / "again"))
    out = capsys.readouterr()
    block = (out.out + out.err).split("Update 6.\nEvaluation over 2 episodes:\n")[1].splitlines()[:4]
    for line, (actor, mode) in zip(block, [(i, mode) for i in (0, 1) for mode in chain.MODES], strict=True):
        assert line.startswith(f"  Actor {actor} - {mode.capitalize()}: ") and ", D4RL score: " in line
    for name in OUTPUTS:
        assert digest(finished / name) == digest(tmp_path / "again" / name), name
    train(arguments(tmp_path / "other", seed=1))
    assert digest(finished / OUTPUTS[1]) != digest(tmp_path / "other" / OUTPUTS[1])


def test_a_score_has_d4rls_name_where_it_is_d4rls():
    assert chain.describe_score("local/hopper-medium-v2", 1, "stochastic", 5, 0.5).endswith(" 5.000, D4RL score: 0.500")
    single = chain.describe_score("antmaze-medium-navigate-singletask-v0", 0, "deterministic", -9, 100)
    assert single == "  Actor 0 - Deterministic: -9.000, score: 100.000"


def test_how_often_a_run_evaluates_or_logs_changes_no_number(finished, arguments, tmp_path):
    train(arguments(tmp_path / "run", eval_freq=4, log_freq=12))
    states = [load_checkpoint(folder / "checkpoints/last.pth") for folder in (finished, tmp_path / "run")]
    for name, value in states[0]["agent"]["actors"].items():
        assert torch.equal(value, states[1]["agent"]["actors"][name]), name


@pytest.mark.parametrize("stop_at, rows, saved", [(6, False, 6), (10, False, 6), (5, True, 3), (10, True, 9)])
def test_a_resumed_run_equals_the_uninterrupted_one(stop_at, rows, saved, finished, arguments, tmp_path, monkeypatch):
    """Cut right after a checkpoint, and between two; with one an evaluation, or a row of metrics."""
    if rows:
        monkeypatch.setattr(POGORun, "is_save_due", lambda run: True)
    cut = tmp_path / "cut"
    train_until(stop_at, arguments(cut))
    assert load_checkpoint(cut / "checkpoints/last.pth")["step"] == saved
    train(arguments(cut, "--resume"))
    for name in OUTPUTS:
        assert digest(finished / name) == digest(cut / name), name


def test_a_row_of_metrics_is_saved_a_minute_after_the_last_save(arguments, tmp_path, monkeypatch):
    clock, saved, update, write = [0.0], [], POGORun.update, POGORun.write_checkpoint
    monkeypatch.setattr("runs.run.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(POGORun, "update", lambda run: clock.append(clock.pop() + 25) or update(run))
    monkeypatch.setattr(POGORun, "write_checkpoint", lambda run, state: saved.append(run.step) or write(run, state))
    train(arguments(tmp_path / "run", "--keep_checkpoints", log_freq=1))
    assert saved == [3, 6, 9, 12]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pth")}
    assert kept == {"last.pth", "step_6.pth", "step_12.pth"}  # of evaluations


def test_a_full_disk_keeps_the_last_good_checkpoint(arguments, tmp_path):
    """A process whose files may hold half a checkpoint stands for the full disk."""
    run_dir, flags = tmp_path / "run", arguments(tmp_path / "run", "--no_tensorboard")
    train_until(8, flags)
    checkpoint = run_dir / "checkpoints/last.pth"
    before, limit = digest(checkpoint), checkpoint.stat().st_size // 2
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    command = [sys.executable, pogo_main.__file__, *flags, "--resume"]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error") == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {checkpoint}: the disk is full" in done.stderr
    assert digest(checkpoint) == before and list(checkpoint.parent.iterdir()) == [checkpoint]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_settings_name_the_flag(arguments, tmp_path, capsys):
    for weights in (["-1"], ["inf"], ["nan", "1"], ["0.4,-1"], ["0.4,x"]):
        assert "--w2_weights" in exits(capsys, *arguments(tmp_path / "run"), "--w2_weights", *weights)
    line = exits(capsys, *arguments(tmp_path / "run", w2_noise="debiased"), "--sinkhorn_K", 1)
    assert "--sinkhorn_K 1: one sample" in line
    line = exits(capsys, *arguments(tmp_path / "run"), "--sinkhorn_K", 11)
    assert "--sinkhorn_K 11: --sinkhorn_backend exact takes at most 10" in line
    if importlib.util.find_spec("pykeops") is None:
        assert "needs pykeops" in exits(capsys, *arguments(tmp_path / "run"), "--sinkhorn_backend", "online")
    assert "did you mean 'hopper-medium-v2'" in exits(capsys, *arguments(tmp_path / "run"), "--env", "hoper-medium-v2")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_not_taken(arguments, tmp_path, capsys):
    """Two runs that share a folder of checkpoints but not their settings."""
    shared = ["--checkpoint_dir", str(tmp_path / "kept"), "--no_tensorboard"]
    pogo_main.main([*arguments(tmp_path / "first", discount=0.5), *shared])
    line = exits(capsys, *arguments(tmp_path / "second", "--resume", discount=0.9), *shared)
    assert "another run" in line and not (tmp_path / "second").exists()
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "second/finished.json").unlink()
    config = tmp_path / "second/config.yaml"
    config.write_text(config.read_text().replace("discount: 0.5", "discount: 0.9"))
    assert "another run (discount 0.5, here 0.9)" in exits(capsys, "--run_dir", str(tmp_path / "second"), "--resume")
    config.write_text(config.read_text() + "retired: 1\n")
    line = exits(capsys, "--run_dir", str(tmp_path / "second"), "--resume")
    assert "retired" in line and "another command or version: choose another --run_dir, or --overwrite" in line
    assert "--no_save_model" in exits(capsys, *arguments(tmp_path / "third", "--resume", "--no_save_model"))


def test_a_run_is_resumed_from_another_folder(arguments, tmp_path, monkeypatch):
    """Its folder of checkpoints was given relative to the one it began in."""
    monkeypatch.chdir(tmp_path)
    train_until(8, arguments(tmp_path / "run", "--checkpoint_dir", "kept"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(["--resume", "--run_dir", str(tmp_path / "run")])
    assert read_metrics(tmp_path / "run/training")["step"] == [3, 6, 9, 12]
    assert (tmp_path / "run/finished.json").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_a_file_is_evaluated_as_its_run_evaluated_it(finished, arguments, tmp_path, capsys):
    shutil.copy(finished / "checkpoints/last.pth", tmp_path / "policy.pth")
    flags = ["--evaluate", str(tmp_path / "policy.pth")]  # as many episodes as the run played
    figures = pogo_main.main([*flags, "--eval_workers", "0"])
    expected = json.loads((finished / "finished.json").read_text())
    assert len(figures) == 4 and all(expected[name] == pytest.approx(value) for name, value in figures.items())
    assert "--evaluate_episodes 0" in exits(capsys, *flags, "--evaluate_episodes", 0)
    few = pogo_main.main([*flags, "--eval_workers", "0", "--evaluate_episodes", "3"])
    assert "3 episodes:" in capsys.readouterr().out
    assert few.keys() == figures.keys() and few != figures
    (tmp_path / "policy.pth").write_bytes(b"nothing")
    assert "policy.pth" in exits(capsys, *flags)
    save_checkpoint(tmp_path / "policy.pth", {"a": 1})
    assert "not a checkpoint of pogo_main.py" in exits(capsys, *flags)


def test_a_policy_acts_from_its_file_alone_as_in_training(finished, arguments, monkeypatch):
    run = POGORun(parse_config(POGOTrainerConfig, arguments(finished.parent / "like", "--no_tensorboard")))
    run.load(finished / "checkpoints/last.pth")
    rows, raw = torch.from_numpy(run.data.observations[:5]), run.data.observations[:5] * run.std + run.mean
    for number in range(2):
        expected = run.acting()[number](rows, torch.zeros(5, run.data.action_dim)).detach().numpy()
        policy = Policy(finished / "checkpoints/last.pth", actor=number)
        np.testing.assert_allclose(policy.act(raw), expected, atol=1e-4)
    run.close()
    monkeypatch.setattr(chain_policy, "load_checkpoint", None)  # the file is read once
    policy = Policy(finished)  # a run's directory will do
    np.testing.assert_array_equal(policy.act(raw), Policy(finished, actor=1).act(raw))
    np.testing.assert_allclose(policy.act(raw[0]), policy.act(raw)[0], atol=1e-5)  # one observation, or many
    assert not np.array_equal(policy.act(raw, deterministic=False), policy.act(raw)) and policy.trained.env == DATASET
    with pytest.raises(ValueError, match="actor 2: the chain has actors 0 to 1"):
        Policy(finished, actor=2)
    for words, given in (("no goal", (raw, raw)), (r"shape \(5, 10\), not \[..., 11\]", (raw[:, 1:],))):
        with pytest.raises(ValueError, match=words):
            policy.act(*given)
    with pytest.raises(UserError, match="OPSO alone has a code"):
        policy.encode(raw)


def test_a_checkpoint_of_other_data_is_refused(arguments, tmp_path, capsys):
    """Without normalisation too, where mean and std are 0 and 1 whatever the data."""
    train_until(10, arguments(tmp_path / "run", "--no_normalize"))
    make_dataset.generate(DATASET, size=300, dataset_dir=tmp_path / "other", progress=False)
    flags = arguments(tmp_path / "run", "--no_normalize", "--resume", dataset_dir=str(tmp_path / "other"))
    assert "began on other data" in exits(capsys, *flags)


@pytest.mark.gpu
def test_a_run_on_a_gpu_trains_resumes_and_evaluates(arguments, tmp_path):
    """Its update is captured, batches drawn inside the graph; from the middle on it goes on to about the same."""
    train(arguments(tmp_path / "whole", device="cuda"))
    train(arguments(tmp_path / "eager", "--no_cuda_graph", device="cuda"))
    train_until(10, arguments(tmp_path / "cut", device="cuda"))
    train(arguments(tmp_path / "cut", "--resume", device="cuda"))
    whole = load_checkpoint(tmp_path / "whole/checkpoints/last.pth")["agent"]["actors"]
    for other in ("eager", "cut"):
        found = load_checkpoint(tmp_path / other / "checkpoints/last.pth")["agent"]["actors"]
        assert all(torch.allclose(whole[name], found[name], rtol=1e-3, atol=1e-4) for name in whole), other


def test_a_wide_blur_and_a_q_above_every_return_are_told_once(arguments, tmp_path, monkeypatch, capsys):
    """The exact solver has no blur."""
    train(arguments(tmp_path / "wide", sinkhorn_blur=5.0, sinkhorn_backend="fused", sinkhorn_K=4))
    told = capsys.readouterr()
    assert told.err.count("warning: the blur is") == 1
    assert "actor 0 is not to be trusted" not in told.err and "; discounted returns " in told.out
    monkeypatch.setattr(pogo_main, "data_values", lambda *_: (-9.0, -9.0))
    train(arguments(tmp_path / "small", "--q_start", "zero", sinkhorn_blur=5.0))
    told = capsys.readouterr()
    assert "returns -9, at most -9; w_i by the rule of docs/pogo.md 0.53" in told.out and "the blur" not in told.err
    assert told.err.count("no return of the data is above -9: actor 0 is not to be trusted") == 1
    assert "update 3" in told.err


def test_the_datas_values_equal_sums_over_its_episodes():
    rewards, zeros = np.array([1.0, 2.0, 3.0, 4.0, 6.0]), np.zeros(5, bool)
    terminated, truncated = zeros.copy(), zeros.copy()
    terminated[1], truncated[3] = True, True
    # The second episode goes on with 3.5 for ever, which is worth 7, the cut third one with 6.
    values = [1 + 0.5 * 2, 2, 3 + 0.5 * (4 + 0.5 * 7), 4 + 0.5 * 7, 6 + 0.5 * 12]
    # The last one is shorter than 1 / (1 - 0.5) rows, so that it is not the largest unless that is its end.
    assert data_values(rewards, terminated, truncated, 0.5) == (np.mean(values), 4 + 0.5 * 7)
    terminated[4] = True
    assert data_values(rewards, terminated, truncated, 0.5) == ((sum(values) - 6) / 5, 4 + 0.5 * 7)
    assert data_values(rewards[3:], zeros[3:], zeros[3:], 0.5) == (10.25, 11)
    assert data_values(rewards[:1], zeros[:1], zeros[:1], 0.5) == (2, 2)


def test_a_diverging_run_stops_and_says_why(arguments, tmp_path, capsys):
    line = exits(capsys, *arguments(tmp_path / "run"), "--q_limit", "1e-6", "--no_tensorboard")
    assert "--q_limit" in line and "update 3" in line and "--w2_weights" in line
    assert not (tmp_path / "run/finished.json").exists()
    line = exits(capsys, *arguments(tmp_path / "nan"), "--lr", "1e9", "--no_tensorboard", "--q_limit", "1e9")
    assert "is nan at update" in line and "lower the learning rates" in line


def test_what_cannot_be_resumed_is_refused(finished, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "finished.json").unlink()
    assert "--resume" in exits(capsys, *arguments(run))
    line = exits(capsys, *arguments(run, "--resume", max_timesteps=20))
    assert "max_timesteps was 12 and is now 20; a run cannot be made longer or shorter" in line
    assert "or replace the run with --overwrite" in line
    path = run / "checkpoints/last.pth"
    state = load_checkpoint(path)
    save_checkpoint(path, {key: value for key, value in state.items() if key != "agent"})
    assert "not a checkpoint" in exits(capsys, *arguments(run, "--resume"))
    line = exits(capsys, "--resume", "--run_dir", tmp_path / "rum")  # and no other word of what is to be trained
    assert "rum: there is no such run" in line and not (tmp_path / "rum").exists()

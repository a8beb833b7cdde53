"""The offline command: what it writes, how it resumes, and what it says about bad input."""

import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from running import digest, error_line

import make_dataset
import offline_trainer
from ogbench_utils import make_env, parse_dataset_id
from opso.diagnostics import HeldOut, mean_cosine, path_directions, value_map
from opso.maze import Maze, distances, evaluation_tasks
from runs.directory import load_checkpoint
from runs.metrics import read_metrics

DATASET = "local/pointmaze-medium-stitch-v0"
TINY_SETTINGS = {
    **{"context_length": 16, "d_model": 16, "hidden_dim": 16, "d_state": 8, "batch_size": 4, "bank_size": 100},
    **{"updates_per_epoch": 3, "num_epochs": 2, "eval_freq": 1, "eval_batches": 1, "eval_states": 32, "eval_goals": 16},
}
TINY = [word for key, value in TINY_SETTINGS.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset.generate(DATASET, size=8, seed=0, dataset_dir=folder, progress=False)
    return folder


def arguments(dataset_dir, run_dir, *more) -> list[str]:
    return ["--dataset", DATASET, "--dataset_dir", str(dataset_dir), "--run_dir", str(run_dir), *TINY, *more]


@pytest.fixture(scope="module")
def finished(dataset_dir, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    offline_trainer.main(arguments(dataset_dir, run_dir))
    return run_dir


def test_a_run_writes_all_its_outputs(finished, dataset_dir):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "versions.json", "metrics.csv", "best_model.pth", "checkpoints/last.pth", "training_curves.png",
        "value_map.png", "finished.json",
    } <= names  # fmt: skip
    assert any("tfevents" in name for name in names)
    assert not any(name.endswith(".tmp") or "part" in name for name in names)
    for picture in ("training_curves.png", "value_map.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    metrics, state = read_metrics(finished), load_checkpoint(finished / "best_model.pth")
    assert metrics["step"] == [3, 6]
    for name in ("critic", "v", "state", "reward", "infonce", "alignment"):
        for column in (f"{name}_loss", f"val_{name}_loss"):
            assert np.isfinite(metrics[column]).all(), column
    for figure in ("value_distance_spearman", "proposer_cosine"):
        assert -1 <= metrics[figure][-1] <= 1, figure
    assert metrics["code_rank"][-1] > 1 and metrics["code_std"][-1] > 0
    data = parse_dataset_id(DATASET).load("train", dataset_dir)
    assert state["dataset"] == DATASET and state["observation_dim"] == 2
    assert torch.allclose(state["model"]["encoder.mean"], data.observations.mean(0), atol=1e-4)
    assert state["val_loss"] == min(metrics["val_loss"])


def test_the_same_seed_gives_the_same_bits_however_often_it_evaluates_and_another_does_not(
    finished, dataset_dir, tmp_path
):
    first = load_checkpoint(finished / "checkpoints/last.pth")["agent"]["model"]
    for flags, same in ((["--eval_freq", "2", "--eval_states", "8"], True), (["--seed", "1"], False)):
        run = tmp_path / str(same)
        offline_trainer.main(arguments(dataset_dir, run, "--no_plot_maps", *flags))
        model = load_checkpoint(run / "checkpoints/last.pth")["agent"]["model"]
        learnt = [name for name in first if name not in ("encoder.mean", "encoder.std")]
        assert all(torch.equal(first[name], model[name]) is same for name in learnt if first[name].unique().numel() > 1)


def test_kill_and_resume_equals_uninterrupted(dataset_dir, tmp_path):
    """In a process of its own, with dropout, so that the global generator matters; rows stand past the checkpoint."""
    flags = ["--num_epochs", "36", "--eval_freq", "3", "--dropout", "0.1", "--no_plot_maps", "--no_tensorboard"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    offline_trainer.main(arguments(dataset_dir, whole, *flags))
    command = [sys.executable, offline_trainer.__file__, *arguments(dataset_dir, cut, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while rows_of(cut) < 7:  # beyond the second checkpoint
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no second checkpoint"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert load_checkpoint(cut / "checkpoints/last.pth")["epoch"] < 36, "killed too late"
    offline_trainer.main(arguments(dataset_dir, cut, *flags, "--resume"))
    for name in ("checkpoints/last.pth", "best_model.pth", "metrics.csv"):
        assert digest(whole / name) == digest(cut / name), name


def rows_of(run_dir: Path) -> int:
    """Rows in a run's metrics.csv so far."""
    path = run_dir / "metrics.csv"
    return max(path.read_text().count("\n") - 1, 0) if path.exists() else 0


def test_a_run_cut_after_its_last_checkpoint_still_finishes(finished, dataset_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("finished.json", "value_map.png"):
        (run / name).unlink()
    offline_trainer.main(arguments(dataset_dir, run, "--resume"))
    assert (run / "finished.json").read_text() == (finished / "finished.json").read_text()
    assert (run / "value_map.png").exists()


exits = functools.partial(error_line, offline_trainer.main)


def test_the_discount_reaches_through_the_maze():
    for maze, expected in (("antmaze-large", 0.99), ("antmaze-giant", 0.995), ("humanoidmaze-medium", 0.995)):
        own = offline_trainer.OfflineTrainerConfig(dataset=f"{maze}-navigate-v0")
        assert offline_trainer.resolve(own).discount == expected
        own.discount = 0.9
        assert offline_trainer.resolve(own).discount == 0.9


def test_bad_settings_name_the_flag(dataset_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert "--d_model 15" in exits(capsys, *arguments(dataset_dir, run, "--d_model", "15"))
    assert "--backend fast" in exits(capsys, *arguments(dataset_dir, run, "--backend", "fast"))
    assert "backend 'torch'" in exits(capsys, *arguments(dataset_dir, run, "--backend", "cuda"))
    assert "sum to 1" in exits(capsys, *arguments(dataset_dir, run, "--p_random", "0.9"))
    assert not run.exists()


def test_bad_datasets_are_named(tmp_path, capsys):
    run = ("--run_dir", str(tmp_path / "run"), *TINY)
    assert "antmaze-medium-navigate-v0" in exits(capsys, "--dataset", "antmaze-medium-navigat-v0", *run)
    assert "did you mean" in exits(capsys, "--dataset", "local/antmaze-giant-navigate-v0", *run)
    official = DATASET.removeprefix("local/")
    for name in (official, f"{official}-val"):
        np.savez(tmp_path / f"{name}.npz", states=np.zeros((3, 2)))
    line = exits(capsys, "--dataset", official, "--dataset_dir", str(tmp_path), *run)
    assert str(tmp_path / f"{official}.npz") in line
    assert not (tmp_path / "run").exists()


def test_held_out_distances_are_the_mazes(dataset_dir):
    config = offline_trainer.parse_config(offline_trainer.OfflineTrainerConfig, ["--dataset", DATASET, *TINY])
    maze = Maze.from_env(make_env(DATASET))
    val = parse_dataset_id(DATASET).load("val", dataset_dir)
    held_out = HeldOut(val, maze, config.context_length, config.eval_states, config.eval_goals, seed=3)
    assert held_out.distance.shape == (16, 32)
    straight = np.linalg.norm(held_out.goals.numpy()[:, None, :2] - held_out.states.numpy()[None, :, :2], axis=-1)
    assert (held_out.distance >= straight - 1e-6).all()
    for i, n in enumerate(held_out.lengths.tolist()):
        assert torch.equal(held_out.states[i], held_out.observations[i, n - 1])

    class Oracle:
        """Knows the distances, and orders them upside down on request."""

        sign = 1

        def encode_windows(self, observations, lengths):
            last = [observations[i, n - 1] for i, n in enumerate(lengths.tolist())]
            return torch.stack(last)  # the "code" is the state itself, so V sees what it is handed

        def encode_states(self, observations):
            return observations

        def propose(self, z, goal):
            return (
                z + self.sign * 0.1 * torch.from_numpy(path_directions(maze, goal[None].numpy(), z.numpy())[0]).float()
            )

        def value(self, z, goals):
            distance = distances(maze, goals[:, 0, :2].numpy(), z[0, :, :2].numpy())
            return torch.from_numpy(self.sign * -distance)

    oracle = Oracle()
    found = held_out.evaluate(oracle)
    assert found["value_distance_spearman"] == pytest.approx(1) and found["proposer_cosine"] > 0.6
    oracle.sign = -1
    found = held_out.evaluate(oracle)
    assert found["value_distance_spearman"] == pytest.approx(-1) and found["proposer_cosine"] < -0.2
    oracle.sign = 0
    assert held_out.evaluate(oracle)["value_distance_spearman"] == 0


def test_the_way_is_the_shortest_paths_direction_and_the_cosine_a_mean_over_it():
    """Round the wall of the medium maze's first corner, and straight where nothing is between."""
    maze = Maze.from_env(make_env(DATASET))
    goal, straight, round_it = np.array([[0.0, 0.0]]), np.array([5.0, 1.0]), np.array([8.0, 8.0])
    assert maze.is_free(np.stack([goal[0], straight, round_it])).all()
    found = path_directions(maze, goal, np.stack([straight, round_it, [0.5, 0.5]]))
    ahead = distances(maze, goal, np.stack([straight, round_it]) + 0.5 * found[0, :2])
    assert distances(maze, goal, np.stack([straight, round_it])) - ahead == pytest.approx(0.5, abs=0.03)
    assert np.linalg.norm(found[0, :2], axis=1) == pytest.approx(1) and (found[0, 2] == 0).all()
    across = np.stack([-found[0, :, 1], found[0, :, 0]], axis=1)
    assert mean_cosine(3 * found, found) == pytest.approx(1) and mean_cosine(across[None], found) == pytest.approx(0)
    half = np.where(np.arange(3)[:, None] == 0, -found[0], 0 * found[0])  # one leads away, one nowhere
    assert mean_cosine(half[None], found) == pytest.approx(-0.5) and mean_cosine(found, 0 * found) == 0


def test_the_maps_arrows_follow_the_proposals(dataset_dir):
    """A proposer that steps to the right: its arrow leads to the states on the right, V's to those nearer the goal."""
    maze = Maze.from_env(make_env(DATASET))
    states = torch.cartesian_prod(torch.arange(0, 10, 0.5), torch.arange(0, 10, 0.5))
    task = evaluation_tasks(make_env(DATASET))[0]

    class Rightwards:
        def encode_states(self, observations):
            return observations

        def value(self, z, goal):
            return -(z - goal).norm(dim=-1)

        def propose(self, z, goal):
            return z + torch.tensor([0.1, 0.0])

    found = value_map(Rightwards(), states, task, reach=1.6)
    assert maze.is_free(found["goal_xy"]) and found["value"].shape == (400,) and found["name"] == "task 1"
    inner = (states[:, 0] < 7).numpy() & (states[:, 1] > 1).numpy() & (states[:, 1] < 8).numpy()
    assert np.abs(found["proposals"][inner] - [2, 0]).max() < 1
    way = found["goal_xy"] - states.numpy()
    far = inner & (np.linalg.norm(way, axis=1) > 4)
    up, way = found["uphill"][far], way[far]
    assert ((up * way).sum(1) / np.linalg.norm(up, axis=1) / np.linalg.norm(way, axis=1)).mean() > 0.85

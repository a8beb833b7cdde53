"""utils.py: command line, random streams, files that survive a kill or a full disk, replay, metrics, runs."""

import errno
import os
import sys
import types
import typing
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
import yaml

import utils
from algorithms.offline.pogo_multi_main import ALGORITHMS
from offline_trainer import OfflineTrainerConfig
from online_trainer import OnlineTrainerConfig
from pogo_main import POGOTrainerConfig
from runs import cli, plots
from runs.cli import parse_config, run_cli
from runs.directory import load_checkpoint, mark_finished, prepare_run, save_checkpoint
from runs.metrics import MetricLogger, RunningMeans, read_metrics
from utils import RandomStreams, ReplayBuffer, RunFinished, UserError
from walker.train_morel import MORELConfig


@dataclass
class SmallConfig:
    lr: float = 3e-4  # Step size of Adam.
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    normalize: bool = True
    dataset: str = "maze"
    # How W2 is computed.
    mode: Literal["sinkhorn", "gaussian"] = "sinkhorn"
    limit: int | None = None
    fast: bool = False
    w2_weights: tuple[float, ...] = (0.1, 0.2)


@dataclass
class RunConfig(SmallConfig):
    run_dir: str | None = None


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (["--lr", "-1e-3", "--seed=7"], {"lr": -1e-3, "seed": 7}),
        (["--resume", "--no_normalize"], {"resume": True, "normalize": False}),
        (["--resume", "True", "--normalize", "false"], {"resume": True, "normalize": False}),
        (["--limit", "3"], {"limit": 3}),
        (["--limit", "3", "--limit", "None"], {"limit": None}),
        (["--resume", "--no_resume", "--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--w2_weights", "0.2", "0.2", "0.2"], {"w2_weights": (0.2, 0.2, 0.2)}),
        (["--w2_weights", "[0.2, 0.2, 0.2]"], {"w2_weights": (0.2, 0.2, 0.2)}),
        (["--w2_weights", "0.2,0.2,3e-4"], {"w2_weights": (0.2, 0.2, 3e-4)}),
        (["--w2_weights", "[1,", "-2e-1]"], {"w2_weights": (1.0, -0.2)}),
        (["--w2_weights", "-1", "-2", "--limit", "none"], {"w2_weights": (-1.0, -2.0)}),
        (["--dataset=--odd name", "--limit", "3"], {"dataset": "--odd name", "limit": 3}),
    ],
)
def test_command_line_overrides_defaults(argv, changes):
    assert parse_config(SmallConfig, argv) == replace(SmallConfig(), **changes)


def test_yaml_lies_between_defaults_and_flags(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-2\nseed: 4\nw2_weights: [1, 2e-1]\nresume: true\nlimit: null\ndataset: ''\n")
    config = parse_config(SmallConfig, ["--seed", "5", "--config", str(path)])
    assert config == SmallConfig(lr=0.01, seed=5, resume=True, dataset="", w2_weights=(1.0, 0.2))
    assert isinstance(config.w2_weights[0], float)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--zzz", "3"], ["unknown flag --zzz; see --help"]),
        (["--sed", "1", "--lrr=2"], ["unknown flag --sed; did you mean --seed?; unknown flag --lrr"]),
        (["--no_fst"], ["did you mean --no_fast?"]),
        (["--seed", "1.5"], ["--seed", "an integer"]),
        (["--seed"], ["--seed", "value"]),
        (["--mode", "exact"], ["--mode", "sinkhorn, gaussian"]),
        (["--w2_weights", "[0.1, x]"], ["--w2_weights", "a number"]),
        (["--resume", "yes"], ["--resume takes true, false or no value"]),
        (["--no_resume=false"], ["--resume takes true, false or no value"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_flag_is_one_line_that_names_it(argv, words):
    with pytest.raises(UserError) as caught:
        parse_config(SmallConfig, argv)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed: 1", ["'sed'", "'seed'"]),
        ("seed: true", ["seed", "an integer"]),
        ("dataset: 3", ["dataset", "text"]),
        ("w2_weights: 0.1", ["w2_weights", "a list"]),
        ("seed: 1\nlr: [1, 2", ["YAML", "line 2"]),
        ("- seed", ["key: value"]),
        ("seed: !!python/object/apply:os.getpid []", ["YAML"]),
    ],
)
def test_bad_yaml_is_one_line_that_names_file_and_key(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_config(SmallConfig, ["--config", str(path)])
    assert "\n" not in str(caught.value) and "byte string" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["bad.yaml", *words]), str(caught.value)


def test_resuming_a_named_run_takes_its_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 4\nlr: 0.5\n")
    run_dir = ["--run_dir", str(tmp_path)]
    stored = replace(RunConfig(), seed=4, lr=0.5, resume=True, run_dir=str(tmp_path))
    assert parse_config(RunConfig, ["--resume", *run_dir]) == stored
    assert parse_config(RunConfig, ["--resume", "--seed", "5", *run_dir]) == replace(stored, seed=5)
    assert parse_config(RunConfig, run_dir) == RunConfig(run_dir=str(tmp_path))  # a new run takes none
    elsewhere = ["--resume", "--run_dir", str(tmp_path / "none")]
    assert parse_config(RunConfig, [*elsewhere, "--seed", "0"]) == RunConfig(resume=True, run_dir=elsewhere[-1])
    with pytest.raises(UserError, match="none: there is no such run"):  # nothing says what it would be
        parse_config(RunConfig, elsewhere)


def test_help_shows_comments_and_exits_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(SmallConfig, ["--seed", "1", "--help"], "What it does.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("What it does.", "--w2_weights", "Step size of Adam.", "How W2 is computed.", "--no_resume"):
        assert words in shown


def raising(error):
    def main(argv):
        assert argv is None
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data.npz: empty\n  download it again"), 2, "error: data.npz: empty download it again\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left", "logs/a/last.pth"), 2, "logs/a/last.pth: the disk is full"),
    ],
)
def test_run_cli_prints_one_line(capsys, error, code, words):
    with pytest.raises(SystemExit) as caught:
        run_cli(raising(error))
    shown = capsys.readouterr()
    assert caught.value.code == code
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_run_cli_reports_a_finished_run_and_keeps_tracebacks_of_defects(capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(raising(RunFinished("logs/a: finished")))
    assert caught.value.code == 0 and capsys.readouterr().out == "logs/a: finished\n"
    with pytest.raises(FileNotFoundError):
        run_cli(raising(FileNotFoundError(errno.ENOENT, "none")))
    run_cli(lambda argv: None)


# --- device and randomness -------------------------------------------------------------------------------------------


def test_resolve_device(monkeypatch):
    assert utils.resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert utils.resolve_device("auto").type == "cpu"
    for name in ("cuda", "cuda:1", "tpu", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            utils.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.resolve_device("auto").type == "cuda"


def test_streams_differ_from_each_other_and_repeat_with_the_seed():
    first, again, other = RandomStreams(3), RandomStreams(3), RandomStreams(4)
    draw = {name: torch.rand(4, generator=getattr(first, name)) for name in ("sampling", "policy")}
    assert torch.equal(draw["sampling"], torch.rand(4, generator=again.sampling))
    assert not torch.equal(draw["sampling"], draw["policy"])
    assert not torch.equal(draw["sampling"], torch.rand(4, generator=other.sampling))
    seeds = {first.init_seed, first.evaluation_seed, other.init_seed, other.evaluation_seed}
    assert len(seeds) == 4 and 0 <= first.evaluation_seed < 2**31
    with pytest.raises(UserError, match="resume on the same --device"):
        first.load_state_dict(other.state_dict() | {"sampling": torch.zeros(16, dtype=torch.uint8)})  # a GPU's


def test_initialising_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    weights = []
    for _ in range(2):
        with RandomStreams(0).initialising():
            weights.append(torch.nn.Linear(3, 3).weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*weights)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_unreadable_values_are_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match=r"not array\(\[0., 0.\]\)"):
        save_checkpoint(tmp_path / "a.pth", {"a": [np.zeros(2)]})
    assert not list(tmp_path.iterdir())


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["cut", "hostile"])
def test_damaged_checkpoint_is_one_line_with_the_remedy(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Exploit() if kind == "hostile" else torch.arange(1000.0)}, "last.pth")
    if kind == "cut":
        os.truncate("last.pth", 2000)
    with pytest.raises(UserError, match=r"last\.pth.*give another, or move it away"):
        load_checkpoint(tmp_path / "last.pth")
    assert os.listdir(tmp_path) == ["last.pth"]


# --- replay ----------------------------------------------------------------------------------------------------------


def test_batches_are_rows_that_follow_the_generator():
    number = np.arange(10, dtype=np.float32)
    rows = (
        number[:, None] + [0, 0.5],
        number[:, None],
        number,
        number[:, None] + [1, 1.5],
        number % 2,
        number % 3 == 0,
    )
    buffer = ReplayBuffer(*rows)
    batch, same = (buffer.sample(500, torch.Generator().manual_seed(0)) for _ in range(2))
    assert len(buffer) == 10 and set(batch["rewards"].tolist()) == set(range(10))
    for name, values in zip(ReplayBuffer.FIELDS, rows, strict=True):
        assert torch.equal(batch[name], torch.tensor(values, dtype=torch.float32)[batch["rewards"].long()]), name
        assert torch.equal(batch[name], same[name])
    with pytest.raises(ValueError, match="actions has 9 rows"):
        ReplayBuffer(rows[0], rows[1][:9], *rows[2:])


# --- metrics ---------------------------------------------------------------------------------------------------------


def write_metrics(run_dir, steps, resume_step=None):
    logger = MetricLogger(run_dir, resume_step, tensorboard=False)
    for step in steps:
        values = {"loss": torch.tensor(1 / step), "rate": 1 / 3}
        if step % 20 == 0:
            values["eval/return"] = float("nan") if step == 40 else step
        logger.log(step, values)
    logger.close()
    return (run_dir / "metrics.csv").read_bytes()


def test_metrics_keep_late_columns_and_full_precision(tmp_path):
    first = write_metrics(tmp_path, [10, 20, 30]).decode().splitlines()
    assert first[0] == "step,loss,rate,eval/return"
    assert first[1].endswith(",0.3333333333333333,") and first[2].endswith(",20.0")
    metrics = read_metrics(tmp_path)
    assert metrics["step"] == [10, 20, 30] and metrics["loss"][0] == torch.tensor(0.1).item()
    assert np.isnan(metrics["eval/return"]).tolist() == [True, False, True]
    assert write_metrics(tmp_path, [5]).decode().startswith("step,loss,rate\n5,0.2")  # a new run starts a new file


@pytest.mark.parametrize("resume_step", [10, 40])
def test_resumed_metrics_equal_the_uninterrupted_ones_wherever_the_kill_cut(tmp_path, resume_step):
    steps = [10, 20, 30, 40, 50]
    whole = write_metrics(tmp_path / "whole", steps)
    folder = tmp_path / "cut"
    folder.mkdir()
    kept = whole.index(f"\n{resume_step},".encode()) + 1
    for end in range(whole.index(b"\n", kept) + 1, len(whole) + 1):
        (folder / "metrics.csv").write_bytes(whole[:end])
        again = write_metrics(folder, [step for step in steps if step > resume_step], resume_step)
        assert again == whole, f"cut after byte {end}"


def test_reading_survives_damage(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\n1,0.5\n\xff\xfe,1\n2,0.5,7\n3,\n4,0.2")
    assert str(read_metrics(tmp_path)) == "{'step': [1, 3], 'loss': [0.5, nan]}"
    (tmp_path / "metrics.csv").write_bytes(b"")
    assert read_metrics(tmp_path) == {"step": []}
    with pytest.raises(UserError, match=r"metrics\.csv"):
        read_metrics(tmp_path / "none")


def test_tensorboard_purges_what_a_resume_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricLogger(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = MetricLogger(tmp_path, resume_step=2)
    second.log(3, {"loss": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_failing_tracker_never_stops_a_run(tmp_path, monkeypatch, capsys, moment):
    received, identities = [], []

    def call(name):
        def action(*values, **settings):
            if name == moment:
                raise RuntimeError("quota\nused up")
            received.append((name, values, settings))

        return action

    def init(**settings):
        identities.append(settings["id"])
        call("init")(**settings)
        return types.SimpleNamespace(log=call("log"), finish=call("finish"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 2):
        options = {"wandb_project": "p", "wandb_labels": {"group": "g", "name": None}}
        logger = MetricLogger(tmp_path, resume_step, tensorboard=False, config=SmallConfig(), **options)
        for step in (1, 2) if resume_step is None else (3,):
            logger.log(step, {"loss": 1.0})
        logger.close()
    assert read_metrics(tmp_path)["step"] == [1, 2, 3]
    assert capsys.readouterr().err.count("\n") == 2 and identities[0] == identities[1]
    if moment == "finish":
        assert ("log", ({"loss": 1.0},), {"step": 3}) in received
        assert received[0][2]["config"]["w2_weights"] == [0.1, 0.2]
        assert received[0][2]["group"] == "g" and received[0][2]["name"].endswith(tmp_path.name)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_every_panel_has_labels(tmp_path, monkeypatch):
    figures, rows = [], {"step": [1, 2], "env_steps": [1, 2]}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.plot_training_curves(rows | {"critic_loss": [2.0, 1.0]}, tmp_path, "a")
    success = {"success_rate": [0.0, 1.0], "eval/success_rate": [1.0, 1.0], "epsilon": [1.0, 0.5]}
    success["v_loss"] = [1.0, float("nan")]  # one value alone is no curve
    plots.plot_online_curves(rows | success, tmp_path, "b")
    chain = {f"chain/actor_{actor}/{name}": [0.5, 0.1] for actor in (0, 1) for name in ("energy", "distance")}
    chain |= {f"chain/actor_{actor}/energy_before": [9.0, 9.0] for actor in (0, 1)} | {
        "chain/actor_1/floor": [0.0, 0.0]
    }
    plots.plot_chain_curves(rows | chain | {"critic_loss": [float("nan"), 3.0]}, tmp_path, "c", 2, 50.0)
    plots.plot_study_curves(rows | {"eval/run/return": [1.0, 2.0]}, tmp_path, "d", {"run": 3.0})
    assert [len(figure.axes) for figure in figures] == [8, 2, 6, 2]
    assert all(axis.get_ylabel() and axis.get_xlabel() for figure in figures for axis in figure.axes)
    assert figures[1].axes[0].get_title() == "Success"
    plots.plot_online_curves({"step": [1], "env_steps": [0], "eval/success_rate": [0.5]}, tmp_path, "e")
    (axis,) = figures.pop().axes
    assert [line.get_label() for line in axis.lines] == ["evaluation, five tasks"]
    _, _, distance, saved, _, critics = figures[2].axes
    assert distance.get_yscale() == "log" and distance.get_ylim()[0] < 0.1 and distance.get_ylim()[1] > 0.5
    assert [line.get_label() for line in distance.lines] == ["actor 0", "actor 1"]  # a floor of 0 has no place there
    assert [line.get_label() for line in saved.lines[:-1]] == ["actor 1"] and "actor 0" in saved.get_xlabel()
    assert [line.get_marker() for line in critics.lines] == ["."]  # one value alone is seen


# --- run directories -------------------------------------------------------------------------------------------------


def test_resume_needs_the_same_settings_once_something_was_saved(tmp_path):
    prepare_run(tmp_path, SmallConfig(seed=9, resume=True))
    prepare_run(tmp_path, SmallConfig(resume=True))  # nothing was saved that other settings could spoil
    checkpoint = tmp_path / "checkpoints" / "last.pth"
    save_checkpoint(checkpoint, {"step": 1})
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("limit: null\nfast: false\n", ""))  # new since then
    assert prepare_run(tmp_path, SmallConfig(resume=True)) == checkpoint
    for name, before, now in (("seed", 0, 9), ("limit", None, 1), ("fast", False, True)):
        with pytest.raises(UserError, match=f"config.yaml: {name} was {before} and is now {now}"):
            prepare_run(tmp_path, replace(SmallConfig(resume=True), **{name: now}))


def test_finished_run_says_so_and_stops(tmp_path):
    prepare_run(tmp_path, SmallConfig())
    mark_finished(tmp_path, {"success": torch.tensor(0.5), "steps": np.int64(3)})
    assert yaml.safe_load((tmp_path / "finished.json").read_text()) == {"success": 0.5, "steps": 3}
    for resume in (False, True):
        with pytest.raises(RunFinished, match="finished"):
            prepare_run(tmp_path, SmallConfig(resume=resume))
    with pytest.raises(UserError, match="seed"):
        prepare_run(tmp_path, SmallConfig(seed=1))


def test_running_means_average_each_name_over_the_updates_that_have_it():
    means = RunningMeans()
    assert means.take() == {}
    for number in range(4):
        info = {"a": torch.tensor(float(number))} | ({"b": torch.tensor(10 * number)} if number % 2 else {})
        means.add(info)
        info["a"].fill_(100.0)  # what a captured graph does to its outputs
    assert means.take() == {"a": 1.5, "b": 20.0} and means.take() == {}
    means.add({"c": torch.tensor(3.0)})
    assert means.take() == {"c": 3.0}


@pytest.mark.parametrize("place", ["run/checkpoints", "kept"])
def test_overwrite_replaces_the_run_that_is_there(tmp_path, place):
    run_dir, checkpoint = tmp_path / "run", tmp_path / place / "last.pth"
    prepare_run(run_dir, SmallConfig(), checkpoint=checkpoint)
    save_checkpoint(checkpoint, {"step": 1})
    (run_dir / "old").mkdir()
    mark_finished(run_dir, {})
    with pytest.raises(UserError, match="give one of them"):
        prepare_run(run_dir, SmallConfig(resume=True, overwrite=True), checkpoint=checkpoint)
    assert prepare_run(run_dir, SmallConfig(seed=9, overwrite=True), checkpoint=checkpoint) is None
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "versions.json"}
    assert not checkpoint.exists() and "seed: 9" in (run_dir / "config.yaml").read_text()


def test_overwrite_leaves_what_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("theirs: 1")
    (tmp_path / "thesis.txt").write_text("years of work")
    prepare_run(tmp_path, SmallConfig(overwrite=True))
    assert (tmp_path / "thesis.txt").exists()


COMMANDS = [POGOTrainerConfig, OfflineTrainerConfig, OnlineTrainerConfig, ALGORITHMS["edac"][1], MORELConfig]


@pytest.mark.parametrize("config_class", COMMANDS)
def test_a_number_out_of_its_range_names_its_flag(config_class):
    hints = typing.get_type_hints(config_class, include_extras=True)
    for name, hint in hints.items():
        limits = cli._range(hint)
        for value in () if limits is None else (limits.least - 1, limits.most * 2 + 1):
            with pytest.raises(UserError, match=f"--{name} .*: must be"):
                parse_config(config_class, [f"--{name}", str(value)])
    assert sum(cli._range(hint) is not None for hint in hints.values()) > 15

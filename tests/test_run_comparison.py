"""The comparison command: what it runs, what it leaves alone, and how it survives what goes wrong.

Most tests put a tiny trainer in the place of pogo_main.py; one runs pogo_main.py itself.
"""

import collections
import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import tiny_trainer
import yaml
from running import error_line

import make_dataset
import run_comparison
from comparison import jobs, queue, ray
from comparison.registry import Run, settings_of
from run_comparison import Comparison, expand
from runs.cli import parse_config, run_cli
from runs.directory import lock_run
from runs.metrics import read_metrics
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent

SECOND = 0.02  # of ten updates of the trainer; `learning_rate` sets it
BASE = {
    "common": {"max_timesteps": 50, "seeds": [0, 1]},
    "environments": {"hopper": {"medium": {"w2_weights": [0.4, 1.0], "learning_rate": SECOND}}},
}


class Place(tiny_trainer.Place):
    """A folder with a comparison, the trainer, its notes, and data."""

    def __init__(self, folder: Path, monkeypatch):
        super().__init__(folder / "comparison.yaml", folder, monkeypatch)
        self.said = folder / "said.txt"
        (self.notes / "hopper_medium-v2.hdf5").touch()  # the data is there
        monkeypatch.setattr("comparison.report.chart_png", lambda title, chains: b"")  # test_comparison_report.py draws
        self.write(BASE)

    def write(self, comparison: dict) -> None:
        self.config.write_text(yaml.safe_dump(comparison))

    def flags(self, *more: str) -> list[str]:
        return super().flags("--output", str(self.folder / "results"), "--dataset_dir", str(self.notes), *more)

    def start(self, *more: str, context: str = "fork") -> multiprocessing.Process:
        """The command in a process of its own, which writes to `said`; a fork shares what is imported here."""
        process = multiprocessing.get_context(context).Process(target=command, args=(self, more))
        process.start()
        return process

    def count(self, event: str) -> collections.Counter:
        return collections.Counter(line[1] for line in self.ledger(event))

    def rows(self) -> list[dict]:
        with open(self.folder / "results" / "results.csv") as file:
            return list(csv.DictReader(file))

    def run_dir(self, seed: int) -> Path:
        return self.folder / "logs" / "hopper-medium-v2" / "w2_0.4_1" / f"seed_{seed}"

    def wait_for(self, condition, process: multiprocessing.Process, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.is_alive(), self.said.read_text()
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)

    def ends(self, process: multiprocessing.Process, code: int) -> str:
        """Wait for a command that was started; what it said."""
        process.join(180)
        assert process.exitcode == code, self.said.read_text()
        return self.said.read_text()


def command(place: Place, more: tuple[str, ...]) -> None:
    """run_comparison.py, as a shell starts it, with the trainer of a place."""
    queue.make_job = place.make_job
    os.setsid()
    said = os.open(place.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    run_cli(lambda _: place.run(*more))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


def ends(pid: str, seconds: float = 10) -> bool:
    """Whether a process is over by then. One that nobody has asked after has no command line left."""
    command, deadline = Path("/proc", pid, "cmdline"), time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while command.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not command.read_bytes()
    return True


exits = functools.partial(error_line, run_comparison.main)


# --- config.yaml -> runs ---------------------------------------------------------------------------------------------


def settings(path: Path, *more: str) -> run_comparison.RunComparisonConfig:
    return parse_config(run_comparison.RunComparisonConfig, ["--config", str(path), *more], config_flag="--settings")


def runs_of(path: Path, *more: str) -> list[Run]:
    return expand(settings(path, *more)).runs


def config_of(run: Run):
    """The settings of a run's command."""
    return settings_of(run.command, [*run.flags, "--seed", str(run.seed)])


def test_the_shipped_comparison_expands_wherever_the_command_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "one is 'pogo 0.4 0.27 0.13 halfcheetah-medium-v2 seed 0'" in exits(capsys, "--only", "no such run")
    runs = runs_of(ROOT / "config.yaml", "--log_dir", ".")
    assert sum(run.hours for run in runs) / 24 == pytest.approx(12.8, abs=0.5)  # days, before anything has trained
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    assert len(runs) == 15 * 3 * 3 and len(datasets) == 15
    assert datasets[0] == "halfcheetah-medium-v2" and datasets[-1] == "antmaze-large-diverse-v2"
    found = {("antmaze" in run.dataset, run.flags[run.flags.index("--lr") + 1]) for run in runs}
    assert found == {(True, "0.0001"), (False, "0.0003")}
    first = [(config_of(run).w2_weights, run.seed) for run in runs[:9]]
    assert first == [((0.4, 0.27, w), seed) for w in (0.13, 0.27, 0.5) for seed in (0, 1, 2)]
    assert runs[0].folder == tmp_path / "halfcheetah-medium-v2" / "w2_0.4_0.27_0.13" / "seed_0"
    assert config_of(runs[0]).max_timesteps == 1_000_000 and config_of(runs[0]).sinkhorn_blur == 0.05


def test_every_part_of_the_file_reaches_its_runs(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        """
        common: {batch_size: 32, normalize: false, seeds: [5], learning_rate: 1e-3, dataset_dir: data}
        sinkhorn: {K: 2, blur: 1e-1, backend: exact}
        environments:
          local/hopper:
            medium: {w2_weights_base: [1, 2e-1], w2_weights_third: [3, 4.5]}
          any:
            thing: {w2_weights: [0.7], env: antmaze-medium-navigate-singletask-v0, batch_size: 8, learning_rate: 3e-4,
                    sinkhorn: {blur: 0.2}}
        """
    )
    config = settings(path)
    first, second, other = map(config_of, expand(config).runs)
    assert (first.env, first.w2_weights, second.w2_weights) == ("local/hopper-medium-v2", (1, 0.2, 3), (1, 0.2, 4.5))
    assert (first.batch_size, first.normalize, first.seed, first.lr) == (32, False, 5, 1e-3)
    assert (first.sinkhorn_K, first.sinkhorn_blur, first.sinkhorn_backend) == (2, 0.1, "exact")
    assert config.dataset_dir == "data"
    assert (other.env, other.w2_weights) == ("antmaze-medium-navigate-singletask-v0", (0.7,))
    assert (other.batch_size, other.lr, other.sinkhorn_K, other.sinkhorn_blur) == (8, 3e-4, 2, 0.2)


ALGORITHMS_TOO = """
    common: {max_timesteps: 100, seeds: [0, 3], discount: 0.9, hidden_dim: 16, beta: 2.0, learning_rate: 1e-3}
    sinkhorn: {K: 2, blur_relative: spread}
    environments:
      hopper:
        medium:
          - {w2_weights: [0.4, 0.5]}
          - {algorithm: iql, w2_weights: [10, 10], actor_lr: 1e-4, actor_configs: [own, {type: gaussian}],
             iql_deterministic: false}
          - {algorithm: iql, w2_weights: [0], actor_configs: [own], iql_deterministic: true}
        expert: {algorithm: td3_bc, w2_weights_base: [1, 2], w2_weights_third: [3, 4], sinkhorn: {K: 3}}
"""


def test_an_entry_may_name_an_algorithm_and_a_process_is_told_every_setting(tmp_path):
    """No default and no file left by an earlier start can decide one."""
    path = tmp_path / "c.yaml"
    path.write_text(ALGORITHMS_TOO.replace("expert", "medium-expert"))
    comparison = Comparison(settings(path, "--threads", "3", "--log_dir", str(tmp_path), "--dataset_dir", "x"))
    runs = comparison.runs
    folders = ["hopper-medium-v2/w2_0.4_0.5", "hopper-medium-v2/iql_w2_10_10", "hopper-medium-v2/iql_w2_0"]
    folders += [f"hopper-medium-expert-v2/td3_bc_w2_1_2_{third}" for third in (3, 4)]
    assert [run.folder for run in runs[::2]] == [tmp_path / folder / "seed_0" for folder in folders]
    pogo, iql, td3_bc = runs[0], runs[3], runs[-1]
    assert (config_of(pogo).lr, config_of(pogo).sinkhorn_K, config_of(iql).beta) == (1e-3, 2, 2.0)
    assert config_of(td3_bc).sinkhorn_K == 3 and config_of(td3_bc).blur_relative == "spread"
    assert iql.name == "iql 10 10 hopper-medium-v2 seed 3"
    job = comparison.job(iql)
    *start, module = job.command[:4]
    assert start == ["-c", queue.RUN_MODULE, str(ROOT)] and module == "algorithms.offline.pogo_multi_main"
    told = parse_config(type(config_of(iql)), job.command[4:])
    assert {flag[2:].removeprefix("no_") for flag in job.command[4:] if flag.startswith("--")} == vars(told).keys()
    assert told.actor_configs == ("own", "gaussian") and told.actor_lr == 1e-4 and told.resume and told.seed == 3
    assert told.eval_workers == 2 and told.dataset_dir == str(Path("x").resolve())
    assert job.environment["OMP_NUM_THREADS"] == "3"


def test_what_corl_sets_for_a_dataset_is_the_lowest_layer(tmp_path):
    text = """
    environments:
      hopper:
        medium:
          - {algorithm: iql, w2_weights: [1]}
          - {algorithm: edac, w2_weights: [1], eta: 3}
          - {algorithm: iql, w2_weights: [2], tau: 0.01}
      local/hopper: {medium: {algorithm: iql, w2_weights: [1]}}
      halfcheetah: {medium: {algorithm: iql, w2_weights: [1]}}
    """
    for shared, tau in (("", 0.001), ("    common: {tau: 0.5, max_timesteps: 7}", 0.5)):
        (tmp_path / "c.yaml").write_text(f"{shared}{text}")
        iql, edac, changed, local, plain = map(config_of, runs_of(tmp_path / "c.yaml"))
        assert iql.iql_deterministic and iql.normalize_reward and iql.tau == tau and local.iql_deterministic
        assert (edac.num_critics, edac.eta, edac.normalize) == (50, 3.0, False) and changed.tau == 0.01
        assert not plain.iql_deterministic and plain.tau == (tau if shared else 0.005)
        assert iql.max_timesteps == edac.max_timesteps == (7 if shared else 10_000)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("algorithm: td3_bc", "algorithm: sac", "medium-expert: algorithm must be one of pogo, iql, td3_bc, awac, cql"),
        ("beta: 2.0", "eta: 2.0", "common: unknown key 'eta'"),
        ("actor_lr: 1e-4", "learning_rate: 1e-4", "environments.hopper.medium[1]: unknown key 'learning_rate'"),
        ("[own, {type: gaussian}]", "[own]", "medium[1]: --actor_configs own: 1 for 2 weights"),
        ("[0], actor_configs: [own]", "[10, 10], actor_configs: [own, own]", "is asked for twice"),
    ],
)
def test_a_fault_of_an_algorithms_entry_is_one_line(before, after, words, tmp_path, capsys):
    assert before in ALGORITHMS_TOO
    text = ALGORITHMS_TOO.replace("expert", "medium-expert").replace(before, after)
    (tmp_path / "c.yaml").write_text(text)
    assert words in exits(capsys, "--config", str(tmp_path / "c.yaml"), "--dry_run")


def test_cores_are_shared_among_jobs_unless_the_environment_says_how_many(place, monkeypatch):
    monkeypatch.setattr(run_comparison, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = {}
    for count in (1, 2, 3, 100):
        config = settings(place.config, "--jobs", str(count))
        found[count] = (config.run_threads, config.eval_workers)
    assert found == {1: (4, 7), 2: (4, 3), 3: (2, 1), 100: (1, 0)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (settings(place.config).run_threads, settings(place.config, "--threads", "3").run_threads) == (1, 3)


def test_only_takes_whole_words():
    names = ("BC walker", "TD3+BC walker", "pogo 0.4 1 hopper-medium-v2 seed 1", "pogo 10.4 hopper-medium-v2 seed 10")
    runs = [types.SimpleNamespace(name=name) for name in names]
    for only, taken in (("BC", [0]), ("TD3+BC", [1]), ("hopper", [2, 3]), ("seed 1", [2]), ("0.4 1", [2])):
        assert queue.choose(runs, only) == [runs[number] for number in taken], only


BAD = [
    ("common: {bacth_size: 4}", "common: unknown key 'bacth_size'", "'batch_size'"),
    ("common: {tau: 7}", "environments.hopper.medium", "--tau 7"),
    ("common: {seeds: [0, 0]}", "environments.hopper.medium", "seed_0 is asked for twice"),
    ("sinkhorn: {k: 4}", "sinkhorn: unknown key 'k'", "'K'"),
    ("common: {tau: 0.1, tau: 0.2}", "stands twice", "line 1"),
    ("environments: {hopper: {medium: }}", "environments.hopper.medium", "key: value"),
    ("environments: {hopper: {}, walker2d: {medium: {w2_weights: [1]}}}", "environments.hopper:", "names no datasets"),
    ("environments: {hopper: {medum: {w2_weights: [1]}}}", "environments.hopper.medum", "hopper-medium-v2"),
    ("environments: {hopper: {medium: {w2_weights: [-1]}}}", "environments.hopper.medium", "--w2_weights -1"),
    ("environments: {hopper: {medium: {w2_weights_base: [1, 2]}}}", "medium", "both w2_weights_base and"),
    ("common: {lr: 1e-3, learning_rate: 2e-3}", "common: learning_rate stands twice", "under another name"),
    ("common: {save_model: false}", "hopper.medium", "--no_save_model"),
    ("common: {seeds: []}", "environments.hopper.medium: an empty list of seeds", "leave"),
]


@pytest.mark.parametrize("text,where,words", BAD, ids=[f"{where}: {words}" for _, where, words in BAD])
def test_a_bad_file_is_named_with_its_key(text, where, words, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    good = "\nenvironments: {hopper: {medium: {w2_weights: [0.4, 1.0]}}}\n"
    path.write_text(text + (good if not text.startswith("environments") else ""))
    line = exits(capsys, "--config", str(path), "--log_dir", str(tmp_path / "logs"))
    assert "c.yaml" in line and where in line and words in line, line
    assert not (tmp_path / "logs").exists()


def test_bad_flags_are_named(place, capsys, monkeypatch):
    assert "no.yaml" in exits(capsys, "--config", "no.yaml")
    assert "--only 'cheetah'" in exits(capsys, *place.flags("--only", "cheetah"))
    assert "add --backend ray" in exits(capsys, *place.flags("--address", "auto"))
    assert "add --backend ray" in exits(capsys, *place.flags("--gpus_per_run", "0.5"))
    assert "needs --address" in exits(capsys, *place.flags("--backend", "ray"))
    (taken := place.folder / "taken").touch()
    assert str(taken) in exits(capsys, *place.flags("--output", str(taken)))
    assert "/proc" in exits(capsys, *place.flags("--output", "/proc"))  # there, and nothing can be written to it
    monkeypatch.setitem(sys.modules, "ray", None)
    line = exits(capsys, *place.flags("--backend", "ray", "--address", "auto"))
    assert "requirements/cluster.txt" in line
    assert not place.ledger()


# --- saying what would run -------------------------------------------------------------------------------------------


def test_dry_run_says_what_it_would_do_and_does_nothing(place, capsys):
    place.run("--dry_run", "--jobs", "2")
    out = capsys.readouterr().out
    assert "pogo 0.4 1 hopper-medium-v2 seed 1: not started" in out
    assert "2 runs left: about 0.0 minutes, with 2 at once" in out
    assert {path.name for path in place.folder.iterdir()} == {"comparison.yaml", "notes", "trainer.py"}
    place.run("--only", "seed 0")
    attempts = json.loads((place.run_dir(0) / "attempts.json").read_text())
    attempts[0]["seconds"] = 18000.0
    (place.run_dir(0) / "attempts.json").write_text(json.dumps(attempts))
    capsys.readouterr()
    place.run("--dry_run")
    out = capsys.readouterr().out
    assert "seed 0: finished" in out and "1 run left: about 5.0 hours, with 1 at once, by what was trained" in out


def test_a_run_that_cannot_have_its_data_fails_alone(place, capsys):
    (place.notes / "hopper_medium-v2.hdf5").unlink()
    (place.notes / "walker2d_medium-v2.hdf5").touch()
    entry = BASE["environments"]["hopper"]["medium"]
    place.write(BASE | {"environments": {"hopper": {"medium": entry}, "walker2d": {"medium": entry}}})
    place.behave(seed_0="no data")
    with pytest.raises(SystemExit):
        place.run()
    said = capsys.readouterr().out
    assert "hopper-medium-v2  pogo 0.4 1 seed 0  exit code 2: cannot download it; put it there by hand" in said
    assert len(place.ledger("end")) == 3 and len(place.ledger()) == 7


# --- running ---------------------------------------------------------------------------------------------------------


def test_runs_are_trained_once_and_reported(place, capsys):
    place.write(BASE | {"common": BASE["common"] | {"seeds": [0, 1, 2]}})
    place.run("--jobs", "2", "--threads", "1")
    out = capsys.readouterr().out
    assert place.count("start") == place.count("end") == {f"w2_0.4_1/seed_{seed}": 1 for seed in range(3)}
    assert [line[0] for line in place.ledger()][:3] == ["start", "start", "end"]  # so many at once
    assert len(place.rows()) == 3 * 2 * 2 and float(place.rows()[0]["seconds"]) >= 0
    assert {row["score"] for row in place.rows()} == {"50", "51"}
    name = r"^hopper-medium-v2 \(not the official file\)  pogo 0\.4 1 +40\.0 +50\.0 +51\.0$"
    assert re.search(name, out, re.M), out
    assert f"report.html, results.md and results.csv in {place.folder / 'results'}" in out
    log = (place.run_dir(0) / "output.log").read_text()
    assert "output of" in log and '"max_timesteps": 50' in log and {line[4] for line in place.ledger()} == {"1"}
    place.run()
    place.run("--backend", "ray", "--address", "127.0.0.1:1")  # with nothing left, no cluster is asked
    assert sum(place.count("start").values()) == 3  # nothing that is finished runs again
    evaluations = place.run_dir(1) / "training" / "evaluations.csv"
    evaluations.write_text("no such table\n")  # a damaged run is told, and stops nothing
    with pytest.raises(SystemExit):
        place.run("--report_only")
    assert "3 runs, 2 finished" in capsys.readouterr().out
    assert len(place.rows()) == 2 * 2 * 2 and "evaluations.csv" in (place.folder / "results/results.md").read_text()


def test_report_only_of_a_folder_without_any_run_is_one_line(place, capsys):
    """A slip in --log_dir must not replace good results by an empty table; a run that was begun is enough."""
    place.run("--only", "seed 1")
    place.run("--report_only")
    assert len(place.rows()) == 4 and "seed 0  not started" in capsys.readouterr().out
    before = (place.folder / "results" / "results.csv").read_text()
    line = exits(capsys, *place.flags("--report_only", "--log_dir", str(place.folder / "lgos")))
    assert f"--log_dir {place.folder / 'lgos'}: none of the runs asked for is there" in line
    assert "none of the runs" in exits(capsys, *place.flags("--report_only", "--only", "seed 0"))
    assert (place.folder / "results" / "results.csv").read_text() == before
    place.run_dir(0).mkdir()
    place.run("--report_only", "--only", "seed 0")
    assert "No run is finished yet" in capsys.readouterr().out


def test_a_crash_is_tried_again_from_the_checkpoint_and_divergence_is_not(place, capsys):
    place.behave(seed_0="crash once", seed_1="diverge", seed_2="crash")
    place.write(BASE | {"common": {"max_timesteps": 50, "seeds": [0, 1, 2]}})
    with pytest.raises(SystemExit) as stop:
        place.run("--retries", "1")
    assert stop.value.code == 1
    assert place.count("start") == {"w2_0.4_1/seed_0": 2, "w2_0.4_1/seed_1": 1, "w2_0.4_1/seed_2": 2}
    assert [line[2] for line in place.ledger() if line[:2] == ["start", "w2_0.4_1/seed_0"]] == ["0", "20"]
    said = capsys.readouterr()
    assert "exit code 1: RuntimeError: a defect; starting it again" in said.err
    assert "exit code 2" in said.err and "mean Q is 9e9 at update 30" in said.err and "2 runs failed" in said.err
    assert len(place.rows()) == 4  # of seed 0
    attempts = jobs.read_attempts(place.run_dir(0))
    assert [attempt["code"] for attempt in attempts] == [1, 0]
    assert jobs.seconds_spent(place.run_dir(0)) == sum(attempt["seconds"] for attempt in attempts)
    page = (place.folder / "results" / "report.html").read_text()
    assert "mean Q is 9e9" in page and "a defect" in page
    place.behave()
    place.run()  # mended: both go on from their checkpoints
    assert [line[2] for line in place.ledger("start")][-2:] == ["30", "30"]
    assert len(place.rows()) == 12


def test_a_run_that_another_command_has_trained_otherwise_is_no_result(place):
    waiting = Comparison(parse_config(run_comparison.RunComparisonConfig, place.flags(), config_flag="--settings"))
    place.write(BASE | {"common": BASE["common"] | {"max_timesteps": 60}})
    place.run()
    assert not waiting.append(waiting.runs[0])
    assert "max_timesteps was 60 and is now 50" in waiting.failed[waiting.runs[0]]


def test_a_setting_that_may_change_on_resuming_may_change_between_two_commands(place, capsys):
    """A run that diverged says itself that --q_limit allows more."""
    place.behave(seed_1="diverge")
    with pytest.raises(SystemExit):
        place.run()
    place.behave()
    place.write(BASE | {"common": BASE["common"] | {"q_limit": 20, "keep_checkpoints": True}})
    place.run()
    assert len(place.rows()) == 2 * 2 * 2
    place.write(BASE | {"common": BASE["common"] | {"max_timesteps": 60}})
    line, before = exits(capsys, *place.flags()), len(place.ledger())
    assert "max_timesteps was 50 and is now 60" in line and "--log_dir" in line and line.count(";") == 1  # one remedy
    place.run("--only", "seed 0", "--max_timesteps", "20")  # a quick look takes no place
    with open(place.folder / "results" / "updates_20" / "results.csv") as file:
        assert {row["updates"] for row in csv.DictReader(file)} == {"20"}
    assert {row["updates"] for row in place.rows()} == {"50"} and len(place.ledger()) == before + 2


def test_a_run_that_another_process_trains_is_waited_for(place):
    tried = []

    def release() -> None:
        while not place.count("end")["w2_0.4_1/seed_1"]:
            time.sleep(0.01)
        time.sleep(0.2)
        tried.append((place.run_dir(0) / "attempts.json").exists())  # was a process started to find out?
        lock.close()

    with contextlib.ExitStack() as lock:
        lock.enter_context(lock_run(place.run_dir(0)))
        other = threading.Thread(target=release)
        other.start()
        place.run()
        other.join()
    assert tried == [False] and place.count("end") == {"w2_0.4_1/seed_0": 1, "w2_0.4_1/seed_1": 1}


def test_a_card_that_the_file_names_is_not_chosen_anew(place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for device, devices in (("auto", ["0", "1"]), ("cuda:1", [])):
        place.write(BASE | {"common": BASE["common"] | {"device": device}})
        comparison = Comparison(settings(place.config, "--log_dir", str(place.folder / "logs")))
        assert comparison.open_pool().devices == devices


# --- what goes wrong from outside ------------------------------------------------------------------------------------

LONGER = BASE | {"common": {"max_timesteps": 200, "seeds": [0, 1, 2, 3]}}


def cut(place: Place) -> bool:
    """Whether seed 0 is finished and seed 1, which is slow, is on its way."""
    path = place.run_dir(1) / "checkpoints" / "last.pth"
    return (place.run_dir(0) / "finished.json").exists() and path.exists() and int(path.read_text()) >= 50


def test_kill_of_the_command_loses_nothing(place):
    """kill -9: its processes end with it, and the same command goes on."""
    place.write(LONGER)
    place.behave(seed_1="slow")
    process = place.start("--jobs", "2")
    place.wait_for(lambda: cut(place), process)
    process.kill()
    process.join()
    started = place.ledger("start")
    assert all(ends(line[3]) for line in started), "a run goes on without its comparison"
    finished_first = {f"w2_0.4_1/{path.parent.name}" for path in place.folder.glob("logs/*/*/*/finished.json")}
    assert "w2_0.4_1/seed_0" in finished_first and "w2_0.4_1/seed_1" not in finished_first, "killed too late"
    before = len(place.ledger())
    place.behave()
    place.run("--jobs", "2")
    later = [line[1] for line in place.ledger()[before:] if line[0] == "start"]
    assert not finished_first & set(later)
    assert set(place.count("end")) == {f"w2_0.4_1/seed_{seed}" for seed in range(4)}
    resumed = [int(line[2]) for line in place.ledger()[before:] if line[0] == "start"]
    assert max(resumed) >= 50  # the cut run went on, it did not begin anew
    for seed in range(4):
        assert read_metrics(place.run_dir(seed) / "training")["step"] == list(range(10, 201, 10))
    keys = [(row["seed"], row["actor"], row["mode"]) for row in place.rows()]
    assert len(keys) == len(set(keys)) == 4 * 2 * 2


def test_ctrl_c_stops_the_runs_and_the_same_command_continues(place):
    place.write(LONGER)
    place.behave(seed_1="slow")
    process = place.start("--jobs", "2")
    place.wait_for(lambda: cut(place), process)
    os.kill(process.pid, signal.SIGINT)
    err = place.ends(process, 130)
    assert "the same command continues" in err and "Traceback" not in err
    assert all(ends(line[3], 0.1) for line in place.ledger("start"))
    rows = place.rows()
    assert rows and len(rows) < 16  # what was finished is in the table
    codes = {attempt["code"] for s in range(4) for attempt in jobs.read_attempts(place.run_dir(s))}
    assert 130 in codes and codes <= {0, 130}, codes  # whatever a process was doing then, it has not failed
    assert "failed" not in (place.folder / "results" / "results.md").read_text()
    place.behave()
    place.run("--jobs", "2")
    assert len(place.rows()) == 16 and place.count("start")["w2_0.4_1/seed_0"] == 1


def test_several_gpus_are_dealt_in_turn(monkeypatch):
    monkeypatch.setattr(jobs, "execute", lambda job, stop: stop.wait(30))
    for devices, expected in ((["2", "5"], ["2", "5", "2"]), (["0"], [None] * 3)):
        pool, started = jobs.LocalPool(3, devices), [jobs.Job("", [], {}) for _ in range(3)]
        for number, job in enumerate(started):
            pool.start(number, job)
        pool.stop()
        assert [job.environment.get("CUDA_VISIBLE_DEVICES") for job in started] == expected


# --- the real trainers -----------------------------------------------------------------------------------------------


def test_real_runs_end_to_end(tmp_path, monkeypatch, capsys):
    """Both commands as they are, in a folder with a decoy: trained, told apart, reported again, not trained again."""
    monkeypatch.chdir(tmp_path)
    Path("utils.py").write_text("raise SystemError('a decoy')")
    data = make_dataset.generate("local/hopper-medium-v2", size=300, dataset_dir="data", progress=False)
    common = {"max_timesteps": 4, "eval_freq": 2, "log_freq": 2, "eval_episodes": 1, "final_runs": 2, "hidden_dim": 8}
    common |= {"batch_size": 8, "tensorboard": False, "dataset_dir": "data", "eval_workers": 0}
    entries = [{"w2_weights": [0.4, 0.5]}, {"algorithm": "td3_bc", "w2_weights": [0.4, 0.5]}]
    comparison = {"common": common, "environments": {"local/hopper": {"medium": entries}}}
    Path("c.yaml").write_text(yaml.safe_dump(comparison))
    run_comparison.main(["--config", "c.yaml", "--threads", "1"])
    table = capsys.readouterr().out
    assert re.search(r"local/hopper-medium-v2 +pogo 0\.4 0\.5 ", table) and "  td3_bc 0.4 0.5" in table
    with open("results/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["algorithm"] for row in rows] == ["pogo"] * 4 + ["td3_bc"] * 4
    assert {(row["episodes"], row["updates"], row["official_data"]) for row in rows} == {("2", "4", "False")}
    summary = json.loads(Path("logs/local/hopper-medium-v2/w2_0.4_0.5/seed_0/finished.json").read_text())
    facts = ("300", hashlib.sha256(data.read_bytes()).hexdigest()[:12])
    assert {(row["rows"], row["data_sha256"]) for row in rows} == {facts}
    for row in rows[:4]:
        assert float(row["score"]) == pytest.approx(summary[f"actor_{row['actor']}/{row['mode']}/score"], rel=1e-4)
        assert float(row["data_score"]) == pytest.approx(summary["data_score"], rel=1e-4)
    page = Path("results/report.html").read_text()
    assert page.count("<img") == 1 and "docs/pogo_multi.md" in page
    before = Path("results/results.csv").read_text()
    run_comparison.main(["--config", "c.yaml", "--report_only"])
    assert Path("results/results.csv").read_text() == before
    run_comparison.main(["--config", "c.yaml", "--dry_run"])
    assert capsys.readouterr().out.count(": finished") == 2


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_an_address_where_nobody_answers_is_one_line(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray, "ANSWER_SECONDS", 1)
    with pytest.raises(UserError, match="--address 127.0.0.1:1: no Ray cluster answers"):
        ray.RayPool("127.0.0.1:1", None, 1, None)
    for share, words in ((1.5, "whole number"), (0.00001, "four decimals")):
        with pytest.raises(UserError, match=f"--gpus_per_run {share}: .*{words}"):
            ray.check_gpus(share)
    ray.check_gpus(0.3333)
    for given in ("nowhere", "host:port"):
        with pytest.raises(UserError, match="must be host:port"):
            ray.probe(given)


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
print("address", cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(nodes[0], allow_graceful=False)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def test_a_ray_cluster_survives_the_loss_of_a_node(place, monkeypatch):
    """Two nodes, one run on each; one node is killed: its run goes on on the other, the rest is not run again."""
    pytest.importorskip("ray")
    place.write(LONGER | {"common": {"max_timesteps": 200, "seeds": [0, 1, 2]}})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # every node has the loopback address
    place.behave(seed_0="slow", seed_1="slow")
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], start_new_session=True, **pipes)
    try:
        address = next(line for line in cluster.stdout if line.startswith("address")).split()[1]
        process = place.start("--backend", "ray", "--address", address, "--gpus_per_run", "0", context="spawn")
        checkpoints = [place.run_dir(seed) / "checkpoints" / "last.pth" for seed in (0, 1)]
        place.wait_for(lambda: all(path.exists() for path in checkpoints), process, 120)
        cluster.stdin.write("remove\n")
        cluster.stdin.flush()
        place.ends(process, 0)
        assert place.count("end") == {f"w2_0.4_1/seed_{seed}": 1 for seed in range(3)}
        starts = place.count("start")
        assert sorted(starts.values()) == [1, 1, 2], starts
        again = next(name for name, count in starts.items() if count == 2)
        steps = [int(line[2]) for line in place.ledger() if line[:2] == ["start", again]]
        assert steps[0] == 0 < steps[1]
        assert len(place.rows()) == 3 * 2 * 2
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()


def test_the_shown_file_works_and_has_the_shipped_weights(tmp_path):
    shown = tmp_path / "shown.yaml"
    shown.write_text(re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "comparison.md").read_text(), re.S)[1])
    weights = {}
    for path in (shown, ROOT / "config.yaml"):
        runs = runs_of(path, "--log_dir", str(tmp_path), "--seeds", "0")
        weights[path] = [config_of(run).w2_weights for run in runs if run.dataset == "hopper-medium-v2"]
    assert len(weights[shown]) == 3 and weights[shown] == weights[ROOT / "config.yaml"]

"""Tables of results: the runs that a file names, the rows that they leave, what a kill may not lose, and the tables."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_trainer
import yaml
from running import error_line

import run_comparison
from comparison import queue, registry, rows, tables
from comparison.registry import COMMANDS, check_flags, read_table, settings_digest, settings_of
from runs.directory import plain_config
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
AGENT = {"method": "random", "command": "walker.agent", "flags": {"episodes": 2}}
BC = {"method": "BC", "command": "walker.train_il", "flags": {"USE_DATASET_STR": "local/__all__"}}
MAZE = {"method": "OPSO", "command": "online_trainer", "flags": {"dataset": "local/pointmaze-medium-navigate-v0"}}
MAZE["needs"] = {"command": "offline_trainer"}
LAYOUT = {"columns": ["walk", "run"]}


def write_table(path: Path, *entries: dict, **sections) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"runs": list(entries), "layout": LAYOUT} | sections))
    return path


def stored_settings(run, log_dir) -> str:
    """What the run's config.yaml holds."""
    return yaml.safe_dump(plain_config(settings_of(run.command, run.arguments(log_dir, None))))


class Place(tiny_trainer.Place):
    """A folder with a table, the trainer and its notes."""

    def __init__(self, folder: Path, monkeypatch):
        super().__init__(folder / "results" / "first.yaml", folder, monkeypatch)
        monkeypatch.setattr(queue.Queue, "lacks", lambda table_queue, run: {})

    def rows(self) -> list[dict]:
        return rows.read_csv(self.config.with_suffix(".csv"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


# -- files of runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_of_the_repository_names_local_data_and_flags_that_its_commands_have(path):
    table = read_table(path)
    check_flags(table)
    for run in table.runs:
        named = run.dataset.split(",") if run.dataset else []
        assert all(name.startswith("local/") for name in named) and (named or COMMANDS[run.command].data is None)
    assert {run.seed for run in table.runs[: len(table.runs) // len({run.seed for run in table.runs})]} == {0}
    assert tables.render(table, rows.Scores([]))  # its layout can be drawn
    assert len({run.name for run in table.runs}) == len(table.runs)  # a line of --dry_run tells which run it is


def test_the_shown_sweep_is_a_table(tmp_path):
    page = (ROOT / "docs" / "results.md").read_text()
    (tmp_path / "sweep.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    table = read_table(tmp_path / "sweep.yaml")
    check_flags(table)
    assert [run.row for run in table.runs] == 2 * [("0.0001",), ("0.0003",)]


def test_a_file_becomes_runs(tmp_path):
    each = BC | {
        "flags": {"lr": 1e-3, "ADD_TASK_BIT": False},
        "each": {"USE_DATASET_STR": ["local/walk_m", "local/run_m"]},
    }
    each |= {"row": ["{USE_DATASET_STR}", "BC"], "seeds": [1]}
    layout = LAYOUT | {"header": ["data", "method"]}
    with pytest.raises(UserError, match="layout.header needs a word for each of its labels"):
        read_table(write_table(tmp_path / "t.yaml", each))
    table = read_table(
        write_table(tmp_path / "t.yaml", AGENT | {"row": ["", "random"]}, each, seeds=[0, 1], layout=layout)
    )
    expected = [("random", "", 0), ("random", "", 1), ("BC", "local/walk_m", 1), ("BC", "local/run_m", 1)]
    assert [(run.method, run.dataset, run.seed) for run in table.runs] == expected
    run = table.runs[-1]
    assert run.row == ("local/run_m", "BC") and run.name == "t BC local/run_m seed 1"
    assert run.text == "python -m walker.train_il --no_ADD_TASK_BIT --USE_DATASET_STR local/run_m --lr 0.001 --seed 1"
    assert len({run.run_dir(tmp_path).parent for run in table.runs}) == 3  # one for each settings
    other = read_table(write_table(tmp_path / "u.yaml", each, seeds=[0], layout=layout))
    assert other.runs[-1].run_dir(tmp_path) == run.run_dir(tmp_path)  # whichever table asks for it


def test_a_run_may_need_a_pretraining_of_its_seed(tmp_path):
    entry = MAZE | {"needs": {"command": "offline_trainer", "flags": {"num_epochs": 3}}}
    (run,) = read_table(write_table(tmp_path / "t.yaml", entry, seeds=[2])).runs
    before, after = run.text.split(" && ")
    assert before.startswith("python offline_trainer.py --dataset local/pointmaze-medium-navigate-v0 --num_epochs 3")
    assert after.startswith("python online_trainer.py") and before.endswith("--seed 2") and after.endswith("--seed 2")
    words = run.arguments(tmp_path, "data")
    assert words[words.index("--offline_run_dir") + 1] == str(run.needs.run_dir(tmp_path))
    assert words[words.index("--dataset_dir") + 1] == str(Path("data").resolve())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": [0]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"runs": [AGENT | {"command": "walker.agnt"}]}, "runs[0].command: must be one of walker.agent"),
        ({"runs": [AGENT | {"flags": {"episode": 2}}]}, "--episode"),
        ({"runs": [AGENT | {"flags": {"seed": 2}}]}, "flags.seed: is set by run_comparison.py"),
        ({"runs": [BC | {"flags": {}}]}, "flags.USE_DATASET_STR: must be given"),
        ({"runs": [AGENT, AGENT | {"method": "same"}]}, "two entries name the same run"),
        ({"runs": [AGENT | {"row": ["{env}"]}]}, "must hold no other braces"),
        ({"runs": [AGENT | {"each": {"episodes": "abc"}}]}, "runs[0].each: episodes must be a list, not 'abc'"),
        ({"runs": [AGENT | {"needs": {"flags": None}}]}, "runs[0].needs: flags must be `key: value` lines, not None"),
        ({"runs": [AGENT, BC | {"seeds": []}]}, "runs[1]: an empty list in seeds or each leaves no run"),
        ({"seeds": [0, -1]}, "random: --seed -1: must be at least 0"),
    ],
)
def test_a_wrong_file_is_one_line(place, capsys, change, words):
    write_table(place.config, AGENT, **change)
    line = error_line(run_comparison.main, capsys, *place.flags())
    assert words in line and str(place.config) in line and not place.ledger("start")


# -- rows ------------------------------------------------------------------------------------------------------------


def record(run, log_dir: Path, summary: dict, files: dict[str, str]) -> Path:
    """The directory of a finished run, as its command leaves it."""
    run_dir = run.run_dir(log_dir)
    files = {"config.yaml": stored_settings(run, log_dir), "finished.json": json.dumps(summary), **files}
    versions = {"commit": "0123456789ab", "data_rows": 400, "data_sha256": "abc", "processor": "a chip"}
    files |= {"versions.json": json.dumps(versions)}
    files["attempts.json"] = '[{"began": "2026-01-01T00:00:00+00:00", "seconds": 12.4, "code": 0, "line": ""}]'
    for name, text in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(text)
    return run_dir


def only_run(folder: Path, entry: dict):
    return read_table(write_table(folder / "t.yaml", entry)).runs[0]


def test_rows_of_the_walker(tmp_path):
    run = only_run(tmp_path, BC)
    lines = ["agent,task,episode,return", "last,walk,0,900.0", "last,walk,1,940.0", "last,run,0,300.0"]
    text = "\n".join([*lines, "best,walk,0,950.0", "best,run,0,310.0"]) + "\n"
    summary = {"steps": 5, "data/walk/return": 949.0, "data/run/return": 293.0, "datasets": []}
    record(run, tmp_path, summary, {"evaluation.csv": text})
    walk, ran = rows.rows_of(run, tmp_path)
    assert tuple(walk) == rows.COLUMNS
    expected = {"table": "t", "system": "walker", "method": "BC", "dataset": "local/__all__", "task": "walk"}
    expected |= {"updates": "5", "environment_steps": "0", "episodes": "2", "mean": "920", "std": "20", "score": "920"}
    expected |= {"best_in_training": "950", "data_score": "949", "seconds": "12", "processor": "a chip"}
    expected |= {"precision": "float32", "commit": "0123456789ab", "command": run.text, "actor": ""}
    expected |= {"rows": "400", "data_sha256": "abc"}  # of what the run read
    assert {name: walk[name] for name in expected} == expected
    assert (ran["task"], ran["episodes"], ran["score"]) == ("run", "1", "300")


def test_rows_of_the_maze_stages(tmp_path):
    flags = {"dataset": "local/pointmaze-medium-navigate-v0"}
    run = only_run(tmp_path, {"method": "all losses", "command": "offline_trainer", "flags": flags})
    summary = {"value_distance_spearman": 0.95, "proposer_cosine": 0.9, "code_std": 0.6, "code_rank": 45.0}
    summary |= {"updates": 420, "dataset": run.dataset}
    record(run, tmp_path, summary, {})
    found = {row["task"]: (row["score"], row["episodes"]) for row in rows.rows_of(run, tmp_path)}
    figures = {"value_distance_spearman": "0.95", "proposer_cosine": "0.9", "code_rank": "45", "code_std": "0.6"}
    assert found == {name: (value, "") for name, value in figures.items()}

    run = only_run(tmp_path, {"method": "strict", "command": "online_trainer", "flags": flags | {"eval_episodes": 20}})
    success = {f"eval/success_task{task}": 1.0 for task in range(1, 5)} | {"eval/success_task5": 0.5}
    summary = {"eval/success_rate": 0.9, **success, "env_steps": 1234, "dataset": run.dataset}
    other = {"eval/value/success_rate": 0.25, "eval/value/episode_steps": 700.0}
    metrics = "step,eval/success_rate,eval/success_task5\n8,0.95,0.25\n16,0.9,0.5\n"
    record(run, tmp_path, summary, {"metrics.csv": metrics})
    found = {row["task"]: row for row in rows.rows_of(run, tmp_path)}
    assert list(found) == ["all", "task1", "task2", "task3", "task4", "task5"]
    record(run, tmp_path, summary | other, {"metrics.csv": metrics})
    (value,) = (row for row in rows.rows_of(run, tmp_path) if row["mode"] == "value")
    assert (value["task"], value["score"], value["episodes"]) == ("all", "25", "100")
    assert [found["all"][name] for name in ("score", "episodes", "best_in_training")] == ["90", "100", "95"]
    assert [found["task5"][name] for name in ("mean", "std", "score", "episodes")] == ["0.5", "0.5", "50", "20"]
    assert (found["all"]["environment_steps"], found["all"]["mode"]) == ("1234", "search")


def test_a_damaged_run_has_no_rows(tmp_path):
    run = only_run(tmp_path, AGENT)
    run_dir = record(run, tmp_path, {}, {"evaluation.csv": "agent,task,episode,return\nlast,walk,0,1.0\n"})
    assert rows.rows_of(run, tmp_path)
    (run_dir / "finished.json").write_text("{")
    with pytest.raises(UserError, match="its scores cannot be read"):
        rows.rows_of(run, tmp_path)


@pytest.mark.parametrize(
    ("command", "maze", "name", "value"),
    [
        ("offline_trainer", "pointmaze-medium", "discount", 0.99),
        ("offline_trainer", "pointmaze-giant", "discount", 0.995),
        ("online_trainer", "antmaze-medium", "fit_updates", 12_000),
    ],
)
def test_settings_that_the_command_resolves_count_as_given_ones_do(tmp_path, command, maze, name, value):
    """None stands for what the maze asks for."""
    entry = {"method": "OPSO", "command": command, "flags": {"dataset": f"{maze}-navigate-v0"}}
    usual, same, other = (
        settings_digest(only_run(tmp_path, entry | {"flags": entry["flags"] | change}))
        for change in ({}, {name: value}, {name: value / 2 if name == "discount" else value + 1})
    )
    assert usual == same != other


def test_rows_of_other_defaults_do_not_count_and_rows_without_settings_do(tmp_path):
    run = only_run(tmp_path, AGENT)
    row = dict.fromkeys(rows.COLUMNS, "") | {"command": run.text, "score": "1"}
    digest = settings_digest(run)
    for settings, counts in ((digest, True), ("", True), ("0" * 8, False)):
        assert bool(rows.Scores([[row | {"settings": settings}]]).of(run)) is counts
    both = [row, row | {"settings": digest, "score": "2"}]
    assert [found["score"] for found in rows.Scores([both]).of(run)] == ["2"]


def test_a_new_setting_that_is_off_changes_no_digest_and_a_changed_default_does(tmp_path, monkeypatch):
    run = only_run(tmp_path, AGENT)
    before, settings = settings_digest(run), registry.resolved_settings(run.command, run.flags)
    for change, same in (({"new": False}, True), ({"new": None}, True), ({"new": True}, False), ({"steps": 7}, False)):
        monkeypatch.setattr(registry, "resolved_settings", lambda *_, change=change: settings | change)
        settings_digest.cache_clear()
        assert (settings_digest(run) == before) is same
        assert (before in str(run.run_dir(tmp_path))) is same  # so a changed default trains anew, beside the old run
    settings_digest.cache_clear()


@pytest.mark.parametrize("text", [b"command,scores\na,1\n", b"command,score\na\n", b"command,score\n\xff,1\n"])
def test_a_csv_that_is_none_of_scores_is_one_line(place, capsys, text):
    write_table(place.config, AGENT)
    place.config.with_suffix(".csv").write_bytes(text)
    line = error_line(run_comparison.main, capsys, *place.flags())
    assert "first.csv: " in line and "restore it from git" in line and not place.ledger("start")


# -- the queue -------------------------------------------------------------------------------------------------------


def test_a_table_is_trained_once(place, capsys):
    write_table(place.config, AGENT, BC, seeds=[0, 1])
    place.config.with_name("results.csv").write_text("dataset,seed\nof a comparison, which has its own columns\n")
    place.run("--jobs", "1", "--seeds", "0")
    assert len(place.ledger("start")) == 2 and len(place.rows()) == 4
    assert "2 of 4 runs are in" in capsys.readouterr().out
    place.run("--jobs", "2", "--only", "BC")
    text = place.config.with_suffix(".csv").read_text()
    assert len(place.ledger("start")) == 3 and len(place.rows()) == 6
    place.run("--jobs", "2")
    assert len(place.ledger("start")) == 4 and len(place.rows()) == 8
    assert place.config.with_suffix(".csv").read_text().startswith(text)  # rows are appended
    before = place.rows()
    place.config.with_suffix(".csv").unlink()  # as where a kill left none: of what is finished, they are made anew
    place.run("--report_only")
    assert len(place.ledger("start")) == 4 and sorted(map(str, place.rows())) == sorted(map(str, before))
    shutil.rmtree(place.folder / "logs")  # rows count even where their directory is gone
    place.run("--jobs", "2")
    assert len(place.ledger("start")) == 4 and len(place.rows()) == 8
    capsys.readouterr()
    place.run("--dry_run")
    assert capsys.readouterr().out.count("has its rows") == 4


def test_a_run_of_two_tables_is_trained_once(place):
    write_table(place.config, AGENT)
    place.run()
    place.config = write_table(place.folder / "results" / "second.yaml", AGENT | {"method": "uniform"}, BC)
    (run_dir,) = (place.folder / "logs").rglob("seed_0")
    (run_dir / "finished.json").unlink()  # the rows of the first table are enough
    place.run("--jobs", "2")
    assert len(place.ledger("start")) == 2
    assert {(row["table"], row["method"]) for row in place.rows()} == {("second", "uniform"), ("second", "BC")}


def test_a_run_that_fails_stops_the_one_that_waits_for_it_alone(place, capsys):
    write_table(place.config, MAZE, BC, AGENT)
    place.behave(**{"offline_trainer": "diverge", "walker.train_il": "crash"})
    with pytest.raises(SystemExit) as stop:
        place.run("--retries", "1", "--jobs", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and len(place.rows()) == 2
    assert len(place.ledger("start")) == 4  # bad input once, a crash twice
    assert "it needs first OPSO, pretraining" in error
    assert "exit code 1: RuntimeError: a defect; starting it again" in error


def test_a_run_that_only_those_with_rows_need_is_no_work(place, capsys):
    (run,) = read_table(write_table(place.config, MAZE)).runs
    row = dict.fromkeys(rows.COLUMNS, "") | {"command": run.text, "score": "1", "task": "walk", "updates": "1"}
    rows.write_csv(place.config.with_suffix(".csv"), rows.COLUMNS, [row])
    place.run("--dry_run")
    out = capsys.readouterr().out
    assert "has its rows" in out and "pretraining" not in out and "missing" not in out and "0 runs left" in out
    place.run()
    assert not place.ledger("start")


# -- tables ----------------------------------------------------------------------------------------------------------


def test_every_row_counts():
    for path in sorted((ROOT / "results").glob("*.yaml")):
        table, found = read_table(path), rows.read_csv(path.with_suffix(".csv"))
        counted = [row for run in table.runs for row in rows.Scores([found]).of(run)]
        assert len(counted) == len(found), f"{table.csv}: remove the rows of other commands and defaults; git has them"


def test_the_pages_are_as_the_scores_say():
    for page, text in tables.page_texts(ROOT).items():
        assert page.read_text() == text, f"{page}: run `python run_comparison.py --tables`"


def test_a_cell_at_a_glance_that_no_table_has_is_refused(tmp_path):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "results").symlink_to(ROOT / "results")
    cell = {"labels": ["a", "b"], "table": "walker_main", "row": ["BC"], "column": "crawl"}
    text = yaml.safe_dump({"title": "t", "header": ["data", "method"], "cells": [cell]})
    (tmp_path / "comparison" / "glance.yaml").write_text(text)
    with pytest.raises(UserError, match="has no cell BC, crawl"):
        tables.render_glance(tmp_path)


def filled(place: Place, **layout):
    write_table(place.config, AGENT, BC, seeds=[0, 1, 2], layout=LAYOUT | layout, title="Title.")
    place.run("--jobs", "2", "--only", "random")
    return read_table(place.config), place.rows()


def test_a_table_shows_what_is_there_and_how_to_fill_the_rest(place):
    table, found = filled(place, data_row=True, spread=True)
    lines = tables.render(table, rows.Scores([found])).splitlines()
    assert lines[0].startswith("Title. Last checkpoints of seeds 0, 1, 2; 20 updates; 1 or 2 episodes each; mean ± 95%")
    assert "commit 0123456" in lines[0]
    assert lines[2:] == [
        "| method | walk | run |",
        "|---|---:|---:|",
        "| the data | 20.0 | - |",
        "| random | 12.0 ± 2.5 [1.0] | 1.0 [0.0] |",
        "| BC | - | - |",
        "",
        "3 of 6 runs are there; `python run_comparison.py --config results/first.yaml --jobs 2` adds the rest.",
    ]


def test_other_settings_other_data_and_other_precision_do_not_mix(place):
    table, found = filled(place)
    other = [row | {"command": row["command"].replace("--episodes 2", "--episodes 9"), "score": "999"} for row in found]
    assert "999" not in tables.render(table, rows.Scores([found + other]))
    for name in ("data_sha256", "rows", "data_score", "precision"):
        mixed = [row | {name: "x" if row["seed"] == "0" else "y"} for row in found]
        with pytest.raises(UserError, match=f"differ in {name}"):
            tables.render(table, rows.Scores([mixed]))


def test_pages_are_rewritten_between_markers(place, capsys):
    filled(place)
    (place.folder / "docs").mkdir()
    page, other = place.folder / "README.md", place.folder / "docs" / "a.md"
    page.write_text("before\n\n<!-- table: first -->\nold\n<!-- /table -->\n\nafter `<!-- table: x -->`\n")
    other.write_text("nothing\n")
    tables.rewrite_pages(place.folder)
    text = page.read_text()
    assert (
        text.startswith("before\n\n<!-- table: first -->\nTitle.") and "old" not in text and "| random | 12.0" in text
    )
    assert text.endswith("adds the rest.\n<!-- /table -->\n\nafter `<!-- table: x -->`\n")
    capsys.readouterr()
    tables.rewrite_pages(place.folder)
    assert capsys.readouterr().out == "all tables are as results/ says\n" and page.read_text() == text
    page.write_text("<!-- table: second -->\n<!-- /table -->\n")
    with pytest.raises(UserError, match="table second: there is no"):
        tables.rewrite_pages(place.folder)
    page.write_text("<!-- table: first -->\n")
    with pytest.raises(UserError, match="has no <!-- /table -->"):
        tables.rewrite_pages(place.folder)

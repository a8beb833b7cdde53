"""Results of a comparison: statistics against slow oracles, tables, and the page in a browser."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import d4rl_utils
from comparison import charts, report
from comparison import statistics as stats
from comparison.groups import MODES, ComparedRun, collect
from comparison.report import write_report
from comparison.statistics import bootstrap_interval, iqm, mean
from d4rl_utils import is_official
from dataset_files import official_ids
from runs.metrics import EpisodeLog, MetricLogger
from utils import UserError

OFFICIAL = {"hopper-medium-v2": 999_906, "walker2d-medium-v2": 999_995, "local/hopper-medium-v2": 100_000}
STEPS = (100, 200, 300)


def make_run(
    root: Path, dataset: str, weights: tuple, seed: int, score: float = 50.0, variant=0, **more
) -> ComparedRun:
    """A finished run's directory with invented figures: actor i scores `score` + seed + gain i, stochastic one less.

    The gain is 2; the evaluation in the middle of training is 7 better. Further arguments go to finished.json and
    `chain` to the diagnostics.
    """
    name = "_".join(f"{weight:g}" for weight in weights)
    run_dir = root / dataset / f"w2_{name}" / f"seed_{seed}"
    (run_dir / "training").mkdir(parents=True)
    chain = {"q": 5.0, "spread": 0.1, "energy": -0.5, "energy_before": -0.3, "energy_fell": 1.0, "distance": 0.02}
    chain |= {"floor": 0.004, "blur_to_spread": 0.5, "q_gradient": 1.0} | more.pop("chain", {})
    gain = more.pop("gain", 2)
    policies = [(actor, mode) for actor in range(len(weights)) for mode in MODES]
    centre = np.array([[score + seed + gain * actor - (mode == "stochastic")] for actor, mode in policies])
    logger = MetricLogger(run_dir / "training", tensorboard=False)
    episodes = EpisodeLog(run_dir / "training" / "evaluations.csv")
    for number, step in enumerate(STEPS):
        figures = {"critic_loss": 1.0, "q_data": 5.0}
        for actor in range(len(weights)):
            figures |= {f"chain/actor_{actor}/{name}": value for name, value in chain.items()}
        scores = centre + 7 * (number == 1) + np.array([-1.0, 1.0])
        episodes.add(step, policies, scores, np.full(scores.shape, 10), scores)
        for (actor, mode), row in zip(policies, scores, strict=True):
            figures[f"eval/actor_{actor}/{mode}/score"] = float(row.mean())
        logger.log(step, figures)
    scores = centre + np.array([-3.0, -1.0, 1.0, 3.0])
    episodes.add(STEPS[-1], policies, scores, np.full(scores.shape, 10), scores, "final")
    logger.close()
    transitions = OFFICIAL.get(dataset, 1000)
    summary = {"data_score": 40.0, "steps": STEPS[-1], "transitions": transitions, "seed": seed, "dataset": dataset}
    (run_dir / "finished.json").write_text(json.dumps(summary | more))
    return ComparedRun(dataset, weights, variant, seed, run_dir, True, "", 12.0)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """One test draws them."""
    monkeypatch.setattr(report, "dataset_chart", lambda groups: '<img src="data:,">')


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[ComparedRun]:
    """Two official datasets and one local, three actors, three seeds."""
    folder = tmp_path_factory.mktemp("finished")
    return [
        make_run(folder, dataset, (0.4, 1.0, third), seed, score, variant)
        for dataset, score in (
            ("hopper-medium-v2", 60.0),
            ("walker2d-medium-v2", 80.0),
            ("local/hopper-medium-v2", 30.0),
        )
        for variant, third in enumerate((0.5, 2.0))
        for seed in range(3)
    ]


@pytest.fixture
def comparison(finished, tmp_path) -> list[ComparedRun]:
    """Those, and one more run that has failed."""
    failed = ComparedRun("hopper-medium-v2", (0.4, 1.0, 0.5), 0, 3, tmp_path / "x", False, "exit code 2: mean Q <is> 9")
    return [*(replace(run) for run in finished), failed]


# --- statistics ------------------------------------------------------------------------------------------------------


def slow_iqm(scores: list[float]) -> float:
    """A quarter of the scores removed one by one from either end."""
    kept = sorted(scores)
    for _ in range(len(scores) // 4):
        kept.remove(min(kept))
        kept.remove(max(kept))
    return sum(kept) / len(kept)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 45])
def test_iqm_is_the_mean_of_the_middle_half(count):
    scores = np.random.default_rng(count).normal(size=count) ** 3
    assert iqm(scores) == pytest.approx(slow_iqm(list(scores)), abs=1e-12)
    scipy_stats = pytest.importorskip("scipy.stats")
    assert iqm(scores) == pytest.approx(scipy_stats.trim_mean(scores, 0.25), abs=1e-12)  # rliable's definition


@pytest.mark.parametrize("statistic,slow", [(mean, lambda s: sum(s) / len(s)), (iqm, slow_iqm)])
def test_bootstrap_equals_loops_with_the_same_generator(statistic, slow):
    """Every dataset is drawn by itself, then all drawn scores are pooled."""
    source = np.random.default_rng(3)
    strata = [source.normal(size=5), 10 + source.normal(size=3), source.exponential(size=4)]
    draws, generator = 200, np.random.default_rng(7)
    chosen = [generator.integers(len(scores), size=(draws, len(scores))) for scores in strata]
    values = []
    for draw in range(draws):
        pooled = [scores[place] for scores, rows in zip(strata, chosen, strict=True) for place in rows[draw]]
        values.append(slow(pooled))
    values.sort()
    expected = []
    for share in (0.025, 0.975):  # linear interpolation between order statistics
        place = share * (draws - 1)
        below = math.floor(place)
        expected.append(values[below] + (place - below) * (values[below + 1] - values[below]))
    assert bootstrap_interval(strata, statistic, draws, seed=7) == pytest.approx(expected, abs=1e-12)


def test_gains_have_students_interval():
    low, high = stats.paired_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)  # t of a table, 2 df
    assert all(map(math.isnan, stats.paired_interval(np.array([1.0]))))


def test_two_seeds_have_a_range_that_no_draw_leaves():
    """Of one dataset it is the two scores, of several the statistic of all lowest and of all highest ones."""
    strata = [np.array([3.0, 5.0]), np.array([10.0, 20.0])]
    assert stats.score_range(strata[:1], mean) == (3.0, 5.0)
    assert stats.score_range(strata, iqm) == (6.5, 12.5)
    generator = np.random.default_rng(0)
    draws = [[*generator.choice(strata[0], 2), *generator.choice(strata[1], 2)] for _ in range(500)]
    statistics = [slow_iqm(draw) for draw in draws]
    assert min(statistics) == 6.5 and max(statistics) == 12.5


@pytest.mark.parametrize(
    "seeds,cell",
    [(1, "52.0"), (2, "52.5 (52.0 to 53.0)"), (3, "53.0 [52.0, 54.0]"), (5, "54.0 [52.8, 55.2]")],
)
def test_a_range_of_two_seeds_does_not_look_like_an_interval(tmp_path, seeds, cell):
    (group,) = collect([make_run(tmp_path, "walker2d-medium-v2", (0.4, 1.0), seed) for seed in range(seeds)])
    table = report.last_actor_table([group])
    assert dict(zip(table.header, table.rows[0], strict=True))["mean [95%]"] == cell
    assert ("range of two seeds" in report.terminal_text([], [group])) is (seeds == 2)


def test_curves_stand_where_every_seed_has_a_value(tmp_path):
    runs = [make_run(tmp_path, "hopper-medium-v2", (0.4,), seed) for seed in range(2)]
    (group,) = collect(runs)
    column = "eval/actor_0/deterministic/score"
    group.results[1].metrics[column][0] = math.nan
    curve = stats.across_seeds([result.metrics for result in group.results], column)
    assert curve["x"].tolist() == [200, 300] and curve["mean"].tolist() == [57.5, 50.5]
    assert curve["low"].tolist() == [57.0, 50.0] and curve["high"].tolist() == [58.0, 51.0]
    assert np.isnan(stats.across_seeds([group.results[0].metrics], column)["low"]).all()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_results_csv_has_a_row_for_each_run_actor_and_mode(comparison, tmp_path):
    write_report(comparison, tmp_path / "results", "config.yaml")
    with open(tmp_path / "results" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 * 3 * 2
    keys = [tuple(row[name] for name in ("dataset", "w2_weights", "seed", "actor", "mode")) for row in rows]
    assert len(set(keys)) == len(rows)
    row = rows[keys.index(("walker2d-medium-v2", "0.4 1 2", "2", "1", "stochastic"))]
    assert float(row["score"]) == 80 + 2 + 2 - 1 and float(row["best_score_in_training"]) == 83 + 7
    assert (row["step"], row["best_step"], row["episodes"], row["seconds"]) == ("300", "200", "4", "12.0")
    assert (row["data_score"], row["official_data"], row["actors"]) == ("40.0", "True", "3")
    local = next(row for row in rows if row["dataset"].startswith("local/"))
    assert local["official_data"] == "False"


def test_the_table_gives_statistics_over_seeds_beside_published_figures(comparison, tmp_path):
    table = report.last_actor_table(collect(comparison))
    rows = {row[:2]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    row = rows["walker2d-medium-v2", "0.4 1 2"]
    assert row["mean [95%]"] == "85.0 [84.0, 86.0]"
    assert (row["seeds"], row["episodes"], row["data"], row["minutes"]) == ("3", "12", "40.0", "0.2")
    assert row["TD3+BC"] == "82.7" and row["POGO paper, 1 / 2 steps"] == "85.7 / 86.7"


def test_the_terminal_gets_a_table_that_fits_it(comparison, tmp_path):
    """Aligned columns of at most 100 characters, the same figures as the wide table, and the best actor's number."""
    long = "local/halfcheetah-medium-replay-v2"
    comparison += [make_run(tmp_path, long, (0.4, 0.5, 0.25), seed, 100.0) for seed in range(3)]
    text = write_report(comparison, tmp_path / "out", "config.yaml")
    lines = text.split("\n")
    assert max(map(len, lines)) <= 100 and "|" not in text and "TD3+BC" not in text
    header, row = lines[0], next(line for line in lines if re.match("walker2d-medium-v2 +0.4 1 2 ", line))
    assert header.split() == ["dataset", "w2_weights", "seeds", "data", "mean", "[95%]", "best"]
    assert row.split() == ["walker2d-medium-v2", "0.4", "1", "2", "3", "40.0", "85.0", "[84.0,", "86.0]", "2"]
    assert len(row) == len(header) and row.index("0.4") == header.index("w2_weights")
    assert any(line.startswith("2 MuJoCo datasets") for line in lines)


def test_published_figures_stand_beside_official_data_alone(tmp_path):
    """A local id has none, nor has a small file under an official name, which says so."""
    local = make_run(tmp_path, "local/hopper-medium-v2", (0.4,), 0)
    small = make_run(tmp_path, "hopper-medium-v2", (0.4,), 0, transitions=100_000)
    true = make_run(tmp_path, "walker2d-medium-v2", (0.4,), 0)
    table = report.last_actor_table(collect([local, small, true]))
    names = ["local/hopper-medium-v2", "hopper-medium-v2 (not the official file)", "walker2d-medium-v2"]
    assert [row[0] for row in table.rows] == [*names, "2 MuJoCo datasets"]
    assert [row[table.header.index("IQL")] for row in table.rows] == ["–", "–", "80.9", "–"]
    assert "IQL" not in report.last_actor_table(collect([local, small])).header


def test_every_published_row_names_an_official_dataset():
    methods, scores = report.published()
    assert set(scores) <= set(official_ids(d4rl_utils.DATASETS))
    for dataset, cells in scores.items():
        assert len(cells) == len(methods)
        assert is_official(dataset, 2_000_000) and not is_official(dataset, 100_000)


def test_a_suite_pools_datasets_of_the_same_place_and_seeds(comparison, tmp_path):
    """hopper has a fourth seed at the first weights, so walker2d, with three, is left out there."""
    comparison[-1] = make_run(tmp_path, "hopper-medium-v2", (0.4, 1.0, 0.5), 3)
    groups = collect(comparison)
    ((name, weights, members),) = report.suites(groups)
    assert (name, weights) == ("2 MuJoCo datasets", "0.4 1 2")
    assert [group.run.dataset for group in members] == ["hopper-medium-v2", "walker2d-medium-v2"]
    table = report.last_actor_table(groups)
    (row,) = (row for row in table.rows if row[0] == name)
    cells = dict(zip(table.header, row, strict=True))
    assert row[1:3] == ("0.4 1 2", "75.0 [74.3, 75.7]") and cells["episodes"] == "24"
    assert cells["TD3+BC"] == f"{(60.4 + 82.7) / 2:.1f}" and cells["POGO paper, 1 / 2 steps"] == "75.2 / 80.8"


def test_algorithms_are_pooled_apart(tmp_path):
    runs = []
    for dataset in ("hopper-medium-v2", "walker2d-medium-v2"):
        for algorithm, score in (("pogo", 50.0), ("td3_bc", 60.0)):
            run = make_run(tmp_path / algorithm, dataset, (0.4, 1.0), 0, score)
            run.algorithm = algorithm
            runs.append(run)
    groups = collect(runs)
    assert [group.run.label for group in groups] == ["0.4 1", "td3_bc 0.4 1"] * 2
    assert [weights for _, weights, _ in report.suites(groups)] == ["0.4 1", "td3_bc 0.4 1"]
    means = [row[2] for row in report.last_actor_table(groups).rows]
    assert means == ["52.0", "62.0", "52.0", "62.0", "52.0", "62.0"]


def test_the_highest_of_training_cannot_be_taken_for_the_result(comparison, tmp_path):
    """It stands last, apart from the results, under a header that says so, in a softer colour, with a note."""
    table = report.actor_table(collect(comparison))
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert len(rows) == 6 * 3 * 2 and table.header[-1] == report.BEST and "no result" in table.header[-1]
    assert (rows[0]["actor"], rows[0]["mode"], rows[0][report.BEST]) == ("0", "deterministic", "68.0")
    assert rows[0]["mean [95%]"] == "61.0 [60.0, 62.0]"  # of the last checkpoint
    cells = re.findall(r'<td class="(\w+(?: soft)?)">([^<]*)', table.html())[: len(table.header)]
    assert [text for kind, text in cells if "soft" in kind] == ["68.0"]
    write_report(comparison, tmp_path / "out", "x")
    for name in ("results.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert text.index("Actor by actor") < text.index(report.NO_RESULT) < text.index("What each step")


@pytest.mark.parametrize(
    "chain,scores,words",
    [
        ({}, (50.0, 50.0, 50.0), "moved and helped"),
        ({"distance": 0.005}, (50.0, 50.0, 50.0), "did not move"),
        ({"distance": 1e-9, "floor": 0.0}, (50.0, 50.0, 50.0), "did not move"),
        ({"distance": 1e-3, "floor": 0.0}, (50.0, 50.0, 50.0), "moved and helped"),
        ({}, (50.0, 50.0), "too few seeds"),
    ],
)
def test_diagnostics_say_whether_a_step_moved_and_helped(tmp_path, chain, scores, words):
    gains = (2.1, 1.9, 2.0)  # of each seed
    runs = [
        make_run(tmp_path, "hopper-medium-v2", (0.4, 1.0), seed, score, chain=chain, gain=gain)
        for seed, (score, gain) in enumerate(zip(scores, gains, strict=False))
    ]
    table = report.diagnostics_table(collect(runs))
    first, second = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert words in second["step"] and second["score gained [95%]"].startswith("+2.0")
    assert first["score gained [95%]"].startswith(f"{np.mean(scores) + np.mean(range(len(scores))) - 40:+.1f}")
    assert (first["energy before"], first["energy after"], first["fell, % of rows"]) == ("-0.300", "-0.500", "100")


def test_verdicts_follow_the_interval_of_the_gain():
    say = report.verdict
    assert say(1, 1.0, 0.1, np.array([-2.0, -1.8, -2.2])) == "moved and hurt"
    assert say(1, 1.0, 0.1, np.array([-2.0, 4.0, 1.0])) == "moved, no clear gain"
    assert say(0, 0.0, 0.0, np.array([1.9, 2.1, 2.0])) == "moved and helped"  # the first has no floor
    assert say(1, 1.0, 0.1, np.array([1.9, 2.0])) == "moved; too few seeds to say more"
    # Scores that move in steps are alike by chance.
    assert say(1, 1.0, 0.1, np.array([4.0, 4.0, 4.0])) == "moved, no clear gain"


def test_seeds_of_other_data_are_not_pooled(tmp_path):
    first = make_run(tmp_path, "hopper-medium-v2", (0.4, 1.0), 0)
    for more in ({"data_score": 41.0}, {"transitions": 999}):
        second = make_run(tmp_path / str(more), "hopper-medium-v2", (0.4, 1.0), 1, **more)
        with pytest.raises(UserError, match=f"seed_1: trained on other data .*seed_0 .{next(iter(more))}"):
            collect([first, second])


def test_unfinished_runs_are_listed_with_their_reason(comparison, tmp_path):
    text = write_report(comparison, tmp_path / "out", "config.yaml")
    assert "\nhopper-medium-v2, w2 0.4 1 0.5 seed 3: exit code 2: mean Q <is> 9" in text
    row = "| hopper-medium-v2 | w2 0.4 1 0.5 seed 3 | exit code 2: mean Q <is> 9 |"
    assert row in (tmp_path / "out/results.md").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert "18 of 19 runs finished" in page and "mean Q &lt;is&gt; 9" in page and "<is>" not in page


def test_a_damaged_run_is_listed_and_stops_nothing(comparison, tmp_path):
    for number in (0, 1):
        comparison[number].run_dir = shutil.copytree(comparison[number].run_dir, tmp_path / str(number))
    (comparison[0].run_dir / "training" / "evaluations.csv").write_text("no such table\n")
    (comparison[1].run_dir / "finished.json").write_text("{}")
    write_report(comparison, tmp_path / "out", "config.yaml")
    text = (tmp_path / "out/results.md").read_text()
    assert text.count("evaluations.csv") == 1 and text.count("finished.json") == 1
    assert not comparison[0].finished and comparison[2].finished


def test_nothing_finished_still_makes_a_report(tmp_path):
    runs = [ComparedRun("hopper-medium-v2", (0.4,), 0, 0, tmp_path / "x", False)]
    assert write_report(runs, tmp_path / "out", "config.yaml").startswith("No run is finished yet")
    assert "No run is finished yet" in (tmp_path / "out/report.html").read_text()
    assert "not started" in (tmp_path / "out/results.md").read_text()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_has_a_chart_a_dataset(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "dataset_chart", charts.dataset_chart)
    write_report(comparison, tmp_path, "config.yaml")
    text = (tmp_path / "report.html").read_text()
    assert (text.count("<img"), text.count("<table>"), text.count("</table>")) == (3, 4, 4) and "<script" not in text
    bare = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"url\(|@import|\bnan\b|(?:src|href)=\"(?!data:)", bare)


def test_a_chart_that_is_there_is_not_drawn_again(comparison, tmp_path, monkeypatch):
    kept, drawn = {}, []
    draw = report.dataset_chart
    monkeypatch.setattr(report, "dataset_chart", lambda groups: drawn.append(groups[0].run.dataset) or draw(groups))
    write_report(comparison[1:], tmp_path, "c.yaml", kept)
    write_report(comparison, tmp_path, "c.yaml", kept)
    assert drawn == ["hopper-medium-v2", "walker2d-medium-v2", "local/hopper-medium-v2", "hopper-medium-v2"]

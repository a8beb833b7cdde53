"""Results of a comparison: statistics against slow oracles, tables, and the page."""

import base64
import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest

import d4rl_utils
from comparison import report
from comparison.registry import Run, Table
from comparison.report import write_report
from comparison.rows import COLUMNS, Scores
from comparison.statistics import bootstrap_interval, cell_text, iqm, mean
from d4rl_utils import is_official

OFFICIAL = {"hopper-medium-v2": 999_906, "walker2d-medium-v2": 999_995, "local/hopper-medium-v2": 100_000}
CHAIN = {"q": 5.0, "spread": 0.1, "energy": -0.5, "energy_before": -0.3, "energy_fell": 1.0, "distance": 0.02}
CHAIN |= {"floor": 0.004, "blur_to_spread": 0.5}


class Made:
    """A comparison with invented figures: actor i scores `score` + seed + gain i, with noise one less."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.runs = folder, [], []

    def add(self, dataset: str, weights: tuple, seed: int, score=50.0, gain=2.0, algorithm="pogo", **more) -> Run:
        """A finished run; `more` are columns of its rows."""
        label, multi = " ".join([algorithm, *(f"{w:g}" for w in weights)]), "algorithms.offline.pogo_multi_main"
        folder = self.folder / dataset / label.replace(" ", "_") / f"seed_{seed}"
        (folder / "training").mkdir(parents=True)
        curves = {f"chain/actor_{actor}/{name}": v for actor in range(len(weights)) for name, v in CHAIN.items()}
        curves |= {f"eval/actor_{actor}/deterministic/score": score + actor for actor in range(len(weights))}
        lines = [",".join([str(step), *map(str, curves.values())]) for step in (100, 200)]
        (folder / "training" / "metrics.csv").write_text("\n".join([",".join(["step", *curves]), *lines, ""]))
        flags = ("--env", dataset, "--w2_weights", *label.split()[1:])
        flags += () if algorithm == "pogo" else ("--algorithm", algorithm)
        command, shown = "pogo_main" if algorithm == "pogo" else multi, {"row": (dataset, label), "folder": folder}
        run = Run("", label, command, flags, dataset, seed, column="actor {actor}", **shown)
        shared = dict.fromkeys(COLUMNS, "") | {"dataset": dataset, "rows": str(OFFICIAL.get(dataset, 1000))}
        shared |= {"method": label, "seed": str(seed), "command": run.text, "data_score": "40", "updates": "200"}
        for actor in range(len(weights)):
            for mode in ("deterministic", "stochastic"):
                value = score + seed + gain * actor - (mode == "stochastic")
                own = {"actor": str(actor), "mode": mode, "score": str(value), "episodes": "4", **more}
                self.rows.append(shared | own)
        self.runs.append(run)
        return run

    @property
    def table(self) -> Table:
        actors = max(len(run.method.split()) - 1 for run in self.runs)
        layout = {"header": ["dataset", "chain"], "columns": [f"actor {actor}" for actor in range(actors)]}
        layout |= {"where": {"mode": "deterministic"}, "data_column": True}
        return Table("c", Path("c.yaml"), "Scores of c.yaml.", self.runs, layout)

    def chains(self) -> list[report.Chain]:
        return report.collect(self.runs, Scores([self.rows]))

    def grid(self) -> list[dict]:
        """The table of scores with published ones."""
        grid = report.scores_grid(self.table, Scores([self.rows]), self.chains())[1]
        return [dict(zip(grid.header, row, strict=True)) for row in grid.rows]

    def steps(self) -> list[dict]:
        """The table of what each step did."""
        grid = report.steps_grid(self.chains())
        return [dict(zip(grid.header, row, strict=True)) for row in grid.rows]

    def write(self, output: Path) -> str:
        return write_report(self.table, self.rows, dict.fromkeys(self.runs, "exit 2: Q <is> 9"), output)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch, request):
    """One test draws them."""
    if "page_fetches" not in request.node.name:
        monkeypatch.setattr(report, "chart_png", lambda title, chains: title.encode())


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(tmp_path / "runs")


@pytest.fixture
def comparison(made) -> Made:
    """Two official datasets and one local, two chains of two actors, three seeds, and one run that has failed."""
    for dataset, score in (("hopper-medium-v2", 60.0), ("walker2d-medium-v2", 80.0), ("local/hopper-medium-v2", 30.0)):
        for second in (0.5, 2.0):
            for seed in range(3):
                made.add(dataset, (0.4, second), seed, score)
    made.add("hopper-medium-v2", (0.4, 0.5), 3)
    del made.rows[-4:]
    return made


# --- statistics ------------------------------------------------------------------------------------------------------


def slow_iqm(scores: list[float]) -> float:
    """A quarter of the scores removed one by one from either end."""
    kept = sorted(scores)
    for _ in range(len(scores) // 4):
        kept.remove(min(kept))
        kept.remove(max(kept))
    return sum(kept) / len(kept)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 45])
def test_iqm_is_the_mean_of_the_middle_half(count):
    scores = np.random.default_rng(count).normal(size=count) ** 3
    assert iqm(scores) == pytest.approx(slow_iqm(list(scores)), abs=1e-12)


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


def test_a_cell_claims_no_more_than_its_seeds_allow():
    assert cell_text([10.0], 3) == "10.0 *"
    assert cell_text([10.0, 12.0], 3) == "11.0 (10.0 to 12.0)"
    assert cell_text([10.0, 11.0, 12.0], 3) == "11.0 ± 2.5"  # 4.3027 * 1 / sqrt(3)
    assert cell_text([10.0, 11.0, 12.0], 5, 2) == "11.00 ± 2.48 (3 of 5 seeds)"
    assert cell_text([1.0, 2.0, 3.0], 3, sign="+") == "+2.0 ± 2.5"
    assert cell_text([4.0, 4.0, 4.0], 4, sign="+") == "+4.0 (3 of 4 seeds)"  # alike by chance, not certain


# --- tables ----------------------------------------------------------------------------------------------------------


def test_results_csv_has_a_row_for_each_run_actor_and_mode(comparison, tmp_path):
    comparison.write(tmp_path)
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    keys = [tuple(row[name] for name in ("dataset", "w2_weights", "seed", "actor", "mode")) for row in rows]
    assert len(rows) == len(set(keys)) == 18 * 2 * 2
    row = rows[keys.index(("walker2d-medium-v2", "0.4 2", "2", "1", "stochastic"))]
    expected = {"score": "83.0", "algorithm": "pogo", "official_data": "True", "updates": "200", "data_score": "40"}
    assert expected.items() <= row.items()
    assert {row["official_data"] for row in rows if row["dataset"].startswith("local/")} == {"False"}


def test_the_table_gives_every_actor_beside_published_figures_and_means_of_suites(comparison):
    rows = comparison.grid()
    by_label = {(row["dataset"], row["chain"]): row for row in rows}
    row = by_label["walker2d-medium-v2", "pogo 0.4 2"]
    assert (row["the data"], row["actor 0"], row["actor 1"]) == ("40.0", "81.0 ± 2.5", "83.0 ± 2.5")
    assert row["TD3+BC"] == "82.7" and row["POGO paper, 1 / 2 steps"] == "85.7 / 86.7"
    assert by_label["hopper-medium-v2", "pogo 0.4 0.5"]["actor 0"] == "61.0 ± 2.5 (3 of 4 seeds)"
    suite, middle = by_label["2 MuJoCo datasets", "pogo 0.4 2"], by_label["2 MuJoCo datasets, IQM", "pogo 0.4 2"]
    assert suite["actor 1"] == "73.0 [72.3, 73.7]" and middle["actor 1"].startswith("73.0 [")
    assert suite["TD3+BC"] == f"{(60.4 + 82.7) / 2:.1f}" and suite["POGO paper, 1 / 2 steps"] == "75.2 / 80.8"
    assert middle["TD3+BC"] == by_label["local/hopper-medium-v2", "pogo 0.4 2"]["TD3+BC"] == "–"


def test_a_suite_leaves_out_a_dataset_of_fewer_seeds(comparison):
    comparison.add("hopper-medium-v2", (0.4, 0.5), 4)
    ((name, weights, members),) = report.suites(comparison.chains())
    assert (name, weights) == ("2 MuJoCo datasets", "pogo 0.4 2")
    assert [chain.label[0] for chain in members] == ["hopper-medium-v2", "walker2d-medium-v2"]


def test_algorithms_are_pooled_apart_and_other_weights_named_by_their_place(made):
    for dataset, weight in (("hopper-medium-v2", 0.5), ("walker2d-medium-v2", 0.7)):
        made.add(dataset, (0.4, weight), 0)
        made.add(dataset, (0.4, 1.0), 0, 60.0, algorithm="td3_bc")
    assert [label for _, label, _ in report.suites(made.chains())] == ["pogo, list 1 of each", "td3_bc 0.4 1"]
    assert [row["actor 1"] for row in made.grid()][4:] == ["52.0 *", "52.0 *", "62.0 *", "62.0 *"]


def test_published_figures_stand_beside_official_data_alone(made):
    """A local id has none, nor has a small file under an official name, which says so."""
    made.add("local/hopper-medium-v2", (0.4,), 0)
    made.add("hopper-medium-v2", (0.4,), 0, rows="100000")
    assert "IQL" not in made.grid()[0]
    made.add("walker2d-medium-v2", (0.4,), 0)
    names = ["local/hopper-medium-v2", "hopper-medium-v2 (not the official file)", "walker2d-medium-v2"]
    assert [(row["dataset"], row["IQL"]) for row in made.grid()][:3] == list(
        zip(names, ["–", "–", "80.9"], strict=True)
    )


def test_every_published_row_names_an_official_dataset():
    methods, scores = report.published()
    assert set(scores) <= set(d4rl_utils.OFFICIAL_IDS)
    for dataset, cells in scores.items():
        assert len(cells) == len(methods)
        assert is_official(dataset, 2_000_000) and not is_official(dataset, 100_000)


def test_what_each_step_did(made, monkeypatch):
    monkeypatch.setitem(CHAIN, "blur_to_spread", 1.04)  # judged by itself, and not by its rounded text
    for seed, gain in enumerate((2.1, 1.9, 2.0)):
        made.add("hopper-medium-v2", (0.4, 1.0), seed, gain=gain)
    first, second = made.steps()
    assert second["step"] == "moved and helped" and second["score gained"] == "+2.0 ± 0.2"
    assert second["blur / spread"] == "1 ⚠"
    assert first["score gained"] == "+11.0 ± 2.5" and (first["its floor"], second["its floor"]) == ("–", "0.004")
    assert [first[name] for name in ("energy before", "energy after", "fell in rows")] == ["-0.300", "-0.500", "100%"]


def test_one_actor_alone_has_no_steps(made, tmp_path):
    made.add("hopper-medium-v2", (0.0,), 0, algorithm="td3_bc")
    assert made.steps() == []
    made.write(tmp_path)
    assert "What each step" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("actor", "distance", "floor", "gains", "words"),
    [
        (1, 0.005, 0.004, (2.1, 1.9, 2.0), "did not move"),
        (1, 1e-9, 0.0, (2.1, 1.9, 2.0), "did not move"),
        (1, 1e-3, 0.0, (2.1, 1.9, 2.0), "moved and helped"),
        (0, 0.0, math.nan, (2.1, 1.9, 2.0), "moved and helped"),  # the first has no floor
        (1, 1.0, 0.1, (-2.0, -1.8, -2.2), "moved and hurt"),
        (1, 1.0, 0.1, (-2.0, 4.0, 1.0), "moved, no clear gain"),
        (1, 1.0, 0.1, (4.0, 4.0, 4.0), "moved, no clear gain"),  # scores that move in steps are alike by chance
        (1, 1.0, 0.1, (1.9, 2.0), "moved; too few seeds to say more"),
    ],
)
def test_verdicts_follow_the_distance_and_the_interval_of_the_gain(actor, distance, floor, gains, words):
    assert report.verdict(actor, distance, floor, np.array(gains)) == words


def test_data_without_a_score_is_the_same_for_every_seed(made, tmp_path):
    for seed in range(2):
        made.add("hopper-medium-v2", (0.4, 1.0), seed, data_score="nan")
    assert "52.5 (52.0 to 53.0)" in made.write(tmp_path)


# --- the page --------------------------------------------------------------------------------------------------------


def test_runs_without_a_result_are_told_with_their_reason(comparison, tmp_path):
    text = comparison.write(tmp_path)
    assert "\nhopper-medium-v2  pogo 0.4 0.5 seed 3  exit 2: Q <is> 9" in text and "TD3+BC" not in text
    assert re.search(r"^walker2d-medium-v2 +pogo 0.4 2 +40\.0 +81\.0 ± 2\.5 +83\.0 ± 2\.5$", text, re.M), text
    row = "| hopper-medium-v2 | pogo 0.4 0.5 seed 3 | exit 2: Q <is> 9 |"
    assert row in (tmp_path / "results.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "exit 2: Q &lt;is&gt; 9" in page and "<is>" not in page


def test_the_page_fetches_nothing_and_holds_its_pictures(made, tmp_path):
    made.add("hopper-medium-v2", (0.4, 1.0), 0)
    made.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert (text.count("<table>"), text.count("</table>")) == (2, 2) and "<script" not in text
    assert base64.b64decode(re.search(r"base64,([^\"]*)", text)[1]).startswith(b"\x89PNG")
    bare = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"url\(|@import|\bnan\b|(?:src|href)=\"(?!data:)", bare)

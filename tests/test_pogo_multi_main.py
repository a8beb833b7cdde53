"""The command that trains a chain over any offline algorithm: outputs, settings, resume, bad input."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import digest, error_line, short_chain_episodes

import make_dataset
import run_comparison
from algorithms.offline import pogo_multi_main
from algorithms.offline.pogo_multi_main import ALGORITHMS, MultiRun, find_config
from offline_data import load_transitions
from policy import Policy
from runs import plots
from runs.directory import load_checkpoint
from runs.metrics import read_episodes, read_metrics
from runs.run import data_values
from utils import UserError

DATASET = "local/hopper-medium-v2"
TINY = {
    **{"env": DATASET, "max_timesteps": 8, "eval_freq": 4, "log_freq": 2, "n_episodes": 2, "final_runs": 2},
    **{"hidden_dim": 8, "batch_size": 8, "eval_workers": 0, "device": "cpu"},
}
SMALL = {"sac_n": {"num_critics": 3}, "edac": {"num_critics": 3}, "cql": {"cql_n_actions": 2}}
OUTPUTS = ("checkpoints/last.pth", "training/metrics.csv", "training/evaluations.csv", "finished.json")
exits = functools.partial(error_line, pogo_multi_main.main)


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    with short_chain_episodes(12) as patch:
        patch.setattr(MultiRun, "plot", lambda run: None)
        yield


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset.generate(DATASET, size=700, dataset_dir=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def arguments(dataset_dir):
    def build(algorithm, run_dir, *flags, **changed) -> list[str]:
        settings = TINY | SMALL.get(algorithm, {}) | {"dataset_dir": dataset_dir, "run_dir": run_dir} | changed
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return ["--algorithm", algorithm, *words, "--w2_weights", "1", "2", "--no_tensorboard", *map(str, flags)]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run of each algorithm."""
    folder = tmp_path_factory.mktemp("runs")
    for algorithm in ALGORITHMS:
        pogo_multi_main.main(arguments(algorithm, folder / algorithm))
    return folder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_logs_what_the_text_names(algorithm, finished):
    run_dir = finished / algorithm
    summary = json.loads((run_dir / "finished.json").read_text())
    assert (summary["algorithm"], summary["w2_weights"], summary["steps"]) == (algorithm, [1.0, 2.0], 8)
    metrics = read_metrics(run_dir / "training")
    assert metrics["step"] == [2, 4, 6, 8]
    for actor in (0, 1):
        for column in (f"actor_{actor}/loss", f"actor_{actor}/distance", f"chain/actor_{actor}/q"):
            assert np.isfinite(metrics[column]).all(), column
        scores = metrics[f"eval_actor_{actor}"]
        assert np.isfinite(scores).tolist() == [False, True, False, True]
        np.testing.assert_array_equal(scores, metrics[f"eval/actor_{actor}/deterministic/score"])
    rows = [row for row in read_episodes(run_dir / "training/evaluations.csv") if row["evaluation"] == "training"]
    assert len(rows) == 2 * 2 * 2 * 2


@pytest.mark.parametrize("algorithm", ["iql", "td3_bc", "sac_n"])
def test_a_run_that_is_cut_goes_on_to_the_same_bits(algorithm, finished, arguments, tmp_path, monkeypatch):
    update = MultiRun.update

    def interrupted(run):
        if run.step == 6:
            raise KeyboardInterrupt
        return update(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiRun, "update", interrupted)
        patch.setattr(MultiRun, "is_save_due", lambda run: True)  # it goes on from a row of metrics
        pogo_multi_main.main(arguments(algorithm, tmp_path / "cut"))
    pogo_multi_main.main(["--resume", "--run_dir", str(tmp_path / "cut")])  # which knows its algorithm and settings
    for name in OUTPUTS:
        assert digest(finished / algorithm / name) == digest(tmp_path / "cut" / name), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_diverging_run_stops_and_says_why(algorithm, arguments, tmp_path):
    with pytest.raises(UserError, match="(q_data|actor_0/q) is .* at update 2, beyond the limit .*; lower .*--q_limit"):
        pogo_multi_main.main(arguments(algorithm, tmp_path / "run", q_limit=1e-9))
    assert not (tmp_path / "run/finished.json").exists()


@pytest.mark.parametrize("algorithm", ["awac", "cql"])
def test_a_file_is_evaluated_as_its_run_evaluated_it(algorithm, finished, capsys, tmp_path):
    path = finished / algorithm / "checkpoints/last.pth"
    figures = pogo_multi_main.main(["--evaluate", str(path), "--eval_workers", "0"])
    expected = json.loads((finished / algorithm / "finished.json").read_text())
    assert len(figures) == 4 and all(expected[name] == pytest.approx(value) for name, value in figures.items())
    assert "none.pth" in exits(capsys, "--evaluate", tmp_path / "none.pth")
    torch.save({"config": {"algorithm": "iql"}}, tmp_path / "bad.pth")
    assert "not a checkpoint of pogo_multi_main.py" in exits(capsys, "--evaluate", tmp_path / "bad.pth")


def test_no_panel_of_the_curves_is_empty(finished, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    metrics = read_metrics(finished / "iql" / "training")
    plots.plot_chain_curves(metrics, tmp_path / "curves.png", "iql", 2, 50.0)
    (figure,) = drawn
    assert all(len(axis.get_lines()) > 1 or "Critic" in axis.get_title() for axis in figure.axes)
    assert all(len(axis.get_lines()) > 0 for axis in figure.axes) and len(figure.axes) == 6


@pytest.mark.parametrize("algorithm", ["td3_bc", "sac_n"])
def test_a_policy_acts_as_its_run_does(algorithm, finished, arguments, tmp_path):
    with MultiRun(parse(arguments(algorithm, tmp_path / "run"))) as run:
        run.load(finished / algorithm / "checkpoints/last.pth")
        rows, raw = torch.from_numpy(run.data.observations[:5]), run.data.observations[:5] * run.std + run.mean
        expected = [act(rows, torch.zeros(5, run.data.action_dim)).detach().numpy() for act in run.acting()]
    for number, actions in enumerate(expected):
        policy = Policy(finished / algorithm, actor=number)
        np.testing.assert_allclose(policy.act(raw), actions, atol=1e-4)
        assert not np.array_equal(policy.act(raw, deterministic=False), policy.act(raw))
    assert not np.allclose(*expected)


@pytest.mark.parametrize("flag", ["--config", "--config_path"])
def test_settings_come_from_a_file_in_the_texts_own_spelling(flag, dataset_dir, tmp_path):
    values = TINY | {"algorithm": "iql", "w2_weights": [1.0, 2.0, 3.0], "num_actors": 3, "beta": 5.0}
    values |= {"actor_configs": [{"deterministic": False}, {"type": "gaussian"}, {"deterministic": True}]}
    (tmp_path / "iql.yaml").write_text(yaml.safe_dump(values | {"dataset_dir": str(dataset_dir)}))
    run_dir = tmp_path / "run"
    flags = [flag, str(tmp_path / "iql.yaml"), "--run_dir", str(run_dir), "--beta", "7", "--no_tensorboard"]
    pogo_multi_main.main(flags)
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert stored["actor_configs"] == ["stochastic", "gaussian", "deterministic"] and stored["beta"] == 7
    assert stored["eval_episodes"] == 2
    names = set(load_checkpoint(run_dir / "checkpoints/last.pth")["agent"]["networks"])
    assert names == {"actor", "actor_1", "actor_2", "value", "critic", "critic_target"}


def test_a_run_may_begin_with_anothers_networks(finished, arguments, tmp_path, capsys):
    path = finished / "td3_bc" / "checkpoints/last.pth"
    run = MultiRun(parse(arguments("td3_bc", tmp_path / "run", "--load_model", path, "--qf_lr", "1e-5")))
    assert float(run.agent.algorithm.optimizers["critic"].lr) == pytest.approx(1e-5)  # it keeps its own settings
    expected = load_checkpoint(path)["agent"]["networks"]["critic"]
    found = run.agent.state_dict()["networks"]["critic"]
    assert run.step == run.agent.step == 0 and all(torch.equal(found[name], expected[name]) for name in expected)
    run.close()
    assert "warning" not in capsys.readouterr().err
    assert "--load_model" in exits(capsys, *arguments("sac_n", tmp_path / "other", "--load_model", path))
    shorter = arguments("td3_bc", tmp_path / "shorter", "--load_model", path)
    del shorter[shorter.index("--w2_weights") + 2]
    line = exits(capsys, *shorter)
    assert "it has actor, " in line and ", actor_1, this run actor, " in line
    MultiRun(parse(arguments("td3_bc", tmp_path / "raw", "--load_model", path, "--no_normalize"))).close()
    assert "of another mean or spread" in capsys.readouterr().err


def parse(flags: list[str]):
    more = (None, pogo_multi_main.ALIASES, {"actor_configs": pogo_multi_main.read_actor_configs})
    return pogo_multi_main.parse_config(find_config(flags), flags, "", "--config", *more)


def test_rewards_are_scaled_as_asked(arguments, dataset_dir, tmp_path):
    plain = load_transitions(DATASET, dataset_dir)
    expected = plain.rewards * 1000 / (plain.returns.max() - plain.returns.min()) * 2 - 30
    value, _ = data_values(expected, plain.terminated, plain.truncated, 0.99)
    for algorithm, size in (("iql", -value), ("td3_bc", 2.5)):
        flags = arguments(algorithm, tmp_path / algorithm, "--normalize_reward", reward_scale=2, reward_bias=-30)
        with MultiRun(parse(flags)) as run:
            np.testing.assert_allclose(run.data.rewards, expected, rtol=1e-5, atol=1e-5)
            assert run.describe().endswith(f" rule w_i {float(f'{1.6 / 3 * size:.2g}'):g}")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_critics", "5"], "--num_critics"),  # another algorithm's
        (["--iql_tau", "2"], "--iql_tau 2"),
        (["--num_actors", "3"], "--num_actors 3: w2_weights has 2"),
        (["--actor_configs", "gaussian"], "1 for 2 weights"),
        (["--actor_configs", "gaussian", "flow"], "--actor_configs"),
        (["--buffer_size", "10"], "--buffer_size 10"),
        (["--w2_weights", "-1", "2"], "--w2_weights"),
        (["--env", "hoper-medium-v2"], "hopper-medium-v2"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_flag(flags, words, arguments, tmp_path, capsys):
    assert words in exits(capsys, *arguments("iql", tmp_path / "run"), *flags)


# What CORL sets by dataset; all else in a shipped file is the default.
CORLS = """iql_tau beta iql_deterministic tau awac_lambda num_critics eta actor_lr cql_alpha cql_lagrange
cql_max_target_backup q_n_hidden_layers normalize normalize_reward reward_scale reward_bias"""


def test_every_algorithm_has_a_whole_file_for_every_dataset():
    paths = {str(path.relative_to(run_comparison.SHIPPED)): path for path in run_comparison.SHIPPED.rglob("*.yaml")}
    assert len({name.partition("_v2_")[0] for name in paths}) == 15
    for name, path in paths.items():
        config, text = parse(["--config_path", str(path)]), yaml.safe_load(path.read_text())
        MultiRun.check(config)
        robot, _, level = config.env.removesuffix("-v2").partition("-")
        assert name == f"{robot}/{level.replace('-', '_')}_v2_{config.algorithm}.yaml"
        assert {field.name for field in dataclasses.fields(type(config).__bases__[1])} <= text.keys(), name
        usual = {field.name: field.default for field in dataclasses.fields(config)}
        changed = {key for key, value in text.items() if value != usual[key]}
        assert changed <= {*CORLS.split(), "algorithm", "env", "w2_weights", "max_timesteps"}, name
        first, second, third = config.w2_weights
        assert second == third and first == (10 if robot == "antmaze" else 0), name
        if config.algorithm == "edac":
            assert config.eta == (5 if level == "medium-expert" and robot != "hopper" else 1), name
    for algorithm, q in (("awac", 245), ("td3_bc", 2.5), ("iql", 245 * 1000 / 2569)):  # the last normalises rewards
        text = yaml.safe_load(paths[f"hopper/medium_v2_{algorithm}.yaml"].read_text())
        assert text["w2_weights"] == pytest.approx([0, 1.6 / 3 * q, 1.6 / 3 * q], rel=0.05)


# CORL's own, and what they build: stochastic actors, unless the algorithm needs a density.
SHIPPED = {
    "hopper/medium_v2_iql": ({"iql_deterministic": True, "normalize_reward": True, "tau": 0.001}, "DeterministicMLP"),
    "hopper/medium_expert_v2_iql": ({"iql_tau": 0.5, "beta": 6.0, "tau": 0.005}, "StochasticMLP"),
    "antmaze/umaze_v2_iql": ({"iql_tau": 0.9, "beta": 10.0, "normalize_reward": True}, "StochasticMLP"),
    "antmaze/large_play_v2_td3_bc": ({"normalize_reward": True, "alpha": 2.5}, "StochasticMLP"),
    "hopper/medium_v2_cql": ({"normalize_reward": True, "cql_alpha": 10.0, "actor_lr": 3e-5}, "TanhGaussianMLP"),
    "antmaze/umaze_v2_cql": ({"actor_lr": 1e-4, "cql_alpha": 5.0, "reward_scale": 10.0}, "TanhGaussianMLP"),
    "halfcheetah/medium_expert_v2_edac": ({"eta": 5.0, "num_critics": 10, "normalize": False}, "TanhGaussianMLP"),
    "walker2d/medium_v2_sac_n": ({"num_critics": 20, "max_timesteps": 3_000_000}, "TanhGaussianMLP"),
    "walker2d/medium_v2_awac": ({"awac_lambda": 1 / 3, "normalize_reward": False}, "StochasticMLP"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_has_corls_settings_and_builds_its_policies(name):
    values, policy = SHIPPED[name]
    config = parse(["--config_path", str(run_comparison.SHIPPED / f"{name}.yaml"), "--hidden_dim", "8"])
    assert {key: getattr(config, key) for key in values} == values
    agent = pogo_multi_main.build(config, (11, 3, 1.0), torch.Generator(), torch.device("cpu"))
    assert [type(actor).__name__ for actor in agent.actors] == [policy] * 3


def test_an_algorithm_must_be_named(arguments, finished, tmp_path, capsys):
    assert "--algorithm is missing" in exits(capsys, "--overwrite", "--run_dir", str(finished / "iql"))
    assert "--algorithm sac: must be one of iql" in exits(capsys, "--algorithm", "sac")
    (tmp_path / "x.yaml").write_text("algorithm: awac\nbeta: 3.0\n")
    assert "unknown key 'beta'" in exits(capsys, "--config_path", tmp_path / "x.yaml")
    line = exits(capsys, "--config_path", tmp_path / "x.yaml", "--algorithm", "iql")
    assert "--algorithm iql:" in line and "x.yaml is of awac" in line
    assert "none.yaml" in exits(capsys, "--config_path", tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("algorithm: [iql]")
    assert "must be one of iql" in exits(capsys, "--config_path", tmp_path / "x.yaml")
    line = exits(capsys, *arguments("cql", tmp_path / "run"), "--actor_configs", "stochastic", "gaussian")
    assert "cql needs a density" in line

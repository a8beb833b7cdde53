"""Every command that the README and docs show runs, in a small form: the words shown, then smaller sizes."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import make_dataset

ROOT = Path(__file__).resolve().parent.parent
DATASET = "local/pointmaze-medium-stitch-v0"
SMALLER = {
    "offline_trainer.py": f"--dataset {DATASET} --dataset_dir datasets --context_length 16 --d_model 16 --d_state 8 "
    "--hidden_dim 16 --batch_size 4 --updates_per_epoch 2 --num_epochs 1 --eval_batches 1 --eval_states 32 "
    "--eval_goals 16",
    "make_dataset.py": f"--dataset {DATASET} --num_episodes 2 --jobs 1 --dataset_dir made",
    "benchmarks/bench_encoder.py": "--device cpu --batch 2 --length 20 --d_model 64 --repeats 1",
    "benchmarks/bench_offline.py": "--device cpu --batch_size 2 --context_length 10 --d_model 32 --repeats 1",
    "benchmarks/ablate_offline.py": f"--dataset {DATASET} --num_epochs 1 --num_seeds 1 --jobs 1 --variants 'no V'",
}
SAYS = {  # what the command prints when it has done its work
    "offline_trainer.py": "value_distance_spearman",
    "make_dataset.py": DATASET.split("/")[1],
    "benchmarks/bench_encoder.py": "mamba2_vs_transformers: ours",
    "benchmarks/bench_offline.py": "offline_transitions_per_second: ours",
    "benchmarks/ablate_offline.py": "| no V |",
}


def shown_commands() -> list[str]:
    """Lines that start a script of ours, in any page's code blocks, without their comments and duplicates."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in page.read_text().splitlines():
            match = re.search(r"(?:^|&& |\s{4})python ((?:benchmarks/)?\w+\.py[^#|]*)", line)
            if match and "`" not in line:
                found.append(match.group(1).strip())
    return sorted(set(found))


def test_the_readme_shows_commands():
    assert {command.split()[0] for command in shown_commands()} == set(SMALLER)


@pytest.mark.parametrize("command", shown_commands())
def test_command_runs_in_a_small_form(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *words = shlex.split(command)
    make_dataset.generate(DATASET, num_episodes=2, dataset_dir="datasets", progress=False)
    spec = importlib.util.spec_from_file_location("command", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "command", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    if script == "benchmarks/bench_encoder.py":
        pytest.importorskip("transformers")
    module.main([*words, *shlex.split(SMALLER[script])])
    assert SAYS[script] in capsys.readouterr().out

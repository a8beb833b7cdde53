"""Every command of the README, the docs and the original texts runs in a small form: its words, then smaller sizes."""

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from running import error_line

import dmc_utils
import make_dataset
import offline_trainer
import online_trainer
import pogo_main
from algorithms.offline import pogo_multi_main
from runs import plots
from walker import train_il, train_morel

ROOT = Path(__file__).resolve().parent.parent
DATASET = "local/pointmaze-medium-stitch-v0"
OFFLINE = (
    f"--dataset {DATASET} --dataset_dir datasets --context_length 16 --d_model 16 --d_state 8 --hidden_dim 16 "
    "--batch_size 4 --updates_per_epoch 2 --num_epochs 1 --eval_batches 1 --eval_states 32 --eval_goals 16"
)
CHAIN = (
    "--env local/hopper-medium-v2 --dataset_dir datasets --max_timesteps 4 --eval_freq 2 --log_freq 2 "
    "--eval_episodes 1 --final_runs 1 --hidden_dim 8 --batch_size 8 --eval_workers 0"
)
EXPERT = "--max_timesteps 60 --start_steps 20 --snapshot_every 60 --eval_episodes 1 --card_episodes 1 --hidden_dim 8"
WALKER = "--test_episodes 1 --eval_episodes 1 --eval_workers 0 --device cpu --data_dir made"
# By the longest beginning of the command that is listed: what to add, and what it prints when it has done its work.
SMALLER = {
    "offline_trainer.py": (OFFLINE, "value_distance_spearman"),
    "online_trainer.py": (
        f"--dataset {DATASET} --dataset_dir datasets --offline_run_dir pretrained --inverse_dynamics_data offline "
        "--max_episodes 0 --fit_updates 2 --metric_updates 2 --batch_size 1 --graph_nodes 8 --eval_episodes 1",
        "eval/success_rate",
    ),
    "pogo_main.py": (CHAIN, "D4RL score"),
    "-m algorithms.offline.pogo_multi_main": (CHAIN, "D4RL score"),
    "-m walker.agent": ("--episodes 1 --eval_workers 0 --device cpu", "random, run:"),
    "-m walker.train_il train": (f"{WALKER} --max_timesteps 1 --hidden_dim 8", "1 updates in"),
    "-m walker.train_il test": (WALKER, "best, run:"),
    "-m walker.train_cqlsac train": (f"{WALKER} --max_timesteps 1 --hidden_dim 8 --cql_n_actions 2", "1 updates in"),
    "-m walker.train_cqlsac test": (WALKER, "best, run:"),
    "-m walker.train_morel": (
        f"{WALKER} --max_timesteps 3 --hidden_dim 8 --model_updates 2 --imagined_envs 8 --horizon 3 --value_warmup 1",
        "outputs in logs/walker/morel/v2_t3.2_n32/seed_0",
    ),
    # test_run_comparison.py trains some.
    "run_comparison.py": ("--dry_run --only hopper-medium-v2 --threads 1", "runs"),
    "run_comparison.py --config config.yaml --report_only": ("", "report.html"),
    # test_results.py trains a table.
    "run_comparison.py --config results": ("--dry_run", "BC local/__all__ seed 0: "),
    "run_comparison.py --tables": ("", "all tables are as results/ says"),
    "benchmarks/bench_pogo.py": (
        "--device cpu --batch_size 8 --transitions 20 --seconds 0 --repeats 1 --max_actors 1",
        "pogo_updates_per_second_1_actors_plain_scheme: ours",
    ),
    "benchmarks/bench_algorithms.py": (
        "--transitions 300 --seconds 0 --turns 1 --algorithms td3_bc --corl none --jax_corl none --unifloral none",
        "| td3_bc | ours, eager |",
    ),
    "benchmarks/run_all.py": ("--quick --only encoder --device cpu", "| mamba2_vs_sequential |"),
    "benchmarks/bench_updates.py": (
        "--small --calls 1 --repeats 1 --updates opso_offline_update opso_online_update --base none",
        "| opso_offline_update | ours |",
    ),
    "benchmarks/bench_online.py": (
        "--num_envs 2 --graph_nodes 4 --context_length 4 --steps 2 --repeats 1",
        "acting_steps_per_second_2_envs: ours",
    ),
    "make_dataset.py --list": ("", "local/hopper-medium-v2"),
    "make_dataset.py --check": ("", "good"),
    "make_dataset.py --dataset local/hopper": ("--num_transitions 300 --jobs 1 --dataset_dir made", "hopper_medium"),
    "make_dataset.py --dataset": ("--num_episodes 1 --jobs 1 --dataset_dir made", ".npz"),
    "-m benchmark_data.train_expert --env": (f"{EXPERT} --batch_size 8 --run_dir run", "policies"),
    "benchmarks/bench_encoder.py": (
        "--device cpu --batch 2 --length 20 --d_model 64 --repeats 1",
        "mamba2_vs_transformers: ours",
    ),
    "benchmarks/bench_offline.py": (
        "--device cpu --batch_size 2 --context_length 10 --d_model 32 --repeats 1",
        "offline_transitions_per_second: ours",
    ),
    "benchmarks/data_table.py": (
        f"--jobs 1 --ids {DATASET} --dataset_dir datasets",
        "(not the default: 2 episodes, not 300) | 2 | 400 |",
    ),
}

# The original texts' commands as they stand there, but for the name of a script that has another one here.
OTHER_NAMES = {
    "main.py": "pogo_main.py",
    "agent.py": "-m walker.agent",
    "train_il.py": "-m walker.train_il",
    "train_cqlsac.py": "-m walker.train_cqlsac",
    "train_morel.py": "-m walker.train_morel",
}
IQL_FILE = "configs/offline/pogo_multi/halfcheetah/medium_v2_iql.yaml"
ORIGINAL = [
    "offline_trainer.py --dataset antmaze-medium-navigate-v0",
    "offline_trainer.py --dataset antmaze-medium-navigate-v0 --max_trajectories 100 --batch_size 16 --num_epochs 200",
    "online_trainer.py --dataset antmaze-medium-navigate-v0 --max_episodes 1000 --batch_size 8",
    "main.py --env halfcheetah-medium-v2 --seed 0 --max_timesteps 1000000 --eval_freq 10000 --w2_weights 0.2 0.2 0.2 "
    "--lr 3e-4 --save_model --checkpoint_dir ./logs/checkpoints",
    "run_comparison.py --config config.yaml",
    *(
        f"-m algorithms.offline.pogo_multi_main --config_path {IQL_FILE.replace('iql', algorithm)}"
        for algorithm in ("iql", "td3_bc", "cql", "awac", "sac_n", "edac")
    ),
    f"-m algorithms.offline.pogo_multi_main --config_path {IQL_FILE} --algorithm iql --max_timesteps 1000000 "
    "--eval_freq 5000 --w2_weights 10.0 10.0 10.0",
    f"-m algorithms.offline.pogo_multi_main --config_path {IQL_FILE} --algorithm iql --w2_weights 20.0 20.0 20.0 "
    "--sinkhorn_K 8 --sinkhorn_blur 0.1 --max_timesteps 2000000",
    "agent.py",
    "train_il.py train",
    "train_il.py test",
    'train_il.py train --random_noise=-1 --ADD_TASK_BIT=True --USE_DATASET_STR="walk_m" --TEST_AFTER_TRAINING=True',
    "train_cqlsac.py train",
    "train_cqlsac.py test",
    "train_morel.py --exp_name v2_t3.2_n32",  # --comet_api has a test of its own
]


def shown_commands() -> set[str]:
    """Lines that start a script of ours, in any page's code blocks, without their comments."""
    found = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in page.read_text().splitlines():
            module = r"-m (?:algorithms|benchmark_data|walker)[\w.]+"
            match = re.search(rf"(?:^|&& |\s{{4}})python ((?:{module}|(?:benchmarks/)?\w+\.py)[^#|]*)", line)
            if match and "`" not in line:
                found.add(match.group(1).strip())
    return found


def original_commands() -> set[str]:
    """The original texts' commands under the names that their scripts have here."""
    named = (command.partition(" ") for command in ORIGINAL)
    return {f"{OTHER_NAMES.get(script, script)} {words}".strip() for script, _, words in named}


COMMANDS = sorted(shown_commands() | original_commands())


def test_the_readme_shows_commands():
    assert shown_commands() and {beginning(command) for command in COMMANDS} == set(SMALLER)


def beginning(command: str) -> str:
    """The entry of SMALLER that a shown command falls under."""
    return max((known for known in SMALLER if command.startswith(known)), key=len, default="")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What commands read and a newcomer made with the command shown before: small data, and a pretraining."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plots, "_png", lambda figure: b"")
        for dataset_id, size in (
            (DATASET, 2),
            ("local/antmaze-medium-navigate-v0", 1),
            ("local/hopper-medium-v2", 300),
        ):
            make_dataset.generate(dataset_id, size=size, dataset_dir="datasets", progress=False)
        for dataset_id in dmc_utils.GENERATED_IDS:
            make_dataset.generate(dataset_id, size=1, dataset_dir="made", progress=False)
        shutil.copytree("made/local/collected_data", "made/collected_data")  # the study's own, for all it can tell
        offline_trainer.main(shlex.split(f"{OFFLINE} --run_dir pretrained --no_plot_maps"))
    return folder


def prepare(script: str, words: list[str], module: ModuleType, made: Path) -> None:
    """Put into the current folder what the command reads."""
    walker = script.startswith("walker/train")
    for name in ["made"] if walker else ["datasets", "pretrained"]:
        shutil.copytree(made / name, name)
    if walker and "test" in words:
        train = f"-m {script.removesuffix('.py').replace('/', '.')} train"
        module.main(shlex.split(f"{SMALLER[train][0]} --no_TEST_AFTER_TRAINING"))
    if "--report_only" in words:  # of one run that was begun; without any it is refused
        Path("logs/hopper-medium-v2/w2_0.4_0.5_0.25/seed_0").mkdir(parents=True)
    for word in words:
        if word.endswith(".yaml") and (ROOT / word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / word, word)
        elif word.endswith(".safetensors"):
            shutil.copytree(ROOT / "datasets" / "experts", "datasets/experts")
    if "--evaluate" in words and script == "online_trainer.py":
        run_dir = Path(words[words.index("--evaluate") + 1]).parent
        online_trainer.main(shlex.split(f"{SMALLER['online_trainer.py'][0]} --run_dir {run_dir}"))


def load(script: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that running the script would run, but for its last lines."""
    spec = importlib.util.spec_from_file_location("command", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "command", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_in_a_small_form(command, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "_png", lambda figure: b"")  # other tests draw
    script, *words = shlex.split(command)
    if script == "-m":
        script, *words = words
        script = f"{script.replace('.', '/')}.py"
    module = load(script, monkeypatch)
    prepare(script, words, module, made)
    capsys.readouterr()
    if script == "benchmarks/bench_encoder.py":
        pytest.importorskip("transformers")
    if script == "benchmark_data/train_expert.py":
        pytest.importorskip("stable_baselines3")
    if "--jax" in words:
        pytest.importorskip("jax")
    more, says = SMALLER[beginning(command)]
    try:
        module.main([*words, *shlex.split(more)])
    except SystemExit as end:  # --check says with it what it found
        assert end.code == 0
    assert says in capsys.readouterr().out


def test_a_flag_that_has_gone_names_what_takes_its_place(capsys):
    line = error_line(train_morel.main, capsys, "--comet_api", "KEY", "--exp_name", "v2_t3.2_n32")
    assert (
        line
        == "error: unknown flag --comet_api; TensorBoard, which every run writes, or --wandb_project takes its place"
    )


def test_another_systems_flag_for_the_data_names_this_systems(capsys):
    flags = {
        pogo_main: ("dataset", "env"),
        offline_trainer: ("env", "dataset"),
        train_morel: ("env", "USE_DATASET_STR"),
    }
    for module, (other, own) in flags.items():
        line = error_line(module.main, capsys, f"--{other}", "X")
        assert line.startswith(f"error: unknown flag --{other}; --{own} names the data here")


ORIGINAL_YAML = """
# 필수: 사용할 알고리즘 선택
algorithm: iql

# 환경 설정
env: halfcheetah-medium-v2
seed: 0
eval_freq: 5000
n_episodes: 10
max_timesteps: 1000000

# POGO Multi-Actor 설정
w2_weights: [10.0, 10.0, 10.0]
num_actors: 3

# Sinkhorn 설정 (Actor1+용)
sinkhorn_K: 4
sinkhorn_blur: 0.05
sinkhorn_backend: "tensorized"

# IQL 파라미터 (IQL 구조 그대로 사용)
iql_tau: 0.7
beta: 3.0
vf_lr: 3e-4
qf_lr: 3e-4
actor_lr: 3e-4
iql_deterministic: false

# 공통 파라미터
batch_size: 256
discount: 0.99
tau: 0.005
buffer_size: 2000000
normalize: true
normalize_reward: false

project: CORL
group: pogo-multi-iql
name: pogo-multi-iql
"""


def test_the_original_texts_file_of_settings_runs(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "datasets", "datasets")
    Path("iql.yaml").write_text(ORIGINAL_YAML, encoding="utf-8")
    pogo_multi_main.main(["--config_path", "iql.yaml", *shlex.split(CHAIN), "--wandb_project", "none"])
    assert "D4RL score" in capsys.readouterr().out
    assert Path("logs/local/hopper-medium-v2/iql_w2_10_10_10/seed_0/finished.json").exists()


SIZES = {"maze": (2, 2), "chain": (11, 3), "walker": (24, 6)}  # of an observation, of an action


def test_the_python_of_the_readme_runs(made, tmp_path, monkeypatch):
    """The block as it stands, after tiny runs in the places that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "_png", lambda figure: b"")
    for name in ("datasets", "pretrained", "made"):
        shutil.copytree(made / name, name)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    maze, chain, over_iql, walker = re.findall(r'"(logs/.+?)"', block)
    online_trainer.main(shlex.split(f"{SMALLER['online_trainer.py'][0]} --run_dir {maze}"))
    pogo_main.main(shlex.split(f"{CHAIN} --w2_weights 1 1 --run_dir {chain}"))
    pogo_multi_main.main(shlex.split(f"--algorithm iql {CHAIN} --run_dir {over_iql}"))
    words = f"train {SMALLER['-m walker.train_il train'][0]} --USE_DATASET_STR local/run_m"
    train_il.main(shlex.split(f"{words} --run_dir {walker}"))
    names = {"goal": np.ones(2)}
    for line in block.splitlines():
        size, actions = next((n for who, n in SIZES.items() if who in line), (0, 0))
        names["observation"] = np.zeros(size)
        exec(line, names)
        if line.startswith("action"):
            assert names["action"].shape == (actions,)
    assert names["over_iql"].act(np.zeros(11)).shape == (3,) and np.isfinite(
        names["maze"].value(np.zeros(2), np.ones(2))
    )

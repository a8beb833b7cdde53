"""TD3+BC on the walker: algorithms/offline/td3_bc.py on both tasks' transitions.

python -m walker.train_td3bc
python -m walker.train_td3bc test
"""

import functools
from dataclasses import dataclass

from algorithms.offline.td3_bc import TD3BC, TD3BCConfig
from runs.cli import run_cli
from utils import Basic, Count, Positive
from walker.study_run import StudyConfig, ValueRun, run_command


@dataclass
class WalkerTD3BCConfig(StudyConfig, TD3BCConfig):
    max_timesteps: Basic[Count] = 200_000  # updates of the run
    eval_freq: Count = 20_000  # updates between evaluations, and at most between checkpoints
    log_freq: Count = 2_000  # updates between rows of metrics.csv
    reward_scale: Positive = 1.0  # rewards are multiplied by this


class TD3BCRun(ValueRun):
    method, algorithm, kind = "td3bc", TD3BC, "deterministic_mlp"


main = functools.partial(run_command, TD3BCRun, WalkerTD3BCConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)

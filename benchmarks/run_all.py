"""Every speed benchmark in one command, and the closing lines of all in one table.

    python benchmarks/run_all.py --output speed.md
    python benchmarks/run_all.py --device cuda --output speed.md
    python benchmarks/run_all.py --precision bf16 --only pogo algorithms
    python benchmarks/run_all.py --quick

POGO, the six algorithms, the Mamba-2 block, updates against another checkout, OPSO's pretraining and, on a CPU alone,
its acting. Flags name what cannot be installed: clones of CORL, JAX-CORL and unifloral (bench_algorithms.py), another
checkout of this repository (bench_updates.py).

Each script runs in a process of its own. One that fails is a line of the table and not the end of the run. The table is
written after each script. `--quick` takes tiny sizes, to try the command: its figures mean nothing.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_kernels.choice import Precision, fastest_kernels, processor
from runs.cli import parse_config, run_cli
from utils import UserError, one_line, processor_name, write_text_atomic

# name: ours 12.3 (eager), peer 4.5 ms, ratio 2.73
CLAIM = re.compile(r"^(\S+): ours ([\d.]+.*?), peer ([\d.]+.*?), ratio ([\d.]+)(.*)$", re.MULTILINE)
WARNING = re.compile(r"^.*?(warning: .*left out.*)$", re.MULTILINE)  # of a contestant that failed
HEAD = "| claim | ours | peer | ratio |\n|---|---|---|---|"
PEERS = ("corl", "jax_corl", "unifloral", "base")


@dataclass
class RunAllConfig:
    device: Literal["cpu", "cuda"] = "cpu"  # where everything is measured
    output: str | None = None  # file of the table, Markdown
    precision: Precision = "float32"  # precision of hidden layers, of POGO and the six algorithms
    quick: bool = False  # tiny sizes, to try the command
    only: tuple[str, ...] = ()  # parts to run, by the names that the output shows; default: all
    corl: str | None = None  # a clone of CORL
    jax_corl: str | None = None  # a clone of JAX-CORL
    unifloral: str | None = None  # a clone of unifloral
    base: str | None = None  # another checkout of this repository, to measure updates against


@dataclass
class Part:
    """One script, with its flags on each device."""

    script: str
    quick: str  # sizes that take seconds
    cpu: str = ""
    cuda: str | None = ""  # None: it runs on a CPU alone, and has no --device
    peers: tuple[str, ...] = ()  # fields of RunAllConfig that it takes under the same name


PARTS = {
    "pogo": Part("bench_pogo.py", "--transitions 300 --batch_size 8 --max_actors 1 --seconds 0 --repeats 1"),
    "algorithms": Part(
        "bench_algorithms.py",
        "--transitions 300 --seconds 0 --turns 1 --checked 1 --algorithms td3_bc",
        cuda="--checked 0",
        peers=("corl", "jax_corl", "unifloral"),
    ),
    "encoder": Part("bench_encoder.py", "--batch 2 --length 10 --d_model 64 --repeats 1"),
    "updates": Part("bench_updates.py", "--small --calls 1 --repeats 1", cuda="--calls 20", peers=("base",)),
    "offline": Part(
        "bench_offline.py", "--batch_size 2 --context_length 10 --d_model 32 --repeats 1", cpu="--threads 1"
    ),
    "online": Part(
        "bench_online.py", "--num_envs 2 --graph_nodes 4 --context_length 4 --steps 2 --repeats 1", cuda=None
    ),
}


def command_of(name: str, config: RunAllConfig) -> list[str] | None:
    """What a part runs; None where it has no place on this device."""
    part = PARTS[name]
    flags = part.cuda if config.device == "cuda" else part.cpu
    if flags is None:
        return None
    command = [sys.executable, str(ROOT / "benchmarks" / part.script)]
    command += flags.split() + (part.quick.split() if config.quick else [])
    command += ["--device", config.device] if part.cuda is not None else []
    for flag in part.peers:
        command += [f"--{flag}", vars(config)[flag]] if vars(config)[flag] else []
    command += ["--precision", config.precision] if name in ("pogo", "algorithms") else []
    if name == "pogo" and config.device == "cpu" and importlib.util.find_spec("jax") and not config.quick:
        command += ["--jax"]
    return command


def run_part(name: str, command: list[str]) -> list[str]:
    """The part's rows of the table; its output is printed."""
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, flush=True)
    rows = [
        f"| {claim} | {ours} | {peer} | {ratio}{rest} |"
        for claim, ours, peer, ratio, rest in CLAIM.findall(done.stdout)
    ]
    faults = WARNING.findall(done.stderr)
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)
        faults.append(f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    rows += [f"| {name} | {one_line(fault)[:300].replace('|', '/')} | | |" for fault in faults]
    return rows or [f"| {name} | ran, no peer | | |"]


def machine(device: str) -> str:
    """One line on what was measured."""
    gpu = f" {processor_name(device)}" if device == "cuda" else ""
    cpu = f"{processor_name()} (family {processor()[1]}, {fastest_kernels()})"
    return f"PyTorch {torch.__version__} on {device}{gpu}; {cpu}"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(RunAllConfig, argv, __doc__)
    if unknown := set(config.only) - set(PARTS):
        raise UserError(f"--only {unknown.pop()}: choose among {', '.join(PARTS)}")
    paths = {name: vars(config)[name] for name in PEERS}
    for name, path in paths.items():
        if path and not Path(path).exists():
            raise UserError(f"--{name} {path}: not there")
    config = dataclasses.replace(config, **{name: path and str(Path(path).resolve()) for name, path in paths.items()})
    title = f"{machine(config.device)}, {config.precision}" + (", tiny sizes" if config.quick else "")
    rows = []
    for name in config.only or PARTS:
        command = command_of(name, config)
        if command is None:
            continue
        rows += run_part(name, command)
        if config.output:
            write_text_atomic(config.output, "\n".join([title, "", HEAD, *rows]) + "\n")
    print("\n".join(["", title, "", HEAD, *rows]))


if __name__ == "__main__":
    run_cli(main)

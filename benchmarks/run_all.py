"""Every speed benchmark in one command, and the closing lines of all in one table.

    python benchmarks/run_all.py --output speed.md
    python benchmarks/run_all.py --device cuda --output speed.md
    python benchmarks/run_all.py --precision bf16 --only pogo algorithms
    python benchmarks/run_all.py --quick

On a CPU: POGO, the six algorithms, the Mamba-2 block, OPSO's two stages, Sinkhorn, evaluation, acting. On a GPU, in
less than eight minutes: the tests marked gpu, POGO captured as CUDA graphs (1 to 3 actors, 8 seeds at once), the six,
the Mamba-2 block, OPSO's two stages, Sinkhorn. Flags name what cannot be installed: clones of CORL, JAX-CORL and
unifloral (bench_algorithms.py), the published agent.py (bench_pogo.py), another checkout of this repository
(bench_updates.py).

Each script runs in a process of its own. One that fails, or takes longer than it may under `--limit`, is a line of the
table and not the end of the run. The table is written after each script. `--quick` takes tiny sizes, to try the command
on a new machine: its figures mean nothing.
"""

import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_kernels.choice import Precision, fastest_kernels, processor
from runs.cli import parse_config, run_cli
from utils import Count, UserError, one_line, processor_name, write_text_atomic

# name: ours 12.3 (eager), peer 4.5 ms, ratio 2.73
CLAIM = re.compile(r"^(\S+): ours ([\d.]+.*?), peer ([\d.]+.*?), ratio ([\d.]+)(.*)$", re.MULTILINE)
SUMMARY = re.compile(r"^(?=.*\b(?:passed|failed|errors?|skipped|deselected)\b)=*\s*(.+?)\s*=*$", re.MULTILINE)
WARNING = re.compile(r"^.*?(warning: .*left out.*)$", re.MULTILINE)  # of a contestant that failed
HEAD = "| claim | ours | peer | ratio |\n|---|---|---|---|"
GPU_LIMIT = 470  # seconds: less than eight minutes
PART_LIMIT = 160  # seconds of one script, where there is a limit: none may take the others' time


@dataclass
class RunAllConfig:
    device: Literal["cpu", "cuda"] = "cpu"  # where everything is measured
    output: str | None = None  # file of the table, Markdown
    precision: Precision = "float32"  # precision of hidden layers, of POGO and the six algorithms
    quick: bool = False  # tiny sizes, to try the command
    only: tuple[str, ...] = ()  # parts to run, by the names that the output shows; default: all
    limit: Count | None = None  # seconds that everything may take; default: 470 on a GPU, else none
    corl: str | None = None  # a clone of CORL
    jax_corl: str | None = None  # a clone of JAX-CORL
    unifloral: str | None = None  # a clone of unifloral
    agent: str | None = None  # agent.py of the published POGO
    base: str | None = None  # another checkout of this repository, to measure updates against


@dataclass
class Part:
    """One script, with its flags on each device; None where it is not run."""

    script: str
    quick: str  # sizes that take seconds
    cpu: str | None = ""
    cuda: str | None = ""
    peers: tuple[str, ...] = ()  # fields of RunAllConfig that it takes under the same name
    devices: bool = True  # whether it has --device


# In the order of what a GPU's minutes should go to first.
PARTS = {
    "gpu_tests": Part("-m pytest", "", cpu=None),
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
    "sinkhorn": Part("bench_sinkhorn.py", "--batch 8 --repeats 1 --calls 1"),
    "evaluation": Part(
        "bench_evaluation.py", "--steps 110000 --episodes 1 --repeats 1 --workers 0", cuda=None, devices=False
    ),
    "online": Part(
        "bench_online.py",
        "--num_envs 2 --graph_nodes 4 --context_length 4 --steps 2 --repeats 1",
        cuda=None,
        devices=False,
    ),
}


def command_of(name: str, config: RunAllConfig) -> list[str] | None:
    """What a part runs; None where it has no place on this device."""
    part, own = PARTS[name], vars(PARTS[name])[config.device]
    if own is None and not (config.quick and name == "gpu_tests"):  # quick tries that command on a CPU too
        return None
    if name == "gpu_tests":
        files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
        files = files[:1] if config.quick and config.device == "cpu" else files
        # Without pyproject's options, which need pytest-xdist and would leave these tests out.
        return [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "-q",
            "-m",
            "gpu",
            "--continue-on-collection-errors",
            *files,
        ]
    command = [sys.executable, str(ROOT / "benchmarks" / part.script)]
    command += ["--device", config.device] if part.devices else []
    command += own.split() + (part.quick.split() if config.quick else [])
    for flag in part.peers:
        command += [f"--{flag}", vars(config)[flag]] if vars(config)[flag] else []
    command += ["--precision", config.precision] if name in ("pogo", "algorithms") else []
    if name == "pogo":
        command += ["--path", config.agent] if config.agent else []
        command += ["--jax"] if config.device == "cpu" and importlib.util.find_spec("jax") and not config.quick else []
    return command


def run_part(name: str, command: list[str], seconds: float | None) -> list[str]:
    """The part's rows of the table; its output is printed. It is ended, with what it started, when its time is over."""
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    began, environment = time.perf_counter(), {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its own processes end with it
    )
    try:
        said, errors = process.communicate(timeout=seconds)
        fault = None
    except subprocess.TimeoutExpired:
        fault = f"not finished in its {seconds:.0f} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if fault:
        said, errors = process.communicate()
    print(f"{said}({time.perf_counter() - began:.0f} seconds)", flush=True)
    rows = [f"| {claim} | {ours} | {peer} | {ratio}{rest} |" for claim, ours, peer, ratio, rest in CLAIM.findall(said)]
    if name == "gpu_tests":
        rows += [f"| {name} | {found} | | |" for found in SUMMARY.findall(said)[-1:]]
    # 5 is pytest's word for no test at all.
    if fault is None and process.returncode and not (name == "gpu_tests" and process.returncode == 5):
        print(errors, file=sys.stderr, flush=True)
        last = [line for line in (errors.strip() or said.strip() or "no message").splitlines() if line.strip()][-1]
        fault = f"failed: {one_line(last)[:300]}"
    rows += [f"| {name} | {one_line(text)[:300].replace('|', '/')} | | |" for text in WARNING.findall(errors)]
    if fault:
        rows.append(f"| {name} | {fault.replace('|', '/')} | | |")
    return rows or [f"| {name} | ran, no peer | | |"]


def machine(device: str) -> str:
    """One line on what was measured."""
    code = "import sys, torch; print(torch.__version__, torch.cuda.get_device_name() if sys.argv[1] == 'cuda' else '')"
    done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--device {device}: PyTorch finds none ({one_line(done.stderr)[-200:]})")
    cpu = f"{processor_name()} (family {processor()[1]}, {fastest_kernels()})"
    return f"PyTorch {done.stdout.strip()} on {device}; {cpu}"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(RunAllConfig, argv, __doc__)
    if unknown := set(config.only) - set(PARTS):
        raise UserError(f"--only {unknown.pop()}: choose among {', '.join(PARTS)}")
    limit = config.limit or (GPU_LIMIT if config.device == "cuda" else None)
    paths = {name: vars(config)[name] for name in ("corl", "jax_corl", "unifloral", "agent", "base")}
    for name, path in paths.items():
        if path and not Path(path).exists():
            raise UserError(f"--{name} {path}: not there")
    config = dataclasses.replace(config, **{name: path and str(Path(path).resolve()) for name, path in paths.items()})
    title = f"{machine(config.device)}, {config.precision}" + (", tiny sizes" if config.quick else "")
    rows, began = [], time.perf_counter()
    for name in config.only or PARTS:
        command = command_of(name, config)
        if command is None:
            continue
        left = limit and limit - (time.perf_counter() - began)
        if left is not None and left <= 0:
            rows.append(f"| {name} | not run: the {limit} seconds were over | | |")
        else:
            rows += run_part(name, command, left and min(left, PART_LIMIT))
        if config.output:
            write_text_atomic(config.output, "\n".join([title, "", HEAD, *rows]) + "\n")
    print("\n".join(["", title, "", HEAD, *rows]))


if __name__ == "__main__":
    run_cli(main)

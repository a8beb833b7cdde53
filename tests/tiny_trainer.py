"""A tiny trainer in the place of the training commands, and a folder to start it in.

It trains by waiting and leaves the files of a finished chain, and of a finished run of the walker study. In `notes`
lie ledger.txt, its starts and ends, and behaviour.json: seed or command -> what goes wrong.
"""

import json
from pathlib import Path

import run_comparison
from comparison import jobs, queue
from comparison.registry import settings_of
from runs.directory import plain_config

TRAINER = r"""
import fcntl, json, os, sys, time
from pathlib import Path

notes, command, flags = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
run_dir, weights = Path(flags["run_dir"]), flags.get("w2_weights", [])
steps, seconds = (flags["max_timesteps"], flags["lr"]) if weights else (20, 0.01)  # of a run, of ten updates
behaviours = json.loads((notes / "behaviour.json").read_text()) if (notes / "behaviour.json").exists() else {}
behaviour = behaviours.get(str(flags["seed"]), behaviours.get(command))

def note(event):
    with open(notes / "ledger.txt", "a") as file:
        threads = os.environ["OMP_NUM_THREADS"]
        file.write(f"{event} {run_dir.parent.name}/{run_dir.name} {step} {os.getpid()} {threads}\n")

def fail(code, words):
    print("error:", words, file=sys.stderr)
    sys.exit(code)

folder = os.open(run_dir, os.O_RDONLY)
try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    fail(3, f"{run_dir}: another process is training there; choose another --run_dir")
checkpoint, training = run_dir / "checkpoints" / "last.pth", run_dir / "training"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
note("start")
print("output of", run_dir)
for path in (training, checkpoint.parent):
    path.mkdir(exist_ok=True)
(run_dir / "config.yaml").write_text(json.dumps({key: value for key, value in flags.items() if key != "resume"}))
(run_dir / "versions.json").write_text('{"commit": "0123456789abcdef"}')
rows = [f"{s},{s / 10},{s / 20}\n" for s in range(10, step + 1, 10)]
if behaviour == "no data" and not (notes / (flags["env"].replace("-", "_", 1) + ".hdf5")).exists():
    fail(2, "cannot download it; put it there by hand")
while step < steps:
    if behaviour == "diverge" and step >= steps // 2:
        fail(2, f"{run_dir}: mean Q is 9e9 at update {step}; raise --w2_weights")
    first = behaviour == "crash once" and step == 20 and not (notes / "crashed").exists()
    if first or behaviour == "crash" and step >= steps // 2:
        (notes / "crashed").touch()
        raise RuntimeError("a defect")
    time.sleep(seconds * (8 if behaviour == "slow" else 1))
    step += 10
    rows.append(f"{step},{step / 10},{step / 20}\n")
    (training / "metrics.csv").write_text("step,critic_loss,chain/actor_0/q\n" + "".join(rows))
    checkpoint.with_suffix(".tmp").write_text(str(step))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
text = "evaluation,step,actor,mode,episode,length,return,score\n"
for kind in ("training", "final"):
    for actor in range(len(weights)):
        for mode in ("deterministic", "stochastic"):
            text += f"{kind},{step},{actor},{mode},0,10,1.0,{50.0 + actor}\n"
(training / "evaluations.csv").write_text(text)
values = [("walk", 10.0 + flags["seed"]), ("walk", 12.0 + flags["seed"]), ("run", 1.0)]
lines = [f"{agent},{task},0,{value}" for agent in ("last", "best") for task, value in values]
(run_dir / "evaluation.csv").write_text("\n".join(["agent,task,episode,return", *lines]) + "\n")
note("end")
summary = {"data_score": 40.0, "steps": step, "transitions": 1000, "data/walk/return": 20.0}
(run_dir / "finished.tmp").write_text(json.dumps(summary))
os.replace(run_dir / "finished.tmp", run_dir / "finished.json")
"""


class Place:
    """A folder with a file of runs, the trainer above, and its notes."""

    def __init__(self, config: Path, folder: Path, monkeypatch):
        self.config, self.folder, self.notes = config, folder, folder / "notes"
        self.notes.mkdir()
        self.script = folder / "trainer.py"
        self.script.write_text(TRAINER)
        monkeypatch.setattr(queue, "make_job", self.make_job)
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)

    def make_job(self, run_dir: Path, module: str, flags: list[str], threads: int) -> jobs.Job:
        settings = json.dumps(plain_config(settings_of(module, flags)))
        words = [str(self.script), str(self.notes), module, settings]
        return jobs.Job(str(run_dir), words, {"OMP_NUM_THREADS": str(threads)})

    def behave(self, **behaviours: str) -> None:
        named = {name.removeprefix("seed_"): behaviour for name, behaviour in behaviours.items()}
        (self.notes / "behaviour.json").write_text(json.dumps(named))

    def flags(self, *more: str) -> list[str]:
        return ["--config", str(self.config), "--log_dir", str(self.folder / "logs"), *more]

    def run(self, *more: str) -> None:
        run_comparison.main(self.flags(*more))

    def ledger(self, event: str = "") -> list[list[str]]:
        """Event, run, update, process and threads of each note, or of those of one kind."""
        path = self.notes / "ledger.txt"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if event in ("", line[0])]

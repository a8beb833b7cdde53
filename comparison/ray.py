"""Runs as tasks of a Ray cluster, whose nodes share this checkout, the data and --log_dir, each at the same path."""

import subprocess
import sys
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison.jobs import Job, Pool
from utils import UserError, one_line

LINGER_SECONDS = 30  # how long Ctrl-C waits for the cluster's tasks
ANSWER_SECONDS = 45  # how long a cluster may take to answer
# Asks for a cluster in a process that can be given up: ray.init tries for minutes, also where its token is refused.
PROBE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)"


def check_gpus(share: float | None) -> None:
    """Raise UserError for what Ray takes of no node: above 1 it knows whole GPUs alone, and of a part four decimals."""
    if share is None:
        return
    if share != round(share, 4) or share > 1 and share != int(share):
        raise UserError(f"--gpus_per_run {share}: must be a whole number, or below 1 with at most four decimals")


class RayPool(Pool):
    """A cluster at host:port of its head, ray://host:port, or auto for the one on this machine.

    jobs: tasks that are submitted at once; None for as many as there are. cpus, gpus: what a task takes of a node; a
    fraction of a GPU lets several share it. gpus None takes 0.25 where the cluster has any.

    Raises UserError where Ray is missing, nobody answers or the cluster has no such node.
    """

    verb = "submitted"

    def __init__(self, address: str, jobs: int | None, cpus: int, gpus: float | None):
        super().__init__(jobs)
        try:
            import ray
        except ImportError:
            raise UserError("--backend ray: needs the package ray: pip install -r requirements/cluster.txt") from None
        probe(address)
        self.ray, self.lost, self.references = ray, (ray.exceptions.RayError,), {}  # Future -> Ray's reference
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = gpus if gpus is not None else 0.25 if any(node.get("GPU") for node in nodes) else 0.0
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            ray.shutdown()
            raise UserError(
                f"--address {address}: no node has --threads {cpus} CPU cores and --gpus_per_run {gpus:g} of a GPU; "
                "lower them"
            )
        root = str(Path(__file__).resolve().parent.parent)

        # Inside a function, so that Ray sends the code itself: this module cannot be imported there before the path is.
        def task(job: dict[str, Any]) -> Any:
            sys.path.insert(0, root)
            from comparison import jobs

            return jobs.execute(jobs.Job(**job))  # a cancelled task stops the run

        # A run whose node is lost starts again as one that crashed does: the comparison counts the tries, not Ray.
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(task)

    def submit(self, job: Job) -> Future:
        reference = self.task.remote(asdict(job))
        future = reference.future()
        self.references[future] = reference
        return future

    def stop(self) -> None:
        try:
            for future in self.running:
                self.ray.cancel(self.references[future])
            wait(self.running, LINGER_SECONDS)
        finally:
            self.ray.shutdown()


def probe(address: str) -> None:
    """Raise UserError where no Ray cluster answers at an address in ANSWER_SECONDS."""
    remedy = "start one with `ray start --head`, or give the address that it printed"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and not (host and port.isdigit()):
        raise UserError(f"--address {address}: must be host:port, ray://host:port, or auto")
    try:
        command = [sys.executable, "-c", PROBE, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        fault = f"no answer in {ANSWER_SECONDS} seconds"
        remedy += "; where its head has a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too"
        raise UserError(f"--address {address}: no Ray cluster answers there ({fault}); {remedy}") from None
    if done.returncode:
        fault = one_line((done.stderr.strip().splitlines() or ["no message"])[-1])[:200]
        raise UserError(f"--address {address}: no Ray cluster answers there ({fault}); {remedy}")

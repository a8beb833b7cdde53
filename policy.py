"""Act with what any of the four systems has trained: one class, from a run's directory or a checkpoint.

    policy = Policy("logs/local/hopper-medium-v2/w2_0.4_0.5_0.5/seed_0")
    action = policy.act(observation)

| a run of | what it can do |
|---|---|
| online_trainer.py | `act` on the way to a goal; `encode` and `value` |
| offline_trainer.py | `encode` and `value`: it learns no action |
| pogo_main.py, pogo_multi_main | `act` by the chain's last actor, or by `Policy(path, actor=0)`'s |
| a script of walker/ | `act` in a task, `Policy(path, task="run")` |
"""

from pathlib import Path

import numpy as np
import torch

import pogo_main
from algorithms.offline import pogo_multi_main
from dmc_utils import TASKS
from opso.policy import MazePolicy
from runs.directory import checkpoint_file, expecting, load_checkpoint
from runs.policy import ChainPolicy
from utils import UserError, resolve_device
from walker.agent import Agent


class Policy:
    """What one run has learned.

    path: a run's directory, whose checkpoints/last.pth is taken, or a checkpoint: that, or best_model.pth (OPSO),
    best.pth (walker study). actor: which one of a chain acts; -1 is the last. task: walk or run, of an agent of the
    walker study.

    Raises UserError for a file that none of the systems has written, and ValueError for an actor that the chain does
    not have or a task that the agent was not trained in.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", actor: int = -1, task: str = "walk"):
        self.path, self.actor, device = checkpoint_file(path), actor, resolve_device(str(device))
        self.trained: Agent | ChainPolicy | MazePolicy
        state = load_checkpoint(self.path, device)
        over_algorithm = "algorithm" in state.get("config", {})
        if "acting" in state:
            if task not in (known := state.get("tasks", TASKS)):
                raise ValueError(f"task {task!r}: this agent was trained to {' and '.join(known)} alone")
            self.trained = Agent(device=device)
            with expecting(self.path, "a file of the walker study's agents"):
                self.trained.load_acting(state["acting"])
            self.trained.set_task(task)
        elif over_algorithm or "env" in state:
            command = pogo_multi_main if over_algorithm else pogo_main
            self.trained = ChainPolicy(
                self.path, command.trained_actors, f"{command.__name__.rpartition('.')[2]}.py", device, state
            )
            count = len(self.trained.actors)
            if not -count <= actor < count:
                raise ValueError(f"actor {actor}: the chain has actors 0 to {count - 1}")
        else:
            self.trained = MazePolicy(self.path, device, state)

    def act(self, observation: np.ndarray, goal: np.ndarray | None = None, deterministic: bool = True) -> np.ndarray:
        """Actions [A] or [n, A] float32 of raw observations [D] or [n, D], of one environment or of n.

        Of Minari's data in [-1, 1], as the environment of `offline_data.make_env` takes them.

        goal: an observation to reach, [D] or [n, D]; OPSO needs it, no other has one.
        deterministic: without the noise of a chain's actors, or of OPSO's last round. The study's agents have none.

        OPSO's and the walker study's policies remember what they have done: call at every step, `reset` between
        episodes. Raises UserError for a run of offline_trainer.py, ValueError for another size, a missing goal, or one
        that nothing reads.
        """
        if goal is not None and not isinstance(self.trained, MazePolicy):
            raise ValueError("this policy has no goal: OPSO alone takes one")
        if isinstance(self.trained, Agent):
            if not deterministic:
                raise ValueError("the walker study's agents act deterministically")
            actions = self.trained.act_vec(np.atleast_2d(observation))
            return actions.reshape(*np.shape(observation)[:-1], -1)
        if isinstance(self.trained, ChainPolicy):
            return self.trained.act(observation, self.actor, deterministic)
        if goal is None:
            raise ValueError("OPSO's policy needs a goal: act(observation, goal)")
        return self.trained.act(observation, goal, deterministic)

    def reset(self) -> None:
        """Episodes begin: forget those before."""
        if not isinstance(self.trained, ChainPolicy):
            self.trained.reset()

    def encode(self, observation: np.ndarray) -> np.ndarray:
        """OPSO's codes z = f(s): [..., D] -> [..., d_model] float32. Raises UserError for another system."""
        return self._maze().encode(observation)

    def value(self, observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """OPSO's V(f(s), f(goal)), about discount^(steps to the goal - 1): [..., D] twice, which broadcast -> [...]."""
        return self._maze().value(observation, goal)

    def _maze(self) -> MazePolicy:
        if not isinstance(self.trained, MazePolicy):
            remedy = "give a run of offline_trainer.py or online_trainer.py"
            raise UserError(self.path, "OPSO alone has a code and a value", remedy)
        return self.trained

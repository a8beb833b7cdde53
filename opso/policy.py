"""A trained OPSO model from a file, to act with: of either stage. `policy.Policy` has it for every system."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from offline_agent import build_model
from online_agent import OnlineAgent, OnlineAgentConfig
from opso.search import Planner, StateGraph
from runs.directory import checkpoint_file, expecting, load_checkpoint
from utils import UserError


class MazePolicy:
    """What a run of online_trainer.py or offline_trainer.py has learned, from one file.

    path: a run's directory, whose checkpoints/last.pth is taken, or a checkpoint: that file or best_model.pth.
    state: its content, where it is read already.

        policy = MazePolicy("logs/online/local/pointmaze-medium-navigate-v0/online/seed_0")
        observation, info = env.reset()
        action = policy.act(observation, info["goal"])

    Raises UserError for a file that is no model of either.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", state: dict[str, Any] | None = None):
        self.path = checkpoint_file(path)
        self.device, self.planner = torch.device(device), None
        self.agent: OnlineAgent | None = None  # of the online stage
        self.graph: StateGraph | None = None
        self.state = state = load_checkpoint(self.path, device) if state is None else state
        what, remedy = "a policy of online_trainer.py, nor a model of offline_trainer.py", "give a run of theirs"
        with expecting(self.path, what, f"{remedy} or its best_model.pth"):
            self.dataset, self.config = state["dataset"], state["config"]
            if "pretrained" in state:
                self._build_online(state)
            else:
                self._build_offline(state)

    def _build_offline(self, state: dict[str, Any]) -> None:
        model = build_model(state["observation_dim"], SimpleNamespace(**self.config))
        model.load_state_dict(state["target"] if "target" in state else state["agent"]["target"])
        self.encoder, self.v = model.encoder.to(self.device).eval(), model.v.to(self.device)

    def _build_online(self, state: dict[str, Any]) -> None:
        before = state["pretrained"]
        model = build_model(state["nodes"].shape[1], SimpleNamespace(**before))
        own = OnlineAgentConfig(**{field.name: self.config[field.name] for field in fields(OnlineAgentConfig)})
        self.agent = OnlineAgent(own, model, state["action_dim"], before["hidden_dim"], before["discount"], self.device)
        self.agent.load_state_dict(state["agent"])
        nodes = self.agent.encode(state["nodes"])
        self.graph = StateGraph(self.agent, nodes, state["node_rows"], state["node_episode_end"])
        self.encoder, self.v = self.agent.encoder, self.agent.heads["v"]

    def reset(self) -> None:
        """Begin new episodes: forget where the last ones were, and which edges were blocked."""
        self.planner = None

    def act(self, observation: np.ndarray, goal: np.ndarray, deterministic: bool = True) -> np.ndarray:
        """The action [A] float32 in [-1, 1] of a state [D] on the way to a goal [D], which is an observation too.

        With [E, D] each, the actions [E, A] of E environments. Within an episode call it at every step: a path is
        followed, and edges that lead nowhere are avoided. Other goals, or `reset`, begin a new episode. Exploration
        and noise are those of the run's last round where not deterministic.

        Raises UserError for a run of offline_trainer.py, which learns no action, ValueError for other sizes.
        """
        if self.agent is None:
            raise UserError(f"{self.path}: offline_trainer.py learns no action; give a run of online_trainer.py")
        states, goals = np.atleast_2d(self._checked(observation)), np.atleast_2d(self._checked(goal, "goal"))
        if states.shape != goals.shape:
            raise ValueError(f"{len(states)} observations and {len(goals)} goals, where each needs its own")
        if self.planner is None or not np.array_equal(goals, self._goals):
            self.planner, self._goals = Planner(self.agent, self.graph, goals, range(len(goals))), goals
        for name in ("epsilon", "action_noise"):
            setattr(self.planner, name, 0.0 if deterministic else self.config[f"{name}_end"])
        actions = self.planner.act(states, np.arange(len(states)))
        return actions.reshape(*np.shape(observation)[:-1], -1)

    @torch.no_grad()
    def encode(self, observation: np.ndarray) -> np.ndarray:
        """Codes z = f(s) of single states: [..., D] -> [..., d_model] float32."""
        return self._codes(observation).cpu().numpy()

    @torch.no_grad()
    def value(self, observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """V(f(s), f(goal)), about discount^(steps to the goal - 1): [..., D] twice, which broadcast -> [...]."""
        z, z_goal = torch.broadcast_tensors(self._codes(observation), self._codes(goal, "goal"))
        return self.v(z, z_goal).cpu().numpy()

    def _codes(self, observation: np.ndarray, name: str = "observation") -> torch.Tensor:
        return self.encoder.encode_goal(torch.as_tensor(self._checked(observation, name), device=self.device))

    def _checked(self, observation: np.ndarray, name: str = "observation") -> np.ndarray:
        observation = np.asarray(observation, np.float32)
        if observation.shape[-1:] != (self.encoder.observation_dim,):
            raise ValueError(f"{name} has the shape {observation.shape}, not [..., {self.encoder.observation_dim}]")
        return observation

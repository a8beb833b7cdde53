"""A trained chain of actors from its checkpoint, to act with: pogo_main.py's and pogo_multi_main's."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_data import make_env, normalized_score
from runs.chain import Act, ChainRunConfig, final_seeds, report_final, rollout
from runs.directory import checkpoint_file, expecting, load_checkpoint
from runs.evaluation import Evaluator, num_workers
from utils import RandomStreams, resolve_device

MakeActors = Callable[[dict[str, Any], torch.device], Sequence[Act]]


class ChainPolicy:
    """The actors of a run (path: its directory, or a checkpoint), each as acts on raw observations.

    make_actors: of a checkpoint's content and a device, the actors in the order of the chain. command: writes such
    checkpoints. state: the file's content, where it is read already. Raises UserError for any other file.
    """

    def __init__(
        self,
        path: str | Path,
        make_actors: MakeActors,
        command: str,
        device: str | torch.device = "cpu",
        state: dict[str, Any] | None = None,
    ):
        self.path, device = checkpoint_file(path), torch.device(device)
        state = load_checkpoint(self.path, device) if state is None else state
        with expecting(self.path, f"a checkpoint of {command}", "give the last.pth of one of its runs"):
            self.env, self.config, self.step = state["env"], state["config"], state["step"]
            [self.config[name] for name in ("seed", "eval_episodes", "final_runs")]  # an evaluation needs them
            self.mean, self.std = state["observation_mean"].to(device), state["observation_std"].to(device)
            self.action_dim, self.actors = state["action_dim"], list(make_actors(state, device))

    @torch.no_grad()
    def act(self, observation: np.ndarray, actor: int = -1, deterministic: bool = True) -> np.ndarray:
        """Actions [..., A] of raw observations [..., D], with z = 0 or, unless deterministic, z ~ N(0, I).

        Raises ValueError for observations of another size.
        """
        if np.shape(observation)[-1:] != self.mean.shape:
            raise ValueError(f"observation has the shape {np.shape(observation)}, not [..., {len(self.mean)}]")
        states = torch.as_tensor(observation, dtype=torch.float32, device=self.mean.device)
        z = states.new_zeros(*states.shape[:-1], self.action_dim)
        actions = self.actors[actor]((states - self.mean) / self.std, z if deterministic else z.normal_())
        return actions.cpu().numpy()


def evaluate_again(config: ChainRunConfig, make_actors: MakeActors, command: str) -> dict[str, float]:
    """`--evaluate`: play a run's last evaluation again, from its file alone; print and return the scores.

    config: this command's settings, which may ask for other episodes. make_actors, command: as of `ChainPolicy`.
    """
    policy = ChainPolicy(config.evaluate, make_actors, command, resolve_device(config.device))
    runs, episodes, seed = (policy.config[name] for name in ("final_runs", "eval_episodes", "seed"))
    at_once = episodes  # as the run had, so that the noise is the same
    if config.evaluate_episodes is not None:
        runs, episodes, at_once = 1, config.evaluate_episodes, min(config.evaluate_episodes, episodes)
    first, seeds = final_seeds(RandomStreams(seed, policy.mean.device), runs * episodes)
    environment = functools.partial(make_env, policy.env, config.dataset_dir)
    acting = (policy.actors, policy.action_dim, policy.mean, policy.std)
    with Evaluator(environment, 2 * len(policy.actors) * at_once, num_workers(config.eval_workers)) as evaluator:
        played = rollout(evaluator, *acting, seeds, first, "evaluate")
    chain = ", ".join(filter(None, (policy.env, policy.config.get("algorithm"))))
    scores = normalized_score(policy.env, played.returns, config.dataset_dir)
    return report_final(policy.env, f"{chain}, update {policy.step} of {policy.path}", played, scores, runs)

"""One agent for every method of the study: loads any of their files and acts, or acts at random without one.

    python -m walker.agent                               the random policy, 100 episodes a task
    python -m walker.agent --load logs/walker/.../seed_0  a run of any method: the episodes of its own test

prints mean and standard deviation of their returns. From Python:

    agent = Agent(state_dim=24, action_dim=6)
    agent.load("logs/walker/.../seed_0")
    agent.set_task("run")
    agent.reset()                     # an episode begins
    action = agent.act(observation)   # [24] -> [6], at every step
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from dmc_utils import ACTION_DIM, OBSERVATION_DIM, TASKS, WalkerEnv
from runs.cli import parse_config, run_cli
from runs.directory import checkpoint_file, expecting, load_checkpoint, lock_run, mark_finished, prepare_run
from runs.evaluation import Evaluator, episode_seeds, num_workers
from utils import Count, RandomStreams, Whole, Workers, counted, resolve_device, write_text_atomic
from walker.policies import POLICIES

EXPERT_RETURNS = {"walk": 962.8, "run": 318.4}  # of the study's data; a method's score is its return as % of these


class Agent:
    """Acts in one task at a time, in one environment or many; at random, by a seed, until it has loaded a file."""

    def __init__(self, state_dim: int = OBSERVATION_DIM, action_dim: int = ACTION_DIM, seed: int = 0, device="cpu"):
        self.state_dim, self.action_dim, self.device = state_dim, action_dim, torch.device(device)
        self.method, self.task, self.policy = "random", TASKS[0], None
        self.random = np.random.default_rng(seed)
        self.episodes = 0  # that the policy's memory is of; 0: it is to begin anew

    def load(self, path: str | Path) -> None:
        """Become the agent of a run's directory (its last one) or of a file, a best.pth or last.pth of any method."""
        path = checkpoint_file(path)
        state = load_checkpoint(path, self.device)
        with expecting(path, "a file of the walker study's agents"):
            self.load_acting(state["acting"])

    def load_acting(self, acting: dict[str, Any]) -> None:
        mean, std = (acting[name].to(self.device) for name in ("mean", "std"))
        sizes = (len(mean) + int(acting["task_bit"]), acting["action_dim"])
        if (len(mean), acting["action_dim"]) != (self.state_dim, self.action_dim):
            raise ValueError(f"it is for {len(mean)} observations and {acting['action_dim']} actions")
        with torch.random.fork_rng(devices=[]):  # first weights are drawn and overwritten: no number may depend on it
            policy = POLICIES[acting["kind"]](*sizes, **acting["sizes"])
        policy.load_state_dict(acting["weights"])
        self.policy = policy.to(self.device).eval().requires_grad_(False)
        self.mean, self.std, self.task_bit, self.method = mean, std, acting["task_bit"], acting["method"]
        self.reset()

    def set_task(self, task: str) -> None:
        """`walk` or `run`, for all that follows; episodes begin."""
        if task not in TASKS:
            raise ValueError(f"task {task!r}: it is one of {', '.join(TASKS)}")
        self.task = task
        self.reset()

    def reset(self) -> None:
        self.episodes = 0

    def act(self, state: np.ndarray, reward: float | None = None) -> np.ndarray:
        """Action [6] in [-1, 1] of an observation [24]; `reward` as in act_vec."""
        return self.act_vec(np.asarray(state)[None], None if reward is None else np.array([reward]))[0]

    @torch.no_grad()
    def act_vec(self, states: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Actions [n, 6] in [-1, 1] of observations [n, 24], of n environments that step together.

        rewards: [n], of the step before. Only a policy that is told what return to reach reads them, and takes those it
        was told to earn where they are left out.
        """
        if np.ndim(states) != 2 or np.shape(states)[1] != self.state_dim:
            raise ValueError(f"observations have the shape {np.shape(states)}, not [n, {self.state_dim}]")
        n = len(states)
        if self.policy is None:
            return self.random.uniform(-1.0, 1.0, (n, self.action_dim)).astype(np.float32)
        if self.episodes != n:
            self.policy.begin(n, self.task)
            self.episodes = n
        inputs = (torch.as_tensor(states, dtype=torch.float32, device=self.device) - self.mean) / self.std
        bit = inputs.new_full((n, 1), float(TASKS.index(self.task)))
        inputs = torch.cat([inputs, bit], 1) if self.task_bit else inputs
        rewards = torch.as_tensor(np.full(n, np.nan) if rewards is None else rewards, dtype=torch.float32)
        return self.policy.act(inputs, rewards.to(self.device)).clamp(-1.0, 1.0).cpu().numpy()


def acting_state(
    method: str, kind: str, sizes: dict[str, Any], policy: torch.nn.Module, normalizer: tuple, task_bit: bool
) -> dict[str, Any]:
    """What a checkpoint holds under `acting`: kind is an entry of POLICIES, sizes what it is made with."""
    mean, std = (torch.as_tensor(values) for values in normalizer)
    facts = {"method": method, "kind": kind, "sizes": sizes, "task_bit": task_bit, "action_dim": ACTION_DIM}
    return facts | {"weights": policy.state_dict(), "mean": mean, "std": std}


class EvaluationEnv(gymnasium.Wrapper):
    """A task, with the reward of the last step as one more number of the observation."""

    def __init__(self, task: str):
        super().__init__(WalkerEnv(task))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM + 1,))

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        observation, info = self.env.reset(**options)
        return np.append(observation, np.float32(0.0)), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, *rest = self.env.step(action)
        return np.append(observation, np.float32(reward)), reward, *rest


def evaluate(agent: Agent, task: str, seeds: list[int], workers: int, desc: str, at_once: int = 100) -> np.ndarray:
    """Returns [episodes] of an agent in a task, an episode a seed, `at_once` side by side at most."""
    at_once = min(at_once, len(seeds))

    def policies(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
        return agent.act_vec(observations[0, :, :-1], observations[0, :, -1])[None]

    returns = []
    with Evaluator(functools.partial(EvaluationEnv, task), at_once, workers) as evaluator:
        for start in range(0, len(seeds), at_once):
            agent.set_task(task)  # episodes begin
            returns.append(evaluator.evaluate(policies, 1, seeds[start : start + at_once], desc).returns[0])
    return np.concatenate(returns)


def play(
    agents: dict[str, Agent], tasks: Iterable[str], seeds: list[int], workers: int, prefix: str = ""
) -> dict[tuple[str, str], np.ndarray]:
    """Returns [episodes] by agent and task, whose mean and standard deviation are printed as they come."""
    found = {}
    for name, task in itertools.product(agents, tasks):
        title = f"{prefix}{name}, {task}"
        found[name, task] = returns = evaluate(agents[name], task, seeds, workers, title)
        print(f"{title}: {in_words(returns)}")
    return found


def in_words(returns: np.ndarray) -> str:
    """Mean and standard deviation of returns [episodes]; of a single episode there is no deviation."""
    spread = f" ± {returns.std():.1f}" if len(returns) > 1 else ""
    return f"{returns.mean():.1f}{spread} over {counted(len(returns))}"


def play_saved(
    path: str | Path, episodes: int | None, seed: int | None, workers: int | None, device: str
) -> dict[tuple[str, str], np.ndarray]:
    """Returns by agent and task: of a run's last and best agent, or of a file's own. None: as in the run's own test."""
    folder, agents = Path(path) / "checkpoints", {}
    files = [folder / "last.pth", folder / "best.pth"] if Path(path).is_dir() else [Path(path)]
    for file in files:
        agents[file.stem] = agent = Agent(device=resolve_device(device))
        agent.load(file)
    state = load_checkpoint(files[0])
    run = state["config"]
    if seed is None:  # episodes that nothing in its training has used
        seed = (RandomStreams(run["seed"]).evaluation_seed + 1) % 2**31
    seeds = episode_seeds(seed, episodes or run["test_episodes"])
    return play(agents, state["tasks"], seeds, num_workers(workers), f"{agent.method}, ")


def write_returns(path: str | Path, found: dict[tuple[str, str], np.ndarray]) -> None:
    lines = ["agent,task,episode,return\n"]
    for (name, task), returns in found.items():
        lines += [f"{name},{task},{number},{value!r}\n" for number, value in enumerate(returns.tolist())]
    write_text_atomic(path, "".join(lines))


@dataclass
class AgentConfig:
    load: str | None = None  # run's directory, or a last.pth or best.pth of any method; default: the random policy
    episodes: Count | None = None  # episodes of each task; default: as many as the run's own test, else 100
    seed: Whole | None = None  # seed of the episodes and of random actions; default: the run's own test's, else 0
    eval_workers: Workers | None = None  # more processes that step environments; default: cores - 1, at most 7
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:<index>
    run_dir: str | None = None  # also write evaluation.csv, every episode, and finished.json to this folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a run, a file or the random policy; returns the mean return of each task, of a run the last agent's."""
    config = parse_config(AgentConfig, argv, __doc__)
    with contextlib.ExitStack() as stack:
        if config.run_dir is not None:
            stack.enter_context(lock_run(config.run_dir))
            prepare_run(config.run_dir, config, may_change={"device", "eval_workers"})
        if config.load is not None:
            found = play_saved(config.load, config.episodes, config.seed, config.eval_workers, config.device)
        else:
            seed, workers = config.seed or 0, num_workers(config.eval_workers)
            seeds = episode_seeds(seed, config.episodes or 100)
            found = play({"random": Agent(seed=seed, device=resolve_device(config.device))}, TASKS, seeds, workers)
        first = next(iter(found))[0]  # its figures are those of the last agent of a run
        found = {("last" if name == first else name, task): returns for (name, task), returns in found.items()}
        means = {task: float(returns.mean()) for (name, task), returns in found.items() if name == "last"}
        if config.run_dir is not None:
            write_returns(Path(config.run_dir, "evaluation.csv"), found)
            mark_finished(config.run_dir, {f"last/{task}/return": mean for task, mean in means.items()})
    return means


if __name__ == "__main__":
    run_cli(main)

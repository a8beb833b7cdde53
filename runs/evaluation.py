"""Evaluation of several policies at once: many environments, one call of the policies a step.

    environment   policy 0: episode 0, 1, .. E-1   policy 1: episode 0, 1, .. E-1   ...
    process       0         1  0  1                0         1                          this one, and num_workers more

Every policy meets the same reset seeds. An episode that is over is not stepped any more. Each process steps a fixed
subset of the environments; results are bit-identical for any number of workers. Processes share arrays in memory and
wake each other through pipes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from utils import ProcessDied, UserError, one_line, progress

# (observations [P, E, obs_dim] float32, alive [P, E] bool) -> actions [P, E, act_dim], an array or a tensor. It is
# called with all rows until the last episode is over; what it returns for those that are not alive is not used. A
# policy that draws noise should draw for all rows, so that an episode's does not depend on when others end.
Policies = Callable[[np.ndarray, np.ndarray], "np.ndarray | torch.Tensor"]

_RESET, _STEP = b"r", b"s"
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks that torch may hold


@dataclass(frozen=True)
class Episodes:
    """What evaluation found, by policy and episode: [P, E] each."""

    returns: np.ndarray  # float64, undiscounted
    lengths: np.ndarray  # int64, steps
    successes: np.ndarray | None  # bool: info["success"] at any step; None where the environment does not tell
    last_observations: np.ndarray  # [P, E, obs_dim] float32, where each episode ended


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """Reset seeds of the episodes of an evaluation; the first ones are the same for any number of them."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(episodes, np.uint32)]


def num_workers(eval_workers: int | None) -> int:
    """Processes that step environments beside this one: what the setting says, by default cores - 1, at most 7."""
    return min((os.cpu_count() or 1) - 1, 7) if eval_workers is None else eval_workers


def _layout(env: gymnasium.Env) -> np.dtype:
    """What the processes share of an episode."""
    vectors = [("observation", np.float32, env.observation_space.shape), ("action", np.float32, env.action_space.shape)]
    numbers = [("reward", np.float64), ("seed", np.int64), ("alive", np.bool_), ("success", np.int8)]  # -1: not told
    return np.dtype(vectors + numbers, align=True)


class _Subset:
    """The environments that one process steps, each for a row of `shared`; made when first reset, and kept."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], shared: np.ndarray, mine: range):
        self.make_env, self.shared, self.mine = make_env, shared, mine
        self.envs: dict[int, gymnasium.Env] = {}

    def run(self, message: bytes) -> None:
        """Reset or step the episodes that are alive, as the message says; those that end are alive no more."""
        shared = self.shared
        for i in self.mine:
            if not shared["alive"][i]:
                continue
            if message == _RESET:
                if i not in self.envs:
                    self.envs[i] = self.make_env()
                shared["observation"][i] = self.envs[i].reset(seed=int(shared["seed"][i]))[0]
                shared["success"][i] = -1
                continue
            observation, reward, terminated, truncated, info = self.envs[i].step(shared["action"][i])
            shared["observation"][i] = observation
            shared["reward"][i] = reward
            shared["alive"][i] = not (terminated or truncated)
            if "success" in info:
                shared["success"][i] = max(shared["success"][i], int(bool(info["success"])))

    def close(self) -> None:
        for env in self.envs.values():
            env.close()
        self.envs.clear()


def _work(connection: Any, make_env: Callable, memory: Any, layout: np.dtype, mine: range) -> None:
    """A worker's life: reset and step its subset when told to until the pipe closes. It answers b"", or an error."""
    atexit.register(gc.freeze)  # as `run_cli`: who waits for it to end is done sooner
    subset = _Subset(make_env, np.frombuffer(memory, layout), mine)
    try:
        while True:
            message, answer = connection.recv_bytes(), b""
            try:
                subset.run(message)
            except UserError as error:
                answer = pickle.dumps(error)
            except Exception:
                answer = pickle.dumps(RuntimeError(f"in evaluation worker:\n{traceback.format_exc()}"))
            connection.send_bytes(answer)
    except (EOFError, OSError):  # the parent closed its end, or is gone
        subset.close()


class Evaluator(contextlib.AbstractContextManager):
    """Environments for evaluation, made once and used for every one. Close it, or use it in a `with` statement.

    make_env: makes one environment with its time limit; picklable (a module's function or a functools.partial of one)
    where there are workers. Its `reset(seed=...)` must fix the episode. num_envs: environments stepped at once;
    policies times episodes beyond it are evaluated in several rounds. num_workers: processes beside this one, which
    steps a subset too. They start at once and import what make_env needs while this process goes on.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], num_envs: int, num_workers: int = 0):
        self.num_envs, self.num_workers = num_envs, min(num_workers, num_envs - 1)
        self._make_env = make_env
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        first = make_env()  # tells the sizes, and is this process's first environment
        layout = _layout(first)
        memory = _CONTEXT.RawArray("b", num_envs * layout.itemsize)  # anonymous: a kill leaves no file
        self._memory, self._shared = (memory, layout), np.frombuffer(memory, layout)
        self._own = _Subset(make_env, self._shared, self._subset_of(0))
        self._own.envs[0] = first
        self._start_workers()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and close the environments; closing twice is harmless."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():  # in the middle of a step
                process.kill()
                process.join()
        self._processes.clear()
        self._connections.clear()
        self._own.close()

    def _subset_of(self, process: int) -> range:
        return range(process, self.num_envs, self.num_workers + 1)

    def _start_workers(self) -> None:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as workers inherit it: they leave Ctrl-C to this one
        try:
            for number in range(1, self.num_workers + 1):
                connection, other = _CONTEXT.Pipe()
                arguments = (other, self._make_env, *self._memory, self._subset_of(number))
                process = _CONTEXT.Process(target=_work, args=arguments, daemon=True, name=f"evaluation-{number}")
                process.start()
                other.close()  # or the pipe would stay open when the worker dies
                self._processes.append(process)
                self._connections.append(connection)
        finally:
            signal.signal(signal.SIGINT, handler)

    def evaluate(
        self, policies: Policies, num_policies: int, seeds: Sequence[int], desc: str | None = None, begin_round=None
    ) -> Episodes:
        """Play one episode a policy and seed.

        policies: all `num_policies` of them in one function, see Policies. seeds: reset seeds of the E episodes, the
        same for every policy; see episode_seeds. desc: text of a progress bar; None shows none. begin_round(start) is
        called before the round whose first seed is the `start`-th.

        Raises UserError for actions that are not finite and for what make_env raises it for, ProcessDied where a worker
        died, RuntimeError with the traceback for any other failure in one, after which it can only be closed.
        """
        width = self.num_envs // num_policies
        rounds = []
        with progress(num_policies * len(seeds), desc or "", unit="episode", leave=False, disable=desc is None) as bar:
            for start in range(0, len(seeds), width):
                if begin_round:
                    begin_round(start)
                rounds.append(self._rollout(policies, num_policies, seeds[start : start + width], bar))
        returns, lengths, success, last = (np.concatenate(parts, axis=1) for parts in zip(*rounds, strict=True))
        return Episodes(returns, lengths, None if (success < 0).any() else success > 0, last)

    def _rollout(self, policies: Policies, num_policies: int, seeds: Sequence[int], bar: Any) -> tuple[np.ndarray, ...]:
        """One round: returns, lengths, successes (-1: not told) and last observations, [P, len(seeds), ...] each."""
        shape = (num_policies, len(seeds))
        count = math.prod(shape)
        shared = self._shared
        shared["seed"][:count] = np.tile(np.asarray(seeds, dtype=np.int64), num_policies)
        shared["alive"] = np.arange(self.num_envs) < count
        returns, lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
        self._everywhere(_RESET)
        alive = shared["alive"][:count].copy()
        while alive.any():
            observations = shared["observation"][:count].reshape(*shape, -1).copy()
            shared["action"][:count] = self._actions(policies, observations, alive.reshape(shape))
            self._everywhere(_STEP)
            returns[alive] += shared["reward"][:count][alive]
            lengths[alive] += 1
            bar.update(int(alive.sum() - shared["alive"][:count].sum()))
            alive = shared["alive"][:count].copy()
        found = (returns, lengths, shared["success"][:count].copy(), shared["observation"][:count].copy())
        return tuple(each.reshape(*shape, *each.shape[1:]) for each in found)

    def _actions(self, policies: Policies, observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """The policies' actions as [P * E, act_dim], checked where they are used."""
        actions = policies(observations, alive)
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().cpu().numpy()
        bad = ~np.isfinite(actions).all(axis=-1) & alive
        if bad.any():
            raise UserError(
                f"policy {int(np.argwhere(bad)[0, 0])} gave an action that is not finite: its training has diverged; "
                "lower the learning rate, or go on from an earlier checkpoint"
            )
        return actions.reshape(alive.size, -1)

    def _everywhere(self, message: bytes) -> None:
        """Reset or step all subsets that have a live episode, and wait for them."""
        busy = [number for number in range(1, self.num_workers + 1) if self._has_live(number)]
        for number in busy:
            try:
                self._connections[number - 1].send_bytes(message)
            except OSError:
                self._report_death(number)
        if self._has_live(0):
            self._own.run(message)
        for number in busy:
            try:
                answer = self._connections[number - 1].recv_bytes()
            except (EOFError, OSError):
                self._report_death(number)
            if answer:
                raise pickle.loads(answer)

    def _has_live(self, process: int) -> bool:
        return bool(self._shared["alive"][process :: self.num_workers + 1].any())

    def _report_death(self, number: int) -> None:
        process = self._processes[number - 1]
        process.join(timeout=5)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        raise ProcessDied(
            f"evaluation worker {number} died ({one_line(how)}), maybe for want of memory; use fewer evaluation workers"
        )


LEAST_EPISODES = 10  # with fewer an error of the mean says little


def report_steps(metrics: dict[str, float], scores: np.ndarray) -> dict[str, float]:
    """Print and return what each step of the chain did: how far it moved, what Q promised for it, what it scored.

    metrics: `chain/actor_i/moved`, `q_gain` and `spread` of each actor behind the first. scores: [P, episodes], each
    actor deterministic and stochastic, all on the same episodes.
    """
    found = {}
    for number in range(1, len(scores) // 2):
        step = {name: metrics[f"chain/actor_{number}/{name}"] for name in ("moved", "q_gain", "spread")}
        gains = scores[2 * number] - scores[2 * number - 2]  # deterministic, less the actor before
        step |= {"gain": float(gains.mean()), "gain_error": float(gains.std() / math.sqrt(len(gains)))}
        gain, error = step["gain"], 2 * step["gain_error"]
        verdict = "helped" if gain > error else "hurt" if gain < -error else "no clear gain"
        if step["q_gain"] <= 0 and gain <= error:
            verdict = "cannot help here, Q promises nothing for it"
        elif len(gains) < LEAST_EPISODES:
            verdict = "too few episodes to tell"
        spread = f" ± {error / 2:.2f}" if len(gains) > 1 else ""
        print(
            f"  Step to actor {number}: moved {step['moved']:.2g} (spread {step['spread']:.2g}), Q promised "
            f"{step['q_gain']:+.3g}, scored {gain:+.2f}{spread} over actor {number - 1}: {verdict}"
        )
        found |= {f"actor_{number}/{name}": value for name, value in step.items()}
    return found

"""Decision Transformer (Chen et al., 2021) on the walker: actions as a sequence model's answer to a wanted return.

    loss   mean over valid steps and elements of (pi(R, s, a up to t) - a_t)^2

over windows of K steps. Returns to go are in units of 1000. A window may begin anywhere in an episode; one that begins
less than K steps before its end is padded, and padding is neither looked at nor learned from. Acting asks for a return
that the data's better episodes of a task reach: its 90th percentile, unless `walk_target` or `run_target` says else.
(The study asked for 960 and 320; running episodes here return about 260 or about 390.)

Deviations from the paper: width 256 (128), learning rate 1e-3 (1e-4).

    python -m walker.train_dt
    python -m walker.train_dt test
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.offline.base import Learner
from dmc_utils import ACTION_DIM
from runs.cli import run_cli
from utils import Basic, BelowOne, Count, NonNegative, Number, Positive, UserError
from walker.agent import EXPERT_RETURNS
from walker.policies import POLICIES, ReturnConditioned
from walker.study_run import StudyConfig, StudyRun, run_command

RETURN_SCALE = 1000.0


@dataclass
class TransformerConfig(StudyConfig):
    max_timesteps: Basic[Count] = 3_000  # updates of the run
    eval_freq: Count = 1_000  # updates between evaluations, and at most between checkpoints
    log_freq: Count = 100  # updates between rows of metrics.csv
    batch_size: Count = 64  # windows in an update
    lr: Positive = 1e-3  # learning rate of AdamW
    weight_decay: NonNegative = 1e-4  # of AdamW
    warmup_steps: Count = 300  # updates over which the learning rate rises to lr
    grad_clip: Positive = 0.25  # largest norm of the gradient
    context: Count = 20  # K, steps in a window
    hidden_dim: Count = 256  # width of the transformer
    layers: Count = 3  # its blocks
    heads: Count = 1  # its attention heads; must divide hidden_dim
    dropout: BelowOne = 0.1  # share of activations that are dropped in training
    walk_target: Number | None = None  # return to ask for when walking; default: the data's 90th percentile
    run_target: Number | None = None  # return to ask for when running; likewise


class SequenceLearner(Learner):
    """The transformer and its AdamW; targets: return to ask for in each task."""

    def __init__(
        self,
        config: TransformerConfig,
        input_dim: int,
        action_dim: int,
        targets: dict[str, float],
        device: str | torch.device = "cpu",
    ):
        super().__init__(device)
        names = ("context", "hidden_dim", "layers", "heads", "dropout")
        self.config, self.sizes = config, {name: getattr(config, name) for name in names}
        self.sizes |= {"return_scale": RETURN_SCALE, "targets": targets}
        self.policy: ReturnConditioned = POLICIES["decision_transformer"](input_dim, action_dim, **self.sizes)
        self.networks["policy"] = self.policy.to(device)
        self.lr = torch.tensor(config.lr, device=device)
        options = {"weight_decay": config.weight_decay, "fused": True}
        self.optimizer = self.optimizers["policy"] = torch.optim.AdamW(self.policy.parameters(), self.lr, **options)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step on windows: observations [n, K, D], actions [n, K, A], returns, times and valid [n, K]."""
        config, valid = self.config, batch["valid"]
        self.lr.fill_(config.lr * min((self.step + 1) / config.warmup_steps, 1.0))
        arguments = (batch["observations"], batch["actions"], batch["returns"], batch["times"], valid)
        predicted = self.policy.train().network(*arguments)
        squared = (predicted - batch["actions"]).square().mean(-1) * valid
        loss = squared.sum() / valid.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return {"action_loss": loss.detach(), "gradient_norm": norm.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on, torch's global generator included."""
        generator = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
        return super().state_dict() | {"dropout": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.param_groups[0]["lr"] = self.lr
        generator = state["dropout"].cpu()
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generator, self.device)
        else:
            torch.set_rng_state(generator)


class TransformerRun(StudyRun):
    method = "dt"
    config: TransformerConfig
    learner: SequenceLearner

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        if config.hidden_dim % config.heads:
            raise UserError(f"--heads {config.heads}: must divide --hidden_dim {config.hidden_dim}")

    def make_learner(self) -> SequenceLearner:
        asked = {"walk": self.config.walk_target, "run": self.config.run_target}
        for task, returns in self.data_returns.items():
            asked[task] = float(np.quantile(returns, 0.9)) if asked[task] is None else asked[task]
        targets = {task: EXPERT_RETURNS[task] if target is None else target for task, target in asked.items()}
        return SequenceLearner(self.config, self.input_dim, ACTION_DIM, targets, self.device)

    def prepare_data(self) -> None:
        """Episodes, padded by a window's length so that a window may begin at their last step."""
        data, more = self.data, self.config.context - 1
        # The faulty pairing: an action beside the observation of its own row.
        here = data.observations[:, 1:] if self.config.faulty_pairing else data.observations[:, :-1]
        episodes, steps = here.shape[:2]
        inputs = self.inputs(here.reshape(episodes * steps, -1), np.repeat(data.tasks, steps))
        # Sums of the rewards from each step on, its own included.
        to_go = np.cumsum(data.rewards[:, ::-1], axis=1, dtype=np.float64)[:, ::-1].astype(np.float32)
        arrays = {
            "observations": inputs.reshape(episodes, steps, -1),
            "actions": data.actions,
            "returns": to_go / RETURN_SCALE,
            "valid": np.ones((episodes, steps), np.bool_),
        }
        self.episodes = {
            name: torch.as_tensor(np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))).to(self.device)
            for name, array in arrays.items()
        }
        self.length = steps

    def make_batch(self) -> dict[str, Tensor]:
        """Windows that begin at any step of any episode, with new noise on the observations."""
        config, generator = self.config, self.streams.sampling
        shape = (config.batch_size, 1)
        episode = torch.randint(len(self.data.tasks), shape, generator=generator, device=self.device)
        first = torch.randint(self.length, shape, generator=generator, device=self.device)
        times = first + torch.arange(config.context, device=self.device)
        batch = {name: values[episode, times] for name, values in self.episodes.items()}
        return batch | {"observations": self.with_noise(batch["observations"]), "times": times}

    def policy(self) -> tuple[str, dict[str, Any], ReturnConditioned]:
        return "decision_transformer", self.learner.sizes, self.learner.policy


main = functools.partial(run_command, TransformerRun, TransformerConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)

"""Model-based: a model of the walker is learned from the data, then PPO trains the policy inside it.

1. `model_updates` updates fit the model, and clone the data's actions into the policy that PPO begins with: a random
   one would act where the model has seen nothing. Where there are 20 episodes or more, each 20th is held out from the
   model, and `held_out/...` in metrics.csv says how well it foretells them.
2. From then on an update is an iteration of PPO: `imagined_envs` episodes of `horizon` steps in the model, which begin
   at states of the data, whose likely actions hold the policy (`bc_weight`).

Noise on observations reaches the cloning alone: model and PPO see what is.

    python -m walker.train_model                       an MLP
    python -m walker.train_model --model vae           a conditional VAE
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.offline.base import Learner
from dmc_utils import ACTION_DIM
from model_kernels import Adam, cosine
from runs.cli import run_cli
from utils import Basic, Count, Positive, ReplayBuffer, UserError
from walker.dynamics import Dynamics, MLPDynamics, VAEDynamics, statistics_of
from walker.policies import Markov
from walker.ppo import PPO, PPOConfig
from walker.study_run import StudyConfig, StudyRun, run_command

HELD_OUT_EVERY = 20  # each 20th episode is held out from the model


@dataclass
class InModelConfig(StudyConfig, PPOConfig):
    max_timesteps: Basic[Count] = 20_500  # updates of the model, and then iterations of PPO
    model_updates: Count = 20_000  # of these, updates of the model
    eval_freq: Count = 50  # iterations of PPO between evaluations; there is one before the first
    log_freq: Count = 50  # updates between rows of metrics.csv
    hidden_dim: Count = 256  # width of every network
    model_lr: Positive = 1e-3  # learning rate of Adam for the model and for cloning; falls to 0 along a cosine


@dataclass
class ModelConfig(InModelConfig):
    model: Literal["mlp", "vae"] = "mlp"  # kind of model


class InModelLearner(Learner):
    """A model, and a policy that PPO trains in it; imagined episodes begin in the data's states."""

    def __init__(self, config: InModelConfig, model: Dynamics, data: ReplayBuffer, generator: torch.Generator):
        super().__init__(data.device)
        self.config, self.data, self.generator = config, data, generator
        self.ppo = PPO(config, model.input_dim, ACTION_DIM, config.hidden_dim, generator, self.device)
        self.ppo.value.layers()[-1][1].data.add_(data.rewards.mean())  # V begins at the level of the data's rewards
        self.lr = torch.tensor(config.model_lr, device=self.device)
        self.model = self.add("model", model, self.lr)
        self.optimizers["cloning"] = Adam(self.ppo.actor.net.parameters(), self.lr)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit model and policy to a batch, or, once `model_updates` have, an iteration of PPO."""
        info = self.fit(batch) if self.step < self.config.model_updates else self.iterate(batch)
        self.step += 1
        return info

    def fit(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of the model and of cloning, on `members` times as many transitions as the latter takes."""
        self.lr.fill_(self.config.model_lr * cosine(self.step / self.config.model_updates))
        model_loss, info = self.model.loss(batch, self.generator)
        first = len(batch["actions"]) // self.model.members
        bc_loss = F.mse_loss(self.ppo.actor(batch["noisy"][:first]), batch["actions"][:first])
        self.minimise("model", model_loss)
        self.minimise("cloning", bc_loss)
        return info | {"bc_loss": bc_loss.detach()}

    def iterate(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        rollout, figures = self.ppo.imagine(starts["observations"], self.model_step)
        config, iteration = self.config, self.step - self.config.model_updates
        self.ppo.anneal(iteration / (config.max_timesteps - config.model_updates))
        data = starts["observations"], starts["actions"]
        return figures | self.ppo.improve(rollout, data, iteration >= config.value_warmup)

    def model_step(self, inputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step of the model, in which nothing ends."""
        following, rewards = self.model.step(inputs, actions, self.generator)
        return following, rewards, torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ppo": self.ppo.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ppo.load_state_dict(state["ppo"])


class InModelRun(StudyRun):
    config: InModelConfig
    learner: InModelLearner

    @classmethod
    def check(cls, config: InModelConfig) -> None:
        if config.max_timesteps <= config.model_updates:
            raise UserError(
                f"--max_timesteps {config.max_timesteps}: must be more than --model_updates {config.model_updates}, or "
                "nothing is left for PPO"
            )
        if config.imagined_envs * config.horizon < 2 * config.minibatches:
            raise UserError(f"--minibatches {config.minibatches}: leaves less than two imagined steps to each")

    def prepare_data(self) -> None:
        """All transitions, those that the model may see and those that it may not, and what it must know of them."""
        super().prepare_data()
        own, episodes = len(self.mean), len(self.data.tasks)
        self.statistics = statistics_of(self.buffer.observations[:, :own], self.buffer.next_observations[:, :own])
        held_out = np.arange(episodes) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.seen = ReplayBuffer(**self.part(~held_out), device=self.device)
        self.held_out = self.part(held_out)

    def make_batch(self) -> dict[str, Tensor]:
        config = self.config
        if self.step >= config.model_updates:
            return self.buffer.sample(config.imagined_envs, self.streams.sampling)
        batch = self.seen.sample(config.batch_size * self.learner.model.members, self.streams.sampling)
        return batch | {"noisy": self.with_noise(batch["observations"])}

    def is_evaluation(self, step: int) -> bool:
        iterations = step - self.config.model_updates
        return step == self.config.max_timesteps or iterations >= 0 and iterations % self.config.eval_freq == 0

    def evaluate(self) -> dict[str, float]:
        """As every run, with the model's errors in episodes that it was not fitted to."""
        figures, rows = super().evaluate(), self.held_out
        if len(rows["rewards"]) == 0:
            return figures
        model, generator = self.learner.model, torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
        with torch.no_grad():
            predicted = model.predict(rows["observations"], rows["actions"], generator)
            squared = (predicted - model.targets(rows)).square().mean(0)
        errors = {"change_error": squared[:-1].mean(), "reward_error": squared[-1]}
        return figures | {f"held_out/{name}": float(value) for name, value in errors.items()}

    def policy(self) -> tuple[str, dict[str, Any], Markov]:
        return "gaussian_actor", {"hidden_dim": self.config.hidden_dim}, Markov(self.learner.ppo.actor)


class ModelRun(InModelRun):
    method = "model"
    config: ModelConfig

    @staticmethod
    def labels(config: ModelConfig) -> list[str]:
        return [config.model]

    def make_learner(self) -> InModelLearner:
        kind = {"mlp": MLPDynamics, "vae": VAEDynamics}[self.config.model]
        model = kind(self.input_dim, ACTION_DIM, self.statistics, self.config.hidden_dim)
        return InModelLearner(self.config, model, self.buffer, self.streams.policy)


main = functools.partial(run_command, ModelRun, ModelConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)

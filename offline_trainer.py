"""Pretrain OPSO's encoder, Q(z, z'), V(z, z_g) and proposer offline, on the states of an OGBench maze dataset.

With no flag it generates local/pointmaze-medium-navigate-v0 and trains on it in minutes on two cores. A run's
directory holds config.yaml, metrics.csv, TensorBoard events, best_model.pth (lowest validation loss),
checkpoints/last.pth, training_curves.png and value_map.png.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmark_data.local import generate_if_missing
from model_kernels import resolve_backend
from offline_agent import OfflineAgent, OfflineAgentConfig
from offline_data import made_here
from ogbench_utils import TrajectoryDataset, make_env, parse_dataset_id
from opso.diagnostics import HeldOut, value_map
from opso.maze import Maze, evaluation_tasks
from runs.cli import parse_config, run_cli
from runs.directory import mark_finished, save_checkpoint
from runs.metrics import RunningMeans, read_metrics
from runs.plots import plot_training_curves, plot_value_maps
from runs.run import DeviceRunConfig, Run
from utils import Basic, Count, MayChange, PositiveBelowOne, Range, UserError, counted, progress, resolve_device


@dataclass
class OfflineTrainerConfig(DeviceRunConfig, OfflineAgentConfig):
    dataset: Basic[str] = "local/pointmaze-medium-navigate-v0"  # OGBench id, or local/<id> for one generated here
    dataset_dir: Basic[MayChange[str | None]] = None  # folder of the data; default: OGBENCH_DATASET_DIR, or datasets/
    discount: PositiveBelowOne | None = None  # discount factor of rewards; default 0.99, giant and humanoid mazes 0.995
    max_trajectories: Count | None = 100  # train on the file's first so many episodes
    batch_size: Count = 16  # windows in an update
    num_epochs: Basic[MayChange[Count]] = 100  # passes of updates_per_epoch updates
    updates_per_epoch: Count | None = None  # default: as many as give one window a trajectory
    eval_freq: Count = 10  # epochs between validations; each one writes a checkpoint
    eval_batches: Count = 8  # batches of the validation loss
    eval_states: Annotated[int, Range(2, 10**6)] = 512  # held-out histories of value_distance_spearman
    eval_goals: Annotated[int, Range(2, 10**6)] = 256  # held-out goals of value_distance_spearman
    plot_maps: MayChange[bool] = True  # write value_map.png at the end


MAP_WINDOWS = 128  # held-out windows whose states value_map.png shows


def sample_batch(
    data: TrajectoryDataset, config: OfflineAgentConfig, batch_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Every random choice of one update, drawn on the data's device: windows, goals, horizons, InfoNCE offset."""
    windows = data.sample_windows(batch_size, config.context_length, generator)
    rows = windows["rows"][:, :-1]
    goal_rows, steps_to_goal = data.sample_goals(
        rows, generator, config.p_self, config.p_future, config.p_random, config.goal_discount
    )
    return {
        "observations": windows["observations"],
        "valid": windows["valid"],
        "goals": data.observations[goal_rows],
        "steps_to_goal": steps_to_goal,
        "last": rows + 1 == data.episode_end[rows],
        "horizon": torch.randint(1, config.horizon + 1, rows.shape, generator=generator, device=data.device),
        "nce_offset": torch.randint(config.context_length, (), generator=generator, device=data.device),
    }


class OfflineRun(Run):
    """One run: the data, the agent, its held-out pairs, its random streams and its directory."""

    config: OfflineTrainerConfig

    def __init__(self, config: OfflineTrainerConfig):
        super().__init__(resolve(config))

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.agent.step

    @classmethod
    def default_run_dir(cls, config: OfflineTrainerConfig) -> Path:
        """The directory that the settings name, or logs/offline/{dataset}/seed_{seed}."""
        return Path(config.run_dir or Path("logs") / "offline" / config.dataset / f"seed_{config.seed}")

    @classmethod
    def check(cls, config: OfflineTrainerConfig) -> None:
        shares = config.p_self + config.p_future + config.p_random
        if abs(shares - 1) > 1e-6:
            raise UserError(f"--p_self, --p_future and --p_random sum to {shares:g}", "they must sum to 1")
        inner = config.expand * config.d_model
        if config.d_model % 2 or inner % min(64, inner):
            must = "must be even, and expand * d_model below 64 or a multiple of 64"
            raise UserError(f"--d_model {config.d_model}", must)
        device = resolve_device(config.device)
        try:
            backend = resolve_backend(config.backend, device)
        except (ValueError, ImportError) as error:
            raise UserError(f"--backend {config.backend}", str(error)) from None
        print(f"{config.dataset}, seed {config.seed}, {device}, Mamba-2 backend {backend}")

    @classmethod
    def may_change(cls, config: OfflineTrainerConfig) -> set[str]:
        """With decay the learning rate depends on the run's length, so that cannot change on the way."""
        return super().may_change(config) - ({"num_epochs"} if config.lr_decay else set())

    def load_data(self) -> None:
        """Training and validation episodes; a local dataset that is missing is generated first."""
        config, device = self.config, self.device
        dataset = generate_if_missing(config.dataset, config.dataset_dir)
        self.train_data = dataset.load("train", config.dataset_dir, config.max_trajectories, device)
        self.val_data = dataset.load("val", config.dataset_dir, None, device)
        self.data_facts = made_here([config.dataset], config.dataset_dir)

    def build(self) -> None:
        """The agent, and the held-out pairs to judge it by."""
        config = self.config
        per_pass = math.ceil(self.train_data.num_trajectories / config.batch_size)
        self.updates_per_epoch = config.updates_per_epoch or per_pass
        with self.streams.initialising():
            mean, std = self.train_data.normalizer()
            total = config.num_epochs * self.updates_per_epoch
            self.agent = OfflineAgent(config, self.train_data.observation_dim, mean, std, self.device, total)
        torch.manual_seed(self.streams.dropout_seed)  # dropout is the one thing that draws from the global generators
        self.epoch, self.best_loss = 0, math.inf
        self.env = make_env(config.dataset)
        self.resources.callback(self.env.close)
        self.maze = Maze.from_env(self.env)
        sizes = (config.context_length, config.eval_states, config.eval_goals)
        self.held_out = HeldOut(self.val_data, self.maze, *sizes, self.streams.evaluation_seed)

    def train(self) -> dict[str, float]:
        """Train to num_epochs, validating and saving every eval_freq epochs. Returns the last figures."""
        config, agent, metrics = self.config, self.agent, {}
        total = config.num_epochs * self.updates_per_epoch
        began, first = time.perf_counter(), agent.step
        with progress(total, "train", initial=agent.step, unit="update") as bar:
            while self.epoch < config.num_epochs:
                means = RunningMeans()
                for _ in range(self.updates_per_epoch):
                    batch = sample_batch(self.train_data, config, config.batch_size, self.streams.sampling)
                    means.add(agent.update(batch))
                    bar.update()
                self.epoch += 1
                metrics = means.take()  # the one wait for the device in an epoch
                self.check_metrics({"loss": metrics["loss"]}, "lower --lr")
                validates = self.epoch % config.eval_freq == 0 or self.epoch == config.num_epochs
                if validates:
                    metrics |= self.evaluate()
                    bar.set_postfix(loss=f"{metrics['loss']:.3f}", spearman=f"{metrics['value_distance_spearman']:.3f}")
                self.logger.log(agent.step, {"epoch": self.epoch} | metrics)
                if validates:
                    self.save(metrics["val_loss"])
        if not metrics:  # cut after its last checkpoint, before its plots
            return self.evaluate()
        rate = (agent.step - first) * config.batch_size * config.context_length / (time.perf_counter() - began)
        print(f"trained to update {agent.step}: {rate:,.0f} transitions a second")
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Mean losses over the same held-out batches every time, and diagnostics."""
        config, means = self.config, RunningMeans()
        generator = torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
        for _ in range(config.eval_batches):
            means.add(self.agent.evaluate_losses(sample_batch(self.val_data, config, config.batch_size, generator)))
        losses = {f"val_{name}": value for name, value in means.take().items()}
        return losses | self.held_out.evaluate(self.agent)

    def save(self, val_loss: float) -> None:
        """best_model.pth if this is the best so far, then checkpoints/last.pth: whole files, in this order."""
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            save_checkpoint(self.run_dir / "best_model.pth", self.model_state() | {"val_loss": val_loss})
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        state = {
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "agent": self.agent.state_dict(),
            "streams": self.streams.state_dict(),
            "torch_generators": [torch.get_rng_state(), *cuda],  # dropout draws from them
            **{key: self.model_state()[key] for key in ("dataset", "config", "observation_dim")},
        }
        self.write_checkpoint(state)

    def model_state(self) -> dict:
        """What the online stage and the plots need: the model with its normaliser, its sizes and its dataset."""
        return {
            "dataset": self.config.dataset,
            "config": self.model_config(),
            "observation_dim": self.train_data.observation_dim,
            "model": self.agent.model.state_dict(),
            "target": self.agent.target.state_dict(),
            "epoch": self.epoch,
        }

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.streams.load_state_dict(state["streams"])
        torch.set_rng_state(state["torch_generators"][0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["torch_generators"][1].cpu(), self.device)
        self.epoch, self.best_loss = state["epoch"], state["best_loss"]

    def plot(self) -> None:
        """training_curves.png and, unless turned off, value_map.png."""
        config, data = self.config, self.train_data
        size = f"{counted(data.num_trajectories)}, {len(data.observations):,} states"
        title = f"{config.dataset} ({size}), seed {config.seed}, update {self.agent.step}"
        plot_training_curves(read_metrics(self.run_dir), self.run_dir / "training_curves.png", title)
        if config.plot_maps:
            generator = torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
            batch = self.val_data.sample_windows(MAP_WINDOWS, config.context_length, generator)
            states = batch["observations"][:, :-1][batch["valid"]]
            tasks, reach = evaluation_tasks(self.env), self.maze.unit / 4
            maps = [value_map(self.agent, states, task, reach) for task in tasks]
            plot_value_maps(self.maze, states[:, :2].cpu().numpy(), maps, self.run_dir / "value_map.png", title)


def resolve(config: OfflineTrainerConfig) -> OfflineTrainerConfig:
    """The settings with a discount whose values reach through the maze, as OGBench's hyperparameters have it."""
    dataset = parse_dataset_id(config.dataset)
    is_long = dataset.maze_size == "giant" or dataset.maze_env == "humanoidmaze"
    return replace(config, discount=config.discount or (0.995 if is_long else 0.99))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(OfflineTrainerConfig, argv, __doc__, default_run_dir=OfflineRun.default_run_dir)
    with OfflineRun(config) as run:
        metrics = run.train()
        run.plot()
        names = ("value_distance_spearman", "proposer_cosine", "code_std", "code_rank", "val_loss")
        summary = {name: metrics[name] for name in names}
        mark_finished(run.run_dir, {**summary, "updates": run.agent.step, "dataset": config.dataset})
    print(f"{config.dataset}, seed {config.seed}, update {run.agent.step}, last checkpoint:")
    for name, value in summary.items():
        print(f"  {name}: {value:.3f}")
    print(f"outputs in {run.run_dir}: best_model.pth, checkpoints/last.pth, metrics.csv, *.png")


if __name__ == "__main__":
    run_cli(main)

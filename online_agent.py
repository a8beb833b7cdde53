"""OPSO online agent: a subgoal-conditioned policy on a frozen encoder, on the way to subgoals found by search.

From the offline stage: the encoder f, frozen, so that every state is encoded once; Q(z, z', z_g), V(z, z_g) and the
subgoal proposer next_state(z, z_g), which keep learning here. New here: the subgoal-conditioned policy
inverse_dynamics(z, z', z_g); an inverse dynamics model (s, s') -> a, which infers the dataset's actions; and a metric
of steps between states, which makes a graph of the dataset (opso/search.py). Codes are those of single states,
z = f(s), as the offline stage's target codes are; the policy sees the state beside its code.

    own transitions (s, a, s') ---> inverse dynamics model ---> the dataset's actions ---> inverse_dynamics learns

    states of the dataset ---> graph: along trajectories, and short links between them ---Dijkstra---> path to the goal
                                                                                                            |
    s_t ---f---> z_t, s_t --------------------------------------> inverse_dynamics <--- z', some steps ahead on it

Deviations from the original OPSO code (docs/notebook_opso.md has the measurements):
- z' lies up to `subgoal_steps` ahead, not one: a step of an ant says little about where it goes.
- Acting searches among dataset states. `acting value` takes the one of the highest V among those some steps away,
  `acting proposer` the one whose code is nearest to next_state(z, z_g), which the original acts by.
- The graph's links are short by a metric that InfoNCE trains on states a few steps apart. V is vague there: it takes
  states on both sides of a corner for near.
- The proposer learns the graph's ways to `route_goals` of its nodes, and V their lengths beside its own targets
  (opso/routes.py): acting then needs no search. Where the data went, weighted by the steps that V says it saved (HIQL;
  Park et al., 2023), led to four goals of five on the point maze.
- The policy clones actions without weights; weighted by a capped exp(advantage) it reached fewer goals.
- Targets of Q and V span many steps, as offline.
- Without the dataset's actions, the inverse dynamics model learns from the agent's own transitions, random ones at
  first, and infers the action between two states of the dataset; the policy then learns from those as from known ones
  (behavioural cloning from observation; Torabi et al., 2018). One step tells much of its action; many random ones,
  which the policy would have to learn from, tell almost nothing.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from model import InverseDynamics, InverseDynamicsModel, OfflineModel, StateMetric
from model_kernels import Adam, cosine
from utils import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    Range,
    Whole,
    expectile_loss,
    n_step_target,
)

Acting = Literal["search", "value", "proposer"]


@dataclass
class OnlineAgentConfig:
    lr: Positive = 3e-4  # learning rate of Adam
    tau: PositiveFraction = 0.01  # rate of the EMA targets of Q and V
    expectile: Fraction = 0.9  # weight of V errors whose target lies above V
    horizon: Count = 50  # targets of Q and V span 1..horizon steps, sampled for each transition
    subgoal_steps: Count | None = None  # steps that z' lies ahead; default 10, ant and humanoid 25; the original has 1
    route_goals: Count = 400  # goals from all of the data whose ways along the graph V and the proposer learn
    acting: Acting = "search"  # z' by search, or near by and chosen by V or next_state
    graph_nodes: Annotated[int, Range(2, 10**6)] = 150_000  # most dataset states in the graph, evenly spaced in time
    num_links: Count = 10  # nearest states by the metric that each state is linked to
    link_cost: NonNegative = 3.0  # steps that a link costs beside its length, for changing the trajectory
    trusted_steps: Positive = 8.0  # length in steps at which a link costs twice its length
    aim_steps: Positive | None = None  # how far z' lies ahead, by the metric; default: what gets 12 steps away
    replan_every: Count = 5  # environment steps between two choices of z'
    patience: Count = 30  # environment steps without progress before a random escape; search blocks the edge
    block_radius: NonNegative = 20.0  # edges between nodes this many steps around a blocked edge's ends are blocked too
    escape_steps: Whole = 10  # environment steps that one random action is held to escape
    metric_steps: Count | None = None  # the metric learns on states 1..metric_steps apart; default 10, ant, humanoid 25
    metric_dim: Count = 32  # size of the metric's embedding
    metric_lr: Positive = 1e-3  # learning rate of the metric, decaying to 0
    p_self: Fraction = 0.1  # fraction of hindsight goals that are the state the transition arrives at
    p_future: Fraction = 0.5  # fraction of hindsight goals sampled ahead on the trajectory, geometrically
    p_random: Fraction = 0.4  # fraction of hindsight goals sampled from all states
    goal_discount: BelowOne = 0.99  # discount of the geometric distribution of p_future


def minimize(net: nn.Module, lr: float, loss: Callable[[], Tensor], updates: Collection[int], floor=0.0, decay=0.0):
    """Steps of AdamW with a weight decay, at a rate that falls along a cosine to `floor` of itself; then net is frozen.

    updates: 0, 1, ..., a range or a progress bar over it. Returns the last loss.
    """
    parameters, last = list(net.requires_grad_(True).parameters()), torch.zeros(())
    moments = [[torch.zeros_like(each) for each in parameters] for _ in range(2)]
    steps = [torch.zeros((), device=each.device) for each in parameters]
    usual = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": False}
    for number in updates:
        last = loss()
        grads = list(torch.autograd.grad(last, parameters))
        rate = lr * (floor + (1 - floor) * cosine(number / len(updates)))
        with torch.no_grad():  # the function alone: torch.optim's classes take seconds and 70 MB to import a compiler
            own = {"lr": rate, "weight_decay": decay, "decoupled_weight_decay": True}
            adam(parameters, grads, *moments, [], steps, **usual, **own)
    net.requires_grad_(False)
    return float(last.detach())


class OnlineAgent:
    """The frozen encoder, the heads that go on learning, their EMA targets and one optimizer.

    model: what the offline stage trained; its encoder is frozen, its heads are copied. hidden_dim: width of the inverse
    dynamics. discount: that of the pretrained values; another one would make them wrong.
    """

    POLICY = ("encoder", "heads", "metric")  # what acts
    LEARNING = ("idm", "target", "optimizer")  # what only learning needs

    def __init__(self, config: OnlineAgentConfig, model: OfflineModel, action_dim, hidden_dim, discount, device="cpu"):
        self.config, self.discount, self.device = config, discount, torch.device(device)
        self.action_dim, self.code_dim = action_dim, model.encoder.d_model
        self.encoder = model.encoder.to(self.device).eval().requires_grad_(False)
        self.heads = nn.ModuleDict({name: copy.deepcopy(getattr(model, name)) for name in ("q", "v", "next_state")})
        features = self.code_dim + self.encoder.observation_dim
        self.heads["inverse_dynamics"] = InverseDynamics(features, hidden_dim, action_dim)
        self.heads.to(self.device).requires_grad_(True)
        self.metric = StateMetric(self.encoder.observation_dim, hidden_dim, config.metric_dim).to(self.device)
        self.idm = InverseDynamicsModel(self.encoder.observation_dim, hidden_dim, action_dim).to(self.device)
        self.target = nn.ModuleDict({name: copy.deepcopy(self.heads[name]) for name in ("q", "v")})
        self.target.requires_grad_(False)
        self.online_parameters = [p for name in ("q", "v") for p in self.heads[name].parameters()]
        self.target_parameters = [p for name in ("q", "v") for p in self.target[name].parameters()]
        self.lr = torch.tensor(config.lr, device=self.device)
        self.optimizer = Adam(self.heads.parameters(), self.lr)

    @torch.no_grad()
    def encode(self, observations: Tensor, block: int = 1024) -> Tensor:
        """Features of single states: code and normalised state, [..., D] -> [..., d_model + D].

        In blocks that bound the memory, each filled up to a power of two: oneDNN keeps half a megabyte of code for each
        number of rows that a layer has met, and episodes end after any number of steps.
        """
        flat = observations.reshape(-1, observations.shape[-1])
        features = flat.new_empty(len(flat), self.code_dim + flat.shape[-1])
        for part, into in zip(flat.split(block), features.split(block), strict=True):
            missing = (1 << (len(part) - 1).bit_length()) - len(part)
            into[:, : self.code_dim] = self.encoder.encode_goal(F.pad(part, (0, 0, 0, missing)))[: len(part)]
            into[:, self.code_dim :] = (part - self.encoder.mean) / self.encoder.std
        return features.view(*observations.shape[:-1], -1)

    def code(self, features: Tensor) -> Tensor:
        """The code in features: [..., d_model + D] -> [..., d_model]."""
        return features[..., : self.code_dim]

    def state(self, features: Tensor) -> Tensor:
        """The normalised state in features: [..., d_model + D] -> [..., D]."""
        return features[..., self.code_dim :]

    # -- metric ------------------------------------------------------------------------------------------------------

    def fit_metric(self, sample: Callable[[], tuple[Tensor, Tensor, Tensor]], updates: Collection[int]) -> float:
        """Train the metric by InfoNCE, then measure how many steps a squared distance is worth. Returns the last loss.

        sample() gives features [n, d_model + D], those of later states of the same trajectories and the steps between
        them [n]. Each state must be found among the n later ones by its distance, and the other way round.
        """

        def loss() -> Tensor:
            state, later, _ = sample()
            logits = -torch.cdist(self.embed(state), self.embed(later))
            own = torch.arange(len(logits), device=self.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        last = minimize(self.metric, self.config.metric_lr, loss, updates)
        with torch.no_grad():
            parts = [sample() for _ in range(20)]
            squares = torch.cat([(self.embed(x) - self.embed(y)).square().sum(-1) for x, y, _ in parts])
            self.metric.steps_per_square.copy_(torch.cat([n for *_, n in parts]).float().sum() / squares.sum())
        return last

    def embed(self, features: Tensor) -> Tensor:
        """Points of states: [..., d_model + D] -> [..., metric_dim]."""
        return self.metric(self.state(features))

    @property
    def aim_steps(self) -> float:
        """How many steps ahead z' is taken: as set, or as the data says."""
        return self.config.aim_steps or self.metric.aim_steps.item()

    @torch.no_grad()
    def metric_steps(self, points: Tensor, others: Tensor) -> Tensor:
        """Steps by the metric between all points: [m, metric_dim] and [k, metric_dim] -> [m, k]."""
        return self.metric.steps_per_square * torch.cdist(points, others).square()

    # -- the dataset's actions ---------------------------------------------------------------------------------------

    def fit_idm(
        self, sample: Callable[[], tuple[Tensor, Tensor, Tensor]], updates: Collection[int], lr: float
    ) -> float:
        """Train the inverse dynamics model on the agent's own transitions, by a smooth L1 loss. Returns the last loss.

        sample() gives normalised states [n, D], the next ones, and the actions between [n, A].
        """

        def loss() -> Tensor:
            states, later, actions = sample()
            return F.smooth_l1_loss(self.idm(states, later), actions, beta=0.1)

        return minimize(self.idm, lr, loss, updates, floor=0.02, decay=1e-4)

    def scale_idm(self, states: Tensor, later: Tensor) -> None:
        """Take the mean and deviation of a step from normalised states [n, D] and the next ones."""
        difference = later - states
        self.idm.mean.copy_(difference.mean(0))
        self.idm.scale.copy_(difference.std(0) + 1e-3)

    @torch.no_grad()
    def infer_actions(self, states: Tensor, later: Tensor, block: int = 4096) -> Tensor:
        """Actions that lead from normalised states to the next ones: [n, D] twice -> [n, A] in [-1, 1]."""
        pairs = zip(states.split(block), later.split(block), strict=True)
        return torch.cat([self.idm(here, there).clamp(-1, 1) for here, there in pairs])

    # -- losses, in the order of the objective ------------------------------------------------------------------

    @torch.no_grad()
    def critic_target(self, batch: dict[str, Tensor]) -> Tensor:
        """Target of Q(z, z', z_g) [n]: discount^(k-1) if the goal comes after k <= n steps, else
        discount^n V_target(z_{t+n}, z_g)."""
        value = self.target["v"](batch["z_ahead"], batch["z_goal"])
        return n_step_target(batch["steps_to_goal"], batch["n"], self.discount, value)

    @torch.no_grad()
    def v_target(self, batch: dict[str, Tensor]) -> Tensor:
        """Target of V(z, z_g) [n]: discount^(k-1) if the goal comes after k < n steps, else
        discount^(n-1) min Q_target(z_{t+n-1}, z_{t+n}, z_g)."""
        value = self.target["q"](batch["z_before"], batch["z_ahead"], batch["z_goal"]).amin(0)
        return n_step_target(batch["steps_to_goal"], batch["n"] - 1, self.discount, value)

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Smooth L1 of both Q(z, z', z_g) against their target."""
        target = self.critic_target(batch)
        q = self.heads["q"](batch["z"], batch["z_next"], batch["z_goal"])
        return F.smooth_l1_loss(q, target.expand_as(q)), {"q_mean": q.mean()}

    def v_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Expectile regression of V(z, z_g) towards the smaller target Q, n - 1 steps ahead."""
        v = self.heads["v"](batch["z"], batch["z_goal"])
        return expectile_loss(v, self.v_target(batch), self.config.expectile).mean(), {"v_mean": v.mean()}

    def route_value_loss(self, route: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Squared error of V(z, z_g) to discount^(k-1), where k steps remain on the way along the graph."""
        v = self.heads["v"](self.code(route["x"]), self.code(route["x_goal"]))
        return F.mse_loss(v, self.discount ** (route["steps"].clamp(min=1) - 1)), {}

    def state_loss(self, route: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Squared error of next_state(z, z_g) to the code aim_steps ahead on the way along the graph."""
        proposal = self.heads["next_state"](self.code(route["x"]), self.code(route["x_goal"]))
        error = (proposal - self.code(route["x_aim"])).square().mean(-1)
        known = route["steps"].isfinite()
        return (error * known).sum() / known.sum().clamp(min=1), {}

    def action_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Squared error of the inverse dynamics."""
        action = self.heads["inverse_dynamics"](batch["x"], batch["x_sub"], batch["x_goal"])
        return F.mse_loss(action, batch["actions"]), {}

    # -- update ---------------------------------------------------------------------------------------------------

    def update(
        self,
        batch: dict[str, Tensor],
        values: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
        lr_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """One step of the policy on a batch, and of Q, V, the proposer and the EMA targets where `values` is given.

        batch: features x, x_sub (what the policy aims at), x_goal; actions [n, A]. values: rows, which need no actions,
        and a `Routes.sample`; rows have codes z, z_next, z_before, z_ahead (z_{t+n-1}, z_{t+n}), z_goal; steps_to_goal,
        n [n] int64. Returns 0-d tensors, without a host sync.
        """
        self.lr.fill_(self.config.lr * lr_scale)
        terms = {"train": self.action_loss(batch)}
        if values is not None:
            rows, route = values
            terms |= {"critic": self.critic_loss(rows), "v": self.v_loss(rows), "state": self.state_loss(route)}
            terms |= {"route_v": self.route_value_loss(route)}
        # No weights: but for V's two, no losses share a parameter, as the encoder is frozen; Adam ignores their scales.
        self.optimizer.minimise(sum(loss for loss, _ in terms.values()))
        if values is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.target_parameters, self.online_parameters, self.config.tau)
        info = {f"{name}_loss": loss.detach() for name, (loss, _) in terms.items()}
        return info | {key: value.detach() for _, extra in terms.values() for key, value in extra.items()}

    @torch.no_grad()
    def act(self, x: Tensor, x_sub: Tensor, x_goal: Tensor) -> Tensor:
        """The action that leads from x towards x_sub, in [-1, 1]. Features [n, d_model + D] -> [n, A]."""
        return self.heads["inverse_dynamics"](x, x_sub, x_goal)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next update depends on; the encoder too, so that the file acts by itself."""
        others = {name: getattr(self, name).state_dict() for name in self.LEARNING}
        return self.policy_state_dict() | others

    def policy_state_dict(self) -> dict:
        """What acting needs, and no more."""
        return {name: getattr(self, name).state_dict() for name in self.POLICY}

    def load_state_dict(self, state: dict) -> None:
        """Continue from either dict. Raises KeyError or RuntimeError where the state is another model's."""
        for name in self.POLICY + (self.LEARNING if "optimizer" in state else ()):
            getattr(self, name).load_state_dict(state[name])

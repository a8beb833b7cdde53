"""OPSO online agent: acts through inverse dynamics on a frozen encoder, on the way to subgoals found by search.

What it takes from the offline stage: the encoder f, frozen, so that every state is encoded once; Q(z, z', z_g),
V(z, z_g) and the proposer, which keep learning here. What it adds: inverse_dynamics(z, z', z_g), the action that
leads towards z', and a metric of steps between states, which makes a graph of the dataset. Codes are those of single
states, z = f(s), as the offline stage's target codes are; the inverse dynamics sees the state beside its code.

    own transitions (s, a, s') ---> labeller ---> actions between the dataset's states ---> inverse_dynamics learns

    states of the dataset ---> graph: along trajectories, and short links between them ---Dijkstra---> way to the goal
                                                                                                            |
    s_t ---f---> z_t, s_t --------------------------------------> inverse_dynamics <--- z', some steps ahead on it

Deviations from the original OPSO code, each with its reason (docs/opso.md has the measurements):
- z' lies up to `subgoal_steps` ahead, not one: a step of an ant says little about where it goes. `subgoal_steps 1`
  is the original.
- Acting searches (`acting search`) among dataset states (Savinov et al., 2018; Eysenbach et al., 2019). `acting
  proposer` asks next_state(z, z_g), as the original does, and takes the dataset state whose code is nearest.
- The graph's links are short by a metric that InfoNCE trains on states a few steps apart. V is vague there: it takes
  states on both sides of a corner for near.
- The proposer is fitted by advantage-weighted regression to codes subgoal_steps ahead (HIQL; Park et al., 2023), and
  the inverse dynamics by a capped exp(advantage) of its step towards z', which `action_temperature` 0, the default,
  turns off. Advantages are counted in steps saved.
- Targets of Q and V span many steps, as offline.
- Without the dataset's actions, a labeller a = g(s_t, s_{t+1}) learns from one's own transitions, random ones at
  first, and says which action lay between two states of the dataset; the inverse dynamics then learns from those as
  from known ones (behavioural cloning from observation; Torabi et al., 2018). One step tells much of its action; many
  steps of random actions, which the inverse dynamics would have to learn from, tell almost nothing.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor, nn

from model import InverseDynamics, OfflineModel, StateMetric, StepInverse
from utils import expectile_loss

LEAST_VALUE = 1e-3  # values are clipped here before their logarithm is taken


@dataclass
class OnlineAgentConfig:
    lr: float = 3e-4  # Adam
    tau: float = 0.01  # rate of the EMA targets of Q and V
    expectile: float = 0.9  # weight of V errors whose target lies above V
    horizon: int = 50  # targets of Q and V span 1..horizon steps, drawn for each transition
    subgoal_steps: int = 25  # how far ahead z' lies; 1 is the original
    state_temperature: float = 0.3  # of the proposer: a subgoal weighs exp(temperature * steps it saves)
    action_temperature: float = 0.0  # of the inverse dynamics, likewise; 0 weighs all actions alike
    max_weight: float = 20.0  # cap of these weights
    acting: Literal["search", "proposer"] = "search"  # where z' comes from: dataset states, or next_state
    graph_nodes: int = 20_000  # dataset states in the graph, evenly spaced in time
    num_links: int = 10  # nearest states by the metric that each state is linked to
    link_cost: float = 3.0  # steps that a link costs beside its length: a change of trajectory
    trusted_steps: float = 8.0  # where the cost of a link begins to grow faster than its length
    aim_steps: float = 15.0  # how far ahead on the way found z' is taken
    replan_every: int = 5  # environment steps between two choices of z'
    patience: int = 30  # steps without progress after which a way is barred for the episode
    bar_steps: float = 20.0  # what lies this near to either end of a barred way is barred with it
    wander_steps: int = 10  # steps of one random action that follow: whatever held it there may let go
    metric_steps: int = 25  # the metric learns from states 1..metric_steps apart
    metric_dim: int = 32  # of its embedding
    metric_lr: float = 1e-3  # Adam, decaying to 0
    p_self: float = 0.1  # share of hindsight goals that are the state the transition arrives at
    p_future: float = 0.5  # share drawn ahead on the trajectory, geometrically
    p_random: float = 0.4  # share drawn from all states
    goal_discount: float = 0.99  # of the geometric draw


class OnlineAgent:
    """The frozen encoder, the heads that go on learning, their EMA targets and one optimizer.

    Args:
        config: settings of the losses and of acting.
        model: what the offline stage trained; its encoder is frozen, its heads are copied.
        action_dim: numbers in an action.
        hidden_dim: width of the inverse dynamics.
        discount: that of the pretrained values; another one would make them wrong.
        device: where everything lives.
    """

    HEADS = ("q", "v", "next_state", "inverse_dynamics")
    POLICY = ("encoder", "heads", "metric")  # what acts

    def __init__(
        self,
        config: OnlineAgentConfig,
        model: OfflineModel,
        action_dim: int,
        hidden_dim: int,
        discount: float,
        device: str | torch.device = "cpu",
    ):
        self.config, self.discount, self.device = config, discount, torch.device(device)
        self.action_dim = action_dim
        self.encoder = model.encoder.to(self.device).eval().requires_grad_(False)
        self.heads = nn.ModuleDict({name: copy.deepcopy(getattr(model, name)) for name in self.HEADS[:3]})
        self.code_dim = self.encoder.d_model
        features = self.code_dim + self.encoder.observation_dim
        self.heads["inverse_dynamics"] = InverseDynamics(features, hidden_dim, action_dim)
        self.heads.to(self.device).requires_grad_(True)
        self.metric = StateMetric(self.encoder.observation_dim, hidden_dim, config.metric_dim).to(self.device)
        self.labeller = StepInverse(self.encoder.observation_dim, hidden_dim, action_dim).to(self.device)
        self.target = nn.ModuleDict({name: copy.deepcopy(self.heads[name]) for name in ("q", "v")})
        self.target.requires_grad_(False)
        self.online_parameters = [p for name in ("q", "v") for p in self.heads[name].parameters()]
        self.target_parameters = [p for name in ("q", "v") for p in self.target[name].parameters()]
        lr = torch.tensor(config.lr, device=self.device)
        self.optimizer = torch.optim.Adam(
            self.heads.parameters(), lr=lr, fused=True, capturable=self.device.type == "cuda"
        )
        self.step = 0

    @torch.no_grad()
    def encode(self, observations: Tensor, block: int = 4096) -> Tensor:
        """Features of single states: the code and the normalised state, [..., D] -> [..., d_model + D].

        In blocks that bound the memory.
        """
        flat = observations.reshape(-1, observations.shape[-1])
        features = flat.new_empty(len(flat), self.code_dim + flat.shape[-1])
        for part, into in zip(flat.split(block), features.split(block), strict=True):
            into[:, : self.code_dim] = self.encoder.encode_goal(part)
            into[:, self.code_dim :] = (part - self.encoder.mean) / self.encoder.std
        return features.view(*observations.shape[:-1], -1)

    def code(self, features: Tensor) -> Tensor:
        """The code in features: [..., d_model + D] -> [..., d_model]."""
        return features[..., : self.code_dim]

    # -- metric ------------------------------------------------------------------------------------------------------

    def fit_metric(
        self, draw: Callable[[], tuple[Tensor, Tensor, Tensor]], updates: Iterable[int], total: int
    ) -> float:
        """Train the metric by InfoNCE, then learn how many steps a squared distance is worth. Returns the last loss.

        draw() gives features [n, d_model + D], those of later states of the same trajectories and how many steps lie
        between [n]. Each state must be found among the n later ones by its distance, and the other way round.
        """
        optimizer = torch.optim.Adam(self.metric.requires_grad_(True).parameters(), self.config.metric_lr)
        loss = torch.zeros(())
        for number in updates:
            state, later, _ = draw()
            for group in optimizer.param_groups:
                group["lr"] = self.config.metric_lr * (0.5 + 0.5 * math.cos(math.pi * number / total))
            logits = -torch.cdist(self.embed(state), self.embed(later))
            own = torch.arange(len(logits), device=self.device)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        self.metric.requires_grad_(False)
        with torch.no_grad():
            parts = [draw() for _ in range(20)]
            squares = torch.cat([(self.embed(x) - self.embed(y)).square().sum(-1) for x, y, _ in parts])
            self.metric.steps_per_square.copy_(torch.cat([n for *_, n in parts]).float().sum() / squares.sum())
        return float(loss.detach())

    def embed(self, features: Tensor) -> Tensor:
        """Points of states: [..., d_model + D] -> [..., metric_dim]."""
        return self.metric(self.state(features))

    @torch.no_grad()
    def metric_steps(self, points: Tensor, others: Tensor) -> Tensor:
        """Steps by the metric between all points: [m, metric_dim] and [k, metric_dim] -> [m, k]."""
        return self.metric.steps_per_square * torch.cdist(points, others).square()

    # -- labels ------------------------------------------------------------------------------------------------------

    def fit_labeller(
        self, draw: Callable[[], tuple[Tensor, Tensor, Tensor]], updates: Iterable[int], total: int, lr: float
    ) -> float:
        """Train the labeller on transitions of one's own, by a smooth L1 loss. Returns the last loss.

        draw() gives normalised states [n, D], the next ones, and the actions between [n, A].
        """
        optimizer = torch.optim.AdamW(self.labeller.requires_grad_(True).parameters(), lr, weight_decay=1e-4)
        loss = torch.zeros(())
        for number in updates:
            states, later, actions = draw()
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.51 + 0.49 * math.cos(math.pi * number / total))
            loss = F.smooth_l1_loss(self.labeller(states, later), actions, beta=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.labeller.requires_grad_(False)
        return float(loss.detach())

    def scale_labeller(self, states: Tensor, later: Tensor) -> None:
        """Take the mean and deviation of a step from normalised states [n, D] and the next ones."""
        difference = later - states
        self.labeller.mean.copy_(difference.mean(0))
        self.labeller.scale.copy_(difference.std(0) + 1e-3)

    @torch.no_grad()
    def label(self, states: Tensor, later: Tensor, block: int = 4096) -> Tensor:
        """The actions that seem to lead from normalised states to the next ones: [n, D] twice -> [n, A] in [-1, 1]."""
        pairs = zip(states.split(block), later.split(block), strict=True)
        return torch.cat([self.labeller(here, there).clamp(-1, 1) for here, there in pairs])

    def state(self, features: Tensor) -> Tensor:
        """The normalised state in features: [..., d_model + D] -> [..., D]."""
        return features[..., self.code_dim :]

    # -- losses, in the order of the objective ------------------------------------------------------------------

    @torch.no_grad()
    def critic_target(self, batch: dict[str, Tensor]) -> Tensor:
        """Target of Q(z, z', z_g) [n]: discount^(k-1) if the goal comes after k <= n steps, else
        discount^n V_target(z_{t+n}, z_g)."""
        steps, n = batch["steps_to_goal"], batch["n"]
        value = self.target["v"](batch["z_ahead"], batch["z_goal"]).clamp(0, 1)
        known = self.discount ** (steps.clamp(max=self.config.horizon) - 1).float()
        return torch.where(steps <= n, known, self.discount**n * value)

    @torch.no_grad()
    def v_target(self, batch: dict[str, Tensor]) -> Tensor:
        """Target of V(z, z_g) [n]: discount^(k-1) if the goal comes after k < n steps, else
        discount^(n-1) min Q_target(z_{t+n-1}, z_{t+n}, z_g)."""
        steps, n = batch["steps_to_goal"], batch["n"]
        value = self.target["q"](batch["z_before"], batch["z_ahead"], batch["z_goal"]).amin(0).clamp(0, 1)
        known = self.discount ** (steps.clamp(max=self.config.horizon) - 1).float()
        return torch.where(steps < n, known, self.discount ** (n - 1) * value)

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Smooth L1 of both Q(z, z', z_g) against their target."""
        target = self.critic_target(batch)
        q = self.heads["q"](batch["z"], batch["z_next"], batch["z_goal"])
        return F.smooth_l1_loss(q, target.expand_as(q)), {"q_mean": q.mean()}

    def v_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Expectile regression of V(z, z_g) towards the smaller target Q, n - 1 steps ahead."""
        v = self.heads["v"](batch["z"], batch["z_goal"])
        return expectile_loss(v, self.v_target(batch), self.config.expectile).mean(), {"v_mean": v.mean()}

    def state_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Advantage-weighted regression of next_state(z, z_g) to the code subgoal_steps ahead, or the goal before."""
        left = self.steps_between(batch["z_far"], batch["z_goal"])
        left = torch.where(batch["far_steps"] == batch["steps_to_goal"], 0.0, left)  # it is the goal
        saved = self.steps_between(batch["z"], batch["z_goal"]) - left
        weight = self.weight(saved - batch["far_steps"], self.config.state_temperature)
        proposal = self.heads["next_state"](batch["z"], batch["z_goal"])
        error = (proposal - batch["z_far"]).square().mean(-1)
        return (weight * error).mean(), {"state_weight": weight.mean()}

    def action_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Squared error of the inverse dynamics where the action is known, weighted by the step's advantage to z'."""
        weight = self.action_weight(batch) * batch["acted"]
        action = self.heads["inverse_dynamics"](batch["x"], batch["x_sub"], batch["x_goal"])
        error = (action - batch["actions"]).square().mean(-1)
        known = batch["acted"].sum().clamp(min=1)
        info = {"action_error": (error * batch["acted"]).sum() / known, "action_weight": weight.sum() / known}
        return (weight * error).sum() / known, info

    @torch.no_grad()
    def action_weight(self, batch: dict[str, Tensor]) -> Tensor:
        """Weight [n] of each action: by the steps towards z' that it saves, beyond the one it takes."""
        if self.config.action_temperature == 0:
            return torch.ones_like(batch["acted"])
        left = self.steps_between(batch["z_next"], batch["z_sub"])
        left = torch.where(batch["sub_steps"] == 1, 0.0, left)  # it is z'
        saved = self.steps_between(batch["z"], batch["z_sub"]) - left
        return self.weight(saved - 1, self.config.action_temperature)

    @torch.no_grad()
    def weight(self, advantage: Tensor, temperature: float) -> Tensor:
        """Capped exp(temperature * advantage); advantage in steps, 0 where the data is as good as V expects."""
        return torch.exp(temperature * advantage).clamp(max=self.config.max_weight)

    @torch.no_grad()
    def steps_between(self, z: Tensor, z_goal: Tensor) -> Tensor:
        """Steps from z to z_goal by V: V = discount^(k-1) where k remain. [..., d_model] twice -> [...], at least 1."""
        value = self.target["v"](z, z_goal).clamp(LEAST_VALUE, 1)
        return 1 + value.log() / math.log(self.discount)

    # -- update ---------------------------------------------------------------------------------------------------

    def update(self, batch: dict[str, Tensor], lr_scale: float = 1.0) -> dict[str, Tensor]:
        """One optimizer step on a batch of codes, then the EMA targets. Returns 0-d tensors, without a host sync.

        batch: z, z_next, z_before, z_ahead, z_sub, z_far, z_goal [n, d_model] (z_{t+n-1}, z_{t+n}, the codes the
        inverse dynamics and the proposer aim at), features x, x_sub, x_goal [n, d_model + D], actions [n, A], acted [n]
        0/1 where the action is known, steps_to_goal, n, sub_steps, far_steps [n] int64.
        """
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.config.lr * lr_scale)
        self.optimizer.zero_grad(set_to_none=True)
        terms = {
            "critic": self.critic_loss(batch),
            "v": self.v_loss(batch),
            "state": self.state_loss(batch),
            "train": self.action_loss(batch),
        }
        # No weights: the four losses share no parameter, as the encoder is frozen, and Adam ignores their scales.
        sum(loss for loss, _ in terms.values()).backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.online_parameters, self.config.tau)
        self.step += 1
        info = {f"{name}_loss": loss.detach() for name, (loss, _) in terms.items()}
        return info | {key: value.detach() for _, extra in terms.values() for key, value in extra.items()}

    @torch.no_grad()
    def act(self, x: Tensor, x_sub: Tensor, x_goal: Tensor) -> Tensor:
        """The action that leads from x towards x_sub, in [-1, 1]. Features [n, d_model + D] -> [n, A]."""
        return self.heads["inverse_dynamics"](x, x_sub, x_goal)

    @torch.no_grad()
    def propose(self, z: Tensor, z_goal: Tensor) -> Tensor:
        """The proposer's code on the way to the goal. Codes [n, d_model] -> [n, d_model]."""
        return self.heads["next_state"](z, z_goal)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next update depends on; the encoder too, so that the file acts by itself."""
        others = {name: getattr(self, name).state_dict() for name in ("labeller", "target", "optimizer")}
        return self.policy_state_dict() | others | {"step": self.step}

    def policy_state_dict(self) -> dict:
        """What acting needs, and no more."""
        return {name: getattr(self, name).state_dict() for name in self.POLICY}

    def load_policy_state_dict(self, state: dict) -> None:
        """Raises KeyError or RuntimeError where the state is another model's."""
        for name in self.POLICY:
            getattr(self, name).load_state_dict(state[name])

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError or RuntimeError where the state is another model's."""
        self.load_policy_state_dict(state)
        for name in ("labeller", "target", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = int(state["step"])


class StateGraph:
    """Dataset states, joined along their trajectories and by links to the nearest states of the others.

    A trajectory's edge costs the steps it took. A link of x steps by the metric costs link_cost + x (1 + x /
    trusted_steps), in both directions, so that a chain of short links is preferred to a long one. Through a wall only
    long links lead, since no trajectory passes there.

    Args:
        agent: whose metric measures the links.
        features: [n, d_model + D] of the nodes, in the order of the dataset.
        rows: [n] int64, increasing, their rows in the dataset.
        episode_end: [n] int64, the last row of each node's episode.
    """

    def __init__(self, agent: OnlineAgent, features: Tensor, rows: Tensor, episode_end: Tensor):
        self.agent, self.features = agent, features
        self.points = agent.embed(features).detach()
        here, there, cost = self._nearest()
        rows, end = rows.cpu().numpy(), episode_end.cpu().numpy()
        first = np.flatnonzero(end[:-1] == end[1:])
        here, there = np.concatenate([here, there, first]), np.concatenate([there, here, first + 1])
        cost = np.concatenate([cost, cost, (rows[first + 1] - rows[first]).astype(np.float64)])
        # The cheapest of parallel edges: a sparse matrix would add them up.
        order = np.lexsort((cost, there, here))
        here, there, cost = here[order], there[order], cost[order]
        keep = np.append(True, (here[1:] != here[:-1]) | (there[1:] != there[:-1]))
        self.here, self.there, self.cost = here[keep], there[keep], cost[keep]

    def __len__(self) -> int:
        return len(self.points)

    def link_cost(self, steps: Tensor) -> Tensor:
        """Cost of a link of so many steps by the metric."""
        return self.agent.config.link_cost + steps * (1 + steps / self.agent.config.trusted_steps)

    def _nearest(self, block: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Links from each node to the num_links nearest others: from, to, cost."""
        there, cost = [], []
        for start in range(0, len(self), block):
            steps = self.agent.metric_steps(self.points[start : start + block], self.points)
            steps.diagonal(start).fill_(math.inf)
            near, price = self._cheapest(steps, len(self) - 1)
            there.append(near)
            cost.append(price)
        here = np.repeat(np.arange(len(self)), there[0].shape[1])
        return here, np.concatenate(there).ravel(), np.concatenate(cost).ravel()

    def links(self, points: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Links between points [m, metric_dim] and their nearest nodes: nodes [m, L] int and their costs [m, L]."""
        return self._cheapest(self.agent.metric_steps(points, self.points), len(self))

    def _cheapest(self, steps: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
        near = steps.topk(min(self.agent.config.num_links, most), largest=False)
        return near.indices.cpu().numpy(), self.link_cost(near.values).double().cpu().numpy()

    def ends(self, point: Tensor, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes within bar_steps of a point and of a node, each counted to the nearer one: [n] bool twice."""
        steps = self.agent.metric_steps(torch.stack([point, self.points[node]]), self.points).cpu().numpy()
        near, first = steps <= self.agent.config.bar_steps, steps[0] < steps[1]
        first[node], near[1, node] = False, True
        return near[0] & first, near[1] & ~first

    def nearest_codes(self, codes: Tensor) -> np.ndarray:
        """The node whose code is nearest to each code [m, d_model]: [m] int."""
        return torch.cdist(codes, self.agent.code(self.features)).argmin(1).cpu().numpy()

    def routes(
        self, last: np.ndarray, last_cost: np.ndarray, barred: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shortest ways of all nodes to one goal.

        last, last_cost: [L] the nodes linked to the goal and the costs of these links; barred: pairs of [n] bool, no
        edge from the first set to the second is taken. Returns the steps [n], inf where no way leads, and the next
        node on it [n]: n for the goal, or a negative number.
        """
        n = len(self)
        here, there = np.append(self.here, last), np.append(self.there, np.full(len(last), n))
        cost = np.append(self.cost, last_cost)
        keep = np.ones(len(cost), dtype=bool)
        for start, end in barred:
            keep &= ~(np.append(start, False)[here] & np.append(end, False)[there])
        backwards = csr_matrix((cost[keep], (there[keep], here[keep])), shape=(n + 1, n + 1))
        steps, following = dijkstra(backwards, indices=n, return_predecessors=True)
        return steps[:n], following[:n]


class Navigator:
    """Acts in several environments at once, towards one goal each, from reset to the episode's end.

    Args:
        agent: the networks.
        graph: the dataset's states.
        goals: [E, D] observations of the goals.
        seeds: [E] of all that is random here, one for each environment, so that none depends on the others.
        epsilon: probability, at each choice of z', of exploring straight towards the goal:
            z' = z + a (z_g - z), a uniform in [0.2, 1].
        action_noise: standard deviation of the Gaussian noise on actions.
    """

    def __init__(
        self,
        agent: OnlineAgent,
        graph: StateGraph,
        goals: np.ndarray,
        seeds: Sequence[int],
        epsilon: float = 0.0,
        action_noise: float = 0.0,
    ):
        self.agent, self.graph = agent, graph
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.epsilon, self.action_noise = epsilon, action_noise
        self.goals = agent.encode(torch.as_tensor(np.asarray(goals, np.float32), device=agent.device))
        count = len(self.goals)
        self.clock = 0
        self.choices = self.explorations = 0  # how often z' was chosen, and how often by exploring
        self.subgoals = self.goals.clone()  # [E, d_model + D]: z' and its state
        self.chosen = np.full(count, len(graph))  # the node that z' is; n for the goal
        if agent.config.acting == "search":
            self.nearest = np.full(count, np.inf)  # fewest steps to the goal so far
            self.nearest_at = np.zeros(count, dtype=int)  # when that was
            self.wandering = np.zeros(count, dtype=int)  # steps left of the random action
            self.wander_actions = torch.zeros(count, agent.action_dim)
            self.goal_points = agent.embed(self.goals)
            self.last = list(zip(*graph.links(self.goal_points), strict=True))  # nodes linked to the goals, and costs
            self.barred: list[list] = [[] for _ in range(count)]  # ways that led nowhere: nodes here, and there
            self.routes = [graph.routes(*last) for last in self.last]

    @torch.no_grad()
    def act(self, observations: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Actions [m, A] float32 of the environments `live` [m], which show observations [m, D]."""
        agent, x = self.agent, self.features(observations, live)
        if self.clock % agent.config.replan_every == 0:
            self.choose(x, live)
        self.clock += 1
        actions = agent.act(x, self.subgoals[live], self.goals[live]).cpu()
        if self.action_noise > 0:
            size = agent.action_dim
            noise = [torch.randn(size, generator=self.generators[env]) for env in live]
            actions = actions + self.action_noise * torch.stack(noise)
        if agent.config.acting == "search":
            lost = self.wandering[live] > 0
            actions[torch.from_numpy(lost)] = self.wander_actions[live[lost]]
            self.wandering[live[lost]] -= 1
        return actions.clamp(-1, 1).numpy()

    def features(self, observations: np.ndarray, live: np.ndarray) -> Tensor:
        """Features [m, d_model + D] of the states that the environments `live` show: one position each, at any step."""
        return self.agent.encode(torch.as_tensor(np.asarray(observations, np.float32), device=self.agent.device))

    def exploring_share(self) -> float:
        """How many of the choices of z' so far were exploration."""
        return self.explorations / max(self.choices, 1)

    def choose(self, x: Tensor, live: np.ndarray) -> None:
        """Choose z' anew for the environments `live`, whose states have features x [m, d_model + D]."""
        if self.agent.config.acting == "search":
            points = self.agent.embed(x)
            nodes, costs = self.graph.links(points)
            to_goal = self.agent.metric_steps(points, self.goal_points).cpu().numpy()
            for row, env in enumerate(live):
                self._follow(env, points[row], nodes[row], costs[row], float(to_goal[row, env]))
        else:
            proposal = self.agent.propose(self.agent.code(x), self.agent.code(self.goals[live]))
            self.chosen[live] = self.graph.nearest_codes(proposal)
        own = np.flatnonzero(self.chosen[live] < len(self.graph))
        self.subgoals[live] = self.goals[live]
        self.subgoals[live[own]] = self.graph.features[self.chosen[live[own]]]
        self.choices += len(live)
        if self.epsilon > 0:
            draws = torch.stack([torch.rand(2, generator=self.generators[env]) for env in live])
            explore, share = draws.T.to(self.agent.device)
            ahead = x + (0.2 + 0.8 * share).unsqueeze(-1) * (self.goals[live] - x)
            explores = (explore < self.epsilon).unsqueeze(-1)
            self.subgoals[live] = torch.where(explores, ahead, self.subgoals[live])
            self.explorations += int(explores.sum())

    def _follow(self, env: int, point: Tensor, nodes: np.ndarray, costs: np.ndarray, to_goal: float) -> None:
        """Choose one environment's z': the goal if it is near, else the node `aim_steps` ahead on the shortest way.

        nodes, costs: [L] the links of the state it is in.
        """
        ahead, count = self.agent.config.aim_steps, len(self.graph)
        steps, following = self.routes[env]
        total = costs + steps[nodes]
        for here, there in self.barred[env]:
            if here[nodes].any():  # it stands where the barred way begins
                total[there[nodes]] = np.inf
        if self.barred[env] and not np.isfinite(total).any():  # barred too much: begin anew
            self.barred[env].clear()
            self.nearest[env] = np.inf
            steps, following = self.routes[env] = self.graph.routes(*self.last[env])
            total = costs + steps[nodes]
        best = int(total.argmin())
        if to_goal <= ahead or not np.isfinite(total[best]):
            node, left = count, to_goal
        else:
            node, left = int(nodes[best]), total[best]
            while node < count and left - steps[node] < ahead:
                node = int(following[node])
        if left < self.nearest[env] - 1:
            self.nearest[env], self.nearest_at[env] = left, self.clock
        elif self.clock - self.nearest_at[env] >= self.agent.config.patience:
            self._bar(env, point, node)
        self.chosen[env] = node

    def _bar(self, env: int, point: Tensor, node: int) -> None:
        """The way from here to `node` led nowhere: bar it for the rest of the episode, and wander a little."""
        self.nearest[env], self.nearest_at[env] = np.inf, self.clock
        self.wandering[env] = self.agent.config.wander_steps
        self.wander_actions[env] = 2 * torch.rand(self.agent.action_dim, generator=self.generators[env]) - 1
        if node < len(self.graph):
            self.barred[env].append(self.graph.ends(point, node))
            self.routes[env] = self.graph.routes(*self.last[env], self.barred[env])

"""OPSO online agent: acts through inverse dynamics on a frozen encoder, on the way to subgoals found by search.

What it takes from the offline stage: the encoder f, frozen, so that every state is encoded once; Q(z, z', z_g),
V(z, z_g) and the proposer, which keep learning here. What it adds: inverse_dynamics(z, z', z_g), the action that
leads towards z'. All codes here are codes of single states, z = f(s), as the offline stage's target codes are.

    states of the dataset ---f---> landmarks ---V---> graph of short ways ---Dijkstra---> way to the goal
                                                                                             |
    s_t ---f---> z_t -------------------------------------> inverse_dynamics <--- z', some steps ahead on it

Deviations from the original OPSO code, each with its reason (docs/opso.md has the measurements):
- z' lies up to `subgoal_steps` ahead, not one: a step of an ant says little about where it goes. `subgoal_steps 1`
  is the original.
- Acting searches (`acting search`): V is right about short ways and vague about long ones, so short ways are joined
  (Eysenbach et al., 2019). `acting proposer` asks next_state(z, z_g), as the original does.
- The proposer is fitted by advantage-weighted regression to codes subgoal_steps ahead (HIQL; Park et al., 2023), and
  the inverse dynamics by a capped exp(advantage) of its step towards z'. Advantages are counted in steps saved.
- Targets of Q and V span many steps, as offline.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor, nn

from model import InverseDynamics, OfflineModel
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
    acting: str = "search"  # how z' is chosen: search (over landmarks) or proposer (next_state)
    num_landmarks: int = 500  # dataset states that the search joins
    trusted_steps: float = 8.0  # where the cost of an edge of the search begins to grow faster than its length
    aim_steps: float = 15.0  # how far ahead on the way found z' is taken
    replan_every: int = 5  # environment steps between two choices of z'
    patience: int = 40  # steps without progress after which a way is barred for the episode
    wander_steps: int = 20  # steps of one random action that follow where the agent explores: the unknown is there
    p_self: float = 0.1  # share of hindsight goals that are the state the transition arrives at
    p_future: float = 0.5  # share drawn ahead on the trajectory, geometrically
    p_random: float = 0.4  # share drawn from all states
    goal_discount: float = 0.99  # of the geometric draw
    p_hard: float = 0.0  # share of transitions whose goal is the nearest, by V, of hard_candidates random states
    hard_candidates: int = 8  # see p_hard


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
        self.heads["inverse_dynamics"] = InverseDynamics(self.encoder.d_model, hidden_dim, action_dim)
        self.heads.to(self.device).requires_grad_(True)
        self.target = nn.ModuleDict({name: copy.deepcopy(self.heads[name]) for name in ("q", "v")})
        self.target.requires_grad_(False)
        self.learning = [p for name in ("q", "v") for p in self.heads[name].parameters()]
        self.following = [p for name in ("q", "v") for p in self.target[name].parameters()]
        lr = torch.tensor(config.lr, device=self.device)
        self.optimizer = torch.optim.Adam(
            self.heads.parameters(), lr=lr, fused=True, capturable=self.device.type == "cuda"
        )
        self.step = 0

    @torch.no_grad()
    def encode(self, observations: Tensor, block: int = 4096) -> Tensor:
        """Codes of single states, in blocks that bound the memory. [..., D] -> [..., d_model]."""
        flat = observations.reshape(-1, observations.shape[-1])
        codes = torch.cat([self.encoder.encode_goal(part) for part in flat.split(block)])
        return codes.view(*observations.shape[:-1], -1)

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
        saved = self.steps_between(batch["z"], batch["z_goal"]) - self.steps_between(batch["z_far"], batch["z_goal"])
        weight = self.weight(saved - batch["far_steps"], self.config.state_temperature)
        proposal = self.heads["next_state"](batch["z"], batch["z_goal"])
        error = (proposal - batch["z_far"]).square().mean(-1)
        return (weight * error).mean(), {"state_weight": weight.mean()}

    def action_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Squared error of the inverse dynamics where the action is known, weighted by the step's advantage to z'."""
        saved = self.steps_between(batch["z"], batch["z_sub"]) - self.steps_between(batch["z_next"], batch["z_sub"])
        weight = self.weight(saved - 1, self.config.action_temperature) * batch["acted"]
        action = self.heads["inverse_dynamics"](batch["z"], batch["z_sub"], batch["z_goal"])
        error = (action - batch["actions"]).square().mean(-1)
        known = batch["acted"].sum().clamp(min=1)
        info = {"action_error": (error * batch["acted"]).sum() / known, "action_weight": weight.sum() / known}
        return (weight * error).sum() / known, info

    @torch.no_grad()
    def weight(self, advantage: Tensor, temperature: float) -> Tensor:
        """Capped exp(temperature * advantage); advantage in steps, 0 where the data is as good as V expects."""
        return torch.exp(temperature * advantage).clamp(max=self.config.max_weight)

    @torch.no_grad()
    def steps_between(self, z: Tensor, z_goal: Tensor) -> Tensor:
        """Steps from z to z_goal by V: log V / log discount. [..., d_model] twice -> [...], in steps."""
        value = self.target["v"](z, z_goal).clamp(LEAST_VALUE, 1)
        return value.log() / math.log(self.discount)

    @torch.no_grad()
    def hardest(self, z: Tensor, candidates: Tensor) -> Tensor:
        """Which candidate is the nearest by V: [n, d_model] and [n, c, d_model] -> [n] int64.

        As goals these show V where it is wrong: states that it takes for near and that trajectories do not reach,
        such as those beyond the corner of a wall.
        """
        return self.target["v"](z.unsqueeze(1).expand_as(candidates), candidates).argmax(1)

    # -- update ---------------------------------------------------------------------------------------------------

    def update(self, batch: dict[str, Tensor], lr_scale: float = 1.0) -> dict[str, Tensor]:
        """One optimizer step on a batch of codes, then the EMA targets. Returns 0-d tensors, without a host sync.

        batch: z, z_next, z_before, z_ahead, z_sub, z_far, z_goal [n, d_model] (z_{t+n-1}, z_{t+n}, the codes the
        inverse dynamics and the proposer aim at), actions [n, A], acted [n] 0/1 where the action is known,
        steps_to_goal, n, far_steps [n] int64.
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
            torch._foreach_lerp_(self.following, self.learning, self.config.tau)
        self.step += 1
        info = {f"{name}_loss": loss.detach() for name, (loss, _) in terms.items()}
        return info | {key: value.detach() for _, extra in terms.values() for key, value in extra.items()}

    @torch.no_grad()
    def act(self, z: Tensor, z_sub: Tensor, z_goal: Tensor) -> Tensor:
        """The action that leads from z towards z_sub, in [-1, 1]. Codes [n, d_model] -> [n, A]."""
        return self.heads["inverse_dynamics"](z, z_sub, z_goal)

    @torch.no_grad()
    def propose(self, z: Tensor, z_goal: Tensor) -> Tensor:
        """The proposer's code on the way to the goal. Codes [n, d_model] -> [n, d_model]."""
        return self.heads["next_state"](z, z_goal)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next update depends on; the encoder too, so that the file acts by itself."""
        return {
            "encoder": self.encoder.state_dict(),
            "heads": self.heads.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError or RuntimeError where the state is another model's."""
        self.encoder.load_state_dict(state["encoder"])
        self.heads.load_state_dict(state["heads"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


class LandmarkGraph:
    """Dataset states joined by the short ways between them, in steps by V (Eysenbach et al., 2019, "Search on the
    Replay Buffer").

    V is right about short ways and vague about long ones, so a way of x steps costs x (1 + x / trusted_steps): a chain
    of short edges is preferred to a long one. x is V's number of steps there, or half of those back if that is more,
    which catches ways that V sees in one direction alone. Above 10 trusted_steps there is no edge.

    Args:
        agent: whose V measures the ways.
        landmarks: [n, d_model] codes of dataset states.
    """

    def __init__(self, agent: OnlineAgent, landmarks: Tensor):
        self.agent, self.landmarks = agent, landmarks
        self.edges = self.edges_between(landmarks, landmarks)  # [n, n] from row to column, inf where there is none
        np.fill_diagonal(self.edges, np.inf)

    def steps(self, z: Tensor, z_to: Tensor) -> np.ndarray:
        """Steps by V from each z [m, d_model] to each z_to [k, d_model]: [m, k] float32."""
        rows = [
            self.agent.steps_between(part[:, None].expand(-1, len(z_to), -1), z_to[None].expand(len(part), -1, -1))
            for part in z.split(64)
        ]
        return torch.cat(rows).cpu().numpy()

    def edges_between(self, z: Tensor, z_to: Tensor) -> np.ndarray:
        """Costs of the edges from each z [m, d_model] to each z_to [k, d_model]: [m, k], inf where there is none."""
        trusted = self.agent.config.trusted_steps
        steps = np.maximum(self.steps(z, z_to), self.steps(z_to, z).T / 2)
        return np.where(steps <= 10 * trusted, 1 + steps * (1 + steps / trusted), np.inf)

    def near(self, z: Tensor) -> np.ndarray:
        """Landmarks [n] bool that lie within the trusted steps of z [d_model]."""
        return self.steps(z[None], self.landmarks)[0] <= self.agent.config.trusted_steps

    def routes(self, to_goal: np.ndarray, barred: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Shortest ways of all landmarks to one goal.

        to_goal: [n] cost of the edge from each landmark to the goal, inf where there is none; barred: pairs of [n]
        bool, no edge from the first set to the second is taken. Returns the steps [n], inf where no way leads, and
        the next node on it [n]: a landmark, n for the goal, or a negative number.
        """
        n = len(to_goal)
        weights = np.full((n + 1, n + 1), np.inf)
        weights[:n, :n], weights[:n, n] = self.edges, to_goal
        for here, there in barred:
            weights[np.ix_(np.append(here, False), np.append(there, False))] = np.inf
        linked = np.isfinite(weights)
        row, column = np.nonzero(linked)
        backwards = csr_matrix((weights[linked], (column, row)), shape=weights.shape)
        steps, following = dijkstra(backwards, indices=n, return_predecessors=True)
        return steps[:n], following[:n]


class Navigator:
    """Acts in several environments at once, towards one goal each, from reset to the episode's end.

    Args:
        agent: the networks.
        graph: the landmarks, or None to ask the proposer.
        goals: [E, D] observations of the goals.
        epsilon: probability, at each choice of z', of exploring straight towards the goal:
            z' = z + a (z_g - z), a uniform in [0.2, 1].
        action_noise: standard deviation of the Gaussian noise on actions.
        generator: of epsilon, a, the noise and the wandering; on the CPU. None: act without exploration.
    """

    def __init__(
        self,
        agent: OnlineAgent,
        graph: LandmarkGraph | None,
        goals: np.ndarray,
        epsilon: float = 0.0,
        action_noise: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        self.agent, self.graph, self.generator = agent, graph, generator
        self.epsilon, self.action_noise = epsilon, action_noise
        self.goals = agent.encode(torch.as_tensor(np.asarray(goals, np.float32), device=agent.device))
        count = len(self.goals)
        self.clock = 0
        self.choices = self.explorations = 0  # how often z' was chosen, and how often by exploring
        self.subgoals = self.goals.clone()  # [E, d_model]: z'
        self.chosen = np.full(count, -2)  # landmark that z' is the code of; n for the goal, -2 for neither
        self.nearest = np.full(count, np.inf)  # fewest steps to the goal so far
        self.nearest_at = np.zeros(count, dtype=int)  # when that was
        self.wandering = np.zeros(count, dtype=int)  # steps left of the random action
        self.wander_actions = torch.zeros(count, agent.action_dim)
        if graph is not None:
            self.to_goal = graph.edges_between(graph.landmarks, self.goals).T  # [E, n]
            self.barred: list[list] = [[] for _ in range(count)]  # ways that led nowhere: landmarks here, and there
            self.routes = [graph.routes(to_goal, []) for to_goal in self.to_goal]

    @torch.no_grad()
    def act(self, observations: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Actions [m, A] float32 of the environments `live` [m], which show observations [m, D]."""
        agent, z = self.agent, self.codes(observations, live)
        if self.clock % agent.config.replan_every == 0:
            self.choose(z, live)
        self.clock += 1
        actions = agent.act(z, self.subgoals[live], self.goals[live]).cpu()
        if self.action_noise > 0:
            actions = actions + self.action_noise * torch.randn(actions.shape, generator=self.generator)
        lost = self.wandering[live] > 0
        actions[torch.from_numpy(lost)] = self.wander_actions[live[lost]]
        self.wandering[live[lost]] -= 1
        return actions.clamp(-1, 1).numpy()

    def codes(self, observations: np.ndarray, live: np.ndarray) -> Tensor:
        """Codes [m, d_model] of the states that the environments `live` show: one position each, whatever the step."""
        return self.agent.encode(torch.as_tensor(np.asarray(observations, np.float32), device=self.agent.device))

    def exploring_share(self) -> float:
        """How many of the choices of z' so far were exploration."""
        return self.explorations / max(self.choices, 1)

    def choose(self, z: Tensor, live: np.ndarray) -> None:
        """Choose z' anew for the environments `live`, whose states have codes z [m, d_model]."""
        if self.graph is None:
            self.subgoals[live] = self.agent.propose(z, self.goals[live])
        else:
            to_landmarks = self.graph.edges_between(z, self.graph.landmarks)
            to_goal = self.agent.steps_between(z, self.goals[live]).cpu().numpy()
            for row, env in enumerate(live):
                self._follow(env, z[row], to_landmarks[row], float(to_goal[row]))
        self.choices += len(live)
        if self.epsilon > 0:
            explore, share = torch.rand(2, len(live), generator=self.generator).to(self.agent.device)
            ahead = z + (0.2 + 0.8 * share).unsqueeze(-1) * (self.goals[live] - z)
            explores = (explore < self.epsilon).unsqueeze(-1)
            self.subgoals[live] = torch.where(explores, ahead, self.subgoals[live])
            self.explorations += int(explores.sum())

    def _follow(self, env: int, z: Tensor, to_landmarks: np.ndarray, to_goal: float) -> None:
        """Set one environment's z': the goal if it is near, else the node `aim_steps` ahead on the shortest way."""
        ahead, count = self.agent.config.aim_steps, len(to_landmarks)
        steps, following = self.routes[env]
        reachable = to_landmarks.copy()
        for here, there in self.barred[env]:
            if to_landmarks[here].min(initial=np.inf) <= 2 * self.agent.config.trusted_steps:
                reachable[there] = np.inf
        total = reachable + steps
        node = int(total.argmin())
        if self.barred[env] and not np.isfinite(total[node]):  # barred too much: begin anew
            self.barred[env].clear()
            self.routes[env] = self.graph.routes(self.to_goal[env], [])
        if to_goal <= ahead or not np.isfinite(total[node]):
            node, left = count, to_goal
        else:
            left = total[node]
            while node < count and left - steps[node] < ahead:
                node = int(following[node])
        if left < self.nearest[env] - 1:
            self.nearest[env], self.nearest_at[env] = left, self.clock
        elif self.clock - self.nearest_at[env] >= self.agent.config.patience:
            self._bar(env, z, node)
        self.chosen[env] = node
        self.subgoals[env] = self.goals[env] if node == count else self.graph.landmarks[node]

    def _bar(self, env: int, z: Tensor, node: int) -> None:
        """V says that a way leads from here to `node`, and it led nowhere: bar it for the rest of the episode."""
        self.nearest[env], self.nearest_at[env] = np.inf, self.clock
        if self.generator is not None:
            self.wandering[env] = self.agent.config.wander_steps
            self.wander_actions[env] = 2 * torch.rand(self.agent.action_dim, generator=self.generator) - 1
        if node < len(self.graph.landmarks):
            here, there = self.graph.near(z), self.graph.near(self.graph.landmarks[node])
            there[node] = True
            self.barred[env].append((here & ~there, there))
            self.routes[env] = self.graph.routes(self.to_goal[env], self.barred[env])

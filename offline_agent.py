"""OPSO offline agent: a Mamba encoder pretrained with Q(z, z'), V(z, z_g) and auxiliary losses, without actions.

One causal pass over a window of L + 1 states gives every pair (z_t, z_{t+1}) in it, so each update trains on all
valid positions of all windows: one pass of the online network, one of its EMA target.

Layout of a batch (B windows of L transitions):

    observations   s_0  s_1  s_2  ...  s_L          [B, L + 1, observation_dim]
    codes          z_0  z_1  z_2  ...  z_L          z_t = f(s_0 .. s_t)
    transition t   (z_t, z_{t+1}), goal z_g = f(g)  valid[B, L], steps_to_goal[B, L]

Deviations from the original OPSO code (docs/opso.md has more of the reasons, docs/notebook_opso.md the measurements):
- The expectile weighs 0.9 where the target is *above* V, as the original's text has it and its snippet does not.
- Targets run over up to `horizon` steps inside the window and stop at the goal; with 1, the original's, value creeps
  one step each 1 / tau updates. V's target looks n - 1 steps ahead before it asks Q, so that its expectile chooses
  among whole continuations. Bootstrapped values are clipped to [0, 1], where they lie.
- The target network codes every state alone, f(s) (unless `target_history`), and so does the online network in a
  share of the windows (`history_dropout`): a code with history knows where its trajectory is heading, and V would
  learn the value of heading there instead of the best one.
- The critic and V losses weigh 20 and 100 (original: 1), or the others alone shape the codes; tau is 0.02 (0.005).
- `p_self` goals are s_{t+1}, certain positives: a goal equal to s_t is never reached by its own transition.
- The proposer predicts a step from z, not the code itself, and learns most from the trajectories that get nearer to the
  goal (`state_temperature`): else it goes where the data goes. reward(z', z_g) is told the goal.
- The learning rate decays to 0 (`lr_decay`): V's order of far goals jitters otherwise, and the last checkpoint counts.
- InfoNCE takes `nce_positions` transitions a window, evenly spaced from a random offset: neighbours in a window
  are nearly the same state, so more of them add cost and false negatives, not contrast.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MambaEncoder, OfflineModel
from model_kernels import Adam, cosine, kernels_of, run_bank_logsumexp
from utils import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveBelowOne,
    PositiveFraction,
    Whole,
    advantage_weight,
    expectile_loss,
    n_step_target,
    steps_by_value,
)

ABSENT = -1e4  # added to a logit that must not count; finite, so that no gradient becomes nan


@dataclass
class OfflineAgentConfig:
    context_length: Count = 100  # transitions in a window
    d_model: Count = 128  # width of the encoder and of its codes
    hidden_dim: Count = 256  # width of the heads
    n_layers: Count = 2  # Mamba-2 layers
    d_state: Count = 64  # numbers that the scan remembers for each channel
    d_conv: Count = 4  # width of the causal convolution
    expand: Count = 2  # inner width of a layer, in d_model
    dropout: BelowOne = 0.0  # dropout after each Mamba-2 layer
    backend: str = "auto"  # Mamba-2 kernels: torch, cuda (mamba_ssm) or auto
    lr: Positive = 3e-4  # learning rate of Adam
    warmup_steps: Whole = 50  # updates of linear warm-up of the learning rate
    lr_decay: bool = True  # cosine decay of the learning rate to 0 over the run's updates
    grad_clip: Positive = 100.0  # largest norm of the gradient; the V and critic weights below make it tens
    discount: PositiveBelowOne = 0.99  # discount factor of rewards
    tau: PositiveFraction = 0.02  # rate of the target networks' average
    expectile: Fraction = 0.9  # weight of V errors whose target lies above V
    horizon: Count = 50  # targets span 1..horizon steps, drawn for each position; 1 is the original
    history_dropout: Fraction = 0.5  # share of a batch's windows whose states are coded alone
    target_history: bool = False  # the target network codes histories too, as the original does
    history_horizon: Count = 10  # longest target of the windows coded with history
    temperature: Positive = 0.1  # temperature of InfoNCE
    bank_size: Whole = 10_000  # detached codes kept as further negatives
    nce_positions: Count = 8  # transitions a window that InfoNCE contrasts
    focal_gamma: NonNegative = 0.0  # focal exponent of the reward loss; 0 is plain cross-entropy
    max_pos_weight: Positive = 100.0  # cap of the reward loss's running positive weight
    state_temperature: NonNegative = 0.3  # state loss weights are exp(temperature x steps saved over the target's span)
    beta_critic: NonNegative = 20.0  # weight of the critic loss; its errors are squares of numbers below 1
    beta_v: NonNegative = 100.0  # weight of the V loss
    beta_s: NonNegative = 1.0  # weight of the state loss
    beta_r: NonNegative = 0.1  # weight of the reward loss
    beta_nce: NonNegative = 0.1  # weight of InfoNCE
    beta_a: NonNegative = 0.1  # weight of the alignment loss
    p_self: Fraction = 0.1  # share of goals that are the state the transition arrives at
    p_future: Fraction = 0.5  # share of goals drawn ahead on the trajectory, geometrically
    p_random: Fraction = 0.4  # share of goals drawn from the whole dataset
    goal_discount: BelowOne = 0.99  # discount of the geometric distribution of p_future


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x [..., B, L] over the positions where valid [B, L] is 1."""
    return (x * valid).sum() / (valid.expand_as(x).sum().clamp(min=1))


def bank_logsumexp(rows: Tensor, bank: Tensor, absent: Tensor) -> Tensor:
    """logsumexp over the bank [m, d] of absent [m] + rows [n, d] bank^T -> [n]; no gradient to the bank."""
    if kernels_of(rows) != "plain":
        return run_bank_logsumexp(rows, bank, absent)
    return torch.logsumexp(torch.addmm(absent, rows, bank.t()), dim=1)


def build_model(observation_dim: int, c: OfflineAgentConfig | SimpleNamespace, **more) -> OfflineModel:
    """An untrained model of the sizes in the settings of offline_trainer.py. AttributeError where one is absent."""
    shape = {"n_layers": c.n_layers, "d_state": c.d_state, "d_conv": c.d_conv, "expand": c.expand}
    return OfflineModel(observation_dim, c.d_model, c.hidden_dim, **shape, **more)


class OfflineAgent:
    """Holds the model, its EMA target, the optimizer and what the losses remember.

    Args:
        config: the losses' and networks' settings.
        observation_dim: numbers in a state.
        mean, std: [observation_dim] statistics of the training states.
        device: where everything lives.
        total_updates: the run's length, over which the learning rate decays; None leaves it constant.
    """

    PARTS = ("model", "target", "optimizer")
    REMEMBERED = ("bank", "bank_absent", "bank_next", "positive_rate")

    def __init__(self, config: OfflineAgentConfig, observation_dim, mean, std, device="cpu", total_updates=None):
        c = self.config = config
        self.total_updates = total_updates if c.lr_decay else None
        self.device = torch.device(device)
        self.model = build_model(observation_dim, c, dropout=c.dropout, backend=c.backend)
        self.model.encoder.set_normalizer(mean, std)
        self.model.to(self.device)
        self.target = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parameters, self.target_parameters = list(self.model.parameters()), list(self.target.parameters())
        self.lr = torch.tensor(c.lr, device=self.device)  # changed in place: a CUDA graph can hold the update
        self.optimizer = Adam(self.parameters, self.lr)
        self.step = 0
        # Statistics that the losses carry from update to update; tensors, so that an update never waits for the host.
        self.bank = torch.zeros(c.bank_size, c.d_model, device=self.device)
        self.bank_absent = torch.full((c.bank_size,), ABSENT, device=self.device)  # 0 where a code is kept
        self.bank_next = torch.zeros((), dtype=torch.int64, device=self.device)  # the slot to write next
        self.positive_rate = torch.full((), 0.5, device=self.device)  # running share of positive reward labels

    # -- losses, in the order of the objective ----------------------------------------------------------------

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes of the online network and of its target, for windows [B, L+1, D] and goals [B, L, D]."""
        windows, goals, target = batch["observations"], batch["goals"], self.target.encoder
        z, z_goal = self._encode_states(self.model.encoder, windows), self.model.encoder.encode_goal(goals)
        with torch.no_grad():
            history = self.config.target_history
            target_z = self._encode_states(target, windows) if history else target.encode_goal(windows)
            target_goal, n = target.encode_goal(goals), self.n_steps(batch)
        return {
            "z": z[:, :-1],
            "z_next": z[:, 1:],
            "z_goal": z_goal,
            "target_z": target_z,  # [B, L+1, d_model]
            "target_goal": target_goal,
            "n": n,  # [B, L] steps that the targets span
            "target_ahead": self._along(target_z, n),  # where they bootstrap
            "valid": batch["valid"].to(z.dtype),
        }

    def _with_history(self, batch_size: int) -> int:
        """How many windows of a batch, the first ones, are encoded with their history."""
        return batch_size - round(self.config.history_dropout * batch_size)

    def _encode_states(self, encoder: MambaEncoder, observations: Tensor) -> Tensor:
        """Codes [B, L+1, d_model]: of histories for the first windows, of single states for the rest."""
        split = self._with_history(len(observations))
        if split == len(observations):
            return encoder(observations)
        alone = encoder.encode_goal(observations[split:])
        return torch.cat([encoder(observations[:split]), alone]) if split else alone

    def n_steps(self, batch: dict[str, Tensor]) -> Tensor:
        """How many steps [B, L] the targets of each position span: its draw, cut at the window's last valid state.

        Windows with history take shorter ones: their codes know where the trajectory is heading, so a long target
        would teach the value of going on in that direction, not the best one.
        """
        positions = torch.arange(batch["valid"].shape[1], device=self.device)
        remaining = (batch["valid"].sum(1, keepdim=True) - positions).clamp(min=1)
        n = torch.minimum(batch["horizon"], remaining)
        n[: self._with_history(len(n))].clamp_(max=self.config.history_horizon)
        return n

    def _along(self, codes: Tensor, steps: Tensor) -> Tensor:
        """codes [B, L+1, d] at position t + steps[b, t], for t < L -> [B, L, d]."""
        index = torch.arange(steps.shape[1], device=self.device) + steps
        return codes.gather(1, index.unsqueeze(-1).expand(-1, -1, codes.shape[-1]))

    @torch.no_grad()
    def critic_target(self, codes: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Target of Q(z_t, z_{t+1}, z_g) [B, L]: discount^(k-1) if the goal comes after k <= n steps, else
        discount^n V_target(z_{t+n}, z_g). Nothing crosses an episode's end or bootstraps through the goal.
        """
        value = self.target.v(codes["target_ahead"], codes["target_goal"])
        return n_step_target(batch["steps_to_goal"], codes["n"], self.config.discount, value)

    @torch.no_grad()
    def v_target(self, codes: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Target of V(z_t, z_g) [B, L]: discount^(k-1) if the goal comes after k < n steps, else
        discount^(n-1) min Q_target(z_{t+n-1}, z_{t+n}, z_g). With n = 1 it is min Q_target(z_t, z_{t+1}, z_g).
        """
        span = codes["n"] - 1
        z = self._along(codes["target_z"], span)
        value = self.target.q(z, codes["target_ahead"], codes["target_goal"]).amin(0)
        return n_step_target(batch["steps_to_goal"], span, self.config.discount, value)

    def critic_loss(self, codes, batch) -> tuple[Tensor, dict]:
        """Smooth L1 of both Q(z, z', z_g) against their target."""
        target = self.critic_target(codes, batch)
        q = self.model.q(codes["z"], codes["z_next"], codes["z_goal"])
        loss = masked_mean(F.smooth_l1_loss(q, target.expand_as(q), reduction="none"), codes["valid"])
        return loss, {"q_mean": masked_mean(q, codes["valid"]), "target_mean": masked_mean(target, codes["valid"])}

    def v_loss(self, codes, batch) -> tuple[Tensor, dict]:
        """Expectile regression of V(z, z_g) towards the smaller target Q, n - 1 steps ahead."""
        target = self.v_target(codes, batch)
        v = self.model.v(codes["z"], codes["z_goal"])
        loss = masked_mean(expectile_loss(v, target, self.config.expectile), codes["valid"])
        advantage = masked_mean(target - v, codes["valid"])
        return loss, {"v_mean": masked_mean(v, codes["valid"]), "advantage_mean": advantage}

    def state_loss(self, codes, batch) -> tuple[Tensor, dict]:
        """MSE of the proposed next code to the target encoder's z': a mean weighted by what the trajectory saves."""
        weight = self.state_weight(codes, batch)
        proposal = self.model.next_state(codes["z"], codes["z_goal"])
        error = (proposal - codes["target_z"][:, 1:]).square().mean(-1)
        mean_weight = masked_mean(weight, codes["valid"])
        return masked_mean(weight * error, codes["valid"]) / mean_weight.clamp(min=1e-6), {"state_weight": mean_weight}

    @torch.no_grad()
    def state_weight(self, codes, batch) -> Tensor:
        """Capped exp(temperature * advantage) [B, L]: of the steps that V says were saved in n, beyond those taken."""
        c, v, goal, n, steps = self.config, self.target.v, codes["target_goal"], codes["n"], batch["steps_to_goal"]
        before = steps_by_value(v(codes["target_z"][:, :-1], goal), c.discount)
        after = torch.where(steps <= n, 0.0, steps_by_value(v(codes["target_ahead"], goal), c.discount))
        return advantage_weight(before - after - torch.minimum(n, steps), c.state_temperature)

    def reward_loss(self, codes, batch, held_out: bool = False) -> tuple[Tensor, dict]:
        """Binary cross-entropy of the logit reward(z', z_g) with a running positive weight; focal if focal_gamma > 0.

        Positive where s_{t+1} is the goal or its episode's last state. Held out, the weight is the batch's own. A coin
        has a loss of 2 log 2 times the share of negatives.
        """
        c, valid = self.config, codes["valid"]
        label = self._reward_label(batch)
        share = masked_mean(label, valid)  # of positives
        rate = share if held_out else self.positive_rate
        weight = ((1 - rate) / rate.clamp(min=1e-6)).clamp(max=c.max_pos_weight)
        logit = self.model.reward(codes["z_next"], codes["z_goal"])
        loss = F.binary_cross_entropy_with_logits(logit, label, pos_weight=weight, reduction="none")
        if c.focal_gamma > 0:  # Lin et al., 2017: errors that are already small count less
            p = torch.sigmoid(logit)
            loss = loss * (label * (1 - p) + (1 - label) * p) ** c.focal_gamma
        return masked_mean(loss, valid), {"reward_positive_rate": share}

    def _reward_label(self, batch) -> Tensor:
        return ((batch["steps_to_goal"] == 1) | batch["last"]).float()

    def _nce_positions(self, batch) -> Tensor:
        """Evenly spaced positions [nce_positions] of a window, from the batch's offset."""
        length = batch["valid"].shape[1]
        count = min(self.config.nce_positions, length)
        return (batch["nce_offset"] + torch.arange(count, device=self.device) * length // count) % length

    def nce_loss(self, codes, batch, held_out: bool = False) -> tuple[Tensor, dict]:
        """InfoNCE of z against z', both directions, with a memory bank of detached codes as further negatives."""
        c = self.config
        picked = self._nce_positions(batch)
        z = F.normalize(codes["z"].index_select(1, picked).flatten(0, 1), dim=-1)  # [n, d], n = B * nce_positions
        z_next = F.normalize(codes["z_next"].index_select(1, picked).flatten(0, 1), dim=-1)
        valid = batch["valid"].index_select(1, picked).flatten()
        # A padded position is nobody's negative.
        absent = torch.where(valid, 0.0, ABSENT)
        both = torch.cat([z, z_next]) / c.temperature
        logits = [torch.addmm(absent, both[: len(z)], z_next.t()), torch.addmm(absent, both[len(z) :], z.t())]
        partition = torch.logsumexp(torch.cat(logits), dim=1)
        if not held_out and c.bank_size > 0:
            partition = torch.logaddexp(partition, bank_logsumexp(both, self.bank, self.bank_absent))
        positive = (both[: len(z)] * z_next).sum(-1)
        loss = 0.5 * (partition.view(2, -1).sum(0)) - positive
        return (loss * valid).sum() / valid.sum().clamp(min=1), {}

    def alignment_loss(self, codes) -> tuple[Tensor, dict]:
        """Minus the cosine of the step z' - z and the way to the goal z_g - z."""
        cosine = F.cosine_similarity(codes["z_next"] - codes["z"], codes["z_goal"] - codes["z"], dim=-1)
        return -masked_mean(cosine, codes["valid"]), {}

    def total_loss(self, batch: dict[str, Tensor], held_out: bool = False) -> tuple[Tensor, dict, dict]:
        """The weighted sum of the six losses, every figure worth a curve as 0-d tensors, and the codes."""
        c = self.config
        codes = self.encode(batch)
        terms = {
            "critic": (c.beta_critic, *self.critic_loss(codes, batch)),
            "v": (c.beta_v, *self.v_loss(codes, batch)),
            "state": (c.beta_s, *self.state_loss(codes, batch)),
            "reward": (c.beta_r, *self.reward_loss(codes, batch, held_out)),
            "infonce": (c.beta_nce, *self.nce_loss(codes, batch, held_out)),
            "alignment": (c.beta_a, *self.alignment_loss(codes)),
        }
        total = sum(beta * loss for beta, loss, _ in terms.values())
        info = {f"{name}_loss": loss.detach() for name, (_, loss, _) in terms.items()}
        for _, _, extra in terms.values():
            info.update({key: value.detach() for key, value in extra.items()})
        return total, {"loss": total.detach(), **info}, codes

    # -- update ------------------------------------------------------------------------------------------------

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimizer step on a batch, then the EMA targets. Returns 0-d tensors; nothing waits for the host."""
        self.model.train()
        self.lr.fill_(self.learning_rate())
        self.optimizer.zero_grad()
        total, info, codes = self.total_loss(batch)
        total.backward()
        info["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip).detach()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.parameters, self.config.tau)
            self._remember(codes, batch)
        self.step += 1
        return info

    def learning_rate(self) -> float:
        """Of the coming update: linear warm-up, then cosine decay to 0 at total_updates."""
        rate = self.config.lr * min(1.0, (self.step + 1) / max(self.config.warmup_steps, 1))
        return rate if self.total_updates is None else rate * cosine(min(self.step / self.total_updates, 1.0))

    def _remember(self, codes: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """After the backward pass: the running share of positives, and the bank's oldest codes overwritten.

        A padded position takes a slot too, marked absent: the shapes stay the same.
        """
        # The mean of the first hundred batches, then a running one: 0.01 from the start would keep the 0.5 for long.
        share = masked_mean(self._reward_label(batch), codes["valid"])
        self.positive_rate.lerp_(share, max(0.01, 1 / (self.step + 1)))
        if self.config.bank_size == 0:
            return
        picked, size = self._nce_positions(batch), self.config.bank_size
        new = codes["z_next"].detach().index_select(1, picked).flatten(0, 1)[-size:]
        absent = torch.where(batch["valid"].index_select(1, picked).flatten()[-size:], 0.0, ABSENT)
        slots = (self.bank_next + torch.arange(len(new), device=self.device)) % size
        self.bank.index_copy_(0, slots, F.normalize(new, dim=-1))
        self.bank_absent.index_copy_(0, slots, absent)
        self.bank_next.add_(len(new)).remainder_(size)

    @torch.no_grad()
    def evaluate_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a held-out batch: no gradient, no dropout, nothing remembered.

        InfoNCE without its bank, and the reward loss weighted by the batch's own labels, do not depend on what training
        has seen; the EMA targets still move.
        """
        self.model.eval()
        return self.total_loss(batch, held_out=True)[1]

    # -- what the trained model answers -------------------------------------------------------------------------

    @torch.no_grad()
    def encode_windows(self, observations: Tensor, lengths: Tensor) -> Tensor:
        """Codes of right-padded histories. [n, L, D], lengths [n] -> [n, d_model]."""
        codes = self.model.eval().encoder(observations)
        return codes[torch.arange(len(codes), device=self.device), lengths - 1]

    @torch.no_grad()
    def encode_states(self, observations: Tensor) -> Tensor:
        """Codes of single states, as the target network's. [..., D] -> [..., d_model]."""
        return self.model.eval().encoder.encode_goal(observations)

    @torch.no_grad()
    def value(self, z: Tensor, goals: Tensor) -> Tensor:
        """V(z, f(goal)). z: [..., d_model], goals: [..., D], shapes that broadcast -> [...]."""
        return self.model.v(*torch.broadcast_tensors(z, self.encode_states(goals)))

    @torch.no_grad()
    def propose(self, z: Tensor, goals: Tensor) -> Tensor:
        """The next code on the way to the goal, in place of an action; same shapes as `value`, -> [..., d_model]."""
        return self.model.next_state(*torch.broadcast_tensors(z, self.encode_states(goals)))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next update depends on."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {"step": self.step} | {name: getattr(self, name) for name in self.REMEMBERED}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError or RuntimeError where the state is another model's."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step = int(state["step"])
        for name in self.REMEMBERED:
            getattr(self, name).copy_(state[name])

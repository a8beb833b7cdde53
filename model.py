"""The networks of all systems, plainly: a causal Mamba-2 encoder and its heads, actors and critics.

The Mamba-2 block (Dao & Gu, "Transformers are SSMs", 2024) keeps the parameter names and shapes of
`mamba_ssm.Mamba2`, so weights move between the two. Per head, with state h in R^{headdim x d_state}:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Unrolled over a chunk this is a masked matrix product, Y = (C B^T * decay) (dt X): the state-space dual form
(equation 6 of the paper), which is what `ssd` computes; between chunks only the state is carried.

Everything here needs PyTorch alone; model_kernels/ has the fast forms.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model_kernels as fast
from model_kernels import chosen_kernels, kernels_of


class Linear(nn.Linear):
    """x W^T + b by the library that `choose_kernels` chose. x: [..., in_features] -> [..., out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        return fast.linear(x, self.weight, self.bias)


# -- Mamba-2 ----------------------------------------------------------------------------------------------------------


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The scan above from a zero state, without the skip term, chunk_size positions by one masked matrix product.

    x [batch, length, heads, headdim], steps dt > 0 [batch, length, heads], decay rates A < 0 [heads]; B, C [batch,
    length, d_state] are shared by all heads. Returns y, like x.
    """
    dt, x = dt.transpose(1, 2), x.transpose(1, 2)  # [b, h, l], [b, h, l, p]
    log_decay = dt * A.unsqueeze(-1)
    length, state, outputs = x.shape[2], None, []
    for begin in range(0, length, chunk_size):
        here = slice(begin, begin + chunk_size)
        total = log_decay[:, :, here].cumsum(-1)  # decay since the chunk began, the position itself included
        y = dual_form(C[:, here], B[:, here], total, dt[:, :, here], x[:, :, here])
        if state is not None:  # what came before the chunk, decayed
            y = y + (C[:, None, here] @ state.transpose(2, 3)) * total.exp().unsqueeze(-1)
        outputs.append(y)
        if begin + chunk_size < length:  # [b, h, p, n], for the next chunk
            weight = dt[:, :, here] * (total[:, :, -1:] - total).exp()
            left = (x[:, :, here] * weight.unsqueeze(-1)).transpose(2, 3) @ B[:, None, here]
            state = left if state is None else left + state * total[:, :, -1:, None].exp()
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def dual_form(C: Tensor, B: Tensor, total: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    """One chunk of the scan as a masked matrix product: y = ((C B^T) * decay) (dt x), equation 6 of the paper.

    decay[t, s] = exp(total_t - total_s) for s <= t, else 0; `total` [batch, heads, length] is the log decay since the
    chunk began, the position itself included. C, B [batch, length, d_state], dt [batch, heads, length]; x and y
    [batch, heads, length, headdim].
    """
    if chosen_kernels() != "plain":
        return fast.run_dual_form(C, B, total, dt, x)
    # The mask goes in before the exponential: above the diagonal the sum is positive and would overflow.
    above = torch.full((C.shape[1], C.shape[1]), -torch.inf, dtype=total.dtype, device=total.device).triu(1)
    decay = torch.exp(total.unsqueeze(-1) - total.unsqueeze(-2) + above)
    return ((C @ B.transpose(1, 2)).unsqueeze(1) * decay) @ (dt.unsqueeze(-1) * x)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of a depthwise convolution of each position with those before it.

    x: [batch, length, channels], weight: [channels, 1, width], bias: [channels] -> [batch, length, channels].
    """
    if chosen_kernels() != "plain":
        return fast.run_causal_conv_silu(x, weight, bias)
    before = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(before, weight, bias, groups=len(weight))).transpose(1, 2)


class RMSNormGated(nn.Module):
    """RMS norm of x * silu(z), as in Mamba-2 (`norm_before_gate=False`). x, z: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if chosen_kernels() != "plain":
            return fast.run_gated_rms_norm(x, z, self.weight, self.eps)
        return F.rms_norm(x * F.silu(z), self.weight.shape, self.weight, self.eps)


class Mamba2(nn.Module):
    """Mamba-2 mixer with the parameter names and shapes of `mamba_ssm.Mamba2` (one group, RMS norm on).

    d_model: width of input and output. d_state, d_conv, expand, headdim: as in the paper. chunk_size: positions in one
    masked matrix product. backend: 'torch' (any device), 'cuda' (the kernels of mamba_ssm), or 'auto'.

    Raises ValueError for sizes that do not divide or an unknown backend, ImportError for 'cuda' without mamba_ssm.
    """

    def __init__(self, d_model, d_state=64, d_conv=4, expand=2, headdim=64, chunk_size=128, backend="auto"):
        super().__init__()
        self.d_inner, self.d_state, self.headdim, self.chunk_size = expand * d_model, d_state, headdim, chunk_size
        if self.d_inner % headdim:
            raise ValueError(f"expand * d_model = {self.d_inner} is not a multiple of headdim {headdim}")
        self.nheads = self.d_inner // headdim
        self.backend = backend
        conv_dim = self.d_inner + 2 * d_state
        self.in_proj = Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=False)  # [z, x, B, C, dt]
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        # dt starts log-uniform in [0.001, 0.1]; dt_bias is its inverse softplus.
        dt = torch.exp(torch.rand(self.nheads) * math.log(100) + math.log(1e-3)).clamp_(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNormGated(self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """u: [batch, length, d_model] -> [batch, length, d_model]; position t depends on positions <= t alone."""
        batch, length, _ = u.shape
        if fast.resolve_backend(self.backend, u.device) == "cuda" and length > 1:
            return fast.run_mamba2(self, u)
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)
        # The scan and its exponentials stay in float32 (or better) under mixed precision.
        xBC = causal_conv_silu(_wide(xBC), self.conv1d.weight, self.conv1d.bias)
        dt = F.softplus(_wide(dt) + self.dt_bias)
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        if length == 1:  # a goal: nothing to scan, h = dt x B^T
            y = x * (dt * (B * C).sum(-1, keepdim=True) + self.D).unsqueeze(-1)
        else:
            with torch.autocast(u.device.type, enabled=False):
                y = ssd(x, dt, -self.A_log.exp(), B, C, self.chunk_size)
                y = (x * self.D.unsqueeze(-1)).add_(y)  # in this order the sum is laid out as x is
        return self.out_proj(self.norm(y.reshape(batch, length, self.d_inner), _wide(z)))


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# -- Encoder ----------------------------------------------------------------------------------------------------------


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021). x: [..., n, dim], positions: [n] -> like x.

    Feature i of the first half is rotated with feature i of the second by the angle position / 10000^(2i/dim).
    """
    half, dtype = x.shape[-1] // 2, torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions.to(dtype).unsqueeze(-1) * frequency  # half precision would blur the angles of late positions
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class MambaEncoder(nn.Module):
    """Causal encoder of state sequences: z_t = f(s_{<=t}).

    Observations are standardised first; the statistics are buffers, so that a checkpoint carries them. d_model, the
    width of the network and of the codes, is even, and expand * d_model a multiple of 64 or smaller.
    """

    def __init__(
        self, observation_dim, d_model=128, n_layers=2, d_state=64, d_conv=4, expand=2, dropout=0.0, backend="auto"
    ):
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model {d_model} is odd: the rotary embedding rotates pairs of features")
        self.observation_dim, self.d_model = observation_dim, d_model
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("std", torch.ones(observation_dim))
        self.input = Linear(observation_dim, d_model)
        headdim = min(64, expand * d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.mixers = nn.ModuleList(
            Mamba2(d_model, d_state, d_conv, expand, headdim, backend=backend) for _ in range(n_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model)
        self.output = Linear(d_model, d_model)

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: [observation_dim], the training data's."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, observations: Tensor) -> Tensor:
        """observations: [batch, length, observation_dim] -> codes [batch, length, d_model], one for each prefix."""
        h = self.input((observations - self.mean) / self.std)
        if h.shape[1] > 1:  # position 0 is not rotated
            h = rotary(h, torch.arange(h.shape[1], device=h.device))
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + self.dropout(mixer(norm(h)))
        return self.output(self.norm(h))

    def encode_goal(self, goals: Tensor) -> Tensor:
        """z_g = f(g), a goal seen as a sequence of one. goals: [..., observation_dim] -> [..., d_model]."""
        return self(goals.reshape(-1, 1, self.observation_dim)).view(*goals.shape[:-1], self.d_model)


# -- Heads ------------------------------------------------------------------------------------------------------------


class MLP(fast.FlatMLP):
    """Hidden layers of ReLU, a linear one and, with `squash`, tanh; with a `size`, so many networks on one input.

    All parameters are one vector, `theta`: one step of Adam, one average, one copy. `layers()` shows its matrices.
    """

    def __init__(self, input_dim, hidden_dim, output_dim, hidden_layers=2, size=None, squash=False):
        super().__init__((input_dim, *[hidden_dim] * hidden_layers, output_dim), size)
        self.output_dim, self.squash = output_dim, squash
        with torch.no_grad():
            for weight, bias in self.layers():  # as nn.Linear has it
                drawn, bound = weight if size else weight.new_empty(weight.t().shape), weight.shape[-2] ** -0.5
                drawn.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
                weight.copy_(drawn if size else drawn.t())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs [..., d_1], [..., d_2], ..., taken side by side -> [..., out], or [size, ..., out].

        With a size, one input [size, n, in] holds rows of each network's own.
        """
        if self.size is None:
            rows = [each.reshape(-1, each.shape[-1]) for each in inputs]
            return self._run(self.theta, 1, rows).view(*inputs[0].shape[:-1], self.output_dim)
        return self._run(self.theta, self.size, inputs)

    def frozen(self, *inputs: Tensor, members: int | None = None) -> Tensor:
        """`forward` of the first `members` alone, with a gradient to the last input and none to the weights."""
        members = members or self.count
        if kernels_of(inputs[0]) != "plain":
            return fast.run_frozen(self, members, inputs)
        return self._run(self.theta.detach(), members, [each.detach() for each in inputs[:-1]] + [inputs[-1]])

    def squared_error(
        self, inputs: Sequence[Tensor], target: Tensor, expectile: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y - target)^2 for one output y: mean over rows, sum over the networks, 0-d; and y [..., n] without gradient.

        With an expectile, outputs above their target [n] weigh 1 - expectile in the error, others expectile.
        """
        if kernels_of(target) != "plain":
            loss, y = fast.run_regression(self, inputs, target, expectile)
            return loss, y.view(*(self.size,) if self.size else (), -1)
        y = self(*inputs).squeeze(-1)
        squared = (y - target).square()
        if expectile is not None:
            squared = ((y > target).to(y.dtype) - expectile).abs() * squared
        return squared.mean(-1).sum(), y.detach()

    def _run(self, theta: Tensor, members: int, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs [n, ...] or one of [members, n, in] -> [members, n, out]."""
        if kernels_of(inputs[0]) != "plain":
            return fast.run_mlp(self, theta, members, inputs, self.squash)
        h, layers, affine = torch.cat(list(inputs), dim=-1), self.layers(theta), torch.addmm
        if self.size is not None:
            h, affine = h.expand(members, -1, -1), torch.baddbmm
            layers = [(weight[:members], bias[:members]) for weight, bias in layers]
        for weight, bias in layers[:-1]:
            h = F.relu(affine(bias, h, weight))
        y = affine(layers[-1][1], h, layers[-1][0])
        return torch.tanh(y) if self.squash else y

    def with_gradients(self, inputs: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
        """Outputs [size, n, 1] and their gradients by the last columns of the input [size, n, columns].

        Both are differentiable by the weights, as a chain of products through the ReLUs; not by the inputs.
        """
        if kernels_of(inputs[0]) != "plain":
            return fast.run_mlp_with_gradients(self, inputs, columns)
        h, masks = torch.cat(list(inputs), dim=-1).expand(self.count, -1, -1), []
        *hidden, last = self.layers()
        for weight, bias in hidden:
            h = F.relu(torch.baddbmm(bias, h, weight))
            masks.append(h.detach() > 0)
        slope = last[0].transpose(1, 2)  # [size, 1, hidden]
        for (weight, _), mask in zip(reversed(hidden[1:]), reversed(masks[1:]), strict=True):
            slope = (slope * mask) @ weight.transpose(1, 2)
        return torch.baddbmm(last[1], h, last[0]), (slope * masks[0]) @ hidden[0][0][:, -columns:].transpose(1, 2)


class TransitionQ(nn.Module):
    """Twin Q(z, z', z_g): value of moving from z to z' on the way to z_g. Codes [..., d_model] -> [2, ...]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = MLP(3 * d_model, hidden_dim, 1, size=2)

    def forward(self, z: Tensor, z_next: Tensor, z_goal: Tensor) -> Tensor:
        rows = [each.reshape(-1, each.shape[-1]) for each in (z, z_next, z_goal)]
        return self.net(*rows).view(2, *z.shape[:-1])


class GoalValue(nn.Module):
    """V(z, z_g). Codes [..., d_model] -> [...]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = MLP(2 * d_model, hidden_dim, 1)

    def forward(self, z: Tensor, z_goal: Tensor) -> Tensor:
        return self.net(z, z_goal).squeeze(-1)


class NextState(nn.Module):
    """The proposer: the next code on the way to the goal, as a step from z. Codes [..., d_model] -> [..., d_model]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = MLP(2 * d_model, hidden_dim, d_model)

    def forward(self, z: Tensor, z_goal: Tensor) -> Tensor:
        return z + self.net(z, z_goal)


class RewardLogit(nn.Module):
    """Logit of reaching the goal, or the episode's end, at z'. Codes [..., d_model] -> [...]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = MLP(2 * d_model, hidden_dim, 1)

    def forward(self, z_next: Tensor, z_goal: Tensor) -> Tensor:
        return self.net(z_next, z_goal - z_next).squeeze(-1)


class InverseDynamics(nn.Module):
    """The action that leads from z to z' on the way to z_g, in [-1, 1]. Codes [..., d_model] -> [..., action_dim]."""

    def __init__(self, d_model: int, hidden_dim: int, action_dim: int):
        super().__init__()
        self.net = MLP(3 * d_model, hidden_dim, action_dim)

    def forward(self, z: Tensor, z_next: Tensor, z_goal: Tensor) -> Tensor:
        return torch.tanh(self.net(z, z_next - z, z_goal - z))


class StateMetric(nn.Module):
    """An embedding of states in which squared distance counts steps. Normalised states [..., D] -> [..., dim]."""

    def __init__(self, observation_dim: int, hidden_dim: int, dim: int):
        super().__init__()
        self.net = MLP(observation_dim, hidden_dim, dim)
        self.log_scale = nn.Parameter(torch.zeros(()))  # the temperature of its InfoNCE
        self.register_buffer("steps_per_square", torch.ones(()))  # a squared distance's worth, measured on the data
        self.register_buffer("aim_steps", torch.ones(()))  # how far an aim lies, measured on the data

    def forward(self, states: Tensor) -> Tensor:
        return self.net(states) * self.log_scale.exp()


class InverseDynamicsModel(nn.Module):
    """The action between two successive states (s, s'), unbounded. Normalised states [n, D] twice -> [n, A].

    The difference s' - s is taken in deviations of the dataset's, and inputs are cut at 10 of them.
    """

    def __init__(self, observation_dim: int, hidden_dim: int, action_dim: int):
        super().__init__()
        sizes = (2 * observation_dim, hidden_dim, hidden_dim, hidden_dim)
        layers = [layer for m, n in zip(sizes, sizes[1:], strict=False) for layer in (Linear(m, n), nn.SiLU())]
        self.net = nn.Sequential(*layers, Linear(hidden_dim, action_dim))
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("scale", torch.ones(observation_dim))

    def forward(self, states: Tensor, later: Tensor) -> Tensor:
        difference = (later - states - self.mean) / self.scale
        return self.net(torch.cat([states, difference], dim=-1).clamp(-10, 10))


class OfflineModel(nn.Module):
    """What the offline stage trains: `encoder`, `q`, `v`, `next_state` and `reward`. No action is read."""

    def __init__(self, observation_dim: int, d_model: int = 128, hidden_dim: int = 256, **encoder):
        super().__init__()
        self.encoder = MambaEncoder(observation_dim, d_model, **encoder)
        self.q = TransitionQ(d_model, hidden_dim)
        self.v = GoalValue(d_model, hidden_dim)
        self.next_state = NextState(d_model, hidden_dim)
        self.reward = RewardLogit(d_model, hidden_dim)


# -- POGO and algorithms/offline: transport-map actors and ensembles of critics ---------------------------------------


class TransportActor(nn.Module):
    """A policy as a transport map a = T(s, z), z ~ N(0, I) of the action's size: tanh * max_action of an MLP."""

    def __init__(self, observation_dim: int, action_dim: int, max_action: float = 1.0, hidden_dim: int = 256):
        super().__init__()
        self.action_dim, self.max_action = action_dim, max_action
        self.net = MLP(observation_dim + action_dim, hidden_dim, action_dim, squash=True)

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions [..., A] of observations [..., D] under z [..., A]; z [..., K, A] gives K actions a state."""
        if z.dim() > observations.dim():
            observations = observations.unsqueeze(-2).expand(*z.shape[:-1], -1)
        return times(self.net(torch.cat([observations, z], dim=-1)), self.max_action)


def times(actions: Tensor, max_action: float) -> Tensor:
    """Actions in [-1, 1] to [-max_action, max_action]."""
    return actions if max_action == 1 else actions * max_action


class StateValue(nn.Module):
    """V(s), an MLP: [n, D] -> [n]."""

    def __init__(self, observation_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.net = MLP(observation_dim, hidden_dim, 1)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).squeeze(-1)

    def squared_error(self, observations: Tensor, target: Tensor, expectile: float) -> tuple[Tensor, Tensor]:
        """|expectile - 1(V above target)| (V - target)^2, target [n], mean, 0-d; and V [n] without gradient."""
        return self.net.squared_error([observations], target, expectile)


class EnsembleCritic(nn.Module):
    """Several Q(s, a), MLPs. Observations [n, D], actions [n, A] -> [size, n]."""

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dim: int = 256, size: int = 2, hidden_layers: int = 2
    ):
        super().__init__()
        self.size, self.action_dim = size, action_dim
        self.net = MLP(observation_dim + action_dim, hidden_dim, 1, hidden_layers, size)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(observations, actions).squeeze(-1)

    def frozen(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[size, n], with a gradient to the actions and none to the weights."""
        return self.net.frozen(observations, actions).squeeze(-1)

    def frozen_q1(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The first Q alone, [n], with a gradient to the actions and none to the weights."""
        return self.net.frozen(observations, actions, members=1).view(-1)

    def squared_error(self, observations: Tensor, actions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(Q_k(s, a) - target)^2, mean over the batch, sum over critics, 0-d; and Q_k [size, n] without gradient."""
        return self.net.squared_error([observations, actions], target)

    def with_action_gradients(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q_k(s, a) [size, n] and dQ_k/da [size, n, A], both differentiable by the weights."""
        q, slopes = self.net.with_gradients([observations, actions], self.action_dim)
        return q.squeeze(-1), slopes

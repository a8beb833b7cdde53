"""Networks of OPSO: a causal Mamba-2 encoder and the heads that read its codes.

The Mamba-2 block (Dao & Gu, "Transformers are SSMs", 2024) keeps the parameter names and shapes of
`mamba_ssm.Mamba2`, so weights move between the two. Per head, with state h in R^{headdim x d_state}:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Unrolled over a chunk this is a masked matrix product, Y = (C B^T * decay) (dt X): the state-space dual form
(equation 6 of the paper), which is what `ssd` computes; between chunks only the state is carried.

Everything here needs PyTorch alone. The fused kernels of mamba_ssm are used when asked for (`backend='cuda'`),
or found (`backend='auto'`).
"""

import functools
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cuda")


# ---------------------------------------------------------------------------------------------------------------
# Mamba-2
# ---------------------------------------------------------------------------------------------------------------


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """Chunked state-space dual form of the selective scan above, without the skip term, from a zero state.

    Args:
        x: [batch, length, heads, headdim] inputs.
        dt: [batch, length, heads] positive step sizes.
        A: [heads] negative decay rates.
        B, C: [batch, length, d_state], shared by all heads.
        chunk_size: positions handled by one masked matrix product.

    Returns:
        y [batch, length, heads, headdim].
    """
    dt, x = dt.transpose(1, 2), x.transpose(1, 2)  # [b, h, l], [b, h, l, p]
    log_decay = dt * A.unsqueeze(-1)
    length, state, outputs = x.shape[2], None, []
    for begin in range(0, length, chunk_size):
        here = slice(begin, begin + chunk_size)
        total = log_decay[:, :, here].cumsum(-1)  # decay since the chunk began, the position itself included
        y = _DualForm.apply(C[:, here], B[:, here], total, dt[:, :, here], x[:, :, here])
        if state is not None:  # what came before the chunk, decayed
            y = y + (C[:, None, here] @ state.transpose(2, 3)) * total.exp().unsqueeze(-1)
        outputs.append(y)
        if begin + chunk_size < length:  # [b, h, p, n], for the next chunk
            weight = dt[:, :, here] * (total[:, :, -1:] - total).exp()
            left = (x[:, :, here] * weight.unsqueeze(-1)).transpose(2, 3) @ B[:, None, here]
            state = left if state is None else left + state * total[:, :, -1:, None].exp()
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


class _DualForm(torch.autograd.Function):
    """y = P (dt x) with P = (C B^T) * decay, decay[t, s] = exp(total_t - total_s) for s <= t, else 0.

    Written by hand because autograd would pass over the [b, h, l, l] decay five more times. The derivative by
    `total` needs none of them: with E = dP * P, the row sums of E are <dy_t, y_t> and its column sums
    <u_s, du_s>, where u = dt x.
    """

    @staticmethod
    def forward(ctx, C, B, total, dt, x):
        length = total.shape[-1]
        # The mask goes in before the exponential: above the diagonal the sum is positive and would overflow.
        above = torch.full((length, length), -torch.inf, dtype=total.dtype, device=total.device).triu_(1)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(above).exp_()
        P = decay * torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
        u = torch.mul(dt.unsqueeze(-1), x, out=x.new_empty(x.shape))  # contiguous, so the products below copy nothing
        y = P @ u
        ctx.save_for_backward(C, B, dt, x, u, decay, P, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        C, B, dt, x, u, decay, P, y = ctx.saved_tensors
        dy = dy.contiguous()
        du = P.transpose(2, 3) @ dy
        d_scores = (dy @ u.transpose(2, 3)).mul_(decay).sum(1)  # [b, l, l], summed over the heads
        products = dy * y  # one buffer for the three: fresh memory costs more than the arithmetic
        d_total = products.sum(-1)
        d_total -= torch.mul(u, du, out=products).sum(-1)
        d_dt = torch.mul(x, du, out=products).sum(-1)
        d_x = torch.mul(dt.unsqueeze(-1), du, out=du)
        return torch.bmm(d_scores, B), torch.bmm(d_scores.transpose(1, 2), C), d_total, d_dt, d_x


class _CausalConvSiLU(torch.autograd.Function):
    """silu of a depthwise causal convolution, as shifted multiply-adds; see `causal_conv_silu`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        taps = weight.squeeze(1).t().contiguous()  # [width, channels]; the last tap looks at the present
        width, length = taps.shape[0], x.shape[1]
        y = torch.addcmul(bias, x, taps[-1])
        for k in range(1, min(width, length)):
            y[:, k:].addcmul_(x[:, : length - k], taps[-1 - k])
        ctx.save_for_backward(x, taps, y)
        return F.silu(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, taps, y = ctx.saved_tensors
        width, length = taps.shape[0], x.shape[1]
        grad = torch.ops.aten.silu_backward(grad.contiguous(), y)
        d_taps = torch.zeros_like(taps)
        products = grad * x
        d_taps[-1] = products.sum((0, 1))
        d_x = grad * taps[-1]
        for k in range(1, min(width, length)):
            d_x[:, : length - k].addcmul_(grad[:, k:], taps[-1 - k])
            torch.mul(grad[:, k:], x[:, : length - k], out=products[:, k:])
            d_taps[-1 - k] = products[:, k:].sum((0, 1))
        return d_x, d_taps.t().unsqueeze(1), grad.sum((0, 1))


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [batch, length, channels], weight: [channels, 1, width], bias: [channels] -> [batch, length, channels].

    Channels stay last, so there is no transpose, and on a CPU it takes a third of the time of a grouped `conv1d`.
    """
    return _CausalConvSiLU.apply(x, weight, bias)


class _GatedRMSNorm(torch.autograd.Function):
    """rms_norm(x * silu(z)) * weight with one pass over each tensor where autograd takes three."""

    @staticmethod
    def forward(ctx, x, z, weight, eps):
        gate = F.silu(z)
        normed = gate * x
        out = normed.square()
        scale = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed.mul_(scale)
        ctx.save_for_backward(x, z, gate, weight, normed, scale)
        return torch.mul(normed, weight, out=out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, z, gate, weight, normed, scale = ctx.saved_tensors
        products = grad * normed
        d_weight = products.flatten(0, -2).sum(0)
        along = products.mul_(weight).mean(-1, keepdim=True)
        d = (grad * weight).sub_(torch.mul(normed, along, out=products)).mul_(scale)  # by x * silu(z)
        d_gate = torch.mul(d, x, out=products)
        return d.mul_(gate), torch.ops.aten.silu_backward(d_gate, z), d_weight, None


class RMSNormGated(nn.Module):
    """RMS norm of x * silu(z), as in Mamba-2 (`norm_before_gate=False`). x, z: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return _GatedRMSNorm.apply(x, z, self.weight, self.eps)


class Mamba2(nn.Module):
    """Mamba-2 mixer with the parameter names and shapes of `mamba_ssm.Mamba2` (one group, RMS norm on).

    Args:
        d_model: width of input and output.
        d_state, d_conv, expand, headdim: as in the paper; expand * d_model must be a multiple of headdim.
        chunk_size: positions in one masked matrix product.
        backend: 'torch' (any device), 'cuda' (the kernels of mamba_ssm), or 'auto'.

    Raises:
        ValueError: sizes that do not divide, or an unknown backend.
        ImportError: backend 'cuda' without mamba_ssm; the message says how to install it.
    """

    def __init__(self, d_model, d_state=64, d_conv=4, expand=2, headdim=64, chunk_size=128, backend="auto"):
        super().__init__()
        self.d_inner, self.d_state, self.headdim, self.chunk_size = expand * d_model, d_state, headdim, chunk_size
        if self.d_inner % headdim:
            raise ValueError(f"expand * d_model = {self.d_inner} is not a multiple of headdim {headdim}")
        self.nheads = self.d_inner // headdim
        self.backend = backend
        conv_dim = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=False)  # [z, x, B, C, dt]
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        # dt starts log-uniform in [0.001, 0.1]; dt_bias is its inverse softplus.
        dt = torch.exp(torch.rand(self.nheads) * math.log(100) + math.log(1e-3)).clamp_(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNormGated(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def _split(self, u: Tensor):
        """Input projection of u [..., d_model] -> gate z, convolution input xBC, raw step size dt."""
        return self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)

    def forward(self, u: Tensor) -> Tensor:
        """u: [batch, length, d_model] -> [batch, length, d_model]; position t depends on positions <= t alone."""
        batch, length, _ = u.shape
        if resolve_backend(self.backend, u.device) == "cuda" and length > 1:
            return self._forward_cuda(u)
        z, xBC, dt = self._split(u)
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

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Convolution inputs [batch, conv_dim, d_conv - 1] and scan state [batch, heads, headdim, d_state]: zeros."""
        weight = self.conv1d.weight
        return (
            weight.new_zeros(batch, weight.shape[0], weight.shape[-1] - 1),
            weight.new_zeros(batch, self.nheads, self.headdim, self.d_state),
        )

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One position of the recurrence. u: [batch, d_model] -> output [batch, d_model] and the next state."""
        past, h = state
        z, xBC, dt = self._split(u)
        seen = torch.cat([past, xBC.unsqueeze(-1)], dim=-1)  # [batch, conv_dim, d_conv]
        xBC = F.silu((seen * self.conv1d.weight.squeeze(1)).sum(-1) + self.conv1d.bias)
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        dt = F.softplus(dt + self.dt_bias)
        h = h * torch.exp(-dt * self.A_log.exp())[..., None, None]
        h = h + (dt.unsqueeze(-1) * x).unsqueeze(-1) * B[:, None, None]
        y = (h @ C[:, None, :, None]).squeeze(-1) + x * self.D.unsqueeze(-1)
        return self.out_proj(self.norm(y.flatten(1), z)), (seen[..., 1:], h)

    def _forward_cuda(self, u: Tensor) -> Tensor:
        """The same through the fused kernel of mamba_ssm, which takes the projected input whole."""
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        return mamba_split_conv1d_scan_combined(
            self.in_proj(u),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -self.A_log.float().exp(),
            D=self.D,
            chunk_size=self.chunk_size,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            outproj_weight=self.out_proj.weight,
            headdim=self.headdim,
            ngroups=1,
            norm_before_gate=False,
        )


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@functools.lru_cache(maxsize=1)
def _kernels_found() -> bool:
    try:
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except (ImportError, RuntimeError):  # not installed, or not for this driver
        return False
    return True


_announced: set[str] = set()


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs: 'torch' or 'cuda'. 'auto' takes the kernels on a GPU that has them, and logs it once."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}': choose one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    if backend == "cuda":
        if device.type != "cuda":
            raise ValueError(f"backend 'cuda' runs on a GPU, but the data is on {device}: use backend 'torch'")
        if not _kernels_found():
            raise ImportError(
                "backend 'cuda' needs mamba_ssm: pip install -r requirements-cuda.txt, or backend 'torch'"
            )
        return backend
    choice = "cuda" if device.type == "cuda" and _kernels_found() else "torch"
    if choice not in _announced:
        _announced.add(choice)
        logger.info("Mamba-2 backend: %s", choice)
    return choice


# ---------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------


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

    Input projection, rotary position embedding, n_layers of [LayerNorm, Mamba-2, dropout, residual], LayerNorm,
    output projection. Observations are standardised first, with the statistics given by `set_normalizer`; they
    are buffers, so a checkpoint carries them.

    Args:
        observation_dim: numbers in a state.
        d_model: width of the network and of the codes; even, and expand * d_model a multiple of 64 or smaller.
        n_layers, d_state, d_conv, expand, dropout, backend: see `Mamba2`.
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
        self.input = nn.Linear(observation_dim, d_model)
        headdim = min(64, expand * d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.mixers = nn.ModuleList(
            Mamba2(d_model, d_state, d_conv, expand, headdim, backend=backend) for _ in range(n_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, d_model)

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: [observation_dim], the training data's."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, observations: Tensor) -> Tensor:
        """observations: [batch, length, observation_dim] -> codes [batch, length, d_model], one for each prefix."""
        h = self.input((observations - self.mean) / self.std)
        h = rotary(h, torch.arange(h.shape[1], device=h.device))
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + self.dropout(mixer(norm(h)))
        return self.output(self.norm(h))

    def encode_last_valid(self, observations: Tensor, lengths: Tensor) -> Tensor:
        """Codes at the last valid position of right-padded sequences.

        observations: [batch, length, observation_dim], lengths: [batch] int64 in 1..length -> [batch, d_model].
        What stands in the padding does not matter: the encoder is causal.
        """
        codes = self(observations)
        return codes.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, codes.shape[-1])).squeeze(1)

    def encode_goal(self, goals: Tensor) -> Tensor:
        """z_g = f(g), a goal seen as a sequence of one. goals: [..., observation_dim] -> [..., d_model]."""
        return self(goals.reshape(-1, 1, self.observation_dim)).view(*goals.shape[:-1], self.d_model)

    def initial_state(self, batch: int) -> dict:
        """What `step` carries for `batch` sequences: position [batch] and the layers' recurrent states.

        A sequence that starts anew takes its rows from a fresh state; the others go on.
        """
        position = torch.zeros(batch, dtype=torch.int64, device=self.mean.device)
        return {"position": position, "layers": [mixer.initial_state(batch) for mixer in self.mixers]}

    def step(self, observation: Tensor, state: dict) -> tuple[Tensor, dict]:
        """One more state of each sequence; equals `forward` over all of them, at constant cost.

        observation: [batch, observation_dim] -> code [batch, d_model], and the state for the next call.
        """
        h = self.input((observation - self.mean) / self.std)
        h = rotary(h, state["position"])
        layers = []
        for norm, mixer, layer in zip(self.norms, self.mixers, state["layers"], strict=True):
            y, layer = mixer.step(norm(h), layer)
            h = h + self.dropout(y)
            layers.append(layer)
        return self.output(self.norm(h)), {"position": state["position"] + 1, "layers": layers}


# ---------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dim: int, output_dim: int, hidden_layers: int = 2) -> nn.Sequential:
    """Hidden layers of ReLU, then a linear one."""
    layers: list[nn.Module] = []
    for width in [input_dim] + [hidden_dim] * (hidden_layers - 1):
        layers += [nn.Linear(width, hidden_dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden_dim, output_dim))


class EnsembleLinear(nn.Module):
    """`size` linear layers as one batched product. x: [size, n, input_dim] -> [size, n, output_dim]."""

    def __init__(self, size: int, input_dim: int, output_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(input_dim)
        self.weight = nn.Parameter(torch.empty(size, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(size, 1, output_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class TransitionQ(nn.Module):
    """Twin Q(z, z', z_g): value of moving from z to z' on the way to z_g. Codes [..., d_model] -> [2, ...]."""

    def __init__(self, d_model: int, hidden_dim: int, size: int = 2):
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(
            EnsembleLinear(size, a, b)
            for a, b in ((3 * d_model, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, 1))
        )

    def forward(self, z: Tensor, z_next: Tensor, z_goal: Tensor) -> Tensor:
        h = torch.cat([z, z_next, z_goal], dim=-1)
        shape = h.shape[:-1]
        h = h.reshape(1, -1, h.shape[-1]).expand(self.size, -1, -1)
        for layer in self.layers[:-1]:
            h = F.relu(layer(h))
        return self.layers[-1](h).view(self.size, *shape)


class GoalValue(nn.Module):
    """V(z, z_g). Codes [..., d_model] -> [...]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(2 * d_model, hidden_dim, 1)

    def forward(self, z: Tensor, z_goal: Tensor) -> Tensor:
        return self.net(torch.cat([z, z_goal], dim=-1)).squeeze(-1)


class NextState(nn.Module):
    """The proposer: the next code on the way to the goal, as a step from z. Codes [..., d_model] -> [..., d_model]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(2 * d_model, hidden_dim, d_model)

    def forward(self, z: Tensor, z_goal: Tensor) -> Tensor:
        return z + self.net(torch.cat([z, z_goal], dim=-1))


class RewardLogit(nn.Module):
    """Logit of reaching the goal, or the episode's end, at z'. Code [..., d_model] -> [...]."""

    def __init__(self, d_model: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(d_model, hidden_dim, 1)

    def forward(self, z_next: Tensor) -> Tensor:
        return self.net(z_next).squeeze(-1)


class InverseDynamics(nn.Module):
    """The action that leads from z to z' on the way to z_g, in [-1, 1]. Codes [..., d_model] -> [..., action_dim]."""

    def __init__(self, d_model: int, hidden_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(3 * d_model, hidden_dim, action_dim)

    def forward(self, z: Tensor, z_next: Tensor, z_goal: Tensor) -> Tensor:
        return torch.tanh(self.net(torch.cat([z, z_next - z, z_goal - z], dim=-1)))


class StateMetric(nn.Module):
    """An embedding of states in which squared distance counts steps. Normalised states [..., D] -> [..., dim].

    `steps_per_square` is what a squared distance of 1 is worth, as `OnlineAgent.fit_metric` measures it.
    """

    def __init__(self, observation_dim: int, hidden_dim: int, dim: int):
        super().__init__()
        self.net = mlp(observation_dim, hidden_dim, dim)
        self.log_scale = nn.Parameter(torch.zeros(()))  # the temperature of its InfoNCE
        self.register_buffer("steps_per_square", torch.ones(()))

    def forward(self, states: Tensor) -> Tensor:
        return self.net(states) * self.log_scale.exp()


class StepInverse(nn.Module):
    """The action between two successive states (s, s'), unbounded. Normalised states [n, D] twice -> [n, A].

    `scale` is the deviation of s' - s, in which the difference is measured; `OnlineAgent` sets it from the dataset's
    states. Inputs are cut at 10 deviations.
    """

    def __init__(self, observation_dim: int, hidden_dim: int, action_dim: int):
        super().__init__()
        sizes = (2 * observation_dim, hidden_dim, hidden_dim, hidden_dim)
        layers = [layer for m, n in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(m, n), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden_dim, action_dim))
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


# ---------------------------------------------------------------------------------------------------------------
# POGO: transport-map actors and twin critics
# ---------------------------------------------------------------------------------------------------------------


CACHED_ROWS = 256  # rows at a time on a CPU, whose activations then stay in its cache: a sixth faster than 1024


class _MLP(torch.autograd.Function):
    """An MLP of ReLU by oneDNN, as one node of the graph: layer by layer, overhead would take as long as the products.

    PyTorch takes MKL for matrices in float32, which on an AMD CPU (family 26) is half as fast; on others it may not be.
    """

    @staticmethod
    def forward(ctx, x, *parameters):
        """x [n, in], then weight [out, in] and bias [out] of each layer."""
        *inputs, y = _mlp_forward(x, parameters[::2], parameters[1::2])
        ctx.save_for_backward(*inputs, *parameters[::2])
        return y

    @staticmethod
    def backward(ctx, grad):
        saved, (to_x, *to_parameters) = ctx.saved_tensors, ctx.needs_input_grad
        half = len(saved) // 2
        grad_x, slopes = _mlp_backward(grad.contiguous(), saved[:half], saved[half:], to_x, any(to_parameters), False)
        return grad_x, *slopes


class _EnsembleMLP(torch.autograd.Function):
    """The first `members` of stacked MLPs of one output, on the same x [n, in] -> [members, n].

    Weights [size, in, out], biases [size, 1, out]. Gradients go to all members or, where some are left out, to x alone.
    """

    @staticmethod
    def forward(ctx, x, members, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        outputs, saved = [], []
        for k in range(members):
            *inputs, y = _mlp_forward(x, [weight[k].t() for weight in weights], [bias[k, 0] for bias in biases])
            outputs.append(y.squeeze(-1))
            saved += inputs[1:]
        ctx.save_for_backward(x, *saved, *weights)
        ctx.layers = len(weights)
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx, grad):
        (x, *saved), depth = ctx.saved_tensors, ctx.layers
        weights, hidden = saved[-depth:], saved[:-depth]
        to_x, _, *to_parameters = ctx.needs_input_grad
        grad_x, slopes = None, []
        for k, slope in enumerate(grad.unsqueeze(-1).contiguous().unbind()):
            inputs = [x, *hidden[k * (depth - 1) : (k + 1) * (depth - 1)]]
            own = [weight[k].t() for weight in weights]
            to_one, more = _mlp_backward(slope, inputs, own, to_x, any(to_parameters), True)
            grad_x = to_one if grad_x is None else grad_x.add_(to_one)
            slopes.append(more)
        if any(to_parameters):  # bias [out] of each member -> [size, 1, out]
            stacked = [torch.stack(parts) for parts in zip(*slopes, strict=True)]
            slopes = [part.unsqueeze(1) if number % 2 else part for number, part in enumerate(stacked)]
        else:
            slopes = slopes[0]
        return grad_x, None, *slopes


def _mlp_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """The input of every layer, and the output."""
    values, last = [x], len(weights) - 1
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        values.append(_onednn(values[-1], weight, bias, "none" if number == last else "relu"))
    return values


def _mlp_backward(
    grad: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor], to_x: bool, to_parameters: bool, transposed: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and, as `_MLP.forward` has them, of the parameters (weights [in, out] if transposed)."""
    if torch.is_grad_enabled():  # create_graph: what follows would silently be taken for a constant
        raise RuntimeError("an MLP in float32 on a CPU is differentiable once; use float64, or call the module")
    slopes: list[Tensor | None] = []
    for number in range(len(weights) - 1, -1, -1):
        x, slope = inputs[number], None
        if to_parameters:
            slope = _onednn(x.t(), grad.t(), None, "none") if transposed else _onednn(grad.t(), x.t(), None, "none")
        slopes += [grad.sum(0) if to_parameters else None, slope]
        if number > 0:
            grad = torch.ops.aten.threshold_backward(_onednn(grad, weights[number].t(), None, "none"), x, 0)
    return _onednn(grad, weights[0].t(), None, "none") if to_x else None, slopes[::-1]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x W^T + b); x [n, in] and weight [out, in] contiguous or transposed, anything else is very slow."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


@functools.cache
def _has_onednn() -> bool:
    """Whether this build of PyTorch has the operator that torch.compile uses for linear layers on a CPU."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _has_onednn()


def run_mlp(net: nn.Sequential, x: Tensor) -> Tensor:
    """What `net(x)` gives, an `mlp`, x [..., in] -> [..., out]; differentiable once."""
    if not _takes_onednn(x):
        return net(x)
    rows, parameters = x.reshape(-1, x.shape[-1]), list(net.parameters())
    y = torch.cat([_MLP.apply(some, *parameters) for some in rows.split(CACHED_ROWS)])
    return y.view(*x.shape[:-1], -1)


class TransportActor(nn.Module):
    """A policy as a transport map a = T(s, z), z ~ N(0, I) of the action's size: tanh * max_action of an MLP."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        max_action: float = 1.0,
        hidden_dim: int = 256,
        hidden_layers: int = 2,
    ):
        super().__init__()
        self.action_dim, self.max_action = action_dim, max_action
        self.net = mlp(observation_dim + action_dim, hidden_dim, action_dim, hidden_layers)

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions [..., A] of observations [..., D] under z [..., A]; z [..., K, A] gives K actions a state."""
        if z.dim() > observations.dim():
            observations = observations.unsqueeze(-2).expand(*z.shape[:-1], -1)
        return torch.tanh(run_mlp(self.net, torch.cat([observations, z], dim=-1))) * self.max_action


class StateValue(nn.Module):
    """V(s), an MLP of ReLU: [n, D] -> [n]."""

    def __init__(self, observation_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.net = mlp(observation_dim, hidden_dim, 1)

    def forward(self, observations: Tensor) -> Tensor:
        return run_mlp(self.net, observations).squeeze(-1)


class EnsembleCritic(nn.Module):
    """Several Q(s, a), MLPs of ReLU. Observations [n, D], actions [n, A] -> [size, n].

    Weights are stacked, so that a GPU computes all at once; a CPU is faster with one after the other.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dim: int = 256, size: int = 2, hidden_layers: int = 2
    ):
        super().__init__()
        self.size, self.observation_dim = size, observation_dim
        widths = [observation_dim + action_dim, *[hidden_dim] * hidden_layers, 1]
        self.layers = nn.ModuleList(EnsembleLinear(size, a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self._run(torch.cat([observations, actions], dim=-1), self.size, frozen=False)

    def frozen(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[size, n], with a gradient to the actions and none to the weights."""
        return self._run(torch.cat([observations, actions], dim=-1), self.size, frozen=True)

    def frozen_q1(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The first Q alone, [n], with a gradient to the actions and none to the weights."""
        return self._run(torch.cat([observations, actions], dim=-1), 1, frozen=True).squeeze(0)

    def action_gradients(self, observations: Tensor, actions: Tensor) -> Tensor:
        """dQ_k/da [size, n, A], differentiable by the weights, as a chain of matrix products through the ReLUs."""
        with torch.no_grad():  # which ReLUs pass is all that the forward pass is for: it has no derivative
            h, masks = torch.cat([observations, actions], dim=-1).expand(self.size, -1, -1), []
            for layer in self.layers[:-1]:
                h = layer(h).relu_()
                masks.append(h > 0)
        slope = self.layers[-1].weight.transpose(1, 2)  # [size, 1, hidden]
        for layer, mask in zip(reversed(self.layers[1:-1]), reversed(masks[1:]), strict=True):
            slope = (slope * mask) @ layer.weight.transpose(1, 2)
        return (slope * masks[0]) @ self.layers[0].weight[:, self.observation_dim :].transpose(1, 2)

    def _run(self, h: Tensor, members: int, frozen: bool) -> Tensor:
        """The first members' values [members, n] of inputs [n, D + A]."""
        parameters = [value for layer in self.layers for value in (layer.weight, layer.bias)]
        if frozen:
            parameters = [value.detach() for value in parameters]
        if _takes_onednn(h):
            values = [_EnsembleMLP.apply(some, members, *parameters) for some in h.split(CACHED_ROWS)]
            return torch.cat(values, dim=1)
        h = h.expand(members, -1, -1)
        for number, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            h = torch.baddbmm(bias[:members], h, weight[:members])
            h = h.relu_() if number < len(self.layers) - 1 else h
        return h.squeeze(-1)

"""Policies: what an actor of the chain can be.

`policy(observations)` is a distribution of actions in each state, and everything else is asked of that: the network
runs once, whatever is drawn from it.

| class | actions | density | used by default in |
|---|---|---|---|
| DeterministicMLP | tanh(net(s)) | no, a point | TD3+BC, IQL where `iql_deterministic` |
| StochasticMLP | tanh(net([s, z])), z ~ N(0, I) | no, samples alone | none |
| GaussianMLP | N(mean(s), std), cut to the box | yes | IQL, AWAC |
| TanhGaussianMLP | tanh of N(mean(s), std(s)) | yes | CQL, SAC-N, EDAC |

Every one draws by the same noise: z [n, A] gives an action a state, z [n, K, A] gives K.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MLP, TransportActor, times

LOG_2PI = math.log(2 * math.pi)


class Draw:
    """Actions of a policy, reparametrised, [n, A] or [n, K, A]; their log density is computed where it is asked for."""

    def __init__(self, actions: Tensor, density: Callable[[], Tensor] | None = None):
        self.actions, self._density = actions, density

    @functools.cached_property
    def log_prob(self) -> Tensor | None:
        """[n] or [n, K]; None where the policy has no density."""
        return self._density and self._density()

    def first(self) -> "Draw":
        """One action a state, of K."""
        return Draw(self.actions[:, 0], self._density and (lambda: self.log_prob[:, 0]))


def _beside(per_state: Tensor, z: Tensor) -> Tensor:
    """[n, A] as [n, 1, A] where z holds several draws a state."""
    return per_state.unsqueeze(-2) if z.dim() > per_state.dim() else per_state


class Samples:
    """Draws alone, by a map of noise to actions."""

    def __init__(self, transport: Callable[[Tensor], Tensor], mode: Callable[[], Tensor]):
        self.transport, self._mode = transport, mode

    @property
    def mode(self) -> Tensor:
        return self._mode()

    def draw(self, z: Tensor) -> Draw:
        return Draw(self.transport(z))

    def bc_loss(self, actions: Tensor, draw: Draw) -> Tensor:
        """||pi(s, z) - a||^2 at the draw, [n]."""
        return (draw.actions - actions).square().sum(-1)


class Point(Samples):
    """One action a state, [n, A], whatever the noise."""

    def __init__(self, actions: Tensor):
        super().__init__(lambda z: _beside(actions, z).expand_as(z), lambda: actions)


class Density:
    """A distribution with a density: log_prob(actions) is log pi(a | s), [n] or [n, K]."""

    def bc_loss(self, actions: Tensor, draw: Draw) -> Tensor:
        """-log pi(a | s), [n]."""
        return -self.log_prob(actions)


class Gaussian(Density):
    """N(mean, std^2) with actions cut to the box; densities are those before the cut, as CORL has them."""

    def __init__(self, mean: Tensor, std: Tensor, max_action: float):
        self.mean, self.std, self.max_action = mean, std.expand_as(mean), max_action

    @property
    def mode(self) -> Tensor:
        return self.mean.clamp(-self.max_action, self.max_action)

    def draw(self, z: Tensor) -> Draw:
        actions = (_beside(self.mean, z) + _beside(self.std, z) * z).clamp(-self.max_action, self.max_action)
        return Draw(actions, lambda: self.log_prob(actions))

    def log_prob(self, actions: Tensor) -> Tensor:
        std = _beside(self.std, actions)
        z = (actions - _beside(self.mean, actions)) / std
        return (-0.5 * z.square() - std.log() - 0.5 * LOG_2PI).sum(-1)


class TanhGaussian(Density):
    """max_action tanh(u), u ~ N(mean, std^2). The density is that of tanh(u): max_action is not counted, as in CORL."""

    def __init__(self, mean: Tensor, log_std: Tensor, max_action: float):
        self.mean, self.log_std, self.max_action = mean, log_std, max_action

    @property
    def mode(self) -> Tensor:
        return torch.tanh(self.mean) * self.max_action

    def draw(self, z: Tensor) -> Draw:
        log_std = _beside(self.log_std, z)
        u = _beside(self.mean, z) + log_std.exp() * z

        def log_prob() -> Tensor:
            # log(1 - tanh(u)^2), without the loss of digits where |u| is large (SAC paper, appendix C, equation 21).
            slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
            return (-0.5 * z.square() - log_std - 0.5 * LOG_2PI - slope).sum(-1)

        return Draw(torch.tanh(u) * self.max_action, log_prob)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Of actions inside the box; those on its edge are moved 1e-6 of it inwards."""
        y = (actions / self.max_action).clamp(-1 + 1e-6, 1 - 1e-6)
        u = torch.atanh(y)
        z = (u - _beside(self.mean, actions)) * _beside(-self.log_std, actions).exp()
        return (-0.5 * z.square() - _beside(self.log_std, actions) - 0.5 * LOG_2PI - torch.log1p(-y.square())).sum(-1)


Distribution = Samples | Density


class DeterministicMLP(nn.Module):
    """a = max_action tanh(net(s))."""

    def __init__(self, observation_dim: int, action_dim: int, max_action: float, hidden_dim: int = 256):
        super().__init__()
        self.action_dim, self.max_action = action_dim, max_action
        self.net = MLP(observation_dim, hidden_dim, action_dim, squash=True)

    def forward(self, observations: Tensor) -> Point:
        return Point(times(self.net(observations), self.max_action))


class StochasticMLP(nn.Module):
    """a = max_action tanh(net([s, z])), a transport map of noise to actions."""

    def __init__(self, observation_dim: int, action_dim: int, max_action: float, hidden_dim: int = 256):
        super().__init__()
        self.action_dim = action_dim
        self.transport = TransportActor(observation_dim, action_dim, max_action, hidden_dim)

    def forward(self, observations: Tensor) -> Samples:
        still = observations.new_zeros(*observations.shape[:-1], self.action_dim)
        return Samples(lambda z: self.transport(observations, z), lambda: self.transport(observations, still))


class GaussianMLP(nn.Module):
    """N(mean(s), std^2), std a parameter for each action number, 1 at first.

    squash_mean: the mean is tanh of the network, times max_action (IQL), or the network as it is (AWAC).
    """

    LOG_STD = (-20.0, 2.0)

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        max_action: float,
        hidden_dim: int = 256,
        hidden_layers: int = 2,
        squash_mean: bool = True,
    ):
        super().__init__()
        self.action_dim, self.max_action, self.squash_mean = action_dim, max_action, squash_mean
        self.net = MLP(observation_dim, hidden_dim, action_dim, hidden_layers, squash=squash_mean)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, observations: Tensor) -> Gaussian:
        mean = self.net(observations)
        mean = times(mean, self.max_action) if self.squash_mean else mean
        return Gaussian(mean, self.log_std.clamp(*self.LOG_STD).exp(), self.max_action)


class TanhGaussianMLP(nn.Module):
    """tanh of N(mean(s), std(s)^2), three hidden layers, in the initialisation of the EDAC paper (An et al., 2021).

    log_std_bounds: where log std is cut; log_std_offset: added to the network's output before; edac_init: that
    initialisation, else PyTorch's.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        max_action: float,
        hidden_dim: int = 256,
        log_std_bounds: tuple[float, float] = (-5.0, 2.0),
        log_std_offset: float = 0.0,
        edac_init: bool = True,
    ):
        super().__init__()
        self.action_dim, self.max_action = action_dim, max_action
        self.log_std_bounds, self.log_std_offset = log_std_bounds, log_std_offset
        self.net = MLP(observation_dim, hidden_dim, 2 * action_dim, hidden_layers=3)
        if edac_init:
            initialise(self.net, last_bound=1e-3)

    def forward(self, observations: Tensor) -> TanhGaussian:
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        return TanhGaussian(mean, (log_std + self.log_std_offset).clamp(*self.log_std_bounds), self.max_action)


POLICIES = {
    "stochastic": StochasticMLP,
    "deterministic": DeterministicMLP,
    "gaussian": GaussianMLP,
    "tanh_gaussian": TanhGaussianMLP,
}


@torch.no_grad()
def initialise(net: MLP, last_bound: float) -> None:
    """As in the EDAC paper, in place: hidden biases of 0.1, a last layer in [-last_bound, last_bound]."""
    *hidden, (weight, bias) = net.layers()
    for _, hidden_bias in hidden:
        hidden_bias.fill_(0.1)
    weight.uniform_(-last_bound, last_bound)
    bias.uniform_(-last_bound, last_bound)

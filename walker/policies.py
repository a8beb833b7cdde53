"""Networks that act, and the little that turns one into a policy: what `walker.agent` rebuilds from a file.

A policy acts on inputs [n, D]: standardised observations, and the task's bit where it was trained with one.

    policy.begin(n, task)              n episodes of a task begin
    policy.act(inputs, rewards)        actions [n, A]; rewards [n] of the step before, nan where they are not known
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.offline.cql import make_actor
from algorithms.offline.pogo_policies import DeterministicMLP
from model import Linear
from walker.ppo import GaussianActor


class Markov(nn.Module):
    """Acts on the present observation, by the mode of a network's distribution."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def begin(self, n: int, task: str) -> None:
        """Nothing to forget."""

    @torch.no_grad()
    def act(self, inputs: Tensor, rewards: Tensor) -> Tensor:
        found = self.network(inputs)
        return found if isinstance(found, Tensor) else found.mode


class ResidualBlock(nn.Module):
    """x + W_2 relu(W_1 LayerNorm(x)), all of one width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(self.norm(x))))


class ResidualMLP(nn.Module):
    """Actions in [-1, 1] of inputs [n, input_dim]: a layer, residual blocks, LayerNorm, ReLU, a layer, tanh."""

    def __init__(self, input_dim: int, action_dim: int, hidden_dim: int = 512, blocks: int = 2):
        super().__init__()
        self.net = nn.Sequential(
            Linear(input_dim, hidden_dim),
            *(ResidualBlock(hidden_dim) for _ in range(blocks)),
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
            Linear(hidden_dim, action_dim),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.net(inputs))


class TransformerBlock(nn.Module):
    """Causal self-attention and an MLP of four times the width, normalised before, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.ReLU(), Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor, newest: bool = False) -> Tensor:
        """x: [n, L, width]; mask: [n, 1, L, L], True where a token may look. newest: of the last token alone."""
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [n, heads, L, width / heads] each
        if newest:
            x, q, mask = x[:, -1:], q[:, :, -1:], mask[:, :, -1:]
        share = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), self.dropout, self.training)


class DecisionTransformer(nn.Module):
    """Actions from returns to go, inputs and actions (Chen et al., "Decision Transformer", 2021).

    Tokens R_1, s_1, a_1, R_2, s_2, a_2, ..., each with an embedding of its time step, of which there are `max_steps`;
    the action of step t is read from the token of s_t, which sees everything up to itself.
    """

    def __init__(
        self,
        input_dim: int,
        action_dim: int,
        context: int = 20,
        hidden_dim: int = 256,
        layers: int = 3,
        heads: int = 1,
        dropout: float = 0.1,
        max_steps: int = 1000,
    ):
        super().__init__()
        self.context, self.action_dim, self.max_steps, self.dropout = context, action_dim, max_steps, dropout
        self.embed_time = nn.Embedding(max_steps, hidden_dim)
        self.embed_return = Linear(1, hidden_dim)
        self.embed_input, self.embed_action = Linear(input_dim, hidden_dim), Linear(action_dim, hidden_dim)
        self.norm, self.norm_out = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.blocks = nn.ModuleList(TransformerBlock(hidden_dim, heads, dropout) for _ in range(layers))
        self.head = Linear(hidden_dim, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, inputs: Tensor, actions: Tensor, returns: Tensor, times: Tensor, valid: Tensor, newest: bool = False
    ) -> Tensor:
        """Actions [n, L, A] in [-1, 1] of L steps, each from those up to its own; newest: of the last alone, [n, 1, A].

        inputs: [n, L, D]. actions: [n, L, A], of which a step's own is not looked at. returns: [n, L], still to come,
        scaled. times: [n, L] int64. valid: [n, L] bool, False for padding, which nothing looks at.
        """
        n, steps = valid.shape
        time = self.embed_time(times.clamp(max=self.max_steps - 1))
        tokens = (self.embed_return(returns.unsqueeze(-1)), self.embed_input(inputs), self.embed_action(actions))
        x = torch.stack([token + time for token in tokens], dim=2).flatten(1, 2)  # [n, 3 L, width]
        x = F.dropout(self.norm(x), self.dropout, self.training)
        causal = torch.ones(3 * steps, 3 * steps, dtype=torch.bool, device=x.device).tril()
        # A padded token sees itself, so that its row of the softmax is not empty; nobody looks at it.
        own = torch.eye(3 * steps, dtype=torch.bool, device=x.device)
        mask = causal & valid.repeat_interleave(3, dim=1).view(n, 1, 1, 3 * steps) | own
        if newest:  # its state is the last token that anything looks at
            x, mask = x[:, :-1], mask[:, :, :-1, :-1]
        for block in self.blocks[:-1]:
            x = block(x, mask)
        x = self.blocks[-1](x, mask, newest)
        return torch.tanh(self.head(self.norm_out(x if newest else x[:, 1::3])))


class ReturnConditioned(nn.Module):
    """Acts by a Decision Transformer that is told what return to reach.

    targets: return to ask for in each task, in units of `return_scale`, as are all returns that the network sees.
    """

    def __init__(self, network: DecisionTransformer, targets: dict[str, float], return_scale: float):
        super().__init__()
        self.network, self.targets, self.return_scale = network, targets, return_scale

    def begin(self, n: int, task: str) -> None:
        """Forget what was seen, and ask for the task's target."""
        self.target, self.step = self.targets[task] / self.return_scale, 0
        self.seen: list[Tensor] = []  # inputs, actions, returns: [n, steps, ...], of the last steps

    @torch.no_grad()
    def act(self, inputs: Tensor, rewards: Tensor) -> Tensor:
        """A reward that is not known counts as an even share of the target."""
        n, before = len(inputs), self.network.context - 1
        if self.step == 0:
            returns = inputs.new_full((n,), self.target)
            window = [inputs[:, None], inputs.new_zeros(n, 1, self.network.action_dim), returns[:, None]]
        else:
            share = self.target / self.network.max_steps
            returns = self.seen[2][:, -1] - (rewards / self.return_scale).nan_to_num(nan=share)
            new = (inputs, inputs.new_zeros(n, self.network.action_dim), returns)
            window = [torch.cat([old[:, -before:], row[:, None]], 1) for old, row in zip(self.seen, new, strict=True)]
        steps = window[0].shape[1]
        times = torch.arange(self.step + 1 - steps, self.step + 1, device=inputs.device).expand(n, steps)
        valid = torch.ones(n, steps, dtype=torch.bool, device=inputs.device)
        actions = self.network(*window, times, valid, newest=True)[:, -1]
        window[1][:, -1] = actions
        self.seen, self.step = window, self.step + 1
        return actions


# What each kind of policy in a file is made by, given its input's and action's sizes and its own.
POLICIES: dict[str, Callable[..., Any]] = {
    "residual_mlp": lambda *sizes, **own: Markov(ResidualMLP(*sizes, **own)),
    "deterministic_mlp": lambda *sizes, hidden_dim: Markov(DeterministicMLP(*sizes, 1.0, hidden_dim)),
    "tanh_gaussian_mlp": lambda *sizes, hidden_dim: Markov(make_actor(*sizes, 1.0, hidden_dim)),
    "gaussian_actor": lambda *sizes, hidden_dim: Markov(GaussianActor(*sizes, hidden_dim)),
    "decision_transformer": lambda *sizes, targets, return_scale, **own: ReturnConditioned(
        DecisionTransformer(*sizes, **own), targets, return_scale
    ),
}

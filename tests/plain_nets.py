"""The project's MLPs as usual modules, which the tests compare them with."""

import torch
from torch import nn

from model import MLP, EnsembleCritic


def as_mlp(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Sequential:
    """A usual MLP of ReLU with copies of these weights [in, out] and biases [out]."""
    net = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.detach().T.clone(), bias.detach().flatten().clone()
        net += [linear, nn.ReLU()]
    return nn.Sequential(*net[:-1])


def plain(net: MLP) -> nn.Sequential:
    """A copy of one network, before the tanh of one that has it."""
    return as_mlp(net.layers())


def plain_members(net: MLP) -> nn.ModuleList:
    """A copy of each of several networks."""
    return nn.ModuleList(as_mlp([(weight[k], bias[k]) for weight, bias in net.layers()]) for k in range(net.size))


def plain_critics(critic: EnsembleCritic) -> nn.ModuleList:
    return plain_members(critic.net)

"""EDAC, ensemble-diversified actor-critic (An, Moon, Kim & Song, 2021): SAC-N, and one more term for its critics.

    critics   SAC-N's + eta E[sum_{i != j} <g_i, g_j>] / (N - 1),   g_i the unit gradient of Q_i(s, a) by a, equation 4

so that the critics disagree about how Q changes with the action around the data's actions. Deviation: as SAC-N.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from algorithms.offline.base import Batch, Info
from algorithms.offline.sac_n import SACN, SACNConfig
from utils import NonNegative, Range


@dataclass
class EDACConfig(SACNConfig):
    num_critics: Annotated[int, Range(2, 10**9)] = 10  # critics, whose action gradients shall differ
    eta: NonNegative = 1.0  # weight of the diversity term (5 for halfcheetah- and walker2d-medium-expert)


class EDAC(SACN):
    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        target = self.critic_target_value(batch)
        q, slopes = self.critic.with_action_gradients(batch["observations"], batch["actions"])
        loss, similarity = (q - target).square().mean(1).sum(), gradient_similarity(slopes)
        info = {"critic_loss": loss, "q_data": q.mean(), "gradient_similarity": similarity}
        return loss + self.config.eta * similarity, {name: value.detach() for name, value in info.items()}


def gradient_similarity(g: Tensor) -> Tensor:
    """Cosine between critics' gradients by the action g [N, n, A], summed over pairs, / (N - 1), 0-d."""
    g = g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-10)
    # sum_{i != j} <g_i, g_j> = ||sum_i g_i||^2 - sum_i ||g_i||^2
    pairs = g.sum(0).square().sum(-1) - g.square().sum((0, -1))
    return pairs.mean() / (len(g) - 1)

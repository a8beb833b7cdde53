"""EDAC, ensemble-diversified actor-critic (An, Moon, Kim & Song, 2021): SAC-N, and one more term for its critics.

    critics   SAC-N's + eta E[sum_{i != j} <g_i, g_j>] / (N - 1),   g_i the unit gradient of Q_i(s, a) by a, equation 4

so that the critics disagree about how Q changes with the action around the data's actions. Deviation: as SAC-N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.offline.base import Batch, Info
from algorithms.offline.sac_n import SACN, SACNConfig


@dataclass
class EDACConfig(SACNConfig):
    eta: float = 1.0  # weight of the diversity term (5 for halfcheetah- and walker2d-medium-expert)


class EDAC(SACN):
    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        loss, info = super().critic_loss(batch)
        similarity = self.gradient_similarity(batch)
        return loss + self.config.eta * similarity, info | {"gradient_similarity": similarity.detach()}

    def gradient_similarity(self, batch: Batch) -> Tensor:
        """Cosine between the critics' gradients by the action, summed over pairs, / (N - 1), 0-d."""
        g = self.critic.action_gradients(batch["observations"], batch["actions"])
        g = g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-10)
        # sum_{i != j} <g_i, g_j> = ||sum_i g_i||^2 - sum_i ||g_i||^2
        pairs = g.sum(0).square().sum(-1) - g.square().sum((0, -1))
        return pairs.mean() / (len(g) - 1)

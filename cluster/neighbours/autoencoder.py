"""Features to bits and back: the auto-encoder that section 6.1 of the paper proposes.

Krizhevsky and Hinton, Using Very Deep Autoencoders for Content-Based Image Retrieval (ESANN 2011),
coded pictures so; here it codes features. In the forward pass a bit is +1 or -1; backward it counts
as the tanh it was rounded from. No label is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.experiments.neighbors.features import Flags, Rows
from cluster.neighbours.rivals import CHUNK, Linear

Tell = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an auto-encoder is trained."""

    bits: int
    hidden: int = 512
    """Units between features and bits, and between bits and features."""
    steps: int = 600
    batch: int = 256
    lr: float = 3e-4
    """First rate of Adam; it falls to 0 along half a cosine. Faster or longer, codes of 5,000
    pictures come to fit these alone and find fewer neighbours of others than ITQ does."""
    seed: int = 0

    def table(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return asdict(self)


class AutoEncoder(nn.Module):
    """features -> hidden -> bits -> hidden -> features.

    Args:
        units: features.
        recipe: sizes.
        start: a linear code of as many bits; the network begins as that one, plus what it learns.
        scale: what features are divided by.
    """

    def __init__(self, units: int, recipe: Recipe, start: Linear, scale: float) -> None:
        super().__init__()
        self.mean = nn.Buffer(start.mean.clone())
        self.scale = nn.Buffer(torch.tensor(scale))
        bits, hidden = recipe.bits, recipe.hidden
        self.straight = nn.Linear(units, bits, bias=False)
        self.into = nn.Linear(units, hidden)
        self.code = nn.Linear(hidden, bits)
        self.level = nn.BatchNorm1d(bits, affine=False)
        self.out = nn.Linear(bits, hidden)
        self.back = nn.Linear(hidden, units)
        with torch.no_grad():
            self.straight.weight.copy_(start.axes.T)
            self.code.weight.zero_()
            self.code.bias.zero_()

    def logits(self, rows: Tensor) -> Tensor:
        """What the bits are the signs of, float [n, bits], of features [n, units]."""
        x = (rows - self.mean) / self.scale
        return self.level(self.straight(x) + self.code(F.relu(self.into(x))))

    def forward(self, rows: Tensor) -> Tensor:
        """Mean squared error of the features made from the bits, in those of their deviation."""
        soft = torch.tanh(self.logits(rows))
        bits = soft + (torch.where(soft > 0, 1.0, -1.0) - soft).detach()
        made = self.back(F.relu(self.out(bits)))
        return F.mse_loss(made, (rows - self.mean) / self.scale)

    @torch.no_grad()
    def bits(self, rows: Rows) -> Flags:
        """The code of rows [n, units], bool [n, bits]; the network must be in evaluation mode."""
        found = [
            self.logits(torch.from_numpy(rows[start : start + CHUNK].astype(np.float32))) > 0
            for start in range(0, len(rows), CHUNK)
        ]
        return torch.cat(found).numpy()


def trained(rows: Rows, sound: Flags, start: Linear, recipe: Recipe, tell: Tell) -> AutoEncoder:
    """Train an auto-encoder on features; two calls give the same one.

    Args:
        rows: floats [N, units].
        sound: [N], rows that count.
        start: a linear code to begin with.
        recipe: of the training.
        tell: called with 1 after each step.
    """
    there = np.flatnonzero(sound)
    rng = np.random.default_rng([recipe.seed, 3])
    some = torch.from_numpy(rows[np.sort(rng.permutation(there)[:4096])].astype(np.float32))
    scale = max(float((some - start.mean).square().mean().sqrt()), 1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = AutoEncoder(rows.shape[1], recipe, start, scale)
    optimiser = torch.optim.Adam(net.parameters(), recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    size = min(recipe.batch, len(there))
    order = there[:0]
    for _ in range(recipe.steps):
        if len(order) < size:
            order = np.concatenate((order, rng.permutation(there)))
        picked, order = np.sort(order[:size]), order[size:]
        loss = net(torch.from_numpy(rows[picked].astype(np.float32)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        tell(1)
    return net.eval()

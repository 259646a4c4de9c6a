"""Coders of features to bits: signs of principal components, ITQ, and an auto-encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.cli.options import CodesOptions
from cluster.experiments.neighbors.features import Flags, Rows
from cluster.experiments.neighbors.search import Advance, CodeBytes

SAMPLE = 20_000
"""Most rows that linear codes and product quantisation are fitted to."""
ROTATIONS = 50
"""Iterations of `fit_itq` (Gong and Lazebnik 2011 take 50)."""
CHUNK = 8192
"""Rows that are encoded at a time."""


@dataclass(frozen=True)
class LinearCoder:
    """A code whose bits are signs of projections."""

    mean: Tensor
    """float32 [units]."""
    axes: Tensor
    """float32 [units, bits]."""

    def logits(self, rows: Tensor) -> Tensor:
        """Return the projections, float32 [n, bits], of features [n, units]."""
        return (rows - self.mean) @ self.axes


def draw_sample(rows: Rows, sound: Flags, seed: int) -> Tensor:
    """Draw at most `SAMPLE` sound rows, float32 [n, units]."""
    rng = np.random.default_rng([seed, 2])
    drawn = np.sort(rng.permutation(np.flatnonzero(sound))[:SAMPLE])
    return torch.from_numpy(rows[drawn].astype(np.float32))


def fit_pca(x: Tensor, bits: int, seed: int) -> LinearCoder:
    """Return the coder of the signs of the first principal components.

    Args:
        x: float32 [n, units].
        bits: number of components, at most min(n, units).
        seed: seed of the randomised decomposition (Halko, Martinsson and Tropp 2011).
    """
    mean = x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rank = min(bits + 32, *x.shape)
        axes = torch.pca_lowrank(x - mean, q=rank, center=False, niter=6)[2]
    return LinearCoder(mean, axes[:, :bits].contiguous())


def fit_itq(x: Tensor, start: LinearCoder, seed: int) -> LinearCoder:
    """Rotate principal components until their signs lose least: iterative quantisation.

    Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes
    (CVPR 2011).
    """
    v = start.logits(x)
    generator = torch.Generator().manual_seed(seed)
    bits = v.shape[1]
    rotation = torch.linalg.qr(torch.randn(bits, bits, generator=generator))[0]
    for _ in range(ROTATIONS):
        signs = (v @ rotation).sign()
        left, _, right = torch.linalg.svd(signs.T @ v)
        rotation = (left @ right).T
    return LinearCoder(start.mean, start.axes @ rotation)


@dataclass(frozen=True, kw_only=True)
class AutoEncoderConfig:
    """Sizes and training of an auto-encoder; it is stored beside the codes."""

    bits: int
    hidden: int = CodesOptions.hidden
    """Units between features and bits, and between bits and features."""
    steps: int = CodesOptions.steps
    batch: int = 256
    lr: float = 3e-4
    """First rate of Adam; it falls to 0 along half a cosine. With a higher rate or more steps,
    codes of 5,000 images fit these alone and find fewer neighbors of others than ITQ does."""
    seed: int = 0


class AutoEncoder(nn.Module):
    """features -> hidden -> bits -> hidden -> features.

    Krizhevsky and Hinton, Using Very Deep Autoencoders for Content-Based Image Retrieval (ESANN
    2011), coded images so; here it codes features. In the forward pass a bit is +1 or -1; backward
    it counts as the tanh that was rounded.

    Args:
        units: number of features.
        config: sizes.
        start: a linear code of as many bits; the network begins as that one, plus what it learns.
        scale: divisor of the features.
    """

    def __init__(
        self, units: int, config: AutoEncoderConfig, start: LinearCoder, scale: float
    ) -> None:
        super().__init__()
        self.mean = nn.Buffer(start.mean.clone())
        self.scale = nn.Buffer(torch.tensor(scale))
        bits, hidden = config.bits, config.hidden
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
        """Return the numbers whose signs are the bits, float [n, bits], of features [n, units]."""
        x = (rows - self.mean) / self.scale
        return self.level(self.straight(x) + self.code(F.relu(self.into(x))))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the mean squared error of the features decoded from the bits, over `scale`²."""
        soft = torch.tanh(self.logits(rows))
        bits = soft + (torch.where(soft > 0, 1.0, -1.0) - soft).detach()
        decoded = self.back(F.relu(self.out(bits)))
        return F.mse_loss(decoded, (rows - self.mean) / self.scale)


def train_autoencoder(
    rows: Rows, sound: Flags, start: LinearCoder, config: AutoEncoderConfig, advance: Advance
) -> AutoEncoder:
    """Train an auto-encoder on features; two calls give the same one.

    Args:
        rows: floats [N, units].
        sound: [N], rows to train on.
        start: a linear code to begin with.
        config: sizes and training.
        advance: called with 1 after each step.
    """
    picked = np.flatnonzero(sound)
    rng = np.random.default_rng([config.seed, 3])
    some = torch.from_numpy(rows[np.sort(rng.permutation(picked)[:4096])].astype(np.float32))
    scale = max(float((some - start.mean).square().mean().sqrt()), 1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = AutoEncoder(rows.shape[1], config, start, scale)
    optimizer = torch.optim.Adam(net.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    size = min(config.batch, len(picked))
    order = picked[:0]
    for _ in range(config.steps):
        if len(order) < size:
            order = np.concatenate((order, rng.permutation(picked)))
        batch, order = np.sort(order[:size]), order[size:]
        loss = net(torch.from_numpy(rows[batch].astype(np.float32)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    return net.eval()


@torch.no_grad()
def encode(coder: LinearCoder | AutoEncoder, rows: Rows) -> CodeBytes:
    """Return the codes of rows [n, units], mapped or not; a network must be in evaluation mode.

    Returns:
        uint8 [n, bits / 8], the first bit highest.
    """
    chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
    bits = [coder.logits(torch.from_numpy(some.astype(np.float32))) > 0 for some in chunks]
    return np.packbits(torch.cat(bits).numpy(), axis=1)

"""Net-Trim instances whose optimum is known because it was planted.

A sparse x* is chosen, then a multiplier Z that certifies it, then outputs Y that make both fit:

    X^T z_m = sign(x*_m) on the support of x*_m, below 1 elsewhere      stationarity of ||x||_1
    Z_active = (Y - X x*)_active * ||Z_active|| / radius                the ball holds with equality
    z_pm < 0 only where (X x*)_pm = 0 = V                               binding inequalities, complementary

The problem is convex, so these conditions prove that its optimal value is ||x*||_1.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Planted:
    """inputs X (n, P), outputs Y (n, M) >= 0, the optimum x (M, P), its witness (n, M), radius of the ball."""

    inputs: np.ndarray
    outputs: np.ndarray
    x: np.ndarray
    witness: np.ndarray
    radius: float

    @property
    def value(self) -> float:
        """The optimal value ||x*||_1."""
        return float(np.abs(self.x).sum())

    @property
    def epsilon(self) -> float:
        """The radius relative to ||Y||_F."""
        return self.radius / float(np.linalg.norm(self.outputs))


def planted(samples: int, inputs: int, neurons: int, kept: float = 0.2, radius: float = 0.1, seed: int = 0) -> Planted:
    """An instance with about `kept` of the weights nonzero; `radius`, relative to ||X x*||, is shrunk if Y needs it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((neurons, inputs)) * (rng.random((neurons, inputs)) < kept)
    x[:, 0] = 1.0  # no neuron without weights
    rows = rng.standard_normal((samples, inputs))
    # a tenth of the rows sit on the boundary (X x*)_pm = 0 of one neuron each
    bound = np.flatnonzero(rng.random(samples) < 0.1)
    owner = rng.integers(neurons, size=len(bound))
    normal = x[owner] / np.square(x[owner]).sum(1, keepdims=True)
    rows[bound] -= (rows[bound] * x[owner]).sum(1, keepdims=True) * normal

    produced = rows @ x.T
    produced[bound, owner] = 0.0
    active = produced > 0
    slope = np.where(x != 0, np.sign(x), rng.uniform(-0.9, 0.9, x.shape))
    witness = np.zeros((samples, neurons))
    witness[bound, owner] = -rng.uniform(0.1, 1.0, len(bound)) / samples
    relative = np.zeros_like(witness)  # Z / (X x*) where active: bounded, so that Y stays positive
    for m in range(neurons):
        here = rows[active[:, m]]
        weighted = here * produced[active[:, m], m, None]
        relative[active[:, m], m] = here @ np.linalg.solve(here.T @ weighted, slope[m] - rows.T @ witness[:, m])
    witness[active] = (relative * produced)[active]
    norm = np.linalg.norm(witness[active])
    ball = min(radius * np.linalg.norm(produced[active]), 0.9 * norm / max(-relative.min(), 1e-300))
    outputs = np.where(active, produced * (1 + ball * relative / norm), 0.0)
    return Planted(rows, outputs, x, witness, float(ball))

"""Net-Trim's ADMM as published, plainly in NumPy: the comparator of this benchmark.

    T <- the point nearest to X U^T - A in {ball on the active entries, <= V elsewhere}
    S <- soft(U - B, 1 / rho)
    U <- solution of (X^T X + I) U^T = X^T (T + A) + (S + B)^T, one Cholesky factor for the whole run
    A <- A + T - X U^T,   B <- B + S - U

Source: Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIMODS 2020, and the authors' NumPy code:
X, Y, V and the radius are divided by 0.3 sqrt(max |X^T X|) first; the run stops when a step changes U by less than
5e-9 M P in the Frobenius norm; S is returned, which is sparse but satisfies the constraints only approximately.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve


def published_admm(x, y, active, ceiling, radius, rho=100.0, max_iter=10_000, change=5e-9):
    """The paper's ADMM on inputs x (n, P), outputs y (n, M), float64; returns S (M, P), its multiplier A (n, M), steps.

    active (n, M) bool, ceiling V broadcastable to (n, M), radius of the ball. Stops when
    || U_new - U ||_F < change * M * P, the authors' rule. The multiplier times rho is a dual witness.
    """
    n, width = x.shape
    out = y.shape[1]
    gram = x.T @ x
    scale = 0.3 * np.sqrt(gram.max())
    factor = cho_factor(gram / scale**2 + np.eye(width))
    x, y, ceiling, radius = x / scale, y / scale, ceiling / scale, radius / scale
    u, b = np.zeros((width, out)), np.zeros((width, out))
    a, produced = np.zeros((n, out)), np.zeros((n, out))
    for step in range(1, max_iter + 1):  # noqa: B007
        t = produced - a
        error = np.where(active, t - y, 0)
        shrink = radius / max(np.linalg.norm(error), radius, 1e-300)
        t = np.where(active, y + shrink * error, np.minimum(t, ceiling))
        s = u - b
        s = np.sign(s) * np.maximum(np.abs(s) - 1 / rho, 0)
        before = u
        u = cho_solve(factor, x.T @ (t + a) + s + b)
        produced = x @ u
        a += t - produced
        b += s - u
        if np.linalg.norm(u - before) < change * u.size:
            break
    return s.T, rho * a / scale, step

"""Net-Trim: the sparsest layer, in L1, whose outputs stay within a ball of the dense layer's.

    minimise ||x||_1   subject to   || (X x^T - Y)_active ||_F <= radius      one ball for the whole layer
                                    (X x^T)_pm <= V_pm  where inactive

Y = relu(dense pre-activations); active = {Y > 0}. A layer without ReLU has only the ball, over all entries.
Source: Aghasi, Abdi, Nguyen, Romberg, NIPS 2017, eq. (5) and (8); Aghasi, Abdi, Romberg, SIMODS 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import BallProblem
from convexprune.layer import Layer
from convexprune.moments import affine
from convexprune.problem import Formulation
from convexprune.problems.sample_rows import SampleRows
from convexprune.rounding import (
    TINY,
    down,
    gamma,
    lowered,
    norm_above,
    raised,
    total,
    total_doubt,
    up,
)

SAME = 1e-6  # a relative drift below it is the rounding of a model in float32: the inputs are the dense network's
VAGUE = 1e-8  # a rounding error of |X^T z| <= 1 beyond it is worth a look at what it could cost
ENOUGH = 8  # active samples for each input, from which a limit of a neuron's weights is computed


class Left(NamedTuple):
    """What a point leaves of the constraints, all rounded up.

    errors  (M,): || X x_m - Y_m || where active
    excess  the largest of X x^T - V where inactive
    leaks   (M,): || relu(X x_m) || where inactive
    """

    errors: Tensor
    excess: float
    leaks: Tensor


@dataclass(frozen=True, eq=False)
class NetTrim(BallProblem):
    """The parallel Net-Trim problem of a layer; `NetTrim.cascade` states the cascade problem.

    Args:
        layer: A layer that was captured with its inputs.
        epsilon: The ball's radius relative to the outputs: radius = epsilon ||Y||_F.
        slack: V, the ceiling where the dense layer is inactive: None (zero), a number, or an array (samples, out).

    Raises:
        ValueError: For a negative or non-finite epsilon, a slack of the wrong shape, and a layer without samples.

    Source:
        Aghasi, Abdi, Nguyen, Romberg, NIPS 2017, eq. (5); Aghasi, Abdi, Romberg, SIMODS 2020.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> problem = cp.NetTrim(layer, epsilon=0.1)
        >>> problem.violation(problem.dense), problem.value(problem.dense)
        (0.0, 15.0)
    """

    needs_samples: ClassVar[bool] = True  # whether it reads Layer.inputs

    layer: Layer
    epsilon: float
    slack: Tensor | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, Real) or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon!r}; it must be a finite number >= 0, such as 0.05")
        self.layer.affine_inputs  # noqa: B018   a layer without samples says so now, not in the solver
        if isinstance(self.slack, Tensor):
            expected = (self.layer.samples, len(self.layer.weight))
            if tuple(self.slack.shape) != expected:
                raise ValueError(f"slack has shape {tuple(self.slack.shape)}, expected {expected}, or give a number")
        if self.slack is not None and not bool(torch.isfinite(torch.as_tensor(self.slack)).all()):
            raise ValueError("slack holds NaN or inf; give finite numbers, or None for zero")

    @classmethod
    def cascade(cls, layer: Layer, epsilon: float, gamma: float = 1.1, risk: float = 1.0) -> NetTrim:
        """The cascade problem: radius = risk sqrt(gamma) || (X W^T - Y)_active ||_F and V = X W^T, both rounded up.

        With gamma >= 1 and risk = 1 the dense W is feasible; risk < 1 may leave no feasible point, and the solver then
        says so. A layer whose inputs are the dense network's (the first) has no error to hold on to and gets the
        parallel problem of `epsilon`.
        """
        if not 1 <= gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; it must be a finite number >= 1, such as 1.1")
        if not 0 < risk <= 1:
            raise ValueError(f"risk is {risk}; it must be in (0, 1]")
        parallel = cls(layer, epsilon)
        drift, ceiling = parallel._dense_now()
        if drift < SAME:
            return parallel
        return cls(layer, up(up(risk * math.sqrt(gamma)) * drift), ceiling if layer.activation == "relu" else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P)."""
        return tuple(self.dense.shape)  # type: ignore[return-value]

    @property
    def dense(self) -> Tensor:
        """(M, P): the dense layer's weights, the bias as the last column."""
        return self.layer.affine_weight

    @cached_property
    def inputs(self) -> Tensor:
        """X (n, P), in the dtype it was captured in."""
        return self.layer.affine_inputs

    @cached_property
    def outputs(self) -> Tensor:
        """Y (n, M), float64: what follows the dense layer's activation."""
        y = self.layer.targets_or_dense
        if self.layer.activation != "relu":
            return y
        if self._own is not None:
            self._rows.settle(y, self.dense, self._own)
        return y.clamp(min=0)

    @cached_property
    def active(self) -> Tensor:
        """(n, M) bool: the entries that the ball covers."""
        return self.outputs > 0 if self.layer.activation == "relu" else torch.ones_like(self.outputs, dtype=torch.bool)

    @cached_property
    def ceiling(self) -> Tensor:
        """V, float64, broadcastable to (n, M)."""
        if self.slack is None:
            return torch.zeros(1, 1, dtype=torch.float64)
        slack = torch.as_tensor(self.slack, dtype=torch.float64).detach().cpu()
        return slack if slack.ndim == 2 else slack.reshape(1, 1)

    @cached_property
    def scale(self) -> float:
        """||Y||_F: violations are relative to it, as epsilon is."""
        return float(self.outputs.norm())

    @property
    def radius(self) -> float:
        """epsilon ||Y||_F."""
        return self.epsilon * self.scale

    def value(self, x: Tensor) -> float:
        """||x||_1, the bias included, to the nearest; inf for a point that is not finite."""
        return total(x.detach().cpu().double().abs()) if bool(torch.isfinite(x).all()) else math.inf

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        return total_doubt(x.detach().cpu().double().abs())

    def violation(self, x: Tensor) -> float:
        """max of (ball error - radius) / ||Y||_F and of the largest (X x^T - V) where inactive / rms of Y, or 0.

        Rounded up, so 0 only where the point is certainly feasible; inf for a point that is not finite.
        """
        if not bool(torch.isfinite(x).all()):
            return math.inf
        left, scale = self._left(x), self._unit
        error, above = norm_above(left.errors), left.excess * math.sqrt(max(int(self.active.sum()), 1))
        share = error / scale * (1 + gamma(2))
        if error and not bool(x.any()):
            share = 1.0  # the zero point leaves Y itself, whatever the rounding of its norm
        most = max(share - self.epsilon, above / scale if above > 0 else 0.0)
        return up(most, gamma(8) * most) if most > 0 else 0.0

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,) sqrt( |X x_m - Y_m|^2 where active + |relu(X x_m)|^2 where inactive ) = || relu(X x_m) - Y_m ||.

        Rounded up. For a feasible x and V = 0 their norm is at most the radius (Proposition 1 of the paper).
        """
        left = self._left(x)
        return raised(torch.hypot(left.errors, left.leaks))

    def lower_bound(self, witness: Tensor | None) -> float:
        """max over 0 <= s of  sum_m s_m (<z_m, Y> + <z_m, V>)  -  radius || (s Z)_active ||_F,  a weak-duality bound.

        Any Z (n, M) serves: its sign is clipped where inactive, and each neuron's column is scaled by its own s_m so
        that s_m ||X^T z_m||_inf <= 1, rounding errors of that product included. Scaling the neurons one by one
        is tighter than dividing all of Z by the worst of them. inf where Z proves that no point is feasible.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != tuple(self.outputs.shape):
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {tuple(self.outputs.shape)}")
        z = witness.detach().cpu().double()
        if not bool(torch.isfinite(z).all()):
            return 0.0
        z = torch.where(self.active, z, z.clamp(max=0))
        peaks = z.abs().amax(0).clamp(min=TINY)
        z = z / peaks  # any multiple of a column serves: one whose squares are in range
        (gain, norms), (reach, doubt) = self._gains(z), self._rows.reach(z)
        vague = doubt > VAGUE * reach.amax(0)
        self._rows.settle_reach(z, reach, vague)
        limit = lowered(1 / reach.amax(0).clamp(min=TINY))
        bound = _best_scaling(gain, norms, limit, self._radius_above)
        if bool(vague.any()):
            bound = max(bound, self._beyond(gain, norms, limit, torch.where(vague, self._caps, math.inf), reach))
        if not TINY < bound < math.inf:  # below it products vanish, and their allowances with them
            return 0.0
        # a bound above the dense layer's norm: it is not feasible, and perhaps nothing is
        if bound > self.value(self.dense) and self._refuted(gain, norms, reach, peaks / peaks.max()):
            return math.inf
        return bound

    def to_cvxpy(self) -> Formulation:
        """The second-order cone program."""
        with extras():
            import cvxpy as cp

        inputs, outputs, active = self.inputs.double().numpy(), self.outputs.numpy(), self.active.numpy()
        x = cp.Variable(self.shape, name="x")
        produced = inputs @ x.T
        pieces = []
        if active.any():
            residual = (produced - outputs)[active]
            # a ball of radius 0 has no interior, and interior-point methods stall on it
            ball = cp.SOC(cp.Constant(self.radius), residual) if self.radius > 0 else residual == 0
            pieces.append((ball, self.active))
        if not active.all():
            below = produced[~active] <= self.ceiling.expand_as(self.outputs).numpy()[~active]
            pieces.append((below, ~self.active))
        problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(x))), [constraint for constraint, _ in pieces])

        def witness() -> Tensor | None:
            z = torch.zeros_like(self.outputs)
            for constraint, entries in pieces:
                dual = constraint.dual_variables[-1].value
                if dual is None:
                    return None
                z[entries] = torch.from_numpy(dual).flatten() * (1 if isinstance(constraint, cp.SOC) else -1)
            return z

        return Formulation(problem, x, witness)

    @cached_property
    def _rows(self) -> SampleRows:
        return SampleRows(self.inputs)

    @cached_property
    def _own(self) -> Tensor | None:
        """(M,): the blur of Y where it is computed from the dense weights; None where targets are given, and exact."""
        return None if self.layer.targets is not None else self._rows.blur(self.dense)

    @cached_property
    def _scale_doubt(self) -> float:
        """By how much ||Y||_F may be off."""
        if self._own is None or not bool(self.active.any()):
            return gamma(self.outputs.numel() + 4) * self.scale
        own = norm_above(self._rows.heights) * norm_above(self._own)
        return up(own, gamma(self.outputs.numel() + 4) * self.scale) if own else 0.0

    @cached_property
    def _unit(self) -> float:
        """At most ||Y||_F, but 1 where that is certainly 0; where it may be, the least number: all is beyond it."""
        if not self.scale and not self._scale_doubt:
            return 1.0
        return max(down(self.scale, self._scale_doubt), TINY)

    @cached_property
    def _radius_above(self) -> float:
        """At least the radius."""
        whole = self.scale + self._scale_doubt
        return up(self.epsilon * up(whole)) if self.epsilon and whole else 0.0

    def _left(self, x: Tensor) -> Left:
        weight, rows = x.detach().cpu().double(), self._rows
        error, leak = torch.zeros(2, len(weight), dtype=torch.float64)
        blur, excess = rows.blur(weight), -math.inf
        # a neuron that is as it was has no error, and nothing above 0 where inactive
        same = (weight == self.dense).all(1) & (self._own is not None)
        for part, inputs in rows.blocks():
            produced, active = inputs @ weight.T, self.active[part]
            error += torch.where(active, produced - self.outputs[part], 0).square().sum(0)
            produced = produced.masked_fill_(active, -math.inf)
            leak += produced.clamp(min=0).square().sum(0)
            ceiling = self.ceiling if len(self.ceiling) == 1 else self.ceiling[part]
            excess = max(excess, self._excess(part, inputs, weight, (produced, ceiling), blur, same))
        few, height = 1 + gamma(len(self.inputs) + 8), norm_above(rows.heights)
        errors = few * error.sqrt() + raised(height * (blur if self._own is None else blur + self._own))
        leaks = few * leak.sqrt() + raised(height * blur)
        return Left(torch.where(same | ~self.active.any(0), 0.0, errors), excess, torch.where(same, 0.0, leaks))

    def _excess(
        self, part: slice, inputs: Tensor, weight: Tensor, sides: tuple[Tensor, Tensor], blur: Tensor, same: Tensor
    ) -> float:
        """At least the largest of X x^T - V in a block, which is -inf where active."""
        produced, ceiling = sides
        over = produced - ceiling
        held = same & (ceiling >= 0)
        most = torch.where(held, over.clamp(max=0), torch.addr(over, self._rows.heights[part], blur))
        if float(most.max()) > 0 >= float(over.max()):  # in doubt: worth the doubts of each entry
            most = torch.where(held, over.clamp(max=0), over + self._rows.sure(inputs, weight))
        return float(most.max())

    def _dense_now(self) -> tuple[float, Tensor]:
        """The dense layer's relative error on these inputs, and what it makes of them (n, M), rounded up."""
        error = norm_above(self._left(self.dense).errors)
        now = affine(self.inputs, self.dense)
        return up(error / self._unit), now.addr_(self._rows.heights, 4 * self._rows.blur(self.dense))

    def _gains(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(M,), (M,): at most <z_m, Y> + <z_m, V>, and at least |z_m| where active."""
        terms = torch.where(self.active, z * self.outputs, z * self.ceiling)
        few = gamma(len(z) + 4)
        doubt = few * terms.abs().sum(0)
        inside = torch.where(self.active, z, 0)
        if self._own is not None:
            doubt = doubt + (self._rows.heights @ inside.abs()) * self._own
        return terms.sum(0) - raised(doubt, len(z) + 4), raised(inside.square().sum(0).sqrt(), len(z) + 4)

    def _beyond(self, gain: Tensor, norms: Tensor, limit: Tensor, caps: Tensor, reach: Tensor) -> float:
        """The bound with larger s, where |X^T z| passes 1: what passes it costs as much as a feasible weight can be.

        caps, reach (P, M); for each neuron s grows until the columns passed cost as much as it gains.
        """
        sizes = limit * norms
        share = self._radius_above * norms * sizes / sizes.norm().clamp(min=TINY)
        steps, order = reach.sort(0, descending=True)
        dear = (steps * caps.gather(0, order)).nan_to_num(nan=0.0, posinf=math.inf).cumsum(0) >= gain - share
        passed = (~dear).sum(0).clamp(max=len(reach) - 1)
        limit = lowered(1 / steps.gather(0, passed[None])[0].clamp(min=TINY))
        over = (raised(limit * reach) - 1).clamp(min=0)
        paid = torch.where((over > 0) & (caps < math.inf), over * caps, 0.0)
        return down(_best_scaling(gain, norms, limit, self._radius_above), float(raised(paid.sum(), paid.numel() + 4)))

    @cached_property
    def _caps(self) -> Tensor:
        """(P, M): at least |u_mp| for every feasible u."""
        return raised(self._norm_limits / self._rows.columns[:, None])

    def _refuted(self, gain: Tensor, norms: Tensor, reach: Tensor, sizes: Tensor) -> bool:
        """Whether gain - radius |Z_active| exceeds what any feasible point makes of it, in one neuron or, with each at
        its size (M,), in all together.

        A feasible u_m has |X_A u_m| <= |Y_m| + radius over any active samples A, so |c u_m| <= (|Y_m| + radius) / s,
        s the smallest singular value of X_A / c, and <z, X u> = <X^T z, u> <= |X^T z / c| |c u_m|.
        """
        spread = raised((reach / self._rows.columns[:, None]).square().sum(0).sqrt(), len(reach) + 8)
        used = raised(spread * self._norm_limits).nan_to_num(nan=0.0, posinf=math.inf)
        paid = raised(self._radius_above * norms)
        if bool((gain > raised(used + paid)).any()):
            return True
        won, gone = gain * sizes, raised(used * sizes).nan_to_num(nan=0.0, posinf=math.inf)
        most = up(self._radius_above * norm_above(norms * sizes), float(raised(gone.sum(), len(gone))))
        return down(total(won), total_doubt(won) + gamma(4) * float(won.abs().sum())) > up(most, gamma(8) * most)

    @cached_property
    def _norm_limits(self) -> Tensor:
        """(M,): at least |c u_m| for every feasible u; inf where the active samples do not hold it."""
        width = self.shape[1]
        limits = raised(self.outputs.square().sum(0).sqrt(), len(self.outputs) + 8) + self._radius_above
        if self._own is not None:
            limits = limits + norm_above(self._rows.heights) * self._own
        gains: dict[bytes, float] = {}  # neurons that are active alike share one
        for neuron, active in enumerate(self.active.T):
            rows = active.nonzero()[:, 0]
            rows = rows[:: max(1, len(rows) // (ENOUGH * width))]
            key = rows.numpy().tobytes()
            gain = gains[key] = gains[key] if key in gains else self._rows.least_gain(rows)
            limits[neuron] = float(raised(limits[neuron] / gain)) if gain > 0 else math.inf
        return limits


def _best_scaling(gain: Tensor, norms: Tensor, limit: Tensor, radius: float, steps: int = 20) -> float:
    """max over 0 <= s <= limit of <s, gain> - radius sqrt(<s^2, norms^2>), by a fixed point; every iterate is valid."""
    scale = torch.where(gain > 0, limit, 0)
    best, few = 0.0, gamma(len(gain) + 8)
    for _ in range(steps):
        sizes = scale * norms
        most = float(sizes.max()) if len(sizes) else 0.0
        norm = most * float((sizes / max(most, TINY)).norm())
        won, paid = float((scale * gain).sum()), radius * norm
        best = max(best, down(won - paid, few * (float((scale * gain).abs().sum()) + paid)))
        if radius == 0 or norm == 0:
            break
        wanted = gain / norms.clamp(min=TINY) * (norm / radius) / norms.clamp(min=TINY)
        scale = torch.minimum(wanted.clamp(min=0), limit)
    return best

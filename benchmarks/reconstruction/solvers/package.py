import torch
from benchopt import BaseSolver

import convexprune as cp


class Solver(BaseSolver):
    """Every solver of the package that takes any pattern of single weights."""

    name = "convexprune"
    parameters = {
        "solver": [
            "Magnitude", "ActivationMagnitude", "LayerwiseOBS", "ColumnSweep", "RisingPenalty", "ExactOBS",
            "Fast", "Balanced", "Best",
        ],
        "device": ["cpu"],
    }  # fmt: skip

    def skip(self, problem):
        return self.device == "cuda" and not torch.cuda.is_available(), "no GPU"

    def set_objective(self, problem):
        kind = getattr(cp, self.solver)
        self.problem = problem
        self.solve = (kind(device=self.device) if "device" in kind.__dataclass_fields__ else kind()).solve

    def warm_up(self):
        self.run_once()

    def run(self, _):
        self.attempt = self.solve(self.problem)

    def get_result(self):
        return {"x": self.attempt.x, "witness": self.attempt.witness}

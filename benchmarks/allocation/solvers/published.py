import numpy as np
import torch
from benchmark_utils.published import published
from benchopt import BaseSolver

LARGEST = 2e8  # numbers in the table: beyond, gigabytes


class Solver(BaseSolver):
    """The published dynamic program: a column for every weight."""

    name = "published"

    def skip(self, problem):
        return len(problem.curves) * problem.budget > LARGEST, "a table of gigabytes"

    def set_objective(self, problem):
        self.problem = problem
        self.costs = [curve.costs.numpy().astype(np.int64).tolist() for curve in problem.curves]
        self.losses = [curve.distortion.tolist() for curve in problem.curves]

    def run(self, _):
        self.levels = published(self.costs, self.losses, int(self.problem.budget))

    def get_result(self):
        return {"x": torch.tensor(self.levels, dtype=torch.float64)[:, None], "witness": None}

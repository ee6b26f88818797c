import torch
from benchopt import BaseSolver

from convexprune import ADMM


class Solver(BaseSolver):
    """convexprune.ADMM: all neurons at once in torch, with a Newton-type finish."""

    name = "ADMM"
    parameters = {"device": ["cpu", "cuda"], "eps_rel": [1e-5]}

    def skip(self, problem):
        return self.device == "cuda" and not torch.cuda.is_available(), "no GPU"

    def set_objective(self, problem):
        self.problem = problem
        self.solver = ADMM(eps_rel=self.eps_rel, device=self.device)

    def warm_up(self):
        self.run_once()  # torch starts its threads, or the GPU's libraries, at the first call

    def run(self, _):
        self.attempt = self.solver.solve(self.problem)

    def get_result(self):
        return {"x": self.attempt.x.cpu().double(), "witness": self.attempt.witness}

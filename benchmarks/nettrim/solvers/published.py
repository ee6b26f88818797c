import torch
from benchmark_utils.published import published_admm
from benchopt import BaseSolver


class Solver(BaseSolver):
    """The ADMM of Aghasi, Abdi, Romberg (2020) as published, in NumPy, run to its own stopping rule."""

    name = "published"
    parameters = {"rho": [100.0]}

    def set_objective(self, problem):
        arrays = (problem.inputs.double(), problem.outputs, problem.active, problem.ceiling)
        self.arguments = (*(a.numpy() for a in arrays), problem.radius)

    def run(self, _):
        self.x, self.witness, _ = published_admm(*self.arguments, rho=self.rho)

    def get_result(self):
        return {"x": torch.from_numpy(self.x.copy()), "witness": torch.from_numpy(self.witness)}

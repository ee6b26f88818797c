from benchopt import BaseSolver

from convexprune import CVXPY

LARGEST = 2e7  # numbers in CVXPY's constraint matrix: beyond, compiling and factoring take minutes and gigabytes


class Solver(BaseSolver):
    """The general solvers behind CVXPY, at their default accuracy; compiling the problem is part of the time."""

    name = "CVXPY"
    parameters = {"solver": ["CLARABEL", "SCS", "MOREAU"]}
    requirements = ["cvxpy"]

    def skip(self, problem):
        if problem.outputs.numel() * problem.shape[1] > LARGEST:
            return True, "too large for a general solver"
        try:
            CVXPY(self.solver)
        except ValueError as error:
            return True, str(error)
        return False, None

    def set_objective(self, problem):
        self.problem = problem
        self.bridge = CVXPY(self.solver)

    def run(self, _):
        self.attempt = self.bridge.solve(self.problem)

    def get_result(self):
        return {"x": self.attempt.x, "witness": self.attempt.witness}

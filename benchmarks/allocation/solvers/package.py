from benchopt import BaseSolver

import convexprune as cp


class Solver(BaseSolver):
    """The package's solvers, and HiGHS through CVXPY to a gap of 0; stating the problem is not part of the time."""

    name = "convexprune"
    parameters = {"solver": ["LagrangianPrice", "MinimalCore", "DynamicProgramming", "HIGHS"]}

    def set_objective(self, problem):
        self.problem = problem
        self.solver_ = (
            cp.CVXPY("HIGHS", mip_rel_gap=0, mip_abs_gap=0, time_limit=300) if self.solver == "HIGHS"
            else getattr(cp, self.solver)()
        )  # fmt: skip

    def warm_up(self):
        if self.solver != "HIGHS":
            self.run_once()

    def run(self, _):
        self.attempt = self.solver_.solve(self.problem)

    def get_result(self):
        return {"x": self.attempt.x, "witness": self.attempt.witness}

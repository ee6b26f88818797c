from benchopt import BaseObjective

from convexprune.problem import judge


class Objective(BaseObjective):
    """Least squares under a sparsity pattern, judged by the problem: relative error, bound, exact counts."""

    name = "Reconstruction"
    min_benchopt_version = "1.9"
    sampling_strategy = "run_once"
    requirements = ["pip::convexprune"]

    def set_data(self, problem):
        self.problem = problem

    def get_objective(self):
        return {"problem": self.problem}

    def evaluate_result(self, x, witness):
        certificate, energy = judge(self.problem, x, witness), self.problem.layer.energy
        return {
            "value": certificate.value / energy,
            "bound": certificate.bound / energy,
            "violation": certificate.violation,
            "kept": float((x != 0).float().mean()),
        }

    def get_one_result(self):
        return {"x": self.problem.dense, "witness": None}

from benchopt import BaseObjective

from convexprune.problem import judge


class Objective(BaseObjective):
    """Sparsity allocation, judged by the problem: summed distortion, its lower bound, what exceeds the budget."""

    name = "Sparsity allocation"
    min_benchopt_version = "1.9"
    sampling_strategy = "run_once"
    requirements = ["pip::convexprune"]

    def set_data(self, problem):
        self.problem = problem

    def get_objective(self):
        return {"problem": self.problem}

    def evaluate_result(self, x, witness):
        certificate = judge(self.problem, x, witness)
        return {"value": certificate.value, "bound": certificate.bound, "violation": certificate.violation}

    def get_one_result(self):
        return {"x": self.problem.dense, "witness": None}

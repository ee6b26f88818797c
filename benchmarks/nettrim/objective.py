from benchopt import BaseObjective

from convexprune.problem import judge


class Objective(BaseObjective):
    """Net-Trim, judged by the problem itself: value, certified gap and violation of whatever point is returned."""

    name = "Net-Trim"
    min_benchopt_version = "1.9"
    sampling_strategy = "run_once"
    requirements = ["pip::convexprune"]

    def set_data(self, problem, optimum=None):
        self.problem, self.optimum = problem, optimum

    def get_objective(self):
        return {"problem": self.problem}

    def evaluate_result(self, x, witness):
        certificate = judge(self.problem, x, witness)
        known = {} if self.optimum is None else {"distance": abs(certificate.value / self.optimum - 1)}
        return {
            "value": certificate.value,
            "bound": certificate.bound,
            "relative_gap": certificate.relative_gap,
            "violation": certificate.violation,
            "kept": float((x != 0).float().mean()),
            **known,
        }

    def get_one_result(self):
        return {"x": self.problem.dense, "witness": None}

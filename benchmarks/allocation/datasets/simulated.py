from benchmark_utils.curves import simulated
from benchopt import BaseDataset

from convexprune import SparsityAllocation


class Dataset(BaseDataset):
    """Simulated curves; the budget is a tenth of the weights."""

    name = "simulated"
    parameters = {
        "layers, levels, weights": [(20, 30, 1e6), (200, 100, 250e6), (1000, 200, 7e10)],
        "seed": [0, 1],
    }

    def get_data(self):
        curves = simulated(self.layers, self.levels, self.weights, self.seed)
        return {"problem": SparsityAllocation(curves, round(0.1 * sum(curve.total for curve in curves)))}

from benchmark_utils.simulated import simulated
from benchopt import BaseDataset

from convexprune import Reconstruction, Unstructured


class Dataset(BaseDataset):
    """Random layers with a realistic spectrum."""

    name = "simulated"
    parameters = {"inputs, outputs": [(256, 256), (512, 512)], "keep": [0.5, 0.1], "seed": [0]}

    def get_data(self):
        return {"problem": Reconstruction(simulated(self.inputs, self.outputs, self.seed), Unstructured(self.keep))}

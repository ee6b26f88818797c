import torch
from benchmark_utils.planted import planted
from benchopt import BaseDataset

from convexprune import Layer, NetTrim


class Dataset(BaseDataset):
    """Planted instances: the optimum is known by construction, see benchmark_utils/planted.py."""

    name = "simulated"
    parameters = {"samples, inputs, neurons": [(1000, 100, 20)], "kept": [0.2], "seed": [0]}
    test_parameters = {"samples, inputs, neurons": [(100, 10, 4)]}

    def get_data(self):
        instance = planted(self.samples, self.inputs, self.neurons, self.kept, seed=self.seed)
        x, inputs, outputs = (torch.from_numpy(a) for a in (instance.x, instance.inputs, instance.outputs))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed), dtype=x.dtype)
        layer = Layer.from_samples(x + 0.1 * noise, inputs, targets=outputs)
        return {"problem": NetTrim(layer, instance.epsilon), "optimum": instance.value}

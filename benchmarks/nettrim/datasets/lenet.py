import os

from benchmark_utils.lenet import data_folder, fc2_layer
from benchopt import BaseDataset

from convexprune import NetTrim


class Dataset(BaseDataset):
    """fc2 of the trained LeNet-300-100 on MNIST, from the folder that CONVEXPRUNE_DATA names."""

    name = "lenet"
    parameters = {"images, neurons": [(1000, 10), (4000, 100)], "epsilon": [0.05]}

    def get_data(self):
        layer = fc2_layer(data_folder(), self.images, self.neurons)
        return {"problem": NetTrim(layer, self.epsilon)}

    @classmethod
    def is_installed(cls, *arguments, **options):
        """Without its data the dataset is left out of a run, as one whose packages are missing is."""
        return bool(os.environ.get("CONVEXPRUNE_DATA")) and super().is_installed(*arguments, **options)

import os
import pathlib

import numpy as np
import torch
from benchopt import BaseDataset

from convexprune import NM, Layer, Reconstruction, Unstructured


class Dataset(BaseDataset):
    """Captured layers, `layers/*.npz` with `weight` and `gram`, in the folder that CONVEXPRUNE_DATA names."""

    name = "layers"
    parameters = {
        "layer": ["lenet_fc1", "lenet_fc2", "minilm_L2.attention.self.query", "resnet20_layer2.1.conv1"],
        "sparsity": [0.5, 0.7, 0.9, "2:4"],
    }

    def get_data(self):
        path = pathlib.Path(os.environ["CONVEXPRUNE_DATA"]) / "layers" / f"{self.layer}.npz"
        with np.load(path) as arrays:
            layer = Layer.from_moments(torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["gram"]))
        pattern = NM(2, 4) if self.sparsity == "2:4" else Unstructured(1 - self.sparsity)
        return {"problem": Reconstruction(layer, pattern)}

    @classmethod
    def is_installed(cls, *arguments, **options):
        """Without its data the dataset is left out of a run, as one whose packages are missing is."""
        return bool(os.environ.get("CONVEXPRUNE_DATA")) and super().is_installed(*arguments, **options)

import os
import pathlib

import torch
from benchopt import BaseDataset

import convexprune as cp


class Dataset(BaseDataset):
    """The curves of ResNet-20 or -32, of their 3x3 convolutions, in the folder that CONVEXPRUNE_DATA names."""

    name = "resnet"
    parameters = {"depth": [20, 32], "keep": [0.2, 0.1, 0.05], "images": [128]}

    def get_data(self):
        import sys

        here = pathlib.Path(__file__).parent
        sys.path.insert(0, str(here.parents[1] / "nettrim"))
        from benchmark_utils import resnet

        folder = pathlib.Path(os.environ["CONVEXPRUNE_DATA"])
        model = resnet.resnet(folder, self.depth)
        x, _ = resnet.cifar10(folder, "train", self.images)
        curves = cp.rate_distortion(model, list(torch.split(x, 128)), "*conv*", damping=1e-4)
        return {"problem": cp.SparsityAllocation(curves, round(self.keep * sum(curve.total for curve in curves)))}

    @classmethod
    def is_installed(cls, *arguments, **options):
        """Without its data the dataset is left out of a run, as one whose packages are missing is."""
        return bool(os.environ.get("CONVEXPRUNE_DATA")) and super().is_installed(*arguments, **options)

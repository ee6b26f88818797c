import torch
from benchopt import BaseDataset

from convexprune import NetTrim, capture
from convexprune.datasets import digits, lenet300, train


class Dataset(BaseDataset):
    """A layer of a 64-300-100-10 network trained on the bundled digits in a few seconds."""

    name = "digits"
    parameters = {"layer": ["fc2"], "samples": [1000], "epsilon": [0.05], "epochs": [20]}

    def get_data(self):
        images = digits()
        torch.manual_seed(0)
        model = train(lenet300(images.x_train.shape[1]), images.x_train, images.y_train, epochs=self.epochs)
        (layer,) = capture(model, [images.x_train[: self.samples]], names=self.layer, keep_inputs=True)
        return {"problem": NetTrim(layer, self.epsilon)}

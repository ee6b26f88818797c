import os
import pathlib
import sys

from benchopt import BaseDataset

import convexprune as cp


class Dataset(BaseDataset):
    """The curves of a sentence encoder's 36 Linear layers, by their own errors.

    CONVEXPRUNE_DATA names the folder with the text, CONVEXPRUNE_MINILM that of the model.
    """

    name = "minilm"
    parameters = {"keep": [0.5, 0.3], "paragraphs": [64]}

    def get_data(self):
        sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "reconstruction"))
        sys.modules.pop("benchmark_utils", None)
        from benchmark_utils import minilm

        encoder = minilm.Encoder(os.environ["CONVEXPRUNE_MINILM"])
        text = pathlib.Path(os.environ["CONVEXPRUNE_DATA"]) / "wikitext2_valid.txt"
        batches = encoder.batches(minilm.paragraphs(text, self.paragraphs, 0)[0])
        names = [name for name in encoder.linears() if name.startswith("encoder.")]
        curves = cp.rate_distortion(
            encoder.model, cp.Calibration(batches, names, minilm.token_mask),
            levels=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), damping=1e-3,
            measure=cp.LayerError(), solver=cp.Fast(),
        )  # fmt: skip
        return {"problem": cp.SparsityAllocation(curves, round(self.keep * sum(curve.total for curve in curves)))}

    @classmethod
    def is_installed(cls, *arguments, **options):
        """Without its data the dataset is left out of a run, as one whose packages are missing is."""
        there = os.environ.get("CONVEXPRUNE_DATA") and os.environ.get("CONVEXPRUNE_MINILM")
        return bool(there) and super().is_installed(*arguments, **options)

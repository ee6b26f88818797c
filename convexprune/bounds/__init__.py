"""The papers' theorems as objects that check their hypotheses and compute both sides, guaranteed and measured."""

from convexprune.bounds.additivity import Additivity
from convexprune.bounds.chain import ChainBound, cascade_bound, parallel_bound, slack_product_bound
from convexprune.bounds.confidence import cannot_flip, clopper_pearson, empirical_bernstein
from convexprune.bounds.difference import (
    DifferenceBounds,
    Exact,
    IntervalPropagation,
    LinearRelaxation,
    cannot_change,
    difference_bounds,
    sampled_difference,
)
from convexprune.bounds.input_sets import Ball, Box
from convexprune.bounds.mean_loss import Betting, Binomial, Hoeffding, HoeffdingBentkus, MeanBound, ShorterOf
from convexprune.bounds.merging_lemma import lemma_1
from convexprune.bounds.net_trim_theorems import (
    LinkNormalised,
    Uniqueness,
    proposition_1,
    proposition_2,
    sample_count,
    theorem_1,
    theorem_2,
)
from convexprune.bounds.obs_theorems import lemma_3_1, removal, theorem_3_2
from convexprune.bounds.relaxation import ChainPair
from convexprune.bounds.statement import Hypothesis, Statement

__all__ = [
    "Additivity",
    "Ball",
    "Betting",
    "Binomial",
    "Box",
    "ChainBound",
    "ChainPair",
    "DifferenceBounds",
    "Exact",
    "Hoeffding",
    "HoeffdingBentkus",
    "Hypothesis",
    "IntervalPropagation",
    "LinearRelaxation",
    "LinkNormalised",
    "MeanBound",
    "ShorterOf",
    "Statement",
    "Uniqueness",
    "cannot_change",
    "cannot_flip",
    "cascade_bound",
    "clopper_pearson",
    "difference_bounds",
    "empirical_bernstein",
    "lemma_1",
    "lemma_3_1",
    "parallel_bound",
    "proposition_1",
    "proposition_2",
    "removal",
    "sample_count",
    "sampled_difference",
    "slack_product_bound",
    "theorem_1",
    "theorem_2",
    "theorem_3_2",
]

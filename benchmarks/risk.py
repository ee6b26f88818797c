"""A risk on data not seen: how far three methods prune within it, how often a certificate is false, what a path costs.

python benchmarks/risk.py --part lenet --data DIR     LeNet-300-100 at 1, 2 and 5 % of predictions changed
python benchmarks/risk.py --part resnet               ResNet-20
python benchmarks/risk.py --part stories              the language model of stories260k (needs transformers)
python benchmarks/risk.py --part coverage             false certificates over 2,000 repetitions
python benchmarks/risk.py --part power                what the bounds cost beside an oracle that knows the risks
python benchmarks/risk.py --part cost                 ten levels beside one prune

--small takes a minute for each part. DIR holds the data files, default $CONVEXPRUNE_DATA.
"""

import argparse
import dataclasses
import math
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.bounds import Betting, Binomial, Hoeffding, HoeffdingBentkus, ShorterOf
from convexprune.datasets import mnist, trained_lenet300

BUDGETS = (0.5, 0.4, 0.3, 0.22, 0.16, 0.12, 0.09, 0.07, 0.05, 0.035)
EPSILONS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2)
WANTED = (0.01, 0.02, 0.05)
CAREFUL = (  # for networks without much to spare
    0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4,
)  # fmt: skip
FINE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0)  # levels of curves for these
BOUNDS = {
    "betting": Betting(),
    "Hoeffding-Bentkus": HoeffdingBentkus(),
    "shorter of both": ShorterOf(Betting(), HoeffdingBentkus()),
    "Hoeffding": Hoeffding(),
}


@dataclasses.dataclass
class Remembered:
    """A solver that solves each problem of a layer once: the three searches go along the same path."""

    inner: object
    known: dict = dataclasses.field(default_factory=dict, repr=False)
    starts = False

    @property
    def takes(self):
        return self.inner.takes

    def solve(self, problem, start=None):
        what = problem.epsilon if isinstance(problem, cp.NetTrim) else problem.pattern
        key = problem.layer.name, repr(what)
        if key not in self.known:
            self.known[key] = self.inner.solve(problem)
        return self.known[key]


@dataclasses.dataclass
class Experiment:
    model: torch.nn.Module
    calibration: list
    few: list  # of the calibration samples: for Net-Trim, whose problems hold every sample
    held_out: list
    rest: list
    names: str | None = None
    output: str | None = None
    risk: object = dataclasses.field(default_factory=cp.PredictionChanged)
    budgets: tuple = BUDGETS
    levels: tuple = cp.Allocation(0.5).levels  # of the curves

    def risk_on_rest(self, pruned):
        losses = []
        with torch.no_grad():
            for batch in self.rest:
                outputs = (
                    network(**batch).logits if self.output else network(batch) for network in (self.model, pruned)
                )
                losses.append(self.risk.losses(*outputs, batch))
        every = torch.cat(losses)
        return float(every.mean()), float(every.std() / len(every) ** 0.5)


def share(layer, kept):
    return cp.Reconstruction(layer, cp.Unstructured(kept))


def methods(experiment, small):
    """name -> what prune_within takes besides the goal, and the goal's path and allocation."""
    levels = experiment.levels
    fast = cp.Allocation(0.5, cp.LayerError(), levels, inner=cp.Magnitude(), solver=cp.GlobalMagnitude())
    curves = cp.Allocation(0.5, cp.SecondOrder(), levels, inner=cp.Fast())
    batches, path = experiment.calibration, experiment.budgets
    return {
        "Balanced + allocation": ((batches, None, Remembered(cp.Balanced())), path, curves),
        "Balanced, one share": ((batches, share, Remembered(cp.Balanced())), path, None),
        "magnitude": ((batches, None, Remembered(cp.Magnitude())), path, fast),
        "Net-Trim": (
            (experiment.few, cp.NetTrim, Remembered(cp.ADMM(eps_rel=1e-2))), EPSILONS[::2] if small else EPSILONS, None
        ),
    }  # fmt: skip


def searched(experiment, options):
    samples = sum(len(next(iter(b.values())) if isinstance(b, dict) else b) for b in experiment.held_out)
    print(f"{experiment.risk.name}, {samples} held-out samples, confidence 99%", flush=True)
    rows = []
    for name, ((batches, build, solver), path, allocation) in methods(experiment, options.small).items():
        if options.methods and name not in options.methods:
            continue
        if allocation is not None:
            allocation = allocation.measured(experiment.model, cp.Calibration(batches, names=experiment.names))
        for wanted in WANTED:
            begun = time.perf_counter()
            goal = cp.RiskGoal(
                experiment.risk, wanted, experiment.held_out, path, allocation=allocation, output=experiment.output
            )
            try:
                pruned, report = cp.prune_within(experiment.model, batches, goal, build, solver, names=experiment.names)
            except ValueError as error:
                rows.append([name, f"{wanted:.0%}", "none", str(error).split(";")[0], "", "", ""])
                print(rows[-1], flush=True)
                continue
            best, (mean, error) = report.path.certified, experiment.risk_on_rest(pruned)
            rows.append([
                name, f"{wanted:.0%}", f"{report.kept_fraction:.1%}", f"{best.measured:.2%}", f"{best.bound:.2%}",
                f"{mean:.2%} ± {error:.2%}", f"{time.perf_counter() - begun:.0f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    head = ["method", "wanted", "kept", "held out", "bound", "on data of neither", "seconds"]
    print(table(head, rows))


def halves(x, count):
    """Two parts of samples in a drawn order, the first of so many: a file may be sorted by difficulty."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [list(x[part].split(1000)) for part in (order[:count], order[count:])]


def lenet(options):
    folder = data_folder(options.data)
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    held_out, rest = halves(data.x_test, 5000)
    count = 2000 if options.small else 10_000
    few = images(folder, 300 if options.small else 1000)
    searched(Experiment(model, [images(folder, count)], [few], held_out, rest), options)


def resnet(options):
    """All test images are held out: 1% needs that many. `rest` are images of the training, which flatter a risk."""
    folder = data_folder(options.data)
    x, _ = cifar10(folder, "train", 5085)
    used, rest = x[: 256 if options.small else 1024], x[1024:3024]
    experiment = Experiment(
        resnet20(folder), list(used.split(64)), list(x[:16].split(16)), list(cifar10(folder, "test")[0].split(200)),
        list(rest.split(200)), "*conv*", budgets=CAREFUL, levels=FINE,
    )  # fmt: skip
    searched(experiment, options)


def stories(options):
    """Windows of a text, one after the other in it: drawn in an order of their own, as the text changes on its way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_folder(options.data)
    model = AutoModelForCausalLM.from_pretrained(folder / "stories260k").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "stories260k")
    tokens = tokenizer((folder / "stories_valid.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 127 * 127]).reshape(-1, 127)
    windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    batches = [{"input_ids": each, "use_cache": False} for each in windows.split(100)]
    parts = (batches[:2], batches[2:9], batches[24:]) if options.small else (batches[:4], batches[4:18], batches[18:])
    for risk in (cp.TokensChanged(), cp.ExcessLogLoss(clip=0.5)):
        experiment = Experiment(model, parts[0], parts[0][:1], *parts[1:], "*proj*", "logits", risk, CAREFUL, FINE)
        searched(experiment, options)


def draws(kind, mean, shape, generator):
    """Losses of this expectation: 0 and 1, a few sizes, many small, and paired differences moved to [0, 1]."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "0/1":
        return (uniform < mean).double()
    if kind == "halves":
        return 0.5 * (uniform < 2 * mean)
    if kind == "rare, uniform":
        rare = torch.rand(shape, generator=generator, dtype=torch.float64) < 2 * mean
        return rare * uniform
    if kind == "small":
        return 2 * mean * uniform
    gained = 0.01  # paired: -1 with this probability, 1 with `mean` more, else 0
    return ((uniform < gained + mean).double() - (uniform > 1 - gained).double() + 1) / 2


def certified(bound, losses, confidence, level):
    """(repetitions,) bool: which rows of losses (repetitions, samples) have a bound below the level.

    Bounds of the mean alone have a largest sum that is certified; a sum is rounded down here, so that too many rows
    count. The wealth of Betting needs to be seen at the level
    only, as it grows with m; on the first rows both ways are compared with the bound itself.
    """
    samples = losses.shape[1]
    if isinstance(bound, Betting):
        x = losses[:, torch.randperm(samples, generator=torch.Generator().manual_seed(bound.seed))]
        bets = torch.stack([bound.bets(row, confidence, level) for row in x]).clamp(max=bound.most / (1 - level))
        found = (bets * (level - x)).log1p_().cumsum(1).amax(1) > -math.log(1 - confidence)
        found &= losses.mean(1) < level  # a bound is not below the mean, even where the wealth was high on the way
    else:
        low, high = -1, samples
        while high - low > 1:  # of the sums, rounded up
            middle = (low + high) // 2
            ones = (torch.arange(samples) < middle).double()
            low, high = (middle, high) if bound.upper_bound(ones, confidence, level) < level else (low, middle)
        found = losses.sum(1).add(1e-9).floor() <= low
    if bool((losses.sum(1) == losses.sum(1).round()).all()) or isinstance(bound, Betting):
        for row, verdict in zip(losses[:5], found[:5], strict=True):
            assert (bound.upper_bound(row, confidence, level) < level) == verdict
    return found


def coverage(options):
    """The rate of certificates at a true risk equal to the wanted one: each of them is false."""
    repetitions, generator = 200 if options.small else 2000, torch.Generator().manual_seed(0)
    confidence, rows = 0.95, []
    names = ("binomial", "betting", "Hoeffding-Bentkus", "Hoeffding")
    for samples in (100, 1000, 10_000):
        for kind in ("0/1", "halves", "rare, uniform", "small", "paired"):
            for mean in (0.01, 0.05, 0.2):
                level = (1 + mean) / 2 if kind == "paired" else mean
                false = dict.fromkeys(names, 0)
                for _ in range(0, repetitions, 200):
                    losses = draws(kind, mean, (200, samples), generator)
                    for name, bound in {"binomial": Binomial(), **BOUNDS}.items():
                        if name in names and (name != "binomial" or kind == "0/1"):
                            false[name] += int(certified(bound, losses, confidence, level).sum())
                rows.append([samples, kind, mean, *(f"{false[name] / repetitions:.2%}" for name in names)])
                if kind != "0/1":
                    rows[-1][3] = "-"
                print(rows[-1], flush=True)
    print(f"stated: at most {1 - confidence:.0%}; of {repetitions} repetitions the binomial error is "
          f"{math.sqrt(confidence * (1 - confidence) / repetitions):.2%}")  # fmt: skip
    print(table(["samples", "losses", "risk", *names], rows))


def power(options):
    """Kept weights where the path ends, on a path whose true risks are those of a measured LeNet path."""
    kept = torch.linspace(0.5, 0.04, 47)
    risks = 0.0007 * torch.exp(9.5 * (0.5 - kept))  # from 0.07% to 5.5%, as Balanced + allocation on LeNet-300-100
    repetitions, rows = 20 if options.small else 100, []
    generator = torch.Generator().manual_seed(0)
    for samples in (500, 1000, 2000, 5000, 10_000):
        for wanted in WANTED:
            oracle = float(kept[int((risks <= wanted).sum()) - 1])
            for kind in ("0/1", "rare, uniform"):
                bounds = {"ours": Binomial() if kind == "0/1" else Betting(), "Hoeffding": Hoeffding()}
                found = {name: [] for name in bounds}
                for _ in range(repetitions):
                    for name, bound in bounds.items():
                        last = 1.0  # nothing is certified: the dense network
                        for share, risk in zip(kept.tolist(), risks.tolist(), strict=True):
                            losses = draws(kind, risk, (samples,), generator)
                            if bound.upper_bound(losses, 0.99, wanted) > wanted:
                                break
                            last = share
                        found[name].append(last)
                lost = {name: sum(each) / len(each) - oracle for name, each in found.items()}
                rows.append([samples, f"{wanted:.0%}", kind, f"{oracle:.1%}", f"{lost['ours']:.1%}",
                             f"{lost['Hoeffding']:.1%}"])  # fmt: skip
                print(rows[-1], flush=True)
    print(table(["samples", "wanted", "losses", "oracle keeps", "ours keeps more by", "Hoeffding by"], rows))


def cost(options):
    folder = data_folder(options.data)
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    held_out, _ = halves(data.x_test, 5000)
    batches = [images(folder, 2000 if options.small else 10_000)]
    rows = []
    curves = cp.Allocation(0.2, measure=cp.SecondOrder())
    solvers = {"Balanced + allocation": (cp.Balanced(), curves), "Fast + allocation": (cp.Fast(), curves),
               "Balanced": (cp.Balanced(), None), "swaps from the last level": (cp.SwapSearch(rounds=1), None),
               "Fast": (cp.Fast(), None), "magnitude": (cp.Magnitude(), None)}  # fmt: skip
    for name, (solver, allocation) in solvers.items():
        if options.methods and name not in options.methods:
            continue
        if allocation is not None:
            allocation = dataclasses.replace(allocation, inner=solver)
        build = None if allocation else share
        begun = time.process_time()
        cp.prune(model, batches, None if allocation else lambda layer, b=build: b(layer, 0.2), solver,
                 allocation=allocation)  # fmt: skip
        one = time.process_time() - begun
        begun = time.process_time()
        goal = cp.RiskGoal(cp.PredictionChanged(), 0.99, held_out, BUDGETS, allocation=allocation)
        cp.prune_within(model, batches, goal, build, solver)
        rows.append([name, f"{one:.1f}", f"{time.process_time() - begun:.1f}"])
        rows[-1].append(f"{float(rows[-1][2]) / one:.1f}")
        print(rows[-1], flush=True)
    print(table(["", "one prune, CPU s", f"{len(BUDGETS)} levels, CPU s", "ratio"], rows))


PARTS = {each.__name__: each for each in (lenet, resnet, stories, coverage, power, cost)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--methods", nargs="+", default=[], help="some of those of the part; default all")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()

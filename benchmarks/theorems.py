"""Every theorem on networks pruned for real: hypotheses, guaranteed side, measured side; then inputs that are broken.

python benchmarks/theorems.py                     LeNet-300-100 and ResNet-20, as statements in a table
python benchmarks/theorems.py --part additivity   ResNet-20: where the sum of the layers' distortions stops being right
"""

import argparse
import math

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20
from torch import nn

import convexprune as cp
from convexprune.bounds import (
    Hypothesis,
    LinkNormalised,
    Statement,
    lemma_1,
    lemma_3_1,
    proposition_1,
    proposition_2,
    removal,
    theorem_1,
    theorem_2,
    theorem_3_2,
)
from convexprune.datasets import trained_lenet300


def parts(model):
    """Weights and biases of a chain's Linear layers, float64."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [m.weight.detach().double() for m in layers], [m.bias.detach().double() for m in layers]


def network_bound(name, report):
    found = report.network
    held = (Hypothesis("every step of the graph is covered", found.guaranteed is not None),)
    return [
        Statement(f"{name}, {rule}", "a-priori bound", held, total, found.measured)
        for rule, total in found.rules.items()
    ]


def net_trim(model, x, options):
    """Proposition 1 layer by layer, Proposition S.1 (Theorems 1 and 2 with a linear last layer) of the whole."""
    weights, biases = parts(model)
    dense, found = LinkNormalised.of(weights, biases), []
    known = {layer.name: layer for layer in cp.capture(model, [x], keep_inputs=True)}
    built = {}

    def parallel(layer):
        built[layer.name] = cp.NetTrim(layer, options.epsilon)
        return built[layer.name]

    thin, report = cp.prune(model, [x], parallel)
    for row, weight, bias in zip(report.rows, *parts(thin), strict=True):
        problem = built[row.name]
        if problem.layer.activation == "relu":
            u = torch.cat([weight, bias[:, None]], 1)
            found.append(proposition_1(problem.inputs, problem.outputs, u, problem.radius * (1 + 1e-6)))
    errors = [built[row.name].radius * (1 + 1e-6) for row in report.rows]
    scales = [math.prod(dense.scales[: index + 1]) for index in range(len(errors))]
    normal = [error / scale for error, scale in zip(errors, scales, strict=True)]
    found.append(theorem_1(dense, dense.like(*parts(thin)), None, x, normal, linear_last=True))
    found += network_bound("Net-Trim, parallel", report)
    broken = theorem_1(LinkNormalised(tuple(weights), tuple(biases), (1.0,) * 3), *parts(thin), x, errors, True)
    gamma = 1.1
    thin, report = cp.prune(model, [x], lambda layer: cp.NetTrim.cascade(layer, options.epsilon, gamma), mode="cascade")
    first = known[report.rows[0].name]
    radius = cp.NetTrim(first, options.epsilon).radius * (1 + 1e-6) / dense.scales[0]
    found.append(
        theorem_2(dense, dense.like(*parts(thin)), None, x, radius, [gamma * (1 + 1e-6)] * 2, linear_last=True)
    )
    found += network_bound("Net-Trim, cascade", report)
    return found, broken


def layerwise_obs(model, x):
    """Lemma 3.1 and Theorem 3.2 at 90% sparsity, and the constant of a single removal."""
    build = lambda layer: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(0.1))  # noqa: E731
    thin, report = cp.prune(model, [x], build)
    found, read = [], x.double()
    for weight, bias, other, shift in zip(*parts(model), *parts(thin), strict=True):
        z, zhat = read @ weight.T + bias, read @ other.T + shift
        found.append(lemma_3_1(z, zhat))
        read = z.relu()
    errors = [row.error**2 / len(x) for row in report.rows]
    measured = report.network.measured / math.sqrt(len(x))
    weights, _ = parts(thin)
    found += [theorem_3_2(errors, weights, measured, norm) for norm in ("frobenius", "spectral")]
    found += network_bound("Reconstruction, parallel", report)
    layer = cp.capture(model, [x], names="fc3")[0].damped(1e-6)
    q = 7
    removed = torch.zeros(layer.weight.shape, dtype=torch.bool)
    removed[:, q] = True
    rise = layer.squared_errors(cp.solve(cp.OptimalBrainSurgeon(layer, removed)).x)
    inverse = torch.linalg.inv(layer.affine_gram)
    theta = layer.affine_weight[0]
    lost = 1e-9 * float(rise[0])  # what an inverse in float64 may miss at this damping
    found.append(removal(theta, inverse, q, float(rise[0]), doubt=lost))
    return found, removal(theta, inverse, q, float(rise[0]), published=True)


def merging(model, x):
    """Lemma 1 of half the neurons of the first hidden layer."""
    (first, second, _), (bias, *_) = parts(model)
    incoming = torch.cat([first, bias[:, None]], 1)
    problem = cp.NeuronMerging(incoming, second, keep=150)
    joined = cp.solve(problem).x
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    return lemma_1(ones, incoming, second, joined, torch.relu)


def uniqueness(model, x):
    """Proposition 2 on neurons of fc2 with 6 weights: must L1 find them from their outputs, and does it?"""
    layer = cp.capture(model, [x[:200]], names="fc2", keep_inputs=True)[0]
    proven = found = 0
    for neuron in range(20):
        w = layer.weight[neuron].clone()
        w[w.abs() < w.abs().topk(6).values[-1]] = 0
        target = (layer.inputs.double() @ w).relu()
        proven += proposition_2(layer.inputs, target, w).unique
        again = cp.Layer.from_samples(w[None], layer.inputs, None, "relu", "neuron")
        found += bool(torch.allclose(cp.solve(cp.NetTrim(again, 0.0)).x[0], w, atol=1e-4 * float(w.abs().max())))
    return f"proven unique for {proven} of 20 neurons; L1 finds {found}"


def resnet(folder):
    """Lemma 3.1 at every convolution, in one worst line, and the network's bound."""
    model, batches = resnet20(folder), list(cifar10(folder, "train", 256)[0].split(128))
    build = lambda layer: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(0.5))  # noqa: E731
    thin, report = cp.prune(model, batches, build, names="*conv*", mode="cascade")
    found = []
    known = dict(thin.named_modules())

    def check(name):
        def hook(module, args, output):
            with torch.no_grad():
                columns = lambda y: y.movedim(1, -1).flatten(0, -2)  # noqa: E731
                found.append(lemma_3_1(columns(output), columns(known[name](*args))))

        return hook

    hooks = [model.get_submodule(row.name).register_forward_hook(check(row.name)) for row in report.rows]
    with torch.no_grad():
        model(batches[0])
    for hook in hooks:
        hook.remove()
    tightest = max(found, key=lambda each: each.measured / each.guaranteed)
    print(f"Lemma 3.1 at {len(found)} convolutions of ResNet-20: true at {sum(each.true for each in found)}")
    return [tightest, *network_bound("Reconstruction, cascade", report)]


def additivity(folder):
    model, batches = resnet20(folder), [cifar10(folder, "train", 256)[0]]
    rows = []
    for keep in (0.9, 0.7, 0.5, 0.3, 0.2, 0.1):
        build = lambda layer, k=keep: cp.Reconstruction(layer.damped(1e-4), cp.Unstructured(k))  # noqa: E731
        thin, _ = cp.prune(model, batches, build, cp.Fast(), names="*conv*")
        found = cp.additivity(model, thin, batches)
        statement = found.statement()
        rows.append([
            f"{1 - keep:.0%}", f"{found.predicted:.4g}", f"{found.measured:.4g}", f"{found.ratio:.2f}",
            f"{found.crossing:+.1%}", f"{found.bending:.1%}", "yes" if statement.applies else "no",
            "true" if statement.true else "false",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = [
        "sparsity",
        "sum",
        "measured",
        "ratio",
        "cross terms",
        "not linear",
        "hypotheses hold",
        "within (1+t)/(1-t)^2",
    ]
    print(table(head, rows))


def row(network, statement):
    applies = "yes" if statement.applies else "no: " + "; ".join(h.text for h in statement.hypotheses if not h.holds)
    ratio = statement.guaranteed / statement.measured if statement.measured else math.inf
    return [network, statement.name, applies, "true" if statement.true else "FALSE",
            f"{statement.guaranteed:.5g}", f"{statement.measured:.5g}", f"{ratio:.3g}"]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--part", choices=["statements", "additivity"], default="statements")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=0.1)
    options = parser.parse_args()
    folder = data_folder(options.data)
    if options.part == "additivity":
        additivity(folder)
        return
    model, x = trained_lenet300(folder / "lenet300.npz"), images(folder, options.images)
    first, unnormalised = net_trim(model, x, options)
    second, halved = layerwise_obs(model, x)
    held = [*first, *second, merging(model, x)]
    unique = uniqueness(model, x)
    rows = [row("LeNet-300-100", statement) for statement in held]
    rows += [row("ResNet-20", statement) for statement in resnet(folder)]
    rows += [row("not normalised", unnormalised), row("published constant", halved)]
    print(table(["network", "statement", "applies", "holds", "guaranteed", "measured", "ratio"], rows))
    print(f"Proposition 2, neurons of fc2 with 6 weights: {unique}")


if __name__ == "__main__":
    main()

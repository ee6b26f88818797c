"""Networks of pools, joined tensors, activations and norms, as they are called: the guarantee is never below."""

import copy
import math

import pytest
import torch
from drawn import Drawn, RootMeanSquare, drawn, root_mean_square
from test_guarantee import Functional, Noise
from torch import nn
from torch.nn import functional as F

import convexprune as cp
from convexprune.bounds import lipschitz
from convexprune.certify.normalisations import normalisations
from convexprune.network.matrices import stack_of
from convexprune.network.recording import record

MODES = ["parallel", "cascade", "residual"]


def l1(layer):
    return cp.L1Reconstruction(layer, 1e-3)


def network_of(model, batches, mode="parallel", noise=0.1, **options):
    """What the report says of the network's error."""
    return cp.prune(model, batches, l1, Noise(noise), mode, **options)[1].network


# ---- random networks ----


def apart(model, pruned, batches):
    with torch.no_grad():
        changes = [pruned(x.clone()).double() - model(x.clone()).double() for x in batches]
    return math.hypot(*(float(change.norm()) for change in changes))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*dim:UserWarning")
def test_a_random_network_is_within_its_bound(seed, mode):
    seed = 12 * MODES.index(mode) + seed
    dtype = (torch.float32, torch.float64, torch.bfloat16)[seed // 4 % 3]
    model, batches = drawn(seed, tokens=seed % 3 == 0)
    model, batches = model.to(dtype), [batch.to(dtype) for batch in batches]
    names = None if seed % 2 else [name for name, part in model.named_modules() if stack_of(part)][:-1]
    pruned, report = cp.prune(model, batches, l1, Noise((1e-3, 0.1)[seed % 2]), mode, names=names)
    network = report.network
    assert network.guaranteed is not None, network.reason
    assert network.measured <= network.guaranteed
    assert apart(model, pruned, batches) <= network.guaranteed
    if dtype is not torch.bfloat16:
        # the guarantee is of passes in the network's own arithmetic; exact ones differ by its rounding of the outputs
        rounding = 1e-6 * network.scale if dtype is torch.float32 else 0.0
        exact = (copy.deepcopy(each).double() for each in (model, pruned))
        assert apart(*exact, [batch.double() for batch in batches]) <= network.guaranteed + rounding


def test_random_networks_have_every_kind_of_operation():
    seen = set()
    for seed in range(100):
        model, (x, _) = drawn(seed, tokens=seed % 3 == 0)
        with torch.no_grad():
            seen |= {step.operation for step in record(model, x).steps}
    assert {"cat", "add", "ConvTranspose2d", "max_pool2d", "avg_pool2d", "layer_norm", "rms_norm", "rsqrt"} <= seen
    assert len(seen & lipschitz.LIPSCHITZ.keys()) > 8
    assert isinstance(drawn(0)[0], Drawn)


POOLS = [
    lambda x: F.max_pool2d(x, 3, 1),
    lambda x: F.max_pool2d(x, kernel_size=(3, 2), stride=(1, 2), padding=1, ceil_mode=True),
    lambda x: F.max_pool2d(x, [2], dilation=2, stride=1),
    lambda x: torch.max_pool2d(x, 2, padding=1),
    lambda x: F.max_pool2d(x[0], 3, 1)[None],
    lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    lambda x: F.avg_pool2d(x, 3, 2, 1, True),
    lambda x: F.avg_pool2d(x, 2, divisor_override=1),
    lambda x: F.avg_pool1d(x.flatten(2), 5, 3),
    lambda x: F.max_pool1d(x.flatten(2), 5, 3),
    lambda x: F.avg_pool3d(x, (2, 3, 1), 1),
    lambda x: F.max_pool3d(x[:, None], 2),
    lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    lambda x: F.adaptive_max_pool2d(x, 3),
    lambda x: F.adaptive_max_pool1d(x.flatten(2), 7),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AdaptiveAvgPool2d((None, 3)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", POOLS, ids=range(len(POOLS)))
def test_pools_are_read_from_their_calls(pool, mode):
    torch.manual_seed(0)
    model = Functional(lambda m, x: pool(m.pooled(x)))
    model.pooled = nn.Conv2d(2, 4, 3, padding=1)
    network = network_of(model.eval().double(), [torch.randn(3, 2, 7, 7).double()], mode)
    assert network.guaranteed is not None, network.reason
    assert network.measured <= network.guaranteed
    # a change of one entry alone
    spike = torch.zeros(1, 2, 7, 7).double()
    spike[0, 0, 3, 3] = 1e3
    network = network_of(model, [spike], mode, noise=1.0)
    assert network.measured <= network.guaranteed


JOINS = {
    "channels": lambda y, x: torch.cat((y, x), 1),
    "channels from behind": lambda y, x: torch.concat([x, y, x], dim=-3),
    "by another name": lambda y, x: torch.concatenate((y, x), axis=2),
    "samples": lambda y, x: torch.cat([y, y[:1]]),
    "with itself": lambda y, x: torch.cat((y, y), 1),
    "of other types": lambda y, x: torch.cat((y, x.bfloat16(), torch.ones(x.shape, dtype=torch.int64)), 3),
    "of nothing": lambda y, x: torch.cat((torch.empty(0), y)),
    "in place": lambda y, x: torch.cat((y, x), 1, out=torch.empty(0)),
    "stacked": lambda y, x: torch.stack((y, x), -1),
    "stacked sideways": lambda y, x: torch.hstack((y, x, y)),
    "split and joined": lambda y, x: torch.cat(y.split(2, 1)[::-1], 1),
    "unbound": lambda y, x: torch.stack(y.unbind(2)[:3]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("join", JOINS)
def test_tensors_that_are_joined(join, mode):
    torch.manual_seed(0)
    model = Functional(lambda m, x: JOINS[join](m.conv(x), m.other(x)))
    model.conv, model.other = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
    for names in (["conv"], ["conv", "other"]):
        network = network_of(model.eval(), list(torch.randn(2, 3, 2, 5, 5)), mode, names=names)
        assert network.guaranteed is not None, network.reason
        assert network.measured <= network.guaranteed


def test_errors_of_branches_that_are_joined_add_as_squares():
    torch.manual_seed(0)
    model = Functional(lambda m, x: torch.cat((m.a(x), m.b(x)), 1)).eval()
    network = network_of(model, [torch.randn(50, 6)], "cascade")
    assert network.guaranteed == pytest.approx(network.measured, rel=1e-5)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm of two axes": lambda: nn.LayerNorm((4, 6), eps=0.1),
    "LayerNorm without weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "RMSNorm with an eps": lambda: nn.RMSNorm((4, 6), 1e-6),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "written out": lambda: RootMeanSquare(6, 1e-6),
    "as a quotient": lambda: Lambda(root_mean_square),
    "by a power": lambda: Lambda(lambda x: (x.square().mean(-1, True) + 1e-6) ** -0.5 * x),
    "by functions": lambda: Lambda(lambda x: F.layer_norm(x, [6], torch.ones(6).requires_grad_() * 1)),
}


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_behind_the_last_judged_layer(name, dtype, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), NORMS[name](), nn.Linear(6, 5)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.uniform_(-2, 2)
    network = network_of(model, [(10 * torch.randn(3, 4, 6)).to(dtype)] * 2, mode, names=["0"])
    if name == "by functions":
        assert "is not covered" in network.reason  # its scale is no parameter
        return
    assert network.measured <= network.guaranteed <= 100 * network.measured


@pytest.mark.parametrize("head", ["whole", "some tokens", "reshaped"])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm, RootMeanSquare])
def test_a_scale_and_the_layer_behind_it_are_one_matrix(kind, head):
    torch.manual_seed(0)
    norm = kind(6, eps=1e-6)
    take = {"whole": lambda y: y, "some tokens": lambda y: y[:, -2:, :], "reshaped": lambda y: y.view(-1, 6)}[head]
    model = nn.Sequential(nn.Linear(6, 6), norm, Lambda(take), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        norm.weight[0], norm.weight[1:] = 1e6, 1.0
        model[3].weight[:, 0] = 0.0
    network = network_of(model, [torch.randn(3, 4, 6)], names=["0"])
    assert network.measured <= network.guaranteed <= 100 * network.measured
    # entries that have changed places are no longer those of the scale
    model = nn.Sequential(nn.Linear(6, 6), norm, Lambda(lambda y: y.roll(1, -1)), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        model[3].weight[:, 0] = 0.0
    network = network_of(model, [torch.randn(3, 4, 6)], names=["0"])
    assert 1e4 < network.measured <= network.guaranteed


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_a_transformer_whose_head_is_not_judged_has_a_bound(mode):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
    llama = transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=2, **sizes)
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [transformers.LlamaForCausalLM(llama).eval(), transformers.GPT2LMHeadModel(gpt2).eval()]
        batches = [{"input_ids": torch.randint(0, 30, (4, 12)), "use_cache": False} for _ in range(2)]
    for model, names in zip(models, ("model.layers.*", "transformer.h.*"), strict=True):
        build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))  # noqa: E731
        network = cp.prune(model, batches, build, cp.Magnitude(), mode, names=names)[1].network
        assert network.guaranteed is not None, network.reason
        assert network.measured <= network.guaranteed <= 30 * network.measured


class Miswritten(nn.Module):
    """Nearly the root of the mean square."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first = how, nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        other, axis, eps, power = x, -1, 1e-6, 2
        if self.how == "of another":
            other = x.relu()
        if self.how == "over another axis":
            axis = 1
        if self.how == "by another power":
            power = 3
        if self.how == "with a computed eps":
            eps = x.abs().mean()
        if self.how == "less an eps":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-6)
        if self.how == "in whole numbers":
            return x * torch.rsqrt(x.to(torch.int32).pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1)
        if self.how == "twice":
            return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 2)
        return x * torch.rsqrt(other.pow(power).mean(axis, keepdim=True).abs() + eps)


@pytest.mark.parametrize(
    "how",
    [
        "of another",
        "over another axis",
        "by another power",
        "with a computed eps",
        "less an eps",
        "in whole numbers",
        "twice",
    ],
)
def test_what_is_nearly_a_norm_is_none(how):
    torch.manual_seed(0)
    model = Miswritten(how).eval()
    network = network_of(model, [torch.randn(3, 6, 6) + 5])
    assert network.guaranteed is None
    assert "is not covered" in network.reason
    with torch.no_grad():
        steps = record(model, torch.randn(3, 6, 6))
    assert not normalisations(steps, steps.parameter_of(model))


def test_a_row_that_is_zero_in_both_networks_does_not_count():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4, eps=0.0)).eval()
    batch = torch.randn(5, 3, 4)
    batch[:, 1] = 0
    network = network_of(model, [batch])
    assert network.guaranteed is None  # 0 / 0
    batch[:, 1] = 1
    assert network_of(model, [batch]).guaranteed is not None
    shy = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4, eps=1e-20)).eval()
    batch[:, 1] = 0
    network = network_of(shy, [batch])
    assert network.measured <= network.guaranteed <= 100 * network.measured


# ---- arguments that are not understood ----


class Varying(nn.Module):
    """Its argument depends on the batch."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.function(self.layer(x), float(x.mean() > 0))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, a: F.leaky_relu(y, 1 + 5 * a), lambda y, a: F.elu(y, 1 + 5 * a), lambda y, a: y * (1 + a),
        lambda y, a: F.max_pool1d(y, 2, 1, int(a))[:, :5], lambda y, a: F.layer_norm(y, (6,), eps=1 + a),
        lambda y, a: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + (1 + a)),
    ],
)  # fmt: skip
def test_arguments_that_change_from_batch_to_batch_are_refused(function):
    batches = [torch.rand(5, 4, 6) - 1, torch.rand(5, 4, 6)]
    network = network_of(Varying(function).eval(), batches)
    assert network.guaranteed is None
    assert "alike" in network.reason or "same way" in network.reason


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: F.max_pool1d(m.a(x)[None], 2, return_indices=True)[0], "is not covered"),
        (lambda m, x: F.prelu(x[0, 0], m.a(x)[0, 0]), "what has changed is not its input"),
        (lambda m, x: F.prelu(m.a(x), x[0, :1]), "its weight is no parameter"),
        (lambda m, x: torch._C._nn.elu(m.a(x), 1.0, 9.0, 9.0), "arguments that are not covered"),
        (lambda m, x: torch._C._nn.elu(m.a(x), 1.0, 9.0), "is no bool"),
        (lambda m, x: torch._C._nn.elu(m.a(x), scale=9.0), "arguments that are not covered"),
        (lambda m, x: F.celu(m.a(x), -0.5), "alpha is -0.5"),
        (lambda m, x: m.a(x) * x, "no number and no parameter"),
        (lambda m, x: m.a(x)[:, None] * m.bias, "stretches"),
        (lambda m, x: torch.div(m.a(x), 2, rounding_mode="floor"), "rounding_mode"),
        (lambda m, x: m.a(x) / 0.0, "zero"),
        (lambda m, x: 1 / m.a(x), "is not covered"),
        (lambda m, x: torch.view_as_real(m.a(x) * m.turn), "no number and no parameter"),
        (lambda m, x: m.a(x).to(torch.int64), "is not covered"),
        (lambda m, x: m.a(x).to(x.double()), "is not covered"),
        (lambda m, x: F.threshold(m.a(x), 0.5, 3), "is not covered"),
        (lambda m, x: F.hardshrink(m.a(x)), "is not covered"),
        (lambda m, x: F.layer_norm(m.a(x), (9, 6)), "is not covered"),
        (lambda m, x: F.layer_norm(x, (6,), m.a(x)[0]), "is not covered"),
        (lambda m, x: F.layer_norm(m.b(x), (6,), None, m.a(x)[0]), "a scale or a shift that has changed"),
        (lambda m, x: F.normalize(m.a(x)), "is not covered"),
        (lambda m, x: F.glu(m.a(x)), "is not covered"),
        (lambda m, x: x * float(m.a(x)[0, 0]), "float in the model (Functional) is not covered"),
        (lambda m, x: x if abs(float(m.a(x).sum(1).mean())) > 1e9 else m.b(x), "is not covered"),
        (lambda m, x: F.gumbel_softmax(m.a(x)), "is not covered"),
        (lambda m, x: F.rrelu(m.a(x), training=True), "training is True"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_arguments_that_are_not_understood_are_refused(function, message):
    torch.manual_seed(0)
    model = Functional(function).eval()
    model.bias = nn.Parameter(torch.randn(3, 1))
    model.turn = nn.Parameter(torch.tensor([1 + 9j]))
    network = network_of(model, [torch.randn(9, 6)])
    assert network.guaranteed is None
    assert message in network.reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x) * m.gain), lambda m, x: m.b(m.gain * m.a(x)), lambda m, x: m.a(x) / m.gain,
        lambda m, x: m.a(x).mul_(3).div_(-0.5), lambda m, x: F.prelu(m.a(x), m.gain), lambda m, x: 7 * m.a(x) / 3,
        lambda m, x: F.elu(m.a(x), alpha=4.0, inplace=True), lambda m, x: F.elu_(m.a(x), 4.0),
        lambda m, x: F.prelu(weight=m.gain, input=m.a(x)),
        lambda m, x: m.a(x).half().float(), lambda m, x: m.a(x).to("cpu", torch.float64),
        lambda m, x: m.a(x).softmax(0), lambda m, x: F.log_softmax(m.b(F.gelu(m.a(x))), -1),
        lambda m, x: -m.a(x).clip(-1),
        lambda m, x: m.b(m.a(x).roll(2, 1).flip(0)),
    ],
)  # fmt: skip
def test_factors_and_arguments_that_are_understood(function, mode):
    torch.manual_seed(0)
    model = Functional(function).eval()
    model.gain = nn.Parameter(3 * torch.randn(6))
    network = network_of(model, [torch.randn(9, 6)], mode)
    assert network.guaranteed is not None, network.reason
    assert network.measured <= network.guaranteed

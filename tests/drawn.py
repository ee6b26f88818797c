"""Networks drawn at random from what the guarantee covers: pools, joins, activations, norms, convolutions both ways."""

import math
import random
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


class RootMeanSquare(nn.Module):
    """RMSNorm as transformers writes it out."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width)), eps

    def forward(self, x):
        wide = x.to(torch.float32) if x.dtype is not torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def root_mean_square(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3)


def activations(draw):
    slope, alpha = draw.uniform(-3, 3), draw.uniform(0.2, 4)
    return draw.choice(
        [
            F.gelu, partial(F.gelu, approximate="tanh"), F.silu, F.hardswish, F.mish, partial(F.elu, alpha=slope),
            partial(F.celu, alpha=alpha), F.selu, partial(F.softplus, beta=alpha), nn.GELU(), nn.GELU("tanh"),
            partial(F.leaky_relu, negative_slope=slope), partial(F.leaky_relu, negative_slope=slope, inplace=True),
            nn.SiLU(), nn.Hardswish(), nn.Mish(), nn.ELU(alpha), nn.CELU(alpha), nn.SELU(), nn.Softplus(alpha),
            nn.LeakyReLU(slope), nn.PReLU(init=slope), nn.RReLU(0.1, 2.5), nn.Sigmoid(), nn.Hardsigmoid(),
            nn.LogSigmoid(), nn.Softshrink(0.3), nn.Tanhshrink(), nn.Softsign(), nn.ReLU6(), nn.Tanh(), torch.relu,
            lambda x: x.clamp(-1, alpha), lambda x: -x,
            lambda x: slope * x, lambda x: x / alpha, lambda x: x.double().to(x.dtype), lambda x: torch.mul(x, 2),
        ]
    )  # fmt: skip


def sizes(draw, least, most, axes=2):
    """A number, or one for each axis."""
    each = [draw.randint(least, most) for _ in range(axes)]
    return draw.choice([each[0], tuple(each)])


def pools(draw, pixels):
    kernel = sizes(draw, 1, min(3, *pixels))
    half = kernel // 2 if isinstance(kernel, int) else tuple(each // 2 for each in kernel)
    stride, padding, ceil = draw.choice([None, 1, 2, (1, 2)]), draw.choice([0, half]), draw.random() < 0.4
    wide = min(1 + 2 * ((kernel if isinstance(kernel, int) else max(kernel)) - 1), 99) <= min(pixels)
    dilation = draw.choice([1, 2]) if wide else 1
    divisor, counted = draw.choice([None, None, 1, 3]), draw.random() < 0.5
    to = sizes(draw, 1, 5)
    return draw.choice(
        [
            lambda x: F.max_pool2d(x, kernel, stride, padding, dilation, ceil),
            lambda x: torch.max_pool2d(x, kernel, stride or kernel, padding, dilation, ceil_mode=ceil),
            lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, counted, divisor),
            lambda x: F.avg_pool2d(input=x, kernel_size=kernel, padding=padding, count_include_pad=counted),
            lambda x: F.adaptive_avg_pool2d(x, to),
            lambda x: F.adaptive_max_pool2d(x, to),
            nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil),
            nn.AvgPool2d(kernel, stride, padding, ceil, counted, divisor),
            nn.AdaptiveMaxPool2d(to),
            lambda x: x.mean(3, keepdim=True),
        ]
    )


def norms(draw, shape):
    channels = shape[1]
    batch = nn.BatchNorm2d(channels) if len(shape) == 4 else nn.Identity()
    if len(shape) == 4:
        nn.init.uniform_(batch.weight, -2, 2)
        nn.init.uniform_(batch.running_var, 0.2, 2)
    eps = draw.choice([1e-5, 1e-2, 1.0])
    axes = draw.randint(1, len(shape) - 1)
    layer = nn.LayerNorm(shape[-axes:], eps, bias=draw.random() < 0.5)
    nn.init.uniform_(layer.weight, -2, 2)
    groups = draw.choice([each for each in (1, 2, 3, channels) if channels % each == 0])
    return draw.choice(
        [
            batch, layer, nn.RMSNorm(shape[-1], draw.choice([None, eps])), RootMeanSquare(shape[-1], eps),
            root_mean_square, lambda x: F.layer_norm(x, x.shape[-axes:]), nn.GroupNorm(groups, channels, eps),
            lambda x: F.softmax(x, 1), nn.Softmax(-1), lambda x: x.log_softmax(1),
        ]
    )  # fmt: skip


def convolutions(draw, channels):
    out, kernel, dilation = draw.choice([2, 4, 6]), draw.randint(1, 3), draw.choice([1, 1, 2])
    groups = 2 if channels % 2 == 0 and draw.random() < 0.3 else 1
    stride = draw.choice([1, 1, 2])
    if draw.random() < 0.4:
        spare = draw.randint(0, max(stride, dilation) - 1)
        return nn.ConvTranspose2d(
            channels, out, kernel, stride, draw.randint(0, kernel // 2), spare, groups, dilation=dilation
        )
    return nn.Conv2d(channels, out, kernel, stride, dilation * (kernel - 1), dilation, groups)


class Drawn(nn.Module):
    """A chain of operations with joins and sums of earlier tensors; `tokens`: rows of (samples, tokens, features)."""

    def __init__(self, seed, length=8, tokens=False):
        super().__init__()
        draw = random.Random(seed)
        shape = (3, 5, 6) if tokens else (3, 3, 7, 6)
        self.parts, self.steps, self.shape = nn.ModuleList(), [], shape
        x = torch.randn(shape)
        with torch.no_grad():
            kept = []
            for place in range(length):
                kind, operation = (
                    ("layer", self.layer(draw, x)) if place in (0, length - 1) else self.kind(draw, x, kept)
                )
                if isinstance(operation, nn.Module):
                    operation.eval()
                made = self.apply_step(kind, operation, x, kept)
                if made.numel() == 0 or made.numel() > 4000 or not bool(made.isfinite().all()):
                    kind, operation = "entry", torch.tanh
                    made = torch.tanh(x)
                if isinstance(operation, nn.Module):
                    self.parts.append(operation)
                x = made
                self.steps.append((kind, operation))
                kept.append(x)
            x = self.rows(x)
        self.head = nn.Linear(x.shape[-1], 4)
        self.end = draw.choice([lambda x: x, lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, -1), torch.sigmoid])

    @staticmethod
    def layer(draw, x):
        if x.ndim == 3:
            return nn.Linear(x.shape[-1], draw.choice([4, 6]), bias=draw.random() < 0.7)
        return convolutions(draw, x.shape[1])

    def kind(self, draw, x, kept):
        alike = [index for index, each in enumerate(kept) if each.shape == x.shape]
        axis = draw.choice([*range(1, x.ndim), -1])
        joined = [
            index
            for index, each in enumerate(kept)
            if each.ndim == x.ndim
            and all(a == b for k, (a, b) in enumerate(zip(each.shape, x.shape, strict=True)) if k != axis % x.ndim)
        ]
        options = [("layer", self.layer(draw, x)), ("entry", activations(draw)), ("entry", norms(draw, x.shape))]
        if x.ndim == 4:
            options.append(("entry", pools(draw, x.shape[2:])))
        else:
            options.append(("entry", lambda x: x.transpose(1, 2)))
        if alike:
            options += [("sum", draw.choice(alike))] * 2
        if joined:
            options += [(("join", axis), draw.choice(joined))] * 2
        return draw.choice(options)

    @staticmethod
    def apply_step(kind, operation, x, kept):
        if kind == "sum":
            return x + kept[operation]
        if isinstance(kind, tuple):
            return torch.cat((x, kept[operation]), kind[1])
        return operation(x)

    def forward(self, x):
        kept = []
        for kind, operation in self.steps:
            # what works in place must not change what is kept
            x = self.apply_step(kind, operation, x.clone() if kind == "entry" else x, kept)
            kept.append(x)
        return self.end(self.head(self.rows(x)))

    def rows(self, x):
        """What the head reads: some of the tokens, or all that there is of an image."""
        return x[:, : self.shape[1] - 1] if len(self.shape) == 3 else x.flatten(1)


def drawn(seed, tokens=False):
    """A network and its batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Drawn(seed, 4 + seed % 6, tokens).eval()
        return net, [torch.randn(net.shape) * math.exp(seed % 3 - 1) for _ in range(2)]

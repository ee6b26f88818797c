"""Networks whose forward passes do more than their recorded operations say, or say it in an unusual way.

A construct is a function `(m, x) -> y` of a model that has some layers, or makes a model. Sources are numbers from
elsewhere, put at several places of an ordinary network; edits change a tensor in an unusual way, at several places too.
`COVERED` names constructs that have a bound in every mode.
"""

import contextlib
import copy
import ctypes
import io
import itertools
import pickle
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize


class Body(nn.Module):
    """Two linear layers and some norms, in the hands of a function."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.ln = nn.BatchNorm1d(6), nn.LayerNorm(6)
        self.count, self.memory = 0, None
        self.register_buffer("steps", torch.zeros(()))
        self.generator, self.numbers, self.dice = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.wheel = itertools.count()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Maps(nn.Module):
    """Two convolutions, in the hands of a function."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


ROWS = {}  # name -> function of a Body and its input (9, 6)
IMAGES = {}  # name -> function of a Maps and its input (5, 2, 8, 8)
BUILT = {}  # name -> function that makes a model for inputs (9, 6)
COVERED = set()
FIRST_ONLY = {
    "a_decoder_that_is_tied_through_a_parametrization", "a_decoder_that_is_tied_in_secret", "two_layers_of_one_weight",
    "a_spectral_norm", "a_weight_norm",
}  # fmt: skip
SHARED = {}  # what all passes of all networks see


def rows(function):
    ROWS[function.__name__] = function
    return function


def images(function):
    IMAGES[function.__name__] = function
    return function


def built(function):
    BUILT[function.__name__] = function
    return function


def covered(table):
    def into(function):
        COVERED.add(function.__name__)
        return table(function)

    return into


# ---- numbers from where they should not be ----


def counted(m, x):
    m.count += 1
    return m.count


def counted_in_a_buffer(m, x):
    m.steps += 1
    return m.steps


def counted_in_a_new_buffer(m, x):
    m.steps = m.steps + 1
    return m.steps


def counted_by_all(m, x):
    SHARED["count"] = SHARED.get("count", 0) + 1
    return SHARED["count"]


def remembered_mean(m, x):
    now = x.mean(0)
    m.memory = now if m.memory is None else 0.9 * m.memory + 0.1 * now
    return m.memory


def remembered_output(m, x):
    before, m.memory = m.memory, m.b(x).detach().numpy().copy()
    return 0.0 if before is None else torch.from_numpy(before)


def kept_for_ever(m, x):
    if m.memory is None:
        m.memory = torch.from_numpy(m.a.forward(x).detach().numpy().copy())
    return m.memory


def cached_by_shape(m, x):
    if x.shape not in SHARED:
        SHARED[x.shape] = torch.from_numpy(m.a.forward(x).detach().numpy().copy())
    return SHARED[x.shape]


def shaken(m, x):
    if m.memory is None:
        m.memory = torch.ones(6)
    return m.memory.mul_(1.5)


def seeded_once(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return torch.randn(9, 6)


def seeded_at_random(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(m.dice.randrange(10**6))
        return torch.randn(9, 6)


def left_to_another_thread(m, x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x * 3 + len(threading.enumerate())))
    thread.start()
    thread.join()
    return found[0]


def by_another_thread_from_the_weights(m, x):
    found = []
    thread = threading.Thread(target=lambda: found.append(F.linear(x, m.a.weight.detach())))
    thread.start()
    thread.join()
    return found[0]


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


SOURCES = {
    function.__name__: function
    for function in (
        counted, counted_in_a_buffer, counted_in_a_new_buffer, counted_by_all, remembered_mean, remembered_output,
        kept_for_ever, cached_by_shape, shaken, seeded_once, seeded_at_random, left_to_another_thread,
        by_another_thread_from_the_weights,
    )
} | {
    "counted slowly": lambda m, x: 1 + 1e-3 * counted(m, x),
    "counted very slowly": lambda m, x: 1 + 1e-6 * counted(m, x),
    "turning": lambda m, x: 1 + next(m.wheel) % 3,
    "random": lambda m, x: torch.randn(9, 6),
    "random like another": lambda m, x: torch.randn_like(x),
    "random by its own generator": lambda m, x: torch.randn(9, 6, generator=m.generator),
    "random by numpy": lambda m, x: torch.from_numpy(m.numbers.normal(size=(9, 6))).float(),
    "random by numpy for all": lambda m, x: torch.from_numpy(np.random.rand(9, 6)).float(),
    "a little random": lambda m, x: 1e-5 * torch.from_numpy(m.numbers.normal(size=(9, 6))).float(),
    "random by python": lambda m, x: m.dice.random(),
    "random in place": lambda m, x: torch.zeros(9, 6).uniform_(generator=m.generator),
    "a random mask": lambda m, x: torch.from_numpy(m.numbers.random((9, 6)) < 0.5),
    "the time": lambda m, x: time.perf_counter_ns() % 1000,
    "the address": lambda m, x: x.data_ptr() % 1000,
    "whether it is watched": lambda m, x: 1 + 5 * (torch._C._len_torch_function_stack() > 0),
    "whether it has hooks": lambda m, x: 1 + 5 * len(m.a._forward_hooks),
    "the mode of gradients": lambda m, x: 1 + 5 * torch.is_grad_enabled(),
    "weights as data": lambda m, x: m.a.weight.data.sum(),
    "weights detached": lambda m, x: m.a.weight.detach().sum(0),
    "weights of the state": lambda m, x: m.a.state_dict()["weight"].sum(0),
    "weights by numpy": lambda m, x: torch.from_numpy(m.a.weight.detach().numpy().sum(0)),
    "weights as a list": lambda m, x: sum(map(sum, m.a.weight.tolist())),
    "weights as a number": lambda m, x: float(m.a.weight.norm()),
    "weights that are not zero": lambda m, x: int(m.a.weight.count_nonzero()),
    "weights copied": lambda m, x: copy.deepcopy(m.a).weight.sum(0).detach(),
    "weights pickled": lambda m, x: pickle.loads(pickle.dumps(m.a.weight.detach().numpy())).sum(),
    "weights saved": lambda m, x: saved_and_loaded(m.a.state_dict())["weight"].sum(0),
    "weights in a vector": lambda m, x: nn.utils.parameters_to_vector(m.a.parameters()).sum().item(),
    "weights looked up": lambda m, x: m.get_parameter("a.weight").mean(),
    "weights by storage": lambda m, x: m.a.weight.untyped_storage()[3] / 10,
    "weights by address": lambda m, x: ctypes.c_float.from_address(m.a.weight.data_ptr()).value * 10,
    "a bias": lambda m, x: m.a.bias,
    "an item": lambda m, x: m.a.forward(x).sum().item(),
    "a float": lambda m, x: float(m.a.forward(x)[0, 0]),
    "a format": lambda m, x: float(f"{m.a.forward(x)[0, 0]:.3f}"),
    "a text": lambda m, x: len(repr(m.a.forward(x))),
    "a sign": lambda m, x: 1 if bool(m.a.forward(x)[0, 0] > 0) else 2,
    "a list": lambda m, x: sum(value > 0 for value in m.a.forward(x)[0].tolist()),
    "a count": lambda m, x: len(m.a.forward(x).relu().nonzero()),
    "an index": lambda m, x: x[:, int(m.a.forward(x).abs().argmax()) % 6][:, None],
    "an array": lambda m, x: torch.from_numpy(m.a.forward(x).detach().numpy() * 3),
    "bytes": lambda m, x: torch.frombuffer(bytearray(m.a.forward(x).detach().numpy()), dtype=torch.float32).view(9, 6),
    "a new tensor": lambda m, x: torch.tensor(m.a.forward(x).tolist()),
    "a file": lambda m, x: saved_and_loaded(m.a.forward(x).detach()),
    "a copy": lambda m, x: copy.deepcopy(m.a.forward(x).detach()),
    "a layer by hand": lambda m, x: F.linear(x, m.a.weight, m.a.bias),
    "a layer by numpy": lambda m, x: torch.from_numpy(x.numpy() @ m.a.weight.detach().numpy().T),
    "the layer copied": lambda m, x: copy.deepcopy(m.a)(x).detach(),
    "the layer with other weights": lambda m, x: torch.func.functional_call(m.a, {"weight": torch.eye(6)}, x),
    "the layer with its weights doubled": lambda m, x: torch.func.functional_call(m.a, {"weight": 2 * m.a.weight}, x),
    "the layer without its hooks": lambda m, x: m.a.forward(x),
    "the class without its hooks": lambda m, x: nn.Linear.forward(m.a, x),
}  # fmt: skip
PLACES = {
    "before": lambda m, x, s: m.b(F.relu(m.a(x + s))),
    "as a factor before": lambda m, x, s: m.b(F.relu(m.a(x * s))),
    "between": lambda m, x, s: m.b(F.relu(m.a(x)) + s),
    "behind": lambda m, x, s: m.b(F.relu(m.a(x))) + s,
}


def placed(source, place):
    return lambda m, x: PLACES[place](m, x, SOURCES[source](m, x))


for _source, _place in itertools.product(SOURCES, PLACES):
    ROWS[f"{_source}, {_place}"] = placed(_source, _place)


# ---- tensors that are changed in an unusual way ----


def by_inference_mode(z, y):
    with torch.inference_mode():
        z.view(-1)[:] = y.reshape(-1)


def by_a_thread(z, y):
    thread = threading.Thread(target=lambda: z.add_(y))
    thread.start()
    thread.join()


def by_an_exchange(z, y):
    with contextlib.suppress(RuntimeError):  # a tensor that is looked at cannot be exchanged
        torch.utils.swap_tensors(z, y.detach().clone())


def of_an_inference_tensor(z, y):
    with torch.inference_mode():
        kept = z.clone()
        part = kept.view(-1)
        part.add_(y.reshape(-1))
    z.data.copy_(kept)


EDITS = {
    function.__name__: function for function in (by_inference_mode, by_a_thread, by_an_exchange, of_an_inference_tensor)
} | {
    "data": lambda z, y: z.data.add_(y),
    "data replaced": lambda z, y: setattr(z, "data", y.detach().clone()),
    "data of a view": lambda z, y: z[:, :3].data.add_(y[:, :3]),
    "detached": lambda z, y: z.detach().add_(y),
    "dlpack": lambda z, y: torch.from_dlpack(z.detach()).add_(y),
    "numpy": lambda z, y: np.add(z.detach().numpy(), y.detach().numpy(), out=z.detach().numpy()),
    "numpy by a number": lambda z, y: z.detach().numpy().__iadd__(np.float32(y.detach()[0, 0])),
    "an array of it": lambda z, y: np.asarray(z.detach()).__imul__(np.float32(3)),
    "its address": lambda z, y: ctypes.memmove(z.data_ptr(), y.detach().clone().data_ptr(), 4 * y.numel()),
    "its storage": lambda z, y: z.untyped_storage().copy_(y.detach().clone().untyped_storage()),
    "storage set": lambda z, y: z.set_(y.detach().clone()),
    "a view": lambda z, y: z[:, :3].add_(y[:, :3]),
    "a flat view": lambda z, y: z.view(-1).add_(y.reshape(-1)),
    "a strided view": lambda z, y: torch.as_strided(z, (9, 3), (6, 2)).add_(y[:, :3]),
    "many at once": lambda z, y: torch._foreach_add_([z], [y]),
    "an entry": lambda z, y: z.__setitem__((slice(None), 0), y[:, 0]),
    "indices": lambda z, y: z.index_put_((torch.arange(9), torch.zeros(9, dtype=torch.long)), y[:, 0]),
    "a copy": lambda z, y: z.copy_(y),
    "filled": lambda z, y: z.fill_(y[0, 0]),
    "scattered": lambda z, y: z.scatter_(1, torch.zeros(9, 6, dtype=torch.long), y),
    "a result": lambda z, y: torch.add(z.clone(), y, out=z),
    "a result in a part": lambda z, y: torch.add(z[:, :3].clone(), y[:, :3], out=z[:, :3]),
    "a sum": lambda z, y: z.add_(y),
    "a sum with a factor": lambda z, y: z.add_(y, alpha=4),
}
USES = {
    "of the input": lambda m, x, edit: m.b(_edited(edit, x.clone(), m.a(x))),
    "of a kept input": lambda m, x, edit: m.b(m.a(_edited(edit, x.clone(), 3 * x))),
    "of the output": lambda m, x, edit: _edited(edit, m.b(x), m.a(x)),
    "of a hidden output": lambda m, x, edit: m.b(_edited(edit, m.a(x), 3 * x)),
    "of what was read": lambda m, x, edit: m.b(x) + _edited(edit, x, m.a(x)),
}


def _edited(edit, z, y):
    EDITS[edit](z, y)
    return z


def edited(edit, use):
    return lambda m, x: USES[use](m, x, edit)


for _edit, _use in itertools.product(EDITS, USES):
    ROWS[f"{_edit}, {_use}"] = edited(_edit, _use)


# ---- layers and norms that are called otherwise ----


@rows
def called_with_twice_its_weight(m, x):
    return torch.func.functional_call(m.a, {"weight": 2 * m.a.weight}, x) + m.b(x)


@rows
def called_with_other_weights(m, x):
    return m.b(torch.func.functional_call(m.a, {"weight": torch.ones(6, 6)}, x))


@rows
def called_with_the_neighbours_weights(m, x):
    return m.b(torch.func.functional_call(m.a, dict(m.b.named_parameters()), x))


@rows
def weights_scaled_for_the_call(m, x):
    m.a.weight.data.mul_(3)
    y = m.a(x)
    m.a.weight.data.div_(3)
    return m.b(y)


@rows
def weights_exchanged_for_the_call(m, x):
    kept, m.a.weight = m.a.weight, nn.Parameter(m.a.weight.detach() * 3)
    y = m.a(x)
    m.a.weight = kept
    return y


@rows
def a_layer_is_called_twice(m, x):
    return m.a(m.a(x))


@rows
def a_layer_is_called_on_parts(m, x):
    return torch.cat([m.a(x[:4]), m.a(x[4:])])


class Tied(nn.Module):
    """Reads another layer's weight, whatever it is given."""

    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, _):
        return 3 * self.other[0].weight.T


class Held(Tied):
    """The same, with the other layer in view."""

    def __init__(self, other):
        super().__init__(other)
        self.layer = other

    def forward(self, _):
        return 3 * self.layer.weight.T


@built
def a_decoder_that_is_tied_through_a_parametrization():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    parametrize.register_parametrization(net[2], "weight", Held(net[0]), unsafe=True)
    return net


@built
def a_decoder_that_is_tied_in_secret():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    parametrize.register_parametrization(net[2], "weight", Tied(net[0]), unsafe=True)
    return net


@built
def two_layers_of_one_weight():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    return net


@built
def a_layer_kept_in_a_list():
    body = Body(lambda m, x: m.hidden[0](m.a(x)))
    body.hidden = [nn.Linear(6, 6)]
    body.hidden[0].weight = body.a.weight
    return body


@built
def a_spectral_norm():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))


@built
def a_weight_norm():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))


@torch.library.custom_op("convexprune_test::relu", mutates_args=())
def other_relu(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


@rows
def another_function_named_relu(m, x):
    return m.b(torch.ops.convexprune_test.relu(m.a(x)))


@rows
def another_function_named_relu_that_torch_hands_on(m, x):
    return m.b(_handed_on(m.a(x)))


def _handed_on(x):
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(relu, (x,), x)
    return relu(x)


def relu(x):
    return 3 * x


# ---- hooks, and methods put in the place of others ----


def hooked(register, *hook, **options):
    def build():
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
        register(net, *hook, **options)
        return net

    return build


HOOKS = {
    "an_input_scaled_by_a_hook": lambda net: net[0].register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "a_later_input_scaled_by_a_hook": lambda net: net[2].register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "an_input_changed_in_place_by_a_hook": lambda net: net[2].register_forward_pre_hook(_changed_in_place),
    "an_input_shifted_by_a_hook": lambda net: net[2].register_forward_pre_hook(lambda m, args: (args[0] + 3,)),
    "an_input_edited_in_secret_by_a_hook": lambda net: net[2].register_forward_pre_hook(_input_edited),
    "an_output_scaled_by_a_hook": lambda net: net[0].register_forward_hook(lambda m, args, y: 3 * y),
    "a_later_output_scaled_by_a_hook": lambda net: net[2].register_forward_hook(lambda m, args, y: 3 * y),
    "an_output_changed_in_place_by_a_hook": lambda net: net[0].register_forward_hook(lambda m, args, y: y.mul_(3)),
    "an_output_edited_in_secret_by_a_hook": lambda net: net[0].register_forward_hook(_output_edited),
    "a_hook_that_is_always_called": lambda net: net[0].register_forward_hook(
        lambda m, args, y: 3 * y, always_call=True
    ),
    "a_hook_on_the_activation": lambda net: net[1].register_forward_hook(lambda m, args, y: 3 * y),
    "a_hook_on_the_network": lambda net: net.register_forward_hook(lambda m, args, y: 3 * y),
    "a_hook_before_the_network": lambda net: net.register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "a_hook_that_adds_what_it_remembers": lambda net: net[2].register_forward_hook(_Remembers()),
    "another_forward": lambda net: setattr(net[0], "forward", lambda x: 3 * F.linear(x, net[0].weight)),
    "another_forward_of_a_later_layer": lambda net: setattr(net[2], "forward", _Loud(net[2])),
    "another_forward_of_the_activation": lambda net: setattr(net[1], "forward", lambda x: 3 * x.relu()),
    "another_class": lambda net: setattr(net[0], "__class__", type("Other", (nn.Linear,), {"__call__": _louder})),
    "another_class_of_the_activation": lambda net: setattr(
        net[1], "__class__", type("ReLU", (nn.ReLU,), {"forward": lambda self, x: x + 3 * x.relu()})
    ),
}  # fmt: skip


def _changed_in_place(module, args):
    args[0].mul_(3)


def _input_edited(module, args):
    args[0].data.add_(3)


def _output_edited(module, args, output):
    output.data.mul_(3)


def _louder(self, x):
    return 3 * nn.Linear.__call__(self, x)


class _Loud:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return 3 * F.linear(x, self.layer.weight, self.layer.bias)


class _Remembers:
    def __init__(self):
        self.last = 0

    def __call__(self, module, args, output):
        before, self.last = self.last, output.detach().mean(0)
        return output + before


for _name, _register in HOOKS.items():
    BUILT[_name] = hooked(_register)


@contextlib.contextmanager
def everywhere(before=None, after=None):
    """Hooks on every module there is."""
    hooks = []
    if before:
        hooks.append(modules.register_module_forward_pre_hook(before))
    if after:
        hooks.append(modules.register_module_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


GLOBAL = {
    "a_global_hook": {"after": lambda m, args, y: 3 * y if type(m) is nn.Linear else None},
    "a_global_hook_before": {"before": lambda m, args: (3 * args[0],) if type(m) is nn.Linear else None},
    "a_global_hook_on_one_layer": {"after": lambda m, args, y: y + 1 if getattr(m, "out_features", 0) == 5 else None},
}


@rows
def a_norm_in_training(m, x):
    m.norm.train()
    return m.norm(m.a(x))


@rows
def a_norm_in_training_by_position(m, x):
    return F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, True, 0.5)


@rows
def a_norm_of_another_variance(m, x):
    return F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var / 100, m.norm.weight, m.norm.bias)


@rows
def a_norm_without_statistics(m, x):
    return F.batch_norm(m.a(x), None, None, training=True)


@rows
def a_norm_called_with_other_weights(m, x):
    return torch.func.functional_call(m.norm, {"weight": torch.full((6,), 9.0)}, m.a(x))


@rows
def dropout_that_is_on(m, x):
    return m.b(F.dropout(m.a(x)))


@rows
def dropout_that_is_on_by_position(m, x):
    return m.b(F.dropout(m.a(x), 0.5, True))


@covered(rows)
def dropout_that_is_off_by_position(m, x):
    return m.b(F.dropout(m.a(x), 0.5, False))


# ---- arguments given in another way ----


@rows
def padding_that_reflects_by_position(m, x):
    return m.b(F.pad(m.a(x)[None], (2, 2), "reflect")[0, :, 2:8] + F.pad(m.a(x)[None], (2, 2), "reflect")[0, :, :6])


@rows
def reflected_by_position(m, x):
    return F.pad(m.a(x)[None], (5, 5), "reflect")


@rows
def replicated_by_position(m, x):
    return F.pad(m.a(x)[None], (9, 9), "replicate")


@rows
def wrapped_by_position(m, x):
    return F.pad(m.a(x)[None], (6, 6), "circular")


@covered(rows)
def padded_by_a_number(m, x):
    return F.pad(m.a(x), (1, 2), "constant", 7.0)


@covered(rows)
def padded_by_less_than_nothing(m, x):
    return F.pad(m.a(x), (-1, -2))


@rows
def a_mean_over_no_axes(m, x):
    return m.a(x).mean(())


@rows
def a_mean_over_an_empty_list(m, x):
    return torch.mean(m.a(x), [])


@rows
def a_mean_over_none(m, x):
    return m.a(x).mean(None, True)


@rows
def a_mean_by_axis(m, x):
    return m.a(x).mean(axis=0)


@rows
def a_mean_over_the_samples_from_behind(m, x):
    return m.a(x).mean(-2)


@covered(rows)
def a_mean_over_the_last_axis(m, x):
    return m.a(x).mean(-1)


@rows
def a_mean_in_another_type(m, x):
    return m.a(x).mean(1, dtype=torch.float64)


@rows
def a_sum_over_an_axis(m, x):
    return m.a(x).sum(1)


@rows
def softplus_by_position(m, x):
    return F.softplus(m.a(x), 50, 0.01)


@rows
def a_sum_with_a_factor(m, x):
    return torch.add(x, m.a(x), alpha=4)


@rows
def a_sum_with_a_factor_in_place(m, x):
    return x.clone().add_(m.a(x), alpha=4)


@rows
def a_difference_with_a_factor(m, x):
    return torch.sub(x, m.a(x), alpha=4)


@rows
def a_difference_the_other_way(m, x):
    return torch.rsub(m.a(x), x, alpha=4)


@covered(rows)
def a_difference_from_a_number(m, x):
    return m.a(x) - 1.5


@rows
def a_number_less_a_tensor(m, x):
    return 1.5 - m.a(x)


@covered(rows)
def a_sum_with_itself(m, x):
    y = m.a(x)
    return y + y


@covered(rows)
def a_wide_hardtanh(m, x):
    return F.hardtanh(m.a(x), -50, 50)


@covered(rows)
def a_leaky_relu_that_is_steep(m, x):
    return F.leaky_relu(m.a(x), 5.0)


@covered(rows)
def an_elu_that_is_steep(m, x):
    return F.elu(m.a(x), 8.0)


@rows
def a_prelu(m, x):
    return F.prelu(m.a(x), torch.tensor([6.0]))


@covered(rows)
def a_celu(m, x):
    return F.celu(m.a(x), 0.01)


@covered(rows)
def activations_in_place(m, x):
    return m.b(m.a(x).tanh_().sigmoid_().relu_())


@rows
def indices_that_repeat(m, x):
    return m.a(x)[:, [0, 0, 0, 0, 0, 0, 0, 0]]


@rows
def indices_of_a_tensor_that_repeat(m, x):
    return m.a(x)[:, torch.zeros(20, dtype=torch.long)]


@rows
def a_mask(m, x):
    return m.a(x)[x > 0]


@rows
def a_mask_of_what_has_changed(m, x):
    y = m.a(x)
    return y[y > 0].sum()[None]


@covered(rows)
def ranges_and_new_axes(m, x):
    return m.a(x)[:, None, 1:6:2]


@rows
def a_list_of_numbers_and_a_range(m, x):
    return m.a(x)[[0, 0, 1], 1:]


@rows
def rows_that_repeat(m, x):
    return m.a(x).repeat(4, 1)


@rows
def tiles(m, x):
    return torch.tile(m.a(x), (1, 4))


@rows
def expanded(m, x):
    return m.a(x)[:, None].expand(9, 4, 6)


@rows
def interleaved(m, x):
    return m.a(x).repeat_interleave(3, 1)


@rows
def broadcast(m, x):
    return torch.zeros(5, 9, 6) + m.a(x)


@rows
def broadcast_from_a_column(m, x):
    return x + m.a(x)[:, :1]


@rows
def gathered(m, x):
    return m.a(x).gather(1, torch.zeros(9, 20, dtype=torch.long))


@rows
def selected(m, x):
    return torch.index_select(m.a(x), 1, torch.tensor([0, 0, 0, 1]))


@rows
def taken(m, x):
    return torch.take(m.a(x), torch.zeros(30, dtype=torch.long))


@covered(rows)
def narrowed(m, x):
    return m.a(x).narrow(1, 1, 3)


@covered(rows)
def chunks(m, x):
    one, two = m.a(x).chunk(2, 1)
    return one + two


@rows
def unfolded(m, x):
    return m.a(x).unfold(1, 4, 1)


@rows
def strided(m, x):
    return torch.as_strided(m.a(x), (9, 6, 4), (6, 1, 0))


@covered(rows)
def rolled_and_added(m, x):
    y = m.a(x)
    return y + y.roll(1, 1) + y.flip(1)


# ---- other operations ----


@rows
def a_product(m, x):
    return m.a(x) * m.b(x)


@covered(rows)
def a_factor(m, x):
    return m.a(x) * 9.0


@covered(rows)
def a_quotient(m, x):
    return m.a(x) / 0.01


@rows
def a_square(m, x):
    return m.a(x) ** 2


@rows
def an_exponential(m, x):
    return m.a(x).exp()


@covered(rows)
def a_softmax(m, x):
    return F.softmax(30 * m.a(x), 1)


@covered(rows)
def a_layer_norm(m, x):
    return m.b(m.ln(m.a(x)))


@covered(rows)
def a_gelu(m, x):
    return m.b(F.gelu(m.a(x)))


@rows
def an_attention(m, x):
    y = m.a(x)[None]
    return F.scaled_dot_product_attention(y, y, y)[0]


@rows
def a_matrix_product(m, x):
    return m.a(x) @ torch.ones(6, 6)


@rows
def a_gram_matrix(m, x):
    return m.a(x) @ m.a(x).T


@rows
def an_einsum(m, x):
    return torch.einsum("nc,dc->nd", m.a(x), torch.ones(6, 6))


@rows
def a_running_sum(m, x):
    return m.a(x).cumsum(1)


@covered(rows)
def joined(m, x):
    return torch.cat([m.a(x), m.b(x)], 1)


@covered(rows)
def stacked(m, x):
    y = m.a(x)
    return torch.stack([y, y, y])


@rows
def the_larger_of_two(m, x):
    return torch.maximum(m.a(x), m.b(x))


@rows
def where(m, x):
    return torch.where(m.a(x) > 0, 5.0, m.b(x))


@rows
def sorted_entries(m, x):
    return m.a(x).sort(1).values


@rows
def the_largest_entry_as_an_index(m, x):
    return F.one_hot(m.a(x).argmax(1), 6).float() * 10


@rows
def rounded(m, x):
    return (m.a(x) * 2).round()


@rows
def a_sign(m, x):
    return m.a(x).sign()


@rows
def a_fourier_transform(m, x):
    return torch.fft.fft(m.a(x)).real


@rows
def a_complex_number(m, x):
    return torch.complex(m.a(x), m.b(x)).abs()


@covered(rows)
def in_half_and_back(m, x):
    return m.b(m.a(x).half().float())


@rows
def in_bits(m, x):
    return m.a(x).view(torch.int32).bitwise_xor(1).view(torch.float32)


@rows
def sparse_and_back(m, x):
    return m.b(m.a(x).relu().to_sparse().to_dense())


@rows
def nested_and_back(m, x):
    return m.b(torch.nested.to_padded_tensor(torch.nested.nested_tensor(list(m.a(x))), 0.0))


@rows
def by_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(m.a(x))


@rows
def by_autocast_in_part(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
    return m.b(y.float())


# ---- transforms, scripts and functions of one's own ----


@torch.jit.script
def tripled(x):
    return x * 3.0


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * 3)

    @staticmethod
    def backward(ctx, change):
        return 3 * change


@rows
def a_script(m, x):
    return m.b(tripled(m.a(x)))


@rows
def a_function_of_ones_own(m, x):
    return m.b(Tripled.apply(m.a(x)))


@rows
def a_map_over_samples(m, x):
    return torch.func.vmap(lambda each: 3 * each)(m.a(x))


@rows
def a_derivative(m, x):
    return torch.func.jvp(torch.tanh, (m.a(x),), (torch.ones(9, 6),))[1]


@rows
def a_gradient(m, x):
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        (made,) = torch.autograd.grad(m.a(z).tanh().sum(), z)
    return made


@covered(rows)
def checkpointed(m, x):
    return torch.utils.checkpoint.checkpoint(lambda z: m.b(m.a(z).relu()), x, use_reentrant=False)


# ---- what is returned ----


@covered(rows)
def a_list_of_one(m, x):
    return [m.b(m.a(x).relu())]


@covered(rows)
def a_mapping_of_one(m, x):
    return {"logits": m.b(m.a(x).relu())}


@rows
def two_tensors(m, x):
    return m.a(x), m.b(x)


@rows
def the_input(m, x):
    m.a(x)
    return x


@rows
def a_number(m, x):
    return m.a(x).sum()


@rows
def a_tensor_that_is_kept(m, x):
    m.memory = torch.zeros(9, 6) if m.memory is None else m.memory
    m.memory.copy_(m.a(x).detach())
    return m.memory


# ---- images ----


@covered(images)
def an_ordinary_network(m, x):
    return m.head(F.relu(m.norm(m.b(F.relu(m.a(x))))).mean((2, 3)))


@covered(images)
def a_residual_network(m, x):
    x = F.relu(m.a(x))
    return m.head(F.relu(x + m.norm(m.b(x))).mean((2, 3)))


@images
def a_residual_sum_in_place(m, x):
    x = F.relu(m.a(x))
    y = m.norm(m.b(x))
    y += x
    return y


@images
def a_residual_difference(m, x):
    x = F.relu(m.a(x))
    return x - m.norm(m.b(x))


@images
def a_residual_sum_of_a_part(m, x):
    x = F.relu(m.a(x))
    y = m.norm(m.b(x))
    return y[:, :2] + x[:, 2:]


@covered(images)
def pooled_by_a_function(m, x):
    return F.max_pool2d(m.a(x), 3, 1)


@covered(images)
def pooled_with_a_divisor(m, x):
    return F.avg_pool2d(m.a(x), 2, 2, 0, False, True, 1)


@images
def pooled_with_indices(m, x):
    made, _ = F.max_pool2d(m.a(x), 2, return_indices=True)
    return made


@covered(images)
def pooled_to_a_size_that_overlaps(m, x):
    return F.adaptive_avg_pool2d(m.a(x), 5)


@covered(images)
def pooled_to_one(m, x):
    return m.head(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1))


@images
def enlarged(m, x):
    return F.interpolate(m.a(x), scale_factor=3)


@images
def shuffled_pixels(m, x):
    return F.pixel_shuffle(m.a(x), 2)


@images
def patches(m, x):
    return F.unfold(m.a(x), 3)


@images
def normalised_by_the_instance(m, x):
    return F.instance_norm(m.a(x))


@covered(images)
def normalised_by_groups(m, x):
    return F.group_norm(m.a(x), 2)


@images
def a_convolution_by_hand(m, x):
    return m.a(x) + F.conv2d(x, m.a.weight, padding=1)


@images
def a_mean_over_one_axis_by_position(m, x):
    return torch.mean(m.a(x), 0, True)


@covered(images)
def axes_that_move(m, x):
    return m.a(x).permute(0, 2, 3, 1).transpose(1, 2).flatten(1)


@images
def samples_into_channels(m, x):
    return m.norm(m.a(x).reshape(20, 8, 8).transpose(0, 1).reshape(-1, 4, 5, 8))


@covered(images)
def a_single_image(m, x):
    return m.a(x[0])


@images
def channels_that_are_dropped(m, x):
    return F.dropout2d(m.a(x), 0.5, True)


CONVOLUTIONS = {
    "reflecting": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "dilated": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2),
    "strided": lambda: nn.Conv2d(2, 4, 3, stride=2),
    "grouped": lambda: nn.Conv2d(2, 4, 3, groups=2),
    "same": lambda: nn.Conv2d(2, 4, 4, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1),
    "transposed in groups": lambda: nn.ConvTranspose2d(2, 4, 3, groups=2),
}


def convolution(first):
    return lambda: nn.Sequential(CONVOLUTIONS[first](), nn.ReLU(), nn.Conv2d(4, 3, 2))


def small():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))


@dataclass(frozen=True)
class Construct:
    """A model to prune, on batches of this shape, while `around` is on."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    around: Callable[[], Any] = contextlib.nullcontext

    @property
    def covered(self):
        return self.name in COVERED

    @property
    def names(self):
        """The layers to prune: not one whose weight is computed, nor two of one weight."""
        return ["0"] if self.name in FIRST_ONLY else None


def constructs():
    rows, images = (2, 9, 6), (2, 5, 2, 8, 8)
    yield from (Construct(name, partial(Body, function), rows) for name, function in ROWS.items())
    yield from (Construct(name, build, rows) for name, build in BUILT.items())
    yield from (Construct(name, small, rows, partial(everywhere, **hooks)) for name, hooks in GLOBAL.items())
    yield from (Construct(name, partial(Maps, function), images) for name, function in IMAGES.items())
    yield from (Construct(f"{name} convolution", convolution(name), images) for name in CONVOLUTIONS)

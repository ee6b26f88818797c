"""Running a model without leaving a trace: interrupts, threads, and whatever mode the caller is in."""

import copy
import os
import signal
import threading

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import convexprune as cp
from convexprune.network.interrupts import deferred, interruptible


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()


def x(samples=20):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        interrupt()
        done.append("the block goes on")
        with deferred():
            interrupt()
        done.append("and on")
    assert len(done) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_delivered_where_it_may_be():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        try:
            with interruptible():
                interrupt()
                done.append("never reached")
        finally:
            interrupt()  # a second one does not stop what puts things back
            done.append("put back")
    assert done == ["put back"]
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        interrupt()
        with interruptible():  # what waited comes now
            done.append("never reached")
    assert done == ["put back"]


def test_a_handler_of_the_callers_own_is_called():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(args[0]))
    try:
        with deferred():
            interrupt()
            assert not seen
            with interruptible():
                interrupt()
                assert len(seen) == 2
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", range(1, 16))
def test_an_interrupted_run_leaves_the_model_as_it_was(at):
    """At the n-th call of a layer."""
    network = model()
    before, calls = copy.deepcopy(network), []

    def hook(*_):
        calls.append(1)
        if len(calls) == at:
            interrupt()

    handle = network[3].register_forward_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            cp.prune(network, [x(), x()], half, mode="cascade")
            interrupt()  # the run was over before
    finally:
        handle.remove()
    assert same(network, before)
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.overrides._get_current_function_mode() is None
    assert torch.backends.mha.get_fastpath_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("modes", [["cascade"] * 4, ["parallel", "cascade", "residual", "cascade"] * 2])
def test_threads_do_not_disturb_each_other(modes):
    """Not by luck: before each walk had its own copy of the dense network, four of five of these runs went wrong."""
    network = model()
    before, found = copy.deepcopy(network), []

    def work(mode):
        found.append((mode, cp.prune(network, [x(), x(7)], half, mode=mode)[0]))

    threads = [threading.Thread(target=work, args=[mode]) for mode in modes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {mode: cp.prune(network, [x(), x(7)], half, mode=mode)[0] for mode in modes}
    assert len(found) == len(modes)
    assert all(same(each, alone[mode]) for mode, each in found)
    assert same(network, before)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), lambda: torch.device("cpu")]
)
def test_the_callers_mode_changes_nothing(mode):
    network = model()
    plain, report = cp.prune(network, [x()], half)
    with mode():
        pruned, other = cp.prune(network, [x()], half)
    assert same(plain, pruned)
    assert other.network == report.network
    pruned(x()).sum().backward()  # what comes back can be trained
    assert pruned[0].weight.grad is not None


def test_buffers_that_a_pass_edits_past_every_counter_are_put_back():
    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen.data.add_(1)
            return self.fc(x)

    network = Sly()
    cp.prune(network, [x()], half)
    assert float(network.seen) == 0


def test_a_transformer_with_a_padding_mask_is_pruned():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x, padding):
            return self.head(self.encoder(x, src_key_padding_mask=padding))

    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, batches = Encoder().eval(), [{"x": torch.randn(4, 5, 8), "padding": padding}]
    _, report = cp.prune(network, batches, half)
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"} <= {row.name for row in report.rows}


@pytest.mark.parametrize("act", [lambda m: nn.utils.prune.l1_unstructured(m[0], "weight", 0.5), "feature"])
def test_what_cannot_be_copied_is_named(act):
    network = model()
    if act == "feature":
        network.feature = network[0].weight * 2
        message = "feature is a tensor that was computed"
    else:
        act(network)
        message = "its weight is computed from other parameters"
    with pytest.raises(ValueError, match=message):
        cp.prune(network, [x()], half)

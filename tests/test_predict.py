"""What a prediction is: by the largest output, the sign of one logit, several labels, tokens, or as the caller says."""

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.bounds.difference import cannot_change, keeps_signs
from convexprune.bounds.input_sets import Box
from convexprune.bounds.relaxation import ChainPair
from convexprune.network.predict import changed, predictions


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pair(outputs, scale=1.0):
    """A network, and one whose outputs have all changed sign."""
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))
    other.load_state_dict(dense.state_dict())
    with torch.no_grad():
        other[2].weight.mul_(-scale)
        other[2].bias.mul_(-scale)
    return dense, other


def test_one_logit_is_read_by_its_sign():
    dense, other = pair(1)
    held_out, used = [torch.randn(300, 6)], [torch.randn(50, 6)]
    found = cp.certify_unseen(dense, other, held_out, used, clip=10.0)
    assert found.changed == 300  # 0 by the largest of one output
    assert found.predict == "sign"
    assert "predictions (sign) that change: 300 of 300" in str(found)
    assert not cp.worst_case(dense, other, held_out[0][:20], 0.01).unchanged.any()
    same = cp.worst_case(dense, dense, held_out[0][:20], 1e-4)
    assert same.unchanged.any()


def test_several_labels_have_to_be_named():
    dense, other = pair(3)
    with torch.no_grad():  # the largest stays the largest, the signs do not
        other.load_state_dict(dense.state_dict())
        other[2].bias += 5
    held_out, used = [torch.randn(200, 6)], [torch.randn(50, 6)]
    assert cp.certify_unseen(dense, other, held_out, used, clip=10.0).changed == 0
    assert cp.certify_unseen(dense, other, held_out, used, clip=10.0, predict="labels").changed > 150
    assert cp.worst_case(dense, other, held_out[0][:30], 1e-4).unchanged.float().mean() > 0.8
    assert cp.worst_case(dense, other, held_out[0][:30], 1e-4, predict="labels").unchanged.float().mean() < 0.5


def test_tokens_are_read_at_each_place():
    logits = torch.zeros(2, 4, 5)
    other = logits.clone()
    other[1, 3, 2] = 1.0
    assert changed(logits, other, "tokens").tolist() == [False, True]
    assert predictions(other, "tokens")[1].tolist() == [0, 0, 0, 2]

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Language()
    pruned, _ = cp.prune(
        model, [torch.randint(20, (30, 7))], lambda each: cp.Reconstruction(each, cp.Unstructured(0.1))
    )
    held_out = [torch.randint(20, (40, 7))]
    found = cp.certify_unseen(model, pruned, held_out, [torch.randint(20, (9, 7))], clip=9.0, predict="tokens")
    assert found.changed > 20
    with pytest.raises(ValueError, match=r"outputs of shape \(40, 7, 20\) do not tell what is predicted"):
        cp.certify_unseen(model, pruned, held_out, [torch.randint(20, (9, 7))], clip=9.0)


def test_a_rule_of_ones_own():
    dense, other = pair(4)
    top_two = lambda outputs: outputs.topk(2, 1).indices.sort(1).values  # noqa: E731
    found = cp.certify_unseen(dense, other, [torch.randn(99, 6)], [torch.randn(9, 6)], clip=1.0, predict=top_two)
    assert found.changed == 99
    assert found.predict == "<lambda>"


@pytest.mark.parametrize("seed", range(6))
def test_steady_signs_are_steady_at_every_point(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights, others = [draw(7, 4), draw(3, 7)], [draw(7, 4), draw(3, 7)]
    biases = [draw(7), draw(3)]
    chain = ChainPair(weights, biases, [w + 0.05 * o for w, o in zip(weights, others, strict=True)], biases)
    center = draw(40, 4)
    for radius in (0.001, 0.05):
        box = Box(center, radius)
        steady = keeps_signs(chain, box)
        points = center[:, None] + radius * (2 * torch.rand(40, 200, 4, generator=generator, dtype=torch.float64) - 1)
        z, zhat = chain.run(points)
        sign = chain.run(center)[0][:, None] > 0
        really = ((z > 0) == sign).all(2).all(1) & ((zhat > 0) == sign).all(2).all(1)
        assert not bool((steady & ~really).any())
        assert steady.any()
        assert not bool((steady & ~keeps_signs(chain, Box(center, radius / 2))).any())
    assert cannot_change(chain, Box(center, 0.001)).any()


@pytest.mark.parametrize(
    ("predict", "outputs", "error", "message"),
    [
        ("argmax", 3, ValueError, "predict is 'argmax'; it must be one of 'classes'"),
        (3, 3, TypeError, "predict is 3"),
        ("classes", 1, ValueError, "is always the same class; use 'sign'"),
        ("sign", 3, ValueError, "predict='sign' does not fit outputs of shape"),
        ("tokens", 3, ValueError, "predict='tokens' does not fit"),
        (lambda outputs: outputs.argmax(), 3, ValueError, "a row for each of"),
    ],
)
def test_wrong_rules(predict, outputs, error, message):
    dense, other = pair(outputs)
    with pytest.raises(error, match=message):
        cp.certify_unseen(dense, other, [torch.randn(9, 6)], [torch.randn(9, 6)], clip=1.0, predict=predict)


def test_a_sample_is_held_out_once():
    dense, other = pair(3)
    x = torch.randn(9, 6)
    with pytest.raises(ValueError, match="sample 1 of held-out batch 1 is held out twice"):
        cp.certify_unseen(dense, other, [x, torch.cat([torch.randn(1, 6), x[:1]])], [torch.randn(9, 6)], clip=1.0)

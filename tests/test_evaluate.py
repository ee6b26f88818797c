"""What a pruned model loses on data, with intervals."""

import math

import pytest
import torch
from torch import nn

import convexprune as cp


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Words(nn.Module):
    """A language model that answers by logits among other things."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        return {"hidden": hidden, "logits": self.head(hidden)}


class Last(nn.Module):
    """Always says the first class."""

    def forward(self, x):
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def test_a_language_model_by_hand():
    dense, pruned = Words(), Words()
    batches = [{"input_ids": torch.randint(0, 11, (size, 7))} for size in (5, 3)]
    found = cp.evaluate(dense, pruned, batches)
    assert (found.kind, found.samples) == ("language model", 8)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        one, other = (model(tokens)["logits"][:, :-1].log_softmax(2) for model in (dense, pruned))
    next_tokens = tokens[:, 1:, None]
    loss = -float(other.gather(2, next_tokens).mean())
    assert found.measures["perplexity, pruned"].value == pytest.approx(math.exp(loss), rel=1e-5)
    same = float((one.argmax(2) == other.argmax(2)).float().mean())
    assert found.measures["same next token"].value == pytest.approx(same)
    divergence = float((one.exp() * (one - other)).sum(2).mean())
    assert found.measures["KL a token, nats"].value == pytest.approx(divergence, rel=1e-5)
    assert found.measures["KL a token, nats"].low < divergence < found.measures["KL a token, nats"].high


def test_a_classifier_with_labels():
    dense, pruned = nn.Linear(4, 3), nn.Linear(4, 3)
    x, labels = torch.randn(50, 4), torch.randint(0, 3, (50,))
    measures = cp.evaluate(dense, pruned, [x[:20], x[20:]], [labels[:20], labels[20:]]).measures
    with torch.no_grad():
        one, other = dense(x).argmax(1), pruned(x).argmax(1)
        error = float((pruned(x) - dense(x)).norm() / dense(x).norm())
    assert measures["relative output error"].value == pytest.approx(error, rel=1e-5)
    assert measures["same class"].value == pytest.approx(float((one == other).float().mean()))
    assert measures["accuracy, pruned"].value == pytest.approx(float((other == labels).float().mean()))


def test_intervals_hold_the_mean_about_as_often_as_they_say():
    held = 0
    for _ in range(200):
        x = torch.nn.functional.one_hot((torch.rand(200) < 0.3).long(), 2).float()  # 30% in the second class
        found = cp.evaluate(nn.Identity(), Last(), [x]).measures["same class"]
        held += found.low <= 0.7 <= found.high
    assert 180 <= held <= 199  # of 95%, four standard errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cp.evaluate(nn.Linear(4, 3), nn.Linear(4, 2), [torch.randn(5, 4)]), "shapes"),
        (lambda: cp.evaluate(nn.Linear(4, 3), nn.Linear(4, 3), [torch.randn(5, 4)], [torch.zeros(4)]), "labels"),
    ],
)
def test_what_cannot_be_compared_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()

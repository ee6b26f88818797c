"""The scripts of benchmarks/papers on tiny data: every part runs, and says what its table promises."""

import pytest
import torch
from papers import joint_allocation, lobs, merging, net_trim, networks
from torch import nn


@pytest.fixture(scope="module")
def spiral():
    torch.manual_seed(0)
    x, y = networks.spirals(400)
    return networks.fit(networks.spiral_network(12), x, y, 40, rate=1e-2)


def cells(text):
    """The rows of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_spirals_are_two_classes_that_no_line_parts():
    x, y = networks.spirals(400)
    assert x.shape == (400, 2)
    assert y.bincount().tolist() == [200, 200]
    found = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], 1), 2.0 * y[:, None] - 1).solution
    assert ((torch.cat([x, torch.ones(400, 1)], 1) @ found)[:, 0].sign() == 2 * y - 1).float().mean() < 0.8


def test_ours_is_feasible_on_the_spirals(spiral):
    batches = [networks.spirals(200)[0]]
    build = net_trim.cascade_of(0.05)
    ours, report = net_trim.trimmed(spiral, batches, build, "cascade")
    assert max(row.certificate.violation for row in report.rows) < 1e-5
    best = net_trim.fewest(spiral, ours, batches, 1.0, epochs=1, rounds=1)
    assert sum(net_trim.nonzeros(best)) < sum(net_trim.nonzeros(ours))


def test_the_published_point_is_judged(spiral):
    """More steps of the authors' ADMM come nearer to the ball."""
    batches = [networks.spirals(200)[0]]
    most = []
    for steps in (10, 300):
        _, found = net_trim.published(
            spiral, batches, ["fc1", "fc2", "fc3"], net_trim.cascade_of(0.05), True, steps=steps
        )
        most.append(max(each.certificate.violation for each in found))
    assert most[1] < most[0]


def test_net_trims_tables(spiral):
    rows = cells(net_trim.spirals_part(points=100, steps=20, epochs=1, model=spiral))
    assert rows[0][1] == "published"
    assert rows[3][1] == "362/2663/131, 0.046"
    rows = cells(net_trim.widths_part(points=100, steps=20, epochs=1, networks=[(12, False, spiral)]))
    assert rows[2][0] == "12-12"


def test_the_recovery_table_counts_samples():
    rows = cells(net_trim.recovery_part(inputs=(12,), sparsities=(1,), trials=4, figure=False))
    assert int(rows[2][2]) <= int(rows[2][5])


def test_a_part_is_written_with_its_command(tmp_path):
    networks.write_parts("paper", {"one": lambda: "| a |"}, [], tmp_path)
    assert "`python -m papers.paper one`" in (tmp_path / "paper_one.md").read_text()


@pytest.fixture(scope="module")
def images():
    """Images of 28 x 28 in ten classes: a bright row says which; the same for training and test."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 10
    x = 0.2 * torch.rand(200, 1, 28, 28, generator=generator)
    x[torch.arange(200), 0, 2 * y + 4] += 1
    return x, y, x, y


@pytest.fixture(scope="module")
def small_lenet(images):
    """The layers of Caffe's LeNet by name, but few channels."""
    torch.manual_seed(0)
    model = networks.caffe_lenet()
    model.conv1, model.conv2 = nn.Conv2d(1, 3, 5), nn.Conv2d(3, 4, 5)
    model.fc1, model.fc2 = nn.Linear(64, 30), nn.Linear(30, 10)
    return networks.fit(model, *images[:2], 30, rate=1e-2, batch=50)


def test_the_networks_have_the_papers_sizes():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(networks.caffe_lenet()) == 431_080
    wide = networks.wide_lenet()
    assert (wide.fc1.weight.numel(), wide.fc2.weight.numel()) == (1_605_632, 5_120)
    assert wide(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_net_trims_lenet(images):
    torch.manual_seed(0)
    model = networks.wide_lenet()
    model.conv1, model.conv2 = nn.Conv2d(1, 2, 5, padding=2), nn.Conv2d(2, 2, 5, padding=2)
    model.fc1, model.fc2 = nn.Linear(98, 12), nn.Linear(12, 10)
    networks.fit(model, *images[:2], 10, rate=1e-2, batch=50)
    rows = cells(net_trim.lenet_part(model, images, count=100, steps=10, tune=2, limit=5))
    assert rows[2][0] == "published"
    assert len(rows) == 7
    rows = cells(net_trim.convolutions_part(count=4, epsilons=(0.2,), limit=5, model=model, data=images))
    assert rows[2][0] == "0.2"


def test_lobs_tables(images, small_lenet):
    task = lobs.Task(small_lenet, *images, count=100, batch=50)
    rows = cells(lobs.lenet5_part(task, steps=2))
    assert [row[0] for row in rows[2:4]] == ["L-OBS, as published", "ours"]
    assert len(cells(lobs.lenet5_iterative_part(task, (2, 2)))) == 4
    pruned = task.ours(dict.fromkeys(lobs.FIRST_5, 0.5))
    again = task.retrained(pruned, 3)
    assert torch.equal(again.fc1.weight == 0, pruned.fc1.weight == 0)
    assert lobs.kept(pruned, {"fc1": 0.5}) == 0.5


def test_a_random_choice_keeps_so_many(small_lenet, images):
    task = lobs.Task(small_lenet, *images, count=50)
    assert lobs.kept(task.pruned({"fc1": 0.25}, lobs.Random()), {"fc1": 0.25}) == 0.25


def test_merging_in_its_ways(images, small_lenet):
    rows = cells(merging.lenet_part((10, 20), 50, 2, small_lenet, images, figure=False))
    assert len(rows[0]) == len(rows[2]) == 9
    assert any(row[0].endswith("(the published cut-off)") for row in rows[2:])


def test_removal_by_least_squares_is_the_best_single_one(images, small_lenet):
    """OBS for neurons takes the neuron whose removal least squares mends best."""
    body, head = networks.parted(small_lenet)
    inputs = networks.features(body, images[0][:100])
    with torch.no_grad():
        hidden, target = head[1](head[0](inputs)).double(), head(inputs).double()
    error = {}
    for j in range(30):
        part = torch.cat([hidden[:, [i for i in range(30) if i != j]], torch.ones(100, 1)], 1)
        error[j] = float((part @ torch.linalg.lstsq(part, target, driver="gelsd").solution - target).square().sum())
    small = merging.least_missed(head, inputs, {29})[29]
    with torch.no_grad():
        left = float((small(inputs).double() - target).square().sum())
    scale = float(target.square().sum())
    assert left <= min(error.values()) + 1e-4 * scale


def test_joint_allocations_tables():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.conv1, model.relu, model.conv2 = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)
    model.flatten, model.fc = nn.Flatten(), nn.Linear(6 * 16, 3)
    x = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        tests = x, model(x).argmax(1)
    case = joint_allocation.Case(model.eval(), x, tests, images=10, levels=(0.1, 0.3, 0.6, 1.0))
    rows = cells(joint_allocation.oneshot_part(case, (0.5,)))
    assert {"uniform", "as published", "ours"} <= {row[0] for row in rows}
    rows = cells(joint_allocation.variants_part(case, (0.5,), (1, 8, 8)))
    assert [row[0] for row in rows[2:]] == ["mean distortion", "worst case", "N(0, 1) inputs"]
    assert len(cells(joint_allocation.additive_part(case, (0.6,), figure=False))) == 3
    assert len(cells(joint_allocation.retrained_part(case, 0.4, 1))) == 5
    rows = cells(joint_allocation.time_part(cases=((3, 4),), budget=200, repeats=1))
    assert float(rows[2][-1]) >= -1e-9

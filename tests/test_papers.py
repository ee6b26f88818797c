"""The scripts of benchmarks/papers on tiny data: every part runs, and says what its table promises."""

import pytest
import torch
from papers import net_trim, networks


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

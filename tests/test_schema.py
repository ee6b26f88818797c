"""The JSON Schema beside the package: up to date, and met by reports of every kind."""

import json
from dataclasses import replace

import pytest
import torch

import convexprune as cp
from convexprune.report import schema


def broken(value, rule, where="report"):
    """The places where a value does not meet a schema, of the words that ours uses."""
    known = {"anyOf", "enum", "const", "type", "properties", "required", "additionalProperties", "items", "prefixItems",
             "minItems", "title", "$schema"}  # fmt: skip
    assert set(rule) <= known
    if "anyOf" in rule:
        return [] if any(not broken(value, each) for each in rule["anyOf"]) else [where]
    if "enum" in rule or "const" in rule:
        return [] if value in rule.get("enum", [rule.get("const")]) else [where]
    kinds = {"number": (int, float), "integer": int, "string": str, "boolean": bool, "null": type(None),
             "array": list, "object": dict}  # fmt: skip
    if not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) and rule["type"] != "boolean"):
        return [where]
    found = [f"{where}.{name}" for name in rule.get("required", []) if name not in value]
    if isinstance(value, dict):
        for name, each in value.items():
            inside = rule.get("properties", {}).get(name, rule.get("additionalProperties"))
            found += [f"{where}.{name}"] if inside is None else broken(each, inside, f"{where}.{name}")
    if isinstance(value, list):
        rules = rule.get("prefixItems", [])
        if rules and len(value) != len(rules):
            return [where]
        for place, each in enumerate(value):
            found += broken(each, rules[place] if rules else rule["items"], f"{where}[{place}]")
    return found


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    batches = [torch.randn(60, 6)]
    held_out = [torch.randn(800, 6)]
    goal = cp.RiskGoal(cp.OutputError(clip=1e3), 900.0, held_out, path=(0.01,))
    return [
        cp.prune(model, batches, lambda layer: cp.NetTrim(layer, 0.1))[1],
        cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), mode="cascade")[1],
        cp.prune(model, batches, lambda layer: cp.NetTrim(layer, 0.1) if layer.name == "0" else None)[1],
        cp.prune(model, batches, allocation=cp.Allocation(0.5))[1],
        cp.prune_within(model, batches, goal)[1],
        cp.prune_within(model, batches, 0.5)[1],
    ]


def test_the_file_is_up_to_date():
    assert schema.FILE.read_text() == schema.text(), "run python -m convexprune.report.schema"


def test_reports_meet_it(pruned):
    rule = json.loads(schema.FILE.read_text())
    for report in pruned:
        assert broken(json.loads(report.to_json()), rule) == []


def test_what_is_no_report_does_not_meet_it(pruned):
    rule = json.loads(schema.FILE.read_text())
    content = json.loads(pruned[0].to_json())
    assert broken({**content, "schema": 2}, rule) == ["report.schema"]
    assert broken({**content, "kept": "3"}, rule) == ["report.kept"]
    assert broken({**content, "more": 1}, rule) == ["report.more"]
    del content["rows"][0]["certificate"]["bound"]
    assert broken(content, rule) == ["report.rows[0].certificate"]
    infinite = replace(pruned[0].network, guaranteed=float("inf"))
    assert broken(json.loads(replace(pruned[0], network=infinite).to_json()), rule) == []

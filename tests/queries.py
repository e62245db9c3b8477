"""The PromQL of our alerts and dashboard, and what it asks for."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import promql_parser
import yaml

from config.settings import ROOT

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "moderato.json"

ADDED_BY_PROMETHEUS = {"job", "instance"}

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Labels and values, by the sample's name."""


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Every query, by the place where it stands."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    of_dashboard = {
        f"{panel['title']}, {target['refId']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", [])
    }
    return {rule["alert"]: rule["expr"] for rule in alerts()} | of_dashboard


def unanswerable(query: str, samples: Samples) -> list[str]:
    """What a query asks for and no process exposes: a metric, a label, a label's value.

    Raises:
        ValueError: it is no PromQL.
    """
    return [problem for node in _nodes(promql_parser.parse(query)) for problem in _problems(node, samples)]


def _problems(node: Any, samples: Samples) -> Iterator[str]:
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        inside = [each for each in _nodes(node.expr) if isinstance(each, promql_parser.VectorSelector)]
        known = ADDED_BY_PROMETHEUS.union(*(_labels(str(each.name), samples) for each in inside))
        yield from (f"no {label} to group by" for label in node.modifier.labels if label not in known)
    if not isinstance(node, promql_parser.VectorSelector) or node.name == "up":
        return
    if node.name is None or node.name not in samples:
        yield f"no metric {node.name}"
        return
    for matcher in node.matchers.matchers:
        if matcher.name in ADDED_BY_PROMETHEUS:
            continue
        values = {labels.get(matcher.name) for labels, _ in samples[node.name]}
        is_pattern = matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe)
        for asked in matcher.value.split("|") if is_pattern else [matcher.value]:
            if not any(value is not None and re.fullmatch(asked, value) for value in values):
                yield f"no {node.name} with {matcher.name}={asked!r}"


def _labels(name: str, samples: Samples) -> set[str]:
    return {label for labels, _ in samples.get(name, []) for label in labels}


def _nodes(node: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        part = getattr(node, name, None)
        for each in part if isinstance(part, list) else [part]:
            if isinstance(each, promql_parser.Expr) or type(each).__module__.startswith("promql_parser"):
                yield from _nodes(each)

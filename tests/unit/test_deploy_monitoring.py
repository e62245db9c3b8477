"""The alert rules and the dashboard as they are written; what they ask for is tested beside a real worker."""

import json
import re
import shutil
import subprocess

import pytest

from config.settings import ROOT
from tests.queries import ALERTS, DASHBOARD, alerts, queries, unanswerable

OPERATIONS = ROOT / "docs" / "operations.md"
SAMPLES = {"a_total": [({"reason": "bad"}, 1.0), ({"reason": "worse"}, 0.0)]}


@pytest.mark.parametrize(
    ("query", "problems"),
    [
        ('sum by (reason) (rate(a_total{reason=~"bad|worse"}[5m])) > 0', []),
        ("max by (job, instance) (a_total)", []),
        ("b_total", ["no metric b_total"]),
        ("sum by (cause) (increase(a_total[1h]))", ["no cause to group by"]),
        ('1 - a_total{reason="worst"} / a_total', ["no a_total with reason='worst'"]),
        ('a_total{reason!~"bad|worst"} and on () up == 1', ["no a_total with reason='worst'"]),
        (
            'histogram_quantile(0.9, sum by (le) (rate(c_bucket{reason!=""}[5m])))',
            ["no le to group by", "no metric c_bucket"],
        ),
    ],
)
def test_what_a_query_asks_for(query: str, problems: list[str]) -> None:
    assert unanswerable(query, SAMPLES) == problems


def test_what_is_no_promql_is_told() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        unanswerable("sum by (", SAMPLES)


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"]["summary"], name
        # GitHub's anchor of the heading that is the alert's name
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_what_each_alert_means_stands_in_the_operations_manual() -> None:
    headings = re.findall(r"^#+ (\w+)$", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {rule["alert"] for rule in alerts()} <= set(headings)


def test_the_dashboard_asks_the_data_source_that_is_chosen_in_it() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    board = json.loads(text)
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
    assert set(re.findall(r'"uid": "(.*)"', text)) == {"moderato", "${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len(queries()) > 40


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml")],
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

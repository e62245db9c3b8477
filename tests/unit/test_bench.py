"""The benchmark's pure parts: figures, ratios, the search for a setting, and what is drawn from a stored run."""

import base64
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.engines import cut_where_full
from bench.measure import Line, at_least, at_most, best_setting, percentile, ratios, spelled
from bench.report import Report, draw, new_report, shown, table
from bench.system import Envelopes, distinct_texts

LINES = [
    Line("efficiency", "lists of 64, SQLite", (0.95, 0.97, 0.99), "x", at_least(0.95)),
    Line("efficiency", "the engine alone", (160.0,), "comments/s", charted=False),
    Line("latency", "idle, p50", (14.0,), "ms", at_most(5.0), note="120 comments"),
]


@pytest.fixture
def report() -> Report:
    report = new_report("python -m bench", quick=True)
    report.sections = {"efficiency": "Efficiency", "latency": "Latency"}
    report.lines = list(LINES)
    return report


def test_a_percentile_is_a_sample_that_so_many_do_not_exceed() -> None:
    samples = [float(value) for value in range(100, 0, -1)]
    assert [percentile(samples, percent) for percent in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7
    with pytest.raises(ValueError, match="at least one sample"):
        percentile([], 50)


def test_a_line_gives_its_median_and_spread_and_holds_them_against_the_aim() -> None:
    line = LINES[0]
    assert (line.low, line.median, line.high, line.reached) == (0.95, 0.97, 0.99, True)
    assert LINES[1].reached is None
    assert LINES[2].reached is False


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == (2.0, 3.0)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_the_search_goes_along_one_setting_after_the_other() -> None:
    # Given rates that are best with two workers and then with batches of 16
    rates = {(1, 64): 10.0, (2, 64): 20.0, (2, 16): 30.0, (2, 4): 5.0}
    # When the best setting is looked for
    search = best_setting(
        {"workers": [1, 2], "batch_size": [64, 16, 4]}, lambda s: rates[s["workers"], s["batch_size"]]
    )
    # Then it is found, and batches were tried with the better number of workers only
    assert (search.best, search.rate) == ({"workers": 2, "batch_size": 16}, 30.0)
    assert [tuple(setting.values()) for setting, _ in search.tried] == list(rates)
    assert spelled(search.best) == "workers 2, batch size 16"


def test_sorted_texts_are_cut_where_the_budget_is_full() -> None:
    assert cut_where_full([9, 2, 3, 2], 6) == [[1, 3], [2], [0]]


def test_messages_are_made_by_the_pattern_of_a_real_one() -> None:
    # Given a message as kombu writes it
    body = base64.b64encode(json.dumps([[[{"text": "x"}]], {}, {"chain": None}]).encode()).decode()
    pattern = {
        "body": body,
        "headers": {"id": "a-b-c", "submitted_at": 12.5},
        "properties": {"correlation_id": "a-b-c"},
    }
    envelopes = Envelopes(json.dumps(pattern).encode())
    # When two are made
    first, second = (json.loads(message) for message in envelopes.comments(["one", 'a "second"'], 1))
    # Then each has its own text and id, and is otherwise the same
    assert json.loads(base64.b64decode(second["body"])) == [[[{"text": 'a "second"'}]], {}, {"chain": None}]
    assert first["headers"]["id"] == first["properties"]["correlation_id"] != second["headers"]["id"]
    assert first["headers"]["submitted_at"] == 12.5
    # And another time where one is given
    assert json.loads(envelopes.message([[]], submitted_at=99.25))["headers"]["submitted_at"] == 99.25


def test_texts_do_not_repeat() -> None:
    assert distinct_texts(["a", "b"], 5) == ["a", "b", "a 1", "b 1", "a 2"]
    assert distinct_texts(["a", "b"], 2, start=4) == ["a 2", "b 2"]


def test_a_stored_run_is_read_printed_and_drawn_again(report: Report, tmp_path: Path) -> None:
    # Given a run that was stored
    stored = tmp_path / "run.json"
    report.write(stored)
    # When it is read
    again = Report.read(stored)
    # Then it is the same, and a table and a chart are made of it
    assert again == report
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(table("Efficiency", again.of("efficiency")))
    printed = console.export_text()
    assert "0.97 ×" in printed
    assert "≥ 0.95 ✓" in printed
    console.file.close()
    draw(again, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_figures_show_the_digits_that_mean_something() -> None:
    assert [shown(value) for value in (12_345.6, 45.67, 0.8123)] == ["12,346", "45.7", "0.81"]

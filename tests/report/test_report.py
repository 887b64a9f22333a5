"""What people read: the sentence, the page, the plots, and the command that makes them again."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_report.cli import main
from disagg_report.folder import read_report, write_rate
from disagg_report.open_loop import OpenLoopClient
from disagg_report.plots import NoPlots, draw
from disagg_report.records import Measurement, Shot
from disagg_report.summary import summary
from disagg_report.verdict import verdict
from tests.report.make import POWER, measured, setup, shot, written

GOOD = [measured(4, 200), measured(8, 190, 10), measured(16, 50, 150)]


def says(folder: Path) -> str:
    return verdict(read_report(folder))


def test_one_setup_in_one_sentence(tmp_path: Path) -> None:
    written(tmp_path, {"1 prefill + 1 decode": GOOD})
    assert says(tmp_path) == (
        "1 prefill + 1 decode serves 7.60 requests/s within the SLO (highest rate kept: 8/s)."
    )  # fmt: skip


def test_the_best_split_and_how_much_better_it_is(tmp_path: Path) -> None:
    worse = [measured(4, 200), measured(8, 100, 100)]
    written(
        tmp_path, {"1 prefill + 3 decode": worse, "2 prefill + 2 decode": GOOD, "3 prefill + 1 decode": worse}, "ratio"
    )
    assert says(tmp_path) == (
        "Most requests within the SLO are served by 2 prefill + 2 decode: 7.60 requests/s, 1.90 times as many as the"
        " next (1 prefill + 3 decode 4.00, 3 prefill + 1 decode 4.00)."
    )


ELASTIC = "Elastic placement on 1 prefill + 1 decode"


def elastic_report(folder: Path, plain: list[Measurement] | None, chose: dict[str, int]) -> Path:
    """Elastic placement beside two splits, and plain engines if they were measured."""
    worse = [measured(4, 200), measured(8, 100, 100)]
    elastic = [measured(4, 200), measured(8, 200, placed=chose), measured(16, 50, 150, placed={"split": 1})]
    setups = {"1 prefill + 2 decode": worse, "2 prefill + 1 decode": GOOD, ELASTIC: elastic}
    written(folder, setups if plain is None else {**setups, "3 plain engines": plain}, "ratio")
    for place, kind in ((3, "elastic"), (4, "plain")):
        for path in folder.glob(f"setups/{place:02d}-*/setup.json"):
            path.write_text(path.read_text().replace('"kind": "pd"', f'"kind": "{kind}"'))
    return folder


def test_what_elastic_chose_and_what_the_others_served(tmp_path: Path) -> None:
    chose = {"split": 120, "decode_alone": 80, "prefill_alone": 0}
    folder = elastic_report(tmp_path, [measured(4, 200), measured(8, 0, 200)], chose)
    assert says(folder) == (
        f"{ELASTIC} serves 8.00 requests/s within the SLO; at 8/s it chose: split 60%, decode alone 40%; the best"
        " static split (2 prefill + 1 decode): 7.60, so elastic serves 1.05 times as many; plain engines"
        " (3 plain engines): 4.00, so elastic serves 2.00 times as many. All figures are measured."
    )
    page = summary(read_report(folder), [])
    assert "- At 8 requests/s requests were placed: split 60%, decode alone 40%." in page


def test_elastic_beside_what_was_not_measured_or_served_nothing(tmp_path: Path) -> None:
    assert "; plain engines: not measured. All" in says(elastic_report(tmp_path / "one", None, {}))
    text = says(elastic_report(tmp_path / "two", [measured(4, 0, 200)], {}))
    assert "; plain engines: the SLO was kept at no rate that was tried." in text and "it chose" not in text


def test_a_small_difference_is_none(tmp_path: Path) -> None:
    written(tmp_path, {"a": [measured(8, 200), measured(9, 0, 200)], "b": [measured(8, 194, 6), measured(9, 0, 200)]})
    assert says(tmp_path).startswith("a and b serve equally many requests within the SLO as far as this can tell: 8.00")


def test_reservations_are_part_of_the_verdict(tmp_path: Path) -> None:
    written(tmp_path, {"a": [measured(4, 20)]})
    assert "limit was not reached with a" in says(tmp_path) and "Fewer than 100 requests" in says(tmp_path)


def test_nothing_kept_and_nothing_measured(tmp_path: Path) -> None:
    written(tmp_path / "one", {"a": [measured(1, 0, 200)]})
    assert says(tmp_path / "one") == "a kept the SLO at no rate that was tried."
    written(tmp_path / "two", {"a": [measured(1, 0, 200)], "b": [measured(1, 1, 200)]})
    assert says(tmp_path / "two").startswith("None of the setups kept the SLO")
    written(tmp_path / "none", {"a": []})
    assert says(tmp_path / "none") == "Nothing was measured."


def test_a_rate_that_was_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    written(tmp_path, {"a": [measured(4, 200), measured(8, 30, interrupted=True), measured(16, 0, 200)]})
    assert "4.00 requests/s" in says(tmp_path)
    assert "| 8 | 30 | 30 | 100% | 8.00 | cut short |" in summary(read_report(tmp_path), [])


def test_the_page_has_the_figures_the_power_and_the_warnings(tmp_path: Path) -> None:
    late = tuple(shot(late_ms=80.0) for _ in range(120))
    rates = [measured(4, 200, power=POWER), Measurement(8, 15, (*late, Shot(error="HTTP 503: a|b")), client_cpu=0.97)]
    written(tmp_path, {"pd": rates}, simulated=True)
    page = summary(read_report(tmp_path), [], "matplotlib is not installed")
    assert "SIMULATED ENGINES" in page and "None: matplotlib is not installed" in page
    assert "prefill GPUs W / J per output token" in page and "400 / 4.000" in page and "300 / 3.000" in page
    assert "| 4 | 200 | 200 | 100% | 4.00 | kept | 50 / 50 | 10.0 / 10.0 | 10.0 / 10.0 |" in page
    assert "At 8 requests/s the load generator itself could not keep up" in page and "97% of a core" in page
    assert "Failed at 8 requests/s, 1 in all, such as: `HTTP 503: a/b`" in page
    assert "| vLLM | 0.26.0 |" in page
    # Every row of a table has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_real_engines_are_not_called_simulated(tmp_path: Path) -> None:
    report = read_report(written(tmp_path, {"pd": GOOD}))
    assert "SIMULATED" not in summary(report, []) and "project's own" not in summary(report, [])
    own = replace(report.setups[0], setup=setup("s", "pd", client=OpenLoopClient.name, no_power="there is no driver"))
    page = summary(replace(report, setups=(own,)), [])
    assert "**Load generator: the project's own**" in page and "Power was not measured: there is no driver." in page


def test_plots_of_several_setups(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = read_report(written(tmp_path, {"1 prefill + 1 decode": GOOD, "2 plain engines": GOOD[:2]}, "ratio", True))
    paths = draw(report, tmp_path)
    assert [path.name for path in paths] == ["ttft.svg", "inter_token_latency.svg", "goodput.svg", "capacity.svg"]
    for path in paths:
        text = path.read_text()
        assert "SIMULATED" in text and "2 plain engines" in text
    assert "7.60" in paths[3].read_text() and "4.00 or more" not in paths[3].read_text()
    assert "7.60 or more" in paths[3].read_text()  # the plain engines were not tried higher
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw(report, tmp_path)] == before


def test_no_plots_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoPlots, match="no rate was measured"):
        draw(read_report(written(tmp_path, {"a": [measured(8, 3, interrupted=True)]})), tmp_path)


def test_without_matplotlib_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written(tmp_path, {"a": GOOD})
    assert main(["write", str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert "pip install -r requirements-report.txt" in page and "python -m disagg_report plots" in page
    assert main(["plots", str(tmp_path)]) == 1
    assert "requirements-report.txt" in capsys.readouterr().err


def test_pages_and_plots_are_made_later_from_what_is_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, {"a": GOOD})
    assert main(["plots", str(tmp_path)]) == 0
    assert "![ttft](ttft.svg)" in (tmp_path / "summary.md").read_text() and (tmp_path / "ttft.svg").exists()
    assert main(["write", str(tmp_path), "--slo-ttft-ms", "1000"]) == 0  # another question of the same requests
    assert "a serves 16.00 requests/s within the SLO" in capsys.readouterr().out


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["write", str(tmp_path)]) == 1
    assert "report.json" in capsys.readouterr().err


@pytest.mark.parametrize("rates", ["0", "1 x", "-1", "nan"])
def test_bad_rates_are_refused(tmp_path: Path, rates: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["sweep", str(tmp_path), "--url", "u", "--name", "n", "--title", "t", "--model", "m", f"--rates={rates}"])
    assert raised.value.code == 2


def test_a_rate_written_twice_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "setups/01-s0"
    written(tmp_path, {"a": [measured(4, 10)]})
    write_rate(folder, measured(4, 20))
    assert [len(one.shots) for one in read_report(tmp_path).setups[0].rates] == [20]

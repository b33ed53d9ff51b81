"""`benchmarks/margin.py`: its AUROC against counting pairs, its interval, and the table between the markers."""

import importlib.util

import numpy as np
import pytest

from helpers.paths import REPOSITORY


@pytest.fixture(scope="module")
def benchmark():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec = importlib.util.spec_from_file_location("margin_benchmark", REPOSITORY / "benchmarks" / "margin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def test_auroc_is_the_share_of_pairs(benchmark):
    generator = np.random.default_rng(0)
    margins, refused = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in margins[refused] for b in margins[~refused]]
    assert benchmark.auroc(margins, refused) == pytest.approx(np.mean(pairs))
    assert np.isnan(benchmark.auroc(margins, np.ones(40, dtype=bool)))


def made_up(stage, count=30):
    generator = np.random.default_rng(len(stage))
    rows = []
    for kind in ("harmful", "advbench", "ordinary"):
        for k in range(count):
            margin = float(generator.normal())
            refused = bool(margin + 0.5 * generator.normal() > 0)
            row = {"kind": kind, "prompt": f"{kind} {k}", "refused": refused, "counts": k != 3, "margin": margin}
            rows.append(row)
    return rows


def test_the_table_and_where_it_goes(benchmark, tmp_path):
    rows = {stage: made_up(stage) for stage in benchmark.STAGES}
    rows[benchmark.STAGES[1]] = [row | {"refused": True} for row in rows[benchmark.STAGES[1]]]
    lines = benchmark.table(rows, 200)
    assert len(lines) == 2 + 3 * 4
    first, aligned, pooled = lines[2], lines[3], lines[5]
    own = [row for row in rows[benchmark.STAGES[0]] if row["kind"] == "harmful" and row["counts"]]
    value = benchmark.auroc(np.array([r["margin"] for r in own]), np.array([r["refused"] for r in own]))
    assert f"| {value:.3f} (" in first and "29 of 30" in first
    assert aligned.endswith("| – |") and "87 of 90" in pooled  # nothing to tell apart; all three
    low, high = first.rsplit("(", 1)[1].split(")")[0].split(" to ")
    assert float(low) < value <= float(high) <= 1
    document = tmp_path / "page.md"
    first, last = (f"<!-- {which} benchmarks/margin.py -->" for which in ("made by", "end of"))
    document.write_text(f"before\n\n{first}\n\nold\n\n{last}\n\nafter\n")
    benchmark.write_between(document, benchmark.SCRIPT, lines)
    text = document.read_text()
    assert "old" not in text and lines[4] in text and text.startswith("before") and text.endswith("after\n")
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        benchmark.write_between(document, benchmark.SCRIPT, lines)

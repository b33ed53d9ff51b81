"""What `benchmarks/optimiser.py` decides by: the next learning rate, where two losses meet, what it writes where."""

import importlib.util
import math
import sys

import pytest

from helpers.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("optimiser_benchmark", REPOSITORY / "benchmarks" / "optimiser.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_the_learning_rate_is_found_in_few_tries(benchmark, slope):
    reached = lambda rate: 0.7 * rate**slope / (1 + 0.1 * rate)  # noqa: E731
    tried, target = [(0.5, reached(0.5))], 0.3
    while abs(tried[-1][1] / target - 1) > 0.05:
        rate = benchmark.next_rate(tried, target)
        tried.append((rate, reached(rate)))
    assert len(tried) <= 4


def test_a_diverged_run_lowers_the_rate(benchmark):
    assert benchmark.next_rate([(1.0, 1e6)], 1.0) == pytest.approx(1 / 30)


@pytest.mark.parametrize("level", [0.98, 0.81, 0.5, 0.31, 0.2502])
@pytest.mark.parametrize("interval", [1, 3, 50])
def test_the_meeting_of_losses_is_the_nearest_step_and_is_found_by_halving(benchmark, level, interval):
    steps = [*range(0, 150, interval), 150]
    asked = set()

    def loss(step):
        asked.add(step)
        return 0.25 + 0.75 * math.exp(-step / 20)

    found = benchmark.where_it_meets(steps, loss, level)
    assert len(asked) <= benchmark.LOSSES + 1 + math.ceil(math.log2(len(steps)))
    assert found == min(steps, key=lambda step: abs(loss(step) - level))


def test_the_first_crossing_counts_where_a_loss_rises_again(benchmark):
    steps = list(range(41))
    loss = {step: abs(step - 20) / 20 for step in steps}
    assert benchmark.where_it_meets(steps, loss.__getitem__, 0.5) == 10
    assert benchmark.where_it_meets(steps, loss.__getitem__, 1.0) == 0


def test_a_cell_leaves_out_what_could_not_be_computed(benchmark):
    class Effect:
        ratio, ratio_ci95, verdict, comparable, not_comparable_because = 1.2, (1.1, 1.31), "more", True, ()

    effect = Effect()
    assert benchmark.cell(effect) == "1.20 [1.10, 1.31] further"
    effect.comparable, effect.not_comparable_because = False, ("imbalance", "without_control")
    effect.ratio_ci95 = (math.nan, math.nan)
    assert benchmark.cell(effect) == "1.20 not comparable (imbalance, without control)"
    effect.ratio = math.nan
    assert benchmark.cell(effect) == "not comparable (imbalance, without control)"
    assert benchmark.cell(None) == "–"

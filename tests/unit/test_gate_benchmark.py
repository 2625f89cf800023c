"""A short version of `benchmarks/gate.py`: error rates and power of the gate."""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gate_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equal_models_are_rarely_promoted_in_a_hundred_nights(benchmark):
    _, share, _ = benchmark.false_promotions(np.random.default_rng(0), 200, 100, benchmark.HeldOut("", 100), 0.0)
    assert share <= 0.09, "the 99th percentile of 200 streams at 5 %; the gate of one comparison gives more than 50 %"


def test_a_gain_of_five_points_is_shown_nearly_as_often_as_by_a_single_comparison(benchmark):
    rng = np.random.default_rng(1)
    assert benchmark.power(rng, 500, 0.1, 0.05, benchmark.level_of(1), 150) >= 0.88
    assert benchmark.power(rng, 1000, 0.1, 0.05, benchmark.level_of(2), 150) >= 0.82


def test_new_rows_every_night_do_not_add_to_the_error_and_a_gain_of_five_points_is_found_in_three_nights(benchmark):
    rng = np.random.default_rng(4)
    for stream in benchmark.STREAMS:
        assert benchmark.false_promotions(rng, 200, 60, stream, 0.0)[1] <= 0.09, stream.name
    late = benchmark.level_of(100)
    assert benchmark.within_three_nights(rng, 200, (500,) * 3, (benchmark.level_of(1), late, late)) >= 0.9
    after = [benchmark.level_after_promotion(night) for night in (40, 41, 42)]
    assert benchmark.within_three_nights(rng, 500, (500,) * 3, after) >= 0.86


@pytest.mark.parametrize("metric", ["token_f1", "token_loss"])
def test_a_model_with_one_catastrophe_in_a_hundred_rows_is_not_promoted(benchmark, metric):
    rng = np.random.default_rng(2)
    assert benchmark.promoted_share(lambda: benchmark.catastrophes(rng, 100, metric), 20)[0] == 0


def test_ten_metrics_of_five_thousand_rows_are_decided_in_seconds(benchmark):
    started = time.process_time()
    benchmark.seconds_of_ten_metrics(np.random.default_rng(3))
    assert time.process_time() - started < 4, "0.6 s on an idle core, with 0.1 s for the tables"

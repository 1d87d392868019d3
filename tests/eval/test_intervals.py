import numpy as np
import pytest

from regiontower.eval.intervals import mean_interval, wilson_interval


def test_wilson_equals_textbook_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_nothing_right_and_everything_right_end_exactly_there():
    assert wilson_interval(0, 25)[0] == 0.0 and wilson_interval(25, 25)[1] == 1.0
    assert wilson_interval(0, 25)[1] == pytest.approx(0.1332, abs=1e-4)  # z^2 / (n + z^2)


def test_independent_rows_agree_with_the_normal_interval():
    rng = np.random.default_rng(1)
    values = rng.random(2000)
    low, high = mean_interval(values, range(2000))
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_rows_that_repeat_within_an_image_add_no_certainty():
    rng = np.random.default_rng(2)
    values = (rng.random(50) < 0.4).astype(float)
    alone = mean_interval(values, range(50))
    tenfold = mean_interval(np.repeat(values, 10), np.repeat(np.arange(50), 10).tolist())
    naive = mean_interval(np.repeat(values, 10), range(500))
    assert tenfold == pytest.approx(alone)
    assert naive[1] - naive[0] < 0.5 * (tenfold[1] - tenfold[0])


def test_without_spread_the_interval_is_not_a_point():
    assert mean_interval([0.0] * 30, [f"image {i % 10}" for i in range(30)]) == pytest.approx(wilson_interval(0, 10))
    assert mean_interval([1.0] * 10, range(10)) == pytest.approx(wilson_interval(10, 10))
    assert mean_interval([0.0, 1.0], ["one", "one"]) == pytest.approx(wilson_interval(0.5, 1))


def test_the_same_rows_give_the_same_interval():
    values = np.random.default_rng(3).random(40).tolist()
    clusters = [f"image {i // 3}" for i in range(40)]
    assert mean_interval(values, clusters) == mean_interval(values, clusters)
    assert mean_interval(values, clusters, seed=1) != mean_interval(values, clusters)


def test_about_95_percent_of_intervals_hold_the_truth():
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        image_rate = rng.beta(2, 2, size=60)  # rows of one image share their difficulty; the mean rate is 0.5
        values = (rng.random((60, 5)) < image_rate[:, None]).astype(float).ravel()
        low, high = mean_interval(values, np.repeat(np.arange(60), 5).tolist(), resamples=500)
        held += low <= 0.5 <= high
    assert 180 <= held <= 199


def test_no_rows_is_an_error():
    with pytest.raises(ValueError):
        mean_interval([], [])
    with pytest.raises(ValueError):
        mean_interval([1.0], [])

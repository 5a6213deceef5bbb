"Thresholds, uncertainties and reliability of a picker, with numbers worked out by hand"
from math import exp, sqrt

import numpy as np
import pytest
import torch
from conftest import eager_picker

from seismodel.finetuning import calibration as c


def curve(*peaks, samples=1000):
    "A probability that is 0 but for some peaks: (sample, height)"
    p = np.zeros(samples)
    for at, height in peaks: p[at] = height
    return p


def test_f1_counts_picks_half_a_second_around_a_label():
    one = curve((100, .88), (300, .42))[None]
    assert (c.f1_of(one, np.array([110.]), .3) == pytest.approx(2/3)
            and c.f1_of(one, np.array([110.]), .5) == 1)
    assert ([c.f1_of(one, np.array([100. + away]), .5) for away in (-51, -50, 50, 51)]
            == [0, 1, 1, 0])
    # a false pick in noise
    assert (c.f1_of(np.stack([one[0], curve((5, .9))]), np.array([100., np.nan]), .5)
            == pytest.approx(2/3))
    # a label that is missed
    assert c.f1_of(np.stack([one[0], curve()]), np.array([100., 200.]), .5) == pytest.approx(2/3)
    assert (c.f1_of(one, np.array([[100., 300.]]), .3) == 1
            and c.f1_of(one, np.array([[100., 120.]]), .5) == pytest.approx(2/3))
    # one of two is right
    assert c.f1_of(curve((100, .8), (120, .8))[None], np.array([110.]), .5) == pytest.approx(2/3)


def test_of_equal_thresholds_the_middle_one():
    "From .45 to .85 only the right peak counts"
    assert c.choose_threshold(curve((100, .88), (300, .42))[None], np.array([110.])) == .65
    assert c.choose_threshold(curve((100, .31), (300, .12))[None], np.array([110.])) == .25


def test_coverage_within_one_and_two_uncertainties():
    sigma, ratio = np.array([5., 1., 4., 2., 6., 3.]), np.array([2.5, .5, 2., -1., -.5, 1.5])
    said = c.coverage(sigma, sigma*ratio, [0., 1.])
    assert said == {'all': (.5, .833), 'narrow': (1., 1.), 'middle': (0., 1.), 'wide': (.5, .5)}
    assert c.coverage(sigma, sigma*ratio, [100., 0.])['all'] == (1., 1.)


def test_one_pick_of_a_label_is_right():
    "The highest of those near the label; none in noise, and none where all are far away"
    p = np.stack([curve((90, .6), (120, .8), (151, .9)), curve((10, .3), (40, .05)),
                  curve((500, .7))])
    rows = c.rated_peaks(p, np.array([100., np.nan, 400.]))
    assert rows.tolist() == [[0, .6, 0], [0, .8, 1], [0, .9, 0], [1, .3, 0], [2, .7, 0]]
    # exactly half a second
    assert c.rated_peaks(p[2:], np.array([450.])).tolist() == [[0, .7, 1]]
    assert c.rated_peaks(p[:1, :80], np.array([10.])).shape == (0, 3)


def test_reliability_has_the_interval_of_wilson():
    "Of ten picks eight are right: 0.490 to 0.943, as tables have it; of three near 1 all"
    probability = np.array([.52, .58]*5 + [.95, 1., .97])
    right = np.array([1.]*8 + [0.]*2 + [1.]*3)
    few, all_right = c.reliability(probability, right)
    assert (few['picks'], all_right['picks'], few['right'], all_right['right']) == (10, 3, .8, 1.)
    assert (few['probability'] == pytest.approx(.55)
            and all_right['probability'] == pytest.approx(2.92/3))
    assert (few['low'], few['high']) == pytest.approx((.4902, .9433), abs=2e-4)
    assert (all_right['low'], all_right['high']) == pytest.approx((3/(3 + 1.96**2), 1.))
    # each tenth is a bin
    assert ([r['picks'] for r in c.reliability(np.array([.1, .19, .21, .95]), np.ones(4))]
            == [2, 1, 1])
    assert [r['picks'] for r in c.reliability(np.array([.2, .95]), np.ones(2), bins=1)] == [2]


def test_the_error_of_calibration_is_weighted_by_picks():
    rows = [dict(picks=1, probability=.5, right=1.), dict(picks=3, probability=.9, right=.8)]
    assert c.calibration_error(rows) == pytest.approx((.5 + 3*.1)/4)


@pytest.mark.parametrize('factor', [.5, 1., 2.])
def test_the_temperature_of_a_picker_that_is_too_sure(factor):
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20_000)
    right = rng.random(20_000) < 1/(1 + np.exp(-logit))
    assert c.fit_temperature(1/(1 + np.exp(-factor*logit)), right) == pytest.approx(factor, rel=.06)
    assert (c.fit_temperature(np.array([0., 1.]), np.array([False, True]))
            == pytest.approx(exp(-1.5), rel=.02))


def test_a_temperature_divides_the_logits():
    picker = eager_picker().picker
    x = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = picker.logits(x)
        c.apply_temperature(picker, 2.)
        assert before.std() > 0 and torch.allclose(picker.logits(x), before/2, atol=1e-5)


def test_where_silence_is_neither_right_nor_wrong():
    "In a zone, and more than half a second from every label of that phase"
    onset = np.array([[[100., np.nan]], [[np.nan, np.nan]]])
    assert not c.silent({}, onset, 400).any() and c.silent({}, onset, 400).shape == (2, 400, 2)


def gaussians(samples, late, width):
    "Peaks of a width in seconds, late by some samples"
    time = np.arange(4096)
    return np.stack([.9*np.exp(-((time - at - by)/(100*w))**2/2) for at, by,
                     w in zip(samples, late, width)])


def test_residuals_are_picks_minus_labels():
    "Of each pick near a label: its width as the curve has it, how late it is, and its window"
    p, onset = gaussians([500, 600, 700], [10, -20, 80],
                         [.05, .1, .1]), np.array([[500., 3000.], [600., np.nan], [700., np.nan]])
    sigma, late, window = c._residuals(p, onset, .3)
    assert (window.tolist() == [0, 1] and np.allclose(late, [.1, -.2])
            and np.allclose(sigma, [.05, .1], rtol=.25))


def test_calibration_of_a_picker(monkeypatch):
    """Residuals are normal with the width of their peaks; a phase without labels and one that is
    never found are left out"""
    rng, n = np.random.default_rng(0), 240
    width, at = rng.uniform(.04, .12, n), rng.integers(500, 3500, n).astype(float)
    late = np.rint(100*width*rng.normal(size=n))
    curves = gaussians(at, late, width)
    found = {'P': (curves, at[:, None]), 'S': (curves[:4], np.full((4, 1), np.nan))}
    monkeypatch.setattr(c, 'labelled_curves', lambda picker, dev: found)
    args, how = c.calibrate(None, None)
    assert (sorted(args) == ['P_threshold', 'P_uncertainty'] and list(how) == ['P']
            and .1 <= args['P_threshold'] < .9)
    a, b = args['P_uncertainty']
    assert abs(a + b*.08 - .08) < .025 and how['P']['picks'] == n and how['P']['f1'] == 1
    half = how['P']['coverage']
    assert abs(half['all'][0] - .6827) < .1 and half['all'][1] > .9
    few = {'P': (curves[:12], at[:12, None]), 'S': (np.zeros((2, 4096)), np.array([[5.], [9.]]))}
    monkeypatch.setattr(c, 'labelled_curves', lambda picker, dev: few)
    args, how = c.calibrate(None, None)
    assert list(args) == ['P_threshold'] and how['P'] == dict(picks=12, f1=1.)


def test_the_width_of_a_peak():
    "A Gaussian of one second crosses half of the threshold where its width says"
    crossing = sqrt(2*np.log(.8/.15))
    assert (c.peak_sigma(2*crossing, .8, .3) == pytest.approx(1.)
            and c.peak_sigma(1., .2, .3) == pytest.approx(.5/sqrt(2*np.log(2))))

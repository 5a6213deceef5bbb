"Resampling: every sample at its true time, for any rate, over any length, in pieces as in one go"
import numpy as np
import pytest

from seismodel.data.archive import TICK, Reader, Run, on_grid
from seismodel.signals.resample import half_width, low_pass, nominal_rate, resample, values_at

RATES = (10., 31.7, 100/3, 62.5, 99.96, 99.98, 99.9998, 100., 100.003, 125., 200., 333.,
         1000., 2000.)


class MadeOf(Reader):
    "Samples of a function of time in the place of files"
    def __init__(self, f):
        super().__init__()
        self.f = f

    def samples(self, run, first, last):
        n = np.arange(first, last)
        return np.where((n >= 0) & (n < run.npts), self.f(run.start/1e9 + n/run.rate), np.nan)


@pytest.mark.parametrize('rate', RATES)
@pytest.mark.parametrize('late', (0, 3_333_333, 4_900_000))      # ns after a sample of the grid
def test_pulses_at_both_ends_of_six_hours(rate, late):
    """A Gaussian pulse is where it belongs, to a thousandth of its height, 20 s after the start and
    20 s before the end"""
    hours, width = 6*3600., max(.1, 4/rate)
    pulse = lambda t: np.exp(-((t - 20.)/width)**2) + np.exp(-((t - hours + 20.)/width)**2)
    run = Run('XX.A..HHZ', late, rate, int(rate*hours))
    for at in (20., hours - 20.):
        k = np.arange(round(at*100) - 60, round(at*100) + 60)
        y = on_grid(MadeOf(pulse), run, TICK*int(k[0]), len(k))
        assert np.abs(y - pulse(k/100.)).max() < 1e-3


@pytest.mark.parametrize('rate', RATES)
def test_pieces_are_the_whole_at_their_seams(rate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(int(rate*60) + 7) + 1e4

    class Stored(Reader):
        def samples(self, run, first, last):
            n = np.arange(first, last)
            return np.where((n >= 0) & (n < len(x)), x[n.clip(0, len(x) - 1)], np.nan)

    run = Run('XX.A..HHZ', 1_700_000_000_003_000_000, rate, len(x))
    start, count = run.start - 30*TICK, 6100
    whole = on_grid(Stored(), run, start, count)
    cuts = [0, 1, 700, 701, 2048, 4999, count]
    parts = [on_grid(Stored(), run, start + TICK*a, b - a) for a, b in zip(cuts, cuts[1:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-10, atol=0, equal_nan=True)
    assert np.isfinite(whole[40:5990]).all() and np.isnan(whole[:20]).all()


def test_zero_phase_and_no_ripple_of_an_offset():
    for rate in (62.5, 200., 313.):
        weights = low_pass([0.], rate)[0]
        np.testing.assert_allclose(weights[:-1], weights[:-1][::-1], atol=1e-12)
        np.testing.assert_allclose(resample(np.full(3000, 1e6), rate), 1e6, rtol=1e-9)


@pytest.mark.parametrize('rate', [1999., 250., 200.])
def test_no_aliasing(rate):
    for f in (51., 60., 80.):
        tone = np.sin(2*np.pi*f*np.arange(int(20*rate))/rate)
        assert np.abs(resample(tone, rate)[300:-300]).max() < 2e-4


def test_which_rate_is_meant():
    assert (nominal_rate(float(np.float32(1/np.float32(.01))))
            == nominal_rate(1/float(np.float32(.01))) == 100.)
    assert [nominal_rate(r) for r in (99.98, 99.9998, 100.00005)] == [99.98, 99.9998, 100.00005]
    with pytest.raises(ValueError, match='above 0'): resample(np.ones(10), 0.)
    x = np.ones((50, 3))
    assert resample(x, 100.) is x and resample(x, 200.).shape == (25, 3)


def test_held_beyond_the_ends():
    "Positions outside of the samples, near and far, take the value of the end"
    x = np.r_[np.full(200, 3.), np.full(200, 7.)]
    np.testing.assert_allclose(values_at(x, np.array([-500., -.5, 399.4, 900.]), 99.),
                               [3., 3., 7., 7.], rtol=1e-9)
    assert half_width(200.) == 64 and half_width(50.) == 32

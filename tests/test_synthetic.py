"""Properties of the synthetic seismograms: random streams, exact onsets, polarisation, spectra,
amplitudes"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, sosfiltfilt
from seismodel.signals.synthetic import (SyntheticBatch, SyntheticConfig, complete,
                                         draw_earthquakes, noise_amplitude, noise_models,
                                         synthesize)
from seismodel.signals.earthquake import (EVENT, STATION, arrivals, axes, crust_of, direct_waves,
                                          minimum_phase, rays, scale, seismogram,
                             source_spectra, stream)

CLEAR = SyntheticConfig(noise_only=0, double=0, late=0, faults=0, bursts=0, vertical_only=0,
                        snr_db=(60., 0., 60., 60.))


def same(a, b): return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b))


def row(batch, k): return SyntheticBatch(*(a[k:k + 1] for a in batch))


@pytest.fixture(scope='module')
def batch(): return synthesize(range(300), 11)


@pytest.fixture(scope='module')
def events():
    """48 noise-free events, P 3 s after the window's beginning: waveforms (E, L, 3) of all, of S
    alone, and arrivals"""
    generators, config = [stream(5, k) for k in range(48)], SyntheticConfig(distance_km=(8., 80.))
    station, event, _, _ = draw_earthquakes(generators, config)
    ax, arrival = axes(4096, 100.), arrivals(event, crust_of(station))
    spectra = np.maximum(source_spectra(event, np.full(48, 1e13), arrival.beta, ax.freq), 1e-9)
    shift = 3.217 - arrival.time[:, 0]
    only_s = arrival._replace(vector=arrival.vector * (np.arange(7) == 1)[:, None],
                              strength=arrival.strength * [0, 1],
                              time=np.where(np.arange(7) == 1, arrival.time, 1e6))
    plain = arrival._replace(vector=arrival.vector * (np.arange(7) < 2)[:, None])
    bare = SimpleNamespace(**{**vars(event), 'coda_p': np.zeros(48), 'coda_s': np.zeros(48)})
    def run(e, a):
        return seismogram([stream(6, k) for k in range(48)], e, a, shift, spectra,
                          ax)[..., -4096:].transpose(0, 2, 1)
    onset = 100 * (arrival.time[:, :2] + shift[:, None])
    return dict(event=event, arrival=arrival, onset=onset, all=run(event, arrival),
                bare=run(bare, plain), s=run(event, only_s))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True), st.integers(0, 2**33),
       st.data())
def test_a_record_does_not_depend_on_its_batch(indices, seed, data):
    k = data.draw(st.integers(0, len(indices) - 1))
    config = SyntheticConfig(samples=512)
    assert same(row(synthesize(indices, seed, config), k), synthesize([indices[k]], seed, config))


def test_order_and_size_of_the_batch_change_no_bit(batch):
    assert same(synthesize(reversed(range(40, 90)), 11), [a[40:90][::-1] for a in batch])


def test_seeds_are_disjoint(batch):
    "No record of one seed occurs in another, nor does (seed, index) = (a, b) repeat (b, a)"
    other = synthesize(range(100), 12)
    first = {r.tobytes() for r in batch.waveforms}
    assert len(first) == 300 and not first & {r.tobytes() for r in other.waveforms}
    assert not np.isin(stream(1, 2).random(50), stream(2, 1).random(50)).any()
    assert not np.isin(stream(1, 0).random(50), stream(1, 2**32).random(50)).any()


@pytest.mark.parametrize('samples', [1, 7, 100, 1000, 4097, 9000])
def test_any_window_length(samples):
    out = synthesize(range(24), 0, SyntheticConfig(samples=samples))
    assert out.waveforms.shape == (24, samples, 3) and out.waveforms.dtype == np.float32
    assert np.isfinite(out.waveforms).all()


@pytest.mark.parametrize('rate', [50., 200.])
def test_other_sampling_rates(rate):
    out = synthesize(range(24), 0, SyntheticConfig(samples=2048, sampling_rate=rate))
    assert np.isfinite(out.waveforms).all() and np.isfinite(out.p_onset).any()


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match='one record at least'):
        synthesize([])


def test_noise_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match='these windows need'):
        synthesize([0, 1], noise=np.zeros((2, 4095, 3)))


def test_finite_and_labelled_inside_the_window(batch):
    assert np.isfinite(batch.waveforms).all()
    for onset in batch[1:5]:
        inside = np.isfinite(onset)
        assert (onset[inside] >= 0).all() and (onset[inside] < 4096).all()
    both = np.isfinite(batch.p_onset) & np.isfinite(batch.s_onset)
    assert both.sum() > 100 and (batch.p_onset < batch.s_onset)[both].all()
    both = np.isfinite(batch.p2_onset) & np.isfinite(batch.s2_onset)
    assert both.any() and (batch.p2_onset < batch.s2_onset)[both].all()


def test_shares_are_the_configured_ones():
    out = synthesize(range(600), 2, SyntheticConfig(samples=64))
    event = np.isfinite(out.magnitude)
    assert abs((~event).mean() - .1) < .04
    out = synthesize(range(100), 2, SyntheticConfig(samples=64, noise_only=1))
    assert np.isnan(out.p_onset).all() and np.isnan(out.snr_db).all()
    assert np.isfinite(synthesize(range(100), 2,
                                  SyntheticConfig(noise_only=0, double=1)).p2_onset).sum() > 30
    assert np.isnan(synthesize(range(100), 2, SyntheticConfig(late=1)).p_onset).all()
    s_only = synthesize(range(200), 2, SyntheticConfig(late=1, noise_only=0))
    assert 10 < np.isfinite(s_only.s_onset).sum() < 190              # some hold S, some coda alone


def test_the_label_is_the_first_energy_of_p_and_of_s(events):
    "Exact zeros before, movement within two samples after, for P in the whole and for S alone"
    for waves, onset in ((events['all'], events['onset'][:, 0]),
                         (events['s'], events['onset'][:, 1])):
        inside = onset < 4000
        moves = (waves != 0).any(-1)
        first = moves.argmax(1)
        assert inside.sum() > 30 and (first[inside] == np.ceil(onset[inside] - 1e-6)).all()


def test_a_burst_begins_with_the_first_sample_after_its_onset():
    ax, onset = axes(4096, 100.), np.array([[2.003, 9.999]])
    late = np.full((1, 5), 1e6)
    fixed = np.array([.05])
    event = SimpleNamespace(ring_p=2 * fixed, ring_s=4 * fixed, rise_p=fixed, rise_s=fixed)
    drive = direct_waves([stream(0, 0)], event, np.hstack([onset, late]), np.ones((1, 7, 3)), ax)[0]
    for wave, begin in zip(drive[:, 0], onset[0]):
        assert (wave != 0).argmax() == np.searchsorted(ax.time, begin)


def test_no_energy_leaks_from_the_window_end_to_its_beginning(events):
    "Less than a thousandth of a filter's energy lies at negative times, without any mask"
    event, beta, freq = events['event'], events['arrival'].beta, axes(4096, 100.).freq
    amplitude = np.maximum(source_spectra(event, np.full(48, 1e13), beta, freq), 1e-9)
    h = np.fft.irfft(minimum_phase(amplitude), axis=-1)
    n = h.shape[-1]
    assert (h[..., n // 2:]**2).sum() < 1e-3 * (h**2).sum()


def test_travel_times_against_many_small_steps():
    "Direct wave through two layers by brute force over the point where it crosses (Fermat)"
    v, bottom = np.array([[4., 6.]]), np.array([[3., np.inf]])
    for x, depth in ((5., 10.), (40., 10.), (200., 25.)):
        cross = np.linspace(0, x, 200001)
        brute = (np.hypot(cross, 3) / 4 + np.hypot(x - cross, depth - 3) / 6).min()
        time, _ = rays(v, bottom, np.array([depth]), np.array([x]))
        assert abs(time[0, 0] - brute) < 2e-3 and np.isinf(time[0, 1])
    # 1 km deep: 2 km down, 3 km up
    time, slowness = rays(v, bottom, np.array([1.]), np.array([30.]))
    down, up = (np.hypot(np.linspace(0, 5, 100001), h) / 4 - np.linspace(0, 5, 100001) / 6
                for h in (2, 3))
    assert abs(time[0, 1] - (30 / 6 + down.min() + up.min())) < 1e-6 and slowness[0, 1] == 1 / 6
    # nearer than the critical distance
    assert np.isinf(rays(v, bottom, np.array([1.]), np.array([2.]))[0][0, 1])


def test_p_is_a_line_along_the_ray_and_s_is_across_it(events):
    "Without coda and echoes; the ray is known from the phase vector of P"
    p, s = np.ceil(events['onset']).astype(int).T
    seen = 0
    for k in np.nonzero((s - p > 150) & (s < 3900))[0]:
        wave = events['bare'][k].astype(float)
        vector = events['arrival'].vector[k]
        ray, across = (v / np.sqrt(v @ v) for v in vector[:2])
        w, axis = np.linalg.eigh(np.cov(wave[p[k]:p[k] + 50].T))
        assert (w[0] + w[1]) / (2 * w[2]) < 1e-3 and abs(axis[:, 2] @ ray) > .999
        az = events['event'].back_azimuth[k]
        # in the plane of source and station
        assert abs(cross(ray[1:], [np.cos(az), np.sin(az)])) < 1e-6
        w, axis = np.linalg.eigh(np.cov(wave[s[k]:s[k] + 40].T))
        assert abs(axis[:, 2] @ across) > .9
        seen += 1
    assert seen > 10


def test_s_moves_perpendicular_to_its_ray():
    "Vectors of S have no part along the S ray, those of P none across theirs"
    u = np.random.default_rng(0).random((200, len(EVENT)))
    event = complete(scale(u, EVENT), SyntheticConfig(), np.zeros(200))
    station = scale(np.random.default_rng(1).random((200, len(STATION))), STATION)
    arrival, crust = arrivals(event, crust_of(station)), crust_of(station)
    horizontal = np.stack([-np.cos(event.back_azimuth), -np.sin(event.back_azimuth)], 1)
    p = arrival.vector[:, 0]
    assert np.abs(cross(p[:, 1:], horizontal)).max() < 1e-6 * np.abs(p).max()
    radial = (arrival.vector[:, 1, 1:] * horizontal).sum(1)
    # SV: up and towards the source, or down and away
    assert ((arrival.vector[:, 1, 0] * radial) <= 1e-40).all()
    assert (crust.vp > 1.6 * crust.vs).all()


def test_spectral_corner_falls_with_magnitude():
    freq = np.linspace(.05, 50, 5000).astype(np.float32)
    event = SimpleNamespace(stress_drop=np.full(2, 3e6), t_p=np.zeros(2), t_s=np.zeros(2))
    flat = source_spectra(event, 10**(1.5 * np.array([2., 4.]) + 9.1), np.full(2, 3.5),
                          freq) / (2 * np.pi * freq)
    corner = [freq[np.argmin(np.abs(s - .5))] for s in flat[:, 1]]
    # two magnitudes: a factor of ten
    assert abs(corner[0] / corner[1] - 10) < .2
    assert abs(flat[0, 1, 0] - 1) < .01 and (np.diff(flat, axis=-1) <= 0).all()


def test_noise_models_against_obspy():
    from obspy.signal.spectral_estimation import get_nhnm, get_nlnm
    # longer periods do not fit into a window
    freq = np.geomspace(.04, 9.9, 80)
    for ours, (period, theirs) in zip(noise_models(freq), (get_nlnm(), get_nhnm())):
        order = np.argsort(period)
        theirs = np.interp(np.log(1 / freq), np.log(period[order]), theirs[order])
        assert np.abs(ours - theirs).max() < .6


def test_noise_lies_between_the_models():
    freq = axes(4096, 100.).freq
    normal = np.stack([stream(3, k).standard_normal(18) for k in range(100)])
    quiet = np.random.default_rng(0).uniform(.2, .8, 100)
    level = 20 * np.log10(noise_amplitude(quiet, normal, freq) * 2 * np.pi * freq)
    low, high = noise_models(freq)
    mean = level.mean(1)                           # of the components, which lie a little apart
    assert (mean > low - 6).all() and (mean < high + 6).all()


def test_amplitudes_range_over_many_orders_and_are_counted(batch):
    most = np.abs(batch.waveforms).max((1, 2))
    assert most.min() < 1e-10 and most.max() > 1e5
    count = [np.array_equal(w, np.round(w)) for w in batch.waveforms]
    assert .3 < np.mean(count) < .9


def test_the_snr_is_realised():
    """Measured with another method (Butterworth band, power before P) it agrees with snr_db and
    follows the dial"""
    medians = []
    for want in (10., 30.):
        config = replace(CLEAR, snr_db=(want, 0., want, want))
        out, measured = synthesize(range(150), 4, config), []
        for x, p, snr in zip(out.waveforms.astype(float), out.p_onset, out.snr_db):
            if not 600 < p < 3800: continue
            y, p = sosfiltfilt(butter(4, (2, 20), 'bandpass', fs=100, output='sos'), x,
                               axis=0), int(p)
            ratio = (y[p:p + 200]**2).mean() / (y[p - 500:p - 100]**2).mean() - 1
            measured.append(10 * np.log10(max(ratio, .01)) - snr)
        assert len(measured) > 80 and abs(np.median(measured)) < 2
        medians.append(np.median(out.snr_db))
    assert 12 < medians[1] - medians[0] < 24


def test_real_noise_stays_and_the_event_has_the_wanted_snr():
    noise = np.random.default_rng(0).standard_normal((6, 4096, 3)) * 1e-14
    out = synthesize(range(6), 1, CLEAR, noise)
    assert np.allclose(out.snr_db, 60)
    for x, y, p in zip(out.waveforms, noise, out.p_onset):
        assert np.allclose(x[:int(p)], y[:int(p)], rtol=1e-6, atol=0)
        assert np.abs(x[int(p):]).max() > 20 * np.abs(y).max()


def test_swarm_events_are_weaker():
    out = synthesize(range(120), 9, SyntheticConfig(noise_only=0, double=1, bursts=0, faults=0))
    assert np.isfinite(out.p2_onset).sum() > 40 and not np.array_equal(out.p_onset, out.p2_onset)


def cross(a, b):
    "Of vectors in a plane, which NumPy from 2.5 on leaves to us"
    (a0, a1), (b0, b1) = np.transpose(a), np.transpose(b)
    return a0*b1 - a1*b0

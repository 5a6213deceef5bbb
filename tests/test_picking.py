"""SeisModelPicker among SeisBench's models: the same numbers on both sides, files, and streams as
they come"""
import json
import logging
import subprocess
import sys

import numpy as np
import obspy
import pytest
import seisbench
import torch
from obspy.signal.trigger import trigger_onset

from seismodel.finetuning.heads import Picker
from seismodel.picking.seisbench_model import READ_WINDOW, SHORTEST, SeisModelPicker
from seismodel.models.pretraining import build, preset
from seismodel.signals.normalize import normalize
from seismodel.core import UserError

TINY = ('contrastive-tiny', 'reconstruction-tiny')


def lively(name=TINY[0], seed=0):
    "Random weights, with logits of P and S that pass any threshold here and there"
    torch.manual_seed(seed)
    picker = Picker(build(preset(name).model)).eval()
    with torch.no_grad():
        picker.head.out.weight.mul_(8.)
        picker.head.out.bias.zero_()
    return SeisModelPicker.of(picker)


@pytest.fixture(scope='module')
def model(): return lively()


def stream_of(x, start='2020-01-01T00:00:00', rate=100., channels=('HHZ', 'HHN', 'HHE'),
              station='ABC'):
    "A stream of one station from (samples, components)"
    stats = dict(network='XX', station=station, location='', starttime=obspy.UTCDateTime(start),
                 sampling_rate=rate)
    return obspy.Stream([obspy.Trace(c.copy(), {**stats, 'channel': channel}) for c,
                         channel in zip(x.T, channels)])


@pytest.fixture
# (12000, 3)
def waveform(quake_records):
    return np.concatenate([x.T for _, x in quake_records(2)], 0).astype(float)*1e6 + 500.


def array(annotations): return np.stack([tr.data for tr in annotations], -1)


@pytest.mark.parametrize('name', TINY)
def test_annotate_is_what_training_sees(name, waveform):
    """Window by window: the probabilities that training-time code computes, cut, normalised and
    stacked by hand"""
    model, L = lively(name), 4096
    model.window = L
    got = model.annotate(stream_of(waveform), blinding=(0, 0), overlap=2048, stacking='max')
    assert [tr.stats.channel for tr in got] == [f'SeisModelPicker_{c}' for c in 'NPS']
    x = torch.tensor(waveform - waveform.mean(0)).float()
    starts = [*range(0, len(x) - L + 1, 2048), len(x) - L]
    want = np.zeros((len(x), 3), np.float32)
    with torch.no_grad():
        p = model.picker.logits(normalize(torch.stack([x[s:s + L] for s in starts]))).softmax(
            -1).numpy()
    for s, q in zip(starts, p): want[s:s + L] = np.maximum(want[s:s + L], q)
    assert array(got).shape == want.shape
    np.testing.assert_allclose(array(got), want, atol=2e-4)


def test_picks_are_those_of_the_training_code(model, waveform):
    "Same weights, same picks: trigger on the probabilities of the training code"
    window = waveform[:4096]
    # float32 would eat this amplitude beside its offset
    x = normalize(torch.tensor(window - window.mean(0)).float())
    with torch.no_grad(): p = model.picker.logits(x[None])[0].softmax(-1).numpy()
    far, options = {}, {}
    # a threshold that no rounding moves a peak or a trough across
    for k, phase in ((1, 'P'), (2, 'S')):
        turns = p[1:-1, k][np.diff(np.sign(np.diff(p[:, k]))) != 0]
        distance = lambda t: min(np.abs(turns - t).min(), np.abs(turns - t/2).min())
        options[phase] = max(np.arange(.25, .35, .001), key=distance)
        far[phase] = distance(options[phase])
    want = sorted((phase, s0, s1) for k, phase in ((1, 'P'), (2, 'S')) for s0,
                  s1 in trigger_onset(p[:, k], options[phase], options[phase]/2))
    picks = model.classify(stream_of(window),
                           **{f'{phase}_threshold': t for phase, t in options.items()}).picks
    start = obspy.UTCDateTime('2020-01-01')
    got = sorted((pick.phase, round((pick.peak_time - start)*100), pick.peak_value)
                 for pick in picks)
    assert min(far.values()) > 1e-4 and len(got) > 5 and [g[0] for g in got] == [w[0] for w in want]
    # at the highest sample, or at one as high
    for (phase, peak, value), (_, s0, s1) in zip(got, want):
        here = p[:, 'NPS'.index(phase)]
        assert (s0 <= peak <= s1 and here[peak] > here[s0:s1 + 1].max() - 1e-4
                and abs(value - here[peak]) < 1e-4)
    times = [pick.peak_time for pick in picks]
    assert times == sorted(times)


def test_thresholds(model, waveform):
    stream = stream_of(waveform[:5000])
    count = lambda **kwargs: {phase: sum(p.phase == phase
                                         for p in model.classify(stream, **kwargs).picks)
                              for phase in 'PS'}
    low, high = count(P_threshold=.3, S_threshold=.3), count(P_threshold=.99999, S_threshold=.3)
    assert low == count() and high['P'] < low['P'] and high['S'] == low['S']


def test_overlap_blinding_and_any_length(model):
    "Every sample has a probability, whatever the length"
    rng = np.random.default_rng(0)
    for n in (SHORTEST, 700, 1023, 1024, 1025, 4095, 4096, 4097, 9001, READ_WINDOW - 1, READ_WINDOW,
              READ_WINDOW + 1):
        annotations = model.annotate(stream_of(rng.standard_normal((n, 3))))
        assert [len(tr) for tr in annotations] == [n]*3, n
        assert all(np.isfinite(tr.data).all() for tr in annotations)
        assert annotations[0].stats.starttime == obspy.UTCDateTime('2020-01-01')
        np.testing.assert_allclose(array(annotations).sum(1), 1, atol=1e-5)


def test_blinding_leaves_the_ends_of_windows_to_their_neighbours(model, waveform):
    """Two windows that overlap by 2048: each half of the overlap from the window that knows it
    better"""
    model = SeisModelPicker.of(model.picker, window=4096)
    n, x = 4096 + 2048, waveform[2000:8144] - waveform[2000:8144].mean(0)
    with torch.no_grad():
        p = model.picker.logits(
            normalize(torch.tensor(np.stack([x[:4096], x[2048:]])).float())).softmax(-1).numpy()
    want = np.concatenate([p[0, :3072], p[1, 1024:]])
    got = array(model.annotate(stream_of(waveform[2000:8144]), overlap=2048, blinding=(1024, 1024)))
    assert got.shape == (n, 3)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_an_hour_in_one_pass(model):
    "`window` is a plain setting: the mLSTM has no fixed length"
    hour = SeisModelPicker.of(model.picker, window=None)
    x = np.random.default_rng(0).standard_normal((60_000, 3))
    annotations = hour.annotate(stream_of(x))
    with torch.no_grad():
        want = model.picker.logits(normalize(torch.tensor(x - x.mean(0)).float())[None])[0].softmax(
            -1)
    np.testing.assert_allclose(array(annotations), want, atol=1e-4)
    assert hour.get_model_args()['window'] is None


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e300])
def test_one_bad_sample_costs_nothing_but_itself(model, waveform, bad, caplog):
    stream = stream_of(waveform[:4096])
    stream[1].data[2000] = bad
    with caplog.at_level(logging.WARNING): annotations = model.annotate(stream)
    assert 'XX.ABC..HHN: 1 of 4096 samples are NaN, infinite or above 1e18' in caplog.text
    assert [len(tr) for tr in annotations] == [4096]*3
    whole = model.annotate(stream_of(waveform[:4096]))
    assert np.abs(array(annotations) - array(whole))[:1500].mean() < .05
    everywhere = stream_of(np.full((4096, 3), bad))
    assert len(model.annotate(everywhere)) == 0


def test_gap_in_all_components_splits(model, waveform):
    x = waveform[:9000].copy()
    x[5000:5200] = np.nan
    annotations = model.annotate(stream_of(x)).select(channel='*_P')
    assert [len(tr) for tr in annotations] == [5000, 3800]


def test_strict(model, waveform):
    "With strict, only where all three are; without, the missing one is zero"
    x = waveform[:9000].copy()
    x[6000:, 2] = np.nan
    assert [len(tr) for tr in model.annotate(stream_of(x))] == [9000]*3
    assert [len(tr) for tr in model.annotate(stream_of(x), strict=True)] == [6000]*3
    two = stream_of(waveform[:5000])[:2]
    assert len(model.annotate(two, strict=True)) == 0
    zeros = waveform[:5000].copy()
    zeros[:, 2] = 0
    np.testing.assert_allclose(array(model.annotate(two)), array(model.annotate(stream_of(zeros))),
                               atol=1e-6)


@pytest.mark.parametrize('rate', [1., 9.9, .01])
def test_too_slow(model, rate):
    with pytest.raises(UserError,
                       match='XX.ABC..HH[ZNE] has .* Hz, and a picker needs at least 10 Hz'):
        model.annotate(stream_of(np.random.default_rng(0).standard_normal((5000, 3)), rate=rate))


def test_slow_channels_beside_fast_ones_are_left_out(model, waveform, caplog):
    "LHZ in the same file as HHZ: named, and the picks are those without it"
    slow = stream_of(waveform[:300], rate=1., channels=('LHZ', 'LHN', 'LHE'))
    with caplog.at_level(logging.WARNING): both = model.annotate(stream_of(waveform[:5000]) + slow)
    assert 'XX.ABC..LHZ has 1 Hz and is left out' in caplog.text
    np.testing.assert_array_equal(array(both), array(model.annotate(stream_of(waveform[:5000]))))


@pytest.mark.parametrize('rate', [20., 50., 100.02, 125., 200., 250.])
def test_other_rates_come_out_at_100_hz(model, rate):
    t = np.arange(round(50*rate))/rate
    x = np.stack([np.sin(2*np.pi*f*t) for f in (1., 2., 3.)], -1)
    annotations = model.annotate(stream_of(x, rate=rate))
    assert all(tr.stats.sampling_rate == 100. for tr in annotations)
    assert all(abs(len(tr) - 5000) <= 5 for tr in annotations)


def test_nothing_moves(model):
    flat = model.annotate(stream_of(np.full((5000, 3), 7.)))
    assert (array(flat) == [1, 0, 0]).all()
    assert len(model.classify(stream_of(np.zeros((5000, 3), int))).picks) == 0
    assert len(model.annotate(obspy.Stream())) == 0


def test_horizontals_one_and_two(model, waveform):
    x = waveform[:5000]
    want = array(model.annotate(stream_of(x)))
    np.testing.assert_array_equal(
        array(model.annotate(stream_of(x, channels=('EHZ', 'EH1', 'EH2')))), want)
    shuffled = stream_of(x)[::-1]
    np.testing.assert_array_equal(array(model.annotate(obspy.Stream(shuffled))), want)


def test_two_instruments_and_two_stations_stay_apart(model, waveform):
    parts = [stream_of(waveform[:5000]), stream_of(waveform[5000:10000], channels=(
        'HNZ', 'HNN', 'HNE')), stream_of(waveform[3000:8000], station='DEF')]
    alone = [array(model.annotate(st)) for st in parts]
    together = model.annotate(sum(parts, obspy.Stream()))
    assert len(together) == 9
    for want in alone:
        assert any(np.allclose(array(together[k:k + 3]), want, atol=1e-3) for k in (0, 3, 6))
    assert {tr.stats.station for tr in together} == {'ABC', 'DEF'}


def test_the_stream_is_not_touched(model, waveform):
    stream = stream_of(waveform[:5000])
    before = stream.copy()
    model.annotate(stream)
    model.classify(stream)
    assert stream == before and not model.training


def test_seisbench_cache(model, tmp_path, monkeypatch, waveform):
    "from_pretrained by name, with and without a version; never a download"
    monkeypatch.setattr(seisbench, 'cache_model_root', tmp_path)
    monkeypatch.setattr(seisbench.util, 'ls_webdav', lambda *a: pytest.fail('asked the network'))
    (tmp_path/'seismodelpicker').mkdir()
    model.save(tmp_path/'seismodelpicker/alps', 'a test', version_str='2')
    again = SeisModelPicker.from_pretrained('alps')
    assert again.weights_docstring == 'a test' and not again.training
    stream = stream_of(waveform[:5000])
    np.testing.assert_array_equal(array(again.annotate(stream)), array(model.annotate(stream)))
    with pytest.raises(UserError, match="no picker 'andes'"):
        SeisModelPicker.from_pretrained('andes')


@pytest.mark.parametrize('name', TINY)
def test_files_open_in_another_process(name, tmp_path):
    "save here, load there: from the JSON alone the same model, opened on the CPU"
    model = lively(name, seed=3)
    model.save(tmp_path/'model')
    args = json.loads((tmp_path/'model.json').read_text(encoding='utf-8'))['model_args']
    assert set(args) == {'model', 'width', 'dropout', 'raw', 'at', 'window'}
    code = ('import sys, torch; from seismodel.picking.seisbench_model import SeisModelPicker; m '
            '= SeisModelPicker.load(sys.argv[1]); '
            'x = torch.sin(torch.arange(3*600.)).view(1, 3, 600); torch.save([m.state_dict(), '
            'm(x).detach()], sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, tmp_path/'model', tmp_path/'there.pt'], check=True)
    weights, p = torch.load(tmp_path/'there.pt')
    assert (weights.keys() == model.state_dict().keys()
            and all(torch.equal(w, weights[k]) for k, w in model.state_dict().items()))
    with torch.no_grad(): want = model(torch.sin(torch.arange(3*600.)).view(1, 3, 600))
    torch.testing.assert_close(p, want, rtol=0, atol=1e-4)


def test_folders_that_hold_no_picker(tmp_path, model):
    with pytest.raises(UserError, match='config.json is missing'):
        SeisModelPicker.from_pretrained(tmp_path)
    model.save(tmp_path/'half')
    (tmp_path/'half.pt').unlink()
    with pytest.raises(UserError, match='half.pt is missing'): SeisModelPicker.load(tmp_path/'half')


def test_on_real_streams(model, real_data):
    "One station each from St. Helens and Ridgecrest, channels EH1 and EH2 among them"
    folder = real_data[0].parent/'continuous' if real_data else None
    files = sorted(folder.glob('*.mseed')) if folder and folder.is_dir() else []
    if not files: pytest.skip('no continuous records here')
    for file in files:
        stream = obspy.read(file)
        start = min(tr.stats.starttime for tr in stream) + 600
        piece = stream.slice(start, start + 120)
        annotations = model.annotate(piece)
        assert len(annotations) == 3 and all(np.isfinite(tr.data).all() for tr in annotations)
        assert min(len(tr) for tr in annotations) >= 12_000 - 1

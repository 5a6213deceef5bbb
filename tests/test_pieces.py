"Picking in pieces: the picks of the whole, to the sample, at the seams, for every kind of picker, in constant memory"
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import obspy
import pytest
import torch
from conftest import eager_picker
from obspy import Stream, Trace, UTCDateTime

from seismodel.core import UserError
from seismodel.data.archive import TICK, open_archive
from seismodel.finetuning.heads import Picker
from seismodel.models.pretraining import build, preset
from seismodel.picking.output import read_picks
from seismodel.picking.pick import pick_archive
from seismodel.picking.pieces import AROUND, Curve, pick_piece, settings_of, window_starts

ARGS = {'P_threshold': .8, 'S_threshold': .8}        # an eager picker finds enough above these
T0 = UTCDateTime(2024, 2, 28, 23, 30)


@pytest.fixture(scope='module')
def model(): return eager_picker()


def record(seconds, seed=0, start=T0, channels='HHZ HHN HHE', rate=100.):
    "Noise with a burst every 47 s, as counts"
    rng, n = np.random.default_rng(seed), int(seconds*rate)
    size = 1 + 30*np.exp(-(np.arange(n)/rate % 47)/3)
    head = dict(network='XX', station='ABC', location='00', sampling_rate=rate, starttime=start)
    return Stream([Trace((100*size*rng.standard_normal(n)).astype(np.int32), {**head, 'channel': c}) for c in channels.split()])


def save(stream, path, kind='MSEED'):
    path.parent.mkdir(parents=True, exist_ok=True)
    stream.write(str(path), format=kind)


def found(picks): return sorted((p.phase, p.peak_time.ns, p.start_time.ns, p.end_time.ns) for p in picks)


def picks_of(model, folder, seconds, args=ARGS):
    "Picks of all instruments in pieces of so many seconds, and how many pieces"
    s, picks, pieces = settings_of(model, args), [], 0
    for instrument in open_archive(folder).instruments:
        for piece in instrument.pieces(seconds):
            picks += pick_piece(model, instrument, *piece, s).picks
            pieces += 1
    return picks, pieces


# windows

@pytest.mark.parametrize('first, last, window, step', [(1003, 9001, 2000, 500), (0, 4096, 4096, 2048), (7, 100_007, 4096, 1024)])
def test_windows_of_pieces_are_those_of_the_whole(first, last, window, step):
    "Every window of the whole lies in some piece that reads one window beyond its ends, and no piece has another one"
    whole = set(window_starts(first, last, window, step))
    assert min(whole) == first and max(whole) == last - window
    for size in (window, 3*window + 1):
        seen = set()
        for a in range(first, last, size):
            a, b = max(first, a - window), min(last, a + size + window)
            own = set(window_starts(a, b, window, step, (a > first, b < last)))
            assert own <= whole
            seen |= own
        assert seen == whole


# seams

@pytest.mark.parametrize('seconds', [60, 300, 3600])
def test_picks_in_pieces_are_the_picks_of_the_whole(model, tmp_path, seconds):
    "Forty minutes with a gap and a component that is missing for a while, over midnight, also at the seams"
    st = record(2400)
    st[1].trim(T0 + 250)
    st = st.cutout(T0 + 700, T0 + 733.33)
    save(st, tmp_path/'a.mseed')
    whole, one = picks_of(model, tmp_path, 10**9)
    parts, many = picks_of(model, tmp_path, seconds)
    assert one == 2 and many >= max(2400//seconds, 2) and len(whole) > 100
    assert found(parts) == found(whole)
    edges = np.arange(T0.timestamp//seconds*seconds, T0.timestamp + 2400, seconds)
    near = [p for p in whole if np.abs(edges - p.peak_time.timestamp).min() < 20]
    assert seconds == 3600 or len(near) > 5


def test_a_pick_across_a_seam_is_found_once(model, tmp_path, monkeypatch):
    "Its probability rises before the full minute and falls after it; the peak lies on either side"
    import seismodel.picking.pieces as pieces
    save(record(600), tmp_path/'a.mseed')
    instrument, = open_archive(tmp_path).instruments
    span, = instrument.spans()
    # the last but one begins a third of a second after a full minute, the last at it
    bumps = [(3000, 6200), (12_010, 12_020), (17_950, 18_300), (23_990, 24_001), (30_000, 30_002), (36_500, 41_900), (48_100, 48_102), (54_067, 54_069)]

    def curves(model, x, first, s, cut):                     # the answer of a picker, bumps of 3 s around (begin + end)/2
        t = first + np.arange(len(x)) - span.start//TICK
        p = sum(.9*np.exp(-((t - (a + b)/2)/max(50., (b - a)/2.5))**2) for a, b in bumps)
        return [Curve(first, 1, np.stack([1 - p, p, 0*p], -1).astype(np.float32))]

    monkeypatch.setattr(pieces, 'probability_curves', curves)
    s = settings_of(model, ARGS)
    whole = pick_piece(model, instrument, span, 0, span.count, s).picks
    assert len(whole) == len(bumps) and {p.phase for p in whole} == {'P'}
    for size in (6000, 1000, 777):
        parts = [p for a in range(0, span.count, size)
                 for p in pick_piece(model, instrument, span, a, min(a + size, span.count), s).picks]
        assert found(parts) == found(whole), size


@pytest.mark.parametrize('kind', ['PhaseNet', 'EQTransformer', 'GPD'])
def test_pickers_of_seisbench_in_pieces(kind, tmp_path):
    "Three ways to answer: a curve per window, with ends left out, and one value per window"
    import seisbench.models
    torch.manual_seed(0)
    model = getattr(seisbench.models, kind)(**({'phases': 'PSN'} if kind == 'GPD' else {})).eval()
    save(record(600 if kind != 'GPD' else 150), tmp_path/'a.mseed')
    s = settings_of(model, {'stride': 50} if kind == 'GPD' else {})
    instrument, = open_archive(tmp_path).instruments
    span, = instrument.spans()
    whole = pick_piece(model, instrument, span, 0, span.count, s)
    parts = [pick_piece(model, instrument, *piece, s) for piece in instrument.pieces(60)]
    p = {tr.stats.channel: tr for tr in whole.stream}
    assert len(p) == len(model.labels) and len(parts) > 2
    for part in parts:
        for tr in part.stream:
            both = p[tr.stats.channel].slice(tr.stats.starttime, tr.stats.endtime)
            here = tr.slice(both.stats.starttime, both.stats.endtime)
            assert len(here) == len(both) > 0
            inner = slice(AROUND//2, -AROUND//2) if kind != 'GPD' else slice(120, -120)
            np.testing.assert_allclose(here.data[inner], both.data[inner], atol=1e-5)


def test_annotations_are_those_of_seisbench(model, tmp_path):
    "A stretch that is one window: the same probabilities as `annotate`"
    st = record(100)
    save(st, tmp_path/'a.mseed')
    instrument, = open_archive(tmp_path).instruments
    span, = instrument.spans()
    ours, theirs = pick_piece(model, instrument, span, 0, span.count, settings_of(model, ARGS)).stream, model.annotate(st, **ARGS)
    assert [tr.id for tr in ours] == [tr.id for tr in theirs]
    for a, b in zip(ours, theirs):
        assert len(a) == len(b) == 10_000 and a.stats.starttime == b.stats.starttime
        np.testing.assert_allclose(a.data, b.data, atol=2e-4)


@pytest.mark.parametrize('change, words', [(dict(sampling_rate=50), '50 Hz; choose a picker that reads 100 Hz'),
                                           (dict(component_order='Z12H'), 'reads the component 1, 2, H'),
                                           (dict(filter_args=('highpass',)), 'Other filters its stream first')])
def test_pickers_that_read_something_else(change, words):
    other = SimpleNamespace(**dict(name='Other', sampling_rate=100., component_order='ZNE', filter_args=None, filter_kwargs=None) | change)
    with pytest.raises(UserError, match=words): settings_of(other, {})


# layouts

def by_channel(st, folder):
    for tr in st: save(Stream([tr]), folder/tr.stats.channel/'x.mseed')

def by_10_minutes(st, folder):
    start, end = min(tr.stats.starttime for tr in st), max(tr.stats.endtime for tr in st)
    for k in range(int((end - start)//600) + 1):
        for tr in st.slice(start + 600*k, start + 600*(k + 1) - .001): save(Stream([tr]), folder/str(k)/f'{tr.id}.{tr.stats.starttime.ns}')

def as_sac(st, folder):
    for k, tr in enumerate(st): save(Stream([tr]), folder/f'{k}.{tr.id}.SAC', 'SAC')

LAYOUTS = {'whole': lambda st, folder: save(st, folder/'all.mseed'), 'by channel': by_channel, 'by 10 minutes': by_10_minutes, 'SAC': as_sac}


def same_in_every_layout(model, st, folder):
    "The picks of a record as rows without their file, which every layout gives"
    rows = {}
    for name, write in LAYOUTS.items():
        write(st, folder/name)
        pick_archive(model, open_archive(folder/name), folder/f'{name} out', ARGS)
        rows[name] = [{k: v for k, v in row.items() if k not in ('file', 'probability')} for row in read_picks(folder/f'{name} out/picks.csv').fillna('').to_dict('records')]
    for name in rows: assert rows[name] == rows['whole'], name
    return rows['whole']


def test_every_layout_gives_the_same_picks(model, tmp_path):
    st = record(700)
    st[0].trim(T0 + .02)
    assert len(same_in_every_layout(model, st, tmp_path)) > 100


def test_every_layout_of_a_real_record_gives_the_same_picks(model, tmp_path, real_data):
    folder = real_data[0].parent/'continuous' if real_data else None
    files = sorted(folder.glob('*B917*.mseed')) if folder and folder.is_dir() else []
    if not files: pytest.skip('no continuous records here')
    st = obspy.read(str(files[0]))
    st.trim(st[0].stats.starttime, st[0].stats.starttime + 700)             # across a file of 10 minutes
    assert len(same_in_every_layout(model, st, tmp_path)) > 200


# memory

MEMORY = '''
import re, sys
from pathlib import Path
from seismodel.cli import main
code = main(sys.argv[1:])
print('peak', re.search(r'VmHWM:\\s*([0-9]+) kB', Path('/proc/self/status').read_text(encoding='utf-8'))[1])
sys.exit(code)
'''

def peak(*words):
    "Peak memory of a command in a process of its own, in kB; rusage would count that of the parent too"
    done = subprocess.run([sys.executable, '-c', MEMORY, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit('peak', 1)[1])


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
def test_memory_does_not_grow_with_the_record(tmp_path):
    "10 h need hardly more than 3 h, in pick and in pack; a picker that finds nothing, since picks take room"
    Picker(build(preset('contrastive-tiny').model)).save_pretrained(tmp_path/'run')
    for hours in (3, 10): save(record(3600*hours), tmp_path/str(hours)/'all.mseed')
    for command in (('pick', '--model', tmp_path/'run', '--device', 'cpu', '--p-threshold', '.99', '--s-threshold', '.99'), ('pack',)):
        few, many = (peak(command[0], tmp_path/str(hours), *command[1:], '--out', tmp_path/f'{command[0]}{hours}') for hours in (3, 10))
        assert many < few + 22_000, (command[0], few, many)         # kB; the samples of seven hours are 30 MB, one copy of them

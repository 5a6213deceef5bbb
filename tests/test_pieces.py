"""Picking in pieces: the picks of the whole, to the sample, at the seams, for every kind of picker,
in constant memory"""
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
from seismodel.picking import pick as picking
from seismodel.picking.pick import pick, pick_archive, pick_day, processes_on
from seismodel.picking.pieces import (AROUND, Curve, Settings, _stacked, joined_pieces, pick_piece,
                                      settings_of, window_starts)
from seismodel.picking.seisbench_model import GPU_BATCH

ARGS = {'P_threshold': .8, 'S_threshold': .8}        # an eager picker finds enough above these
T0 = UTCDateTime(2024, 2, 28, 23, 30)


@pytest.fixture(scope='module')
def model(): return eager_picker()


def record(seconds, seed=0, start=T0, channels='HHZ HHN HHE', rate=100.):
    "Noise with a burst every 47 s, as counts"
    rng, n = np.random.default_rng(seed), int(seconds*rate)
    size = 1 + 30*np.exp(-(np.arange(n)/rate % 47)/3)
    head = dict(network='XX', station='ABC', location='00', sampling_rate=rate, starttime=start)
    return Stream([Trace((100*size*rng.standard_normal(n)).astype(np.int32), {**head, 'channel': c})
                   for c in channels.split()])


def save(stream, path, kind='MSEED'):
    path.parent.mkdir(parents=True, exist_ok=True)
    stream.write(str(path), format=kind)


def found(picks):
    return sorted((p.phase, p.peak_time.ns, p.start_time.ns, p.end_time.ns) for p in picks)


def picks_of(model, folder, seconds, args=ARGS):
    "Picks of all instruments in pieces of so many seconds, and how many pieces"
    s, picks, pieces = settings_of(model, args), [], 0
    for instrument in open_archive(folder).instruments:
        for piece in instrument.pieces(seconds):
            picks += pick_piece(model, instrument, *piece, s).picks
            pieces += 1
    return picks, pieces


# windows

@pytest.mark.parametrize('first, last, window, step',
                         [(1003, 9001, 2000, 500), (0, 4096, 4096, 2048), (7, 100_007, 4096, 1024)])
def test_windows_of_pieces_are_those_of_the_whole(first, last, window, step):
    """Every window of the whole lies in some piece that reads one window beyond its ends, and no
    piece has another one"""
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
    """Forty minutes with a gap and a component that is missing for a while, over midnight, also at
    the seams"""
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
    bumps = [(3000, 6200), (12_010, 12_020), (17_950, 18_300), (23_990, 24_001), (30_000, 30_002),
             (36_500, 41_900), (48_100, 48_102), (54_067, 54_069)]

    # the answer of a picker, bumps of 3 s around (begin + end)/2
    def curves(model, x, first, s, cut):
        t = first + np.arange(len(x)) - span.start//TICK
        p = sum(.9*np.exp(-((t - (a + b)/2)/max(50., (b - a)/2.5))**2) for a, b in bumps)
        return [Curve(first, 1, np.stack([1 - p, p, 0*p], -1).astype(np.float32))]

    monkeypatch.setattr(pieces, 'probability_curves', curves)
    s = settings_of(model, ARGS)
    whole = pick_piece(model, instrument, span, 0, span.count, s).picks
    assert len(whole) == len(bumps) and {p.phase for p in whole} == {'P'}
    for size in (6000, 1000, 777):
        parts = [p for a in range(0, span.count, size)
                 for p in pick_piece(model, instrument, span, a, min(a + size, span.count),
                                     s).picks]
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
    ours, theirs = pick_piece(model, instrument, span, 0, span.count,
                              settings_of(model, ARGS)).stream, model.annotate(st, **ARGS)
    assert [tr.id for tr in ours] == [tr.id for tr in theirs]
    for a, b in zip(ours, theirs):
        assert len(a) == len(b) == 10_000 and a.stats.starttime == b.stats.starttime
        np.testing.assert_allclose(a.data, b.data, atol=2e-4)


@pytest.mark.parametrize('change, words',
                         [(dict(sampling_rate=50), '50 Hz; choose a picker that reads 100 Hz'),
                                           (dict(component_order='Z12H'),
                                            'reads the component 1, 2, H'),
                                           (dict(filter_args=('highpass',)),
                                            'Other filters its stream first')])
def test_pickers_that_read_something_else(change, words):
    other = SimpleNamespace(**dict(name='Other', sampling_rate=100., component_order='ZNE',
                                   filter_args=None, filter_kwargs=None) | change)
    with pytest.raises(UserError, match=words): settings_of(other, {})


@pytest.mark.parametrize('seconds', [30, 100])
def test_picks_are_those_of_seisbench(model, tmp_path, seconds):
    """ObsPy's own record and a synthetic one: `pick` has its own path, and finds what `classify`
    finds"""
    st = obspy.read() if seconds == 30 else record(seconds)
    save(st, tmp_path/'a.mseed')
    ours, _ = picks_of(model, tmp_path, 3600)
    theirs = model.classify(st, **ARGS).picks
    near = [(p.phase, round((p.peak_time - st[0].stats.starttime)*100)) for p in theirs]
    assert (len(ours) > 10
            and sorted(near) == sorted((p.phase, round((p.peak_time - st[0].stats.starttime)*100))
                                       for p in ours))


@pytest.mark.parametrize('stacking', ['avg', 'max'])
def test_the_mean_is_over_windows_that_have_a_value(stacking):
    """Three windows whose ends a picker leaves empty, with one probability each: the mean of those
    that are there, or the highest"""
    p = torch.stack([torch.full((10, 3), v) for v in (.2, .4, .9)])
    p[:, :2], p[:, 8:] = torch.nan, torch.nan
    model = SimpleNamespace(_argdict_get_with_default=lambda args, key: args[key])
    s = Settings(10, 4, 10, (0, 0), {'stacking': stacking})
    curve = _stacked(iter([p[:2], p[2:]]), [100, 104, 108], 10, (100, 118), (False, False),
                     s, model)
    both = {'avg': ((.2 + .4)/2, (.4 + .9)/2), 'max': (.4, .9)}[stacking]
    want = [.2]*4 + [both[0]]*2 + [.4]*2 + [both[1]]*2 + [.9]*4
    assert (curve.first, curve.every, curve.values.dtype) == (102, 1, np.float32)
    np.testing.assert_allclose(curve.values, np.repeat(np.array(want)[:, None], 3, 1), rtol=1e-6)


# batches and devices

def rows_of_day(model, folder, args):
    instrument, = open_archive(folder).instruments
    s = settings_of(model, args)
    pieces = list(instrument.pieces(60))
    return pick_day(model, instrument, pieces, s), len(list(joined_pieces(model, pieces, s)))


def test_a_batch_of_any_size_finds_the_same_picks(model, tmp_path):
    "Pieces are joined to the length of a batch, never across a gap"
    st = record(1500).cutout(T0 + 700, T0 + 733)
    save(st, tmp_path/'a.mseed')
    few, many = rows_of_day(model, tmp_path, {**ARGS, 'batch_size': 1}), rows_of_day(
        model, tmp_path, {**ARGS, 'batch_size': 128})
    assert few[1] > many[1] == 2 and few[0]['samples'] == many[0]['samples'] > 140_000
    assert len(few[0]['picks']) > 100
    for a, b in zip(few[0]['picks'], many[0]['picks'], strict=True):
        assert abs(a.pop('probability') - b.pop('probability')) < 2e-4 and a == b


def test_a_gpu_without_room_gets_smaller_batches(model, tmp_path, monkeypatch, caplog):
    save(record(900), tmp_path/'a.mseed')
    args, sizes, forward = {**ARGS, 'batch_size': 4, 'overlap': 8192}, [], model.forward
    want = rows_of_day(model, tmp_path, args)

    def cramped(x, most=1):
        sizes.append(len(x))
        if len(x) > most: raise torch.cuda.OutOfMemoryError('no room')
        return forward(x)

    monkeypatch.setattr(model, 'forward', cramped)
    assert (rows_of_day(model, tmp_path, args) == want and sizes[:4] == [4, 2, 1, 1]
            and 'no room for the batch' in caplog.text)
    monkeypatch.setattr(model, 'forward', lambda x: cramped(x, 0))
    with pytest.raises(torch.cuda.OutOfMemoryError): rows_of_day(model, tmp_path, args)


def test_the_batch_suits_the_device(model, monkeypatch):
    batch = lambda **given: model._argdict_get_with_default(given, 'batch_size')
    assert batch() == 2 and batch(batch_size=7) == 7
    monkeypatch.setattr(type(model), 'device', property(lambda self: torch.device('cuda')))
    assert batch() == GPU_BATCH and batch(batch_size=7) == 7
    assert model._argdict_get_with_default({}, 'overlap') == 2048


def test_a_gpu_is_shared_by_processes(monkeypatch):
    "Four with enough cores and station-days, one for a few; a CPU is not shared"
    gpus, cpu = [torch.device('cuda:0'), torch.device('cuda:1')], torch.device('cpu')
    monkeypatch.setattr(picking, 'cores', lambda: 16)
    for devices, days, want in ((gpus[:1], 15, 1), (gpus[:1], 16, 2), (gpus[:1], 1000, 4),
                                (gpus, 1000, 8), (gpus, 3, 2)):
        found = processes_on(devices, days)
        assert len(found) == want and set(found) == set(devices)
    monkeypatch.setattr(picking, 'cores', lambda: 2)
    assert len(processes_on(gpus[:1], 1000)) == 2 and processes_on([cpu], 1000) == [cpu]


SCRIPT = """
from pathlib import Path
from seismodel.core import UserError
from seismodel.data.archive import open_archive
from seismodel.picking.pick import begin_picks, pick_side_by_side
from seismodel.picking.seisbench_model import open_picker
print('the script runs')
out = Path('out')
begin_picks(open_picker('run'), out, {})
pick_side_by_side('run', ['cpu', 'cpu'], open_archive('in'), out, {}, False)
print(len(list(out.glob('days/*/*.json'))))
"""

def test_a_script_that_picks_in_processes_runs_once(model, tmp_path):
    "Without `if __name__ == '__main__'`"
    model.picker.save_pretrained(tmp_path/'run')
    for k in range(2):
        st = record(60, k)
        for tr in st: tr.stats.station = f'S{k}'
        save(st, tmp_path/f'in/{k}.mseed')
    (tmp_path/'script.py').write_text(SCRIPT, encoding='utf-8')
    done = subprocess.run([sys.executable, 'script.py'], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.stdout.split('\n')[:2] == ['the script runs', '2'], done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_finds_the_picks_of_the_cpu(tmp_path):
    """Times within a sample; a pick is alone only where its probability lies within 0.01 of the
    threshold"""
    save(record(7200), tmp_path/'in/a.mseed')
    found = {}
    for device in ('cpu', 'cuda'):
        rows = read_picks(pick([tmp_path/'in'], 'tiny-picker', tmp_path/device, p_threshold=.3,
                               s_threshold=.3, device=device))
        found[device] = [(r.phase, r.epoch, r.probability) for r in rows.itertuples()]
    for one, other in (('cpu', 'cuda'), ('cuda', 'cpu')):
        for phase, time, p in found[one]:
            near = [q for ph, t, q in found[other] if ph == phase and abs(t - time) < .0101]
            assert any(abs(p - q) < .01 for q in near) or p < .31, (one, phase, time, p)
    assert len(found['cpu']) > 50


# layouts

def by_channel(st, folder):
    for tr in st: save(Stream([tr]), folder/tr.stats.channel/'x.mseed')

def by_10_minutes(st, folder):
    start, end = min(tr.stats.starttime for tr in st), max(tr.stats.endtime for tr in st)
    for k in range(int((end - start)//600) + 1):
        for tr in st.slice(start + 600*k, start + 600*(k + 1) - .001):
            save(Stream([tr]), folder/str(k)/f'{tr.id}.{tr.stats.starttime.ns}')

def as_sac(st, folder):
    for k, tr in enumerate(st): save(Stream([tr]), folder/f'{k}.{tr.id}.SAC', 'SAC')

LAYOUTS = {'whole': lambda st, folder: save(st, folder/'all.mseed'), 'by channel': by_channel,
           'by 10 minutes': by_10_minutes, 'SAC': as_sac}


def same_in_every_layout(model, st, folder):
    "The picks of a record as rows without their file, which every layout gives"
    rows = {}
    for name, write in LAYOUTS.items():
        write(st, folder/name)
        pick_archive(model, open_archive(folder/name), folder/f'{name} out', ARGS)
        rows[name] = [{k: v for k, v in row.items() if k not in ('file', 'probability')}
                      for row in read_picks(folder/f'{name} out/picks.csv').fillna('').to_dict(
            'records')]
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
    # across a file of 10 minutes
    st.trim(st[0].stats.starttime, st[0].stats.starttime + 700)
    assert len(same_in_every_layout(model, st, tmp_path)) > 200


# memory

MEMORY = '''
import re, sys
from pathlib import Path
from seismodel.cli import main
code = main(sys.argv[1:])
print('peak', re.search(r'VmHWM:\\s*([0-9]+) kB',
                        Path('/proc/self/status').read_text(encoding='utf-8'))[1])
sys.exit(code)
'''

def peak(*words):
    """Peak memory of a command in a process of its own, in kB; rusage would count that of the
    parent too"""
    done = subprocess.run([sys.executable, '-c', MEMORY, *map(str, words)], capture_output=True,
                          text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit('peak', 1)[1])


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
def test_memory_does_not_grow_with_the_record(tmp_path):
    """10 h need hardly more than 3 h, in pick and in pack; a picker that finds nothing, since picks
    take room"""
    Picker(build(preset('contrastive-tiny').model)).save_pretrained(tmp_path/'run')
    for hours in (3, 10): save(record(3600*hours), tmp_path/str(hours)/'all.mseed')
    for command in (('pick', '--model', tmp_path/'run', '--device', 'cpu', '--p-threshold', '.99',
                     '--s-threshold', '.99'), ('pack',)):
        few, many = (peak(command[0], tmp_path/str(hours), *command[1:], '--out',
                          tmp_path/f'{command[0]}{hours}') for hours in (3, 10))
        # kB; the samples of seven hours are 30 MB, one copy of them
        assert many < few + 22_000, (command[0], few, many)

"Every kind of bad input has the outcome that the chapter's table states"
import logging
import os
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from seismodel.data.windows import WindowDataset
from seismodel.signals.source import Source, cut_window
from seismodel.data.sources import SyntheticSource, open_source
from seismodel.data.waveform import read_waveform
from seismodel.signals.records import Record, check_record
from seismodel.signals.resample import resample
from seismodel.signals.normalize import flat, normalize
from seismodel.core import BadRecord, UserError

one_sentence = lambda error: '\n' not in str(error.value) and 10 < len(str(error.value)) < 500


# normalisation

@settings(max_examples=60, deadline=None)
@given(st.integers(-14, 9), st.integers(2, 300), st.floats(-1e3, 1e3), st.integers(0, 2**16))
def test_normalize_forgets_amplitude_and_offset(power, samples, offset, seed):
    "Against float64, at every amplitude, with an offset of up to 1000 times the signal"
    x = (np.random.default_rng(seed).standard_normal((2, samples, 3)) + offset) * 10. ** power
    x32 = torch.from_numpy(x).float()
    y, want = normalize(x32), x32.double().numpy()
    want = (want - want.mean(1, keepdims=True)) / want.std(1, keepdims=True)
    assert y.shape == x32.shape and y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(1, 5000), st.booleans(), st.integers(0, 2**16))
def test_constants_become_zeros(value, samples, negative, seed):
    "Also when rounding has moved them by one unit in the last place"
    x = torch.full((samples, 2), -value if negative else value, dtype=torch.float32)
    up = torch.from_numpy(np.random.default_rng(seed).random(samples) < .5)
    x[:, 1] = torch.where(up, torch.nextafter(x[:, 1], torch.tensor(float('inf'))), x[:, 1])
    assert flat(x).tolist() == [True, True]
    assert normalize(x).abs().max() == 0


def test_a_real_signal_on_an_offset_is_not_flat():
    x = torch.from_numpy(1e6 + np.random.default_rng(0).standard_normal((4096, 3))).float()
    assert not flat(x).any()
    torch.testing.assert_close(normalize(x).std(0, unbiased=False), torch.ones(3))


def test_integers_and_half_precision():
    x = torch.from_numpy(np.random.default_rng(0).integers(-2**23, 2**23, (100, 3)))
    assert normalize(x).dtype == torch.float32
    assert normalize((x / 2**10).half()).dtype == torch.half
    with pytest.raises(ValueError, match='NaN or infinite'):
        normalize(torch.full((10, 3), float('nan')))


# resampling

@pytest.mark.parametrize('rate', [1000., 250., 200., 125., 62.5, 50., 99.])
def test_resampling_keeps_time(rate):
    "A smooth pulse keeps its place: no delay, no drift to the end of the record"
    # late in a record of 60 s, on an offset
    pulse = lambda t: np.exp(-((t - 50.3) / .15)**2) + 1e3
    y = resample(np.stack([pulse(np.arange(int(60 * rate)) / rate)] * 3, 1), rate)
    assert y.shape[1] == 3 and abs(len(y) - 6000) <= 1
    np.testing.assert_allclose(y[4500:5500, 1], pulse(np.arange(4500, 5500) / 100.), atol=1e-3)


@pytest.mark.parametrize('rate', [1000., 250., 200.])
@pytest.mark.parametrize('f', [51., 60., 80.])
def test_no_aliasing(rate, f):
    assert np.abs(resample(np.sin(2 * np.pi * f * np.arange(int(30 * rate)) / rate),
                           rate)[300:-300]).max() < 2e-4


def test_our_rate_passes_untouched():
    x = np.random.default_rng(0).standard_normal((50, 3))
    assert resample(x, 100.) is x and resample(x, 99.999) is x
    assert len(resample(x[:1], 250.)) == 1


# data sets: what works

def test_every_record_of_every_split(quakes_folder, real_data):
    "Each record once: finite, long enough, its picks inside; what is left out is counted"
    for folder in [quakes_folder, *real_data]:
        table = pd.read_csv(folder/'metadata.csv')
        for split, rows in table.groupby('split'):
            source = open_source(str(folder), split)
            assert len(source) + sum(map(len, source.left_out.values())) == len(rows)
            assert len(source) > .95 * len(rows)
            bad = 0
            for i in range(len(source)):
                try: r = source.record(i)
                except BadRecord: bad += 1; continue
                assert (r.waveform.dtype == np.float32 and r.waveform.shape[1] == 3
                        and len(r.waveform) >= 2048)
                assert np.isfinite(r.waveform).all()
                assert not r.p_onset >= len(r.waveform) and not r.p_onset > r.s_onset
            assert bad <= .01 * len(rows)


def test_picks_and_samples_are_those_that_were_written(quakes_folder, quake_records):
    source = open_source(quakes_folder, 'dev')
    truth = {m['trace_name']: (m, x) for m, x in quake_records()}
    for i in range(len(source)):
        r = source.record(i)
        meta, x = truth[r.name]
        np.testing.assert_array_equal(r.waveform, x.T)
        picks = [meta['trace_p_arrival_sample'], meta['trace_s_arrival_sample']]
        np.testing.assert_allclose([r.p_onset, r.s_onset], picks)


def test_picks_stay_on_the_window(quakes_folder):
    "The P burst begins at p_onset of the window, wherever it was cut"
    data, seen = WindowDataset([open_source(quakes_folder)], 60, seed=1), 0
    for n in range(60):
        item = data[n]
        p = item['p_onset'].item()
        if np.isnan(p) or not 400 < p < 3900: continue
        z, seen = item['x'][:, 0], seen + 1
        assert z[int(p) + 1:int(p) + 150].std() > 5 * z[int(p) - 300:int(p)].std()
    assert seen > 20


def test_blocks_read_like_single_traces(tmp_path, quake_records, write_dataset):
    one = open_source(write_dataset(tmp_path/'one', quake_records()))
    blocks = open_source(write_dataset(tmp_path/'blocks', quake_records(), blocks=True))
    for i in range(len(one)):
        np.testing.assert_array_equal(one.record(i).waveform, blocks.record(i).waveform)


@pytest.mark.parametrize('name, edit', [
    ('order', lambda m, x: (m | {'trace_component_order': 'ENZ'}, x[::-1])),
    ('Z12', lambda m, x: (m | {'trace_component_order': '12Z'}, x[[1, 2, 0]])),
    ('extra', lambda m, x: (m | {'trace_component_order': 'HZNE'}, np.concatenate([x[:1] * 5, x]))),
    ('double', lambda m, x: (m, x.astype(np.float64)))])
def test_components_are_sorted(tmp_path, quake_records, write_dataset, name, edit):
    "The same waveforms, stored in another way, give the same records"
    plain = open_source(write_dataset(tmp_path/'plain', quake_records(8)))
    other = open_source(write_dataset(tmp_path/name, (edit(m, x) for m, x in quake_records(8))))
    assert len(plain) == len(other) == 4
    for i in range(4):
        np.testing.assert_array_equal(plain.record(i).waveform, other.record(i).waveform)


def test_other_rates_and_their_picks(tmp_path, quake_records, write_dataset):
    """Read as 250 Hz, a record lasts 24 s at 100 Hz; picks move along; trace_dt_s and the file's
    own rate serve as well"""
    source = open_source(write_dataset(tmp_path/'fast',
                                       quake_records(8, trace_sampling_rate_hz=250.)))
    p = next(quake_records(1))[0]['trace_p_arrival_sample']
    assert source.record(0).waveform.shape == (2400, 3)
    assert source.record(0).p_onset == pytest.approx(p / 2.5)
    rate = lambda m: {k: v for k, v in m.items() if k != 'trace_sampling_rate_hz'}
    by_dt = open_source(write_dataset(tmp_path/'dt',
                                      ((rate(m) | {'trace_dt_s': .02}, x) for m,
                                       x in quake_records(8))))
    plain = ((rate(m), x) for m, x in quake_records(8))
    by_file = open_source(write_dataset(tmp_path/'format', plain, sampling_rate=50.))
    for source in (by_dt, by_file): assert source.record(0).waveform.shape == (12000, 3)


def test_pick_names_and_picks_outside(tmp_path, quake_records, write_dataset):
    "The earliest of several P picks counts; one beyond the record does not"
    picks = [{'trace_Pn_arrival_sample': pn, 'trace_P_arrival_sample': 2400.,
              'trace_Sg_arrival_sample': sg}
             for pn, sg in 4 * [(np.nan, -3.), (2000., 3000.)]]
    plain = [({n: v for n, v in m.items() if 'arrival' not in n}, x) for m, x in quake_records(8)]
    source = open_source(write_dataset(tmp_path/'named',
                                       [(m | pick, x) for (m, x), pick in zip(plain, picks)]))
    assert [source.record(i).p_onset for i in range(2)] == [2400., 2000.]
    assert np.isnan(source.record(0).s_onset) and source.record(1).s_onset == 3000.
    late = write_dataset(tmp_path/'late',
                         [(m | {'trace_P_arrival_sample': 6000.}, x) for m, x in plain])
    assert np.isnan(open_source(late).record(0).p_onset)


def test_split_by_event(tmp_path, quake_records, write_dataset, caplog):
    "Without a column split: every trace in one split, no event in two, and it is said"
    records = [({k: v for k, v in m.items() if k != 'split'}, x[:, :4200]) for m,
               x in quake_records(60)]
    folder = write_dataset(tmp_path/'unsplit', records)
    with caplog.at_level(logging.WARNING, 'seismodel'):
        parts = {s: set(open_source(folder, s).names) for s in ('train', 'dev', 'test')}
    assert 'no column split' in caplog.text and 'by event' in caplog.text
    assert (set.union(*parts.values()) == {m['trace_name'] for m, _ in records}
            and sum(map(len, parts.values())) == 60)
    event = {m['trace_name']: m['source_id'] for m, _ in records}
    events = [{event[t] for t in part} for part in parts.values()]
    assert not events[0] & events[1] and not events[0] & events[2] and not events[1] & events[2]


# data sets: what stops

def test_folders_that_are_no_data_set(tmp_path, quakes_folder):
    "One sentence each, with the name of the culprit"
    def copy(name, *files):
        (tmp_path/name).mkdir()
        for f in files: (tmp_path/name/f).write_bytes((quakes_folder/f).read_bytes())

    copy('bare'); copy('no_table', 'waveforms.hdf5'); copy('no_samples', 'metadata.csv')
    for name in ('cut', 'text', 'blank', 'rowless', 'garbage'):
        copy(name, 'metadata.csv', 'waveforms.hdf5')
    os.truncate(tmp_path/'cut/waveforms.hdf5', 50_000)
    (tmp_path/'text/waveforms.hdf5').write_text('not HDF5', encoding='utf-8')
    (tmp_path/'blank/metadata.csv').write_text('', encoding='utf-8')
    (tmp_path/'rowless/metadata.csv').write_text((quakes_folder/'metadata.csv').read_text(
        encoding='utf-8').splitlines()[0] + '\n', encoding='utf-8')
    (tmp_path/'garbage/metadata.csv').write_bytes(bytes(range(128, 256)) * 9)
    culprits = {'nowhere': 'does not exist', 'bare': 'metadata.csv', 'no_table': 'metadata.csv',
                'no_samples': 'waveforms.hdf5', 'cut': 'waveforms.hdf5', 'text': 'waveforms.hdf5',
                'blank': 'metadata.csv', 'rowless': 'lists no trace', 'garbage': 'metadata.csv',
                'quakes/metadata.csv': 'is a file'}
    for name, culprit in culprits.items():
        with pytest.raises(UserError, match=culprit) as error: open_source(tmp_path/name)
        assert one_sentence(error) and name in str(error.value)


@pytest.mark.parametrize('column',
                         ['trace_name', 'trace_sampling_rate_hz', 'trace_component_order'])
def test_missing_columns_are_named(quakes_folder, column):
    table = pd.read_csv(quakes_folder/'metadata.csv')
    table.drop(columns=column).to_csv(quakes_folder/'metadata.csv', index=False)
    with pytest.raises(UserError, match=f'no column {column}') as error: open_source(quakes_folder)
    assert one_sentence(error)


def test_what_seisbench_refuses_is_one_sentence(quakes_folder):
    "Here an empty cell in trace_component_order, and words for a rate"
    for column in ('trace_component_order', 'trace_sampling_rate_hz'):
        table = pd.read_csv(quakes_folder/'metadata.csv', dtype=str)
        table.loc[3, column] = None if 'order' in column else 'fast'
        table.to_csv(quakes_folder/'metadata.csv', index=False)
        with pytest.raises(UserError, match='SeisBench cannot read') as error:
            open_source(quakes_folder)
        assert one_sentence(error)


def test_splits_and_components(tmp_path, quakes_folder, quake_records, write_dataset):
    with pytest.raises(UserError,
                       match=r"no trace in split 'val', only in dev \(12\), test \(12\), train "
                             r"\(24\)"):
        open_source(quakes_folder, 'val')
    with pytest.raises(UserError, match='choose train, dev or test'):
        open_source('synthetic', 'val')
    z_only = ((m | {'trace_component_order': 'Z'}, x[:1]) for m, x in quake_records(8))
    vertical = write_dataset(tmp_path/'vertical', z_only)
    with pytest.raises(UserError, match='no trace has all of'): open_source(vertical)
    brief = write_dataset(tmp_path/'brief',
                          ((m | {'trace_npts': 2000}, x[:, :2000]) for m, x in quake_records(8)))
    with pytest.raises(UserError, match='no usable trace.*shorter than half a window'):
        open_source(brief)
    assert len(open_source(brief, window=4000)) == 4               # half of the window asked for


def test_published_names(tmp_path, quakes_folder, monkeypatch):
    "From the cache when it is there; without a network one sentence, and the cache is as it was"
    import requests
    import seisbench
    monkeypatch.setattr(seisbench, 'cache_data_root', tmp_path/'cache')

    def offline(*args, **kwargs): raise requests.exceptions.ConnectionError('no route\nto host')
    monkeypatch.setattr(requests, 'get', offline); monkeypatch.setattr(requests, 'head', offline)
    with pytest.raises(UserError, match='SeisBench cannot provide ETHZ') as error:
        open_source('ETHZ')
    assert one_sentence(error)
    assert not (tmp_path/'cache/ethz').exists()

    def broken(url, target, **kwargs):
        Path(target).write_bytes(b'half of it'); raise KeyboardInterrupt
    (tmp_path/'cache/stead').mkdir(parents=True)
    (tmp_path/'cache/stead/mine.txt').write_text('stays', encoding='utf-8')
    with monkeypatch.context() as m:
        m.setattr(seisbench.util, 'download_http', broken)
        with pytest.raises(KeyboardInterrupt): open_source('STEAD')
    assert [f.name for f in (tmp_path/'cache/stead').iterdir()] == ['mine.txt']

    quakes_folder.rename(tmp_path/'cache/ethz')
    assert len(open_source('ETHZ')) == 24
    for name in ('STEADY', 'WaveformDataset', 'os'):
        with pytest.raises(UserError, match='neither a folder') as error: open_source(name)
        assert one_sentence(error)


# data sets: what is left out, and what is redrawn

def test_left_out_from_the_start(tmp_path, quake_records, write_dataset, caplog):
    "Rows that the table itself disqualifies: counted, named, said once"
    records = [(m | {'split': 'train'}, x) for m, x in quake_records(12)]
    edits = [{'trace_component_order': 'H'}, {'trace_sampling_rate_hz': np.nan},
             {'trace_sampling_rate_hz': -100.},
             {'trace_npts': 2047}]
    folder = write_dataset(tmp_path/'left',
                           [(m | e, x) for (m, x), e in zip(records, edits + [{}] * 8)])
    table = pd.read_csv(folder/'metadata.csv')
    pd.concat([table, table.iloc[[7]]]).to_csv(folder/'metadata.csv', index=False)
    with caplog.at_level(logging.WARNING, 'seismodel'): source = open_source(folder)
    assert source.left_out == {'no component Z, N or E': ['trace000'],
                               'sampling rate not between 10 and 10,000 Hz': [
        'trace001', 'trace002'],
                               'shorter than half a window': ['trace003'],
                               'trace name appears twice': ['trace007']}
    assert source.names == [f'trace{k:03}' for k in range(4, 12)]
    assert '2 left out, sampling rate not between 10 and 10,000 Hz (trace001, …)' in caplog.text


def spoil(folder, count):
    """Damage the first traces of the training split: NaN, infinity, flat, too short, entry gone,
    wrong rank"""
    import h5py
    table = pd.read_csv(folder/'metadata.csv')
    names = table.trace_name[table.split == 'train'].tolist()[:count]
    with h5py.File(folder/'waveforms.hdf5', 'r+') as f:
        for k, name in enumerate(names):
            x = f['data'][name][()]
            del f['data'][name]
            if k % 6 == 0: x[1, 77] = np.nan
            if k % 6 == 1: x[2, 5000] = -np.inf
            if k % 6 == 2: x[:] = 1e-13
            if k % 6 == 3: x = x[:, :100]
            if k % 6 == 5: x = x[:1]
            if k % 6 != 4: f['data'][name] = x
    return names


def test_bad_records_are_redrawn_and_named(quakes_folder, caplog):
    bad = spoil(quakes_folder, 6)
    data = WindowDataset([open_source(quakes_folder)], 300, seed=3)
    with caplog.at_level(logging.WARNING, 'seismodel'): items = [data[n] for n in range(300)]
    assert all(torch.isfinite(i['x']).all() and i['x'].abs().max() > 0 for i in items)
    assert sorted(data.rejected) == sorted(f'quakes/{name}' for name in bad)
    assert sum(i['redrawn'].item() for i in items) == pytest.approx(100, abs=40)   # 6 of 24 are bad
    assert all(caplog.text.count(f'quakes/{name}:') == 1 for name in bad)
    fresh = WindowDataset([open_source(quakes_folder)], 300, seed=3)
    for n in (250, 3, 120):
        torch.testing.assert_close(fresh[n], items[n], rtol=0, atol=0, equal_nan=True)


def test_one_usable_record_is_found_and_none_is_an_error(quakes_folder):
    spoil(quakes_folder, 23)
    data = WindowDataset([open_source(quakes_folder)], 40, seed=3)
    assert all(data[n]['x'].abs().max() > 0 for n in range(40))
    assert len(data.rejected) == 23
    table = pd.read_csv(quakes_folder/'metadata.csv')
    bad = [k.split('/')[1] for k in data.rejected]
    table[table.trace_name.isin(bad)].to_csv(quakes_folder/'metadata.csv', index=False)
    nothing = WindowDataset([open_source(quakes_folder)], 40)
    with pytest.raises(UserError,
                       match='no usable record in quakes; the first: quakes/trace0') as error:
        nothing[0]
    assert one_sentence(error)


class Needle(Source):
    "A large source with one usable record"
    name = 'needle'
    def __len__(self): return 2500

    def record(self, i):
        if i != 1741: raise BadRecord(str(i), 'broken')
        return Record(np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32),
                      np.nan, np.nan, str(i))


def test_a_needle_is_found():
    "A thousand random draws will not do for one record in 2,500"
    data = WindowDataset([Needle()], 6)
    items = [data[n] for n in range(6)]
    assert all(item['x'].abs().max() > 0 for item in items)
    assert max(item['redrawn'].item() for item in items) > 1000


class Silence(Source):
    "A source whose records move in their last second only"
    name = 'silence'
    def __len__(self): return 3

    def record(self, i):
        x = np.zeros((9000, 3), np.float32)
        x[-100:] = np.random.default_rng(i).standard_normal((100, 3))
        return check_record(Record(x, np.nan, np.nan, str(i)))


def test_windows_without_signal_are_redrawn():
    data = WindowDataset([Silence()], 20, seed=1)
    items = [data[n] for n in range(20)]
    assert all(i['x'].abs().max() > 0 for i in items)
    # about 2 % of the windows have any
    assert sum(i['redrawn'].item() for i in items) > 100
    assert set(data.rejected.values()) == {'no signal in the window that was drawn'}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(16, 128), st.floats(0, 1, exclude_max=True))
def test_cut_of_any_length(samples, window, u):
    "Short or long: the samples of the record, zeros around them, picks moved along"
    x = 5 + np.random.default_rng(samples).standard_normal((samples, 3)).astype(np.float32)
    record = Record(x, samples / 2, np.nan, 'x')
    if samples == 1:
        with pytest.raises(BadRecord): cut_window(record, window, u)
        return
    w = cut_window(record, window, u)
    (a, b), = w.valid
    assert w.x.shape == (1, window, 3) and b - a == min(samples, window)
    assert not w.x[0, :a].any() and not w.x[0, b:].any()
    first = next(k for k in range(samples) if np.array_equal(x[k:k + b - a], w.x[0, a:b])) - a
    assert np.isnan(w.onset[0, 0]) == (not 0 <= samples / 2 - first < window)
    assert np.isnan(w.onset[0, 0]) or w.onset[0, 0] == np.float32(samples / 2 - first)


# windows

def test_sources_come_in_their_shares(quakes_folder):
    sources = [open_source(quakes_folder), open_source(quakes_folder, 'dev'), SyntheticSource()]
    data = WindowDataset(sources, 400, weights=[6, 2, 0], seed=4)
    drawn = np.bincount([data[n]['source'].item() for n in range(400)], minlength=3)
    assert drawn[2] == 0 and drawn[0] == pytest.approx(300, abs=40)
    for weights in ([1, 2], [1, -1, 1], [0, 0, 0], [1, np.nan, 1]):
        with pytest.raises(UserError, match='weights'): WindowDataset(sources, 4, weights=weights)
    with pytest.raises(UserError): WindowDataset([], 4)


@pytest.mark.parametrize('method, processes',
                         [p for p in (('fork', 2), ('spawn', 1))
                          if p[0] in get_all_start_methods()])
def test_loader_processes_change_nothing(quakes_folder, method, processes):
    "Forked or spawned, they give the windows that one process gives; also from the middle"
    sources = [open_source(quakes_folder), SyntheticSource(seed=3)]
    # the parent has read before its children start
    sources[0].record(0)
    alone = WindowDataset(sources, 8, seed=11, start=100)
    later = WindowDataset(sources, 4, seed=11, start=104)
    batches = list(DataLoader(later, batch_size=2, num_workers=processes,
                              multiprocessing_context=method))
    assert [b['n'].tolist() for b in batches] == [[104, 105], [106, 107]]
    for k, b in enumerate(batches):
        for j in range(2):
            item = {key: v[j] for key, v in b.items()}
            torch.testing.assert_close(item, alone[4 + 2 * k + j], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(IndexError): alone[8]


def test_large_files_are_not_kept_in_memory(quakes_folder, monkeypatch):
    "Above 1 GiB every read goes to the disk, with the same result"
    small = open_source(quakes_folder)
    real = Path.stat
    huge = lambda self, **kw: os.stat_result([2**30 + 1 if k == 6 else v for k,
                                              v in enumerate(real(self, **kw)[:10])])
    monkeypatch.setattr(Path, 'stat', huge)
    large = open_source(quakes_folder)
    monkeypatch.undo()
    assert (small.data.cache, large.data.cache) == ('full', None)
    for i in range(4):
        np.testing.assert_array_equal(small.record(i).waveform, large.record(i).waveform)


def test_synthetic_splits_are_disjoint():
    first = {s: SyntheticSource(split=s).record(5).waveform for s in ('train', 'dev', 'test')}
    assert (not np.array_equal(first['train'], first['dev'])
            and not np.array_equal(first['train'], first['test']))
    np.testing.assert_array_equal(first['dev'], SyntheticSource(split='dev').record(5).waveform)
    for s in first:
        assert (len({SyntheticSource(split=t).record(k).name for t in first for k in range(50)})
                == 150)


def test_records_made_together_are_the_same():
    """One by one or as a batch of the loader, with a number twice in it; out of range stays out of
    range"""
    alone, together = SyntheticSource(seed=4), SyntheticSource(seed=4)
    together.prefetch([3, 900, 41])
    for i in (41, 3, 900, 3):
        for a, b in zip(alone.record(i), together.record(i)): np.testing.assert_array_equal(a, b)
    data = WindowDataset([SyntheticSource()], 20, seed=2)
    batch = data.__getitems__([7, 2, 7, 19])
    for n, item in zip([7, 2, 7, 19], batch):
        torch.testing.assert_close(item, data[n], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(IndexError): data.__getitems__([1, 20])


# continuous files

@pytest.fixture
def stream():
    import obspy
    return obspy.read()


def write_mseed(stream, path):
    stream.write(str(path), format='MSEED')
    return path


def test_obspy_example(tmp_path, stream):
    """Z N E whatever the order in the file, mean removed, in any format, with odd characters in the
    name"""
    stream.traces = stream.traces[::-1]
    w = read_waveform(write_mseed(stream, tmp_path/'a [1]*.mseed'))
    for c, component in enumerate('ZNE'):
        data = stream.select(component=component)[0].data
        np.testing.assert_allclose(w.waveform[:, c], data - data.mean(), rtol=1e-5, atol=1e-3)
    assert ((w.start, w.station, w.components, w.gaps)
            == ('2009-08-24T00:20:03.000000Z', 'BW.RJOB..EH', 'ZNE', []))
    assert w.waveform.dtype == np.float32 and w.waveform.shape == (3000, 3)


def test_gaps_nan_and_missing_components(tmp_path, stream):
    for tr in stream: tr.data = tr.data + 1e4
    stream[0].data[500:520] = np.nan
    stream[1].data[2000] = np.inf
    w = read_waveform(write_mseed(stream[:2], tmp_path/'gaps.mseed'))
    assert w.gaps == [(500, 520), (2000, 2001)] and w.components == 'ZN'
    assert (np.abs(w.waveform[500:520, 0]).max() == w.waveform[2000, 1]
            == np.abs(w.waveform[:, 2]).max() == 0)
    assert np.isfinite(w.waveform).all() and np.abs(w.waveform).max() < 5e3


def test_components_that_do_not_overlap_wholly(tmp_path, stream):
    t = stream[0].stats.starttime
    stream[0].trim(t + 5)
    # less than a sample: computed at its true time
    stream[1].stats.starttime += .004
    w = read_waveform(write_mseed(stream, tmp_path/'shifted.mseed'))
    assert w.waveform.shape == (3000, 3) and w.gaps == [(0, 500)]
    # from sample 1
    moved = stream[1].copy().interpolate(100., method='lanczos', a=40, starttime=t + .01).data
    off = lambda x: np.abs(x - moved)[50:2900].max()/np.abs(moved).max()
    got = w.waveform[1:, 1][:len(moved)] + stream[1].data.mean()
    assert off(got) < .01 < off(stream[1].data[:len(moved)])


def test_other_rates_in_a_file(tmp_path, stream):
    "200 Hz made by interpolation comes back as the 100 Hz that it was made from"
    want = read_waveform(write_mseed(stream, tmp_path/'plain.mseed')).waveform
    stream.interpolate(200., method='lanczos', a=20)
    w = read_waveform(write_mseed(stream, tmp_path/'fast.mseed'))
    assert w.waveform.shape == want.shape
    assert np.abs(w.waveform - want)[200:-200].max() < .05 * np.abs(want).max()


def test_files_that_cannot_be_used(tmp_path, stream):
    other = stream.copy()
    for tr in other: tr.stats.station = 'OTHER'
    write_mseed(stream + other, tmp_path/'two.mseed')
    for tr in other: tr.stats.station, tr.stats.channel = 'RJOB', 'LOG'
    write_mseed(other, tmp_path/'log.mseed')
    late = stream.copy()
    for tr in late: tr.stats.starttime += 400 * 86400
    write_mseed(stream + late, tmp_path/'apart.mseed')
    (tmp_path/'text.mseed').write_text('not a seismogram', encoding='utf-8')
    (tmp_path/'void.mseed').write_bytes(b'')
    reasons = {'none': 'does not exist', 'two': 'several instruments',
               'log': 'no samples on a channel',
               'apart': 'nearly all gap', 'text': 'not a waveform file',
               'void': 'not a waveform file'}
    for name, why in reasons.items():
        with pytest.raises(UserError, match=why) as error: read_waveform(tmp_path/f'{name}.mseed')
        assert one_sentence(error) and f'{name}.mseed' in str(error.value)


def test_real_streams(real_data):
    """Hours of real stations where they are on the machine: right length, three components, no gap
    filled by accident"""
    for path in [p for folder in real_data[:1]
                 for p in sorted((folder.parent/'continuous').glob('*.mseed'))]:
        import obspy
        w, stream = read_waveform(path), obspy.read(str(path))
        assert (w.components == 'ZNE'
                and abs(len(w.waveform) - max(tr.stats.npts for tr in stream)) <= 1)
        assert np.isfinite(w.waveform).all() and not flat(torch.from_numpy(w.waveform)).any()


def test_nothing_heavy_is_imported():
    "seisbench (seconds), obspy and matplotlib wait until they are needed"
    import subprocess
    import sys
    code = ('import sys, seismodel.data.windows, seismodel.data.sources\n'
            'print([m for m in ("seisbench", "obspy", "matplotlib.pyplot", "pandas") if m in '
            'sys.modules])')
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         cwd=root)
    assert out.stdout == '[]\n'

"Packing: the round trip, the bookkeeping, every dirty row, archives, and SIGKILL at random moments"
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seismodel.data.store_reader import Store
from seismodel.data.windows import WindowDataset
from seismodel.data.archive import Selection
from seismodel.data.pack import ArchiveItems, open_items, pack
from seismodel.data.sources import open_source
from seismodel.data.store import DTYPES, dequantize_samples, quantize_samples
from seismodel.data.waveform import read_waveform
from seismodel.signals.records import STATUS
from seismodel.signals.resample import resample
from seismodel.signals.normalize import flat
from seismodel.core import UserError

root = Path(__file__).parents[1]
content = lambda folder: {str(f.relative_to(folder)): f.read_bytes()
                          for f in sorted(folder.rglob('*')) if f.is_file()}
one_sentence = lambda error: '\n' not in str(error.value) and 10 < len(str(error.value)) < 500

# sixteen bits

@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.integers(-14, 30), st.floats(-1e3, 1e3),
       st.integers(1, 400), st.integers(0, 2**16))
def test_quantisation_keeps_its_bound(dtype, power, offset, samples, seed):
    "Any amplitude, any offset, a single sample too: finite, and within the stated error"
    x = ((np.random.default_rng(seed).standard_normal((samples, 3))
          + offset) * 10. ** power).astype(np.float32)
    q, o, s = quantize_samples(x, dtype)
    assert q.shape == x.shape and q.dtype == DTYPES[dtype] and np.isfinite(q).all()
    y = dequantize_samples(q, o, s)
    float32 = np.abs(x.astype(float)).max(0) * 2.**-22
    bound = {'int16': s / 2, 'float16': np.abs(x - o) * 2.**-11 + s * 2.**-24,
             'float32': 0 * x}[dtype]
    assert (np.abs(y.astype(float) - x) <= bound + (float32 if dtype != 'float32' else 0)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(-2**23, 2**23), st.integers(0, 65534), st.integers(2, 300),
       st.integers(0, 2**16))
def test_counts_within_sixteen_bits_are_exact(offset, span, samples, seed):
    "Whole numbers come back as they were, whatever the offset of the sensor"
    x = (offset + np.random.default_rng(seed).integers(0, span + 1, (samples, 3))).astype(
        np.float32)
    q, o, s = quantize_samples(x, 'int16')
    still = s == 0                                                  # one value: it is the offset
    np.testing.assert_array_equal(dequantize_samples(q, o, s)[:, ~still], x[:, ~still])
    assert np.abs(dequantize_samples(q, o, s) - x)[:, still].max(initial=0) <= 2.

# the round trip

def expect_equal(store, row, want):
    "A trace of a store against the record that it was made from"
    got = store.record(row)
    exact = store.manifest['dtype'] == 'float32'
    bound = 0 if exact else store.index['scale'][row] / 2 + np.abs(want.waveform).max(0) * 2.**-23
    assert got.waveform.shape == want.waveform.shape and got.name == want.name
    if store.manifest['dtype'] != 'float16':
        assert (np.abs(got.waveform - want.waveform) <= bound).all()
    else:
        np.testing.assert_allclose(got.waveform, want.waveform, rtol=2.**-10,
                                   atol=np.ptp(want.waveform, 0).max() * 2.**-11)
    np.testing.assert_array_equal([got[k] for k in (1, 2, 4, 5, 6, 7)],
                                  [want[k] for k in (1, 2, 4, 5, 6, 7)])


@pytest.mark.parametrize('dtype', sorted(DTYPES))
def test_round_trip(tmp_path, quakes_folder, dtype):
    """Each record as SeisBench and our `resample` give it, in the split where it was, with its
    picks and its columns"""
    manifest = pack([quakes_folder], tmp_path/'store', dtype)
    store, table = Store(tmp_path/'store'), pd.read_csv(tmp_path/'store/traces.csv')
    assert manifest['traces'] == len(table) == 48 and store.verify() == []
    original = pd.read_csv(quakes_folder/'metadata.csv').set_index('trace_name')
    for split in ('train', 'dev', 'test'):
        direct, packed = open_source(quakes_folder, split), open_source(tmp_path/'store', split)
        assert len(direct) == len(packed)
        for i in range(len(direct)): expect_equal(store, packed.rows[i], direct.record(i))
    for row in table.itertuples():
        assert (row.source_id == original.source_id[row.trace_name]
                and row.split == original.split[row.trace_name])
    noise = [STATUS[k]
             for k in store.index['p_status'][(table.trace_category == 'noise').to_numpy()]]
    assert noise == 8 * ['absent']


def test_real_data_is_accounted_for(tmp_path, real_data):
    """Samples of real traces against SeisBench's own get_waveforms; every trace packed or left out
    by name"""
    for folder in real_data:
        import seisbench.data as sbd
        table = pd.read_csv(folder/'metadata.csv', low_memory=False)
        manifest = pack([folder], tmp_path/folder.name)
        left = list(csv.DictReader(open(tmp_path/folder.name/'left_out.csv', encoding='utf-8')))
        assert manifest['traces'] + len(left) == len(table)
        store, data = Store(tmp_path/folder.name), sbd.WaveformDataset(
            folder, component_order='ZNE', dimension_order='NCW')
        names = dict(zip(table.trace_name, range(len(table))))
        for row in range(0, len(store), 17):
            r, k = store.record(row), names[store.record(row).name]
            x = resample(data.get_waveforms(k).T, table.trace_sampling_rate_hz[k])
            assert (np.abs(r.waveform - x) <= store.index['scale'][row] / 2
                    + np.abs(x).max(0) * 2.**-23).all()
            for phase, got in (('p', r.p_onset), ('s', r.s_onset)):
                if f'trace_{phase}_arrival_sample' in table:
                    np.testing.assert_equal(got, table[f'trace_{phase}_arrival_sample'][k])


def test_real_streams_are_accounted_for(tmp_path, real_data):
    "Every sample of the continuous files is in one record; what is no waveform is named"
    for folder in [f.parent/'continuous' for f in real_data[:1]
                   if (f.parent/'continuous').is_dir()]:
        manifest, files = pack([folder], tmp_path/'store'), sorted(folder.iterdir())
        whole = {f: read_waveform(f) for f in files if f.suffix == '.mseed'}
        assert manifest['samples'] == sum(len(w.waveform) for w in whole.values())
        left = [row['trace_name']
                for row in csv.DictReader(open(tmp_path/'store/left_out.csv', encoding='utf-8'))]
        assert sorted(Path(name).name for name in left) == [f.name for f in files if f not in whole]
        store = Store(tmp_path/'store')
        # the first record of each is where the file begins
        for w in whole.values():
            rows = [k for k in range(len(store)) if store.index['name'][k].decode()
                    == f'{w.station} {w.start}']
            x = store.record(rows[0]).waveform
            assert x.shape == w.waveform[:len(x)].shape
            # the mean of an hour in place of that of the whole
            off = x - w.waveform[:len(x)]
            np.testing.assert_allclose(off, off[:1].repeat(len(x), 0), atol=.01)
            assert (x == x.round()).all() and np.abs(off).max() < 3 * w.waveform.std()

# what is left out, and what stops

def edited(records, **edits):
    "The records, some of them changed: name -> (metadata, waveform) -> (metadata, waveform)"
    for (m, x), edit in zip(records, list(edits.items()) + 99 * [None]):
        yield (m | {'split': 'train'},
               x) if edit is None else edit[1]({k: v for k, v in m.items() if k != 'trace_npts'}
                                               | {'trace_name': edit[0], 'split': 'train'}, x)


def test_every_dirty_row(tmp_path, quake_records, write_dataset):
    """One trace of each fault among good ones: packed, mended or left out with its reason, as the
    table says"""
    poke = lambda value: lambda m, x: (m, np.where(np.arange(x.shape[1]) == 77, value,
                                                   x).astype(np.float32))
    coded = lambda codes, rows: lambda m, x: (m | {'trace_component_order': codes}, x[rows])
    folder = write_dataset(tmp_path/'dirty', edited(quake_records(30),
        one_nan=poke(np.nan), inf=poke(-np.inf), dead=lambda m, x: (m, 0 * x + 1e-9),
                                                    brief=lambda m, x: (m, x[:, :2000]),
        named_brief=lambda m, x: (m | {'trace_npts': 2047}, x), gone=lambda m, x: (m, x),
                                                    code=coded('H', [0]),
        rate=lambda m, x: (m | {'trace_sampling_rate_hz': np.nan}, x), slow=lambda m,
                                                    x: (m | {'trace_sampling_rate_hz': .01}, x),
        enz=coded('ENZ', [2, 1, 0]), z12=coded('Z12', [0, 1, 2]), vertical=coded('Z', [0]),
        flat_n=lambda m, x: (m, x / x.std() * np.array([[1], [0], [1]], np.float32)
                             + 3), huge=lambda m, x: (m, (x / x.std() * 1e30).astype(np.float32)),
        integer=lambda m, x: (m, (x / x.std() * 1000).astype(np.float32).round()), fast=lambda m,
                                                    x: (m | {'trace_sampling_rate_hz': 250.}, x),
        three_quarters=lambda m, x: (m, x[:, :3000]), late_pick=lambda m, x: (
        m | {'trace_p_arrival_sample': 9e4}, x), nan=lambda m, x: (m, x)))
    table = pd.read_csv(folder/'metadata.csv')
    # points nowhere
    table.loc[table.trace_name == 'gone', 'trace_name'] = 'lost'
    # the only one without
    table.loc[20, 'split'] = None
    pd.concat([table, table.iloc[[25]]]).to_csv(folder/'metadata.csv', index=False)   # twice
    pack([folder], tmp_path/'store')
    left = {row['trace_name']: row['why']
            for row in csv.DictReader(open(tmp_path/'store/left_out.csv', encoding='utf-8'))}
    assert {k: v.split(':')[0] for k, v in left.items()} == {
        'one_nan': 'NaN or infinite samples in component Z, N, E',
        'inf': 'NaN or infinite samples in component Z, N, E',
        'dead': 'all three components are flat',
        'brief': '2000 samples at 100 Hz, less than half a window',
        'named_brief': 'shorter than half a window', 'lost': 'cannot be read',
        'code': 'no component Z, N or E',
        'rate': 'sampling rate not between 10 and 10,000 Hz',
        'slow': 'sampling rate not between 10 and 10,000 Hz',
        'row 18': 'no trace name', table.trace_name[20]: 'no split, in a table that has some',
        table.trace_name[25]: 'trace name appears twice'}
    source, direct = open_source(tmp_path/'store'), open_source(folder)
    assert len(source) == 31 - 12
    kept = {source.label(i): source.record(i) for i in range(len(source))}
    names = {direct.names[i]: i for i in range(len(direct))}
    for i in range(len(source)):
        expect_equal(source.store, source.rows[i], direct.record(names[source.label(i)]))
    assert (flat(__import__('torch').from_numpy(kept['flat_n'].waveform)).tolist()
            == [False, True, False])
    assert (kept['fast'].waveform.shape == (2400, 3)
            and kept['three_quarters'].waveform.shape == (3000, 3))
    assert np.isnan(kept['late_pick'].p_onset)
    windows = WindowDataset([source], 200, seed=1).batch(range(200))
    assert windows['x'].isfinite().all() and (windows['x'].abs().amax((1, 2)) > 0).all()


def test_folders_that_cannot_be_packed(tmp_path, quakes_folder, quake_records, write_dataset):
    "One sentence, and nothing has been written"
    for name in ('cut', 'no_samples', 'empty', 'notes'): (tmp_path/name).mkdir()
    for name, files in dict(cut=('metadata.csv', 'waveforms.hdf5'), no_samples=('metadata.csv',
                            )).items():
        for f in files: (tmp_path/name/f).write_bytes((quakes_folder/f).read_bytes())
    os.truncate(tmp_path/'cut/waveforms.hdf5', 50_000)
    (tmp_path/'notes/a.txt').write_text('no waveform', encoding='utf-8')
    broken = write_dataset(tmp_path/'broken', ((m, x * np.nan) for m, x in quake_records(6)))
    pack([quakes_folder], tmp_path/'done')
    reasons = {'cut': 'waveforms.hdf5', 'no_samples': 'waveforms.hdf5', 'empty': 'holds no files',
               'notes': 'holds neither',
               'nowhere/at_all': 'does not exist', 'done': 'a packed store already',
               'broken': 'no usable trace in broken; the first: broken/trace000'}
    for name, why in reasons.items():
        with pytest.raises(UserError, match=why) as error:
            pack([str(tmp_path/name)], tmp_path/'out')
        assert one_sentence(error) and not (tmp_path/'out').exists(), name
    for name, why in {'synthetic': 'no end', 'ETZH': 'did you mean ETHZ'}.items():
        with pytest.raises(UserError, match=why): pack([name], tmp_path/'out')
    for kwargs, why in ((dict(dtype='int8'), '--dtype'),
                        (dict(data_weights='1,2'), 'one positive number for each dataset'),
                        (dict(data_weights='-1'), 'one positive number'),
                        (dict(file_mib=0), '--file-mib')):
        with pytest.raises(UserError, match=why): pack([quakes_folder], tmp_path/'out', **kwargs)
    with pytest.raises(UserError, match='other dtype'):
        pack([quakes_folder], tmp_path/'done', 'float16')
    with pytest.raises(UserError, match='no store'): pack([quakes_folder], tmp_path/'notes')
    assert [f.name for f in (tmp_path/'notes').iterdir()] == ['a.txt']


def test_stores_that_cannot_be_opened(tmp_path, quakes_folder):
    "A file cut short, missing, or of something else: one sentence with its name"
    import json
    import shutil
    pack([quakes_folder], tmp_path/'store')

    def spoilt(name, change):
        shutil.copytree(tmp_path/'store', tmp_path/name)
        change(tmp_path/name)
        with pytest.raises(UserError, match=name) as error: open_source(tmp_path/name)
        assert one_sentence(error)
        return str(error.value)

    edit = lambda **new: lambda f: (f/'manifest.json').write_text(json.dumps(
        json.loads((f/'manifest.json').read_text(encoding='utf-8')) | new), encoding='utf-8')
    assert ('samples-00000.npy'
            in spoilt('short', lambda f: os.truncate(f/'samples-00000.npy', 9999)))
    assert 'samples-00000.npy' in spoilt('gone', lambda f: (f/'samples-00000.npy').unlink())
    assert 'index.npy' in spoilt('no_index', lambda f: (f/'index.npy').unlink())
    assert 'traces.csv' in spoilt('no_table', lambda f: (f/'traces.csv').unlink())
    assert 'index.npy' in spoilt('bad_index', lambda f: (f/'index.npy').write_bytes(b'no array'))
    assert 'index.npy' in spoilt('cut_index', lambda f: os.truncate(f/'index.npy', 3000))
    assert 'manifest.json' in spoilt('no_manifest', lambda f: (f/'manifest.json').unlink())
    assert 'manifest.json' in spoilt('half_manifest', lambda f: os.truncate(f/'manifest.json', 300))
    assert 'newer' in spoilt('newer', edit(version=99))
    assert 'no store' in spoilt('other', edit(format='another'))
    assert ("no field 'splits'"
            in spoilt('lacking', lambda f: (f/'manifest.json').write_text(
        '{"format": "seismodel-store", "version": 1, "dtype": "int16"}', encoding='utf-8')))
    assert ('does not belong'
            in spoilt('foreign', lambda f: np.save(f/'index.npy', np.zeros((48, 3)))))
    assert ('not finished'
            in spoilt('unfinished', lambda f: (f/'manifest.json').rename(f/'plan.json')))

# archives

def archive(folder, hours=1., gap=None, **codes):
    "A file a channel of one station, ObsPy's example over and over"
    import obspy
    folder.mkdir(exist_ok=True)
    for k, tr in enumerate(obspy.read()):
        tr.data = np.tile(tr.data, int(120 * hours)).astype(np.float32) + 5000
        tr.stats.update(dict(starttime=obspy.UTCDateTime('2009-08-24T00:20:00'), **codes))
        st = obspy.Stream([tr])
        if gap and k == 1: st = st.cutout(tr.stats.starttime + gap[0], tr.stats.starttime + gap[1])
        st.write(str(folder/f'{tr.id}.{st[0].stats.starttime.date}.sac'.replace('.sac', '.mseed')),
                 format='MSEED')
    return folder


def test_archive_of_several_stations(tmp_path):
    """A gap on one channel ends the records of its station; records lie within an hour; each hour
    is in one split"""
    folder = archive(tmp_path/'archive', 1.5, gap=(1800., 1830.))
    archive(folder, 1.5, station='OTHER')
    (folder/'sub').mkdir()
    for where in (folder, folder/'sub'): (where/'notes.txt').write_text('a note', encoding='utf-8')
    manifest = pack([folder], tmp_path/'store')
    table = pd.read_csv(tmp_path/'store/traces.csv')
    assert sorted(table.station_code.unique()) == ['OTHER', 'RJOB']
    left = list(csv.DictReader(open(tmp_path/'store/left_out.csv', encoding='utf-8')))
    assert ([row['trace_name'] for row in left if 'no waveform' in row['why']]
            == [str(folder/'notes.txt'), str(folder/'sub/notes.txt')])
    lost = [row for row in left if 'gap' in row['why']]
    assert len(lost) == 1 and 'RJOB' in lost[0]['trace_name']
    short = sum(1 for row in left if row['why'] == 'shorter than half a window')
    assert 2 * 540_000 - 3000 - short * 2048 - 5 <= manifest['samples'] <= 2 * 540_000 - 2995
    assert ((table.groupby(table.trace_start_time.str[:13]).split.nunique() == 1).all()
            if 'split' in table else True)
    source = Store(tmp_path/'store')
    hours, splits = table.trace_start_time.str[:13].tolist(), source.index['split'].tolist()
    assert len(set(zip(hours, splits))) == len(set(hours)) == 2
    # no offset of 5000
    assert (source.index['samples'].max() <= 3 * 4096
            and np.abs(source.record(3).waveform.mean()) < 2000)


def test_a_station_day_in_three_files_at_another_rate(tmp_path):
    "SAC, 200 Hz, one component a file, one file cut short"
    import obspy
    (tmp_path/'sac').mkdir()
    for tr in obspy.read():
        tr.data = np.tile(tr.data, 20).astype(np.float32)
        tr.stats.sampling_rate = 200.
        tr.write(str(tmp_path/'sac'/f'{tr.id}.sac'), format='SAC')
    items = list(ArchiveItems([tmp_path/'sac'], 'sac').items())
    assert [len(i.record.waveform) for i in items if i.record] == 3 * [10_000]
    assert items[0].more['trace_components_present'] == 'ZNE'
    file = tmp_path/'sac/BW.RJOB..EHN.sac'
    file.write_bytes(file.read_bytes()[:5000])
    items = list(ArchiveItems([tmp_path/'sac'], 'sac').items())
    assert ([(i.name, i.why.split(':')[0]) for i in items if not i.record]
            == [(str(file), 'a damaged SAC file')])
    assert any(i.record is not None for i in items)                  # Z and E are still there


def test_channels_that_are_no_seismogram(tmp_path):
    "One sample a second, and a pressure gauge, beside a seismometer in one file: each is named"
    import obspy
    (tmp_path/'mixed').mkdir()
    stream, slow, other = obspy.read(), obspy.read()[0], obspy.read()[0]
    slow.stats.channel, slow.stats.sampling_rate, other.stats.channel = 'LHZ', 1., 'HDF'
    (stream + obspy.Stream([slow, other])).write(str(tmp_path/'mixed/a.mseed'), format='MSEED')
    items = list(ArchiveItems([tmp_path/'mixed'], 'mixed').items())
    assert {i.name: i.why for i in items if not i.record} == {
        f"BW.RJOB..LHZ in {tmp_path/'mixed/a.mseed'}": 'sampling rate 1 Hz, not between 10 and '
                                                       '10,000 Hz',
        'BW.RJOB..HD': 'no component is Z, N, E, 1 or 2 (found F): map them with --components '
                       'Z=3,N=1,E=2'}
    assert [i.record.waveform.shape for i in items if i.record] == [(3000, 3)]


def test_minutes_that_lie_far_apart(tmp_path):
    """Two half minutes, 400 days apart, in one file: both are packed, and nothing in between takes
    memory or time"""
    import obspy
    (tmp_path/'far').mkdir()
    late = obspy.read()
    for tr in late: tr.stats.starttime += 400 * 86_400
    (obspy.read() + late).write(str(tmp_path/'far/apart.mseed'), format='MSEED')
    items = list(ArchiveItems([tmp_path/'far'], 'far').items())
    assert ([(i.name[:22], i.record.waveform.shape) for i in items]
            == [('BW.RJOB..EH 2009-08-24', (3000, 3)), ('BW.RJOB..EH 2010-09-28', (3000, 3))])


def as_counts(folder, streams):
    "Streams as files of whole numbers"
    for name, st in streams.items():
        for tr in st: tr.data = tr.data.astype(np.int32)
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        st.write(str(folder/name), format='MSEED')
    return folder


def test_one_record_in_every_layout_is_one_store(tmp_path):
    """Whole, by channel, by ten minutes, as several words: the same traces, and the samples of the
    files to the count"""
    import obspy
    st = obspy.read()
    for tr in st:
        # 50 minutes, with an offset
        tr.data = np.tile(tr.data, 100).round() + 77_000
        tr.stats.starttime = obspy.UTCDateTime('2009-08-24T00:20:00')
    t = st[0].stats.starttime
    parts = [st.slice(t + 600*k, t + 600*(k + 1) - .01) for k in range(5)]
    layouts = [as_counts(tmp_path/'whole', {'a': st.copy()}),
               as_counts(tmp_path/'channels', {tr.id: obspy.Stream([tr.copy()]) for tr in st}),
               as_counts(tmp_path/'parts', {f'{k}/{tr.id}': obspy.Stream([tr.copy()]) for k,
                                            part in enumerate(parts) for tr in part})]
    words = [[f] for f in layouts] + [[str(layouts[1]/'*Z'), *layouts[1].glob('*[NE]')]]
    for k, sources in enumerate(words): pack(sources, tmp_path/f'store{k}')
    files = [{f: x for f, x in content(tmp_path/f'store{k}').items()
              if not f.endswith(('.json', '.csv'))} for k in range(len(words))]
    tables = [pd.read_csv(tmp_path/f'store{k}/traces.csv').drop(columns='store_source')
              for k in range(len(words))]
    for k in range(1, len(words)):
        assert files[k] == files[0] and len(files[0]) == 2
        pd.testing.assert_frame_equal(tables[k], tables[0])
    store = Store(tmp_path/'store0')
    got = np.concatenate([store.record(k).waveform for k in range(len(store))])
    assert got.shape == (300_000, 3) and store.index['samples'].sum() == 300_000
    # hours lose a mean of their own, in whole counts
    for c, tr in enumerate(st):
        off = tr.data - got[:, c]
        assert (len(np.unique(off[:240_000])) == len(np.unique(off[240_000:])) == 1
                and abs(off.mean() - 77_000) < 1000)


def test_what_differs_is_named_and_selected(tmp_path):
    """One second that differs between two files costs that second; stations and times are chosen as
    in pick"""
    import obspy
    folder = archive(tmp_path/'archive', 1.)
    other = obspy.read(str(next(folder.glob('*EHZ*'))))
    t = other[0].stats.starttime
    clash = other.slice(t + 1000, t + 1001).copy()
    clash[0].data = clash[0].data + 1
    clash.write(str(folder/'clash.mseed'), format='MSEED')
    archive(folder, 1., station='OTHER')
    manifest = pack([folder], tmp_path/'store', station='RJOB')
    left = [(row['trace_name'], row['why'])
            for row in csv.DictReader(open(tmp_path/'store/left_out.csv', encoding='utf-8'))]
    assert ('BW.RJOB..EHZ 2009-08-24T00:36:40.000000Z to 2009-08-24T00:36:41.010000Z in '
            f"BW.RJOB..EHZ.2009-08-24.mseed, clash.mseed", 'records that differ') in left
    assert (manifest['samples'] == 360_000 - 101
            and manifest['plan']['selection'] == {'station': 'RJOB'})
    with pytest.raises(UserError, match='other selection'):
        pack([folder], tmp_path/'store', station='OTHER')
    manifest = pack([folder], tmp_path/'late', station='OTHER', start='2009-08-24T01:00')
    assert (manifest['samples'] == 120_000
            and {r['station_code']
                 for r in csv.DictReader(open(tmp_path/'late/traces.csv', encoding='utf-8'))}
            == {'OTHER'})
    with pytest.raises(UserError, match='--station chooses from waveform files'):
        open_items('ETHZ', selection=Selection(station='A'))


def test_published_by_name(tmp_path, quakes_folder, monkeypatch):
    "From SeisBench's cache; its files are listed in the provenance"
    import seisbench
    monkeypatch.setattr(seisbench, 'cache_data_root', tmp_path/'cache')
    (tmp_path/'cache').mkdir()
    quakes_folder.rename(tmp_path/'cache/ethz')
    manifest = pack(['ETHZ'], tmp_path/'store')
    assert manifest['traces'] == 48 and manifest['sources'][0]['name'] == 'ETHZ'
    assert (manifest['sources'][0]['files']['count'] >= 2
            and 'metadata.csv' in manifest['sources'][0]['files'])


def test_positions_are_places_to_go_on(tmp_path, quakes_folder):
    "From the position after any item, the rest of the stream follows"
    for stream in (open_items(str(quakes_folder)),
                   open_items(str(archive(tmp_path/'archive', 1.2, gap=(100., 101.))))):
        items = list(stream.items())
        for k in range(0, len(items), 5):
            assert ([i.name for i in stream.items(items[k].position)]
                    == [i.name for i in items[k + 1:]])

# killed

def run(args, wait=None, after=None):
    """`seismodel pack` as a process, killed after `wait` seconds, or once the folder `after` holds
    something; None: not killed"""
    process = subprocess.Popen([sys.executable, '-m', 'seismodel', 'pack', *map(str, args)],
                               cwd=root, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, PYTHONPATH=str(root)))
    if wait is not None:
        while process.poll() is None and not after.exists(): time.sleep(.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    return process.returncode, out, err


def test_killed_at_random_moments(tmp_path, quake_records, write_dataset):
    """SIGKILL, again and again, then once in peace: the store of the run that was never killed,
    byte for byte"""
    sources = [write_dataset(tmp_path/'quakes', quake_records(200)),
               archive(tmp_path/'archive', 3.)]
    options = ['--file-mib', '1']
    started = time.perf_counter()
    code, out, err = run([*sources, '--out', tmp_path/'whole', *options])
    assert code == 0, err
    work, killed, rng = time.perf_counter() - started, 0, random.Random(4)
    kills = int(os.environ.get('SEISMODEL_KILLS', 2))
    for _ in range(kills):
        code, out, err = run([*sources, '--out', tmp_path/'killed', *options],
                             rng.uniform(0, work / 2 / kills), tmp_path/'killed/parts')
        killed += code == -signal.SIGKILL
        if code == 0: break
    code, out, err = run([*sources, '--out', tmp_path/'killed', *options])
    assert code == 0 and killed > 0, err
    print(f'{killed} of {kills} kills hit a packer at work')
    assert content(tmp_path/'killed') == content(tmp_path/'whole')
    assert not (tmp_path/'killed/parts').exists() and Store(tmp_path/'killed').verify() == []
    pack(sources, tmp_path/'killed', file_mib=1)                       # once more: it is complete
    assert content(tmp_path/'killed') == content(tmp_path/'whole')


def test_killed_at_every_step_of_the_disk(tmp_path, quakes_folder, monkeypatch):
    """The process dies at the n-th time that it brings something to the disk or renames it; nothing
    after that happens"""
    import seismodel.data.store as store
    import seismodel.files as files
    class Died(BaseException): pass
    pack([quakes_folder], tmp_path/'whole', file_mib=1)
    for moment in range(99):
        out, calls = tmp_path/f'killed{moment}', []
        with monkeypatch.context() as m:
            for module, name in ((store, 'to_disk'), (store, 'replace_durably'),
                                 (files, 'replace_durably'), (files, 'force_out')):
                def step(*args, real=getattr(module, name)):
                    calls.append(name)
                    if len(calls) > moment: raise Died
                    return real(*args)
                m.setattr(module, name, step)
            try: pack([quakes_folder], out, file_mib=1)
            except Died: pass
            else: break                                            # there is no such step any more
        pack([quakes_folder], out, file_mib=1)
        assert content(out) == content(tmp_path/'whole')
    assert moment > 15


def test_disk_full(tmp_path, quakes_folder, monkeypatch):
    "One sentence; with room again, the same command finishes"
    import errno
    import seismodel.data.store as store
    pack([quakes_folder], tmp_path/'whole', file_mib=1)
    real, calls = store.to_disk, []

    def full(file):
        calls.append(file)
        if len(calls) > 4: raise OSError(errno.ENOSPC, 'No space left on device')
        real(file)

    with monkeypatch.context() as m:
        m.setattr(store, 'to_disk', full)
        with pytest.raises(UserError, match='no space left') as error:
            pack([quakes_folder], tmp_path/'store', file_mib=1)
        assert one_sentence(error)
    pack([quakes_folder], tmp_path/'store', file_mib=1)
    assert content(tmp_path/'store') == content(tmp_path/'whole')


def test_two_packers_do_not_meet(tmp_path, quakes_folder):
    from seismodel.data.store import StoreWriter
    plan = dict(dtype='int16', window=4096, shard_samples=10**6, sources=[])
    with StoreWriter(tmp_path/'store', plan):
        with pytest.raises(UserError, match='another process'): StoreWriter(tmp_path/'store', plan)


def test_command_line(tmp_path, quakes_folder, capsys):
    "Counts on stdout, exit code 2 and one sentence for a mistake"
    from seismodel.cli import main
    assert (main(['pack', str(quakes_folder), '--out', str(tmp_path/'store'), '--dtype', 'float16'])
            == 0)
    out = capsys.readouterr().out
    assert '48 traces' in out and 'quakes: 24 train, 12 dev, 12 test' in out
    assert (main(['inspect', str(tmp_path/'store'), '--out', str(tmp_path/'page.png'), '--verify'])
            == 0)
    assert 'every checksum is right' in capsys.readouterr().out and (tmp_path/'page.png').exists()
    assert main(['pack', str(tmp_path/'no/where'), '--out', str(tmp_path/'other')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'does not exist' in err and not (tmp_path/'other').exists()

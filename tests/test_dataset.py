"""From picks and an archive to a labelled data set: every format, every pick in its place, nothing
half-written, no event in two splits"""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import obspy
import pandas as pd
import pytest
from conftest import eager_picker, root
from obspy import UTCDateTime

from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.archive import open_archive
from seismodel.data.build_dataset import DatasetOptions, build_dataset
from seismodel.data.catalogue import (Catalogue, PhasePick, SourceEvent, catalogue_to_obspy,
                                      nanoseconds,
                                      read_any, read_catalogue)
from seismodel.data.dataset_report import onsets_in
from seismodel.data.pick_checks import StationEvent, associate_by_station
from seismodel.data.record_plan import (HOUR_NS, Placed, RecordPlan, assign_splits,
                                        unlabelled_zones)
from seismodel.data.sources import open_source
from seismodel.picking.dataset import by_station, check_labels, suspicions

T0 = UTCDateTime('2024-02-28T02:00:00')
STATIONS = ('ABC', 'DEF', 'GHI')
examples = Path(obspy.__file__).parent/'io'


def picks_of(name, seconds, phases='PS', stations=STATIONS, **more):
    "P and S of an event, a second later at each further station"
    return [PhasePick(name, 'XX', station, '00', f'HH{c}', phase, (T0 + seconds + k + d).ns,
                      'manual', **more)
            for k, station in enumerate(stations) for phase, c,
            d in (('P', 'Z', 0.), ('S', 'N', 4.5)) if phase in phases]


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """Three stations, four hours of counts at 100 Hz from 01:00; DEF lacks 02:16:40 to 02:17:40 in
    all components"""
    folder, rng = tmp_path_factory.mktemp('archive'), np.random.default_rng(0)
    for station in STATIONS:
        for c in 'ZNE':
            head = dict(network='XX', station=station, location='00', channel=f'HH{c}',
                        sampling_rate=100., starttime=T0 - 3600)
            trace = obspy.Trace(rng.integers(-500, 500, 4*360_000).astype(np.int32), head)
            stream = obspy.Stream([trace])
            if station == 'DEF':
                stream = obspy.Stream([trace.slice(endtime=T0 + 1000),
                                       trace.slice(starttime=T0 + 1060)])
            stream.write(str(folder/f'{station}.{c}.mseed'), format='MSEED')
    return folder


def build(picks, archive, out, events=None, **options):
    catalogue = Catalogue(dict(events or {}), list(picks))
    return build_dataset(catalogue, open_archive(archive), out, DatasetOptions(**options))


def reasons(built): return sorted(why for why, _ in built.catalogue.dropped)


def test_quakeml_comes_out_as_it_went_in(archive, tmp_path):
    """QuakeML, data set, QuakeML: the same times to the microsecond, codes, phases, origins and
    magnitudes"""
    picks = picks_of('smi:local/one', 100.123456) + picks_of('smi:local/two', 130.654321)
    picks = [p._replace(phase='Pn' if p.phase == 'P' else 'Sg', polarity='positive') for p in picks]
    events = {n: SourceEvent(n, (T0 + s).ns, 46.25, 7.5, 8., 1.5, 'ML') for n,
              s in (('smi:local/one', 95), ('smi:local/two', 125.5))}
    catalogue_to_obspy(Catalogue(events, picks)).write(str(tmp_path/'in.xml'), format='QUAKEML')
    assert main(['dataset', str(tmp_path/'in.xml'), '--waveforms', str(archive), '--out',
                 str(tmp_path/'data')]) == 0
    again = read_catalogue([tmp_path/'data'])
    catalogue_to_obspy(again).write(str(tmp_path/'out.xml'), format='QUAKEML')
    said = lambda path: sorted((str(e.resource_id), e.origins[0].time.ns, e.origins[0].latitude,
                                e.origins[0].depth, e.magnitudes[0].mag,
                                p.time.ns, p.waveform_id.get_seed_string(), p.phase_hint,
                                p.polarity, p.evaluation_mode)
                               for e in obspy.read_events(str(path)) for p in e.picks)
    assert len(said(tmp_path/'in.xml')) == 12
    assert said(tmp_path/'out.xml') == said(tmp_path/'in.xml')


def test_a_pick_is_where_its_waveform_is(tmp_path):
    "A step in the archive lies at the sample of its pick, at 100 Hz, and at 250 Hz resampled"
    for rate, station in ((100., 'ABC'), (250., 'DEF')):
        x = np.zeros(int(900*rate))
        x[int(400*rate):] = 1000.
        for c in 'ZNE':
            head = dict(network='XX', station=station, location='00', channel=f'HH{c}',
                        sampling_rate=rate, starttime=T0)
            obspy.Trace(x.astype(np.float32), head).write(str(tmp_path/f'{station}.{c}.mseed'),
                                                          format='MSEED')
    picks = [p._replace(time=(T0 + 400).ns) for p in picks_of('one', 0., 'P', STATIONS[:2])]
    built = build(picks, tmp_path, tmp_path/'data', noise=0.)
    assert len(built.rows) == 2
    source = open_source(tmp_path/'data', built.rows[0]['split'])
    for k in range(2):
        r = source.record(k)
        assert r.waveform.shape == (9000, 3)
        assert r.p_onset == 3000.
        step = np.abs(np.diff(r.waveform[:, 0])).argmax() + 1
        assert abs(step - r.p_onset) <= 1


def test_every_pick_of_every_event_in_a_record(archive, tmp_path):
    """The second event of a swarm is labelled in the record of the first, by event, and the first
    in its"""
    built = build(picks_of('one', 100.) + picks_of('two', 120.) + picks_of('three', 125., 'P'),
                  archive, tmp_path/'data', noise=0.)
    row = next(r for r in built.rows if r['source_id'] == 'two' and r['station_code'] == 'DEF')
    assert (row['source_id_2'], row['source_id_3']) == ('one', 'three')
    got = {(phase, number): sample for phase, number, sample in onsets_in(row)}
    assert (got
            == {('P', 1): 3000., ('S', 1): 3450., ('P', 2): 1000., ('S', 2): 1450.,
                ('P', 3): 3500.})
    assert (row['trace_S_unlabelled_samples'] == '3500:9000'
            and row['trace_P_unlabelled_samples'] == '')


def test_an_event_without_a_pick_here_is_no_noise(archive, tmp_path):
    """Where the catalogue knows an event that nobody picked at a station, a zone says that nobody
    knows"""
    events = {'seen': SourceEvent('seen', (T0 + 95).ns),
              'unseen': SourceEvent('unseen', (T0 + 120).ns)}
    row, = build(picks_of('seen', 100., stations=['ABC']), archive, tmp_path/'data', events,
                 noise=0.).rows
    assert row['trace_P_unlabelled_samples'] == row['trace_S_unlabelled_samples'] == '5000:9000'


def test_odd_picks_are_counted_and_named(archive, tmp_path):
    """Duplicates, unknown phases, S before P, no waveforms, a gap, outside of the record: each pick
    in the table with its reason"""
    one = picks_of('one', 100.)
    faults = [one[0]._replace(time=one[0].time + 10**7, status='automatic'),
              one[0]._replace(phase='PKP'),
              *picks_of('late', 2000., 'P', ['ABC']), *picks_of('late', 1990., 'S', ['ABC']),
              one[0]._replace(station='NONE'),
              *picks_of('gap', 1020., 'P', ['DEF']), *picks_of('far', 3000., 'P', ['GHI']),
              *picks_of('far', 3100., 'S', ['GHI']), *picks_of('night', 90_000., 'P', ['ABC'])]
    built = build(one + faults, archive, tmp_path/'data', noise=0.)
    assert reasons(built) == sorted([
        'a duplicate', "a phase 'PKP' that the model does not know", 'S is not after P',
        'S is not after P',
        'no waveforms of this station', 'no waveforms at that time', 'no waveforms at that time',
        'outside of the record of its event: give a larger --after'])
    assert len(built.rows) == 4 and {r['source_id'] for r in built.rows} == {'one', 'far'}


def test_a_pick_where_samples_are_no_numbers(tmp_path):
    "One component that goes on is enough for a pick; where all three are cut out it is set aside"
    rng = np.random.default_rng(0)
    for c in 'ZNE':
        x = rng.standard_normal(90_000).astype(np.float32)
        x[42_000:42_100] = np.nan
        if c != 'Z': x[41_800:] = np.nan
        head = dict(network='XX', station='ABC', location='00', channel=f'HH{c}',
                    sampling_rate=100., starttime=T0)
        obspy.Trace(x, head).write(str(tmp_path/f'{c}.mseed'), format='MSEED')
    picks = [PhasePick('one', 'XX', 'ABC', '', '', 'P', (T0 + 419).ns),
             PhasePick('one', 'XX', 'ABC', '', '', 'S', (T0 + 420.5).ns)]
    built = build(picks, tmp_path, tmp_path/'data', noise=0.)
    assert [[o[0] for o in onsets_in(row)] for row in built.rows] == [['P']]
    assert ([(why, p.phase) for why, p in built.catalogue.dropped]
            == [('nothing was recorded at the pick', 'S')])


def test_no_event_and_no_overlap_in_two_splits(archive, tmp_path):
    """Splits share neither events nor samples, each is there, and they are the same when everything
    is made again"""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(100, 9000, 40))
    picks = [p for k, s in enumerate(starts) for p in picks_of(f'event {k}', float(s))]
    built = [build(picks, archive, tmp_path/name) for name in ('a', 'b')]
    splits = [[r['split'] for r in b.rows] for b in built]
    assert splits[0] == splits[1] and set(splits[0]) == {'train', 'dev', 'test'}
    owner = {}
    for r in built[0].rows:
        for key in [v for k, v in r.items() if k.startswith('source_id')]:
            assert owner.setdefault(key, r['split']) == r['split']
    spans = [(r['station_code'], nanoseconds(r['trace_start_time']), r['split'])
             for r in built[0].rows]
    near = [(a, b) for a in spans for b in spans if a[0] == b[0] and abs(a[1] - b[1]) < 90e9]
    assert len(near) > 1.5*len(spans) and all(a[2] == b[2] for a, b in near)


@pytest.mark.parametrize('seconds, events', [(119, 1), (121, 2)])
def test_picks_without_an_event_belong_together_for_two_minutes(seconds, events):
    "The longest time from P to S of an event that only its station has"
    pick = lambda phase, at: PhasePick('', 'XX', 'ABC', '00', 'HHZ', phase, at*10**9)
    catalogue = Catalogue(picks=[pick('P', 0), pick('S', seconds)])
    associate_by_station(catalogue)
    assert len({p.event for p in catalogue.picks}) == len(catalogue.events) == events


def test_zones_that_touch_are_one():
    "Where three events have no S, it may come anywhere after the first P, and in one zone"
    pick = lambda name, at: PhasePick(name, 'XX', 'ABC', '00', 'HHZ', 'P', at*10**9)
    events = [StationEvent(name, 'XX', 'ABC', pick(name, at))
              for name, at in (('a', 10), ('b', 20), ('c', 30))]
    span = SimpleNamespace(start=0)
    plan = RecordPlan(SimpleNamespace(name='XX.ABC.00.HH'), span, 0, 6000, events[0],
                      tuple(events[1:]))
    assert unlabelled_zones(plan, 'S', []) == [(1000, 6000)]
    assert unlabelled_zones(plan, 'P', []) == []


def test_splits_by_station_and_region():
    "No station, and no square, in two splits"
    records = [Placed(str(k), f'XX.S{k % 20}', k*HOUR_NS, k*HOUR_NS + 10, (f'e{k}',))
               for k in range(200)]
    events = {f'e{k}': SourceEvent(f'e{k}', 0, 46 + (k % 15)/2 + .1, 7., 8.) for k in range(200)}
    for by, key in (('station', lambda k: k % 20), ('region', lambda k: k % 15)):
        found = assign_splits(records, by, events)
        of = {}
        for k, split in enumerate(found): of.setdefault(key(k), set()).add(split)
        assert (all(len(s) == 1 for s in of.values())
                and set.union(*of.values()) == {'train', 'dev', 'test'})
    with pytest.raises(UserError, match="event 'e0' has none"): assign_splits(records, 'region', {})


def test_noise_comes_from_quiet_hours(archive, tmp_path):
    "No record of noise within five minutes of a pick, and each with its reason"
    # 100 s before the next hour
    built = build(picks_of('one', 3500.), archive, tmp_path/'data', noise=.9)
    noise = [r for r in built.rows if r['trace_category'] == 'noise']
    assert len(noise) == 27 == built.wanted_noise
    assert {r['trace_start_time'][11:13] for r in noise} == {'01', '04'}
    for r in noise:
        assert r['trace_reason'].startswith('no pick and no origin from 2024-02-28T')
    split = noise[0]['split']
    source = open_source(tmp_path/'data', split)
    k = [r['trace_category'] for r in built.rows if r['split'] == split].index('noise')
    assert source.record(k).p_status == 1                        # absent, not only unlabelled


def test_append_touches_nothing(archive, tmp_path):
    """A month is added: files that are there stay byte for byte, nothing is written twice, splits
    of events stay"""
    out = tmp_path/'data'
    first = build(picks_of('one', 100.) + picks_of('two', 2000.), archive, out)
    before = {f.name: f.read_bytes() for f in out.glob('*_001.*')}
    again = (picks_of('one', 100.) + picks_of('renamed', 2000.) + picks_of('three', 160.)
             + picks_of('four', 6000.))
    with pytest.raises(UserError, match='add to it with --append'): build(again, archive, out)
    second = build(again, archive, out, append=True, noise=0.)
    assert {f.name: f.read_bytes() for f in out.glob('*_001.*')} == before
    assert {r['source_id'] for r in second.rows} == {'three', 'four'}
    assert reasons(second) == ['in the data set already']*12
    split = {r['source_id']: r['split'] for r in first.rows + second.rows if 'source_id' in r}
    assert split['three'] == split['one']                        # their records overlap
    data = open_source(out, split['one'])
    assert len(data) == sum(r['split'] == split['one'] for r in first.rows + second.rows)


def test_a_kill_leaves_no_half_piece(archive, tmp_path, monkeypatch):
    "An error in the midst of writing leaves a data set as it was; the next call goes through"
    from seismodel.data.archive import Instrument
    out, read, calls = tmp_path/'data', Instrument.read, []
    build(picks_of('one', 100.), archive, out, noise=0.)
    def fails(self, *args):
        calls.append(1)
        if len(calls) > 2: raise OSError('disk full')
        return read(self, *args)
    monkeypatch.setattr(Instrument, 'read', fails)
    with pytest.raises(OSError): build(picks_of('two', 2000.), archive, out, append=True, noise=0.)
    assert sorted(f.name for f in out.iterdir()) == ['metadata_001.csv', 'waveforms_001.hdf5']
    monkeypatch.undo()
    assert build(picks_of('two', 2000.), archive, out, append=True, noise=0.).piece == '002'


def test_formats(tmp_path, archive):
    """NORDIC, NonLinLoc, hypoDD, HYPO71, SAC headers, CSV with own columns: arrivals with station,
    phase and time"""
    for name, station in (('nordic/tests/data/select.out', None),
                          ('nlloc/tests/data/nlloc.hyp', None)):
        got = read_any(str(examples/name), {})
        assert got.picks and all(p.event and p.station and p.phase and p.time for p in got.picks)
        want = [(p.time.ns, p.waveform_id.station_code)
                for e in obspy.read_events(str(examples/name)) for p in e.picks]
        assert [(p.time, p.station) for p in got.picks] == want
        # names do not change from reading to reading
        again = read_any(str(examples/name), {})
        assert again.picks == got.picks
    trace = obspy.Trace(np.zeros(1000, np.float32), dict(network='XX', station='ABC', channel='HHZ',
                                                         starttime=T0, sampling_rate=100.))
    trace.stats.sac = dict(a=2.5, ka='IPU0', t0=4., kt0='S', t1=5., f=9., o=.5, evla=46., evlo=7.5,
                           stla=46.1, stlo=7.4)
    trace.write(str(tmp_path/'one.sac'), format='SAC')
    sac = read_any(str(tmp_path/'one.sac'), {})
    assert ([(p.phase, (p.time - T0.ns)/1e9, p.polarity, p.station) for p in sac.picks]
            == [('P', 2.5, 'positive', 'ABC'), ('S', 4., '', 'ABC')])
    assert (sorted(why for why, _ in sac.dropped)
            == ['no label of T1 says which phase it is', 'the end of an event (F), no onset'])
    assert ((sac.events[sac.picks[0].event].latitude, sac.stations['XX', 'ABC'][0])
            == (46., pytest.approx(46.1)))


def test_one_bad_file_is_named_and_the_others_are_read(tmp_path, archive, capsys):
    "A damaged file among others is told, and never ends the call"
    folder = tmp_path/'picks'
    folder.mkdir()
    catalogue_to_obspy(Catalogue(picks=picks_of('smi:local/one', 100.))).write(
        str(folder/'a.xml'), format='QUAKEML')
    (folder/'b.xml').write_bytes((folder/'a.xml').read_bytes()[:900])
    (folder/'c.csv').write_text('station,when\nABC,now\n', encoding='utf-8')
    (folder/'empty').write_bytes(b'')
    assert main(['dataset', str(folder), '--waveforms', str(archive), '--out',
                 str(tmp_path/'data')]) == 0
    text = capsys.readouterr().out
    assert 'files of picks not read: 3' in text and 'c.csv' in text
    assert (tmp_path/'data/report/001.png').stat().st_size > 10_000
    table = pd.read_csv(tmp_path/'data/report/001_not_used.csv')
    assert (table.what == 'file').sum() == 3


@pytest.mark.parametrize('words, sentence', [
    ([], '--waveforms ARCHIVE'), (['--waveforms', 'ARCHIVE'], '--out FOLDER'),
    (['--waveforms', 'ARCHIVE', '--out', 'OUT', '--noise', '2'], '--noise is 2'),
    (['--waveforms', 'ARCHIVE', '--out', 'OUT', '--split-by', 'trace'], "--split-by is 'trace'"),
    (['--waveforms', 'ARCHIVE', '--out', 'OUT', '--columns', 'when=t'], "--columns has 'when'"),
    (['--waveforms', 'nowhere', '--out', 'OUT'], "no file or folder 'nowhere'"),
    (['--waveforms', 'ARCHIVE', '--out', 'ARCHIVE'], 'holds no data set')])
def test_one_sentence(words, sentence, archive, tmp_path, capsys):
    "Exit code 2 and a sentence; nothing is written"
    (tmp_path/'p.csv').write_text(f'station,phase,time,network\nABC,P,{T0 + 100},XX\n',
                                  encoding='utf-8')
    before = sorted(archive.iterdir())
    assert main(['dataset', str(tmp_path/'p.csv'),
                 *(w.replace('ARCHIVE', str(archive)).replace('OUT', str(tmp_path/'out'))
                   for w in words)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path/'out').exists() and sorted(archive.iterdir()) == before


def test_stations_without_network_code(archive, tmp_path):
    "HYPO71 knows no networks: the archive gives them"
    lines = [f"{s} IPU0 2402280201{1 + k:05.2f}       {5.5 + k:5.2f}ES 2" for k,
             s in enumerate(STATIONS)]
    (tmp_path/'p.pha').write_text('\n'.join([*lines, ' '*17 + '10', '']), encoding='utf-8')
    catalogue = read_catalogue([tmp_path/'p.pha'])
    built = build_dataset(catalogue, open_archive(archive), tmp_path/'data',
                          DatasetOptions(noise=0.))
    assert ([(r['station_network_code'], r['station_code']) for r in built.rows]
            == [('XX', s) for s in STATIONS])
    assert [o[0] for r in built.rows for o in onsets_in(r)] == ['P', 'S']*3


def test_cut_anew(archive, tmp_path):
    "A data set becomes another one with longer records: the same picks, the same events"
    picks = picks_of('one', 100.) + picks_of('two', 130., 'P')
    build(picks, archive, tmp_path/'short', noise=0.)
    built = build_dataset(read_catalogue([tmp_path/'short']), open_archive(archive),
                          tmp_path/'long', DatasetOptions(60., 120., 0.))
    assert {r['trace_npts'] for r in built.rows} == {18_000}
    key = lambda p: (p.event, p.network, p.station, p.location, p.channel, p.phase, p.time,
                     p.status)
    assert sorted(map(key, read_catalogue([tmp_path/'long']).picks)) == sorted(map(key, picks))


def test_check_shows_a_shifted_clock(archive, tmp_path):
    "Labels of one station that are a second late show in its residuals, and only there"
    picks = [p for k in range(8) for p in picks_of(f'e{k}', 200. + 300*k, 'P')]
    built = build(picks, archive, tmp_path/'data', noise=.2)
    late = {(p.station, p.event): p.time + (10**9 if p.station == 'DEF' else 10**7) for p in picks}
    class Oracle:
        def classify(self, stream):
            s, a, b = stream[0].stats.station, stream[0].stats.starttime, stream[0].stats.endtime
            times = [UTCDateTime(ns=t) for (station, _), t in late.items() if station == s]
            return SimpleNamespace(picks=[SimpleNamespace(phase='P', peak_time=t) for t in times
                                          if a <= t <= b])
    residuals, noise, heard = check_labels(built, Oracle())
    assert (noise, heard) == (6, 0)
    assert ({c.station: round(c.median, 2) for c in by_station(residuals)}
            == {'XX.ABC': .01, 'XX.DEF': 1., 'XX.GHI': .01})
    said, = suspicions(by_station(residuals))
    assert said.startswith('XX.DEF: P lies +1.00 s')


def test_check_with_our_picker(archive, tmp_path, monkeypatch, capsys):
    """`--check` names a picker that SeisBench can run, and its residuals are written beside the
    report"""
    from seismodel.picking import seisbench_model
    monkeypatch.setattr(seisbench_model, 'open_picker', lambda name: eager_picker())
    catalogue_to_obspy(Catalogue(picks=picks_of('smi:local/one', 100.))).write(
        str(tmp_path/'p.xml'), format='QUAKEML')
    assert main(['dataset', str(tmp_path/'p.xml'), '--waveforms', str(archive), '--out',
                 str(tmp_path/'data'), '--check', 'any']) == 0
    assert 'records of noise with a pick' in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path/'data/report/001_residuals.csv')) == 6
    assert (tmp_path/'data/report/001_residuals.png').exists()


def test_real_streams_in_one_command(real_data, tmp_path):
    """Where the machine has them: analyst picks and streams become a data set; every pick is a
    label at its time"""
    where = (root/os.environ.get('SEISMODEL_DATA', '../shared/data')/'continuous').resolve()
    table = where/'picks_20220206_manual.csv'
    if not table.is_file(): return                               # as `real_data`: perhaps none
    command = [sys.executable, '-m', 'seismodel', 'dataset', table, '--waveforms', where, '--out',
               tmp_path/'data']
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    got, want = read_catalogue([tmp_path/'data']), read_catalogue([table])
    assert [(p.station, p.phase, p.event) for p in sorted(got.picks, key=lambda p: p.time)] == \
        [(p.station, p.phase, p.event) for p in sorted(want.picks, key=lambda p: p.time)]
    times = np.array([sorted(p.time for p in c.picks) for c in (got, want)])
    assert times.shape == (2, 6) and np.abs(times[0] - times[1]).max() <= 1000

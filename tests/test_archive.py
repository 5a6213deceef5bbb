"""Archives: any layout of files is the same record; gaps, conflicts, clocks, odd files, files that
nobody should trust"""
import os
import pickle
from pathlib import Path

import numpy as np
import obspy
import pytest
from obspy import Stream, Trace, UTCDateTime

from seismodel.data.archive import TICK, Selection, list_files, open_archive, runs_of
from seismodel.data.channels import map_components, zne_order
from seismodel.data.formats import Entry, blocks_of, decode, entries_of, format_of, read_file
from seismodel.core import UserError

T0 = UTCDateTime(2024, 2, 28, 23, 30)


def record(seconds=3600, channels='HHZ HHN HHE', rate=100., start=T0, seed=0):
    "Noise of one station, integers as a digitiser writes them"
    rng = np.random.default_rng(seed)
    head = dict(network='XX', station='ABC', location='00', sampling_rate=rate, starttime=start)
    return Stream([Trace((1e3*rng.standard_normal(int(seconds*rate))).astype(np.int32),
                         {**head, 'channel': c})
                   for c in channels.split()])


def save(stream, path, kind='MSEED'):
    path.parent.mkdir(parents=True, exist_ok=True)
    stream.write(str(path), format=kind)
    return path


def only(*sources, **selection):
    "The whole of the only span of the only instrument, Z N E, and the archive"
    archive = open_archive(*sources, selection=Selection(**selection))
    instrument, = archive.instruments
    span, = instrument.spans()
    return instrument.read(span, 0, span.count), span, archive


def notes(archive): return archive.instruments[0].reader.notes.sentences()


def days(stream):
    "Cut at midnight"
    midnight = UTCDateTime(2024, 2, 29)
    return stream.slice(endtime=midnight - .005), stream.slice(starttime=midnight - .004)


# layouts

def write_whole(st, folder): save(st, folder/'all.mseed')

def write_sds(st, folder):
    for day in days(st):
        for tr in day:
            s = tr.stats
            name = f'{tr.id}.D.{s.starttime.year}.{s.starttime.julday:03}'
            save(Stream([tr]),
                 folder/str(s.starttime.year)/s.network/s.station/f'{s.channel}.D'/name)

def write_eqtransformer(st, folder):
    for day in days(st):
        for tr in day:
            times = [t.strftime('%Y%m%dT%H%M%SZ') for t in (tr.stats.starttime, tr.stats.endtime)]
            save(Stream([tr]), folder/tr.stats.station/f"{tr.id}__{'__'.join(times)}.mseed")

def write_sac(st, folder):
    for tr in st: save(Stream([tr]), folder/f'{tr.stats.channel}.SAC', 'SAC')

def write_pieces(st, folder):
    for k in range(6):
        part = st.slice(T0 + 601*k, T0 + 601*(k + 1) - .01)
        save(part[:1], folder/f'{k}.mseed')
        save(part[1:], folder/f'{9 - k}_horizontal.mseed')

def write_mixture(st, folder):
    save(st[:1], folder/'a/z.gse', 'GSE2')
    save(st[1:2], folder/'n.sac', 'SAC')
    for k, day in enumerate(days(st[2:])): save(day, folder/f'e{k}')

@pytest.mark.parametrize('write', [write_whole, write_sds, write_eqtransformer, write_sac,
                                   write_pieces, write_mixture])
def test_every_layout_is_the_same_record(tmp_path, write):
    st = record()
    if write is write_mixture:                           # GSE2 knows no locations, and pads
        for tr in st: tr.stats.location, tr.stats.network = '', ''
    write(st, tmp_path/'in')
    x, span, archive = only(tmp_path/'in')
    assert (span.start, span.count, archive.left_out) == (T0.ns, 360_000, {}) and not notes(archive)
    for k, tr in enumerate(st): np.testing.assert_array_equal(x[:, k], tr.data)


@pytest.mark.parametrize('seconds', [7, 600, 3600])
def test_pieces_are_the_whole(tmp_path, seconds):
    "Also where rates and starts differ among components, and a record has gaps"
    st = record(1200)
    st[1] = record(1200, 'HHN', 99.98, T0 + .0033)[0]
    st[2] = record(1200, 'HHE', 200., T0 + 1.00777)[0]
    st = st.cutout(T0 + 300, T0 + 333.333)
    for k in range(4): save(st.slice(T0 + 300*k, T0 + 300*(k + 1) - .001), tmp_path/f'{k}.mseed')
    instrument, = open_archive(tmp_path).instruments
    for span in instrument.spans():
        whole = instrument.read(span, 0, span.count)
        parts = [instrument.read(s, a, b) for s, a, b in instrument.pieces(seconds) if s == span]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9, atol=1e-6,
                                   equal_nan=True)
        assert np.isfinite(whole).all(0).any() and len(parts) >= span.count/100/seconds


def test_two_stars_reach_every_depth(tmp_path):
    "`**` stands for any number of folders, none included"
    for name in ('a.mseed', 'x/b.mseed', 'x/y/c.mseed'): save(record(1), tmp_path/name)
    found = list_files([f'{tmp_path}/**/*.mseed'])
    assert [Path(f).name for f in found] == ['a.mseed', 'b.mseed', 'c.mseed']
    assert len(list_files([f'{tmp_path}/*/*.mseed'])) == 1


def test_folders_patterns_files_and_selection(tmp_path):
    save(record(60), tmp_path/'a/1.mseed')
    other = record(60, 'HNZ HNN HNE HHZ', seed=1)
    for tr in other: tr.stats.station = 'DEF'
    save(other, tmp_path/'b/2.mseed')
    names = lambda *s, **k: [i.name for i in open_archive(*s, selection=Selection(**k)).instruments]
    everything = ['XX.ABC.00.HH', 'XX.DEF.00.HH', 'XX.DEF.00.HN']
    assert (names(tmp_path) == names(tmp_path/'*/*.mseed')
            == names(tmp_path/'a', tmp_path/'b/2.mseed', tmp_path) == everything)
    assert names(tmp_path, station='DEF', channel='HN?') == everything[2:]
    assert (names(tmp_path, station='A*,X?') == everything[:1]
            and names(tmp_path, location='--') == [])
    assert names(tmp_path, end=str(T0)) == names(tmp_path, start=str(T0 + 60)) == []
    x, span, _ = only(tmp_path/'a', start=str(T0 + 10), end=str(T0 + 20.5))
    np.testing.assert_array_equal(x[:, 0], record(60)[0].data[1000:2050])
    with pytest.raises(UserError, match='no file or folder'): names(tmp_path/'c')
    with pytest.raises(UserError, match='not before'):
        names(tmp_path, start='2024-03-01', end='2024-02-01')
    with pytest.raises(UserError, match='give a date'): names(tmp_path, start='yesterday')


def test_a_day_of_an_sds_archive_that_reaches_into_the_next(tmp_path):
    """Its name says 28 February; what it holds of the 29th is found too. Files of other days and
    stations are not opened"""
    st = record(3600, 'HHZ')                                                   # from 23:30 to 00:30
    for name in ('XX.ABC.00.HHZ.D.2024.059', 'XX.ABC.00.HHZ.D.2024.050',
                 'XX.DEF.00.HHZ.D.2024.060'):
        save(st, tmp_path/name)
    x, span, archive = only(tmp_path, start='2024-02-29T00:10', station='ABC')
    assert [Path(f).name for f in archive.stamps] == ['XX.ABC.00.HHZ.D.2024.059']
    np.testing.assert_array_equal(x[:, 0], st[0].data[40*6000:])
    x, span, archive = only(tmp_path, end='2024-02-28T23:40', network='X?')
    assert len(archive.stamps) == 3 and span.count == 60_000


# time

@pytest.mark.parametrize('rates', [(100., 100., 100.), (99.98, 200., 62.5), (50., 99.96, 1000.)])
def test_components_side_by_side_at_their_true_time(tmp_path, rates):
    """The same pulse on three components that start at different parts of a sample, at both ends of
    the record"""
    for c, rate, late in zip('ZNE', rates, (.0042, .0071, .01)):
        t = late + np.arange(int(1800*rate))/rate
        data = 1e6*(np.exp(-((t - 10.)/.1)**2) + np.exp(-((t - 1790.)/.1)**2))
        head = dict(network='XX', station='ABC', channel=f'HH{c}', sampling_rate=rate,
                    starttime=T0 + late)
        save(Stream([Trace(data.astype(np.float32), head)]), tmp_path/f'{c}.mseed')
    x, span, _ = only(tmp_path)
    t = (span.start - T0.ns)/1e9 + np.arange(span.count)/100
    for at in (10., 1790.):
        near = np.abs(t - at) < 1
        truth = 1e6*np.exp(-((t[near] - at)/.1)**2)
        assert np.abs(x[near] - truth[:, None]).max() < 3e3


def test_a_clock_that_drifts(tmp_path):
    """Files say 100 Hz, the clock runs at 99.996 Hz, each file starts at its true time: never more
    than half a sample off, no hole"""
    true = 99.996
    pulse = lambda t: 1e6*sum(np.exp(-((t - at)/.1)**2) for at in range(15, 3600, 30))
    for k in range(60):
        n = np.arange(6000*k, 6000*(k + 1))
        head = dict(network='XX', station='ABC', channel='HHZ', sampling_rate=100.,
                    starttime=T0 + n[0]/true)
        save(Stream([Trace(pulse(n/true).astype(np.float32), head)]), tmp_path/f'{k:02}.mseed')
    x, span, archive = only(tmp_path)
    assert np.isfinite(x[:, 0]).all() and not notes(archive) and abs(span.count - 360_014) <= 1
    peaks = [np.argmax(x[at*100 - 200:at*100 + 200, 0]) - 200 for at in range(15, 3580, 30)]
    assert np.abs(peaks).max() <= 1


def test_leap_second_and_midnight(tmp_path):
    "2016-12-31 ended with a leap second, which time in headers does not count: two day files join"
    st = record(120, start=UTCDateTime(2016, 12, 31, 23, 59))
    for k, part in enumerate((st.slice(endtime=UTCDateTime(2017, 1, 1) - .005),
                              st.slice(UTCDateTime(2017, 1, 1)))):
        save(part, tmp_path/f'{k}')
    x, span, _ = only(tmp_path)
    np.testing.assert_array_equal(x[:, 0], st[0].data)


# gaps and conflicts

def test_gaps_stay_gaps(tmp_path):
    st = record(60)
    st[0] = Stream([st[0]]).cutout(T0 + 10, T0 + 20)[1]                       # Z begins 20 s late
    # one sample of N is lost
    pieces = Stream([st[1].slice(endtime=T0 + 29.99), st[1].slice(T0 + 30.01)])
    save(Stream([st[0], st[2]]) + pieces, tmp_path/'a.mseed')
    x, span, _ = only(tmp_path)
    assert span.count == 6000 and np.isnan(x[:2000, 0]).all() and np.isfinite(x[2000:, 0]).all()
    assert np.flatnonzero(np.isnan(x[:, 1])).tolist() == [3000] and np.isfinite(x[:, 2]).all()


def test_what_is_the_same_is_merged(tmp_path):
    st = record(60)
    save(st, tmp_path/'a.mseed')
    save(st, tmp_path/'copy.mseed')
    save(st.slice(T0 + 20, T0 + 40), tmp_path/'part.sac.mseed')
    x, _, archive = only(tmp_path)
    np.testing.assert_array_equal(x.T, [tr.data for tr in st])
    assert not notes(archive)


@pytest.mark.parametrize('seconds', [3600, 1])
def test_what_differs_is_cut_out_and_named(tmp_path, seconds):
    "A second of other samples on one channel costs that second of that channel, and is told once"
    st = record(60)
    save(st.slice(endtime=T0 + 30), tmp_path/'left.mseed')
    right = st.slice(T0 + 29)
    right[0].data = right[0].data.copy()
    right[0].data[:101] += 1
    save(right, tmp_path/'right.mseed')
    archive = open_archive(tmp_path)
    instrument, = archive.instruments
    x = np.concatenate([instrument.read(*piece) for piece in instrument.pieces(seconds)])
    assert np.flatnonzero(np.isnan(x[:, 0])).tolist() == list(range(2900, 3001))
    np.testing.assert_array_equal(x[:, 1:].T, [tr.data for tr in st[1:]])
    sentence, = notes(archive)
    assert (sentence
            == f'XX.ABC.00.HHZ {T0 + 29} to {T0 + 30.01}: records that differ (left.mseed, '
               f'right.mseed)')


def test_records_at_two_rates_that_differ(tmp_path):
    "One channel at 100 and at 200 Hz with other data: the overlap is cut out, the rest stays"
    save(record(60, 'HHZ'), tmp_path/'a.mseed')
    save(record(60, 'HHZ', 200., T0 + 50, seed=1), tmp_path/'b.mseed')
    x, span, archive = only(tmp_path)
    assert (span.count == 11_000 and np.isfinite(x[:4990, 0]).all()
            and np.isfinite(x[6010:, 0]).all())
    assert (np.isnan(x[5010:5990, 0]).all()
            and 'records that differ (a.mseed, b.mseed)' in notes(archive)[0])


def test_rate_and_type_that_change_within_a_file(tmp_path):
    a, b, c = record(20, 'HHZ'), record(20, 'HHZ', 200., T0 + 20), record(20, 'HHZ', start=T0 + 40)
    c[0].data = c[0].data.astype(np.float32)
    save(a + b + c, tmp_path/'a.mseed')
    x, span, archive = only(tmp_path)
    assert span.count == 6000 and np.isfinite(x[:, 0]).all() and not notes(archive)
    np.testing.assert_array_equal(np.r_[x[:2000, 0], x[4000:, 0]], np.r_[a[0].data, c[0].data])


# components

def test_components():
    found = lambda letters, **k: map_components(letters, **k)[0]
    assert (found('ZNE') == {'Z': 'Z', 'N': 'N', 'E': 'E'}
            and found('12ZH') == {'1': 'N', '2': 'E', 'Z': 'Z'})
    assert (found('Z') == {'Z': 'Z'} and found('ZRT') == {}
            and found('ZRT', z_only=True) == {'Z': 'Z'})
    assert 'R, T' in map_components('ZRT')[1] and '--z-only' in map_components('ZRT')[1]
    assert (zne_order('12ZH') == 'NEZH' and zne_order('ZRT') == 'ZRT'
            and zne_order('312', {'3': 'Z', '1': 'N', '2': 'E'}) == 'ZNE')


@pytest.mark.parametrize('channels, selection, want', [
    ('EHZ EH1 EH2', {}, 'ZNE'), ('BHZ BH1 BH2 BHH', {}, 'ZNE'), ('HHZ', {}, 'Z'),
    ('HHR HHT HHZ', {'z_only': True}, 'Z'),
    ('HH3 HH1 HH2', {'components': 'Z=3,N=1,E=2'}, 'ZNE')])
def test_components_of_an_archive(tmp_path, channels, selection, want):
    st = record(30, channels)
    save(st, tmp_path/'a.mseed')
    x, _, archive = only(tmp_path, **selection)
    letters = {'Z': 'Z3', 'N': 'N1', 'E': 'E2'}
    assert archive.instruments[0].components == want
    for k, c in enumerate('ZNE'):
        if c not in want: assert np.isnan(x[:, k]).all()
        else:
            np.testing.assert_array_equal(x[:, k],
                                          next(tr.data for tr in st
                                               if tr.stats.channel[-1] in letters[c]))


def test_radial_and_transverse_are_refused_by_name(tmp_path):
    save(record(30, 'HHR HHT HHZ'), tmp_path/'a.mseed')
    archive = open_archive(tmp_path)
    assert (archive.instruments == []
            and 'components R, T, Z cannot be mapped' in archive.left_out['XX.ABC.00.HH'])


def test_azimuths_of_an_inventory(tmp_path):
    from obspy.core.inventory import Channel, Inventory, Network, Site, Station
    ground = np.random.default_rng(0).standard_normal((3, 3000))             # Z, N, E
    pointing = {'Z': (0., -90.), '1': (30., 0.), '2': (120., 0.)}
    st = record(30, 'BHZ BH1 BH2')
    for tr in st:
        a, d = np.radians(pointing[tr.stats.channel[-1]])
        tr.data = (np.array([-np.sin(d), np.cos(d)*np.cos(a), np.cos(d)*np.sin(a)]) @ ground)
    save(st, tmp_path/'in/a.mseed')
    channels = [Channel(f'BH{c}', '00', 1., 2., 0., 0., azimuth=a, dip=d) for c,
                (a, d) in pointing.items()]
    station = Station('ABC', 1., 2., 0., channels=channels, site=Site('here'))
    Inventory([Network('XX', [station])]).write(str(tmp_path/'inv.xml'), format='STATIONXML')
    x, _, _ = only(tmp_path/'in', inventory=tmp_path/'inv.xml')
    np.testing.assert_allclose(x.T, ground, atol=1e-6)


# files that are not what they should be

def test_a_pickle_is_never_opened(tmp_path):
    "Whatever its name: what it would do when opened is not done"
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/'went_off',))

    for name in ('day.mseed', 'x.sac', 'obspy.pickle'):
        (tmp_path/name).write_bytes(pickle.dumps(['obspy.core.stream', Bomb()]))
        assert format_of(tmp_path/name) is None
        with pytest.raises(UserError, match='no waveform format'): read_file(tmp_path/name)
    st = record(10)
    st.write(str(tmp_path/'stream.mseed'), format='PICKLE')
    archive = open_archive(tmp_path)
    assert (len(archive.left_out) == 4 and not archive.instruments
            and not (tmp_path/'went_off').exists())


def test_odd_files_are_named_and_the_rest_goes_on(tmp_path):
    good = record(60)
    save(good, tmp_path/'good.mseed')
    whole = (tmp_path/'good.mseed').read_bytes()
    (tmp_path/'empty').touch()
    (tmp_path/'text.txt').write_text('battery changed', encoding='utf-8')
    (tmp_path/'stub.mseed').write_bytes(whole[:100])
    strange = record(60, 'HHZ', seed=2)
    for station, change in (('ZERO', dict(sampling_rate=0.)), ('SLOW', dict(sampling_rate=1.)),
                            ('LOG', dict(channel='LOG'))):
        for tr in strange:
            tr.stats.update(dict(station=station, channel='HHZ', sampling_rate=100.) | change)
        save(strange, tmp_path/f'{station}.mseed')
    os.write(fd := os.open(os.fsencode(tmp_path) + b'/d\xe9j\xe0.mseed', os.O_CREAT | os.O_WRONLY),
             whole)
    os.close(fd)
    x, _, archive = only(tmp_path)
    np.testing.assert_array_equal(x.T, [tr.data for tr in good])
    why = {Path(name.split(' in ')[-1]).name: reason for name, reason in archive.left_out.items()}
    assert why.pop('empty') == 'it is empty' and 'no waveform format' in why.pop('text.txt')
    assert ('0 Hz' in why.pop('ZERO.mseed') and '1 Hz' in why.pop('SLOW.mseed')
            and why.pop('stub.mseed'))
    assert list(why) == ['XX.LOG.00.LO']


@pytest.mark.parametrize('value', [1e300, np.nan, -np.inf])
def test_samples_that_are_no_ground_motion(tmp_path, value):
    st = record(60)
    for tr in st: tr.data = tr.data.astype(float)
    st[1].data[1000:1010] = value
    save(st, tmp_path/'a.mseed')
    x, _, archive = only(tmp_path)
    assert np.flatnonzero(np.isnan(x[:, 1])).tolist() == list(range(1000, 1010))
    assert np.isfinite(x[:, [0, 2]]).all() and 'above 1e18 (a.mseed)' in notes(archive)[0]


def test_long_files_are_read_in_blocks_and_damage_costs_little(tmp_path):
    st = record(3*3600, 'HHZ HHN')
    path = save(st, tmp_path/'long.mseed')
    blocks = blocks_of(str(path), 'MSEED')
    assert len(blocks) > 4 and all(b.length <= 2**19 for b in blocks)
    x, _, archive = only(path)
    np.testing.assert_array_equal(x[:, :2].T, [tr.data for tr in st])
    data = bytearray(path.read_bytes())
    middle = len(data)//4//4096*4096
    # samples of one record
    data[middle + 56:middle + 4096] = os.urandom(4040)
    path.write_bytes(data)
    y, _, archive = only(path)
    lost = np.flatnonzero(np.isnan(y[:, 0]) | (y[:, 0] != x[:, 0]))
    assert 0 < len(lost) < 6000 and np.ptp(lost) < 6000
    np.testing.assert_array_equal(y[:, 1], x[:, 1])
    # cut off in the middle of a record
    path.write_bytes(data[:middle + 1000])
    z, span, _ = only(path)
    np.testing.assert_array_equal(z[:, 0], x[:span.count, 0])


def test_codes_cannot_lead_out_of_a_folder(tmp_path):
    st = record(30, 'HHZ')
    st[0].stats.station = '../..'
    save(st, tmp_path/'a.mseed')
    archive = open_archive(tmp_path)
    assert not archive.instruments and 'odd characters' in next(iter(archive.left_out.values()))


def test_an_entry_joins_its_run():
    "Within 0.3 samples of the clock, at the latest one sample after the end"
    block = blocks_of.__globals__['Block']('f', 'MSEED', 0, -1)
    entries = lambda *starts: [Entry(block, 'XX.A..HHZ', round(s*TICK), 1000, 100.) for s in starts]
    assert ([len(runs_of(entries(0, s))) for s in (1000, 1000.2, 999.8, 500, 1000.5, 1001, 5000)]
            == [1, 1, 1, 1, 2, 2, 2])


def test_everything_that_obspy_tests_with(tmp_path):
    """About 900 files of every format, many of them broken on purpose: no error but reasons, and
    all samples can be read"""
    folder = Path(obspy.__file__).parent/'io'
    archive = open_archive(folder)
    assert len(archive.stamps) > 500 and len(archive.instruments) > 40
    for instrument in archive.instruments:
        for span, first, last in instrument.pieces():
            x = instrument.read(span, first, last)
            assert x.shape == (last - first, 3) and not np.isinf(x).any()

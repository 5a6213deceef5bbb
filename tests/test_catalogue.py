"""seismodel pick: as a process, over many files, stopped and started again, with bad files and
other models"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import obspy
import pytest
from conftest import eager_picker

from seismodel.picking.output import PICK_COLUMNS, around, plot_picks, read_picks
from seismodel.data.archive import open_archive
from seismodel.picking import pick as catalogue
from seismodel.picking.pick import pick, pick_archive
from seismodel.cli import main
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.core import UserError

ARGS = {'P_threshold': .3, 'S_threshold': .3}


@pytest.fixture(scope='module')
def model(): return eager_picker()


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
    "A folder as fine-tuning leaves it"
    folder = tmp_path_factory.mktemp('run')
    model.picker.save_pretrained(folder)
    return folder


def rows_of(table): return read_picks(table).fillna('').to_dict('records')


def pick_files(model, source, out, args=ARGS, **kwargs):
    "Rows and what was left out, by file name or instrument"
    _, left = pick_archive(model, open_archive(source), out, args, **kwargs)
    return rows_of(out/'picks.csv'), {name.rpartition('/')[2]: why for name, why in left.items()}


def write_files(folder, n):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        stream = obspy.read()
        for trace in stream:
            trace.stats.station = f'ST{k}'
            trace.data = np.roll(trace.data, 50*k)
        stream.write(str(folder/f'{k:02}.mseed'))
    return folder


def seismodel(*args, **kwargs):
    return subprocess.run([sys.executable, '-m', 'seismodel', *map(str, args)], capture_output=True,
                          text=True, **kwargs)


def test_command(run, tmp_path):
    """CSV and QuakeML with the same picks, a figure for each instrument and day, and a sentence at
    the end"""
    files = write_files(tmp_path/'in', 2)
    done = seismodel('pick', files, '--model', run, '--out', tmp_path/'out', '--figures',
                     '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path/'out/picks.csv')
    assert tuple(rows[0]) == PICK_COLUMNS and {r['station'] for r in rows} == {'ST0', 'ST1'}
    p, s = (sum(r['phase'] == phase for r in rows) for phase in 'PS')
    assert f'{p} P and {s} S picks' in done.stdout
    events = obspy.read_events(str(tmp_path/'out/picks.xml'))
    assert sorted((p.waveform_id.station_code, p.phase_hint, str(p.time)) for e in events
                  for p in e.picks) == sorted((r['station'], r['phase'], r['time']) for r in rows)
    assert all(float(r['probability']) >= .3 and r['begin'] <= r['time'] <= r['end'] for r in rows)
    assert ([f.name for f in sorted((tmp_path/'out/figures').iterdir())]
            == ['BW.ST0..EH.2009-08-24.png', 'BW.ST1..EH.2009-08-24.png'])


def test_all_devices_pick_and_one_is_lost(run, tmp_path, monkeypatch, capsys):
    """Two processes leave the picks of one; a process that dies is named, and its days are picked
    all the same"""
    files = write_files(tmp_path/'in', 3)
    (files/'notes.txt').write_text('not a waveform', encoding='utf-8')
    alone, right = pick(files, str(run), tmp_path/'alone',
                        device='cpu').read_text(encoding='utf-8'), catalogue.pick_each
    for devices, lost in ((['cpu', 'cpu:0'], False), (['cpu', 'cpu:x'], True)):
        out = tmp_path/f'{lost}'
        monkeypatch.setattr(catalogue, 'pick_devices', lambda name, devices=devices: devices)
        monkeypatch.setattr(catalogue, 'pick_each', in_the_end(right, out/'days'))
        assert pick(files, str(run), out, device='all').read_text(encoding='utf-8') == alone
        assert (sorted(f.parent.name for f in out.glob('days/*/*.json'))
                == ['BW.ST0..EH', 'BW.ST1..EH', 'BW.ST2..EH'])
        said = capsys.readouterr().err
        assert ('The process on cpu:x was lost (1)' in said) == lost and 'left out: ' in said
        assert seen.pop() == (2 if lost else 3)


seen = []

def in_the_end(pick_each, folder):
    "Note how many days were picked before this process picks any itself"
    def noted(*args):
        seen.append(len(list(folder.glob('*/*.json'))))
        return pick_each(*args)
    return noted


def test_the_same_picks_as_classify(model, tmp_path):
    files = write_files(tmp_path/'in', 1)
    rows, _ = pick_files(model, files, tmp_path/'new/out', ARGS)
    want = model.classify(obspy.read(files/'00.mseed'), **ARGS).picks
    assert len(rows) == len(want) > 5
    assert [(r['phase'], r['time']) for r in rows] == [(p.phase, str(p.peak_time)) for p in want]


def test_results_do_not_go_into_the_archive(run, tmp_path):
    files = write_files(tmp_path/'in', 1)
    with pytest.raises(UserError, match='lies inside'): pick([files], str(run), files/'out')


@pytest.mark.parametrize('args, code, words', [
    (['pick', 'no/such/folder', '--model', 'RUN'], 2, "no file or folder 'no/such/folder'"),
    (['pick', 'FILES', '--model', 'nowhere'], 2, "no picker 'nowhere'"),
    (['pick', 'FILES', '--model', 'RUN', '--p-threshold', '1.5'], 2, 'between 0 and 1'),
    (['pick', 'FILES', '--model', 'RUN', '--device', 'cuda:9'], 2,
     "There is no device 'cuda:9' here"),
    (['pick', 'FILES', '--model', 'RUN', '--device', 'abacus'], 2, "'abacus' is not a device"),
])
def test_mistakes(run, tmp_path, capsys, args, code, words):
    files = write_files(tmp_path/'in', 1)
    args = [{'RUN': str(run), 'FILES': str(files)}.get(a, a) for a in args]
    assert main([*args, '--out', str(tmp_path/'out')]) == code
    assert words in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_bad_files_do_not_spoil_the_others(model, tmp_path):
    files = write_files(tmp_path/'in', 2)
    (files/'00.mseed').write_bytes((files/'00.mseed').read_bytes()[:100])
    (files/'empty').write_bytes(b'')
    (files/'.hidden').write_bytes(b'not asked for')
    slow, short, odd = obspy.read(), obspy.read().slice(obspy.read()[0].stats.starttime,
                                                        obspy.read()[0].stats.starttime
                                                        + 2), obspy.read()
    for trace in slow: trace.stats.sampling_rate = 1.
    for trace in odd: trace.stats.channel = 'LOG'
    for name, stream in (('slow', slow), ('odd', odd)):
        stream.write(str(files/f'{name}.mseed'), format='MSEED')
    for name, station in (('short', 'BRIEF'), ('[x]', 'BRACK')):
        stream = short if name == 'short' else obspy.read()
        for trace in stream: trace.stats.station = station
        stream.write(str(files/f'{name}.mseed'), format='MSEED')
    rows, left_out = pick_files(model, files, tmp_path/'out', ARGS)
    assert ({name for name in left_out if 'slow' not in name}
            == {'00.mseed', 'empty', 'BW.BRIEF..EH 2009-08-24', 'BW.RJOB..LO'})
    assert ([why for name, why in left_out.items() if name == 'slow.mseed']
            and '1 Hz' in left_out['slow.mseed'])
    assert ('long enough' in left_out['BW.BRIEF..EH 2009-08-24']
            and left_out['empty'] == 'it is empty')
    assert {r['station'] for r in rows} == {'ST1', 'BRACK'}
    with pytest.raises(UserError, match='No file of .* the first: .*empty: it is empty'):
        open_archive(files/'empty').require('that')
    said = read_left_out(tmp_path/'out')
    # three channels of slow.mseed
    assert len(said) == len(left_out) + 2 and all(why for _, why in said)


def read_left_out(out):
    import csv
    with open(out/'left_out.csv', newline='', encoding='utf-8') as f: return list(csv.reader(f))[1:]


def test_a_changed_setting_or_model_is_named(model, tmp_path):
    files = write_files(tmp_path/'in', 1)
    pick_files(model, files, tmp_path/'out', ARGS)
    before = (tmp_path/'out/picks.csv').read_bytes()
    with pytest.raises(UserError, match='P_threshold 0.3, not 0.5'):
        pick_files(model, files, tmp_path/'out', {**ARGS, 'P_threshold': .5})
    other = SeisModelPicker()
    with pytest.raises(UserError, match='made with weights'):
        pick_files(other, files, tmp_path/'out', ARGS)
    assert (tmp_path/'out/picks.csv').read_bytes() == before


def test_new_and_changed_files_are_picked(model, tmp_path, monkeypatch):
    "Only what is new or was changed is read again, also by an older file of the same name"
    files, picked = write_files(tmp_path/'in', 3), []
    real = catalogue.pick_day
    monkeypatch.setattr(catalogue, 'pick_day', lambda model, instrument,
                        *args: picked.append(instrument.name) or real(model, instrument, *args))
    def again():
        picked.clear()
        rows, _ = pick_files(model, files, tmp_path/'out', ARGS)
        return [name.split('.')[1] for name in picked], {r['station'] for r in rows}
    assert again() == (['ST0', 'ST1', 'ST2'], {'ST0', 'ST1', 'ST2'})
    assert again() == ([], {'ST0', 'ST1', 'ST2'})
    os.utime(files/'01.mseed', (1e9, 1e9))
    # a second file with the same samples
    shutil.copy(files/'00.mseed', files/'copy.mseed')
    assert again() == (['ST0', 'ST1'], {'ST0', 'ST1', 'ST2'})
    (files/'02.mseed').unlink()
    assert again() == ([], {'ST0', 'ST1'})


def test_two_files_of_one_name_in_one_folder_of_results(model, tmp_path):
    "Results belong to what was read, not to a name"
    rows = []
    for k in range(2):
        write_files(tmp_path/str(k), 2)
        (tmp_path/str(k)/f'0{1 - k}.mseed').unlink()
        (tmp_path/str(k)/f'0{k}.mseed').rename(tmp_path/str(k)/'x.mseed')
        rows += pick_files(model, tmp_path/str(k)/'x.mseed', tmp_path/'out', ARGS)[0]
    assert ({(r['station'], r['file']) for r in rows}
            == {(f'ST{k}', str(tmp_path/str(k)/'x.mseed')) for k in range(2)})


def test_figures_of_finished_work_are_drawn(model, tmp_path):
    files = write_files(tmp_path/'in', 1)
    pick_files(model, files, tmp_path/'out', ARGS)
    assert not (tmp_path/'out/figures').exists()
    pick_files(model, files, tmp_path/'out', ARGS, figures=True)
    assert [f.name for f in (tmp_path/'out/figures').iterdir()] == ['BW.ST0..EH.2009-08-24.png']


def test_killed_and_started_again(run, tmp_path):
    """SIGKILL in the middle: nothing half-written, the second call goes on, and the table is that
    of an undisturbed run"""
    files = write_files(tmp_path/'in', 12)
    command = [sys.executable, '-m', 'seismodel', 'pick', files, '--model', run, '--device', 'cpu',
               '--out']
    process = subprocess.Popen([*command, tmp_path/'out'], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 90
    results = lambda: {f.relative_to(tmp_path/'out'): f.read_bytes()
                       for f in (tmp_path/'out').glob('days/*/*.json')}
    while len(results()) < 3 and process.poll() is None and time.time() < deadline: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = results()
    assert 3 <= len(first) < 12 and not (tmp_path/'out/picks.csv').exists()
    for out in ('out', 'whole'): pick(files, str(run), tmp_path/out, device='cpu')
    assert (tmp_path/'out/picks.csv').read_bytes() == (tmp_path/'whole/picks.csv').read_bytes()
    assert all((tmp_path/'whole'/name).read_bytes() == text for name, text in first.items())
    assert not list((tmp_path/'out').rglob('*.part'))


def test_figures_of_odd_streams(model):
    "No pick, several stations, a day: a figure all the same"
    import matplotlib.pyplot as plt
    stream = obspy.read()
    other = stream.copy()
    for trace in other: trace.stats.station = 'XYZ'
    both = stream + other
    annotations = model.annotate(both)
    for picks in ([], model.classify(both, **ARGS).picks):
        fig = plot_picks(both, annotations, picks)
        assert len(fig.axes) == 4
        plt.close(fig)
    for trace in stream: trace.data = np.tile(trace.data, 60)
    begin, end = around(stream, [])
    assert end - begin == 60 and begin == stream[0].stats.starttime


def test_command_starts_without_seisbench():
    code = 'import sys, seismodel.picking.pick, seismodel.cli; sys.exit("seisbench" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# archives

def network(folder, stations='AAA BBB', seconds=60, channels='HHZ HHN HHE',
            start='2024-02-28T23:59:30'):
    "An SDS archive of noise with bursts: one channel and day per file"
    rng = np.random.default_rng(0)
    for station in stations.split():
        for channel in channels.split():
            x = (100*rng.standard_normal(100*seconds)*(
                1 + 20*(np.arange(100*seconds) % 1700 < 300))).astype(np.int32)
            head = dict(network='XX', station=station, channel=channel, sampling_rate=100.,
                        starttime=obspy.UTCDateTime(start))
            trace, midnight = obspy.Trace(x, head), obspy.UTCDateTime('2024-02-29')
            for day in (trace.slice(endtime=midnight - .005), trace.slice(midnight)):
                t = day.stats.starttime
                name = folder/str(
                    t.year)/'XX'/station/f'{channel}.D'/f'{day.id}.D.{t.year}.{t.julday:03}'
                name.parent.mkdir(parents=True, exist_ok=True)
                day.write(str(name), format='MSEED')
    return folder


def times(out): return [(r['station'], r['phase'], r['time']) for r in rows_of(out/'picks.csv')]


def test_options_say_which_part_of_an_archive(run, tmp_path, capsys):
    sds = network(tmp_path/'sds')
    def picked(name, *options):
        code = main(['pick', str(sds), '--model', str(run), '--device', 'cpu', '--out',
                     str(tmp_path/name), *options])
        capsys.readouterr()
        return times(tmp_path/name) if code == 0 else code
    everything = picked('all')
    assert {s for s, *_ in everything} == {'AAA', 'BBB'} and len(everything) > 20
    before, after = ([t for _, _, t in everything if (t < '2024-02-29') == early]
                     for early in (True, False))
    assert before and after                              # picks on both sides of midnight
    assert (picked('b', '--station', 'B*,C?', '--location=--')
            == [p for p in everything if p[0] == 'BBB'])
    assert picked('z', '--channel', 'HHZ', '--station', 'AAA') != picked('b', '--station', 'BBB')
    late = picked('late', '--start', '2024-02-28T23:59:50', '--end', '2024-02-29T00:00:10')
    assert (late and min(t for *_, t in late) >= '2024-02-28T23:59:50'
            and max(t for *_, t in late) < '2024-02-29T00:00:10')
    assert picked('none', '--network', 'CH') == picked('never', '--start', '2025-01-01') == 2


def test_components_by_hand_and_vertical_only(run, tmp_path, capsys):
    """Channels 3, 1, 2 mapped by hand are picked like Z, N, E; Z, R, T only with --z-only, and like
    Z alone"""
    for name, channels in (('zne', 'HHZ HHN HHE'), ('numbers', 'HH3 HH1 HH2'),
                           ('rotated', 'HHZ HHR HHT'), ('z', 'HHZ')):
        network(tmp_path/name, 'AAA', channels=channels)
    def picked(name, *options):
        out = tmp_path/'out'/(name + ''.join(options))
        code = main(['pick', str(tmp_path/name), '--model', str(run), '--device', 'cpu', '--out',
                     str(out), *options])
        return times(out) if code == 0 else capsys.readouterr().err
    zne = picked('zne')
    assert len(zne) > 10 and picked('numbers', '--components', 'Z=3,N=1,E=2') == zne != picked('z')
    assert ('components R, T, Z cannot be mapped' in picked('rotated')
            and picked('rotated', '--z-only') == picked('z'))
    assert "--components is 'Z=3,Z=1'" in picked('numbers', '--components', 'Z=3,Z=1')


def test_one_bad_file_never_stops_a_folder(run, tmp_path):
    """0 Hz, samples of 1e300, another type and rate within a file, a name that is no UTF-8, empty,
    cut off, a pickle: exit code 0 and a count"""
    import pickle
    from pathlib import Path
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/'went_off',))
    folder = network(tmp_path/'in', 'AAA', seconds=90)
    good = seismodel('pick', folder, '--model', run, '--out', tmp_path/'good', '--device', 'cpu',
                     timeout=300)
    assert good.returncode == 0 and good.stderr.count('left out') == 0
    def write(name, **changes):
        st = obspy.read()
        for k, tr in enumerate(st):
            tr.data = tr.data.astype(np.float64)
            tr.stats.update({'station': name[:5].upper()} | changes)
        return st
    zero, huge, mixed = write('zero', sampling_rate=0.), write('huge'), write('mixed')
    huge[1].data[1000:1200] = 1e300
    for tr in mixed[:3]:
        other = tr.copy()
        other.stats.starttime, other.stats.sampling_rate = tr.stats.endtime + .01, 200.
        other.data = tr.data.astype(np.float32)
        mixed.append(other)
    for name, st in (('zero', zero), ('huge', huge), ('mixed', mixed)):
        st.write(str(folder/f'{name}.mseed'), format='MSEED')
    whole = (folder/'huge.mseed').read_bytes()
    (folder/'empty.mseed').touch()
    (folder/'cut.mseed').write_bytes(whole[:300])
    (folder/'day.mseed').write_bytes(pickle.dumps(['obspy.core.stream', Bomb()]))
    with open(os.fsencode(folder) + b'/d\xe9j\xe0.mseed', 'wb') as f: f.write(whole)
    for call in range(2):
        done = seismodel('pick', folder, '--model', run, '--out', tmp_path/'out', '--device', 'cpu',
                         timeout=300)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert not (tmp_path/'went_off').exists()
    left = read_left_out(tmp_path/'out')
    assert (f"{len(left)} files, channels or intervals were left out, "
            f"see {tmp_path/'out/left_out.csv'}") in done.stderr
    why = {Path(name.rpartition(' in ')[2]).name: why for name, why in left}
    assert (why['empty.mseed'] == 'it is empty' and '0 Hz' in why['zero.mseed']
            and 'no waveform' in why['day.mseed'] and why['cut.mseed'])
    assert ([why for name, why in left if name.startswith('BW.HUGE..EHN')]
            == ['NaN, infinite or above 1e18 (d\\udce9j\\udce0.mseed, huge.mseed)'])
    found = times(tmp_path/'out')
    assert ({s for s, *_ in found} == {'AAA', 'HUGE', 'MIXED'}
            and [p for p in found if p[0] == 'AAA'] == times(tmp_path/'good'))
    (tmp_path/'bad').mkdir()
    for name in ('empty', 'cut', 'zero', 'day'):
        (folder/f'{name}.mseed').rename(tmp_path/'bad'/f'{name}.mseed')
    done = seismodel('pick', tmp_path/'bad', '--model', run, '--out', tmp_path/'nothing',
                     '--device', 'cpu', timeout=300)
    assert done.returncode == 2 and 'No file of' in done.stderr and 'Traceback' not in done.stderr


def test_the_test_files_of_obspy_twice(model, tmp_path, monkeypatch):
    """About 900 files of every format, many of them broken on purpose: reasons and picks, and the
    second call picks nothing"""
    files = [f for f in Path(obspy.__file__).parent.rglob('*') if f.is_file()
             and {'tests', 'data'} <= set(f.parts)]
    args = {'P_threshold': .97, 'S_threshold': .97}
    count, left = pick_archive(model, open_archive(*files), tmp_path/'out', args)
    assert len(files) > 800 and len(left) > 500 and sum(count.values()) > 100
    monkeypatch.setattr(catalogue, 'pick_day', lambda *args: pytest.fail('picked again'))
    assert pick_archive(model, open_archive(*files), tmp_path/'out', args) == (count, left)

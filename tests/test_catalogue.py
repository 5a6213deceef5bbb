"seismodel pick: as a process, over many files, stopped and started again, with bad files and other models"
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import obspy
import pytest
import torch

from seismodel.picking.output import PICK_COLUMNS, around, plot_picks, read_picks
from seismodel.picking import pick as catalogue
from seismodel.picking.pick import pick, pick_files
from seismodel.cli import main
from seismodel.finetuning.heads import Picker
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.models.pretraining import build, preset
from seismodel.core import UserError

ARGS = {'P_threshold': .3, 'S_threshold': .3}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    picker = Picker(build(preset('contrastive-tiny').model)).eval()
    with torch.no_grad(): picker.head.out.weight.mul_(8.)
    return SeisModelPicker.of(picker)


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
    "A folder as fine-tuning leaves it"
    folder = tmp_path_factory.mktemp('run')
    model.picker.save_pretrained(folder)
    return folder


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
    return subprocess.run([sys.executable, '-m', 'seismodel', *map(str, args)], capture_output=True, text=True, **kwargs)


def test_command(run, tmp_path):
    "CSV and QuakeML with the same picks, a figure for each file, and a sentence at the end"
    files = write_files(tmp_path/'in', 2)
    done = seismodel('pick', files, '--model', run, '--out', tmp_path/'out', '--figures', '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    rows = read_picks(tmp_path/'out/picks.csv')
    assert tuple(rows[0]) == PICK_COLUMNS and {r['station'] for r in rows} == {'ST0', 'ST1'}
    assert f"{sum(r['phase'] == 'P' for r in rows)} P and {sum(r['phase'] == 'S' for r in rows)} S picks" in done.stdout
    events = obspy.read_events(str(tmp_path/'out/picks.xml'))
    assert sorted((p.waveform_id.station_code, p.phase_hint, str(p.time)) for e in events for p in e.picks) == sorted((r['station'], r['phase'], r['time']) for r in rows)
    assert all(float(r['probability']) >= .3 and r['begin'] <= r['time'] <= r['end'] for r in rows)
    assert [f.name for f in sorted((tmp_path/'out/figures').iterdir())] == ['00.mseed.png', '01.mseed.png']


def test_all_devices_pick_and_one_is_lost(run, tmp_path, monkeypatch, capsys):
    "Two processes leave the picks of one; a process that dies is named, and its files are picked all the same"
    files = write_files(tmp_path/'in', 3)
    (files/'notes.txt').write_text('not a waveform', encoding='utf-8')
    alone, right = pick(files, str(run), tmp_path/'alone', device='cpu').read_text(encoding='utf-8'), catalogue.pick_each
    for devices, lost in ((['cpu', 'cpu:0'], False), (['cpu', 'cpu:x'], True)):
        out = tmp_path/f'{lost}'
        monkeypatch.setattr(catalogue, 'pick_devices', lambda name, devices=devices: devices)
        monkeypatch.setattr(catalogue, 'pick_each', in_the_end(right, out/'files'))
        assert pick(files, str(run), out, device='all').read_text(encoding='utf-8') == alone
        assert sorted(f.name for f in (out/'files').iterdir()) == ['00.mseed.csv', '01.mseed.csv', '02.mseed.csv']
        said = capsys.readouterr().err
        assert ('The process on cpu:x was lost (1)' in said) == lost and 'left out: ' in said
        assert seen.pop() == (2 if lost else 3)


seen = []

def in_the_end(pick_each, folder):
    "Note how many files were picked before this process picks any itself"
    def noted(*args):
        seen.append(len(list(folder.iterdir())))
        return pick_each(*args)
    return noted


def test_the_same_picks_as_classify(model, tmp_path):
    files = write_files(tmp_path/'in', 1)
    rows, _ = pick_files(model, files, tmp_path/'new/out', ARGS)
    want = model.classify(obspy.read(files/'00.mseed'), **ARGS).picks
    assert [(r['phase'], r['time']) for r in rows] == [(p.phase, str(p.peak_time)) for p in want] and len(rows) > 5


@pytest.mark.parametrize('args, code, words', [
    (['pick', 'no/such/folder', '--model', 'RUN'], 2, "no file or folder 'no/such/folder'"),
    (['pick', 'FILES'], 2, '--model'),
    (['pick', 'FILES', '--model', 'nowhere'], 2, "no picker 'nowhere'"),
    (['pick', 'FILES', '--model', 'RUN', '--p-threshold', '1.5'], 2, 'between 0 and 1'),
    (['pick', 'FILES', '--model', 'RUN', '--device', 'cuda:9'], 2, "There is no device 'cuda:9' here"),
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
    slow, short, odd = obspy.read(), obspy.read().slice(obspy.read()[0].stats.starttime, obspy.read()[0].stats.starttime + 2), obspy.read()
    for trace in slow: trace.stats.sampling_rate = 1.
    for trace in odd: trace.stats.channel = 'LOG'
    for name, stream in (('slow', slow), ('short', short), ('odd', odd)): stream.write(str(files/f'{name}.mseed'), format='MSEED')
    obspy.read().write(str(files/'[x].mseed'))
    rows, left_out = pick_files(model, files, tmp_path/'out', ARGS)
    assert set(left_out) == {'00.mseed', 'empty', 'slow.mseed', 'short.mseed', 'odd.mseed'}
    assert '1 Hz' in left_out['slow.mseed'] and 'long enough' in left_out['short.mseed'] and 'cannot' not in left_out['short.mseed']
    assert {r['file'] for r in rows} == {'01.mseed', '[x].mseed'}
    with pytest.raises(UserError, match='No file of'): pick_files(model, files/'empty', tmp_path/'other', ARGS)


def test_a_changed_setting_or_model_is_named(model, tmp_path):
    files = write_files(tmp_path/'in', 1)
    pick_files(model, files, tmp_path/'out', ARGS)
    before = (tmp_path/'out/picks.csv').read_bytes()
    with pytest.raises(UserError, match='P_threshold 0.3, not 0.5'): pick_files(model, files, tmp_path/'out', {**ARGS, 'P_threshold': .5})
    other = SeisModelPicker()
    with pytest.raises(UserError, match='made with weights'): pick_files(other, files, tmp_path/'out', ARGS)
    assert (tmp_path/'out/picks.csv').read_bytes() == before
    with pytest.raises(UserError, match='lies inside'): pick_files(model, files, files/'out', ARGS)


def test_new_and_changed_files_are_picked(model, tmp_path):
    files = write_files(tmp_path/'in', 2)
    pick_files(model, files, tmp_path/'out', ARGS)
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'out/files').iterdir()}
    later = time.time() + 10
    os.utime(files/'01.mseed', (later, later))
    shutil.copy(files/'00.mseed', files/'02.mseed')
    rows, _ = pick_files(model, files, tmp_path/'out', ARGS)
    now = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'out/files').iterdir()}
    assert now['00.mseed.csv'] == times['00.mseed.csv'] and now['01.mseed.csv'] > times['01.mseed.csv'] and '02.mseed.csv' in now
    assert {r['file'] for r in rows} == {'00.mseed', '01.mseed', '02.mseed'}


def test_killed_and_started_again(run, tmp_path):
    "SIGKILL in the middle: nothing half-written, the second call goes on, and the table is that of an undisturbed run"
    files = write_files(tmp_path/'in', 12)
    command = [sys.executable, '-m', 'seismodel', 'pick', files, '--model', run, '--device', 'cpu', '--out']
    process = subprocess.Popen([*command, tmp_path/'out'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 90
    while len(list((tmp_path/'out/files').glob('*.csv'))) < 3 and process.poll() is None and time.time() < deadline: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {f.name: f.read_bytes() for f in (tmp_path/'out/files').glob('*.csv')}
    assert 3 <= len(first) < 12 and not (tmp_path/'out/picks.csv').exists()
    for out in ('out', 'whole'): pick(files, str(run), tmp_path/out, device='cpu')
    assert (tmp_path/'out/picks.csv').read_bytes() == (tmp_path/'whole/picks.csv').read_bytes()
    assert all((tmp_path/'whole/files'/name).read_bytes() == text for name, text in first.items())
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

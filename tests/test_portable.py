"""Other systems, as far as Linux can show them: a first day without what Windows lacks, and text
files whose encoding is named"""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import nbs
from elsewhere import lacking
from filelock import FileLock

from seismodel.data.prefetch import ignore_signals
from seismodel.files import force_out
from seismodel.training.runlog import read_metrics

root = Path(__file__).resolve().parents[1]
elsewhere = root/'tests/elsewhere'
TRITON = {f'seismodel.kernels.{name}' for name in ('swiglu', 'tiles', 'triton_infonce',
                                                   'triton_mlstm')}


def text_calls(tree):
    "The calls of a module that open, read or write text without naming an encoding"
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(k.arg == 'encoding' for k in call.keywords):
            continue
        f, first = call.func, 1
        if isinstance(f, ast.Attribute):
            if isinstance(f.value, ast.Name) and f.value.id in ('os', 'h5py'): continue
            f, first = ast.Name(f.attr), 0
        if not isinstance(f, ast.Name): continue
        if f.id in ('read_text', 'write_text'): yield call
        if f.id == 'open':
            mode = next((k.value for k in call.keywords if k.arg == 'mode'), call.args[first]
                        if len(call.args) > first else None)
            if mode is None or isinstance(mode, ast.Constant) and 'b' not in str(mode.value):
                yield call


@pytest.mark.parametrize('code, finds', [
    ("open('a')", 1), ("open('a', 'w', newline='')", 1), ("p.read_text()", 1),
    ("(p/'a').write_text('x')", 1), ("p.open()", 1),
    ("open('a', 'rb')", 0), ("open('a', encoding='utf-8')", 0),
    ("p.read_text(encoding='utf-8')", 0), ("os.open(p, os.O_RDONLY)", 0)])
def test_the_check_on_encodings_sees(code, finds):
    assert len(list(text_calls(ast.parse(code)))) == finds


def test_every_text_file_has_its_encoding_named():
    "Windows would take its own, and an umlaut in a station's name would be another one elsewhere"
    files = [f for part in ('seismodel', 'scripts', 'tools', 'benchmarks', 'tests')
             for f in sorted((root/part).rglob('*.py'))]
    assert len(files) > 50
    found = [f'{f.relative_to(root)}:{call.lineno}' for f in files
             for call in text_calls(ast.parse(f.read_text(encoding='utf-8')))]
    found += [f'{nb.relative_to(root)}: {ast.unparse(call)}' for nb in nbs
              for call in text_calls(ast.parse(code_of(nb)))]
    assert found == []


def code_of(nb):
    "All code of a chapter, its examples too"
    return '\n'.join(''.join(c['source'])
                     for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']
                     == 'code')


def linux_only(code):
    """Modules, functions and signals in it that Windows lacks, where it does not ask whether they
    are there; forks, links and absolute paths"""
    tree, asked, found = ast.parse(code), set(), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        if ast.unparse(node.func) == 'hasattr':
            asked.add(node.args[1].value if isinstance(node.args[1], ast.Constant) else None)
        if there := re.fullmatch(r"Path\('(.*)'\)\.exists", ast.unparse(node.func)):
            asked.add(there[1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name in lacking.MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module in lacking.MODULES else []
        elif isinstance(node, ast.Attribute):
            where, name = ast.unparse(node.value), node.attr
            signals = re.fullmatch('SIG[A-Z][A-Z0-9]+', name) and name not in lacking.SIGNALS
            gone = (where == 'os' and name in lacking.OS or where == 'signal'
                    and (name in lacking.SIGNAL or signals))
            if gone and name not in asked or name in ('symlink', 'symlink_to'):
                found.append(f'{where}.{name}')
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = re.match('/(tmp|proc|dev|usr|home)(/|$)', node.value)
            if node.value == 'fork' or path and node.value not in asked: found.append(node.value)
    return found


@pytest.mark.parametrize('code, finds', [
    ('import fcntl', ['fcntl']), ('def f():\n    from resource import getrlimit', ['resource']),
    ('os.fork()', ['os.fork']),
    ('signal.signal(signal.SIGUSR1, f)', ['signal.SIGUSR1']),
    ("DataLoader(x, multiprocessing_context='fork')", ['fork']),
    ("Path('/tmp/x')", ['/tmp/x']), ("if Path('/dev/full').exists(): open('/dev/full', 'wb')", []),
    ('p.symlink_to(q)', ['p.symlink_to']), ("if hasattr(signal, 'alarm'): signal.alarm(60)", []),
    ('signal.signal(signal.SIGINT, signal.SIG_IGN)', []), ('os.replace(a, b)', [])])
def test_the_check_on_systems_sees(code, finds):
    assert linux_only(code) == finds


def test_nothing_needs_linux():
    "Neither package nor chapters"
    modules = [f for f in sorted((root/'seismodel').rglob('*.py')) if f.name != '_modidx.py']
    code = ({f.relative_to(root).as_posix(): f.read_text(encoding='utf-8') for f in modules}
            | {nb.relative_to(root).as_posix(): code_of(nb) for nb in nbs})
    assert len(code) > 90
    assert {name: found for name, text in code.items() if (found := linux_only(text))} == {}


def first_day_elsewhere(folder):
    "Run it, and keep how it ended and what it printed"
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    env |= {'PYTHONPATH': os.pathsep.join([str(elsewhere), str(root)]), 'OMP_NUM_THREADS': '1',
            'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': '',
            # text is ASCII unless told
            'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0',
            'PYTHONIOENCODING': 'cp1252'}
    done = subprocess.run([sys.executable, elsewhere/'first_day.py'], cwd=folder, env=env,
                          capture_output=True, encoding='cp1252')
    (folder/'end.json').write_text(json.dumps([done.returncode, done.stdout + done.stderr]),
                                   encoding='utf-8')


@pytest.fixture(scope='module')
def day(tmp_path_factory):
    """A first day elsewhere, once for all processes of the tests: its folder, what it reports, and
    what it printed"""
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    folder = shared/'elsewhere'
    with FileLock(shared/'elsewhere.lock'):
        if not folder.exists():
            folder.mkdir()
            first_day_elsewhere(folder)
    returncode, said = json.loads((folder/'end.json').read_text(encoding='utf-8'))
    assert returncode == 0, said
    return folder, json.loads((folder/'report.json').read_text(encoding='utf-8')), said


def test_every_module_is_imported_without_what_windows_lacks(day):
    _, report, _ = day
    assert ({name: lacks for name, lacks in report['modules'].items() if lacks}
            == dict.fromkeys(TRITON, 'triton'))
    assert len(report['modules']) > 45


def test_help_of_every_command(day):
    assert len(day[1]['helps']) > 10 and set(day[1]['helps'].values()) == {0}


def test_a_run_is_stopped_and_resumed(day):
    folder, report, said = day
    assert report['pretraining'] == [128 + signal.SIGINT, 0]
    assert [row['step'] for row in read_metrics(folder/'run')] == [1, 2, 3, 4]
    assert ('Stopped by SIGINT after step 2 of 4' in said
            and "Another process is training in 'run'" in said)


def test_a_picker_is_trained_and_scored(day):
    folder, report, said = day
    assert report['finetuning'] == [0, 0, 0, 0], said
    assert (folder/'fine/best/model.safetensors').exists() and (folder/'features.npz').exists()


def test_a_store_is_packed_and_a_record_picked(day):
    folder, report, said = day
    assert report['picks'] == [0, 0]
    assert ((folder/'store/manifest.json').exists() and not list(folder.rglob('*.part'))
            and not (folder/'store/parts').exists())
    assert ((folder/'picks/picks.csv').read_bytes().count(b'\n') > 1
            and (folder/'picks/figures/BW.RJOB..EH.2009-08-24.png').exists())


def test_a_trial_of_a_study_gets_its_name(day):
    folder, report, _ = day
    assert report['trial'] is None
    assert ((folder/'trials/PhaseNet--1--0/output.txt').read_text(encoding='utf-8')
            == 'trained, at 5 °C\n')


def test_names_of_files_are_good_everywhere(day):
    names = [f.name for f in day[0].rglob('*')]
    assert len(names) > 20
    assert [name for name in names if set(name) & set('<>:"|?*\\') or name[-1] in '. '] == []


def test_a_folder_is_forced_out_where_the_system_opens_folders(tmp_path, monkeypatch):
    opened, real = [], os.open
    (tmp_path/'a').touch()
    monkeypatch.setattr(os, 'open', lambda path, *rest: opened.append(Path(path))
                        or real(path, *rest))
    for path in (tmp_path, tmp_path/'a'): force_out(path)
    assert opened == [tmp_path, tmp_path/'a']


def orphaned(folder, work, context):
    """The number of a process with `work`, a function of this module, that was begun by one that
    then died of SIGKILL"""
    code = f"""if __name__ == '__main__':
    import os, sys, time
    from multiprocessing import get_context
    from pathlib import Path
    sys.path.insert(0, {str(root/'tests')!r})
    from seismodel.data.prefetch import worker_context
    from test_portable import {work}
    folder = Path({str(folder)!r})
    (folder/'parent').write_text(str(os.getpid()), encoding='utf-8')
    worker = {context}.Process(target={work}, args=(folder,))
    worker.start()
    (folder/'worker').write_text(str(worker.pid), encoding='utf-8')
    while not (folder/'begun').exists(): time.sleep(.01)
    os.kill(os.getpid(), 9)
"""
    (folder/'train.py').write_text(code, encoding='utf-8')
    done = subprocess.run([sys.executable, 'train.py'], cwd=folder,
                          env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == -9
    return int((folder/'worker').read_text(encoding='utf-8'))


def late(folder):
    "A worker that is still beginning when its parent is gone"
    (folder/'begun').touch()
    while os.getppid() == int((folder/'parent').read_text(encoding='utf-8')): time.sleep(.01)
    time.sleep(.1)
    ignore_signals(0)
    (folder/'stayed').touch()


def test_a_worker_whose_parent_died_while_it_began_does_not_stay(tmp_path):
    worker = Path('/proc', str(orphaned(tmp_path, 'late', "get_context('spawn')")))
    while worker.exists() and b'spawn_main' in (worker/'cmdline').read_bytes(): time.sleep(.05)
    assert not (tmp_path/'stayed').exists()


def endless(folder):
    "A worker at work"
    ignore_signals(0)
    (folder/'begun').touch()
    while True: time.sleep(.01)


@pytest.mark.parametrize('context', ["get_context('spawn')", 'worker_context()'])
def test_a_worker_ends_with_the_process_that_wanted_it(tmp_path, context):
    "Also where another process has started it: a fork server lives as long as its workers"
    worker = Path('/proc', str(orphaned(tmp_path, 'endless', context)))
    since = time.monotonic()
    while worker.exists() and time.monotonic() < since + 60: time.sleep(.05)
    assert not worker.exists()

"""The scaling script: its arithmetic, and that nobody outlives a kill. The script itself: `SMALL=1
bash benchmarks/scaling.sh OUT`"""
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def scaling():
    spec = importlib.util.spec_from_file_location('scaling', root/'benchmarks/scaling.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_the_time_goes_adds_up(scaling):
    """Kernels from 0 to 4 and 6 to 8 ms, messages from 3 to 5 and 9 to 10, two steps: what overlaps
    counts once"""
    parts = scaling.where_time_goes([(3000, 5000), (9000, 10000)],
                                    [(0, 3000), (2000, 4000), (6000, 8000)], 2)
    assert (parts
            == pytest.approx({'kernels': 3., 'messages alone': 1., 'messages beside kernels': .5,
                              'nothing': 1., 'all': 5.}))
    assert (parts['kernels'] + parts['messages alone'] + parts['nothing']
            == pytest.approx(parts['all']))


def test_a_kill_reaches_children_of_children(scaling):
    "Also those that have a session of their own, as torchrun's ranks do"
    child = ('import subprocess, sys; subprocess.Popen([sys.executable, "-c", '
             '"import time; time.sleep(60)"], start_new_session=True).wait()')
    process = subprocess.Popen([sys.executable, '-c', child])
    since = time.monotonic()
    while not (found := scaling.descendants(process.pid)) and time.monotonic() < since + 20:
        time.sleep(.02)
    assert len(found) == 1
    scaling.kill_all(process)
    assert process.returncode == -9
    def alive():
        try:
            return Path(f'/proc/{found[0]}/stat').read_text(encoding='utf-8').rsplit(')', 1)[
                1].split()[0] not in 'ZX'
        except OSError: return False
    while alive() and time.monotonic() < since + 30: time.sleep(.02)
    assert not alive()


def test_differences_are_from_the_first_run_on_one_rank(scaling):
    rows = [dict(preset='p', ranks=str(n), time=str(t), step=str(s), loss=str(loss),
                 code_perplexity='')
            for n, t, losses in ((1, 1, (4., 3.)), (1, 2, (4., 3.5)), (8, 1, (4.25, 3.))) for s,
            loss in enumerate(losses)]
    assert scaling.differences(rows) == {'p': {(1, 2): (.5, None), (8, 1): (.25, None)}}
    # where the first one is missing nothing can be said
    assert scaling.differences(rows[4:]) == {}


def test_a_later_call_adds_its_counts(scaling, tmp_path, capsys):
    for n in (1, 2): scaling.append(tmp_path, 'speed', dict(preset='p', ranks=n, ms=n))
    scaling.drop_rows(tmp_path, 'speed', [2, 4])
    assert [r['ranks'] for r in scaling.rows_of(tmp_path, 'speed')] == ['1']
    scaling.drop_rows(tmp_path, 'speed', [1])
    assert scaling.rows_of(tmp_path, 'speed') == []

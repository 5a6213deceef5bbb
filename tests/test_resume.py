"""Runs that are killed and resumed: real processes, SIGKILL at random moments, and the same numbers bit for bit

`SEISMODEL_KILLS=20 python -m pytest -s tests/test_resume.py` kills twenty times in each case and says where it hit.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.runlog import CLOCK, read_metrics

root = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get('SEISMODEL_KILLS', 2))
STEPS = 24 if KILLS > 2 else 15
SMALL = ['--window', 512, '--steps', STEPS, '--batch-size', 4, '--log-every', 1, '--validate-every', 7, '--validation-windows', 4, '--checkpoint-every', 3,
         '--seed', 5, '--device', 'cpu']


def start(*words, cwd, **env):
    "`python -m seismodel pretrain …` as a process of its own"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(root), **env}
    return subprocess.Popen([sys.executable, '-m', 'seismodel', 'pretrain', *map(str, words)], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    "Wait for its end; what it said"
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def lines(run):
    "How many steps the run has logged so far"
    try: return (run/'metrics.jsonl').read_bytes().count(b'\n')
    except FileNotFoundError: return 0


def children(pid):
    "The workers of a process; multiprocessing's own helper is none"
    found = [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text(encoding='utf-8').split()]
    return [p for p in found if b'spawn_main' in Path(f'/proc/{p}/cmdline').read_bytes()]


def kill(process, run, how, rng):
    "Let it make a few steps, then kill it: in a step, in a worker, or while it writes a checkpoint; where it was hit"
    goal = lines(run) + rng.randrange(1, STEPS//3)
    while process.poll() is None and lines(run) < goal: time.sleep(.002)
    if how == 'write':
        while process.poll() is None and not list((run/'checkpoints').glob('.*.part')): time.sleep(.0002)
    else: time.sleep(rng.uniform(0, .15))
    if process.poll() is not None: return 'ended before it was hit'
    if how == 'worker' and children(process.pid):
        os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
        said = finish(process, 1)
        assert 'prepares windows was lost' in said and 'Traceback' not in said
        return 'worker'
    process.kill()
    process.communicate()
    return 'write' if list((run/'checkpoints').glob('.*.part')) else 'step'


def assert_same(a, b):
    "Two runs have the same metrics but for the clock, and the same weights, moments and best weights to the bit"
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(run)] for run in (a, b)]
    assert rows[0] == rows[1]
    (left, right) = (read_checkpoint(checkpoint_files(run)[0]) for run in (a, b))
    assert left.tensors.keys() == right.tensors.keys() and all(torch.equal(t, right.tensors[name]) for name, t in left.tensors.items())
    assert left.state['progress'] == right.state['progress']
    for name in ('model.safetensors', 'best/model.safetensors', 'bad_traces.json'): assert (a/name).read_bytes() == (b/name).read_bytes(), name


@pytest.mark.parametrize('method, workers', [('contrastive', 1), ('reconstruction', 0), *([('contrastive', 0), ('contrastive', 2), ('reconstruction', 2)] if KILLS > 2 else [])])
def test_a_run_killed_at_random_moments_ends_as_one_that_never_was(method, workers, quakes_folder, tmp_path):
    rng, hits = random.Random(f'{method} {workers} {KILLS}'), []
    data = ['--data', quakes_folder] if method == 'contrastive' else ['--data', 'synthetic']     # 24 records: 96 windows are four epochs
    words = ['--preset', f'{method}-tiny', *data, '--workers', workers, *SMALL]
    finish(start(*words, '--out', 'whole', cwd=tmp_path))
    run = tmp_path/'killed'
    process = start(*words, '--out', 'killed', cwd=tmp_path)
    while len(hits) < KILLS:
        hits.append(kill(process, run, ('write', 'worker' if workers else 'step', 'step')[len(hits) % 3], rng))
        if hits[-1].startswith('ended'):                          # too near the end: once more from the beginning
            hits.pop()
            assert process.returncode == 0
            assert_same(tmp_path/'whole', run)
            run = run.with_name(f'{run.name}-again')
            process = start(*words, '--out', run.name, cwd=tmp_path)
        else: process = start('--resume', run, cwd=tmp_path) if (run/'config.json').exists() else start(*words, '--out', run.name, cwd=tmp_path)
    finish(process)
    assert_same(tmp_path/'whole', run)
    print(f'{method}, {workers} workers: {len(hits)} kills,', ', '.join(f'{hits.count(h)} in a {h}' for h in sorted(set(hits))))

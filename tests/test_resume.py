"""Runs that are killed and resumed: real processes, SIGKILL at random moments, and the same numbers
bit for bit

`SEISMODEL_KILLS=20 python -m pytest -s tests/test_resume.py` kills twenty times in each case and
says where it hit.
"""
import os
import random
import signal
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from seismodel.core import UserError
from seismodel.data.sources import write_synthetic
from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.pretrain import pretrain
from seismodel.training.runlog import CLOCK, read_metrics

root = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get('SEISMODEL_KILLS', 2))
STEPS = 24 if KILLS > 2 else 15
SMALL = ['--window', 512, '--steps', STEPS, '--batch-size', 4, '--log-every', 1, '--validate-every',
         7, '--validation-windows', 4, '--checkpoint-every', 3,
         '--seed', 5, '--device', 'cpu']


def start(*words, cwd, **env):
    "`python -m seismodel pretrain …` as a process of its own"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': str(root), **env}
    return subprocess.Popen([sys.executable, '-m', 'seismodel', 'pretrain', *map(str, words)],
                            cwd=cwd, env=env,
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
    """The workers of a process: what its fork server has started; multiprocessing's other helper is
    none"""
    started = lambda p: [
        int(c) for c in Path(f'/proc/{p}/task/{p}/children').read_text(encoding='utf-8').split()]
    servers = [p for p in started(pid) if b'forkserver' in Path(f'/proc/{p}/cmdline').read_bytes()]
    return [worker for server in servers for worker in started(server)]


def kill(process, run, how, rng):
    """Let it make a few steps, then kill it: in a step, in a worker, or while it writes a
    checkpoint; where it was hit"""
    goal = lines(run) + rng.randrange(1, STEPS//3)
    while process.poll() is None and lines(run) < goal: time.sleep(.002)
    if how == 'write':
        while process.poll() is None and not list((run/'checkpoints').glob('.*.part')):
            time.sleep(.0002)
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
    """Two runs have the same metrics but for the clock, and the same weights, moments and best
    weights to the bit"""
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(run)]
            for run in (a, b)]
    assert rows[0] == rows[1]
    (left, right) = (read_checkpoint(checkpoint_files(run)[0]) for run in (a, b))
    assert (left.tensors.keys() == right.tensors.keys()
            and all(torch.equal(t, right.tensors[name]) for name, t in left.tensors.items()))
    assert left.state['progress'] == right.state['progress']
    for name in ('model.safetensors', 'best/model.safetensors', 'bad_traces.json'):
        assert (a/name).read_bytes() == (b/name).read_bytes(), name


@pytest.mark.parametrize('method, workers', [('contrastive', 1), ('reconstruction', 0), *(
    [('contrastive', 0), ('contrastive', 2), ('reconstruction', 2)] if KILLS > 2 else [])])
def test_a_run_killed_at_random_moments_ends_as_one_that_never_was(method, workers, quakes_folder,
                                                                   tmp_path):
    rng, hits = random.Random(f'{method} {workers} {KILLS}'), []
    # 24 records: 96 windows are four epochs
    data = ['--data', quakes_folder] if method == 'contrastive' else ['--data', 'synthetic']
    words = ['--preset', f'{method}-tiny', *data, '--workers', workers, *SMALL]
    finish(start(*words, '--out', 'whole', cwd=tmp_path))
    run = tmp_path/'killed'
    process = start(*words, '--out', 'killed', cwd=tmp_path)
    while len(hits) < KILLS:
        hits.append(kill(process, run,
                         ('write', 'worker' if workers else 'step', 'step')[len(hits) % 3], rng))
        # too near the end: once more from the beginning
        if hits[-1].startswith('ended'):
            hits.pop()
            assert process.returncode == 0
            assert_same(tmp_path/'whole', run)
            run = run.with_name(f'{run.name}-again')
            process = start(*words, '--out', run.name, cwd=tmp_path)
        else:
            process = (start('--resume', run, cwd=tmp_path)
                       if (run/'config.json').exists() else start(*words, '--out', run.name,
                                                                  cwd=tmp_path))
    finish(process)
    assert_same(tmp_path/'whole', run)
    print(f'{method}, {workers} workers: {len(hits)} kills,',
          ', '.join(f'{hits.count(h)} in a {h}' for h in sorted(set(hits))))


@pytest.fixture(scope='module')
def unlabelled(tmp_path_factory):
    "A SeisBench folder whose records have no picks: real noise has to be found by its calm"
    folder = tmp_path_factory.mktemp('unlabelled')
    write_synthetic(folder, dict(train=24, dev=4), samples=1500)
    table = pd.read_csv(folder/'metadata.csv')
    labels = [n for n in table if 'arrival' in n or 'status' in n or n == 'trace_category']
    table.drop(columns=labels).to_csv(folder/'metadata.csv', index=False)
    return folder


def test_an_augmented_pretraining_resumes_to_the_bit(unlabelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = dict(data=[str(unlabelled), 'synthetic'], window=512, steps=4, batch_size=4,
                checkpoint_every=2, validation_windows=4, log_every=1,
                device='cpu', workers=0)
    full, plain = (pretrain(**args, augment=augment, out=Path(augment or 'plain'))
                   for augment in ('full', None))
    weights = (full/'model.safetensors').read_bytes()
    assert (len(weights) == len((plain/'model.safetensors').read_bytes())
            and weights != (plain/'model.safetensors').read_bytes())
    shutil.copytree(full, 'again')
    # as if killed after step 2
    checkpoint_files(Path('again'))[0].unlink()
    pretrain(resume=Path('again'))
    assert (Path('again')/'model.safetensors').read_bytes() == weights
    with pytest.raises(UserError, match='augment was full and is none'):
        pretrain(resume=full, augment='none')
    with pytest.raises(UserError, match='augment was none and is full'):
        pretrain(resume=plain, augment='full')
    with pytest.raises(UserError, match="--augment is 'some'; choose full or none"):
        pretrain(augment='some')
    pretrain(resume=full, augment='full')


def test_noise_for_pretraining_is_found_without_labels(unlabelled):
    from seismodel.data.sources import open_source
    from seismodel.signals.noise import calm_bank, noise_bank
    source = open_source(str(unlabelled), 'train', 512)
    assert noise_bank([source], window=512).shape == (0, 512, 3)
    bank = calm_bank([source], window=512)
    assert bank.shape[1:] == (512, 3) and 0 < len(bank) < len(source)
    assert (bank.abs().amax(1) < 5.001*bank.std(1, correction=0)).all()

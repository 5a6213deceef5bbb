"What interrupts a run: signals, a full disk, NaN, a crash, changed settings; and how it goes on"
import json
import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
import torch
from noise import Noise, crash, draw, nothing_usable

from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.core import Interrupted, TrainingError, UserError
from seismodel.data.prefetch import SIGNALS
from seismodel.models.pretraining import (ContrastiveConfig, ReconstructionConfig, build,
                                          from_pretrained)
from seismodel.training.config import TrainConfig
from seismodel.training.runlog import CLOCK, read_metrics
from seismodel.training.trainer import train

CONTRASTIVE = ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16,
                                               target_features=16), blocks=1, pooling=(4,),
                                dropout=.2)
RECONSTRUCTION = ReconstructionConfig(BidirAutoregConfig(d_model=16, dropout=.1), blocks=1, ff=2.,
                                      dropout=.2)
STEPS = 12


def go(folder, at={}, resume=False, config=CONTRASTIVE, data=None, **settings):
    "A run of twelve steps of four windows"
    torch.manual_seed(1)
    c = TrainConfig(**{**dict(steps=STEPS, batch_size=4, lr=3e-3, device='cpu', workers=0,
                              log_every=1, validate_every=6, validation_windows=4,
                              checkpoint_every=4), **settings})
    # seconds, for pictures that nobody looks at
    with patch('seismodel.training.trainer.draw_run'):
        return train(build(config), data or Noise(at=at), Noise(4), c, folder, resume=resume)


def same(a, b):
    "Metrics but for the clock, weights, moments and progress"
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(f)]
            for f in (a, b)]
    left, right = (read_checkpoint(checkpoint_files(f)[0]) for f in (a, b))
    return (rows[0] == rows[1] and left.state['progress'] == right.state['progress']
            and all(torch.equal(t, right.tensors[n]) for n, t in left.tensors.items()))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run that nothing ever happened to"
    return go(tmp_path_factory.mktemp('whole')/'run')


@pytest.mark.parametrize('config, settings', [(CONTRASTIVE, {}), (RECONSTRUCTION, {}), (
    CONTRASTIVE, dict(accumulate=2, batch_size=2)), (RECONSTRUCTION, dict(workers=1))],
                         ids=['contrastive', 'reconstruction', 'accumulating', 'workers'])
def test_a_crash_costs_nothing_but_time(config, settings, tmp_path):
    "With dropout, and with somebody else drawing random numbers in between"
    go(tmp_path/'a', config=config, **settings)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path/'b', {4*6 + 1: crash}, config=config, **settings)
    torch.rand(99), np.random.rand(99), random.random()
    with pytest.raises(ZeroDivisionError):
        go(tmp_path/'b', {4*10 + 3: crash}, resume=True, config=config, **settings)
    go(tmp_path/'b', {4*9: draw}, resume=True, config=config, **settings)
    assert same(tmp_path/'a', tmp_path/'b')


@pytest.mark.parametrize('number', SIGNALS, ids=lambda s: s.name)
def test_a_signal_finishes_the_step_and_saves(number, whole, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted,
                       match=rf'Stopped by {number.name} after step 6 of 12; the checkpoint of '
                             rf'step 6 is safe. Go on with --resume') as e:
        go(tmp_path/'run', {4*5 + 2: lambda: signal.raise_signal(number)})
    assert e.value.number == number and signal.getsignal(number) is before
    assert read_checkpoint(checkpoint_files(tmp_path/'run')[0]).state['step'] == 6
    go(tmp_path/'run', resume=True)
    assert same(tmp_path/'run', whole)


def test_a_signal_in_the_last_step_ends_a_run_that_is_done(whole, tmp_path):
    go(tmp_path/'run', {4*11: lambda: signal.raise_signal(signal.SIGTERM)})
    assert same(tmp_path/'run', whole)


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='no groups of processes here')
def test_a_signal_to_all_processes_of_a_job_spares_the_workers(tmp_path):
    "As Ctrl-C in a terminal and SLURM do it"
    words = ('pretrain --preset reconstruction-tiny --window 256 --batch-size 2 --steps 4000 '
             '--device cpu --workers 2 --log-every 1 --validation-windows 2 --out run').split()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': ''}
    p = subprocess.Popen([sys.executable, '-m', 'seismodel', *words], cwd=tmp_path, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    while p.poll() is None and not (tmp_path/'run/metrics.jsonl').exists(): time.sleep(.05)
    time.sleep(.5)
    os.killpg(p.pid, signal.SIGUSR1)
    out, said = p.communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGUSR1, said
    assert ('Traceback' not in said and 'seismodel: Stopped by SIGUSR1 after step' in said
            and said.rstrip().endswith('Go on with --resume run'))
    assert len(checkpoint_files(tmp_path/'run')) == 1


class LittleRoom:
    "Files may not grow beyond some bytes: the kernel's own refusal, as on a full disk"
    def __init__(self, resource):
        self.resource, self.before = resource, resource.getrlimit(resource.RLIMIT_FSIZE)
    def begin(self, size):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (size, self.before[1]))
    def end(self): self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def room():
    r = LittleRoom(pytest.importorskip('resource'))
    yield r
    r.end()


def test_a_full_disk_costs_checkpoints_but_not_the_run(room, whole, tmp_path, capsys):
    """No room for a checkpoint from step 6 to 9, none even for a line of metrics: the run goes on,
    and ends with nothing missing"""
    at = {4*6: lambda: room.begin(2000), 4*9: room.end}
    go(tmp_path/'run', at)
    said = capsys.readouterr()
    assert ('The checkpoint of step 8 could not be written (File too large); what was there before '
            'is whole, and the run goes on') in said.out + said.err
    assert 'The measures of step 7 could not be written' in said.out + said.err
    assert same(tmp_path/'run', whole)
    assert ([int(p.stem[5:]) for p in checkpoint_files(tmp_path/'run')] == [12, 4]
            and not list((tmp_path/'run').rglob('.*.part')))


def test_by_policy_a_full_disk_stops_the_run_and_the_old_checkpoint_is_whole(room, whole, tmp_path):
    with pytest.raises(TrainingError, match='could not be written .* Make room, and resume'):
        go(tmp_path/'run', {4*6: lambda: room.begin(2000)}, on_write_error='stop')
    room.end()
    assert [read_checkpoint(p).state['step'] for p in checkpoint_files(tmp_path/'run')] == [4]
    go(tmp_path/'run', resume=True)
    assert same(tmp_path/'run', whole)


def test_a_run_whose_last_checkpoint_did_not_fit_is_not_called_done(room, whole, tmp_path):
    with pytest.raises(TrainingError, match='the last checkpoint is that of step 8. Make room'):
        go(tmp_path/'run', {4*11: lambda: room.begin(20_000)})
    room.end()
    go(tmp_path/'run', resume=True)
    assert same(tmp_path/'run', whole)


def poisoned(*numbers):
    "Noise whose windows of these numbers hold a NaN"
    class Poisoned(Noise):
        def __getitem__(self, n):
            item = super().__getitem__(n)
            if n in numbers: item['x'][0, 0] = torch.nan
            return item
    return Poisoned()


@pytest.mark.parametrize('config', [CONTRASTIVE, RECONSTRUCTION], ids=lambda c: c.method)
def test_a_nan_never_reaches_the_weights(config, tmp_path):
    "The step is left out by policy, as if it had not been; the batch is written down"
    folder = go(tmp_path/'run', config=config, data=poisoned(4*4 + 1), skip_nonfinite=1)
    assert all(w.isfinite().all() for w in from_pretrained(folder).state_dict().values())
    assert [json.loads(line)
            for line in (folder/'nonfinite.jsonl').read_text(encoding='utf-8').splitlines()] == [
        {'step': 5, 'loss': 'nan', 'grad_norm': 'nan', 'windows': [16, 17, 18, 19],
         'sources': [0, 0, 0, 0]}]
    rows = read_metrics(folder)
    assert rows[4]['loss'] is None and rows[5]['loss'] is not None
    counts = {float(t) for n, t in read_checkpoint(checkpoint_files(folder)[0]).tensors.items()
              if n.endswith('.step')}
    assert counts == {STEPS - 1.}


def test_the_default_is_to_stop_and_too_many_in_a_row_stop_as_well(tmp_path):
    with pytest.raises(TrainingError, match='at step 5, with windows 16 to 19'):
        go(tmp_path/'a', data=poisoned(4*4 + 1))
    with pytest.raises(TrainingError, match='at step 6'):
        go(tmp_path/'b', data=poisoned(4*4 + 1, 4*5 + 1), skip_nonfinite=1, log_every=4)
    assert len((tmp_path/'b/nonfinite.jsonl').read_text(encoding='utf-8').splitlines()) == 2
    assert [read_checkpoint(p).state['step'] for p in checkpoint_files(tmp_path/'b')] == [4]


def test_a_run_resumed_between_withheld_updates_counts_on(tmp_path):
    data = poisoned(*range(4*3, 4*6))      # steps 4, 5 and 6; a checkpoint after 4
    with pytest.raises(TrainingError, match='at step 6'):
        go(tmp_path/'a', data=data, skip_nonfinite=2, log_every=12)
    with pytest.raises(TrainingError, match='at step 6'):
        go(tmp_path/'a', data=data, skip_nonfinite=2, log_every=12, resume=True)
    assert [json.loads(line)['step']
            for line in (tmp_path/'a/nonfinite.jsonl').read_text(
        encoding='utf-8').splitlines()] == [4, 5, 6]


def test_other_settings_are_named_one_by_one(whole, tmp_path):
    with pytest.raises(UserError,
                       match=r'train.lr was 0.003 and is 0.1; train.seed was 0 and is 7\.'):
        go(whole, resume=True, lr=.1, seed=7)
    with pytest.raises(UserError,
                       match='model.encoder.conv_features was 16 .* model.ff was 3.0 and is 2.0'):
        go(whole, resume=True, config=RECONSTRUCTION)
    go(whole, resume=True, keep=1, checkpoint_every=2)     # these are free


def test_without_a_checkpoint_the_run_starts_over_and_says_so(whole, tmp_path, capsys):
    with pytest.raises(ZeroDivisionError): go(tmp_path/'run', {4*2: crash})
    go(tmp_path/'run', resume=True)
    assert 'has no checkpoint yet: the run starts over' in capsys.readouterr().out
    assert same(tmp_path/'run', whole)


def test_a_damaged_checkpoint_costs_a_few_steps(whole, tmp_path, capsys):
    with pytest.raises(ZeroDivisionError): go(tmp_path/'run', {4*9: crash})
    newest = checkpoint_files(tmp_path/'run')[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    go(tmp_path/'run', resume=True)
    assert ("step-00000008.safetensors' cannot be used: its checksum does not match. "
            'It is set aside') in capsys.readouterr().out
    assert same(tmp_path/'run', whole)


def test_a_kill_between_the_last_checkpoint_and_the_weights_for_people(whole, tmp_path):
    go(tmp_path/'run')
    for name in ('model.safetensors', 'bad_traces.json'): (tmp_path/'run'/name).unlink()
    go(tmp_path/'run', resume=True)
    for name in ('model.safetensors', 'bad_traces.json'):
        assert (tmp_path/'run'/name).read_bytes() == (whole/name).read_bytes()


def test_nothing_to_resume_and_no_place_to_start(whole, tmp_path):
    with pytest.raises(UserError, match='holds no run to resume'):
        go(tmp_path/'nothing', resume=True)
    with pytest.raises(UserError, match='holds a run already'): go(whole)
    with pytest.raises(UserError, match='need 48 windows; there are 9'):
        go(tmp_path/'few', data=Noise(9))
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(tmp_path):
    "A second process that resumes the same run is turned away while the first is at work"
    said = []
    def second():
        code = ('import sys; from pathlib import Path; '
                'from seismodel.training.runlog import RunLog; RunLog(Path(sys.argv[1]), 99)')
        said.append(subprocess.run([sys.executable, '-c', code, tmp_path/'run'],
                                   capture_output=True, text=True).stderr)
    go(tmp_path/'run', {4*6: second})
    second()
    assert 'Another process is training in' in said[0].splitlines()[-1] and said[1] == ''


def test_a_worker_that_meets_bad_data_ends_the_run_with_its_sentence(tmp_path):
    with pytest.raises(UserError, match='no usable record in few') as e:
        go(tmp_path/'run', {9: nothing_usable}, workers=1)
    assert str(e.value) == 'no usable record in few'

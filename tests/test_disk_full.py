"""A full disk: every command that writes says which folder, what it needs and what is free, and
leaves nothing half-written"""
import errno
import json
import re
from pathlib import Path

import h5py
import numpy as np
import obspy
import pytest

import seismodel.data.store as store_module
import seismodel.files as files
from seismodel.cli import main
from seismodel.data.sources import write_synthetic
from seismodel.finetuning.heads import Picker
from seismodel.models.pretraining import build, preset
from seismodel.study.run import attempt
from seismodel.study.trial import Candidate, StudyConfig, Trial


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A data set, a waveform file, picks, and a picker that finds nothing"
    folder = tmp_path_factory.mktemp('home')
    write_synthetic(folder/'data', dict(train=3, dev=2), samples=3000)
    obspy.read().write(str(folder/'waves.mseed'), format='MSEED')
    rows = ['event,network,station,phase,time', 'e,BW,RJOB,P,2009-08-24T00:20:08',
            'e,BW,RJOB,S,2009-08-24T00:20:12', '']
    (folder/'picks.csv').write_text('\n'.join(rows), encoding='utf-8')
    build(preset('contrastive-tiny').model).save_pretrained(folder/'model')
    Picker(build(preset('contrastive-tiny').model)).save_pretrained(folder/'picker')
    return folder


def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')


def said(words, capsys):
    "The one sentence that a call ends in"
    assert main(list(map(str, words))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line.startswith('seismodel: ')]
    assert len(lines) == 1, lines
    return lines[0]


def written(folder):
    return (sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file())
            if folder.exists() else [])


@pytest.mark.parametrize('words, need, left', [
    ('embed model data --out OUT/x.npz', 'needs (more than )?[0-9.]+ (kB|MB)', []),
    ('pick waves.mseed --model picker --out OUT', 'needs more than [0-9]+ bytes',
     ['settings.json']),
    ('dataset picks.csv --waveforms waves.mseed --before 5 --after 16 --noise 0 --out OUT',
     'needs [0-9.]+ kB', []),
    ('pretrain --preset contrastive-tiny --steps 1 --device cpu --out OUT',
     'needs more than [0-9.]+ kB', ['.lock']),
    ('pack data --out OUT', 'needs up to [0-9.]+ kB', None)])
def test_which_folder_and_how_much(words, need, left, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(home)
    out = tmp_path/'out'
    monkeypatch.setattr(files, 'force_out', full)
    monkeypatch.setattr(store_module, 'to_disk', full)
    monkeypatch.setattr(h5py.File, 'flush', full)
    if words.startswith('dataset'): monkeypatch.setattr(h5py.Group, 'create_dataset', full)
    sentence = said([str(out) + w[3:] if w.startswith('OUT') else w for w in words.split()], capsys)
    assert 'no space left' in sentence and f"'{out}" in sentence and re.search(
        need, sentence) and ' free' in sentence, sentence
    assert 'make room' in sentence and 'give the same command again' in sentence
    # pack goes on with its own
    assert not [f for f in written(out) if f.endswith('.part')] or words.startswith('pack')
    if left is not None: assert written(out) == left


def test_no_half_of_a_model_is_left(home, tmp_path, capsys, monkeypatch):
    "The same command works when there is room again"
    words = ('pretrain --preset contrastive-tiny --steps 1 --batch-size 2 --validation-windows 2 '
             f'--window 512 --device cpu --out {tmp_path}/run')
    real = files.force_out
    monkeypatch.setattr('seismodel.training.trainer.draw_run', lambda *a: None)
    with monkeypatch.context() as m:
        m.setattr(files, 'force_out', lambda path: full()
                  if path.name == '.model.safetensors.part' else real(path))
        assert re.search(r"for model.safetensors: it needs (more than )?2\.\d MB",
                         said(words.split(), capsys))
    assert written(tmp_path/'run') == ['.lock']
    assert main(words.split()) == 0


def test_a_trial_says_why_even_where_its_log_takes_no_words(home, tmp_path, monkeypatch):
    trial, common = Trial(Candidate('a', 'random', str(home/'model')), 1.,
                          0), StudyConfig((str(home/'data'),), steps=1)
    monkeypatch.setattr(files, 'force_out', full)
    monkeypatch.setattr('seismodel.study.run.run_trial',
                        lambda *a: files.write_atomically(tmp_path/'x',
                                                          lambda p: p.write_bytes(b'12')))
    assert re.fullmatch(r"no space left in '.*' for x: it needs more than 2 bytes, and .* are free",
                        attempt(trial, common, tmp_path))
    monkeypatch.setattr('seismodel.study.run.run_trial', full)
    assert attempt(trial, common, tmp_path) == f"no space left in '{tmp_path/trial.name}.part'"


def test_an_index_is_not_written_through_a_map(home, tmp_path, capsys, monkeypatch):
    "A full disk would end the process there by SIGBUS, without a word"
    monkeypatch.setattr(np.lib.format, 'open_memmap', full)
    assert main(['pack', str(home/'data'), '--out', str(tmp_path/'store')]) == 0


def test_a_part_of_a_store_that_is_damaged_is_named(home, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(store_module, '_tables', full)
        said(['pack', home/'data', '--out', tmp_path/'store'], capsys)
    part = tmp_path/'store/parts/00000.jsonl'
    lines = part.read_text(encoding='utf-8').splitlines()
    part.write_text('\n'.join(['[1]', *lines[1:], '']), encoding='utf-8')
    assert 'line 1' in said(['pack', home/'data', '--out', tmp_path/'store'], capsys)
    part.write_text('\n'.join([lines[0][:-3], *lines[1:], '']), encoding='utf-8')
    assert 'Line 1 of' in said(['pack', home/'data', '--out', tmp_path/'store'], capsys)

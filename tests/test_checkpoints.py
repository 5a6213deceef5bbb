"""Damaged checkpoints: each is refused with one sentence, none runs code, the one before it still
resumes"""
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save

from seismodel.files import BLANK, verify_checksum, write_checksum
from seismodel.training.checkpoints import (FORMAT, checkpoint_files, differences,
                                            newest_checkpoint, read_checkpoint,
                                            restore, training_tensors, write_checkpoint)
from seismodel.core import DamagedCheckpoint, UserError
from seismodel.models.encoders import BidirAutoregConfig
from seismodel.models.pretraining import ReconstructionConfig, build

TENSORS = {'model.w': torch.randn(40, 5), 'optimizer.w.step': torch.tensor(3.),
           'model.k': torch.arange(4)}


class Bomb:
    "Unpickling it makes a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


@pytest.fixture
def run(tmp_path):
    "A run's folder with the checkpoints of steps 1 and 2"
    for step in (1, 2):
        write_checkpoint(tmp_path, {**TENSORS, 'model.w': TENSORS['model.w']*step}, {'step': step})
    return tmp_path


def damages(whole, before, rng, bomb):
    "(name, bytes) of one damage of each kind"
    a, b = sorted(rng.randrange(len(whole)) for _ in 'ab')
    b += 1
    yield 'cut short', whole[:a]
    yield 'one bit', whole[:a] + bytes([whole[a] ^ 1 << rng.randrange(8)]) + whole[a + 1:]
    yield 'zeros', whole[:a] + bytes(b - a) + whole[b:] if any(whole[a:b]) else whole[:-1]
    yield 'noise', whole[:a] + rng.randbytes(b - a) + whole[b:]
    yield 'a piece missing', whole[:a] + whole[b:]
    yield 'a piece twice', whole[:b] + whole[a:]
    yield 'longer', whole + rng.randbytes(rng.randrange(1, 9))
    yield 'bytes swapped', bytes(reversed(whole[:16])) + whole[16:]
    yield 'the one before', before
    yield 'header of the one before', before[:a % 400] + whole[a % 400:] if before[
        :a % 400] != whole[:a % 400] else whole[1:]
    yield 'huge header', rng.randbytes(8) + whole[8:]
    yield 'another file', save(TENSORS)
    yield 'a pickle', pickle.dumps(bomb)
    yield 'nothing', b''


def test_two_hundred_damages_are_refused_and_the_one_before_is_taken(run, tmp_path):
    rng, refused, exploded = random.Random(0), 0, tmp_path/'exploded'
    (newest, old), kept = checkpoint_files(run), tmp_path/'kept'
    whole, before = newest.read_bytes(), old.read_bytes()
    torch.save({'step': 2, 'bomb': Bomb(exploded)}, kept)
    for k in range(18):
        for name, damaged in [*damages(whole, before, rng, Bomb(exploded)),
                              ('a pickle by torch', kept.read_bytes())]:
            newest.write_bytes(damaged)
            said = []
            found = newest_checkpoint(run, said.append)
            assert found.path == old and found.state == {'step': 1} and torch.equal(
                found.tensors['model.w'], TENSORS['model.w']), name
            assert len(said) == 1 and said[0].startswith(
                f"The checkpoint '{newest}' cannot be used: ") and '\n' not in said[0], (name, said)
            set_aside = newest.with_suffix('.damaged')
            assert set_aside.read_bytes() == damaged        # nothing is lost
            set_aside.unlink()
            refused += 1
    assert refused == 270 and not exploded.exists()


def test_every_single_bit_of_the_header_counts(run):
    blob = checkpoint_files(run)[0].read_bytes()
    end = 8 + int.from_bytes(blob[:8], 'little')
    for place in range(0, end + 8):
        with pytest.raises(DamagedCheckpoint):
            verify_checksum(blob[:place] + bytes([blob[place] ^ 1 << place % 8]) + blob[place + 1:])


def test_a_newer_one_is_refused_and_stays_where_it_is(run):
    newest = checkpoint_files(run)[0]
    blob = save(TENSORS, {'format': str(FORMAT + 1), 'version': '9.9',
                          'state': json.dumps({'step': 2}), 'sha256': 64*'0'})
    newest.write_bytes(write_checksum(blob))
    with pytest.raises(UserError,
                       match='written by seismodel 9.9, which is newer.*update seismodel'):
        newest_checkpoint(run)
    assert newest.exists()


def test_one_that_cannot_be_opened_is_not_called_damaged(run):
    newest = checkpoint_files(run)[0]
    newest.unlink()
    newest.mkdir()
    with pytest.raises(UserError, match='cannot be opened'): newest_checkpoint(run)
    assert newest.exists()


def test_when_all_are_damaged_the_run_does_not_start_over(run):
    for path in checkpoint_files(run): path.write_bytes(b'')
    for _ in 'ab':
        with pytest.raises(UserError, match='No checkpoint in .* can be used'):
            newest_checkpoint(run, lambda sentence: None)


def test_no_checkpoint_was_ever_written(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_a_damaged_one_does_not_push_out_good_ones(run):
    "Set aside, it does not count among those to keep"
    checkpoint_files(run)[0].write_bytes(b'')
    newest_checkpoint(run, lambda sentence: None)
    write_checkpoint(run, TENSORS, {'step': 2}, keep=2)
    assert [read_checkpoint(p).state['step'] for p in checkpoint_files(run)] == [2, 1]


def test_a_failed_write_leaves_the_others(run, monkeypatch):
    before = {p.name: p.read_bytes() for p in checkpoint_files(run)}
    def full(self, data):
        with open(self, 'wb') as f: f.write(data[:100])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(type(run), 'write_bytes', full)
    with pytest.raises(OSError, match='no space left in .* it needs'):
        write_checkpoint(run, TENSORS, {'step': 3}, keep=1)
    assert {p.name: p.read_bytes() for p in (run/'checkpoints').iterdir()} == before


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text('abc.', min_size=1), st.sampled_from(
    [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]), max_size=4),
       st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False)
                    | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v),
                    max_leaves=6))
def test_whatever_goes_in_comes_out(tmp_path_factory, dtypes, value):
    "Tensors of any kind, states with any text: even one that looks like the seal"
    run = tmp_path_factory.mktemp('run')
    tensors = {name: (torch.randn(2, 3)*9).to(dtype) for name, dtype in dtypes.items()}
    state = {'step': 7, 'value': value, 'trap': BLANK.decode()}
    found = read_checkpoint(write_checkpoint(run, tensors, state))
    assert found.state == state and found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[n], t) and found.tensors[n].dtype == t.dtype for n,
               t in tensors.items())
    shutil.rmtree(run)


def test_moments_of_another_model_are_named():
    def fresh(d):
        model = build(ReconstructionConfig(BidirAutoregConfig(d_model=d), blocks=1, ff=1.))
        return model, torch.optim.AdamW(model.parameters(), fused=True)
    model, optimizer = fresh(8)
    tensors = training_tensors(model, optimizer)
    with pytest.raises(UserError, match="'f': weight .* has shape"):
        restore(tensors, *fresh(16), 'f')
    with pytest.raises(UserError, match="'f' has a moment of 'x'"):
        restore({**tensors, 'optimizer.x.step': torch.tensor(1.)}, model, optimizer, 'f')


def test_none_and_missing_are_different_settings():
    assert differences({'a': None}, {}) == ["a was None and is 'not there'"]
    assert differences({'a': {'b': [1, 2]}}, {'a': {'b': (1, 2)}}) == []

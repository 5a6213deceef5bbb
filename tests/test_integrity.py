"""Damage is seen: a bit that flipped in weights, a store or a table is refused in a sentence, and a
kill leaves what can be used"""
import json
import logging
import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.sources import SyntheticSource
from seismodel.data.store import StoreWriter, finish
from seismodel.data.store_reader import Store, StoreRecords, StoreSource
from seismodel.data.windows import WindowDataset
from seismodel.files import sealed_tensors
from seismodel.models.encoders import BidirAutoregConfig
from seismodel.models.pretraining import ReconstructionConfig, build, from_pretrained, read_model
from seismodel.picking.pick import check_settings
from seismodel.signals.records import STATUS, Record
from seismodel.training.checkpoints import newest_checkpoint
from seismodel.training.config import TrainConfig
from seismodel.training.pretrain import pretrain
from seismodel.training.runlog import lock_run, read_metrics
from seismodel.training.trainer import train

SMALL = ReconstructionConfig(BidirAutoregConfig(d_model=8), blocks=1, ff=1.)
OTHER = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1, ff=1.)


def flipped(blob, bit):
    "The same bytes, but for one bit"
    blob = bytearray(blob)
    blob[bit//8] ^= 1 << bit % 8
    return bytes(blob)


def test_exponent_bits_of_weights_are_refused(tmp_path):
    build(SMALL).save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    blob = file.read_bytes()
    numbers = sum(w.numel() for w in load(blob).values())
    for k in np.random.default_rng(0).integers(1, numbers, 20):
        # the highest bit of an exponent
        file.write_bytes(flipped(blob, 8*len(blob) - 32*int(k) + 30))
        with pytest.raises(UserError, match='checksum does not match'): from_pretrained(tmp_path)


def test_bits_of_the_header_of_weights_are_refused(tmp_path):
    build(SMALL).save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    blob = file.read_bytes()
    header = 8*(8 + int.from_bytes(blob[:8], 'little'))
    for bit in range(0, header, 7):
        file.write_bytes(flipped(blob, bit))
        with pytest.raises(UserError): from_pretrained(tmp_path)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    model = build(SMALL)
    for name in 'ab': model.save_pretrained(tmp_path/name)
    a, b = ((tmp_path/name/'model.safetensors').read_bytes() for name in 'ab')
    assert a == b
    tensors = {'w': torch.arange(3.), 'é': torch.zeros(2, 2, dtype=torch.bfloat16)}
    again = load(sealed_tensors(tensors, {'z': 'ä"\n', 'a': '1'}))
    assert all(torch.equal(again[name], t) for name, t in tensors.items())


def test_a_kill_between_the_two_files_leaves_a_model(tmp_path, caplog):
    "The new config.json lies beside the old weights, which say themselves what they are"
    old = build(SMALL).eval()
    old.save_pretrained(tmp_path, {'picker': {'width': 0}})
    class Killed(BaseException): pass
    def replace(part, path, real=Path.replace):
        if path.name == 'model.safetensors': raise Killed
        return real(part, path)
    with patch('seismodel.files.replace_durably', replace), pytest.raises(Killed):
        build(OTHER).save_pretrained(tmp_path, {'picker': {'width': 8}})
    with caplog.at_level(logging.WARNING, 'seismodel'): config, weights = read_model(tmp_path)
    assert config['model']['encoder']['d_model'] == 8 and config['picker'] == {'width': 0}
    assert all(torch.equal(weights[name], w) for name, w in old.state_dict().items())
    assert "field 'model' is not that of the weights" in caplog.text


def test_a_kill_before_the_first_weights_leaves_a_sentence(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps({'model': {}}), encoding='utf-8')
    with pytest.raises(UserError, match='model.safetensors is missing'): from_pretrained(tmp_path)


def test_weights_of_0_1_still_load(tmp_path):
    model = build(SMALL)
    model.save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    # no checksum, no configuration
    file.write_bytes(save(load(file.read_bytes())))
    assert all(torch.equal(w, model.state_dict()[n]) for n,
               w in from_pretrained(tmp_path).state_dict().items())


# stores

def trace(k):
    "Noise, with an onset"
    x = np.random.default_rng(k).standard_normal((700 + 100*k, 3)).astype(np.float32)
    return Record(x, 300. + k, np.nan, f'trace{k}', STATUS.index('manual'),
                  STATUS.index('unlabelled'))


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "A store of six traces in three files"
    folder = tmp_path_factory.mktemp('packed')/'store'
    plan = dict(dtype='int16', window=512, shard_samples=2400,
                sources=[dict(name='quakes', where='', weight=None, files=[])])
    with StoreWriter(folder, plan) as writer:
        for k in range(6):
            writer.add(0, trace(k), ('train', 'dev')[k == 5], {'station_code': 'KIEV'}, k + 1)
        finish(writer)
    return folder


def everything(folder):
    "All that a run may read of a store"
    store = Store(folder)
    source = StoreSource(store, 'train', 512)
    u = np.random.default_rng(0).random((100, 2))
    windows = source.windows(source.choose(u[:, 0]), u[:, 1], 512)
    whole = [store.record(k) for k in range(len(store))]
    table = StoreRecords(store, 'train').metadata
    return windows, whole, table


def test_bits_of_a_store_are_never_used_silently(packed, tmp_path):
    """132 flips in all of its files: each ends in a sentence, at opening or at the first reading,
    and none in a traceback"""
    rng, seen = np.random.default_rng(1), 0
    files = sorted(f.name for f in packed.iterdir() if f.name != '.lock')
    assert len(files) == 7
    shutil.copytree(packed, tmp_path/'store')
    for k in range(132):
        file = tmp_path/'store'/files[k % len(files)]
        whole = file.read_bytes()
        # headers are small and would be missed
        low, high = (0, 128) if k % 3 == 0 else (0, len(whole))
        file.write_bytes(flipped(whole, int(rng.integers(8*low, 8*min(high, len(whole))))))
        with pytest.raises(UserError) as e: everything(tmp_path/'store')
        assert '\n' not in str(e.value) and 'store' in str(e.value)
        seen += 1
        file.write_bytes(whole)
    assert seen == 132
    everything(tmp_path/'store')


def test_a_good_trace_of_a_damaged_file_is_read(packed, tmp_path):
    "Samples are checked trace by trace; verify checks the whole"
    shutil.copytree(packed, tmp_path/'store')
    file = tmp_path/'store/samples-00000.npy'
    file.write_bytes(flipped(file.read_bytes(), 8*(128 + 6*800)))           # in the second trace
    store = Store(tmp_path/'store')
    assert store.record(0).waveform.shape == (700, 3)
    with pytest.raises(UserError, match='trace trace1 is damaged'): store.record(1)
    with pytest.raises(UserError, match='trace trace1 is damaged'):
        pickle.loads(pickle.dumps(store)).record(1)


def test_verify(packed, tmp_path, capsys):
    shutil.copytree(packed, tmp_path/'store')
    build(SMALL).save_pretrained(tmp_path/'model')
    paths = [str(tmp_path/'store'), str(tmp_path/'model'), str(tmp_path/'model/model.safetensors')]
    assert main(['verify', *paths]) == 0
    assert capsys.readouterr().out.count('good') == 3
    for file in (tmp_path/'store/samples-00002.npy', tmp_path/'model/model.safetensors'):
        file.write_bytes(flipped(file.read_bytes(), 8*file.stat().st_size - 9))
    assert main(['verify', *paths]) == 2
    out = capsys.readouterr()
    assert (out.out.count('DAMAGED') == 3 and 'samples-00002.npy' in out.out
            and '3 of the parts' in out.err)
    assert main(['verify', 'tiny', 'tiny-picker']) == 0
    assert capsys.readouterr().out.count('good') == 2
    (tmp_path/'empty').mkdir()
    assert main(['verify', str(tmp_path/'empty')]) == 2
    assert 'nothing to verify' in capsys.readouterr().err


# what is read from JSON, and who may write

def resumed(run, change):
    "The sentence that a changed config.json of a run ends in"
    file = run/'config.json'
    before = file.read_text(encoding='utf-8')
    config = json.loads(before)
    change(config)
    file.write_text(json.dumps(config), encoding='utf-8')
    try:
        with pytest.raises(UserError) as e: pretrain(resume=run)
    finally: file.write_text(before, encoding='utf-8')
    return str(e.value)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')/'run'
    with patch('seismodel.training.trainer.draw_run'):
        pretrain('contrastive-tiny', window=512, steps=1, batch_size=2, validation_windows=2,
                 device='cpu', out=folder)
    return folder


@pytest.mark.parametrize('path, value, says', [
    ('window', 0, 'window'), ('model.pooling', [0, 4], 'pooling'), ('train.betas', [.9], 'betas'),
    ('train.betas', [.9, 1.], 'betas'), ('data', 3, 'data'),
    ('model.blocks', 0, 'blocks'), ('train.steps', 'x', 'steps')])
def test_a_field_that_cannot_be(path, value, says, run):
    def change(config):
        *parts, last = path.split('.')
        for part in parts: config = config[part]
        config[last] = value
    assert says in resumed(run, change)


@pytest.mark.parametrize('content', [b'[1, 2]', b'\xff\xfe', b'{', b'['*20_000])
def test_files_that_hold_something_else(content, run, tmp_path):
    for name, read in (('config.json', read_model), ('config.json', lambda f: pretrain(resume=f)),
                       ('metrics.jsonl', read_metrics)):
        shutil.copytree(run, tmp_path/'run', dirs_exist_ok=True)
        (tmp_path/'run'/name).write_bytes(content + b'\n')
        with pytest.raises(UserError, match=name): read(tmp_path/'run')


def test_damaged_settings_of_picks(tmp_path):
    (tmp_path/'settings.json').write_bytes(b'\xff')
    with pytest.raises(UserError, match='settings.json.*is not valid JSON'):
        check_settings({'model': 'a'}, tmp_path)


def test_who_is_refused_a_folder_has_written_nothing(run):
    before = {f: f.read_bytes() for f in run.rglob('*') if f.is_file() and f.name != '.lock'}
    lock = lock_run(run)
    try:
        with pytest.raises(UserError, match='Another process is training'): pretrain(resume=run)
        # a new run into the same folder, before the other has written its config.json
        (run/'config.json').rename(run/'aside')
        with pytest.raises(UserError, match='Another process is training'):
            train(build(SMALL), WindowDataset([SyntheticSource(0)], 99, window=512),
                  WindowDataset([SyntheticSource(1)], 2, window=512),
                  TrainConfig(steps=1, batch_size=2, device='cpu'), run)
        assert not (run/'config.json').exists()
    finally:
        lock.release()
        if (run/'aside').exists(): (run/'aside').rename(run/'config.json')
    assert (before
            == {f: f.read_bytes() for f in run.rglob('*') if f.is_file() and f.name != '.lock'})


def test_another_machine_is_named(run, capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        newest_checkpoint(run)
    finally: torch.set_num_threads(threads)
    assert f'CPU threads {threads} then, {threads + 1} now' in capsys.readouterr().out
    newest_checkpoint(run)
    assert capsys.readouterr().out == ''

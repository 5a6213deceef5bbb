"What version 0.1 wrote (tests/fixtures/0.1, by the script beside it) loads, goes on and is plotted"
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from seismodel import __version__
from seismodel.cli import main
from seismodel.data.store_reader import Store
from seismodel.finetuning.heads import load_picker
from seismodel.models.pretraining import from_pretrained
from seismodel.training.config import TrainConfig
from seismodel.training.runlog import read_metrics

OLD = Path(__file__).parent/'fixtures/0.1'


@pytest.fixture
def old(tmp_path, monkeypatch):
    "A copy to work on, and the working folder: the picker names its start by a relative path"
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('seismodel.training.trainer.draw_run', lambda *a: None)
    return tmp_path


def test_the_fixture_is_small():
    assert sum(f.stat().st_size for f in OLD.rglob('*') if f.is_file()) < 300_000


def test_models_load():
    "A model that masks in the mode that was called seed, with the weights that the file holds"
    model = from_pretrained(OLD/'pretrained')
    assert model.config.encoder.mask_mode == 'seed'
    x = torch.randn(2, 512, 3, generator=torch.Generator().manual_seed(0))
    assert model.features(x).shape == (2, 128, 8)
    assert model(x, torch.Generator().manual_seed(0)).loss.isfinite()
    picker = load_picker(OLD/'picker')
    assert picker.logits(x).shape == (2, 512, 3)


@pytest.mark.parametrize('name, command, steps',
                         [('pretrained', 'pretrain', 4), ('picker', 'finetune', 2)])
def test_a_run_goes_on(old, name, command, steps):
    "From its checkpoint to its end, to the losses that 0.1 had on the same way"
    before = read_metrics(old/name)
    first = json.loads((old/name/'config.json').read_text(encoding='utf-8'))
    assert main([command, '--resume', name]) == 0
    after = read_metrics(old/name)
    assert [r['step'] for r in after] == [r['step'] for r in before] == [*range(1, steps + 1)]
    np.testing.assert_allclose([r['loss'] for r in after], [r['loss'] for r in before], rtol=1e-3)
    saved = json.loads((old/name/'config.json').read_text(encoding='utf-8'))
    # fields of later versions have their defaults
    later = json.loads(json.dumps(asdict(TrainConfig())))
    # the only one that 0.1 had
    head = {'picker': {**first['picker'], 'at': 'samples'}} if 'picker' in first else {}
    # written since
    new = {'fingerprints', *(('calibration', 'default_args') if 'picker' in first else ())}
    assert new <= saved.keys()
    assert ({k: v for k, v in saved.items() if k not in new}
            == {**first, **head, 'seismodel': __version__, 'train': {**later, **first['train']}})
    assert set(before[-1]) <= set(after[-1])


@pytest.mark.parametrize('name', ['pretrained', 'picker'])
def test_a_run_is_described_and_plotted(old, name, capsys):
    assert main(['info', name]) == 0
    assert 'parameters' in capsys.readouterr().out
    assert main(['plot', name]) == 0
    assert list((old/name/'figures').glob('*.png'))


def test_a_store_is_read(old):
    store = Store(old/'store')
    assert store.verify() == [] and len(store.index) == 4
    assert main(['inspect', 'store']) == 0

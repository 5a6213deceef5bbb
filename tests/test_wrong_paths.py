"Wrong paths are answered before slow work begins and before anything is written"
from pathlib import Path

import obspy
import pytest

from seismodel.cli import main


def never(*args, **kwargs): raise AssertionError('slow work had begun')


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a waveform file, picks, a full folder, and nothing else"
    monkeypatch.chdir(tmp_path)
    for name in ('good', 'full'): Path(name).mkdir()
    obspy.read().write('good/a.mseed', format='MSEED')
    Path('full/notes.txt').write_text('mine', encoding='utf-8')
    Path('picks.csv').write_text('network,station,phase,time\nBW,RJOB,P,2009-08-24T00:20:10\n',
                                 encoding='utf-8')
    return tmp_path


@pytest.mark.parametrize('words, says, slow', [
    ('evaluate no/such/run --data synthetic', 'no/such/run', 'picking.evaluation.open_dataset'),
    ('evaluate no/such/run --data no/such/data', 'no/such/run', 'picking.evaluation.open_dataset'),
    ('pick no/such/file', 'no/such/file', 'picking.pick._open'),
    ('pick good no/such/file', 'no/such/file', 'picking.pick._open'),
    ('pick good --out full', "'full' is not empty", 'picking.pick._open'),
    ('pick good --out good/picks', 'lies inside', 'picking.pick._open'),
    ('embed no/such/run good', 'no/such/run', 'models.embedding.open_archive'),
    ('embed tiny no/such/data', 'no/such/data', 'models.embedding.record_features'),
    ('embed tiny synthetic no/such/data', 'no/such/data', 'models.embedding.record_features'),
    ('pack good no/such --out new', 'no/such', 'data.pack._write'),
    ('pack good --out full', 'full is there already', 'data.pack.open_items'),
    ('inspect no/such', 'no/such', 'data.inspection.describe'),
    ('dataset picks.csv --waveforms no/such --out new', 'no/such',
     'picking.dataset.read_catalogue'),
    ('dataset no/such --waveforms good --out new', 'no/such', 'picking.dataset.read_catalogue'),
    ('dataset picks.csv --waveforms good --out full', "'full' is not empty",
     'picking.dataset.read_catalogue'),
    ('finetune --from no/such/run --data no/such/data --out new', 'no/such/run',
     'finetuning.finetune.fine_run'),
    ('finetune --from tiny --data no/such/data --out new', 'no/such/data',
     'training.trainer.run_steps'),
    ('study --from a=no/such/run --data no/such/data --out new', 'no/such/run',
     'study.run.run_trials'),
    ('study --from a=tiny --data no/such/data --out new', 'no/such/data', 'study.run.run_trials'),
], ids=lambda v: v if ' ' in v else '')
def test_a_wrong_path_is_the_first_and_only_thing_said(words, says, slow, here, monkeypatch,
                                                       capsys):
    before = {p: p.stat().st_mtime_ns for p in here.rglob('*')}
    module, _, name = slow.rpartition('.')
    from importlib import import_module
    monkeypatch.setattr(import_module(f'seismodel.{module}'), name, never)
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == '' and says in err and len(err.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in here.rglob('*')} == before

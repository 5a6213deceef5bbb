"""seismodel finetune and evaluate: shares of events, starts, the control, resuming, and the picker
that comes out"""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from seismodel.cli import main
from seismodel.finetuning.events import event_rows, subset_events
from seismodel.picking.evaluation import evaluate
from seismodel.finetuning.finetune import (fine_plan, fine_recipe, fine_run, finetune,
                                           label_windows, start_picker, with_real_noise)
from seismodel.finetuning.heads import load_picker
from seismodel.signals.noise import EventsInNoise
from seismodel.signals.source import Source
from seismodel.models.pretraining import build, preset
from seismodel.training.runlog import read_metrics
from seismodel.data.sources import open_source
from seismodel.core import UserError

SMALL = dict(steps=3, batch_size=4, validation_windows=4, device='cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_dataset, quake_records):
    return write_dataset(tmp_path_factory.mktemp('quakes'), quake_records(48))


def test_events_of_a_data_set(folder):
    source = open_source(str(folder), 'train')
    events = source.events()
    assert (len(events) == len(source) == 24 and len(set(events)) == 12
            and all(e.startswith('event') for e in events))
    share = subset_events(source, .25)
    assert len(share) == 6 and len(set(share.events())) == 3
    for i in range(6):
        assert np.array_equal(share.record(i).waveform, source.record(share.rows[i]).waveform)
    assert open_source('synthetic', 'dev').events()[:2] == ['1', '4']


def test_a_store_and_its_data_set_share_alike(folder, tmp_path):
    """The same events, the same share, the same waveforms' onsets, packed or not; and a machine
    without SeisBench can fine-tune from it"""
    assert main(['pack', str(folder), '--out', str(tmp_path/'store')]) == 0
    plain, packed = open_source(str(folder), 'train'), open_source(str(tmp_path/'store'), 'train')
    a, b = subset_events(plain, .3), subset_events(packed, .3)
    named = lambda share: sorted((e, round(float(share.record(i).p_onset), 2)) for i,
                                 e in enumerate(share.events())
                                 if np.isfinite(share.record(i).p_onset))
    assert len(a) == len(b) and named(a) == named(b) and len(set(a.events())) < len(a)
    code = ('import sys; sys.modules["seisbench"] = sys.modules["obspy"] = None; from '
            'seismodel.finetuning.finetune import finetune; '
            'finetune("random", "contrastive-tiny", [sys.argv[1]], fraction=.5, steps=2, '
            'batch_size=4, validation_windows=4, device="cpu", out=sys.argv[2])')
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'store', tmp_path/'run'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_picker(tmp_path/'run')


def test_an_unlabelled_phase_is_masked_on_the_way(tmp_path, write_dataset, quake_records):
    """From the table to the loss: a missing S on an earthquake's record changes nothing, on a noise
    record it is noise"""
    def records():
        for m, x in quake_records(12):
            m['trace_s_arrival_sample'] = np.nan
            yield m, x
    windows, _, _ = label_windows([str(write_dataset(tmp_path/'d', records()))], 1., None,
                                  fine_recipe('contrastive', steps=4, batch_size=4,
                                              validation_windows=2))
    batch = next(iter(torch.utils.data.DataLoader(windows, 16)))
    picker = start_picker('random', 'contrastive-tiny').eval()
    unlabelled = batch['s_status'] == 0
    assert unlabelled.any() and not unlabelled.all()
    moved = {**batch, 's_onset': torch.where(unlabelled, 1000., batch['s_onset'])}
    assert (picker(moved).loss == picker(batch).loss
            != picker({**batch, 's_status': torch.ones(16)}).loss)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(.01, 1), st.floats(.01, 1),
       st.integers(0, 5))
def test_shares_are_nested_whole_and_never_empty(events, a, b, seed):
    class Toy(Source):
        def __len__(self): return len(events)
        def metadata(self, column, default=None): return [str(e) for e in events]
    source = Toy()
    small, large = (subset_events(source, f, seed) for f in (min(a, b), max(a, b)))
    assert small.rows and set(small.rows) <= set(large.rows)
    # whole events
    assert sorted(small.rows) == [i for i, e in enumerate(events) if str(e) in small.events()]
    assert len(set(small.events())) == int(np.ceil(min(a, b)*len(set(events))))
    assert event_rows(source, 1., seed) == list(range(len(events)))


@pytest.mark.parametrize('name', ['contrastive-tiny', 'reconstruction-tiny'])
def test_a_run_from_a_pretrained_model(name, folder, tmp_path):
    "Weights come from there, the head is fresh, everything is written down, and the picker opens"
    torch.manual_seed(5)
    model = build(preset(name).model)
    model.save_pretrained(tmp_path/'pre')
    run = finetune(str(tmp_path/'pre'), None, [str(folder)], fraction=.5, freeze='all',
                   out=tmp_path/'run', **SMALL)
    picker, config = load_picker(run), json.loads((run/'config.json').read_text(encoding='utf-8'))
    for part in ('encoder', 'backbone'):
        for key, w in getattr(picker, part).state_dict().items():
            assert torch.equal(w, getattr(model, part).state_dict()[key]), key
    assert (config['finetune']['fraction'] == .5
            and config['finetune']['from'] == str(tmp_path/'pre') and config['records'] == [12])
    assert config['train']['lr'] == fine_recipe(model.config.method).lr
    rows = read_metrics(run)
    assert (rows[-1]['step'] == 3
            and {'p_found', 'dev_loss', 'dev_s_found', 'grad_norm'} <= set(rows[-1]))
    if name == 'contrastive-tiny':
        from seismodel.picking.seisbench_model import SeisModelPicker
        import obspy
        assert len(SeisModelPicker.from_pretrained(run).annotate(obspy.read())) == 3


@pytest.mark.parametrize('name, told, decay', [('contrastive-tiny', None, .65),
                                               ('spectrum-tiny', None, .65),
                                               ('spectrum-tiny', 1., 1.),
                                               ('spectrum-tiny', .8, .8),
                                               ('reconstruction-tiny', None, 1.)])
def test_first_stages_of_a_pretrained_start_learn_more_slowly(name, told, decay, folder, tmp_path,
                                                              capsys):
    "Unless it is told otherwise or has a low rate already; the run says it in one line"
    build(preset(name).model).save_pretrained(tmp_path/'pre')
    run = finetune(str(tmp_path/'pre'), None, [str(folder)], layer_decay=told, out=tmp_path/'run',
                   **SMALL)
    said = [line for line in capsys.readouterr().out.splitlines() if '--layer-decay' in line]
    assert (json.loads((run/'config.json').read_text(encoding='utf-8'))['train']['layer_decay']
            == decay)
    assert len(said) == (decay < 1) and all(f'{decay} times' in line for line in said)


def test_random_starts_learn_alike(folder, tmp_path, capsys):
    "No stage is slower than another where there is nothing to keep"
    run = finetune('random', 'spectrum-tiny', [str(folder)], out=tmp_path/'run', **SMALL)
    assert json.loads((run/'config.json').read_text(encoding='utf-8'))['train']['layer_decay'] == 1.
    assert '--layer-decay' not in capsys.readouterr().out


def test_a_run_is_a_new_one_unless_it_is_said_to_go_on(folder, tmp_path):
    plan, c = fine_plan(from_run='random', preset='contrastive-tiny', data=[str(folder)],
                        augment='none'), fine_recipe('contrastive', **SMALL)
    fine_run(plan, start_picker('random', 'contrastive-tiny'), c, tmp_path/'run')
    assert ([row['step'] for row in read_metrics(tmp_path/'run')] == [1, 3]
            and load_picker(tmp_path/'run'))
    with pytest.raises(UserError, match='holds a run already'):
        fine_run(plan, start_picker('random', 'contrastive-tiny'), c, tmp_path/'run')


def test_the_control_differs_in_the_start_alone(folder, tmp_path):
    "Same head, same windows: only encoder and backbone begin elsewhere"
    torch.manual_seed(7)
    build(preset('contrastive-tiny').model).save_pretrained(tmp_path/'pre')
    torch.manual_seed(0)
    control = start_picker('random', 'contrastive-tiny')
    torch.manual_seed(0)
    pretrained = start_picker(str(tmp_path/'pre'))
    assert ([(n, p.shape) for n, p in control.named_parameters()]
            == [(n, p.shape) for n, p in pretrained.named_parameters()])
    c = fine_recipe('contrastive', **{k: v for k, v in SMALL.items() if k != 'device'})
    a, b = label_windows([str(folder)], .5, None,
                         c)[0], label_windows([str(folder)], .5, None, c)[0]
    for n in (0, 5, 11): assert torch.equal(a[n]['x'], b[n]['x'])


def test_resumed_run_is_the_undisturbed_one(folder, tmp_path, monkeypatch):
    "Stopped after two of four steps, gone on: the same weights to the last bit"
    import shutil
    import seismodel.training.trainer as trainer
    args = dict(from_run='random', preset='contrastive-tiny', data=[str(folder)], steps=4,
                batch_size=4, validation_windows=4, checkpoint_every=2, device='cpu')
    whole = finetune(**args, out=tmp_path/'whole')
    real, calls = trainer.train_step, []
    def cut_off(*a, **k):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(1)
        return real(*a, **k)
    monkeypatch.setattr(trainer, 'train_step', cut_off)
    with pytest.raises(KeyboardInterrupt): finetune(**args, out=tmp_path/'cut')
    monkeypatch.setattr(trainer, 'train_step', real)
    finetune(resume=tmp_path/'cut')
    a, b = load_picker(whole).state_dict(), load_picker(tmp_path/'cut').state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_noise_comes_from_the_share_alone(folder):
    """And synthetic events among real records are set into it; without real records everything
    stays as it is"""
    c = fine_recipe('contrastive', steps=2, batch_size=4, validation_windows=2)
    plain, _, records = label_windows([str(folder), 'synthetic'], .5, [1., 1.], c)
    windows, augment = with_real_noise(plain, 'cpu', events=32)
    met, record = [], plain.sources[0].source.record
    plain.sources[0].source.record = lambda i: met.append(i) or record(i)
    again, _ = with_real_noise(plain, 'cpu', events=32)
    assert met and set(met) <= set(plain.sources[0].rows) and records[0] == 12
    assert (isinstance(windows.sources[1], EventsInNoise)
            and torch.equal(torch.from_numpy(windows.sources[1].noise),
                            torch.from_numpy(again.sources[1].noise)))
    assert windows.share.tolist() == [.5, .5] and len(windows) == len(plain)
    only = label_windows(['synthetic'], 1., None, c)[0]
    assert with_real_noise(only, 'cpu')[0].sources == only.sources


def test_where_nothing_is_known_to_be_noise_it_is_said(tmp_path, write_dataset, quake_records,
                                                       caplog):
    def records():
        for m, x in quake_records(12):
            m['trace_p_arrival_sample'], m['trace_category'] = np.nan, 'earthquake'
            yield m, x
    data = [str(write_dataset(tmp_path/'d', records())), 'synthetic']
    plain = label_windows(data, 1., None, fine_recipe('contrastive', steps=1, batch_size=4))[0]
    windows, _ = with_real_noise(plain, 'cpu')
    assert (windows.sources == plain.sources
            and 'No training record has ten seconds that are known to be noise' in caplog.text)


def test_without_augmentation_windows_are_as_before(folder, tmp_path, monkeypatch):
    "The flag is kept in the run's settings, and a run from before there was one goes on without"
    import seismodel.finetuning.finetune as finetuning
    monkeypatch.setattr('seismodel.training.trainer.draw_run', lambda *a: None)
    args = dict(from_run='random', preset='contrastive-tiny', data=[str(folder)], **SMALL)
    full, none = finetune(**args,
                          out=tmp_path/'full'), finetune(**args, augment='none',
                                                         out=tmp_path/'none')
    plan = lambda run: json.loads((run/'config.json').read_text(encoding='utf-8'))['finetune']
    assert plan(full)['augment']['noise'] == .5 and plan(none)['augment'] is None
    assert read_metrics(full)[0]['loss'] != read_metrics(none)[0]['loss']
    monkeypatch.setattr(finetuning, 'with_real_noise', None)                    # must not be called
    finetune(resume=none)
    with pytest.raises(TypeError): finetune(resume=full)


@pytest.mark.parametrize('args, words', [
    (['--data', 'FOLDER'], 'where to start'),
    (['--from', 'random', '--data', 'FOLDER'], 'needs --preset'),
    (['--from', 'random', '--preset', 'contrastive-huge', '--data', 'FOLDER'], 'contrastive-huge'),
    (['--from', 'no/such/run', '--data', 'FOLDER'], 'config.json is missing'),
    (['--from', 'random', '--preset', 'contrastive-tiny'], '--data'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'no/such/data'],
     'no/such/data'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'FOLDER', '--fraction', '0'],
     '--fraction is 0'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'FOLDER', '--freeze',
      'decoder'], 'choose one of'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'FOLDER', '--steps', '0'],
     'steps'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'FOLDER', '--data-weights',
      'a,b'], 'one positive number for each dataset (1)'),
    (['--from', 'random', '--preset', 'contrastive-tiny', '--data', 'FOLDER', '--augment', 'some'],
     "--augment is 'some'; choose full or none"),
])
def test_mistakes(args, words, folder, tmp_path, capsys):
    assert main(['finetune', *[str(folder) if a == 'FOLDER' else a for a in args], '--out',
                 str(tmp_path/'run')]) == 2
    assert words in capsys.readouterr().err and not (tmp_path/'run').exists()


def test_resume_refuses_what_is_no_fine_tuning_run(tmp_path, capsys):
    assert main(['finetune', '--resume', str(tmp_path)]) == 2
    (tmp_path/'config.json').write_text('{"model": {}, "train": {}}', encoding='utf-8')
    assert main(['finetune', '--resume', str(tmp_path)]) == 2
    assert 'seismodel pretrain --resume' in capsys.readouterr().err


def test_evaluate_writes_tables(folder, tmp_path, capsys):
    run = finetune('random', 'contrastive-tiny', [str(folder)], out=tmp_path/'run', **SMALL)
    assert main(['evaluate', str(run), '--data', str(folder), '--out', str(tmp_path/'e'),
                 '--device', 'cpu']) == 0
    assert (sorted(f.name for f in (tmp_path/'e').iterdir())
            == ['matches.csv', 'records.csv', 'summary.csv', 'targets', 'tasks.csv'])
    tasks, summary = pd.read_csv(tmp_path/'e/tasks.csv'), pd.read_csv(tmp_path/'e/summary.csv')
    assert len(tasks) == 13 and {'found within 0.1 s', 'disturbed'} <= set(summary.metric)
    assert '1 detection' in capsys.readouterr().out
    for name, words in (('no-such-data', 'neither a folder'), ('ETZH', 'did you mean ETHZ'),
                        ('synthetic', 'no whole records')):
        with pytest.raises(UserError, match=words): evaluate(str(run), name, out=tmp_path/'f')
    with pytest.raises(UserError, match="split 'holdout'"):
        evaluate(str(run), str(folder), 'holdout', out=tmp_path/'f')

"""seismodel finetune --column and evaluate: which rows have a label, which piece of a record,
resuming, stores, mistakes"""
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import f1_score

from seismodel.cli import main
from seismodel.signals.source import cut_window
from seismodel.models.pretraining import build, preset
from seismodel.training.runlog import read_metrics
from seismodel.data.sources import open_source
from seismodel.signals.records import Record
from seismodel.core import UserError
from seismodel.finetuning.window_labels import (LabelledWindows, LabelSpec, around_onset,
                                                label_sources)
from seismodel.finetuning.classification import WindowModel, answers, load_window_model, score
from seismodel.finetuning.finetune import finetune
from seismodel.finetuning.load import load
from seismodel.picking.evaluation import evaluate

SMALL = dict(steps=2, batch_size=2, validation_windows=2, device='cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_dataset, quake_records):
    """48 records; a magnitude for two of three, a polarity for one of two, one of them a word that
    is no class"""
    def records():
        for k, (m, x) in enumerate(quake_records(48)):
            yield {**m, 'source_magnitude': np.nan if k % 3 == 2 else k/10,
                   'trace_p_polarity': ('up', 'down', '', 'undecidable')[k % 4], 'code': k % 2}, x
    return write_dataset(tmp_path_factory.mktemp('windows'), records())


@pytest.fixture(scope='module')
def store(folder, tmp_path_factory):
    where = tmp_path_factory.mktemp('packed')/'store'
    assert main(['pack', str(folder), '--out', str(where)]) == 0
    return where


def test_a_store_says_what_its_data_set_says(folder, store):
    """Every column, empty cells included, for each record by name; and the same share of the same
    events"""
    for column in ('source_magnitude', 'trace_p_polarity', 'trace_category', 'code'):
        said = []
        for where in (folder, store):
            source = open_source(str(where), 'train')
            names = [source.record(i).name for i in range(len(source))]
            said.append(dict(zip(names, source.metadata(column))))
        assert said[0] == said[1] and len(said[0]) == 24, column
    a, b = (label_sources([str(where)], 'source_magnitude', None, .4, 0)[1][0]
            for where in (folder, store))
    assert sorted(zip(a.events(), a.y)) == sorted(zip(b.events(), b.y)) and 0 < len(a) < 16


def test_rows_without_a_label_are_never_drawn(folder):
    question, training, dev = label_sources([str(folder)], 'trace_p_polarity',
                                            ['up', 'down'], 1., 0)
    cells = open_source(str(folder), 'train').metadata('trace_p_polarity')
    assert [cells[i] for i in training[0].rows] == [question.classes[int(k)] for k in training[0].y]
    assert (len(training[0]) == sum(c in ('up', 'down') for c in cells) == 12
            and question.shares == [.5, .5])
    windows = LabelledWindows(training, 64, seed=3)
    assert {windows[n]['y'].item() for n in range(64)} == {0., 1.}


def test_numbers_can_be_names_of_classes(folder):
    assert label_sources([str(folder)], 'code', None, 1., 0)[0].classes is None
    assert label_sources([str(folder)], 'code', ['1', '0'], 1., 0)[0].classes == ['1', '0']


def test_what_is_noted_of_the_training_labels():
    """How frequent a class is, or mean and spread of the numbers; before that nothing is, and
    numbers are what they are"""
    classes, numbers = LabelSpec('c', ['a', 'b']), LabelSpec('m', None)
    assert (classes.shares, numbers.mean, numbers.std) == (None, 0., 1.)
    assert classes.usual(np.array([0., 1., 1., 1.])).shares == [.25, .75] and classes.guess() == 'b'
    assert (numbers.usual(np.array([1., 5.])).mean, numbers.std, numbers.guess()) == (3., 2., 3.)


@settings(max_examples=60, deadline=None)
@given(st.integers(600, 9000), st.floats(0, 1), st.floats(0, .999), st.booleans())
def test_the_onset_is_in_the_window(samples, at, u, s_only):
    """Wherever the record has it, and between an eighth and a half of the window where the record
    is long enough"""
    window, onset = 1024, at*(samples - 1)
    x = np.random.default_rng(0).standard_normal((samples, 3)).astype(np.float32)
    record = Record(x, math.nan if s_only else onset, onset if s_only else math.nan, 'a')
    w = cut_window(around_onset(record, window), window, u)
    place = w.onset[0, 1 if s_only else 0]
    assert 0 <= place < window
    if window/2 <= onset <= samples - window: assert window/8 - 1 <= place <= window/2 + 1
    assert (w.x[0, int(place)] == x[int(onset)]).all() or abs(onset - round(onset)) < 1e-3


def test_the_windows_depend_on_seed_and_number_alone(folder):
    _, training, _ = label_sources([str(folder)], 'trace_category', None, 1., 0)
    a, b, c = (LabelledWindows(training, 8, seed=s) for s in (0, 0, 1))
    for n in (5, 0, 3): assert torch.equal(a[n]['x'], b[n]['x']) and a[n]['y'] == b[n]['y']
    assert not torch.equal(a[5]['x'], c[5]['x'])


def test_bad_records_are_named_and_another_is_drawn(tmp_path, write_dataset, quake_records):
    def records():
        for k, (m, x) in enumerate(quake_records(24)):
            if k % 4 == 0: x = np.full_like(x, np.nan)
            yield m, x
    where = write_dataset(tmp_path/'d', records())
    question, training, dev = label_sources([str(where)], 'trace_category', None, 1., 0)
    windows = LabelledWindows(training, 60)
    items = [windows[n] for n in range(60)]
    assert (all(item['x'].isfinite().all() for item in items) and windows.rejected
            and sum(item['redrawn'] for item in items) > 0)
    model = WindowModel(build(preset('contrastive-tiny').model), question).eval()
    table = answers(model, dev[0])
    assert 0 < len(table) < len(dev[0])


def test_loss_of_both_kinds():
    torch.manual_seed(0)
    trunk, x, y = build(preset('contrastive-tiny').model), torch.randn(4, 512, 3), torch.tensor(
        [0., 1., 1., 2.])
    model = WindowModel(trunk, LabelSpec('c', ['a', 'b', 'c'], [.2, .5, .3])).eval()
    p = model.answer(x)
    torch.testing.assert_close(model({'x': x, 'y': y}).loss, -p[range(4), y.long()].log().mean())
    model = WindowModel(trunk, LabelSpec('m', None, mean=3., std=2.)).eval()
    r = (model.answer(x)[:, 0] - y)/2
    torch.testing.assert_close(model({'x': x, 'y': y}).loss,
                               torch.where(r.abs() < 1, r**2/2, r.abs() - .5).mean())
    torch.testing.assert_close(model({'x': x, 'y': y}).metrics['absolute_error'], 2*r.abs().mean())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from('abc')), min_size=2, max_size=30))
def test_scores_of_classes(pairs):
    table = pd.DataFrame(pairs, columns=['truth', 'answer']).assign(event=range(len(pairs)))
    s = score(table, LabelSpec('c', ['a', 'b', 'c'], [.2, .5, .3]), draws=5).set_index('metric')
    assert s.loc['accuracy', 'value'] == pytest.approx(np.mean([t == a for t, a in pairs]))
    assert s.loc['accuracy', 'baseline'] == pytest.approx(np.mean([t == 'b' for t, _ in pairs]))
    there = sorted({t for t, _ in pairs})
    assert (s.loc['macro F1', 'value']
            == pytest.approx(np.mean([f1_score([t == c for t, _ in pairs],
                                               [a == c for _, a in pairs], zero_division=0)
                                      for c in there])))


@pytest.mark.parametrize('column, where',
                         [('trace_category', 'folder'), ('source_magnitude', 'store')])
def test_from_a_pretrained_model_to_scores(column, where, folder, store, tmp_path, capsys):
    torch.manual_seed(5)
    trunk = build(preset('reconstruction-tiny').model)
    trunk.save_pretrained(tmp_path/'pre')
    data, run = str(folder if where == 'folder' else store), tmp_path/'run'
    assert main(['finetune', '--from', str(tmp_path/'pre'), '--data', data, '--column', column,
                 '--fraction', '.5', '--freeze', 'all', '--steps', '2',
                 '--batch-size', '2', '--validation-windows', '2', '--device', 'cpu', '--out',
                 str(run)]) == 0
    assert main(['evaluate', str(run), '--device', 'cpu']) == 0
    assert 'baseline' in capsys.readouterr().out
    model, config = load_window_model(run), json.loads(
        (run/'config.json').read_text(encoding='utf-8'))
    for name, w in model.backbone.state_dict().items():
        assert torch.equal(w, trunk.backbone.state_dict()[name])
    assert config['finetune_window']['column'] == column and config['question']['column'] == column
    assert {'loss', 'dev_loss'} <= set(read_metrics(run)[-1])
    table, scores = pd.read_csv(run/'test/answers.csv'), pd.read_csv(run/'test/scores.csv')
    assert (len(table) == len(label_rows(data, column))
            and (run/'test/answers.png').stat().st_size > 1000)
    assert (list(scores.metric)
            == (['accuracy', 'macro F1'] if column == 'trace_category' else ['RMSE', 'MAE', 'R²']))


def label_rows(data, column): return [c for c in open_source(data, 'test').metadata(column) if c]


def test_a_store_needs_no_seisbench(store, tmp_path):
    code = ('import sys; sys.modules["seisbench"] = sys.modules["obspy"] = None; from '
            'seismodel.finetuning.finetune import finetune; '
            'finetune("random", "contrastive-tiny", [sys.argv[1]], "trace_category", steps=1, '
            'batch_size=2, validation_windows=2, device="cpu", out=sys.argv[2])')
    done = subprocess.run([sys.executable, '-c', code, store, tmp_path/'run'], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_resumed_run_is_the_undisturbed_one(folder, tmp_path, monkeypatch):
    import seismodel.training.trainer as trainer
    args = dict(from_run='random', preset='contrastive-tiny', data=[str(folder)],
                column='source_magnitude', fraction=.5, steps=3, batch_size=2, validation_windows=2,
                checkpoint_every=1, device='cpu')
    whole = finetune(**args, out=tmp_path/'whole')
    real, calls = trainer.train_step, []
    def cut_off(*a, **k):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(1)
        return real(*a, **k)
    monkeypatch.setattr(trainer, 'train_step', cut_off)
    with pytest.raises(KeyboardInterrupt): finetune(**args, out=tmp_path/'cut')
    monkeypatch.setattr(trainer, 'train_step', real)
    finetune(resume=tmp_path/'cut')
    a, b = load_window_model(whole), load_window_model(tmp_path/'cut')
    assert (a.question == b.question
            and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()))


@pytest.mark.parametrize('args, words', [
    (['--column', 'trace_category', '--width', '8'], '--width is for pickers'),
    (['--classes', 'noise,earthquake'], '--classes goes with --column'),
    (['--column', 'trace_kategory'], 'trace_category'),
    (['--column', 'trace_category', '--classes', 'noise'], 'at least two'),
    (['--column', 'trace_category', '--classes', 'noise,explosion'], "'explosion'"),
    (['--column', 'trace_component_order'], 'nothing to learn'),
    (['--column', 'trace_category', '--fraction', '2'], '--fraction is 2'),
    (['--column', 'trace_category', '--data', 'synthetic'], 'has no metadata'),
    (['--column', 'trace_category', '--freeze', 'head'], 'choose one of'),
    (['--column', 'trace_category', '--data-weights', '1,2'],
     'one positive number for each dataset (1)'),
    (['--column', 'trace_category', '--steps', '0'], 'steps is 0'),
])
def test_mistakes(args, words, folder, tmp_path, capsys):
    data = [] if '--data' in args else ['--data', str(folder)]
    assert main(['finetune', '--from', 'random', '--preset', 'contrastive-tiny', *data, *args,
                 '--out', str(tmp_path/'run')]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1 and not (tmp_path/'run').exists()


def test_folders_of_other_runs_are_refused(folder, tmp_path, capsys):
    build(preset('contrastive-tiny').model).save_pretrained(tmp_path/'pre')
    assert main(['evaluate', str(tmp_path/'pre'), '--data', str(folder)]) == 2
    assert 'seismodel finetune --from' in capsys.readouterr().err
    assert main(['finetune', '--resume', str(tmp_path/'pre')]) == 2
    assert 'not a fine-tuning run' in capsys.readouterr().err
    model = WindowModel(build(preset('contrastive-tiny').model),
                        LabelSpec('trace_category', ['earthquake', 'noise'], [.5, .5]))
    model.save_pretrained(tmp_path/'alone')
    with pytest.raises(UserError, match='--data'): evaluate(tmp_path/'alone')
    with pytest.raises(UserError, match="split 'holdout'"):
        evaluate(tmp_path/'alone', str(folder), 'holdout')


def test_the_old_names_still_work(folder, tmp_path, capsys):
    "With a sentence that says the new ones; and without a column, the old command learns no picks"
    words = ['--from', 'random', '--preset', 'contrastive-tiny', '--data', str(folder), '--steps',
             '1', '--batch-size', '2', '--validation-windows', '2', '--device', 'cpu']
    assert (main(['finetune-window', *words, '--out', str(tmp_path/'none')]) == 2
            and not (tmp_path/'none').exists())
    assert 'with --column NAME' in capsys.readouterr().err
    assert main(['finetune-window', *words, '--column', 'trace_category', '--out',
                 str(tmp_path/'run')]) == 0
    assert ('finetune-window is called finetune --column NAME now; the old name still works'
            in capsys.readouterr().err)
    assert main(['evaluate-window', str(tmp_path/'run'), '--out', str(tmp_path/'scores'),
                 '--device', 'cpu']) == 0
    assert 'evaluate-window is called evaluate now' in capsys.readouterr().err
    assert (sorted(f.name for f in (tmp_path/'scores').iterdir())
            == ['answers.csv', 'answers.png', 'scores.csv'])
    for option in (['--threshold', '.5'], ['--context', '3000'], ['--targets', str(tmp_path)]):
        assert main(['evaluate', str(tmp_path/'run'), *option]) == 2
        assert f'{option[0]} is for pickers' in capsys.readouterr().err
    assert (type(load(tmp_path/'run')) is WindowModel
            and load(tmp_path/'run').question.column == 'trace_category')


def test_on_real_data(real_data):
    where = next((f for f in real_data if f.name == 'realquakes'), None)
    if where is None: pytest.skip('no real data on this machine')
    question, training, dev = label_sources([str(where)], 'trace_p_polarity', None, 1., 0)
    assert question.classes == ['down', 'up'] and (len(training[0]), len(dev[0])) == (55, 12)
    question, training, dev = label_sources([str(where)], 'source_magnitude', None, .1, 0)
    assert (question.classes is None and len(dev[0]) == 33
            and LabelledWindows(training, 4)[3]['x'].shape == (4096, 3))

"""The study: resuming, refusing, failing, processes, baselines, whole records, and the arithmetic
of its table"""
import json
import signal
import shutil
from dataclasses import fields
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

import seismodel.study.run as study_module
import seismodel.study.trial as trial_module
import seismodel.training.trainer as trainer
from seismodel.study.trial import (THRESHOLDS, Trial, StudyConfig, CachedAnnotator, trial_recipe,
                                   trial_settings,
                                   trial_windows, dev_score, candidates_of, score_trial,
                                   start_trial)
from seismodel.data.sources import open_records
from seismodel.cli import main
from seismodel.core import UserError
from seismodel.study.paired import chance, compare, holm, onset_score, read_onsets
from seismodel.study.tables import (RECORD_COLUMNS, TRIAL_COLUMNS, gains, gather_trials,
                                    plot_study, resample_events, results, table)
from seismodel.picking.evaluation import score_records, summarise
from seismodel.picking.matching import record_stream
from seismodel.data.pack import pack
from seismodel.study.baselines import (EQTransformerBaseline, BaselinePicker, fresh_baseline,
                                       open_trained)
from seismodel.models.pretraining import build, preset
from seismodel.training.runlog import read_metrics
from seismodel.study.command import study
from seismodel.study.fold_trial import FoldStudy
from seismodel.study.run import run_trials


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_dataset, quake_records):
    return write_dataset(tmp_path_factory.mktemp('quakes'), quake_records(48, trace_dataset='toy'))


@pytest.fixture(scope='module')
def store(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('packed')/'store'
    pack([str(folder)], out=out)
    return out


def command(store, out, *more):
    return ['study', '--baseline', 'PhaseNet', '--data', str(store), '--seeds', '0', '--steps', '3',
            '--batch-size', '4', '--validation-windows', '4',
            '--synthetic', '0', '--device', 'cpu', '--out', str(out), *more]


@pytest.fixture(scope='module')
def done(store, tmp_path_factory):
    "A small study, done without disturbance"
    out = tmp_path_factory.mktemp('study')/'done'
    assert main(command(store, out, '--fractions', '.5,1')) == 0
    return out


def test_what_a_study_leaves(done):
    assert (sorted(f.name for f in (done/'trials').iterdir())
            == ['PhaseNet--0.5--0', 'PhaseNet--1--0'])
    assert ({f.name for f in done.iterdir()}
            == {'trials', 'table.csv', 'gains.csv', 'study_fixed.csv', 'study_dev.csv',
                'figure.png'})
    for trial in (done/'trials').iterdir():
        assert read_metrics(trial)[-1]['step'] == 3 and not (trial/'checkpoints').exists()
        # ten test records with P and S, two of noise; two thresholds
        assert len(pd.read_csv(trial/'records.csv')) == 2*(10*2 + 2)
    pd.testing.assert_frame_equal(results(done/'study_fixed.csv'), gather_trials(done).round(3),
                                  check_dtype=False)
    assert len(table(done)) == 2*7 and len(plot_study(done).axes) == 4


def test_a_finished_cell_is_left_alone_and_a_new_one_is_added(done, store, tmp_path, monkeypatch,
                                                              capsys):
    out = shutil.copytree(done, tmp_path/'s')
    ran = []
    monkeypatch.setattr(study_module, 'run_trial', lambda trial, *rest: ran.append(trial.name))
    assert main(command(store, out, '--fractions', '.5,1')) == 0 and ran == []
    assert '2 trials of 3 steps, 2 done before' in capsys.readouterr().out
    assert main(command(store, out, '--fractions', '.2,.5,1')) == 0 and ran == ['PhaseNet--0.2--0']


def test_a_study_of_version_01_goes_on_where_it_lies(done, store, tmp_path, monkeypatch, capsys):
    "Its trials lie in `cells`: they are read, none is trained again, and new ones join them"
    out = shutil.copytree(done, tmp_path/'s')
    (out/'trials').rename(out/'cells')
    ran = []
    monkeypatch.setattr(study_module, 'run_trial', lambda trial, common,
                        folder: ran.append((trial.name, folder.name)))
    assert (main(command(store, out, '--fractions', '.2,.5,1')) == 0
            and ran == [('PhaseNet--0.2--0', 'cells')])
    assert (not (out/'trials').exists()
            and '3 trials of 3 steps, 2 done before' in capsys.readouterr().out)
    pd.testing.assert_frame_equal(table(out), table(done))


@pytest.mark.parametrize('where', ['PhaseNet--1--0', 'PhaseNet--1--0.part'])
@pytest.mark.parametrize('more, words', [(['--steps', '4'], 'train.steps was 3 and is 4'),
                                         (['--threshold', '.5'],
                                          'cell.threshold was 0.3 and is 0.5'),
                                         (['--augment', 'none'], 'cell.augment'),
                                         (['--lr', 'PhaseNet=.5'], 'train.lr')])
def test_other_settings_are_refused(done, store, tmp_path, capsys, where, more, words):
    "Finished or begun, in one sentence, before anything is touched"
    (tmp_path/'s/trials').mkdir(parents=True)
    shutil.copytree(done/'trials/PhaseNet--1--0', tmp_path/'s/trials'/where)
    before = sorted((f, f.stat().st_mtime_ns) for f in (tmp_path/'s').rglob('*'))
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1', *more)) == 2
    said = capsys.readouterr().err
    assert words in said and where in said and said.count('\n') == 1
    assert sorted((f, f.stat().st_mtime_ns) for f in (tmp_path/'s').rglob('*')) == before


def test_cells_of_another_budget_never_share_a_table(done, store, tmp_path, capsys):
    "Another fraction alone is asked for, and the folder holds trials of three steps"
    out = shutil.copytree(done, tmp_path/'s')
    assert main(command(store, out, '--fractions', '.2', '--steps', '4')) == 2
    said = capsys.readouterr().err
    assert ('train.steps was 3 and is 4' in said and said.count('\n') == 1
            and not (out/'trials/PhaseNet--0.2--0.part').exists())


def test_stopped_by_a_signal_it_goes_on_to_the_same_numbers(done, store, tmp_path, monkeypatch,
                                                            capsys):
    real, calls = trainer.train_step, []
    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)
    monkeypatch.setattr(trainer, 'train_step', stop_at_second)
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1')) == 128 + signal.SIGTERM
    assert 'the same command goes on' in capsys.readouterr().err
    assert ([f.name for f in (tmp_path/'s/trials').iterdir()] == ['PhaseNet--0.5--0.part']
            and len(calls) <= 3)
    monkeypatch.setattr(trainer, 'train_step', real)
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1')) == 0
    for name in ('PhaseNet--0.5--0', 'PhaseNet--1--0'):
        for file in ('records.csv', 'model.safetensors', 'best/model.safetensors'):
            assert (tmp_path/'s/trials'/name/file).read_bytes() == (
                done/'trials'/name/file).read_bytes(), (name, file)


def test_killed_while_scoring_it_scores_again(done, store, tmp_path):
    "The training is done, its folder is not renamed, and the table of picks is missing"
    part = tmp_path/'s/trials/PhaseNet--1--0.part'
    shutil.copytree(done/'trials/PhaseNet--1--0', part)
    (part/'records.csv').unlink()
    before = (part/'best/model.safetensors').read_bytes()
    assert main(command(store, tmp_path/'s', '--fractions', '1')) == 0
    trial = tmp_path/'s/trials/PhaseNet--1--0'
    assert ((trial/'records.csv').read_bytes()
            == (done/'trials/PhaseNet--1--0/records.csv').read_bytes()
            and (trial/'best/model.safetensors').read_bytes() == before)


def test_the_best_weights_are_scored(store, tmp_path, monkeypatch):
    "Not the last ones: of two steps the first has the lower dev loss"
    scored, losses = [], iter([1., 2.])
    monkeypatch.setattr(trainer, 'validation_metrics', lambda *a: {'loss': next(losses)})
    monkeypatch.setattr(trial_module, 'score_trial', lambda picker, common: scored.append(picker)
                        or pd.DataFrame())
    trial = Trial(candidates_of(None, ['PhaseNet'])[0], 1., 0)
    trial_module.run_trial(trial, StudyConfig((str(store),), steps=2, batch_size=4,
                                              validation_windows=4, device='cpu', synthetic=0.),
                           tmp_path)
    best, last = (load_file(tmp_path/f'{trial.name}.part'/part/'model.safetensors')
                  for part in ('best', '.'))
    used = scored[0].peer.state_dict()
    assert set(used) == set(best) and all(torch.equal(used[k], best[k]) for k in best)
    assert any(not torch.equal(last[k], best[k]) for k in best) and not scored[0].training


def test_a_failing_cell_does_not_stop_the_others(done, store, tmp_path, monkeypatch, capsys):
    real = study_module.run_trial
    def fails_at_half(trial, *rest):
        if trial.fraction == .5: raise RuntimeError('the device is\nout of memory')
        real(trial, *rest)
    monkeypatch.setattr(study_module, 'run_trial', fails_at_half)
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1')) == 1
    said = capsys.readouterr()
    assert ('1 of 2 trials failed: PhaseNet--0.5--0' in said.err
            and 'RuntimeError: out of memory' in said.out + said.err)
    assert ('Traceback'
            in (tmp_path/'s/trials/PhaseNet--0.5--0.part/output.txt').read_text(encoding='utf-8'))
    assert (tmp_path/'s/table.csv').exists() and (tmp_path/'s/trials/PhaseNet--1--0').is_dir()


def test_two_processes_of_which_one_is_lost(done, store, tmp_path, capsys):
    "The trials of several processes are those of one; a process that dies costs its trial alone"
    # cannot be opened, and nobody expects that
    (tmp_path/'s/trials/PhaseNet--0.5--0.part/output.txt').mkdir(parents=True)
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1', '--jobs', '2')) == 1
    said = capsys.readouterr()
    assert 'PhaseNet--0.5--0 failed: its process ended (1)' in said.out + said.err
    a, b = (pd.read_csv(s/'trials/PhaseNet--1--0/records.csv') for s in (done, tmp_path/'s'))
    pd.testing.assert_frame_equal(a, b)


def test_all_devices_take_trials(done, store, tmp_path, monkeypatch):
    "A process on each of two devices: both train, and the trials are those of one"
    monkeypatch.setattr(study_module, 'pick_devices',
                        lambda name: [torch.device('cpu'), torch.device('cpu:0')])
    assert main(command(store, tmp_path/'s', '--fractions', '.5,1')) == 0
    trials = [tmp_path/f's/trials/PhaseNet--{fraction}--0' for fraction in ('0.5', '1')]
    assert sorted(json.loads((t/'config.json').read_text(encoding='utf-8'))['train']['device']
                  for t in trials) == ['cpu', 'cpu:0']
    a, b = (pd.read_csv(s/'trials/PhaseNet--1--0/records.csv') for s in (done, tmp_path/'s'))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize('args, words', [
    ([], 'what to compare'), (['--baseline', 'GPD'], 'choose PhaseNet or EQTransformer'),
    (['--from', 'a=no/such/run'], 'config.json is missing'),
    (['--baseline', 'PhaseNet', '--fractions', '0,1'], '--fractions'),
    (['--baseline', 'PhaseNet', '--fractions', '.5,.5'], 'each once'),
    (['--baseline', 'PhaseNet', '--seeds', '0,-1'], '--seeds'),
    (['--baseline', 'PhaseNet', '--jobs', '0'], '--jobs'),
    (['--baseline', 'PhaseNet', '--steps', '0'], 'steps'),
    (['--baseline', 'PhaseNet', '--threshold', '1'], '--threshold'),
    (['--baseline', 'PhaseNet', '--synthetic', '1'], '--synthetic'),
    (['--baseline', 'PhaseNet', '--synthetic', '-.1'], '--synthetic'),
    (['--baseline', 'PhaseNet', '--set', 'train.seed=1'], 'use --seeds'),
    (['--baseline', 'PhaseNet', '--set', 'train.batch_size=1'], 'use --batch-size'),
    (['--baseline', 'PhaseNet', '--set', 'train.warmpu=1'], 'train.warmpu'),
    (['--baseline', 'PhaseNet', '--set', 'model.dropout=.1'], 'only baselines'),
    (['--baseline', 'PhaseNet', '--set', 'train.warmup=2'], 'warmup'),
    (['--baseline', 'PhaseNet', '--augment', 'some'], '--augment'),
    (['--baseline', 'PhaseNet', '--device', 'tpu'], "'tpu'")])
def test_mistakes(args, words, store, tmp_path, capsys):
    assert main(['study', '--data', str(store), '--out', str(tmp_path/'s'), *args]) == 2
    assert words in capsys.readouterr().err and not (tmp_path/'s').exists()


def test_mistakes_about_the_data(folder, tmp_path, capsys):
    for args, words in ((['--out', 'x'], '--data'), (['--data', str(folder)], '--out'),
                        (['--data', 'synthetic', '--out', str(tmp_path/'s')], 'no whole records'),
                        (['--data', 'no/such', '--out', str(tmp_path/'s')], 'no/such')):
        assert main(['study', '--baseline', 'PhaseNet', *args]) == 2
        assert words in capsys.readouterr().err and not (tmp_path/'s').exists()


def test_a_run_of_the_same_weights_elsewhere_is_the_same_start(store, tmp_path):
    """Settings know a pretrained run by its weights, so that a study can be moved; other weights
    are another study"""
    h = StudyConfig((str(store),), steps=3)
    said = []
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        torch.manual_seed(seed)
        build(preset('contrastive-tiny').model).save_pretrained(tmp_path/name)
        trial = Trial(candidates_of([f'm={tmp_path}/{name}'], None)[0], .5, 0)
        said.append(trial_settings(trial, h, trial_recipe(start_trial(trial), trial, h)))
    assert said[0] == said[1] != said[2]


def test_fields_that_are_set_reach_every_trial(store, tmp_path, monkeypatch, capsys):
    """Those of the recipe all methods, those of the model ours, whose pretrained and random starts
    stay alike; another value is another study"""
    torch.manual_seed(0)
    build(preset('contrastive-tiny').model).save_pretrained(tmp_path/'run')
    ran = {}
    def note(trial, common, folder):
        net = start_trial(trial, common.freeze, common.changes)
        c = trial_recipe(net, trial, common)
        ran[trial.candidate.name] = net, c
        part = folder/f'{trial.name}.part'
        (part/'config.json').write_text(json.dumps(trial_settings(trial, common, c)),
                                        encoding='utf-8')
        raise RuntimeError('no need to train')
    monkeypatch.setattr(study_module, 'run_trial', note)
    words = command(store, tmp_path/'s', '--from', f"m={tmp_path/'run'}", '--fractions', '.5',
                    '--set', 'train.warmup=.25', '--set', 'train.lr=.001')
    assert main([*words, '--lr', 'm=.002', '--set', 'model.dropout=.1']) == 1
    assert ({name: (c.warmup, c.lr) for name, (_, c) in ran.items()}
            == {'m': (.25, .002), 'm-random': (.25, .001), 'PhaseNet': (.25, .001)})
    a, b = ran['m'][0], ran['m-random'][0]
    assert a.config.dropout == b.config.dropout == .1
    assert all(torch.equal(x, y) for x,
               y in zip(a.head.parameters(), b.head.parameters(), strict=True))
    weights = load_file(tmp_path/'run/model.safetensors')
    found = a.backbone.state_dict()
    assert (found
            and all(torch.equal(found[name.removeprefix('backbone.')], w) for name,
                    w in weights.items() if name.startswith('backbone.')))
    capsys.readouterr()
    assert main([*words, '--lr', 'm=.002', '--set', 'model.dropout=.2']) == 2
    assert 'cell.model' in capsys.readouterr().err
    assert (main([*words, '--set', 'model.blokcs=2']) == 2
            and 'did you mean model.blocks' in capsys.readouterr().err)


def test_a_store_and_its_data_set_are_scored_alike(folder, store):
    a, b = (open_records(str(name), 'test') for name in (folder, store))
    assert a.metadata['trace_name'].tolist() == b.metadata['trace_name'].tolist()
    for i in range(len(a.metadata)):
        x, y = a.get_waveforms(i), b.get_waveforms(i)
        assert x.shape == y.shape and np.abs(x - y).max() <= 1e-4*np.abs(x).max()
    torch.manual_seed(0)
    net = BaselinePicker('PhaseNet').eval()
    x, y = (score_records(net, data, .4) for data in (a, b))
    assert x['picks'].max() > 0
    pd.testing.assert_frame_equal(x.drop(columns=['residual', 'picks']),
                                  y.drop(columns=['residual', 'picks']))


@pytest.mark.parametrize('name', ['PhaseNet', 'EQTransformer'])
def test_a_peer_says_the_same_in_training_and_in_classify(name, tmp_path):
    "Also across the windows of a long record, and from the file"
    torch.manual_seed(1)
    baseline = fresh_baseline(name)
    # moves the running means of the batch norms
    for _ in range(3): baseline.train()(batch_of(8))
    baseline.eval().save_pretrained(tmp_path)
    net = open_trained(tmp_path)
    x = np.random.default_rng(0).normal(size=(3, 9000))
    # something to pick
    for first in range(700, 8400, 900): x[:, first:first + 150] *= 20
    said = {t.stats.channel[-1]: t.data for t in net.annotate(record_stream(x))}
    first = torch.tensor(x[:, :4096])
    z = ((first - first.mean(1, keepdim=True))/first.std(1, keepdim=True, correction=0)).T[
        None].float()
    with torch.no_grad(): p = baseline.probabilities(baseline.outputs(z))[0].numpy()
    # the rest is shared with the next window
    for k, phase in enumerate('NPS'):
        np.testing.assert_allclose(said[phase][:2048], p[:2048, k], atol=1e-4)


def test_a_record_is_annotated_once_and_picked_at_any_threshold():
    "As `classify` does, but within five seconds of the ends"
    torch.manual_seed(1)
    net = BaselinePicker('PhaseNet').eval()
    # sharper than fresh weights are: a pick ends at half its threshold
    with torch.no_grad(): net.peer.net.out.weight *= 30
    x = np.random.default_rng(0).normal(size=(3, 9000))
    # something to pick
    for first in range(700, 8400, 900): x[:, first:first + 150] *= 20
    inside = lambda picks: [(q.peak_time, q.phase, q.peak_value) for q in picks
                            if 6 < q.start_time.timestamp and q.end_time.timestamp < 84]
    remember, levels = CachedAnnotator(net), np.concatenate(
        [t.data for t in net.annotate(record_stream(x)).select(channel='*_P')])
    for threshold in np.quantile(levels, (.8, .9, .95)).tolist():
        a, b = (m.classify(record_stream(x), P_threshold=threshold, S_threshold=threshold).picks
                for m in (net, remember))
        assert inside(a) == inside(b) != [] and len(remember.known) == 1
        assert all(5.119 <= q.start_time.timestamp and q.end_time.timestamp <= 84.871 for q in b)


def batch_of(n):
    "Noise with onsets, some of which nobody labelled"
    g = torch.Generator().manual_seed(n)
    return {'x': torch.randn(n, 4096, 3, generator=g), 'p_onset': torch.full((n,), 1000.),
            's_onset': torch.full((n,), 2000.),
            'p_status': torch.arange(n) % 3, 's_status': torch.arange(n) % 2}


@pytest.mark.parametrize('name', ['PhaseNet', 'EQTransformer'])
def test_peers_learn_nothing_from_a_phase_that_was_not_labelled(name):
    torch.manual_seed(2)
    baseline, batch = fresh_baseline(name).eval(), batch_of(6)
    moved = {**batch, **{f'{k}_onset': torch.where(batch[f'{k}_status'] == 0, 3000.,
                                                   batch[f'{k}_onset']) for k in 'ps'}}
    loss, same = baseline(batch).loss, baseline(moved).loss
    assert loss == same and loss != baseline({**batch, 's_onset': torch.full((6,), 2100.)}).loss
    nothing = baseline({**batch, 'p_status': torch.zeros(6), 's_status': torch.zeros(6)}).loss
    assert nothing == 0 and nothing.isfinite()


def test_the_loss_of_eqtransformer_by_hand():
    baseline, z = EQTransformerBaseline(), torch.zeros(2, 4096, 3)
    batch = dict(p_onset=torch.full((2,), 1000.), s_onset=torch.tensor([2000., float('nan')]),
                 p_status=torch.tensor([4, 4]), s_status=torch.tensor([4, 0]))
    # every logit 0: ln 2 each, and the weights sum to 1
    assert torch.isclose(baseline.loss(z, batch), torch.tensor(np.log(2.)).float())
    # says: nothing at all
    sure = torch.tensor([-30., -30., -30.]).expand(2, 4096, 3)
    said = baseline.loss(sure, batch)
    # of a bump, as a share of the window
    area = 20*np.sqrt(2*np.pi)/4096
    # each missed sample costs 30; the earthquake is on for 2401 samples of the first window, and of
    # the second nobody can say
    assert abs(said.item() - 30*(.05*2401/4096 + .40*area + .55*area)) < 1e-3


def test_windows_are_the_same_for_every_method(store):
    h = StudyConfig((str(store),), steps=2, batch_size=3, device='cpu', validation_windows=2,
                    synthetic=0.)
    trials = [Trial(m, .5, 4) for m in candidates_of(None, ['PhaseNet', 'EQTransformer'])]
    (a, _, f, _), (b, _, g, _) = (trial_windows(trial, trial_recipe(start_trial(trial), trial, h),
                                                h) for trial in trials)
    torch.testing.assert_close(a.batch(range(6)), b.batch(range(6)), rtol=0, atol=0, equal_nan=True)
    x, y = (change(dict(w.batch(range(6), raw=True)), torch.Generator().manual_seed(1)) for w,
            change in ((a, f), (b, g)))
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def picks():
    """Residuals of two methods with controls, 3 seeds, two sources, some records with a single
    component"""
    rng, n = np.random.default_rng(3), 60
    rows = [(kind, f'd{k % 2}', 'Z' if k % 7 == 0 else 'ZNE', f'e{k//3}'
             if kind != 'noise' else f't{k}', f't{k}') for kind,
            m in (('P', n), ('S', n), ('noise', 9)) for k in range(m)]
    columns = pd.MultiIndex.from_tuples([(m, s, k) for m in ('a', 'a-random', 'b', 'b-random')
                                         for s in (.1, 1.) for k in range(3)], names=TRIAL_COLUMNS)
    x = np.where(rng.random((len(rows), len(columns))) < .3, np.nan,
                 rng.normal(0, .4, (len(rows), len(columns))))
    x[-9:] = rng.integers(0, 2, (9, len(columns)))
    return pd.DataFrame(x, pd.MultiIndex.from_tuples(rows, names=RECORD_COLUMNS), columns)


def test_the_table_is_that_of_the_evaluation(picks):
    "One seed at a time, against `summarise`, which resamples record by record"
    t = table(picks).set_index(['method', 'fraction', 'records', 'kind', 'metric'])
    one = []
    for seed in range(3):
        r = picks['a', 1., seed].rename('value').reset_index()
        r = r.assign(residual=r['value'].where(r['kind'] != 'noise'),
                     picks=np.where(r['kind'] == 'noise', r['value'], 1))
        s = summarise(r, draws=2)
        one.append(s.assign(trace_dataset=s['trace_dataset'].replace('all with three components',
                                                                     'three components')).set_index(
            ['trace_dataset', 'kind', 'metric']))
    rows = t.sort_index().loc['a', 1.]
    assert len(rows) == len(one[0]) == 4*7
    for (part, kind, name), row in rows.iterrows():
        theirs = [o.loc[(part, kind, name if kind == 'noise' else f'found {name}')] for o in one]
        assert (np.isclose(row.value, np.mean([o.value for o in theirs])) and row.n == theirs[0].n
                and row.seeds == 3)
        assert (np.isclose(row.seed_low, min(o.value for o in theirs))
                and np.isclose(row.seed_high, max(o.value for o in theirs)))
        assert row.low <= row.value <= row.high


def test_gains_are_paired(picks):
    "A method that equals its control gains exactly nothing, however wide the intervals of both are"
    for s in (.1, 1.):
        for k in range(3): picks['a-random', s, k] = picks['a', s, k]
    g = gains(picks).set_index(['method', 'metric'])
    assert (g.loc['a'][['gain', 'low', 'high']] == 0).all().all() and len(g) == 2*2*2*3
    assert ((g.loc['b'].low < g.loc['b'].high).all()
            and len(gains(picks.drop(columns=['a-random', 'b-random'], level=0))) == 0)


def test_a_missing_cell_leaves_the_others(picks):
    "Two seeds of one method failed: the table says how many there are"
    t = table(picks.drop(columns=[('a', .1, 0), ('a', .1, 1)])).set_index(['method', 'fraction'])
    assert set(t.loc['a', .1].seeds) == {1} and set(t.loc['b', .1].seeds) == {3}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40),
       st.integers(0, 3))
def test_resampling(records, seed):
    """Between the worst and the best event; constant where every record is alike; the same draws
    for every column"""
    events, hits = np.array([f'e{e}' for e, _ in records]), np.array(
        [[h, not h, 1.] for _, h in records], float)
    draws = resample_events(hits, events, 50, seed)
    by_event = pd.DataFrame(hits).groupby(events).mean()
    assert (draws.shape == (50, 3) and (draws[:, 2] == 1).all()
            and np.allclose(draws[:, 0] + draws[:, 1], 1))
    assert ((draws[:, 0] >= by_event[0].min() - 1e-12).all()
            and (draws[:, 0] <= by_event[0].max() + 1e-12).all())


def test_the_threshold_comes_from_dev(store):
    "Chosen where dev does best, and applied to test"
    h, seen = StudyConfig((str(store),)), []
    class Known:
        "Finds everything at a threshold of 0.4 or more, and below it picks in noise as well"
        default_args = {}
        def annotate(self, stream, **args): return stream
        def classify_aggregate(self, stream, args):
            from obspy import UTCDateTime
            from seisbench.util import ClassifyOutput, Pick, PickList
            seen.append(args['P_threshold'])
            return ClassifyOutput('k', picks=PickList([Pick('XX.REC.', UTCDateTime(
                2), peak_time=UTCDateTime(3), phase='P')] if args['P_threshold'] < .4 else []))
    rows = score_trial(Known(), h)
    assert (rows.groupby('by')['threshold'].first().to_dict() == {'fixed': .3, 'dev': .4}
            and set(seen) == {.05, .1, .2, .3, .4, .5, .6, .7})
    assert ((rows[(rows.by == 'dev') & (rows.kind == 'noise')].picks == 0).all()
            and (rows[(rows.by == 'fixed') & (rows.kind == 'noise')].picks == 1).all())
    assert dev_score(rows[rows.by == 'fixed']) < dev_score(rows[rows.by == 'dev'])


def test_nothing_to_do():
    assert run_trials([], StudyConfig(('x',)), None) == {}


def arm(method, skill, seed, fraction=.1, events=60, luck=0):
    "Windows of an arm, of which a share is right"
    rng = np.random.default_rng([seed, luck])
    return pd.DataFrame([dict(method=method, fraction=fraction, seed=seed, fold=e % 5, phase=phase,
                              record=2*e + k, event=e, status='manual',
                              known=1, residual_0=float(rng.random() >= skill),
                              residual_1=float(rng.random() >= skill), p_0=.9, p_1=.8)
                         for e in range(events) for k in range(2) for phase in 'ps'])


def test_a_gain_is_paired_by_onset_event_and_seed():
    "By hand: every second event gains a half with one seed and nothing with the other"
    base = arm('b', .5, 0)
    other = pd.concat([base.assign(method='a', seed=seed, residual_0=np.where(
        base.event % 2 & (seed == 0), 0., 1.), residual_1=1.) for seed in (0, 1)])
    onsets = pd.concat([base.assign(seed=seed, residual_0=1., residual_1=1.) for seed in (0, 1)]
                       + [other])
    row = compare(onsets, 'b').set_index(['phase', 'metric']).loc['p', 'within 0.3 s']
    # both seeds may be the second one
    assert np.isclose(row.gain, .125) and row.low == 0 and row.high > .25 and row.verdict == 'open'
    assert (row.onsets, row.events, row.seeds) == (120, 60, 2)
    shuffled = onsets.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare(shuffled, 'b'), compare(onsets, 'b'))


def test_automatic_onsets_stand_apart_and_missing_ones_leave_the_pairs():
    onsets = pd.concat([arm(m, s, seed) for m, s in (('a', .9), ('b', .6)) for seed in range(3)])
    onsets.loc[onsets.event < 10, 'status'] = 'automatic'
    # a fold that is not done
    onsets = onsets[~((onsets.method == 'a') & (onsets.event >= 50))]
    rows = {status: compare(onsets, 'b', status=status).set_index(['phase', 'metric']).loc[
        'p', 'within 0.3 s'] for status in ('manual', 'automatic')}
    assert ({s: (r.onsets, r.events) for s, r in rows.items()}
            == {'manual': (80, 40), 'automatic': (20, 10)})
    assert rows['manual'].verdict == 'ahead'


def test_more_arms_ask_for_more():
    """The same gain with the same luck, among arms that gain nothing: its p-value grows with their
    number"""
    few = pd.concat([arm(m, s, seed, luck=k) for k, (m, s) in enumerate((('b', .6), ('a', .72)))
                     for seed in range(3)])
    more = pd.concat(
        [few, *(arm(f'c{k}', .6, seed, luck=5 + k) for k in range(6) for seed in range(3))])
    p = [compare(t, 'b').set_index(['phase', 'metric', 'method']).p['p', 'within 0.1 s', 'a']
         for t in (few, more)]
    assert p[0] < p[1] <= 7*p[0] + 1e-9
    assert compare(more, 'b', methods=['a']).p.tolist() == compare(few, 'b').p.tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    "Never smaller than alone, never larger than Bonferroni, in the same order"
    raised = holm(np.array(p))
    assert (raised.shape == (len(p),) and (raised >= p).all()
            and (raised <= np.minimum(1, np.array(p)*len(p)) + 1e-12).all())
    assert (np.diff(raised[np.argsort(p)]) >= 0).all()


def test_a_table_of_other_columns_is_refused(tmp_path):
    arm('a', .5, 0).drop(columns='event').to_csv(tmp_path/'onsets.csv.gz', index=False)
    with pytest.raises(UserError, match='no column event'): read_onsets(tmp_path/'onsets.csv.gz')


def test_what_one_window_adds():
    "A share counts its bound; an error ends at it, and has no sign"
    late = np.array([0., .1, -.3, .31, -9.])
    assert ([onset_score(late, f'within {s} s').tolist() for s in ('0.1', '0.3')]
            == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    assert onset_score(late, 'error up to 0.5 s').tolist() == [0., .1, .3, .31, .5]


def test_the_chance_of_the_other_sign():
    """Twice the smaller tail, with the observed difference counted in, and at most 1; a zero is in
    both tails"""
    assert chance(np.ones(99)) == chance(-np.ones(99)) == .02
    assert (chance(np.r_[np.ones(90), -np.ones(9)]) == .2
            and chance(np.r_[np.ones(90), np.zeros(9)]) == .2)
    assert chance(np.zeros(9)) == 1


def test_the_command_and_the_studies_mean_the_same_defaults():
    "Also what the chapters run, which name no settings, is what the command would run"
    usual = {name: p.default for name, p in signature(study).parameters.items()}
    for settings_of in (StudyConfig, FoldStudy):
        for f in fields(settings_of):
            if f.name in usual and f.name not in ('data', 'out', 'folds'):
                assert usual[f.name] == f.default, f.name
    assert usual['steps'] == 1000 and usual['batch_size'] == 32 and FoldStudy.folds == 5
    assert list(THRESHOLDS) == sorted(THRESHOLDS) and 0 < min(THRESHOLDS) and max(THRESHOLDS) < 1

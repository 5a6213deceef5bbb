"""The study by folds: its plan, its folds, its arrays and windows, what a trial leaves, what is run
again and what is not, and its bundles"""
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import obspy
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import seismodel.study.fold_run as fold_run
from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.pack import pack
from seismodel.data.sources import write_synthetic
from seismodel.signals.records import STATUS
from seismodel.study.arms import (AS_IT_IS, FoldTrial, Grid, Start, Way, choose_arms, plan_folds,
                                  study_arms, study_variants)
from seismodel.study.arrays import (open_splits, pack_arrays, sample_planes, samples_of_planes,
                                    unpack_arrays, write_continuous, write_records)
from seismodel.study.device_records import (DeviceEvents, DeviceRecords, events_part, read_records,
                                            scramble_phases)
from seismodel.study.fold_run import bring_bundles, run_fold_trials, take_bundles
from seismodel.study.fold_scores import (ABSENT, AUTOMATIC, MANUAL, Labels, onset_summary,
                                         score_continuous, score_onsets, window_rows)
from seismodel.study.fold_trial import (FoldStudy, dev_batches, fine_windows, finetune_fold,
                                        pretraining_windows)
from seismodel.study.folds import event_parts, fold_sides

root = Path(__file__).resolve().parents[1]
file = root/'benchmarks/objectives.py'
spec = importlib.util.spec_from_file_location('objectives', file)
objectives = sys.modules['objectives'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objectives)


def test_a_plan_in_own_words_is_worked_off_in_its_order():
    trials = objectives.trials_of(['spectrum:480 random joint:80:1 | plain decay.65 | .1 1 | 0 2',
                                   'spectrum:480 | plain | .1 | 0 1'], 'tiny')
    names = [t.name for t in trials]
    assert len(names) == len(set(names)) == 2 + 3*2*2*2 + 1
    assert names[:3] == ['spectrum-480k-s0', 'joint-80k-s1', 'spectrum-480k-s0--plain--0.1--0']
    assert names[-1] == 'spectrum-480k-s0--plain--0.1--1'
    assert all(t.pretraining in trials for t in trials if t.way and t.start.windows)
    again = objectives.trials_of(['random | plain | .1 | 0 | 0 2', 'spectrum:1:2 | | |'], 'tiny')
    assert ([t.name for t in again]
            == ['random--plain--0.1--0', 'random--plain--0.1--0--2', 'spectrum-1k-s2'])
    default = objectives.trials_of(objectives.PLAN, 'tiny')
    assert len({t.name for t in default}) == len(default) == 200
    for line in ('spectrum:480 | plain | .1', 'huge:480 | plain | .1 | 0',
                 'random:3 | plain | .1 | 0',
                 'random | some | .1 | 0'):
        with pytest.raises(SystemExit, match='is no'): objectives.trials_of([line], 'tiny')


def test_the_readme_says_what_the_reports_say():
    """Gains of pretrained starts over random weights, which are claims, and those of two other
    starts"""
    gains = pd.read_csv(root/'nbs/runs/folds_gains.csv').query(
        "metric == 'within 0.3 s' and reference == 'random plain'")
    rows = {(row.method.split()[0], row.fraction, row.phase): row for row in gains.itertuples()
            if row.method.endswith('decay.65')}
    points = {key: f'{100*row.gain:.0f}' for key, row in rows.items()}
    of = lambda name, phase, fraction=.1: points[name, fraction, phase]
    said = ' '.join((root/'README.md').read_text(encoding='utf-8').split())
    p = of('spectrum', 'p')
    for sentence in (
            f"{p} percentage points more P and {of('spectrum', 's')} more S",
            f"{of('spectrum', 'p', 1)} and {of('spectrum', 's', 1)} where it learns from all of",
            f"scrambled phases give {of('placebo', 'p')} of the {p} points of P",
            f"with labels gives {of('supervised', 'p')} and {of('supervised', 's')} without any"):
        assert sentence in said, sentence
    verdicts = {key[1:]: row.verdict for key, row in rows.items() if key[0] == 'spectrum'}
    assert (verdicts
            == {(.1, 'p'): 'ahead', (.1, 's'): 'open', (1, 'p'): 'ahead', (1, 's'): 'level'})
    assert all(rows['supervised', .1, phase].verdict == 'ahead' for phase in 'ps')
    assert rows['placebo', .1, 'p'].verdict == 'ahead'


def test_the_study_has_its_arms_folds_and_seeds():
    """The arms that were said beforehand, each pretraining once for all folds, all labels with one
    seed"""
    arms = study_arms('tiny', 1000, ('volpick',))
    assert {'best', 'contrastive', 'reconstruction', 'random', 'synthetic', 'random-3x', 'volpick',
            'volpick-finetuned',
            'placebo', 'best+synthetic', 'random+synthetic'} <= {a.name for a in arms}
    trials = plan_folds(arms)
    before = [t for t in trials if not t.way]
    # three seeds of the best
    assert trials[:len(before)] == before and len(before) == 3 + 5
    of = lambda name, fraction: [t for t in trials if t.way and t.method
                                 == next(a for a in arms if a.name == name).method
                                 and t.fraction == fraction]
    assert all({(t.fold, t.seed) for t in of(name, .1)}
               == {(f, s) for f in range(5) for s in range(3)}
               for name in ('best', 'random', 'placebo'))
    assert ({(t.fold, t.seed) for t in of('best', 1.)} == {(f, 0) for f in range(5)}
            and not of('placebo', 1.))
    assert (of('volpick', .1) == [] and len(of('volpick', 1.)) == 5
            and len(of('best-probe', 1.)) == 1)
    whole = {a.name for a in arms if a.whole and a.folds > 1}
    assert {'best', 'contrastive', 'reconstruction', 'random', 'synthetic'} <= whole
    assert (next(t for t in of('random-3x', .1)).way.budget == 3
            and next(t for t in of('best+synthetic', .1)).way.synthetic == .25)


def test_events_stay_together_and_datasets_are_spread():
    rng = np.random.default_rng(0)
    events = [f'e{k}' for k in rng.integers(60, size=300)]
    datasets = ['a' if int(e[1:]) < 40 else 'b' for e in events]
    part = event_parts(events, datasets, 5)
    assert part.shape == (300,) and set(part) == set(range(10))
    assert all(len({p for p, e in zip(part, events) if e == one}) == 1 for one in set(events))
    for which, most in (('a', 40), ('b', 20)):
        counts = [len({e for e, d, p in zip(events, datasets, part) if d == which and p % 5 == k})
                  for k in range(5)]
        assert sum(counts) == most and max(counts) - min(counts) <= 1
    # nor does the order of the records matter
    order = rng.permutation(300)
    again = event_parts([events[i] for i in order], [datasets[i] for i in order], 5)
    assert (again == part[order]).all()


@pytest.mark.parametrize('folds', [2, 3, 5])
def test_no_event_learns_chooses_and_scores(folds):
    events = [f'e{k//3}' for k in range(150)]
    part, scored = event_parts(events, ['a']*150, folds), []
    for fold in range(folds):
        for fraction, seed in ((.1, 0), (1., 1)):
            sides = fold_sides(events, part, fold, fraction, seed)
            held = [{events[i] for i in rows} for rows in sides]
            assert all(held) and not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
        assert sum(map(len, sides)) == 150
        scored += sides.test.tolist()
    assert sorted(scored) == list(range(150))
    a, b = (fold_sides(events, part, 0, .3, seed).train.tolist() for seed in (0, 1))
    assert a != b                                                    # other seeds, other events


@pytest.fixture(scope='module')
def arrays(tmp_path_factory):
    """40 synthetic records as the study has them; a third of the P onsets automatic, S weak alone,
    ten stations"""
    at = tmp_path_factory.mktemp('study')
    write_synthetic(at/'data', dict(train=24, dev=8, test=8), samples=5000)
    table = write_records(at, 'labelled', open_splits([str(at/'data')]))
    write_records(at, 'unlabelled', open_splits([str(at/'data')], ('train',)))
    there = np.isfinite(table['onset'][:, 0])
    table['status'][there, 0] = MANUAL
    table['status'][np.flatnonzero(there)[::3], 0] = AUTOMATIC
    table['status'][:, 1], table['onset'][:, 3] = 0, 3000.
    table['status'][~there] = ABSENT
    table['station'] = [f'N.{i//4}' for i in range(40)]
    np.save(at/'labelled-table.npy', table)
    out = at/'out'
    out.mkdir()
    for name, part in zip(('waves', 'onsets'), events_part(0)):
        np.save(out/f'events-{name}.npy', part)
    return at


def test_a_store_and_its_folder_make_the_same_arrays(arrays, tmp_path):
    pack([str(arrays/'data')], out=tmp_path/'store')
    write_records(tmp_path, 'labelled', open_splits([str(tmp_path/'store')]))
    a, b = (read_records(where, 'labelled') for where in (arrays, tmp_path))
    for name in ('event', 'trace', 'length'): assert a[1][name].tolist() == b[1][name].tolist()
    assert len(a[0]) == 40
    for k in (0, 17, 39):
        x, y = (r.record(k).waveform for r, _ in (a, b))
        x, y = x - x.mean(0), y - y.mean(0)
        np.testing.assert_allclose(x, y, atol=2e-4*abs(x).max())


def test_splits_that_are_not_asked_for_stay_behind(arrays, tmp_path):
    objectives.prepare(SimpleNamespace(labelled=str(arrays/'data'),
                                       unlabelled=str(other_events(tmp_path)),
                                       out=tmp_path/'arrays'))
    # train and dev
    assert len(np.load(tmp_path/'arrays/labelled-table.npy')) == 32
    assert len(np.load(tmp_path/'arrays/unlabelled-table.npy')) == 5


def other_events(folder):
    "Unlabelled records of events that nobody else names"
    write_synthetic(folder/'more', dict(train=5, dev=2), samples=4500, seed=9)
    table = folder/'more/metadata.csv'
    table.write_text(table.read_text(encoding='utf-8').replace('e0', 'u0'), encoding='utf-8')
    return folder/'more'


def test_scrambled_windows_keep_their_spectra_and_lose_their_onsets():
    x = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0))*.05
    x[:, 2000:2300] *= 100
    y, z, other = (scramble_phases(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert y.shape == x.shape and torch.equal(y, z) and not torch.allclose(y, other, atol=.1)
    a, b = torch.fft.rfft(x, dim=1), torch.fft.rfft(y, dim=1)
    torch.testing.assert_close(a[:, 1:-1].abs(), b[:, 1:-1].abs(), rtol=1e-3, atol=1e-3)
    # components stay related as they were
    cross = lambda f: (f[..., :1]*f[..., 1:].conj())[:, 1:-1]
    torch.testing.assert_close(cross(a), cross(b), rtol=1e-3, atol=2e-2)
    loudest = lambda v: v.square().unfold(1, 256, 256).mean(-1).amax(1)/v.square().mean(1)
    assert (loudest(x) > 10).all() and (loudest(y) < 4).all()


def test_events_in_noise_lie_at_their_onsets(tmp_path):
    waves = np.zeros((2, 6144, 3), np.float16)
    waves[0, 3000:], waves[1, 2500:] = 1, 1
    np.save(tmp_path/'events-waves.npy', waves)
    np.save(tmp_path/'events-onsets.npy', np.array([[3000., 3500.], [2500., np.nan]]))
    noise = torch.randn(4, 4096, 3, generator=torch.Generator().manual_seed(0))*1e-4
    made = DeviceEvents(tmp_path, noise, 9).draw(64, torch.Generator().manual_seed(1))
    first = (made['x'].abs().amax(-1) > .5*made['x'].abs().amax((1, 2))[:, None]).float().argmax(1)
    there = made['p_onset'].isfinite()
    assert made['x'].shape == (64, 4096, 3) and there.sum() > 32
    np.testing.assert_array_equal(first[there], made['p_onset'][there])
    assert torch.equal(made['p_status'] == STATUS.index('picked'), there)
    assert torch.equal(made['s_status'] == ABSENT, made['s_onset'].isnan())


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a recording of a step on a GPU would: at numbers of Python made into tensors, and
    at tensors that Python reads"""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ('aten::lift_fresh', 'aten::_local_scalar_dense', 'aten::nonzero'), name
        return function(*args, **(kwargs or {}))


def draws_of(arrays):
    "What each kind of pretraining and fine-tuning draws its batches with"
    generated = arrays/'out'
    if not (generated/'synthetic-table.npy').exists(): fold_run.make_generated(generated, 50, 0, 1)
    s, cpu = FoldStudy(arrays, generated, steps=4, batch_size=8, device='cpu'), torch.device('cpu')
    records, table = read_records(arrays, 'labelled', cpu)
    trial = FoldTrial(Start('random', study_variants('tiny')['spectrum']),
                      Way('mixed', synthetic=.25))
    draws = {'fine-tuning': fine_windows(trial, s, records, np.arange(24))}
    for name, variant in study_variants('tiny').items():
        draws[name] = pretraining_windows(Start(name, variant, 32), s, 8, cpu)
    augmented = replace(study_variants('tiny')['spectrum'], augment=True)
    return {**draws, 'augmented': pretraining_windows(Start('augmented', augmented, 32), s, 8, cpu)}


def test_a_step_that_is_recorded_draws_its_windows_on_the_device(arrays):
    for name, draw in draws_of(arrays).items():
        generator = torch.Generator().manual_seed(0)
        # a step is recorded after it was taken
        first = draw(generator)
        with NothingFromTheHost(): second = draw(generator)
        x = [b['x'] if isinstance(b, dict) else b for b in (first, second)]
        assert x[0].shape == x[1].shape == (8, 4096, 3) and not torch.equal(*x), name
    with pytest.raises(AssertionError, match='lift_fresh'), NothingFromTheHost():
        torch.tensor([0, 4096])
    with pytest.raises(AssertionError, match='_local_scalar_dense'), NothingFromTheHost():
        torch.zeros(1).item()


def test_a_trial_scores_manual_onsets_apart_from_automatic_ones(arrays):
    """Weak ones never; a dev event chooses the step; the same windows for every picker; whether a
    station was known"""
    s = FoldStudy(arrays, arrays/'out', steps=4, batch_size=4, device='cpu')
    start = study_arms('tiny')[0].start
    said = [finetune_fold(FoldTrial(start, way, .2, 1), s, torch.device('cpu'))
            for way in (Way('some', synthetic=.25), AS_IT_IS)]
    table, rows = np.load(arrays/'labelled-table.npy'), said[0]['onsets']
    sides = fold_sides(table['event'].tolist(),
                       event_parts(table['event'].tolist(), table['dataset'].tolist()), 1, .2)
    held = np.isin(np.arange(40), sides.test)
    expected = [('p', i, STATUS[table['status'][i, 0]])
                for i in np.flatnonzero(held & np.isfinite(table['onset'][:, 0]))]
    assert [(r[0], r[1], r[3]) for r in rows if r[0] == 'p'] == expected
    assert ({r[3] for r in rows if r[0] == 'p'} == {'manual', 'automatic'}
            and not any(r[0] == 's' for r in rows))
    known = set(table['station'][sides.train])
    assert (all(r[4] == (table['station'][r[1]] in known) for r in rows)
            and {r[4] for r in rows} == {0, 1})
    assert (said[0]['p_n'] == (held & (table['status'][:, 0] == MANUAL)).sum()
            and said[0]['s_n'] == 0)
    assert (0 < said[0]['best_step'] <= 4 and np.isfinite(said[0]['dev_loss'])
            and said[1]['dev_loss'] is None)
    assert [r[:5] for r in rows] == [r[:5] for r in said[1]['onsets']]
    assert sorted((r[0], r[1], r[3]) for r in said[0]['picks'] if r[0] == 'p') == sorted(expected)
    assert (len({(r[0], r[1]) for r in said[0]['picks']}) == len(said[0]['picks'])
            and said[0]['steps'] == 4)


def test_a_weak_onset_never_scores(arrays, monkeypatch):
    "Planted: weak onsets in the place of labelled ones would be scored"
    s, start = FoldStudy(arrays, arrays/'out', device='cpu'), study_arms('tiny')[0].start
    real = np.load
    def no_status(path, *args, **kwargs):
        table = real(path, *args, **kwargs)
        if str(path).endswith('labelled-table.npy'):
            table['status'], table['onset'][:, :2] = 0, table['onset'][:, 2:]
        return table
    monkeypatch.setattr(np, 'load', no_status)
    assert finetune_fold(FoldTrial(start, AS_IT_IS), s, torch.device('cpu'))['onsets'] == []


class Burst:
    "P where the vertical becomes loud"
    def logits(self, x):
        loud = (x[..., 0].abs() > 5).float()
        first = torch.nn.functional.max_pool1d(loud[:, None], 41, 1, 20)[:, 0]
        return torch.stack([torch.zeros_like(first), 8*first - 4, torch.full_like(first, -8.)], -1)


def test_picks_an_hour_and_analyst_picks_of_a_stream(tmp_path):
    """Three bursts in half an hour, one of them picked by an analyst; a gap and a missing component
    do not matter"""
    t0, rng = obspy.UTCDateTime('2024-02-28T02:00:00'), np.random.default_rng(0)
    x = rng.normal(0, 20, (2, 180_000))
    for at in (30_000, 90_000, 150_000): x[:, at:at + 30] += 4000
    head = dict(network='XX', station='ABC', sampling_rate=100., starttime=t0)
    stream = obspy.Stream([obspy.Trace(v.round().astype(np.int32), {**head, 'channel': f'HH{c}'})
                           for v, c in zip(x, 'ZN')])
    stream = stream.slice(t0, t0 + 1200) + stream.slice(t0 + 1201)
    stream.write(str(tmp_path/'day.mseed'), format='MSEED')
    (tmp_path/'picks.csv').write_text(
        f'network,station,channel,phase,time\nXX,ABC,HHZ,P,{t0 + 900}\nXX,ABC,HHZ,S,{t0 + 903}\n',
        encoding='utf-8')
    table = write_continuous(tmp_path, [str(tmp_path/'day.mseed')], tmp_path/'picks.csv')
    assert table['length'].tolist() == [120_001, 59_900] and table['scale'][:, 2].tolist() == [0, 0]
    records, table = read_records(tmp_path, 'continuous')
    found = score_continuous(Burst(), records, table,
                             json.loads((tmp_path/'analyst.json').read_text(encoding='utf-8')),
                             {'p': .5, 's': .5})
    assert ([(r['p_picks'], r['p_unconfirmed'], r['s_picks']) for r in found['stretches']]
            == [(2, 1, 0), (1, 1, 0)])
    (station, phase, _, late, top), s_row = found['analyst']
    assert ((station, phase) == ('XX.ABC', 'p') and abs(late) < .3 and abs(top) < .3
            and s_row[1] == 's' and s_row[3] is None)
    (tmp_path/'picks.csv').write_text(
        f'network,station,channel,phase,time\nXX,OLD,HHZ,P,{t0 + 900}\n', encoding='utf-8')
    with pytest.raises(UserError, match='No pick of'):
        write_continuous(tmp_path, [str(tmp_path/'day.mseed')], tmp_path/'picks.csv')


class Ended:
    "A process that is over"
    def __init__(self, code): self.exitcode = code
    def is_alive(self): return False
    def join(self): pass
    def terminate(self): pass


class Here(fold_run.Workers):
    "A trial is done as soon as it is begun; some fail, as often as `fails` says"
    ran, fails = [], {}
    def __init__(self, s, jobs): self.s, self.jobs, self.busy, self.total = s, jobs, {}, 1000.
    def start(self, trial):
        self.ran.append(trial.name)
        code = min(1, self.fails.get(trial.name, 0))
        if code: self.fails[trial.name] -= 1
        else:
            trial.file(self.s.out).parent.mkdir(parents=True, exist_ok=True)
            if not trial.way: (self.s.out/f'pretrained/{trial.name}.safetensors').write_bytes(b'w')
            trial.file(self.s.out).write_text(json.dumps({'process_seconds': 1.}), encoding='utf-8')
        self.busy[Ended(code)] = trial


@pytest.fixture
def here(monkeypatch):
    "Workers without processes"
    monkeypatch.setattr(fold_run, 'Workers', Here)
    monkeypatch.setattr(Here, 'ran', [])
    monkeypatch.setattr(Here, 'fails', {})
    return Here


def few(out):
    return choose_arms(study_arms('tiny', 1000), 'random,best'), FoldStudy(out, out, device='cpu')


def test_a_trial_is_tried_twice_and_the_others_go_on(here, tmp_path, capsys):
    arms, s = few(tmp_path)
    trials = plan_folds(arms, Grid(2, (.1,), (0,)))
    lost = trials[1].name
    here.fails[lost] = 5
    plan = run_fold_trials(trials, s)
    assert ([t.name for t in plan.failed] == [lost] and here.ran.count(lost) == 2
            and len(plan.done) == len(trials) - 1)
    here.ran.clear()
    here.fails.clear()
    # again: the one that failed, and no other
    plan = run_fold_trials(trials, s)
    assert here.ran == [lost] and len(plan.done) == len(trials)
    assert '1 trials to do' in capsys.readouterr().out


def test_what_waits_for_a_pretraining_that_fails_is_left(here, tmp_path):
    arms, s = few(tmp_path)
    trials = plan_folds(arms, Grid(2, (.1,), (0,)))
    here.fails[trials[0].name] = 5
    plan = run_fold_trials(trials, s)
    assert ({t.name for t in plan.todo} == {t.name for t in trials if t.pretraining}
            and len(plan.failed) == 1)
    assert len(plan.done) == 2                                          # the random ones


def test_results_go_home_in_bundles_and_come_back(tmp_path, monkeypatch):
    out = tmp_path/'out'
    for name in ('trials', 'pretrained', 'logs', 'pickers'): (out/name).mkdir(parents=True)
    for k in range(3): (out/f'pretrained/s-{k}.safetensors').write_bytes(bytes([k])*400)
    (out/'trials/t.json').write_text('{}', encoding='utf-8')
    monkeypatch.setattr(fold_run, 'LARGEST', 1400)
    monkeypatch.setattr(fold_run, 'BUNDLES', 2)
    bring_bundles(out, tmp_path/'home', set())
    (out/'pickers/p.safetensors').write_bytes(b'p'*400)
    # again: only what is new
    bring_bundles(out, tmp_path/'home', set())
    files = sorted(f.name for f in (tmp_path/'home').iterdir())
    assert len(files) == 3 and files[0] == 'results.zip'
    assert all(f.stat().st_size <= 1400 for f in (tmp_path/'home').iterdir())
    names = take_bundles(tmp_path/'home', tmp_path/'new')
    assert names == {'pickers/p.safetensors', *(f'pretrained/s-{k}.safetensors' for k in range(3))}
    assert {f.relative_to(tmp_path/'new'): f.read_bytes()
            for f in (tmp_path/'new').rglob('*.*')} == {
        f.relative_to(out): f.read_bytes() for f in out.rglob('*.*')}
    (tmp_path/'few').mkdir()
    # the weights stay at home
    (tmp_path/'home/results.zip').rename(tmp_path/'few/results.zip')
    assert (take_bundles(tmp_path/'few', tmp_path/'newer') == names
            and not (tmp_path/'newer/pretrained').exists())
    # nothing that is at home already
    bring_bundles(tmp_path/'new', tmp_path/'elsewhere', names)
    assert [f.name for f in (tmp_path/'elsewhere').iterdir()] == ['results.zip']
    (tmp_path/'new/pretrained/t.safetensors').write_bytes(b't')
    # under a name that no earlier call used
    bring_bundles(tmp_path/'new', tmp_path/'elsewhere', names)
    assert ({f.name for f in (tmp_path/'elsewhere').iterdir()} - {'results.zip'} != set()
            and not {f.name for f in (tmp_path/'elsewhere').glob('w*')} & set(files))
    for k in range(3, 9): (out/f'pretrained/s-{k}.safetensors').write_bytes(bytes([k])*400)
    bring_bundles(out, tmp_path/'more', names)
    assert len(list((tmp_path/'more').glob('weights-*.zip'))) == 2               # no more than fit
    assert len(take_bundles(tmp_path/'more', tmp_path/'newest')) < len(names) + 6


@pytest.mark.parametrize('words, said', [
    (['--folds', '1', '--out', 'x'], '--folds is 1'), (['--folds', '5'], '--out FOLDER'),
    (['--arms', 'best'], '--arms does nothing without --folds'),
    (['--folds', '5', '--from', 'a=b', '--out', 'x'], '--from does nothing with --folds'),
    (['--folds', '5', '--only', 'all', '--out', 'x'], "--only is 'all'"),
    (['--folds', '5', '--baseline', 'PhaseNet', '--out', 'x'], 'NAME=FILES'),
    (['--folds', '5', '--out', 'x'], 'holds no arrays yet'),
    (['--folds', '5', '--fractions', '2', '--out', 'x'], '--fractions is'),
    (['--folds', '5', '--arrays', 'no/such', '--out', 'x'], 'no folder of arrays')])
def test_mistakes_are_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['study', *words]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count('\n') == 1


def bursts(onsets, samples=9000, device='cpu'):
    "Records of noise, in which P is where the vertical becomes loud; NaN: it never does"
    rng = np.random.default_rng(0)
    x = rng.normal(0, 20, (len(onsets), samples, 3))
    for k, at in enumerate(onsets):
        if np.isfinite(at): x[k, int(at):int(at) + 30, 0] += 4000
    table = np.zeros(len(onsets), [('first', 'i8'), ('length', 'i8'), ('scale', 'f4', 3),
                                   ('onset', 'f8', 4), ('status', 'i1', 2)])
    table['first'], table['length'], table['scale'] = np.arange(len(onsets))*samples, samples, 1.
    table['onset'], table['status'] = np.nan, ABSENT
    table['onset'][:, 0] = onsets
    table['status'][np.isfinite(onsets), 0] = MANUAL
    return DeviceRecords(x.reshape(-1, 3).round().astype(np.int16), table, device), table


def test_windows_around_onsets_have_residuals_and_probabilities():
    """By a picker that is some samples early, or late where the label is wrong by half a second;
    noise has probabilities alone"""
    records, table = bursts([3000., 4500., np.nan])
    # picked half a second before its label
    table['onset'][1, 0] += 50
    said = window_rows(Burst(), records, np.array([0, 1]), 0, table['onset'])
    assert (said.shape == (2, 3, 4) and np.allclose(said[0, :, 0], -.2, atol=.01)
            and np.allclose(said[1, :, 0], -.7, atol=.01))
    assert ((said[..., 1] > .9).all() and (said[..., 2] < .1).all()
            and np.allclose(said[..., 3], said[..., 1], atol=.01))
    quiet = window_rows(Burst(), records, np.array([2]), 2, table['onset'])
    assert np.isnan(quiet[..., 0]).all() and (quiet[..., 1:] < .1).all()
    labels = Labels(table['onset'], table['status'], np.array([7, 8, 9]),
                    np.array([True, False, False]))
    rows = score_onsets(Burst(), records, labels, np.arange(3))
    assert ([row[:5] for row in rows]
            == [['p', 0, 7, 'manual', 1], ['p', 1, 8, 'manual', 0], ['n', 2, 9, 'absent', 0]])
    summed = onset_summary(rows)
    assert (summed['p0.1'], summed['p0.3'], summed['p0.5'], summed['p_n'], summed['p_auc'],
            summed['s_n'], summed['s0.3']) == (0, .5, .5, 2, 1., 0, None)
    assert abs(summed['p_mae'] - .45) < .02 and abs(summed['p_mae0.5'] - .35) < .02


def test_a_summary_counts_manual_onsets_of_its_phase():
    window = lambda late, p: [late, p, .1, p]
    rows = [['p', 0, 0, 'manual', 1, [window(.1, .9), window(-.4, .8)]],
            ['p', 1, 0, 'automatic', 1, [window(5., .9)]*2],
            ['s', 0, 0, 'manual', 1, [window(-3., .2)]*2],
            ['n', 2, 1, 'absent', 0, [[None, .85, .1, .85]]*2]]
    said = onset_summary(rows)
    assert said == {'p0.1': .5, 'p0.3': .5, 'p0.5': 1., 'p_mae': .25, 'p_mae0.5': .25, 'p_n': 1,
                    's0.1': 0., 's0.3': 0., 's0.5': 0., 's_mae': 2., 's_mae0.5': .5, 's_n': 1,
                    'p_auc': .5}


def test_dev_batches_are_the_same_at_every_look(arrays):
    records, table = read_records(arrays, 'labelled')
    for count, sizes in ((70, [32, 32, 6]), (64, [32, 32])):
        parts = dev_batches(records, np.arange(4), count, 3)
        assert ([len(part['x']) for part in parts] == sizes
                and all(len(v) == len(part['x']) for part in parts for v in part.values()))
        whole = torch.cat([part['x'] for part in parts])
        again = torch.cat([part['x'] for part in dev_batches(records, np.arange(4), count, 3)])
        assert torch.equal(whole, again)


def test_the_slowest_trial_of_each_kind_is_known_when_a_study_goes_on(here, tmp_path):
    "What earlier calls took counts when the time is short"
    arms, s = few(tmp_path)
    trials = plan_folds(arms, Grid(2, (.1,), (0,)))
    run_fold_trials(trials, s)
    for took, trial in enumerate(trials, 1):
        trial.file(tmp_path).write_text(json.dumps({'process_seconds': took}), encoding='utf-8')
    plan = fold_run.TrialProgress(trials, s, 60.)
    longest = lambda tuned: max(k for k, t in enumerate(trials, 1) if bool(t.way) == tuned)
    assert (dict(plan.slowest) == {tuned: longest(tuned) for tuned in (False, True)}
            and not plan.todo)


@pytest.mark.parametrize('way, name, events', [(Way('plain'), 'spectrum', False),
                                               (Way('plain'), 'supervised', True),
                                               (Way('mixed', synthetic=.25), 'spectrum', True)])
def test_events_of_the_generator_are_made_where_a_trial_needs_them(way, name, events, tmp_path,
                                                                   monkeypatch):
    asked = []
    monkeypatch.setattr(fold_run, 'make_generated', lambda *args: asked.append(args))
    s = FoldStudy(tmp_path, tmp_path, device='cpu')
    start = Start(name, study_variants('tiny')[name], 400)
    fold_run.begin_folds(s, [FoldTrial(start, way)], 1)
    assert asked == [(tmp_path, 100, 100*events, 1)]


def test_records_of_the_generator_are_made_once(tmp_path):
    fold_run.make_generated(tmp_path, 6, 50)
    files = sorted(tmp_path.iterdir())
    assert ([f.name for f in files]
            == ['events-onsets.npy', 'events-waves.npy', 'synthetic-samples.npy',
                'synthetic-table.npy'])
    before = [f.stat().st_mtime_ns for f in files]
    fold_run.make_generated(tmp_path, 6, 50)
    assert [f.stat().st_mtime_ns for f in files] == before
    (tmp_path/'few').mkdir()
    fold_run.make_generated(tmp_path/'few', 6, 0)
    assert (sorted(f.name for f in (tmp_path/'few').iterdir())
            == ['synthetic-samples.npy', 'synthetic-table.npy'])
    records, table = read_records(tmp_path, 'synthetic')
    assert (len(records) == 6 and (table['length'] == 6144).all()
            and table['first'].tolist() == [6144*k for k in range(6)])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([np.int16, np.int32]), st.data())
def test_packed_samples_are_the_same_to_the_bit(dtype, data):
    "Also steps from the lowest to the highest number, which come round"
    ends = np.iinfo(dtype)
    x = np.array(data.draw(st.lists(st.one_of(st.integers(ends.min, ends.max),
                                              st.sampled_from([ends.min, ends.max, 0, -1, 1])),
                                    max_size=20)), dtype)
    planes = sample_planes(x)
    assert planes.shape == (x.itemsize, len(x)) and planes.dtype == np.uint8
    back = samples_of_planes(planes)
    assert back.dtype == dtype and back.tolist() == x.tolist()


def test_small_steps_need_the_low_byte_alone():
    assert (sample_planes(np.array([0, -1, 0, -2, 0, 127], np.int16)).tolist()
            == [[0]*6, [0, 1, 2, 3, 4, 254]])


def test_packed_arrays_come_back(arrays, tmp_path):
    "Samples, tables and texts; what is there already stays"
    (tmp_path/'in').mkdir()
    for name in ('labelled-samples.npy', 'labelled-table.npy'):
        (tmp_path/'in'/name).write_bytes((arrays/name).read_bytes())
    (tmp_path/'in/analyst.json').write_text('[1]', encoding='utf-8')
    (tmp_path/'in/other.txt').write_text('stays at home', encoding='utf-8')
    size = pack_arrays(tmp_path/'in', tmp_path/'packed')
    files = sorted((tmp_path/'packed').iterdir())
    assert (len(files) == 3
            and size == sum(f.stat().st_size
                            for f in files) < .8*(arrays/'labelled-samples.npy').stat().st_size)
    (tmp_path/'out').mkdir()
    (tmp_path/'out/analyst.json').write_text('[2]', encoding='utf-8')
    unpack_arrays(tmp_path/'packed', tmp_path/'out')
    for name in ('labelled-samples.npy', 'labelled-table.npy'):
        a, b = (np.load(folder/name) for folder in (arrays, tmp_path/'out'))
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    assert (tmp_path/'out/analyst.json').read_text(encoding='utf-8') == '[2]'

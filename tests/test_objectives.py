"The benchmark of objectives: its plan, its folds, that records of `test` stay behind, and what the study adds"
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from seismodel.core import UserError
from seismodel.data.pack import pack
from seismodel.data.sources import write_synthetic

file = Path(__file__).resolve().parents[1]/'benchmarks/objectives.py'
spec = importlib.util.spec_from_file_location('objectives', file)
objectives = sys.modules['objectives'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objectives)


def test_the_plan_is_worked_off_in_its_order():
    variants, starts = objectives.models('tiny')
    trials = objectives.trials_of(['spectrum:480 random joint:80:1 | plain decay.65 | .1 1 | 0 2',
                                   'spectrum:480 | plain | .1 | 0 1'], variants, starts)
    names = [t.name for t in trials]
    assert len(names) == len(set(names)) == 2 + 3*2*2*2 + 1
    assert names[:3] == ['spectrum-480k-s0', 'joint-80k-s1', 'spectrum-480k-s0--plain--0.1--0']
    assert names[-1] == 'spectrum-480k-s0--plain--0.1--1'
    assert all(t.pretraining in trials for t in trials if t.thousands)
    again = objectives.trials_of(['random | plain | .1 | 0 | 0 2', 'spectrum:1:2 | | |'], variants, starts)
    assert [t.name for t in again] == ['random--plain--0.1--0', 'random--plain--0.1--0--2', 'spectrum-1k-s2']
    study = objectives.trials_of(objectives.whole_plan(['study:600', 'random | low | 1 | 0']), variants, starts)
    assert {t.thousands for t in study if not t.way} == {600, 300} and study[-1].way == 'low'
    assert all(t.pretraining in study for t in study if t.thousands)
    default = objectives.trials_of(objectives.PLAN, variants, starts)
    assert len({t.name for t in default}) == len(default) > 100
    for line in ('spectrum:480 | plain | .1', 'huge:480 | plain | .1 | 0', 'random:3 | plain | .1 | 0',
                 'random | some | .1 | 0'):
        with pytest.raises(SystemExit, match='is no'): objectives.trials_of([line], variants, starts)


def test_events_stay_together_and_datasets_are_spread():
    rng = np.random.default_rng(0)
    event = [f'e{k}' for k in rng.integers(60, size=300)]
    dataset = ['a' if int(e[1:]) < 40 else 'b' for e in event]
    fold = objectives.folds_of(event, dataset)
    assert fold.shape == (300,) and set(fold) == set(range(5))
    assert all(len({f for f, e in zip(fold, event) if e == one}) == 1 for one in set(event))
    for which, most in (('a', 8), ('b', 4)):
        counts = [len({e for e, d, f in zip(event, dataset, fold) if d == which and f == k}) for k in range(5)]
        assert sum(counts) == 5*most and max(counts) - min(counts) <= 1
    table = np.zeros(300, [('event', 'U8'), ('fold', 'i1')])
    table['event'], table['fold'] = event, fold
    some, more = (objectives.rows_to_learn(table, 2, f) for f in (.1, 1.))
    assert set(some) < set(more) and set(more) == set(np.flatnonzero(fold != 2))
    assert len(set(table['event'][some])) == 5                       # a tenth of 48, rounded up


def test_records_of_test_stay_behind(tmp_path):
    write_synthetic(tmp_path/'data', dict(train=5, dev=2, test=4), samples=4500)
    pack([str(tmp_path/'data')], out=tmp_path/'store')
    objectives.prepare(Namespace(labelled=tmp_path/'store', unlabelled=tmp_path/'store', data=tmp_path/'arrays',
                                 every_split=False, peer=None, packed=None))
    for kind, count in (('labelled', 7), ('unlabelled', 5)):
        table, samples = (np.load(tmp_path/f'arrays/{kind}-{part}.npy') for part in ('table', 'samples'))
        assert len(table) == count and samples.shape == (4500*count, 3) and samples.dtype == np.int16
    records, table = objectives.records_of(tmp_path/'arrays', 'labelled', 'cpu')
    store = objectives.Store(tmp_path/'store')
    kept = np.flatnonzero(store.index['split'] != store.manifest['splits'].index('test'))
    for i, k in enumerate(kept):
        x, whole = records.record(i).waveform, store.record(k).waveform
        np.testing.assert_allclose(x - x.mean(0), whole - whole.mean(0), rtol=1e-3, atol=1e-3*abs(whole).max())
        np.testing.assert_allclose(records.record(i)[1:3], store.record(k)[1:3], rtol=1e-6)


def test_a_difference_is_paired_and_over_events():
    def rows(shift):
        onset = lambda e, k: ['p', 3*e + k, e, 'manual', 1, [[.1 + shift*(e % 2), 1, 0, 1], [.1, 1, 0, 1]]]
        return [{'fold': 0, 'onsets': [onset(e, k) for e in range(20) for k in range(3)]}]
    mean, low, high = objectives.difference(rows(0.), rows(1.), 'p')
    assert mean == 25. and low < 25. < high                          # half of the places of every second event
    assert objectives.difference(rows(0.), rows(0.), 'p') == [0., 0., 0.]
    assert objectives.difference(rows(0.), [], 'p') is None


@pytest.fixture(scope='module')
def arrays(tmp_path_factory):
    "All splits of 40 synthetic records, as the study has them"
    at = tmp_path_factory.mktemp('study')
    write_synthetic(at/'data', dict(train=24, dev=8, test=8), samples=6000)
    pack([str(at/'data')], out=at/'store')
    objectives.prepare(Namespace(labelled=at/'store', unlabelled=at/'store', data=at/'arrays', every_split=True, peer=None,
                                 packed=at/'packed'))
    return at


def test_packed_arrays_are_the_arrays(arrays, tmp_path):
    "Also where a step from sample to sample does not fit into 16 bits"
    objectives.unpack_arrays(arrays/'packed')
    for name in ('labelled-samples', 'labelled-table', 'unlabelled-samples'):
        a, b = (np.load(arrays/f'{kind}/{name}.npy') for kind in ('arrays', 'packed'))
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    assert len(np.load(arrays/'packed/labelled-table.npy')) == 40
    x = np.random.default_rng(0).integers(-2**15, 2**15, (500, 3)).astype(np.int16)
    x[:4] = [[-2**15]*3, [2**15 - 1]*3, [-2**15]*3, [0]*3]
    np.save(tmp_path/'x-samples.npy', x)
    objectives.pack_arrays(tmp_path, tmp_path/'p')
    objectives.unpack_arrays(tmp_path/'p')
    np.testing.assert_array_equal(np.load(tmp_path/'p/x-samples.npy'), x)


def test_no_event_learns_chooses_and_scores(arrays):
    table = np.load(arrays/'arrays/labelled-table.npy')
    scored = []
    for fold in range(5):
        held, dev = np.flatnonzero(table['fold'] == fold), objectives.rows_of_dev(table, fold)
        for fraction, seed in ((.1, 0), (1., 1)):
            learn = objectives.rows_to_learn(table, fold, fraction, seed, dev=True)
            parts = [set(table['event'][rows].tolist()) for rows in (held, dev, learn)]
            assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert len(held) + len(dev) + len(learn) == len(table)
        scored += held.tolist()
    assert sorted(scored) == list(range(40))                                    # each once
    a, b = (objectives.rows_to_learn(table, 0, .3, seed, dev=True).tolist() for seed in (0, 1))
    assert a != b                                                               # other seeds, other events


def test_scrambled_windows_keep_their_spectra_and_lose_their_onsets():
    x = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0))*.05
    x[:, 2000:2300] *= 100
    y, z, other = (objectives.scramble(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert y.shape == x.shape and torch.equal(y, z) and not torch.allclose(y, other, atol=.1)
    a, b = torch.fft.rfft(x, dim=1), torch.fft.rfft(y, dim=1)
    torch.testing.assert_close(a[:, 1:-1].abs(), b[:, 1:-1].abs(), rtol=1e-3, atol=1e-3)
    cross = lambda f: (f[..., :1]*f[..., 1:].conj())[:, 1:-1]                    # components stay related as they were
    torch.testing.assert_close(cross(a), cross(b), rtol=1e-3, atol=2e-2)
    loudest = lambda v: v.square().unfold(1, 256, 256).mean(-1).amax(1)/v.square().mean(1)
    assert (loudest(x) > 10).all() and (loudest(y) < 4).all()
    assert not torch.allclose(y[0], objectives.scramble(x[:1], torch.Generator().manual_seed(3))[0], atol=.1)


def test_events_in_noise_lie_at_their_onsets(tmp_path):
    waves = np.zeros((2, 6144, 3), np.float16)
    waves[0, 3000:], waves[1, 2500:] = 1, 1
    np.save(tmp_path/'events.npy', waves)
    np.save(tmp_path/'events-onsets.npy', np.array([[3000., 3500.], [2500., np.nan]]))
    noise = torch.randn(4, 4096, 3, generator=torch.Generator().manual_seed(0))*1e-4
    made = objectives.Events(tmp_path, noise, 9, torch.device('cpu')).draw(64, torch.Generator().manual_seed(1))
    first = (made['x'].abs().amax(-1) > .5*made['x'].abs().amax((1, 2))[:, None]).float().argmax(1)
    there = made['p_onset'].isfinite()
    assert made['x'].shape == (64, 4096, 3) and there.sum() > 32
    np.testing.assert_array_equal(first[there], made['p_onset'][there])
    assert torch.equal(made['p_status'] == objectives.STATUS.index('picked'), there)
    assert torch.equal(made['s_status'] == objectives.ABSENT, made['s_onset'].isnan())


def test_a_trial_scores_manual_onsets_apart_from_automatic_ones(arrays, tmp_path):
    "Weak ones never; a dev event chooses the step; the same windows for every picker; whether a station was known"
    folder = tmp_path/'arrays'
    folder.mkdir()
    for kind in ('labelled', 'unlabelled'):
        np.save(folder/f'{kind}-samples.npy', np.load(arrays/f'arrays/{kind}-samples.npy'))
        table = np.load(arrays/f'arrays/{kind}-table.npy')
        found = np.isfinite(table['onset'][:, 0])
        table['status'][found, 0] = objectives.MANUAL
        table['status'][np.flatnonzero(found)[::3], 0] = objectives.AUTOMATIC
        table['status'][:, 1], table['onset'][:, 3] = 0, 3000.                   # S: weak ones alone
        table['status'][~found] = objectives.ABSENT
        table['station'] = [f'N.{i % 7}' for i in range(len(table))]
        np.save(folder/f'{kind}-table.npy', table)
    (tmp_path/'pretrained').mkdir()
    waves, onsets = objectives.events_part(0)                                    # as the processes of `make_events` do
    np.save(tmp_path/'events.npy', waves.astype(np.float16))
    np.save(tmp_path/'events-onsets.npy', onsets)
    args = Namespace(size='tiny', small=True, data=folder, out=tmp_path, best=True)
    said = [objectives.finetune(objectives.Trial('random', way=way, fold=1), args, torch.device('cpu'))
            for way in ('plain+synthetic', 'as-it-is')]
    table, rows = np.load(folder/'labelled-table.npy'), said[0]['onsets']
    held = table['fold'] == 1
    assert [(r[0], r[1], r[3]) for r in rows if r[0] == 'p'] == [('p', i, objectives.STATUS[table['status'][i, 0]])
                                                                for i in np.flatnonzero(held & np.isfinite(table['onset'][:, 0]))]
    assert {r[3] for r in rows if r[0] == 'p'} == {'manual', 'automatic'} and not any(r[0] == 's' for r in rows)
    learn = objectives.rows_to_learn(table, 1, 1., dev=True)
    assert all(r[4] == (table['station'][r[1]] in set(table['station'][learn])) for r in rows)
    assert said[0]['p_n'] == (held & (table['status'][:, 0] == objectives.MANUAL)).sum() and said[0]['s_n'] == 0
    assert 0 < said[0]['best_step'] <= 8 and np.isfinite(said[0]['dev_loss']) and said[1]['dev_loss'] is None
    assert [r[:5] for r in rows] == [r[:5] for r in said[1]['onsets']]
    (tmp_path/'trials').mkdir()
    for k, row in enumerate(said): (tmp_path/f'trials/{k}.json').write_text(json.dumps(row), encoding='utf-8')
    assert len(objectives.write_tables(tmp_path)) == 2
    for change in ({'p0.3': 'x'}, {'onsets': [3]}, {'start': None}):
        (tmp_path/'trials/1.json').write_text(json.dumps(said[1] | change), encoding='utf-8')
        with pytest.raises(UserError, match=f"1.json': field '{next(iter(change))}' .*it is made again"): objectives.write_tables(tmp_path)


def test_results_go_home_in_bundles_and_come_back(tmp_path, monkeypatch):
    out = tmp_path/'out'
    for name in ('trials', 'pretrained', 'logs', 'pickers'): (out/name).mkdir(parents=True)
    for k in range(3): (out/f'pretrained/s-{k}.safetensors').write_bytes(bytes([k])*400)
    (out/'trials/t.json').write_text('{}', encoding='utf-8')
    monkeypatch.setattr(objectives, 'LARGEST', 1400)
    monkeypatch.setattr(objectives, 'BUNDLES', 2)
    objectives.bring(out, tmp_path/'home', set())
    (out/'pickers/p.safetensors').write_bytes(b'p'*400)
    objectives.bring(out, tmp_path/'home', set())                                # again: only what is new
    files = sorted(f.name for f in (tmp_path/'home').iterdir())
    assert files == ['results.zip', 'weights-1.zip', 'weights-2.zip']
    assert all(f.stat().st_size <= 1400 for f in (tmp_path/'home').iterdir())
    names = objectives.take(tmp_path/'home', tmp_path/'new')
    assert names == {'pickers/p.safetensors', *(f'pretrained/s-{k}.safetensors' for k in range(3))}
    assert {f.relative_to(tmp_path/'new'): f.read_bytes() for f in (tmp_path/'new').rglob('*.*')} == {
        f.relative_to(out): f.read_bytes() for f in out.rglob('*.*')}
    (tmp_path/'few').mkdir()
    (tmp_path/'home/results.zip').rename(tmp_path/'few/results.zip')             # the weights stay at home
    assert objectives.take(tmp_path/'few', tmp_path/'newer') == names and not (tmp_path/'newer/pretrained').exists()
    objectives.bring(tmp_path/'new', tmp_path/'elsewhere', names)                # nothing that is at home already
    assert [f.name for f in (tmp_path/'elsewhere').iterdir()] == ['results.zip']
    for k in range(3, 9): (out/f'pretrained/s-{k}.safetensors').write_bytes(bytes([k])*400)
    objectives.bring(out, tmp_path/'more', names)
    assert len(list((tmp_path/'more').glob('weights-*.zip'))) == 2               # no more than fit
    assert len(objectives.take(tmp_path/'more', tmp_path/'newest')) < len(names) + 6

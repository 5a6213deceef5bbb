"The benchmark of objectives: its plan, its folds, and that records of `test` stay behind"
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

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
    objectives.prepare(Namespace(labelled=tmp_path/'store', unlabelled=tmp_path/'store', data=tmp_path/'arrays'))
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
        return [{'fold': 0, 'onsets': [['p', e, .1 + shift*(e % 2), .1] for e in range(20) for _ in range(3)]}]
    mean, low, high = objectives.difference(rows(0.), rows(1.), 'p')
    assert mean == 25. and low < 25. < high                          # half of the places of every second event
    assert objectives.difference(rows(0.), rows(0.), 'p') == [0., 0., 0.]
    assert objectives.difference(rows(0.), [], 'p') is None

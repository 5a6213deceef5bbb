"""Evaluation: the published rule, SeisBench's pickers through the same door, missing labels,
intervals"""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from seisbench.data import WaveformDataset
from seisbench.models import EQTransformer, PhaseNet
from seisbench.models.base import WaveformModel
from seisbench.util import ClassifyOutput, Pick, PickList

from seismodel.cli import main
from seismodel.picking.evaluation import (curves, found_within, labelled, pick_benchmark, predict,
                                          score_records, summarise, targets, task1_targets,
                                          task23_targets, window_around)
from seismodel.statistics import auc, best_threshold, bootstrap, mcc
from seismodel.finetuning.heads import Picker
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.models.pretraining import build, preset
from seismodel.core import UserError


def opened(folder):
    return WaveformDataset(folder, component_order='ZNE', dimension_order='NCW', sampling_rate=100)


def ours():
    torch.manual_seed(0)
    return SeisModelPicker.of(Picker(build(preset('contrastive-tiny').model)).eval())


@pytest.fixture
def data(quakes_folder): return opened(quakes_folder)


class Oracle(WaveformModel):
    """Knows the records by heart: the probability of P is 1 at the sample that the vertical marks
    with 1000, of S at -1000"""
    def __init__(self, late=0):
        super().__init__(component_order='ZNE', sampling_rate=100, output_type='array',
                         in_samples=3001, pred_sample=(0, 3001), labels='NPS')
        self.late = late

    def forward(self, x):
        p = torch.stack([x[:, 0] > 500, x[:, 0] < -500], 1).float().roll(self.late, -1)
        return torch.cat([1 - p.sum(1, keepdim=True), p], 1)

    def annotate_batch_post(self, batch, piggyback, argdict): return batch.transpose(1, 2)

    def classify_aggregate(self, annotations, argdict):
        return ClassifyOutput('oracle',
                              picks=PickList(p for c in 'PS' for p in self.picks_from_annotations(
            annotations.select(channel=f'*_{c}'), .3, c)))


def marked(records):
    "Silent records with a mark at each onset"
    for k, (m, x) in enumerate(records):
        x = np.zeros_like(x)
        for column, value in (('trace_p_arrival_sample', 1000.),
                              ('trace_s_arrival_sample', -1000.)):
            if np.isfinite(m[column]):
                m[column] = float(round(m[column]))
                x[0, int(m[column])] = value
        yield m, x


@settings(max_examples=200, deadline=None)
@given(st.integers(10, 9000), st.sampled_from([1000, 3000]),
       st.one_of(st.none(), st.floats(0, 8999)), st.integers(0, 99))
def test_window_holds_its_onset(npts, length, onset, seed):
    if onset is not None: onset = min(onset, npts - 1)
    start, end = window_around(np.random.RandomState(seed), npts, length, onset, 100)
    assert 0 <= start < end <= npts
    if (start, end) != (0, npts):
        assert end - start == length and (onset is None or start + 99 <= onset <= end - 100 + 1)


def test_tasks_by_the_rule(data):
    one, two = task1_targets(data), task23_targets(data)
    table = data.metadata.set_index('trace_name')
    assert (len(one[one.trace_type == 'earthquake']) == 40
            and (one.end_sample - one.start_sample == 3000).all())
    for row in one[one.trace_type == 'noise'].itertuples():
        p = table.trace_p_arrival_sample[row.trace_name]
        assert np.isnan(p) or row.end_sample <= p
    assert (two.end_sample - two.start_sample == 1000).all()
    for row in two.itertuples():
        onset = table.loc[row.trace_name,
                          ['trace_p_arrival_sample', 'trace_s_arrival_sample']].astype(float)
        assert (onset.between(row.start_sample, row.end_sample - 1)).sum() == 1
        assert onset[f'trace_{row.phase_label.lower()}_arrival_sample'] == row.phase_onset
    pd.testing.assert_frame_equal(one, task1_targets(data))


class Table:
    "A data set of which only the metadata are read: records of 40 s with these onsets of P and S"
    def __init__(self, *onsets):
        p, s = zip(*onsets)
        self.metadata = pd.DataFrame({'trace_name': [f't{k}' for k in range(len(p))],
                                      'trace_chunk': '', 'split': 'test', 'trace_npts': 4000,
                                      'trace_sampling_rate_hz': 100., 'trace_P_arrival_sample': p,
                                      'trace_S_arrival_sample': s})


@pytest.mark.parametrize('p, s, found', [
    (1020., 1050., ''),         # ten seconds fit before S less half a second, and P is not in them
    # half a second to the next window's half second, and two samples to begin at
    (1020., 1119., ''), (1020., 1121., 'PS'),
    (2000., 3000., 'PS'), (900., 3949., 'PS'), (900., 3951., 'P'), (3960., 3990., '')])
def test_windows_of_one_onset(p, s, found):
    "Half a second away from the ends, which lie half a second away from the other onset"
    two = task23_targets(Table((p, s)))
    assert ''.join(two.phase_label if len(two) else ()) == found
    for row in two.itertuples() if len(two) else ():
        assert (row.start_sample <= row.phase_onset < row.end_sample
                and row.end_sample - row.start_sample == 1000)


def test_missing_labels_are_not_clean(tmp_path, write_dataset, quake_records):
    def records():
        for k, (m, x) in enumerate(quake_records(24)):
            if k % 2 and m['trace_category'] == 'earthquake': m['trace_p_arrival_sample'] = np.nan
            yield {**m, 'trace_p_status': 'none'
                   if np.isnan(m['trace_p_arrival_sample']) else 'manual',
                   'trace_s_status': 'none'
                   if np.isnan(m['trace_s_arrival_sample']) else 'manual'}, x
    data = opened(write_dataset(tmp_path/'d', records()))
    noise = data.metadata.trace_category.eq('noise').to_numpy()
    assert ((labelled(data.metadata, 'P') == (np.arange(24) % 2 == 0) | noise).all()
            and labelled(data.metadata, 'S').all())
    one, two = task1_targets(data), task23_targets(data)
    assert one[one.trace_type == 'noise'].apply(
        lambda r: r.clean == (noise[r.trace_idx] or r.trace_idx % 2 == 0), axis=1).all()
    assert (two.clean == (two.trace_idx % 2 == 0)).all() and not two.clean.all()
    records = score_records(ours(), data)
    # a phase without label is no row
    assert len(records[records.kind == 'P']) == 12 and len(records[records.kind == 'S']) == 20


def test_what_is_labelled_in_a_table_without_categories():
    """By the benchmark's rule a record without any pick is noise, and one with a pick of the other
    phase alone says nothing"""
    nan = np.nan
    table = pd.DataFrame({'trace_P_arrival_sample': [1., 2., nan, nan],
                          'trace_S_arrival_sample': [5., nan, 6., nan]})
    assert labelled(table, 'P').tolist() == [True, True, False, True]
    assert labelled(table, 'S').tolist() == [True, False, True, True]
    table['trace_category'] = ['earthquake', 'earthquake', 'earthquake', 'Noise']
    assert labelled(table, 'P').tolist() == [True, True, False, True]
    table['trace_category'] = 'earthquake'
    assert labelled(table, 'S').tolist() == [True, False, True, False]


def test_targets_are_made_once(data, tmp_path):
    first = targets(data, tmp_path)
    # as a published table
    (tmp_path/'task1.csv').write_text(first[0].drop(columns='clean').head(3).to_csv(index=False),
                                      encoding='utf-8')
    again = targets(data, tmp_path)
    assert len(again[0]) == 3 and again[0].clean.all() and len(again[1]) == len(first[1])
    (tmp_path/'task1.csv').write_text('a,b\n1,2\n', encoding='utf-8')
    with pytest.raises(UserError, match="no column 'trace_name'.*made again"):
        targets(data, tmp_path)


@pytest.mark.parametrize('make', [ours, lambda: PhaseNet(phases='PSN').eval(),
                                  lambda: EQTransformer().eval()],
                         ids=['ours', 'PhaseNet', 'EQTransformer'])
def test_every_picker_through_the_same_door(make, data, tmp_path):
    model = make()
    c = curves(model, 1e-9*torch.randn(2, 3, model.in_samples))
    assert (c.shape == (2, model.in_samples, 3) and c.isfinite().all() and (c >= 0).all()
            and (c <= 1).all())
    table = pick_benchmark(model, data, tmp_path, draws=20)
    assert len(table) == 13 and (table.n > 0).all() and table.value.notna().all()
    few = data.copy()
    few.filter(np.arange(len(data)) < 8)
    records = score_records(model, few)
    assert set(records.kind) == {'P', 'S', 'noise'} and len(summarise(records, draws=20)) == 7


def test_an_oracle_scores_full_marks(tmp_path, write_dataset, quake_records):
    "And one that is 0.2 s late is 0.2 s late, in every figure"
    data = opened(write_dataset(tmp_path/'d', marked(quake_records(48))))
    table = pick_benchmark(Oracle(), data, tmp_path/'t',
                           draws=20).set_index(['task', 'metric'])['value']
    assert (table['1 detection', 'AUC'] == table['2 identification', 'AUC']
            == table['2 identification', 'MCC'] == 1)
    assert (table['3 onset P', 'RMSE (s)'] == table['3 onset S', 'MAE (s)'] == 0
            and table['3 onset P', 'within 0.1 s'] == 1)
    late = pick_benchmark(Oracle(20), data, tmp_path/'t',
                          draws=20).set_index(['task', 'metric'])['value']
    for phase in 'PS':
        assert (late[f'3 onset {phase}', 'RMSE (s)'] == pytest.approx(.2)
                and late[f'3 onset {phase}', 'MAE (s)'] == pytest.approx(.2))
        assert (late[f'3 onset {phase}', 'within 0.1 s'] == 0
                and late[f'3 onset {phase}', 'within 0.3 s'] == 1)
    records = score_records(Oracle(20), data)
    np.testing.assert_allclose(records[records.kind != 'noise'].residual, .2)
    assert (records[records.kind == 'noise'].picks == 0).all()
    shares = summarise(records, draws=20).set_index(['trace_dataset', 'kind', 'metric'])['value']
    assert (shares['all', 'P', 'found within 0.3 s'] == 1
            and shares['all', 'S', 'found within 0.1 s'] == 0
            and shares['all', 'noise', 'disturbed'] == 0)


def test_context_does_not_move_the_target(data):
    "More samples around a target change what the model sees, not where the answer is counted from"
    table = task23_targets(data).head(12)
    class Peak(Oracle):
        def forward(self, x):
            p = (x[:, :1].abs() == x[:, :1].abs().amax(-1, keepdim=True)).float()
            return torch.cat([1 - p, p, 0*p], 1)
    inside = predict(Peak(), data, table, context=1000)
    loudest = [table.start_sample[i] + np.abs((x := data.get_waveforms(data.get_idx_from_trace_name(
        table.trace_name[i]))[0])[int(table.start_sample[i]):int(table.end_sample[i])]
               - x.mean()).argmax() for i in table.index]
    np.testing.assert_allclose(inside.p_sample_pred, np.trunc(loudest), atol=1)
    wide = predict(ours(), data, table, context=4096)
    assert ((wide.p_sample_pred >= np.trunc(table.start_sample))
            & (wide.p_sample_pred <= table.end_sample)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(-5, 5).map(lambda v: round(v, 2))), min_size=2,
                max_size=12))
def test_threshold_is_the_best_of_all(pairs):
    p, scores = pd.Series([p for p, _ in pairs]), pd.Series([s for _, s in pairs])
    t = best_threshold(p, scores)
    if p.nunique() < 2 or scores.nunique() < 2: assert t == 0
    else:
        assert (mcc(p, scores > t)
                == pytest.approx(max(mcc(p, scores > s) for s in np.unique(scores)[:-1])))


def test_bootstrap_draws_events():
    "Ten events of a hundred equal rows are ten, not a thousand"
    values = np.random.default_rng(0).standard_normal(10)
    table = pd.DataFrame({'event': np.repeat(range(10), 100), 'x': np.repeat(values, 100)})
    value, low, high = bootstrap(lambda t: t.x.mean(), table, draws=400)
    assert value == pytest.approx(values.mean())
    assert .6 < (high - low)/(2*1.96*values.std()/10**.5) < 1.3
    assert np.isnan(bootstrap(lambda t: t.x.mean(), table.iloc[:0])).all()
    assert np.isnan(auc([True, True], [1., 2.])) and np.isnan(mcc([True, True], [True, False]))
    assert found_within(.3)(pd.DataFrame({'residual': [.1, -.3, .31, np.nan]})) == .5


def test_summary_has_a_line_for_whole_records():
    "Records of one component stay in `all`, and out of `all with three components`"
    records = pd.DataFrame({'trace_name': list('abcd'), 'event': '', 'trace_dataset': list('xxyy'),
                            'components': ['ZNE', 'Z', 'ZNE', 'ZNE'],
                            'kind': ['P', 'P', 'P', 'noise'], 'residual': [.05, np.nan, .2, np.nan],
                            'picks': [1, 0, 2, 1]})
    table = summarise(records, draws=20).set_index(['trace_dataset', 'kind', 'metric'])
    assert (table.n['all', 'P', 'found within 0.1 s'] == 3
            and table.n['all with three components', 'P', 'found within 0.1 s'] == 2)
    assert (table.value['all with three components', 'P', 'found within 0.3 s'] == 1
            and table.value['all', 'noise', 'disturbed'] == 1)
    assert (table.value['x', 'P', 'found within 0.1 s'] == .5
            and ('x', 'noise', 'disturbed') not in table.index)


def test_on_real_records(real_data):
    folder = next((f for f in real_data if f.name == 'realquakes'), None)
    if folder is None: pytest.skip('no labelled records here')
    data = opened(folder)
    one, two = task1_targets(data), task23_targets(data)
    assert len(one) >= len(data) and {'earthquake', 'noise'} == set(one.trace_type)
    assert 0 < (~two.clean).sum() < len(two) and len(two) > 1000
    few = data.test()
    few.filter(np.arange(len(few)) % 12 == 0)
    records = score_records(ours(), few)
    assert (len(records)
            == (few.metadata.trace_p_status.ne('none').sum() + few.metadata.trace_s_status.ne(
        'none').sum() + few.metadata.trace_category.eq('noise').sum()))


@pytest.mark.parametrize('order, rows',
                         [('Z12', [0, 1, 2]), ('21Z', [2, 1, 0]), ('Z12H', [0, 1, 2, 0])])
def test_horizontals_one_and_two_are_scored_like_north_and_east(tmp_path, write_dataset,
                                                                quake_records, order, rows):
    """The same records under other letters: the same scores, and the data set's own table keeps its
    letters"""
    records = list(quake_records(12))
    plain = opened(write_dataset(tmp_path/'zne', ((dict(m), x) for m, x in records)))
    coded = opened(write_dataset(tmp_path/'coded',
                                 ((m | {'trace_component_order': order}, x[rows]) for m,
                                  x in records)))
    model, tables = ours(), [task23_targets(plain)]
    with torch.no_grad(): model.picker.head.out.weight.mul_(8.)
    want, got = (predict(model, data, tables[0]) for data in (plain, coded))
    assert len(got) == len(want) > 5
    for column in ('score_detection', 'score_p_or_s', 'p_sample_pred', 's_sample_pred'):
        np.testing.assert_allclose(got[column], want[column], rtol=1e-5, atol=1e-5)
    want, got = (score_records(model, data) for data in (plain, coded))
    assert len(got) == len(want) > 5 and want['picks'].sum() > 20
    pd.testing.assert_frame_equal(got, want, check_exact=False, atol=1e-4)
    assert set(coded.metadata['trace_component_order']) == {order}


def test_several_data_sets_are_scored_together(tmp_path, quake_records, write_dataset, monkeypatch,
                                               capsys):
    "Counts add up, the summary has each set, and events of one name are different ones"
    monkeypatch.setattr('seismodel.picking.evaluation.bootstrap', lambda metric, table,
                        draws=0: (metric(table), 0., 0.))
    monkeypatch.setattr('seismodel.picking.seisbench_model.open_picker', lambda name: Oracle())
    for name, n in (('a', 24), ('b', 16)):
        (tmp_path/name).mkdir()
        write_dataset(tmp_path/name, marked(quake_records(n)))
    sets = {name: [str(tmp_path/part) for part in name] for name in ('a', 'b', 'ab')}
    for name, data in sets.items():
        words = [word for folder in data for word in ('--data', folder)]
        assert main(['evaluate', 'x', *words, '--out', str(tmp_path/f'out-{name}'), '--device',
                     'cpu']) == 0
    table = {name: {t: pd.read_csv(tmp_path/f'out-{name}/{t}.csv')
                    for t in ('tasks', 'records', 'matches', 'summary')} for name in sets}
    a, b, ab = (table[name] for name in sets)
    for t in a: assert ab[t].columns.tolist() == a[t].columns.tolist()
    for t, count in (('tasks', 'n'), ('matches', 'onsets')):
        assert ab[t][count].tolist() == (a[t][count] + b[t][count]).tolist()
    assert (len(ab['records']) == len(a['records']) + len(b['records'])
            and set(ab['records']['trace_dataset']) == {'a', 'b'})
    assert (set(ab['summary']['trace_dataset']) == {'all', 'a', 'b'}
            and set(a['summary']['trace_dataset']) == {'all'})
    assert set(b['records']['event']) < set(a['records']['event'])
    assert (ab['records']['event'].nunique()
            == a['records']['event'].nunique() + b['records']['event'].nunique())
    assert ((tmp_path/'out-ab/targets/b/task1.csv').exists()
            and (tmp_path/'out-a/targets/task1.csv').exists())

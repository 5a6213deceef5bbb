"The tables of the study by folds, with numbers worked out by hand"
import numpy as np
import pandas as pd
import pytest

from seismodel.core import UserError
from seismodel.study.arms import FoldTrial, Grid, choose_arms, study_arms
from seismodel.study.fold_report import (REPORTS, analyst_table, arm_overview, detection_table,
                                         gain_table, hour_table, pick_table,
                                         progress_table, read_reports, repeat_published, said_gain,
                                         station_table, write_reports)
from seismodel.study.paired import SHARES

ONE = dict(method='a', fraction=.1)


def onsets_of(method, seed, residual, fraction=.1, events=20):
    "Windows of an arm; every second station is new"
    return pd.DataFrame([dict(method=method, fraction=fraction, seed=seed, fold=0, phase=phase,
                              record=e, event=e, status='manual', known=e % 2,
                              residual_0=residual(e), residual_1=residual(e), p_0=.9, p_1=.8)
                         for e in range(events) for phase in 'ps'])


def test_picks_an_hour_are_means_over_trials():
    rows = [dict(**ONE, fold=k, instrument='i', hours=2., p_picks=p, s_picks=s, p_unconfirmed=u,
                 s_unconfirmed=1)
            for k, (p, s, u) in enumerate(((4, 2, 1), (8, 6, 3)))]
    said, = hour_table(pd.DataFrame(rows)).to_dict('records')
    assert (said
            == {**ONE, 'instrument': 'i', 'hours': 2., 'trials': 2, 'picks': 5.,
                'unconfirmed': 1.5})
    assert not len(hour_table(pd.DataFrame()))


def test_an_analyst_pick_is_found_or_near_the_highest_probability():
    rows = [dict(**ONE, station=station, event=1, phase='p', residual=late, highest=top)
            for station, late, top in (('X', .1, .5), ('X', np.nan, -.6), ('Y', np.nan, -.5),
                                       ('Y', .2, np.nan))]
    said, = analyst_table(pd.DataFrame(rows)).to_dict('records')
    assert (said == {**ONE, 'phase': 'p', 'picks': 2, 'trials': 4, 'found': .5, 'highest_near': .5}
            and not len(analyst_table(pd.DataFrame())))


def test_false_picks_are_counted_in_noise():
    "Three records of noise, half an hour together, one of them with two picks"
    noise = pd.DataFrame([dict(**ONE, seed=0, fold=0, phase='n', record=r, event=r, status='absent',
                               known=1, residual_0=np.nan, picks=n, seconds=600.)
                          for r, n in ((1, 0), (2, 2), (3, 0))])
    picks = pd.concat([onsets_of('a', 0, lambda e: 0. if e < 15 else 9.), noise])
    said = pick_table(picks).set_index(['phase', 'metric'])
    assert (said.value['n', 'disturbed'] == pytest.approx(1/3)
            and said.value['n', 'false picks an hour'] == pytest.approx(4.))
    assert said.onsets['n', 'disturbed'] == 3 and said.value['p', 'within 0.1 s'] == .75


def test_known_and_new_stations_stand_apart():
    said = station_table(onsets_of('a', 0, lambda e: 0. if e % 2 else 9.)).set_index(
        ['stations', 'phase', 'metric']).value
    assert said['known', 'p', 'within 0.1 s'] == 1 and said['new', 'p', 'within 0.1 s'] == 0


def test_a_published_picker_stands_beside_every_seed_and_fraction():
    onsets = pd.concat([onsets_of('theirs', 0, float, fraction=0.),
                        *(onsets_of('a', s, float, fraction=f) for s in (0, 1) for f in (.1, 1.))])
    found = repeat_published(onsets, 'theirs')
    counts = found[found.method == 'theirs'].groupby(['fraction', 'seed']).size()
    assert counts.to_dict() == {(f, s): 40 for f in (.1, 1.) for s in (0, 1)} and len(found) == 8*40


def test_detection_needs_onsets_and_noise_of_the_same_fold():
    assert not len(detection_table(onsets_of('a', 0, float)))


def test_a_study_that_has_run_in_part_says_so(tmp_path):
    """One of two trials of random weights; a start that gains a fifth in every event; the others
    are not run"""
    arms, grid = choose_arms(study_arms('tiny', 1000), 'random,best'), Grid(1, (.1,), (0, 1))
    random, best = (next(a for a in arms if a.name == name) for name in ('random', 'best'))
    trial = FoldTrial(random.start, random.way, .1, 0, 0)
    trial.file(tmp_path).parent.mkdir(parents=True)
    trial.file(tmp_path).write_text('{}', encoding='utf-8')
    done = progress_table(arms, grid, tmp_path).set_index('arm')
    assert done.done.to_dict() == {'random': 1, 'best': 0} and set(done.trials) == {2}
    onsets = pd.concat([*(onsets_of(random.method, s, lambda e: 9.) for s in (0, 1)),
                        *(onsets_of(best.method, s, lambda e: 0.) for s in (0, 1))])
    gains = gain_table(onsets, arms)
    row = gains.set_index(['method', 'phase', 'metric', 'reference']).loc[
        best.method, 'p', 'within 0.3 s', random.method]
    assert ((row.gain, row.verdict) == (1., 'ahead')
            and said_gain(row) == '+100.0 [+100.0, +100.0] ahead')
    with pytest.raises(UserError, match='no report'): read_reports(tmp_path)
    gains.to_csv(tmp_path/'folds_gains.csv', index=False)
    done.reset_index().to_csv(tmp_path/'folds_arms.csv', index=False)
    station_table(onsets).query("stations == 'new'").to_csv(tmp_path/'folds_scores.csv',
                                                            index=False)
    reports = read_reports(tmp_path)
    assert list(reports) == list(REPORTS) and not len(reports['picks'])
    shown = arm_overview(reports, arms, .1)
    assert shown.trials[random.title] == '1 of 2' and shown.trials[best.title] == 'not run'
    assert (shown['P within 0.1 s'].to_dict() == {random.title: '0.0', best.title: '100.0'}
            and shown.windows[random.title] == '')
    assert (shown['P gain, 0.3 s'][best.title] == said_gain(row)
            and shown['P gain, 0.3 s'][random.title] == '')


def test_picks_are_reported_by_shares_alone():
    "Errors of picks mean nothing where a pick may be missing"
    onsets = onsets_of('a', 0, float).assign(picks=1, seconds=60.)
    assert set(pick_table(onsets).metric) == set(SHARES)


def test_some_arms_stand_beside_the_placebo_and_the_labels_of_the_generator():
    "A placebo that is right in every event leaves nothing for the start that gains as much"
    arms = study_arms('tiny', 1000)
    method = {a.name: a.method for a in arms}
    right = ('placebo', 'best', 'synthetic')
    onsets = pd.concat([onsets_of(method[name], s, lambda e, near=name in right: 0. if near else 9.)
                        for name in (*right, 'random', 'contrastive') for s in (0, 1)])
    found = gain_table(onsets, arms).query("phase == 'p' and metric == 'within 0.3 s'")
    gains = found.set_index(['reference', 'method']).gain
    assert gains[method['placebo']].to_dict() == {method['best']: 0., method['contrastive']: -1.}
    assert gains[method['synthetic']].to_dict() == {method['best']: 0.}
    assert gains[method['random']][method['best']] == 1.


def test_reports_are_written_where_there_is_something_to_say(tmp_path):
    arms, grid = choose_arms(study_arms('tiny', 1000), 'random,best'), Grid(1, (.1,), (0,))
    onsets_of(arms[0].method, 0, float).to_csv(tmp_path/'onsets.csv.gz', index=False)
    onsets_of(arms[0].method, 0, float).to_csv(tmp_path/'picks.csv.gz', index=False)
    for name in ('stretches', 'analyst'):
        (tmp_path/f'{name}.csv').write_text('method,fraction\n', encoding='utf-8')
    found = write_reports(tmp_path, arms, grid)
    assert set(found) == set(REPORTS)
    assert (sorted(f.name for f in tmp_path.glob('folds_*'))
            == sorted(f'folds_{n}.csv' for n in REPORTS if len(found[n])))
    assert ({'arms', 'scores', 'stations', 'picks'} <= {n for n in REPORTS if len(found[n])}
            <= set(REPORTS) - {'continuous', 'analyst'})

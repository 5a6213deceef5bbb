"Several events in a window: labels with several peaks, zones without a label, augmentation that moves all, swarms, matching one to one"
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seismodel.finetuning.heads import in_zones, label_curves, pick_loss, pick_targets
from seismodel.picking.matching import WindowLabels, match_picks, score_windows, summarise_matches
from seismodel.signals.augment import add_gaps, random_window, shift_time, stack_events
from seismodel.signals.several_events import MOST_EVENTS, pad_events, synthesize_swarm

nan = math.nan


def swarm_batch(windows=6, samples=600, seed=0):
    "A batch whose waveforms are zero but for the value k + 1 at the P of event k and -(k + 1) at its S"
    rng = np.random.default_rng(seed)
    x, events = np.zeros((windows, samples, 3), np.float32), []
    for w in range(windows):
        times = np.sort(rng.choice(np.arange(10, samples - 10), 2*rng.integers(1, 4), replace=False)).reshape(-1, 2).astype(float)
        for k, (p, s) in enumerate(times): x[w, int(p)], x[w, int(s)] = k + 1, -k - 1
        events.append(times)
    padded = torch.from_numpy(pad_events(events))
    return dict(x=torch.from_numpy(x), valid=torch.tensor([[0, samples]]*windows), events=padded, unlabelled=torch.full((windows, 2, 1, 2), nan),
                p_onset=padded[:, 0, 0].clone(), s_onset=padded[:, 0, 1].clone(), p_status=torch.full((windows,), 4), s_status=torch.full((windows,), 4))


def values_at(batch):
    "What the waveform holds at the onsets: of each event P, and S"
    at = batch['events'].nan_to_num(0).long().flatten(1)
    found = batch['x'][..., 0].gather(1, at).view(batch['events'].shape)
    return found[batch['events'].isfinite()]


@pytest.mark.parametrize('change', [lambda b, g: shift_time(b, g, 150), lambda b, g: random_window(b, g, 400)])
def test_onsets_move_with_their_samples(change):
    "After a shift or a cut each onset that is left lies where its sample lies, and those outside are gone"
    batch = swarm_batch()
    moved = change(batch, torch.Generator().manual_seed(0))
    there = moved['events'].isfinite()
    assert 0 < there.sum() < batch['events'].isfinite().sum()
    assert (values_at(moved) != 0).all()
    assert there.sum() == (moved['x'][..., 0] != 0).sum()


def test_zones_move_with_their_samples():
    "A zone covers the same samples of the record after a cut"
    batch = swarm_batch(1)
    batch['x'][0, 200:260] = 7.
    batch['unlabelled'] = torch.tensor([[[[200., 260.]], [[200., 260.]]]])
    for seed in range(8):
        moved = random_window(batch, torch.Generator().manual_seed(seed), 300)
        inside = in_zones(moved['unlabelled'], 300)
        assert inside.shape == (1, 300, 2)
        assert torch.equal(inside[0, :, 0], moved['x'][0, :, 0] == 7.) and torch.equal(inside[..., 0], inside[..., 1])


def test_a_gap_takes_onsets_and_leaves_a_zone():
    "Onsets in a gap are gone, a zone is where they were, and the rest of the window keeps its labels"
    batch = swarm_batch(40)
    batch['x'] += torch.randn(batch['x'].shape, generator=torch.Generator().manual_seed(1))
    new = add_gaps(batch, torch.Generator().manual_seed(0), share=1., most=.4)
    lost = batch['events'].isfinite() & new['events'].isnan()
    assert lost.any() and torch.equal(new['p_status'], batch['p_status'])
    labels, known = pick_targets(new, 600)
    assert known.shape == (40, 600, 2)
    for w, k, phase in lost.nonzero().tolist(): assert not known[w, int(batch['events'][w, k, phase]), phase]
    assert 0 < (~known).float().mean() < .5
    assert (labels[..., 1:][~known] == 0).all()


def test_stacked_windows_have_the_events_of_both():
    "Each window gets another one's samples at the other one's onsets, in order of time; none gets its own twice"
    batch = swarm_batch(20)
    stacked = stack_events(batch, torch.Generator().manual_seed(0), share=1., quieter_db=0.)
    assert stacked['events'].shape == (20, MOST_EVENTS, 2)
    for w in range(20):
        own, all_of_them = batch['events'][w], stacked['events'][w]
        added = {tuple(e) for e in all_of_them[all_of_them.isfinite().all(1)].tolist()} - {tuple(e) for e in own[own.isfinite().all(1)].tolist()}
        theirs = [o for o in range(20) if o != w and {tuple(e) for e in batch['events'][o][batch['events'][o].isfinite().all(1)].tolist()} == added]
        assert len(theirs) == 1
    assert (values_at(stacked) != 0).all()


def test_a_full_window_stays_alone():
    "Where two windows have more events than there is room for, nothing is added and nothing is lost"
    batch = swarm_batch(4)
    batch['events'] = torch.arange(4*MOST_EVENTS*2, dtype=torch.float).view(4, MOST_EVENTS, 2)
    stacked = stack_events(batch, torch.Generator().manual_seed(0), share=1.)
    assert torch.equal(stacked['events'], batch['events']) and torch.equal(stacked['x'], batch['x'])


def test_nobody_knows_where_one_of_two_did_not_look():
    "A stacked window has a phase labelled only where both have"
    batch = swarm_batch(10)
    batch['s_status'][::2] = 0
    stacked = stack_events(batch, torch.Generator().manual_seed(0), share=1.)
    assert (stacked['s_status'][::2] == 0).all()
    assert (stacked['p_status'] == 4).all() and (stacked['s_status'] == 0).sum() > 5


def test_one_event_is_what_it_was():
    "Labels and loss of a batch with one event per window are those of the batch without `events`, bit for bit"
    batch = swarm_batch(5)
    one = {**batch, 'events': torch.full((5, MOST_EVENTS, 2), nan)}
    one['events'][:, 0] = torch.stack([batch['p_onset'], batch['s_onset']], -1)
    old = {k: v for k, v in batch.items() if k not in ('events', 'unlabelled')}
    (labels, known), (want, both) = pick_targets(one, 600), pick_targets(old, 600)
    assert labels.shape == want.shape == (5, 600, 3) and torch.equal(labels, want)
    logits = torch.randn(5, 600, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pick_loss(logits, labels, known), pick_loss(logits, want, both))


def test_second_event_is_no_noise():
    "The gradient raises P at the second onset where it is labelled, lowers it where it is not, and is silent in a zone"
    events = torch.tensor([[[100., 150.], [300., 350.]]])
    base = dict(p_onset=torch.tensor([100.]), s_onset=torch.tensor([150.]))
    zone = torch.full((1, 2, 1, 2), nan)
    zone[0, 0, 0] = torch.tensor([250., 400.])
    def push(batch):
        z = torch.zeros(1, 512, 3, requires_grad=True)
        g, = torch.autograd.grad(pick_loss(z, *pick_targets(base | batch, 512)), z)
        return -g[0, 300]
    assert push({'events': events})[1] > 0
    assert push({})[1] < 0
    silent = push({'unlabelled': zone})
    torch.testing.assert_close(silent[0], silent[1])               # P and noise are one class: S alone is told apart
    assert silent[2] < 0


def test_bumps_of_one_phase_do_not_add_up():
    "Two P half a second apart: no label above 1, and probabilities sum to 1"
    y = label_curves(torch.tensor([[100., 130., nan]]), torch.tensor([[nan, nan, nan]]), 256)
    assert y.shape == (1, 256, 3)
    assert y.max() <= 1 and torch.allclose(y.sum(-1), torch.ones(1, 256))
    assert (y[0, [100, 130], 1] > .99).all()
    assert .7 < y[0, 115, 1] < .8                                  # as far down as one bump is there


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=4), st.lists(st.integers(0, 200), max_size=4))
@example([100, 128], [125, 155])
def test_matching_is_the_best_there_is(picks, onsets):
    "As many pairs as any pairing has, and of those the smallest sum of distances"
    i, j = match_picks(np.array(picks, float), np.array(onsets, float), 30.)
    assert len(set(i)) == len(set(j)) == len(i)
    few, many = (picks, onsets) if len(picks) <= len(onsets) else (onsets, picks)
    best = (0, 0.)
    for order in permutations(range(len(many)), len(few)):
        away = [abs(few[a] - many[b]) for a, b in enumerate(order)]
        pairs = [d for d in away if d <= 30]
        best = max(best, (len(pairs), -sum(pairs)))
    away = [abs(picks[a] - onsets[b]) for a, b in zip(i, j)]
    assert (len(away), -sum(away)) == best and all(d <= 30 for d in away)


def test_measures():
    "Counted by hand: two windows, one event missed, two false picks, one of them in a zone"
    labels = [WindowLabels(np.array([[100., 200.], [500., 600.]]), ((), ()), 1000), WindowLabels(np.empty((0, 2)), (((0, 300),), ()), 1000)]
    picks = [{'P': np.array([105., 900.]), 'S': np.array([200., 610.])}, {'P': np.array([50.]), 'S': np.array([])}]
    table = summarise_matches(score_windows(picks, labels, (.3,)), 2000/360_000).set_index('phase')
    assert table.loc['P', ['onsets', 'precision', 'recall', 'F1', 'recall_first', 'recall_later']].tolist() == [2, .5, .5, .5, 1., 0.]
    assert table.loc['P', 'false_per_hour'] == pytest.approx(180.)
    assert table.loc['S', ['precision', 'recall', 'median']].tolist() == pytest.approx([1., 1., .05])


def test_swarms_hold_what_they_say():
    "Two to five events; energy rises at each P; the same window whatever else is made with it"
    swarm = synthesize_swarm(range(8), samples=4096)
    count = np.isfinite(swarm.events[..., 0]).sum(1)
    assert swarm.events.shape == (8, MOST_EVENTS, 2) and 2 <= count.min() and count.max() <= 5
    assert np.isfinite(swarm.waveforms).all()
    p, s = swarm.events[..., 0], swarm.events[..., 1]
    assert (s[np.isfinite(s)] > p[np.isfinite(s)]).all()
    first = p[:, 0].astype(int)
    rise = [np.abs(np.diff(x[t:t + 50], axis=0)).mean()/np.abs(np.diff(x[t - 100:t], axis=0)).mean() for x, t in zip(swarm.waveforms, first)]
    assert np.median(rise) > 1.5

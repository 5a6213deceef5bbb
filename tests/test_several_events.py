"""Several events in a window: labels with several peaks, zones without a label, augmentation that
moves all, swarms, matching one to one"""
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seismodel.data.pack import pack
from seismodel.data.sources import SyntheticSource, open_source
from seismodel.data.store_reader import Store
from seismodel.data.windows import WindowDataset
from seismodel.finetuning.heads import (Picker, found, in_zones, label_curves, pick_loss,
                                        pick_targets)
from seismodel.models.pretraining import build, preset
from seismodel.picking.evaluation import picks_of
from seismodel.picking.matching import (WindowLabels, match_picks, match_records, score_windows,
                                        summarise_matches)
from seismodel.signals.records import WINDOW
from seismodel.signals.augment import add_gaps, random_window, shift_time, stack_events
from seismodel.signals.several_events import MOST_EVENTS, pad_events, synthesize_swarm
from seismodel.training.distributed import WholeBatchDraws

nan = math.nan


def swarm_batch(windows=6, samples=600, seed=0):
    """A batch whose waveforms are zero but for the value k + 1 at the P of event k and -(k + 1) at
    its S"""
    rng = np.random.default_rng(seed)
    x, events = np.zeros((windows, samples, 3), np.float32), []
    for w in range(windows):
        times = np.sort(rng.choice(np.arange(10, samples - 10), 2*rng.integers(1, 4),
                                   replace=False)).reshape(-1, 2).astype(float)
        for k, (p, s) in enumerate(times): x[w, int(p)], x[w, int(s)] = k + 1, -k - 1
        events.append(times)
    padded = torch.from_numpy(pad_events(events))
    return dict(x=torch.from_numpy(x), valid=torch.tensor([[0, samples]]*windows), events=padded,
                unlabelled=torch.full((windows, 2, 1, 2), nan),
                p_onset=padded[:, 0, 0].clone(), s_onset=padded[:, 0, 1].clone(),
                p_status=torch.full((windows,), 4), s_status=torch.full((windows,), 4))


def values_at(batch):
    "What the waveform holds at the onsets: of each event P, and S"
    at = batch['events'].nan_to_num(0).long().flatten(1)
    found = batch['x'][..., 0].gather(1, at).view(batch['events'].shape)
    return found[batch['events'].isfinite()]


@pytest.mark.parametrize('change',
                         [lambda b, g: shift_time(b, g, 150), lambda b,
                          g: random_window(b, g, 400)])
def test_onsets_move_with_their_samples(change):
    """After a shift or a cut each onset that is left lies where its sample lies, and those outside
    are gone"""
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
        assert (torch.equal(inside[0, :, 0], moved['x'][0, :, 0] == 7.)
                and torch.equal(inside[..., 0], inside[..., 1]))


def test_a_gap_takes_onsets_and_leaves_a_zone():
    """Onsets in a gap are gone, a zone is where they were, and the rest of the window keeps its
    labels"""
    batch = swarm_batch(40)
    batch['x'] += torch.randn(batch['x'].shape, generator=torch.Generator().manual_seed(1))
    new = add_gaps(batch, torch.Generator().manual_seed(0), share=1., most=.4)
    lost = batch['events'].isfinite() & new['events'].isnan()
    assert lost.any() and torch.equal(new['p_status'], batch['p_status'])
    labels, known = pick_targets(new, 600)
    assert known.shape == (40, 600, 2)
    for w, k, phase in lost.nonzero().tolist():
        assert not known[w, int(batch['events'][w, k, phase]), phase]
    assert 0 < (~known).float().mean() < .5
    assert (labels[..., 1:][~known] == 0).all()


def test_stacked_windows_have_the_events_of_both():
    """Each window gets another one's samples at the other one's onsets, in order of time; none gets
    its own twice"""
    batch = swarm_batch(20)
    stacked = stack_events(batch, torch.Generator().manual_seed(0), share=1., quieter_db=0.)
    assert stacked['events'].shape == (20, MOST_EVENTS, 2)
    for w in range(20):
        own, all_of_them = batch['events'][w], stacked['events'][w]
        added = ({tuple(e) for e in all_of_them[all_of_them.isfinite().all(1)].tolist()}
                 - {tuple(e) for e in own[own.isfinite().all(1)].tolist()})
        theirs = [o for o in range(20) if o != w
                  and {tuple(e)
                       for e in batch['events'][o][batch['events'][o].isfinite().all(1)].tolist()}
                  == added]
        assert len(theirs) == 1
    assert (values_at(stacked) != 0).all()


def test_a_full_window_stays_alone():
    """Where two windows have more events than there is room for, nothing is added and nothing is
    lost"""
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
    """Labels and loss of a batch with one event per window are those of the batch without `events`,
    bit for bit"""
    batch = swarm_batch(5)
    one = {**batch, 'events': torch.full((5, MOST_EVENTS, 2), nan)}
    one['events'][:, 0] = torch.stack([batch['p_onset'], batch['s_onset']], -1)
    old = {k: v for k, v in batch.items() if k not in ('events', 'unlabelled')}
    (labels, known), (want, both) = pick_targets(one, 600), pick_targets(old, 600)
    assert labels.shape == want.shape == (5, 600, 3) and torch.equal(labels, want)
    logits = torch.randn(5, 600, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pick_loss(logits, labels, known), pick_loss(logits, want, both))


def test_second_event_is_no_noise():
    """The gradient raises P at the second onset where it is labelled, lowers it where it is not,
    and is silent in a zone"""
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
    # P and noise are one class: S alone is told apart
    torch.testing.assert_close(silent[0], silent[1])
    assert silent[2] < 0


def test_bumps_of_one_phase_do_not_add_up():
    "Two P half a second apart: no label above 1, and probabilities sum to 1"
    y = label_curves(torch.tensor([[100., 130., nan]]), torch.tensor([[nan, nan, nan]]), 256)
    assert y.shape == (1, 256, 3)
    assert y.max() <= 1 and torch.allclose(y.sum(-1), torch.ones(1, 256))
    assert (y[0, [100, 130], 1] > .99).all()
    # as far down as one bump is there
    assert .7 < y[0, 115, 1] < .8


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
    labels = [WindowLabels(np.array([[100., 200.], [500., 600.]]), ((), ()), 1000),
              WindowLabels(np.empty((0, 2)), (((0, 300),), ()), 1000)]
    picks = [{'P': np.array([105., 900.]), 'S': np.array([200., 610.])},
             {'P': np.array([50.]), 'S': np.array([])}]
    table = summarise_matches(score_windows(picks, labels, (.3,)), 2000/360_000).set_index('phase')
    assert table.loc['P', ['onsets', 'precision', 'recall', 'F1', 'recall_first',
                           'recall_later']].tolist() == [2, .5, .5, .5, 1., 0.]
    assert table.loc['P', 'false_per_hour'] == pytest.approx(180.)
    assert (table.loc['S', ['precision', 'recall', 'median']].tolist()
            == pytest.approx([1., 1., .05]))


def test_missed_onsets_and_hours_of_records():
    "One of four onsets found: F1 is 2/5; a false pick in an hour is one an hour"
    labels = [WindowLabels(np.array([[100., nan], [200., nan], [300., nan], [400., nan]]))]
    assert labels[0].samples == WINDOW
    table = summarise_matches(score_windows([{'P': np.array([100.]), 'S': np.array([])}], labels,
                                            (.3,)), 1.)
    assert table.set_index('phase').loc['P', 'F1'] == .4
    hour = [WindowLabels(np.empty((0, 2)), ((), ()), 360_000)]
    table = match_records([{'P': np.array([7.]), 'S': np.array([])}], hour)
    assert set(table.set_index('phase').loc[['P'], 'false_per_hour']) == {1.}


def test_swarms_hold_what_they_say():
    "Two to five events; energy rises at each P; the same window whatever else is made with it"
    swarm = synthesize_swarm(range(8), samples=4096)
    count = np.isfinite(swarm.events[..., 0]).sum(1)
    assert swarm.events.shape == (8, MOST_EVENTS, 2) and 2 <= count.min() and count.max() <= 5
    assert np.isfinite(swarm.waveforms).all()
    p, s = swarm.events[..., 0], swarm.events[..., 1]
    assert (s[np.isfinite(s)] > p[np.isfinite(s)]).all()
    first = p[:, 0].astype(int)
    rise = [np.abs(np.diff(x[t:t + 50], axis=0)).mean()/np.abs(np.diff(x[t - 100:t], axis=0)).mean()
            for x, t in zip(swarm.waveforms, first)]
    assert np.median(rise) > 1.5


# what a record holds at the P of its first event, its second, its third; negative at S
MARKS = 300., 500., 700.

def marked_records(rates=(100., 50.), samples=6000):
    """Records with one to three events, whose samples say which onset they are, and zones; at two
    rates"""
    rng = np.random.default_rng(0)
    for k in range(8):
        rate, count = rates[k % 2], 1 + k % 3
        x = rng.standard_normal((3, samples)).astype(np.float32)
        row = {'trace_name': f'r{k}', 'source_id': f'e{k}', 'split': 'train', 'trace_npts': samples,
               'trace_sampling_rate_hz': rate,
               'trace_component_order': 'ZNE', 'trace_category': 'earthquake',
               'trace_S_unlabelled_samples': '100:150 3000:3100' if k % 3 == 1 else ''}
        for n, (p, s) in enumerate(
            np.sort(rng.choice(np.arange(500, 5500, 40), 2*count, replace=False)).reshape(-1, 2)):
            for phase, at, size in (('P', p, MARKS[n]), ('S', s, -MARKS[n])):
                # a P was picked, but not of its own event
                if (k, n, phase) == (5, 0, 'P'): continue
                x[0, at] = size
                row[f"trace_{phase}{n + 1 if n else ''}_arrival_sample"] = at
        yield row, x


@pytest.fixture(scope='module')
def marked(tmp_path_factory, write_dataset):
    "A data set with several events in a record, and the store that is packed from it without loss"
    folder = tmp_path_factory.mktemp('several')
    write_dataset(folder/'data', marked_records())
    pack([folder/'data'], folder/'store', dtype='float32')
    return [open_source(folder/name, 'train') for name in ('data', 'store')]


def test_all_onsets_reach_a_batch(marked):
    "Each lies where its sample lies, those of a table, those of a store alike; none is missing"
    batches = [WindowDataset([source], 40, seed=3).batch(range(40)) for source in marked]
    for name in ('events', 'unlabelled', 'p_onset', 'p_status', 's_status', 'record'):
        torch.testing.assert_close(*(b[name] for b in batches), rtol=0, atol=0, equal_nan=True)
    batch = batches[0]
    assert batch['events'].shape == (40, 3, 2) and batch['unlabelled'].shape == (40, 2, 2, 2)
    at, x = batch['events'], batch['x'][..., 0]
    # those at 100 Hz have their very samples
    even = [r % 2 == 0 for r in batch['record'].tolist()]
    seen = 0
    for w in np.flatnonzero(even):
        for p, s in at[w].tolist():
            if p == p: assert x[w, int(p)] > 5
            if s == s: assert x[w, int(s)] < -5
        assert at[w].isfinite().sum() == (x[w].abs() > 5).sum()
        seen += int(at[w].isfinite().sum())
    assert seen > 45
    assert (batch['p_status'] >= 2).all()


def test_a_store_says_what_the_data_set_says(marked):
    "Records, fingerprints and the widths of a batch; a changed second onset is another data set"
    data, store = marked
    for k in range(8):
        a, b = data.record(k), store.record(k)
        np.testing.assert_array_equal(a.all_events(), b.all_events())
        assert a.zones == b.zones and len(a.all_events()) == 1 + k % 3
    assert data.most(4096) == store.most(4096) == (3, 2) and store.most(100)[0] < 3
    assert store.store.manifest['version'] == 2 and store.store.verify() == []
    assert store.subset([0, 3, 6]).most(4096) == (1, 0)
    one = store.subset([0, 1, 3])
    torch.testing.assert_close(
        torch.from_numpy(one.windows(np.array([1]), np.array([.5]), 4096).events),
                               torch.from_numpy(
        store.windows(np.array([1]), np.array([.5]), 4096).events[:, :2]), equal_nan=True)
    before = data.fingerprint()
    data.arrivals['last'][-1] += 1
    assert data.fingerprint() != before
    data.arrivals['last'][-1] -= 1


def test_targets_see_every_event(marked):
    """The benchmark's windows are drawn around all onsets, so that one of noise has none of a
    second event; a zone makes a phase unknown"""
    data, _ = marked
    from seismodel.data.sources import open_dataset
    for k, (row, npts, arrivals, known) in enumerate(picks_of(open_dataset(data.data.path))):
        want = sorted((t, phase) for event in data.record(k).all_events() for t,
                      phase in zip(event, 'PS') if t == t)
        assert [(t, phase) for t, phase, _ in arrivals] == want
        assert known['P'] and known['S'] == (k % 3 != 1)


def test_one_event_a_record_is_what_it_was(quakes_folder, tmp_path):
    "A store of version 1 without a file more, and a batch without events and zones"
    pack([quakes_folder], tmp_path/'store')
    store = Store(tmp_path/'store')
    assert store.manifest['version'] == 1 and not (tmp_path/'store/arrivals.npy').exists()
    batch = WindowDataset([open_source(tmp_path/'store')], 8).batch(range(8))
    assert not {'events', 'unlabelled'} & set(batch)


def test_a_damaged_table_of_arrivals_is_named(marked, tmp_path):
    "A missing file, and another bit"
    import shutil
    folder = tmp_path/'store'
    shutil.copytree(marked[1].store.folder, folder)
    raw = bytearray((folder/'arrivals.npy').read_bytes())
    raw[-1] ^= 1
    (folder/'arrivals.npy').write_bytes(raw)
    with pytest.raises(ValueError, match='arrivals.npy is damaged'): Store(folder)
    (folder/'arrivals.npy').unlink()
    with pytest.raises(ValueError, match='arrivals.npy is missing'): Store(folder)


def test_the_second_event_of_the_generator_is_labelled():
    "A window with two synthetic events has both"
    batch = WindowDataset([SyntheticSource()], 96).batch(range(96))
    two = batch['events'].isfinite().any(2).all(1)
    assert batch['events'].shape == (96, 2, 2) and 3 <= two.sum() < 40
    labels, _ = pick_targets(batch, 4096)
    for w in two.nonzero().flatten().tolist():
        for k in (0, 1):
            there = batch['events'][w, :, k]
            assert all(labels[w, int(t), k + 1] > .4 for t in there[there.isfinite()].tolist())


def test_stacked_pairs_do_not_depend_on_ranks():
    "Two ranks with half of the batch each have the windows of one with all of it"
    batch = swarm_batch(8)
    whole = stack_events(batch, torch.Generator().manual_seed(0), share=.6)
    assert 0 < (whole['x'] != batch['x']).any(2).any(1).sum() < 8
    for rank in (0, 1):
        half = {k: v[4*rank:4*rank + 4] for k, v in batch.items()}
        with WholeBatchDraws(rank, 2):
            part = stack_events(half, torch.Generator().manual_seed(0), share=.6)
        for k in part:
            torch.testing.assert_close(part[k], whole[k][4*rank:4*rank + 4], rtol=0, atol=0,
                                       equal_nan=True)


def test_no_onset_where_nothing_was_added():
    "An onset of the other window that would lie in the zeros beside a short record is left out"
    batch = swarm_batch(2)
    batch['valid'] = torch.tensor([[150, 300], [0, 600]])
    batch['x'][0, :150] = batch['x'][0, 300:] = 0
    batch['events'][0] = nan
    batch['events'][1, :3] = torch.tensor([[100., 200.], [250., 350.], [400., 500.]])
    stacked = stack_events(batch, torch.Generator().manual_seed(0), share=1.)
    found = stacked['events'][0]
    assert found[found.isfinite()].tolist() == [200., 250.]
    assert not stacked['x'][0, 300:].any() and not stacked['x'][0, :150].any()


def test_a_peak_at_any_event_counts():
    "The measure of training: the highest peak is right at the second event, too"
    z = torch.zeros(2, 600, 3)
    z[:, 400, 1] = z[:, 450, 2] = 9.
    events = torch.tensor([[[100., 150.], [410., 440.]], [[100., 150.], [nan, nan]]])
    share = found(z, events)
    assert (share['p_found'].item(), share['s_found'].item()) == (.5, .5)
    assert found(z, events[:, 0])['p_found'] == 0


@pytest.mark.parametrize('name', ['Picker', 'PhaseNet', 'EQTransformer'])
def test_every_model_learns_every_event(name):
    """The loss of a picker and of a baseline changes with the second event and with a zone, and not
    with an unlabelled one"""
    torch.manual_seed(0)
    if name == 'Picker': model = Picker(build(preset('contrastive-tiny').model)).eval()
    else:
        from seismodel.study.baselines import fresh_baseline
        model = fresh_baseline(name).eval()
    batch = dict(x=torch.randn(2, 1024, 3), p_onset=torch.full((2,), 200.),
                 s_onset=torch.full((2,), 300.), p_status=torch.full((2,), 4),
                 s_status=torch.full((2,), 4))
    events = torch.tensor([[[200., 300.], [600., 700.]]]).repeat(2, 1, 1)
    zone = torch.full((2, 2, 1, 2), nan)
    zone[:, 0] = torch.tensor([550., 900.])
    with torch.no_grad(): loss = lambda **more: model({**batch, **more}).loss.item()
    one, two = loss(), loss(events=events)
    assert one != two and loss(unlabelled=zone) not in (one, two)
    assert loss(events=torch.where(events > 500, nan, events)) == pytest.approx(one, rel=1e-6)

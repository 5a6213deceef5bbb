"Noise from the records themselves, synthetic events in it, and the recipe of augmentations"
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from seismodel.signals import augment
from seismodel.signals.augment import Augmentation, fine_augment
from seismodel.data.windows import WindowDataset
from seismodel.data.prefetch import amplitudes
from seismodel.signals.noise import EventsInNoise, mirrored, noise_bank, quiet
from seismodel.data.sources import open_source
from seismodel.signals.records import STATUS, Record
from seismodel.core import BadRecord
from seismodel.signals.source import Source

ABSENT, PICKED = STATUS.index('absent'), STATUS.index('picked')
OFF = Augmentation(rotate=0., flip=0., flip_one=0., shift=0., noise=0., drop=0., gap=0., stack=0.)


class Numbered(Source):
    """Records of noise whose north component is n times the vertical one, n the record's number,
    with a step of a million at P"""
    def __init__(self, length, first=0, bad=(), kind='event', samples=5000, p=3000.):
        self.length, self.first, self.bad, self.kind = length, first, bad, kind
        self.samples, self.p, self.name = samples, p, f'from {first}'
    def __len__(self): return self.length
    def record(self, i):
        if i in self.bad: raise BadRecord(f'r{i}', 'cannot be read')
        n = self.first + i
        x = (np.random.default_rng(n).standard_normal((self.samples, 1))*[1, n, 1]).astype(
            np.float32)
        if self.kind == 'noise': return Record(x, np.nan, np.nan, f'r{n}', ABSENT, ABSENT)
        if self.kind == 'dead': x[:, 2] = 0
        x[int(self.p):] += 1e6
        return Record(x, np.nan if self.kind == 'unlabelled' else self.p, self.p + 200, f'r{n}',
                      0 if self.kind == 'unlabelled' else 4, 4)


onset = st.one_of(st.just(np.nan), st.floats(0, 5999))

@settings(max_examples=200, deadline=None)
@given(onset, onset, onset, onset, st.integers(0, 1), st.integers(0, 1))
def test_no_phase_arrives_where_it_is_quiet(p, s, p_weak, s_weak, p_status, s_status):
    "And where P is not labelled, nothing is known to be quiet"
    status = lambda t, said: PICKED if np.isfinite(t) else said
    r = Record(np.zeros((6000, 3), np.float32), p, s, 'r', status(p, p_status), status(s, s_status),
               p_weak, s_weak)
    end = quiet(r)
    assert 0 <= end <= 6000
    assert end == 0 or not any(t < end + 99 for t in (p, s, p_weak, s_weak))
    if np.isnan(p) and r.p_status == 0: assert end == 0
    if all(np.isnan(t) for t in (p, s, p_weak, s_weak)) and p_status == s_status == ABSENT:
        assert end == 6000


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 50), st.integers(0, 200), st.integers(1, 300))
def test_mirrored_is_numpys_reflection(length, first, window):
    x = np.random.default_rng(length).standard_normal((length, 3))
    np.testing.assert_array_equal(mirrored(x, first, window),
                                  np.pad(x, ((0, first + window), (0, 0)),
                                         'reflect')[first:first + window])


def test_a_bank_takes_the_quiet_parts_of_good_records_of_all_sources():
    """Each once before any twice; nothing of an earthquake, of a bad record, of a dead component or
    of what nobody labelled"""
    sources = [Numbered(30, 100, bad=range(10)), Numbered(5, 200, kind='dead'),
               Numbered(20, 300, kind='noise', samples=6000),
               Numbered(20, 400, kind='unlabelled'), Numbered(7, 500, p=900.)]
    bank = noise_bank(sources, count=80, window=4096)
    assert bank.shape == (80, 4096, 3) and bank.dtype == torch.float32
    spread = bank.std(1)
    found = (spread[:, 1]/spread[:, 0]).round().int().tolist()
    good = [*range(110, 130), *range(300, 320)]
    assert sorted(found) == sorted(good + good)
    # the step of a million is not there
    assert (bank/spread[:, None]).abs().max() < 6
    assert len(set(noise_bank(sources, count=10)[:, 0, 0].tolist())) == 10
    assert (noise_bank([Numbered(8, kind='unlabelled'), Numbered(3, bad=range(3))]).shape
            == (0, 4096, 3))


def test_events_depend_on_their_number_and_survive_a_loader_process():
    bank = noise_bank([Numbered(10, kind='noise', samples=6000)], count=6, window=1024)
    source = EventsInNoise(bank, events=40, seed=4)
    other, again = pickle.loads(pickle.dumps(source)), EventsInNoise(bank, events=40, seed=4)
    for i in (999_999, 3, 0):
        a = source.record(i)
        for b in (other.record(i), again.record(i)):
            np.testing.assert_array_equal(a.waveform, b.waveform)
            np.testing.assert_array_equal(a[1:3], b[1:3])
    assert not np.array_equal(source.record(3).waveform,
                              EventsInNoise(bank, events=40, seed=5).record(3).waveform)
    items = WindowDataset([source], 50, window=1024).batch(range(50))
    for phase in 'ps':
        t, status = items[f'{phase}_onset'], items[f'{phase}_status']
        assert (((t >= 0) & (t < 1024))[t.isfinite()].all()
                and torch.equal(t.isfinite(), status >= 2) and t.isfinite().any())


def raw_batch(seed=0):
    data = WindowDataset([Numbered(12, 10), Numbered(12, 50, kind='noise')], 48, seed=seed)
    return amplitudes(data.batch(range(48), raw=True))


def test_a_recipe_is_a_function_of_batch_and_generator():
    bank, batch = noise_bank([Numbered(10, kind='noise')], count=6), raw_batch()
    before = {k: v.clone() for k, v in batch.items()}
    one, two = (fine_augment(bank)(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert set(one) == {*batch, 'events', 'unlabelled'} and one['x'].isfinite().all()
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=0, atol=0, equal_nan=True)
    for k, v in batch.items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)
        assert one[k].dtype == v.dtype and one[k].shape == v.shape
    changed = (one['x'] != batch['x']).any(2).any(1)
    assert .7 < changed.float().mean() <= 1.


@pytest.mark.parametrize('name', ['rotate', 'flip', 'flip_one', 'shift', 'noise', 'drop', 'gap',
                                  'stack'])
def test_each_setting_changes_what_it_says_and_zero_is_nothing(name):
    bank, batch = noise_bank([Numbered(10, kind='noise')], count=6), raw_batch(1)
    off = fine_augment(bank, OFF)(batch, torch.Generator().manual_seed(0))
    for k in batch: torch.testing.assert_close(off[k], batch[k], rtol=0, atol=0, equal_nan=True)
    on = fine_augment(bank,
                      Augmentation(**{**vars(OFF), name: 1.}))(batch,
                                                               torch.Generator().manual_seed(0))
    # (B, 3): which components
    changed = (on['x'] != batch['x']).any(1)
    assert changed.any(1).float().mean() > .9
    if name == 'rotate': assert not changed[:, 0].any()
    if name == 'drop': assert ((on['x'] == 0).all(1).sum(1) >= 1).all()
    if name in ('flip', 'flip_one'): torch.testing.assert_close(on['x'], -batch['x'])
    if name == 'shift': assert not torch.equal(on['valid'], batch['valid'])
    else: torch.testing.assert_close(on['valid'], batch['valid'])


def test_without_stacking_a_batch_is_that_of_version_0_1():
    "The draws of all other changes are the same bits, whatever the recipe could do besides"
    bank, batch = noise_bank([Numbered(10, kind='noise')], count=6), raw_batch()
    s, g = Augmentation(stack=0.), torch.Generator().manual_seed(5)
    want = augment.sometimes(batch, g, s.rotate, augment.rotate_horizontals)
    want = augment.flip_polarity(augment.flip_polarity(want, g, s.flip, together=True), g,
                                 s.flip_one)
    want = augment.sometimes(want, g, s.shift, lambda b, g: augment.shift_time(b, g, s.shift_most))
    want = augment.sometimes(want, g, s.noise, lambda b, g: augment.add_noise(b, g, bank, s.snr_db))
    want = augment.add_gaps(augment.drop_components(want, g, s.drop), g, s.gap, s.gap_most)
    got = fine_augment(bank, s)(batch, torch.Generator().manual_seed(5))
    assert set(got) == set(want) == set(batch)
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=0, atol=0, equal_nan=True)
    more = fine_augment(bank, Augmentation(stack=1.))(batch, torch.Generator().manual_seed(5))
    assert not torch.equal(more['x'], want['x']) and more['events'].shape == (48, 2, 2)


def test_without_noise_none_is_added():
    batch = raw_batch()
    off = fine_augment(torch.zeros(0, 4096, 3),
                       Augmentation(**{**vars(OFF), 'noise': 1.}))(batch, torch.Generator())
    assert torch.equal(off['x'], batch['x'])


def test_the_bank_of_the_real_records(real_data):
    "Where there are some: quiet throughout, 3C, and of the training split alone"
    for folder in real_data:
        if folder.name != 'realquakes': continue
        bank = noise_bank([open_source(str(folder), 'train')], count=64)
        assert bank.shape == (64, 4096, 3) and bank.isfinite().all() and (bank.std(1) > 0).all()
        peak = bank.abs().amax((1, 2))
        assert peak.median() < 8

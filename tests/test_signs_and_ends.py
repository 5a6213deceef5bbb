"""Signs, first and last samples, and what nobody knows: small things of which a wrong one looks
like a result"""
import numpy as np
import pandas as pd
import pytest
import torch

from seismodel.models.embedding import split_windows
from seismodel.study.tables import RECORD_COLUMNS, TRIAL_COLUMNS, gains
from seismodel.picking.evaluation import residuals, task1_targets, task23_targets
from seismodel.finetuning.finetune import fine_recipe, label_windows
from seismodel.finetuning.heads import batch_onsets
from seismodel.data.windows import WindowDataset
from seismodel.signals.source import Source, cut_window
from seismodel.signals.noise import EventsInNoise, quiet
from seismodel.signals.normalize import normalize
from seismodel.data.pack import pack
from seismodel.data.sources import open_source
from seismodel.signals.records import STATUS, WINDOW, Record


class Ramp(Source):
    """A source with one record whose every sample says where it lies: a random walk, so that
    normalising keeps the order of windows apart"""
    name = 'ramp'
    def __init__(self, samples):
        self.samples, self.x = samples, np.random.default_rng(samples).standard_normal(
            (samples, 3)).astype(np.float32)
    def __len__(self): return 1
    def record(self, i): return Record(self.x, 5., self.samples - 5., 'r', 4, 4)


def test_windows_begin_at_every_sample_from_the_first_to_the_last():
    """A record three samples longer than a window has four of them, each as likely as the others;
    cut by one, or drawn by the loader"""
    x = Ramp(67).record(0)
    starts = [next(k for k in range(4) if np.array_equal(cut_window(x, 64, u).x[0], x.waveform[
        k:k + 64])) for u in (0., .24, .26, .49, .51, .74, .76, .9999)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3]
    batch = WindowDataset([Ramp(67)], 400, window=64).batch(range(400))
    # 0 to 3, or P lies before the window: never here
    first = 5 - batch['p_onset'].nan_to_num(9.)
    assert [int((first == k).sum()) for k in range(4)] == pytest.approx([100]*4, abs=40)
    for k in range(4):
        torch.testing.assert_close(batch['x'][first == k][0],
                                   normalize(torch.tensor(x.waveform[k:k + 64])))


def test_the_last_window_of_a_packed_record_is_drawn(tmp_path, write_dataset, quake_records):
    "As of its folder: a record that is three samples longer than a window begins at four places"
    def records():
        for m, x in quake_records(4):
            yield {**m, 'split': 'train', 'trace_npts': WINDOW + 3, 'trace_p_arrival_sample': 1000.,
                   'trace_s_arrival_sample': 2000.}, x[:, :WINDOW + 3]
    folder = write_dataset(tmp_path/'d', records())
    pack([str(folder)], out=tmp_path/'store')
    for where in (folder, tmp_path/'store'):
        onset = WindowDataset([open_source(str(where), 'train')], 60).batch(range(60))['p_onset']
        assert set(onset.tolist()) == {997., 998., 999., 1000.}, where


def test_the_rest_of_a_record_is_a_window_too():
    "Side by side, the last one short and filled with zeros"
    x = np.random.default_rng(0).standard_normal((150, 3)).astype(np.float32)
    pieces, starts, frames = split_windows(x, 64)
    assert pieces.shape == (3, 64, 3) and starts == [0, 64, 128] and frames == [16, 16, 6]
    torch.testing.assert_close(pieces[2, :22], normalize(torch.tensor(x[128:])))
    assert not pieces[2, 22:].any()
    # two frames
    assert (split_windows(x[:135], 64)[1] == [0, 64]
            and split_windows(x[:136], 64)[1] == [0, 64, 128])


def test_a_phase_that_nobody_labelled_is_not_noise(tmp_path, write_dataset, quake_records):
    """From the table to the labels of a batch, from a folder and from a store: unlabelled on
    earthquakes, known to be absent on noise"""
    def records():
        for k, (m, x) in enumerate(quake_records(12)):
            if m['trace_category'] != 'noise':
                if k % 2: m['trace_s_arrival_sample'] = np.nan
                else: m['trace_p_arrival_sample'] = np.nan
            yield {**m, 'split': ('train', 'dev')[k > 8]}, x
    folder = write_dataset(tmp_path/'d', records())
    pack([str(folder)], out=tmp_path/'store')
    for where in (folder, tmp_path/'store'):
        source = open_source(str(where), 'train')
        for i in range(len(source)):
            r = source.record(i)
            if np.isfinite(r.p_onset):
                assert (STATUS[r.p_status], STATUS[r.s_status]) == ('picked', 'unlabelled')
            elif np.isfinite(r.s_onset):
                assert ((STATUS[r.p_status], STATUS[r.s_status]) == ('unlabelled', 'picked')
                        and quiet(r) == 0)
            else:
                assert ((STATUS[r.p_status], STATUS[r.s_status]) == ('absent', 'absent')
                        and quiet(r) == len(r.waveform))
        windows, _, _ = label_windows([str(where)], 1., None,
                                      fine_recipe('contrastive', steps=4, batch_size=16,
                                                  validation_windows=2))
        batch = windows.batch(range(64))
        _, known = batch_onsets(batch)
        picked = torch.stack([batch['p_status'], batch['s_status']], 1) >= STATUS.index('picked')
        noise = ~picked.any(1)
        assert (noise.any() and known[noise].all() and torch.equal(known[~noise], picked[~noise])
                and (known[~noise].sum(1) == 1).all())


def test_a_late_pick_has_a_positive_residual():
    table = pd.DataFrame({'phase_label': ['P', 'S', 'P'], 'phase_onset': [100., 200., 300.],
                          'p_sample_pred': [130., 0., 290.], 's_sample_pred': [0., 150., 0.]})
    np.testing.assert_allclose(residuals(table, 'P'), [.3, -.1])
    np.testing.assert_allclose(residuals(table, 'S'), [-.5])


def test_a_method_that_finds_more_than_its_control_gains():
    "It finds P everywhere and S nowhere, and the control finds half of both"
    rows = pd.MultiIndex.from_tuples([(kind, 'd', 'ZNE', f'e{k}', f't{k}') for kind in 'PS'
                                      for k in range(8)], names=RECORD_COLUMNS)
    mine, half = np.where(np.arange(16) < 8, .05, 9.), np.where(np.arange(16) % 2, .05, 9.)
    g = gains(pd.DataFrame({('m', .5, 0): mine, ('m-random', .5, 0): half}, index=rows).rename_axis(
        columns=TRIAL_COLUMNS), draws=20).set_index(['kind', 'metric'])
    for metric in ('within 0.1 s', 'within 0.3 s', 'within 0.5 s'):
        assert (g.loc[('P', metric), 'gain'], g.loc[('S', metric), 'gain']) == (.5, -.5)
    assert ((g['low'] <= g['gain']).all() and (g['gain'] <= g['high']).all()
            and (g.loc['P', 'low'] > 0).all() and (g.loc['S', 'high'] < 0).all())


def test_events_in_noise_begin_at_their_onsets():
    """Less its noise a record is silent before P, and moves within a tenth of a second; S comes as
    much later as in the event itself"""
    source, found = EventsInNoise(
        torch.randn(3, 1024, 3, generator=torch.Generator().manual_seed(0)), events=40, seed=2), 0
    for i in range(100):
        r = source.record(i)
        event, noise = (int(word) for word in r.name.split()[1::3])
        wave = np.abs(r.waveform - source.noise[noise]).max(1)
        p, s = source.onsets[event]
        if np.isfinite([r.p_onset, r.s_onset]).all():
            assert r.s_onset - r.p_onset == pytest.approx(s - p)
        if not 100 <= r.p_onset < 900: continue
        assert -1 <= np.flatnonzero(wave > 1e-3*wave.max())[0] - r.p_onset <= 10, i
        found += 1
    assert found > 20


def test_an_onset_outside_a_window_of_noise_is_none():
    "Half a sample before the first is outside, and so is the one after the last"
    source = EventsInNoise(torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)),
                           events=4)
    # windows begin at 0 to 32
    source.onsets[:] = 10.5, 90.
    records = [source.record(i) for i in range(400)]
    p, s = ({t for r in records if np.isfinite(t := getattr(r, f'{phase}_onset'))}
            for phase in 'ps')
    assert p == {k + .5 for k in range(11)} and s == {float(k) for k in range(58, 64)}
    for r in records:
        statuses = [STATUS.index('picked' if np.isfinite(t) else 'absent')
                    for t in (r.p_onset, r.s_onset)]
        assert [r.p_status, r.s_status] == statuses

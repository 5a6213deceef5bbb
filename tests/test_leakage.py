"""Nothing of dev or test in what is learned from, nothing of test in what is chosen

Every record here is a tone with its event's own pitch, on all components, before and after the
onsets. What reaches a model, however it was opened, packed, cut, augmented and normalised, says of
itself which event it comes from.
"""
import io
import shutil
from contextlib import redirect_stderr
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from seisbench.data import WaveformDataset
from seisbench.models.base import WaveformModel
from seisbench.util import ClassifyOutput, Pick, PickList
from torch import nn

import seismodel.study.fold_trial as fold_trial
import seismodel.study.trial as trials
import seismodel.training.pretrain as pretraining
import seismodel.finetuning.finetune as finetuning
from seismodel.study.trial import (Trial, StudyConfig, Candidate, trial_recipe, trial_windows,
                                   dev_score, score_trial, start_trial)
from seismodel.core import UserError
from seismodel.models.pretraining import Step
from seismodel.signals.noise import calm_bank
from seismodel.study.arms import FoldTrial, Start, Variant, Way
from seismodel.study.arrays import open_splits, write_records
from seismodel.study.device_records import make_generated, read_records
from seismodel.study.fold_run import FoldData, manual_where_unsaid, prepare_arrays
from seismodel.study.fold_scores import choose_on_dev, labels_of_fold, score_picks
from seismodel.study.fold_trial import FoldStudy
from seismodel.study.folds import check_unlabelled, event_parts, fold_sides
from seismodel.training.trainer import Augmented
from seismodel.picking.evaluation import evaluate, pick_benchmark
from seismodel.finetuning.finetune import finetune
from seismodel.finetuning.heads import Picker
from seismodel.signals.noise import EventsInNoise
from seismodel.data.pack import pack
from seismodel.models.pretraining import build, preset
from seismodel.data.sources import SyntheticSource, draw_split, open_records, open_source
from seismodel.finetuning.window_labels import LabelSpec
from seismodel.finetuning.classification import WindowModel

EVENTS = 20
SPLITS = ('train', 'train', 'dev', 'test')


def tone(event, station=0, samples=6000):
    "(3, samples): the event's pitch, louder after P and S, and a trace of noise"
    t, rng = np.arange(samples)/100, np.random.default_rng([event, station])
    size = 1. + 2.*(t > 25) + 3.*(t > 30)
    x = size*np.sin(2*np.pi*pitch(event)*t + rng.uniform(0, 6, (3, 1)))*rng.uniform(.5, 2, (3, 1))
    return (x + .01*rng.standard_normal(x.shape)).astype(np.float32)


def pitch(event): return 3. + 1.5*event


def heard(x):
    "The events (B,) that windows (B, L, 3) come from; -1 where there is no such tone"
    x = torch.as_tensor(x).double()
    power = torch.fft.rfft(x*torch.hann_window(x.shape[1], dtype=torch.double)[:, None],
                           dim=1).abs().square().sum(-1)
    at = power.argmax(1)*100/x.shape[1]
    event = ((at - 3)/1.5).round()
    return torch.where((at - 3 - 1.5*event).abs() < .2, event, -1).long().tolist()


def rows(events):
    """Two stations an event, every fifth event noise; by these names each split that is drawn has
    earthquakes and noise"""
    for e in events:
        for station in range(2):
            noise = e % 5 == 4
            yield {'trace_name': f'trace{e}-{station}', 'source_id': f'nc{e}',
                   'split': SPLITS[e % 4], 'trace_sampling_rate_hz': 100., 'trace_npts': 6000,
                   'trace_component_order': 'ZNE', 'trace_category': 'noise'
                   if noise else 'earthquake', 'kind': 'ab'[e % 2],
                   'trace_p_arrival_sample': np.nan if noise else 2500.,
                   'trace_s_arrival_sample': np.nan if noise else 3000.}, tone(e, station)


def without_splits(records):
    for m, x in records: yield {k: v for k, v in m.items() if k != 'split'}, x


def packed(folder, where):
    pack([str(folder)], out=where)
    return where


@pytest.fixture(scope='module')
def data(tmp_path_factory, write_dataset):
    "The same events in every form that fine-tuning takes, as a list of folders by name"
    at = tmp_path_factory.mktemp('tones')
    def chunked(name, halves):
        """Each chunk as SeisBench's writer leaves it: traces named bucket0$0 and so on, once more
        in the next chunk"""
        (at/name).mkdir()
        for letter, records in zip('AB', halves):
            write_dataset(at/f'{name}{letter}', records, blocks=True)
            shutil.move(at/f'{name}{letter}/metadata.csv', at/name/f'metadata{letter}.csv')
            shutil.move(at/f'{name}{letter}/waveforms.hdf5', at/name/f'waveforms{letter}.hdf5')
        return at/name
    half = EVENTS//2
    forms = {'folder': [write_dataset(at/'folder', rows(range(EVENTS)))],
             'chunks': [chunked('chunks', (rows(range(half)), rows(range(half, EVENTS))))],
             'unsplit': [write_dataset(at/'unsplit', without_splits(rows(range(EVENTS))))],
             'unsplit chunks': [chunked('drawn', (without_splits(rows(range(half))),
                                                  without_splits(rows(range(half, EVENTS)))))]}
    # the stations of an event lie in two data sets, one of which is packed
    for k in range(2):
        mine = ((m, x) for n, (m, x) in enumerate(without_splits(rows(range(EVENTS))))
                if n % 2 == k)
        write_dataset(at/f'station{k}', mine)
    forms['two'] = [at/'station0', packed(at/'station1', at/'station1-store')]
    for name in ('folder', 'chunks', 'unsplit', 'unsplit chunks'):
        forms[f'{name}, packed'] = [packed(forms[name][0], at/f'{forms[name][0].name}-store')]
    return {name: [str(f) for f in folders] for name, folders in forms.items()}


FORMS = ('folder', 'chunks', 'unsplit', 'unsplit chunks', 'two', 'folder, packed', 'chunks, packed',
         'unsplit, packed', 'unsplit chunks, packed')
forms = pytest.mark.parametrize('form', FORMS)


def split_of(form, event):
    "The truth"
    return draw_split(f'nc{event}') if form.startswith(('unsplit', 'two')) else SPLITS[event % 4]


def events_in(form, split): return {e for e in range(EVENTS) if split_of(form, e) == split}


class Stop(Exception): pass


@pytest.fixture
def caught(monkeypatch):
    "What a command gives to `train`, which is not called"
    got = {}
    def instead(model, data, dev, *args, **kwargs):
        data, augment = data if isinstance(data, Augmented) else (data, None)
        got.update(model=model, data=data, dev=dev, augment=augment)
        raise Stop
    for module in (finetuning, trials, pretraining): monkeypatch.setattr(module, 'train', instead)
    return got


@pytest.fixture
def brisk(monkeypatch):
    "No intervals, and few synthetic events: they take seconds, and nobody looks at them here"
    monkeypatch.setattr('seismodel.picking.evaluation.bootstrap', lambda metric, table,
                        draws=0: (metric(table), 0., 0.))
    real = finetuning.with_real_noise
    for module in (finetuning, trials):
        monkeypatch.setattr(module, 'with_real_noise', lambda windows, device,
                            *a: real(windows, device, *a, events=32))


def run_until_training(call, *args, **kwargs):
    with pytest.raises(Stop): call(*args, **kwargs)


def met(windows, count):
    "Which events the windows hold, those of synthetic sources left out"
    items = [windows[n] for n in range(min(count, len(windows)))]
    real = [item['x'] for item in items
            if not isinstance(windows.sources[int(item['source'])],
                              (SyntheticSource, EventsInNoise))]
    return set(heard(torch.stack(real)))


def check(form, training, dev, share=1.):
    """Training windows hold training events alone, all of them or as many as were asked for; dev
    windows all of dev"""
    assert (training <= events_in(form, 'train') and dev <= events_in(form, 'dev')
            and not training & dev)
    assert (len(training) == int(np.ceil(share*len(events_in(form, 'train'))))
            and dev == events_in(form, 'dev'))


def test_the_tones_are_told_apart():
    "Of the tool that the other tests use"
    for e in range(EVENTS): assert heard(tone(e).T[None, 1000:5096]) == [e]
    assert heard(np.random.default_rng(0).standard_normal((3, 4096, 3))) != [0, 0, 0]


@forms
def test_pickers_learn_from_training_events_alone(form, data, caught, tmp_path):
    run_until_training(finetune, 'random', 'contrastive-tiny', data[form], augment='none', steps=50,
                       batch_size=8, validation_windows=60, device='cpu', out=tmp_path/'run')
    check(form, met(caught['data'], 200), met(caught['dev'], 60))


@forms
def test_a_share_is_of_training_events_and_so_is_its_noise(form, data, caught, brisk, tmp_path):
    "Whole events of the training split; the bank of noise has no others"
    run_until_training(finetune, 'random', 'contrastive-tiny', data[form], fraction=.4, steps=50,
                       batch_size=8, validation_windows=60, device='cpu', out=tmp_path/'run')
    training = met(caught['data'], 200)
    # two draws, one of each data set
    if form != 'two': check(form, training, met(caught['dev'], 60), .4)
    for source in caught['data'].sources:
        assert set(source.events()) <= {f'nc{e}' for e in training}
    bank = next(cell.cell_contents for cell in caught['augment'].__closure__
                if isinstance(cell.cell_contents, torch.Tensor))
    assert bank.shape[0] > 0 and set(heard(bank)) <= training <= events_in(form, 'train')


@forms
def test_window_models_learn_from_training_events_alone(form, data, caught, tmp_path):
    "And the label of each window is that of its event"
    run_until_training(finetune, 'random', 'contrastive-tiny', data[form], 'kind', steps=50,
                       batch_size=8, validation_windows=60, device='cpu', out=tmp_path/'run')
    check(form, met(caught['data'], 200), met(caught['dev'], 60))
    for windows in (caught['data'], caught['dev']):
        items = [windows[n] for n in range(60)]
        assert ([int(item['y']) for item in items]
                == [e % 2 for e in heard(torch.stack([item['x'] for item in items]))])


@forms
def test_pretraining_learns_from_training_events_alone(form, data, caught, tmp_path):
    run_until_training(pretraining.pretrain, data=data[form], steps=50, batch_size=8,
                       validation_windows=60, device='cpu', out=tmp_path/'run')
    check(form, met(caught['data'], 200), met(caught['dev'], 60))


@forms
def test_a_study_learns_from_training_events_alone(form, data, brisk):
    "Synthetic events among them are set into the noise of training events"
    h, cell = StudyConfig(tuple(data[form]), steps=50, batch_size=8, validation_windows=60,
                          device='cpu'), Trial(Candidate('PhaseNet', 'peer', 'PhaseNet'), 1., 3)
    windows, dev, change, _ = trial_windows(cell, trial_recipe(start_trial(cell), cell, h), h)
    check(form, met(windows, 200), met(dev, 60))
    assert not any(isinstance(s, (SyntheticSource, EventsInNoise)) for s in dev.sources)
    noise = next(s.noise for s in windows.sources if isinstance(s, EventsInNoise))
    assert set(heard(noise)) <= events_in(form, 'train')


@forms
def test_events_are_known_by_their_own_names(form, data):
    "Each record's event and label, also where chunks use the same name for different traces"
    for name in data[form]:
        for split in ('train', 'dev', 'test'):
            source = open_source(name, split)
            events = heard(np.stack([source.record(i).waveform[:4096] for i in range(len(source))]))
            assert source.events() == [f'nc{e}' for e in events]
            assert source.metadata('kind') == ['ab'[e % 2] for e in events]
            assert set(events) == events_in(form, split)


def test_synthetic_events_of_training_are_no_dev_events():
    """A synthetic event set into real noise has a number that no dev or test window has: not even P
    and S as far apart"""
    source = EventsInNoise(torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0)),
                           events=60)
    apart = {round(float(s - p), 3) for p, s in source.onsets if np.isfinite(s - p)}
    for split in ('dev', 'test'):
        other = SyntheticSource(split=split)
        other.prefetch(range(60))
        records = [other.record(i) for i in range(60)]
        assert len(apart) > 20 and not apart & {round(r.s_onset - r.p_onset, 3) for r in records
                                                if np.isfinite(r.s_onset - r.p_onset)}, split


class Listener(WaveformModel):
    "A picker that notes what it hears: one set for windows, one for whole records"
    def __init__(self):
        super().__init__(component_order='ZNE', sampling_rate=100, output_type='array',
                         in_samples=3001, pred_sample=(0, 3001), labels='NPS')
        self.windows, self.records = [], []

    def forward(self, x):
        self.windows += heard(x.transpose(1, 2))
        return torch.full_like(x, 1/3)

    def annotate_batch_post(self, batch, piggyback, argdict): return batch.transpose(1, 2)

    def annotate(self, stream, **kwargs):
        self.records += heard(np.stack([tr.data for tr in stream], -1)[None, :4096])
        return stream

    def classify(self, stream, **kwargs):
        return self.classify_aggregate(self.annotate(stream), kwargs)
    def classify_aggregate(self, annotations, argdict):
        return ClassifyOutput('listener', picks=PickList([]))


@forms
def test_a_study_reads_dev_to_choose_and_test_to_score(form, data):
    open_records.cache_clear()
    picker, h = Listener(), StudyConfig(tuple(data[form]))
    table = score_trial(picker, h)
    dev, test = (2*list(events_in(form, split)) for split in ('dev', 'test'))
    assert (sorted(picker.records) == sorted(dev + test)
            and sorted(picker.records[:len(dev)]) == sorted(dev))
    assert {f'nc{e}' for e in events_in(form, 'test')} == set(table['event'])


@pytest.mark.parametrize('form', ['folder', 'chunks', 'unsplit', 'unsplit chunks'])
@pytest.mark.parametrize('split', ['test', 'dev'])
def test_the_benchmark_reads_dev_and_the_split_alone(form, split, data, brisk, tmp_path,
                                                     monkeypatch):
    """Windows and whole records, by the table's splits or those that training draws where there are
    none"""
    picker = Listener()
    monkeypatch.setattr('seismodel.picking.seisbench_model.open_picker', lambda name: picker)
    evaluate('x', data[form][0], split, out=tmp_path/'e')
    assert (set(picker.windows) <= events_in(form, split) | events_in(form, 'dev')
            and set(picker.windows) >= {e for e in events_in(form, split) if e % 5 != 4})
    assert sorted(picker.records) == sorted(2*list(events_in(form, split)))
    table = pd.read_csv(tmp_path/'e/records.csv')
    assert set(table['event']) == {f'nc{e}' for e in events_in(form, split)}


@forms
def test_a_window_model_is_scored_on_the_split_alone(form, data, brisk, tmp_path, monkeypatch):
    asked = []
    def answer(self, x):
        asked.extend(heard(x))
        return torch.full((len(x), 2), .5)
    monkeypatch.setattr(WindowModel, 'answer', answer)
    WindowModel(build(preset('contrastive-tiny').model),
                LabelSpec('kind', ['a', 'b'], [.5, .5])).save_pretrained(tmp_path/'run')
    for name in data[form][:1]:
        for split in ('test', 'dev'):
            asked.clear()
            evaluate(str(tmp_path/'run'), name, split, device='cpu', out=tmp_path/split)
            assert set(asked) == events_in(form, split)
            table = pd.read_csv(tmp_path/split/'answers.csv')
            assert (table['event'].tolist() == [f'nc{e}' for e in asked]
                    and table['truth'].tolist() == ['ab'[e % 2] for e in asked])


# what is chosen is chosen on dev

# P at P onsets, P at S onsets, S at P onsets; at S onsets S is .2
SCORES = {'train': (.02, .01, .1), 'dev': (.8, .4, .1), 'test': (.3, .1, .3)}


class Moody(Listener):
    "Reads off the record what it has to say: the split is written into the amplitude at the onset"
    def forward(self, x):
        p, s = (torch.zeros_like(x[:, 0]) for _ in range(2))
        for k, (p_at_p, p_at_s, s_at_p) in enumerate(SCORES.values(), 1):
            at_p, at_s = ((x[:, 0] - sign*k*1000).abs() < 400 for sign in (1, -1))
            p, s = p + p_at_p*at_p + p_at_s*at_s, s + s_at_p*at_p + .2*at_s
        return torch.stack([1 - p - s, p, s], 1).clamp(0, 1)


@pytest.fixture(scope='module')
def moody(tmp_path_factory, write_dataset):
    "Silent records with a mark at each onset: 1000, 2000 or 3000 by split, upside down for S"
    def records():
        for m, _ in rows(range(EVENTS)):
            x, size = np.zeros((3, 6000), np.float32), 1000*(1 + list(SCORES).index(m['split']))
            if m['trace_category'] == 'earthquake': x[0, 1500], x[0, 4500] = size, -size
            yield {**m, 'trace_p_arrival_sample': 1500. if x.any() else np.nan,
                   'trace_s_arrival_sample': 4500. if x.any() else np.nan}, x
    return write_dataset(tmp_path_factory.mktemp('moody')/'d', records())


def test_the_benchmark_takes_its_threshold_from_dev(moody, brisk, tmp_path):
    """Every split is told apart without a fault by a threshold of its own: log 8 and log 2 on dev,
    log 1 and log 1/2 on test, and lower still on train. With dev's threshold, dev scores 1, and on
    the others everything is called S."""
    data = WaveformDataset(moody, component_order='ZNE', dimension_order='NCW', sampling_rate=100)
    figures = {split: pick_benchmark(Moody(), data, tmp_path, split, draws=5).set_index(
        ['task', 'metric'])['value'] for split in ('train', 'dev', 'test')}
    for split, table in figures.items(): assert table['2 identification', 'AUC'] == 1, split
    assert ([figures[split]['2 identification', 'MCC'] for split in ('train', 'dev', 'test')]
            == [0, 1, 0])


class Fickle:
    "Picks by its own rule on each split: best at one threshold, and in noise everywhere else"
    default_args = {}
    def __init__(self, names, best):
        "`best` by split: where onsets are found and noise is left alone"
        self.best, self.seen, self.split = best, {}, {}
        for name in names:
            for split in ('train', 'dev', 'test'):
                data = open_records(name, split)
                for i, row in enumerate(data.metadata.to_dict('records')):
                    self.split[np.ascontiguousarray(
                        data.get_waveforms(i)[0]).tobytes()] = split, row

    def annotate(self, stream, **args): return stream

    def classify_aggregate(self, stream, args):
        from obspy import UTCDateTime
        (split, row), threshold = self.split[stream[0].data.tobytes()], args['P_threshold']
        self.seen.setdefault(split, set()).add(threshold)
        noise, best = np.isnan(row['trace_p_arrival_sample']), threshold == self.best[split]
        at = ([] if noise and best else [('P', 7.)] if noise
              or not best else [(p, row[f'trace_{p.lower()}_arrival_sample']/100) for p in 'PS'])
        return ClassifyOutput('f', picks=PickList(
            [Pick('XX.REC.', UTCDateTime(t), peak_time=UTCDateTime(t), phase=p) for p, t in at]))


@pytest.mark.parametrize('form', ['folder', 'folder, packed', 'two'])
def test_a_study_takes_its_threshold_from_dev(form, data, monkeypatch):
    """A picker whose best threshold on dev is the worst one on test; of two data sets their records
    together"""
    monkeypatch.setattr(trials, 'BLINDED', 0.)
    open_records.cache_clear()
    picker = Fickle(data[form], {'train': .2, 'dev': .6, 'test': .1})
    table = score_trial(picker, StudyConfig(tuple(data[form])))
    assert table.groupby('by')['threshold'].first().to_dict() == {'fixed': .3, 'dev': .6}
    assert picker.seen == {'dev': set(trials.THRESHOLDS), 'test': {.3, .6}}
    chosen = table[table['by'] == 'dev']
    assert dev_score(chosen) == -1 and set(chosen['kind']) == {'P', 'S', 'noise'}


# folds: nothing of another side in what is learned, chosen and scored

class FoldListener(nn.Module):
    "A picker that notes what it hears, and can be made to say anything about an event's P"
    def __init__(self, says=None):
        super().__init__()
        self.weight, self.heard, self.says = nn.Parameter(torch.zeros(())), [], says
    def set_progress(self, step, steps): pass
    def logits(self, x):
        events = heard(x)
        self.heard += events
        z = torch.zeros(*x.shape[:2], 3) + torch.tensor([4., 0., 0.])
        if not self.says: return z
        for k, e in enumerate(events): self.says(z[k], e)
        return z
    def forward(self, batch, generator=None):
        self.logits(batch['x'])
        return Step(self.weight*0., {})


def fold_arrays(form, data, where):
    "The arrays of a study, made of these data"
    table = write_records(where, 'labelled', open_splits(data[form]))
    np.save(where/'labelled-table.npy', manual_where_unsaid(table))
    return np.load(where/'labelled-table.npy')


def number_of(name): return int(name[2:])


@forms
def test_a_fold_learns_chooses_and_scores_on_different_events(form, data, tmp_path, monkeypatch):
    """What a picker of each fold really hears: while it trains, on its looks at dev, for its
    thresholds, and while it is scored"""
    table = fold_arrays(form, data, tmp_path)
    # both stations, under one name
    assert sorted(map(number_of, table['event'])) == sorted(2*list(range(EVENTS)))
    np.save(tmp_path/'events-waves.npy', np.zeros((4, 6144, 3), np.float16))
    np.save(tmp_path/'events-onsets.npy', np.full((4, 2), np.nan))
    s, tested = FoldStudy(tmp_path, tmp_path, folds=2, batch_size=32, device='cpu'), []
    for fold in range(2):
        picker, stages = FoldListener(), {}
        def note(stage):
            stages[stage], picker.heard = set(picker.heard) - {-1}, []
        def instead(model, draw, c, device, look):
            g = torch.Generator().manual_seed(0)
            for _ in range(2): picker.heard += heard(draw(g)['x'])
            note('train')
            look(1)
            note('dev')
            return [{'loss': 0.}]
        real = fold_trial.choose_on_dev
        def choose(*args):
            chosen = real(*args)
            note('thresholds')
            return chosen
        monkeypatch.setattr(fold_trial, 'fold_picker', lambda trial, s: picker)
        monkeypatch.setattr(fold_trial, 'train_on_device', instead)
        monkeypatch.setattr(fold_trial, 'choose_on_dev', choose)
        monkeypatch.setattr(fold_trial, 'fine_augment', lambda noise,
                            options: banked(noise, stages))
        fold_trial.finetune_fold(FoldTrial(Start('listener'), Way('synthetic', synthetic=.25), .6,
                                           fold), s, torch.device('cpu'))
        monkeypatch.setattr(fold_trial, 'choose_on_dev', real)
        note('test')
        assert (not stages['train'] & (stages['dev'] | stages['test'])
                and not stages['dev'] & stages['test'])
        assert stages['thresholds'] == stages['dev'] and stages['noise'] <= stages['train']
        sides = fold_sides(table['event'].tolist(),
                           event_parts(table['event'].tolist(), table['dataset'].tolist(), 2),
                           fold, .6)
        said = [{number_of(e) for e in table['event'][rows]} for rows in sides]
        assert (stages['train'] <= said[0] and len(stages['train']) >= 2
                and [stages['dev'], stages['test']] == said[1:])
        tested += stages['test']
    assert sorted(tested) == list(range(EVENTS))


def banked(noise, stages):
    "Notes which events the bank of noise has, and changes nothing"
    stages['noise'] = set(heard(noise)) - {-1}
    return lambda batch, generator: batch


@pytest.mark.parametrize('kind', ['windows', 'scrambled', 'events'])
def test_pretraining_of_a_study_hears_unlabelled_records_alone(kind, data, write_dataset, tmp_path,
                                                               monkeypatch):
    """Their pitches are in its windows, scrambled or not, and in the noise of synthetic events; the
    labelled ones are not opened"""
    fold_arrays('folder', data, tmp_path)
    write_dataset(tmp_path/'more', rows(range(20, 29)))
    write_records(tmp_path, 'unlabelled', open_splits([str(tmp_path/'more')]))
    make_generated(tmp_path, 8, 50)
    opened, real = [], fold_trial.read_records
    monkeypatch.setattr(fold_trial, 'read_records', lambda folder, name, device: opened.append(name)
                        or real(folder, name, device))
    monkeypatch.setattr(fold_trial, 'calm_bank', lambda sources, count: noted(sources, count))
    banks = []
    def noted(sources, count):
        banks.append(calm_bank(sources, count, most=50.))
        return banks[-1]
    draw = fold_trial.pretraining_windows(Start('x', Variant(None, data=kind), 1000),
                                          FoldStudy(tmp_path, tmp_path, device='cpu'), 32,
                                          torch.device('cpu'))
    x = draw(torch.Generator().manual_seed(0))
    # the last quarter is the generator's
    known = set(heard(x[:24] if kind != 'events' else banks[0])) & set(range(29))
    assert len(known) > 3 and known <= set(range(20, 29)) and 'labelled' not in opened


def test_a_labelled_event_among_the_unlabelled_is_refused(data, tmp_path):
    "By its name; and without one, by its samples"
    with pytest.raises(UserError, match='has records in --data and in --unlabelled'):
        prepare_arrays(FoldData(tuple(data['folder']), tuple(data['chunks'])), tmp_path/'a')
    table = fold_arrays('folder', data, tmp_path)
    nameless = table.copy()
    nameless['named'] = False
    with pytest.raises(UserError, match='has the samples of a labelled one'):
        check_unlabelled(table, nameless)


def test_thresholds_of_a_fold_come_from_dev(data, tmp_path, monkeypatch):
    """A picker that says .8 at P and .45 elsewhere on dev, but .3 and .1 on test: only dev can lead
    to a threshold between .45 and .8, at which nothing is found on test"""
    table = fold_arrays('folder', data, tmp_path)
    sides = fold_sides(table['event'].tolist(),
                       event_parts(table['event'].tolist(), table['dataset'].tolist(), 2), 0)
    dev = {number_of(e) for e in table['event'][sides.dev]}
    def says(z, event):
        right, wrong = (.8, .45) if event in dev else (.3, .1)
        for at, p in ((z.shape[0]//2, right), (z.shape[0]//4, wrong)):
            z[at - 10:at + 11, 1] = np.log(p/(1 - p)*np.exp(4.)) if event % 5 < 4 else -9.
    picker = FoldListener(says)
    labels = labels_of_fold(table, sides)
    onset = labels.onset.copy()
    # in the middle of a record's first window
    onset[:, 0] = np.where(np.isfinite(onset[:, 0]), 2048., np.nan)
    labels = replace(labels, onset=onset)
    records, _ = read_records(tmp_path, 'labelled')
    records.length.fill_(4096)
    chosen = choose_on_dev(picker, records, labels, sides.dev)
    assert .45 < chosen['p'] < .8
    assert not any(row[0] == 'p' and row[5] is not None
                   for row in score_picks(picker, records, labels, sides.test, chosen))
    other = choose_on_dev(picker, records, labels, sides.test)
    # what a leak would look like
    assert .1 < other['p'] < .3
    found = [row for row in score_picks(picker, records, labels, sides.test, other)
             if row[0] == 'p']
    assert found and all(abs(row[5]) < .2 for row in found)

"""What every source answers: records known by chunk and row, labels, events and windows of a data
set in two chunks, and fingerprints"""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from seisbench.data import WaveformDataset
from seisbench.models.base import WaveformModel

from seismodel.core import UserError
from seismodel.data.pack import pack
from seismodel.data.sources import open_source
from seismodel.data.windows import WindowDataset
from seismodel.finetuning.events import subset_events
from seismodel.finetuning.finetune import finetune
from seismodel.finetuning.window_labels import LabelledWindows, label_sources
from seismodel.picking import evaluation
from seismodel.picking.evaluation import event_names, score_records, targets
from seismodel.signals.source import Source
from seismodel.training.checkpoints import checkpoint_files
from seismodel.training.pretrain import pretrain

RECORDS = 24     # 12 in each chunk, called alike in both


def heard(x):
    """The numbers (B,) of the records that windows (B, L, 3) come from: record k is a tone of 3 + k
    Hz"""
    x = torch.as_tensor(np.asarray(x)).double()
    power = torch.fft.rfft(x*torch.hann_window(x.shape[1], dtype=torch.double)[:, None],
                           dim=1).abs().square().sum(-1)
    return (power.argmax(1)*100/x.shape[1] - 3).round().long().tolist()


def rows(numbers, events):
    "Records of 60 s; two to an event, if events are said"
    for k in numbers:
        t, rng = np.arange(6000)/100, np.random.default_rng(k)
        x = ((1 + 2*(t > 25))*np.sin(2*np.pi*(3 + k)*t + rng.uniform(0, 6, (3, 1)))
             + .01*rng.standard_normal((3, 6000)))
        m = {'trace_name': f't{k % 12}', 'split': ('train', 'train', 'dev', 'test')[k//2 % 4],
             'trace_sampling_rate_hz': 100., 'trace_npts': 6000, 'trace_component_order': 'ZNE',
             'trace_p_arrival_sample': 2500. + k, 'trace_s_arrival_sample': 3500. + k, 'number': k,
             'kind': 'ab'[k % 2]}
        yield {**m, **({'source_id': f'e{k//2}'} if events else {})}, x.astype(np.float32)


@pytest.fixture(scope='module', params=['events', 'no events'])
def chunks(request, tmp_path_factory, write_dataset):
    "A folder of two chunks, whose traces have the same names in both"
    at = tmp_path_factory.mktemp('chunks')
    for letter, first in zip('AB', (0, RECORDS//2)):
        part = write_dataset(at/f'part{letter}',
                             rows(range(first, first + RECORDS//2), request.param == 'events'))
        for file in ('metadata.csv', 'waveforms.hdf5'):
            shutil.move(part/file, at/file.replace('.', f'{letter}.'))
        part.rmdir()
    tables = [pd.read_csv(at/f'metadata{c}.csv') for c in 'AB']
    assert set(tables[0].trace_name) == set(tables[1].trace_name)
    return at


@pytest.fixture
def both(chunks, tmp_path):
    "The folder, and a store that was packed from it"
    pack([str(chunks)], out=tmp_path/'store')
    return chunks, tmp_path/'store'


def numbers_of(source):
    return heard(np.stack([source.record(i).waveform[:4096] for i in range(len(source))]))


def test_cells_labels_and_windows_belong_to_their_record(both):
    for where in both:
        source = open_source(str(where), 'train')
        numbers = numbers_of(source)
        assert len(source) == 12 and [int(n) for n in source.metadata('number')] == numbers
        assert (source.metadata('kind') == ['ab'[k % 2] for k in numbers]
                and len({source.label(i) for i in range(12)}) == 12)
        part = source.subset([11, 0, 5])
        assert ([int(n) for n in part.metadata('number')] == numbers_of(part)
                == [numbers[k] for k in (11, 0, 5)])
        w = source.windows(np.arange(12), np.full(12, .5), 2048)
        assert heard(w.x*w.scale[:, None]) == numbers and w.record.tolist() == list(range(12))
        np.testing.assert_allclose(w.onset[:, 0],
                                   [2500 + k - (6000 - 2048 + 1)//2 for k in numbers], atol=1)


def test_the_table_counts_and_not_a_name(both):
    "Rows in another order are other rows, also of a data set that somebody filtered"
    folder = both[0]
    data = WaveformDataset(folder, component_order='ZNE', dimension_order='NCW')
    data.filter(data.metadata['number'] % 3 == 0)
    from seismodel.data.sources import SeisBenchSource
    source = SeisBenchSource(data, None, 'thirds')
    assert ([int(n) for n in source.metadata('number')] == numbers_of(source)
            == list(range(0, RECORDS, 3)))


def test_a_fraction_takes_whole_events_of_either_chunk(both):
    for where in both:
        source = open_source(str(where), 'train')
        known = bool(source.metadata('source_id', '')[0])
        events = ([f'e{k//2}' for k in numbers_of(source)]
                  if known else [source.label(i) for i in range(12)])
        assert source.events() == events and len(set(events)) == (6 if known else 12)
        for fraction in (.25, .5, .75):
            part = subset_events(source, fraction, 3)
            assert len(part) == int(np.ceil(fraction*len(set(events))))*(2 if known else 1)
            assert part.events() == [events[k] for k in part.rows] if where == both[0] else True
            assert (set(numbers_of(part))
                    == {numbers_of(source)[k] for k, e in enumerate(events)
                        if e in set(part.events())})


def test_a_store_from_before_chunks_had_names_tells_its_traces_apart(both, monkeypatch):
    "Traces without an event that are called alike are events of their own"
    source = open_source(str(both[1]), 'train')
    if source.metadata('source_id', '')[0]: return
    index = np.array(source.store.index)
    index['name'] = [name.split(b' in chunk')[0] for name in index['name']]
    source.store.index = index
    assert len(set(index['name'])) == RECORDS//2 and len(set(source.events())) == 12
    assert sum(map(len, (subset_events(source, f) for f in (.25, .5)))) == 9


def test_window_models_learn_the_label_of_the_record(both):
    for where in both:
        question, training, dev = label_sources([str(where)], 'kind', None, .5, 1, 2048)
        for source in training + dev:
            windows = LabelledWindows([source], 40, window=2048)
            batch = windows.batch(range(40))
            numbers = heard(batch['x'])
            assert ([int(y) for y in batch['y']] == [k % 2 for k in numbers]
                    == [int(source.y[i]) for i in batch['record']])
            assert len(set(numbers)) == len(source)
        numbers, = (label_sources([str(where)], 'number', None, 1., 1, 2048)[1])
        assert numbers.y.tolist() == numbers_of(open_source(str(where), 'train'))


class Hearer(WaveformModel):
    """A picker that says which record a window is of: the probability of P is 1 at the sample with
    the record's number"""
    def __init__(self):
        super().__init__(component_order='ZNE', sampling_rate=100, output_type='array',
                         in_samples=3001, pred_sample=(0, 3001), labels='NPS')
    def forward(self, x):
        p = torch.zeros_like(x)
        for b, k in enumerate(heard(x.transpose(1, 2))): p[b, 1, k::100] = 1.
        return p
    def annotate_batch_post(self, batch, piggyback, argdict): return batch.transpose(1, 2)


def opened(folder):
    return WaveformDataset(folder, component_order='ZNE', dimension_order='NCW', sampling_rate=100)


def test_targets_are_read_from_their_own_record(chunks, tmp_path):
    "The windows of the benchmark, their events, and whole records"
    data = opened(chunks)
    for table in targets(data, tmp_path/'t'):
        x = evaluation.predict(Hearer(), data, table)
        number = data.metadata['number'].to_numpy()[table['trace_idx']]
        assert (((x['p_sample_pred'] - np.trunc(x['start_sample'])) % 100 == number).all()
                and len(set(number)) == RECORDS)
    names = event_names(data.metadata)
    assert len(set(names)) == (RECORDS//2 if 'source_id' in data.metadata else RECORDS)


def test_intervals_are_drawn_over_the_right_events(chunks, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, 'score_tasks', lambda dev, one, two,
                        draws: seen.extend((dev, one, two)))
    data = opened(chunks)
    evaluation.pick_benchmark(Hearer(), data, tmp_path/'t')
    names = event_names(data.metadata).to_numpy()
    for table in seen:
        assert (table['event'].to_numpy() == names[table['trace_idx']]).all() and len(table)

    class Silent:
        def classify(self, stream, **thresholds):
            from seisbench.util import ClassifyOutput, PickList
            return ClassifyOutput('silent', picks=PickList([]))
    records = score_records(Silent(), data)
    assert records['event'].tolist() == np.repeat(names, 2).tolist()


def test_published_targets_must_say_which_chunk_they_mean(chunks, tmp_path):
    data = opened(chunks)
    for name, table in zip(('task1', 'task23'), targets(data, tmp_path/'t')):
        table.drop(columns='trace_chunk').to_csv(tmp_path/f'{name}.csv', index=False)
    with pytest.raises(UserError,
                       match='which 2 chunks of the data have; it needs a column trace_chunk'):
        targets(data, tmp_path)
    table.assign(trace_name='nowhere', trace_type='noise').to_csv(tmp_path/'task1.csv', index=False)
    with pytest.raises(UserError,
                       match='names the trace nowhere in chunk A, which the data do not have'):
        targets(data, tmp_path)


def test_targets_of_other_data_are_refused(chunks, tmp_path):
    "A data set of the same shape, with its P later: its targets are its own"
    targets(opened(chunks), tmp_path/'t')
    other = shutil.copytree(chunks, tmp_path/'other')
    shift(other, 500)
    with pytest.raises(UserError,
                       match='holds targets of other data, or of these before their labels '
                             'changed; name another --out'):
        targets(opened(other), tmp_path/'t')
    targets(opened(chunks), tmp_path/'t')
    (tmp_path/'t/made_from.json').write_text('{"a', encoding='utf-8')
    with pytest.raises(UserError, match='holds targets of other data'):
        targets(opened(chunks), tmp_path/'t')


def shift(folder, samples):
    "Move every P pick of a data set"
    for file in folder.glob('metadata*.csv'):
        table = pd.read_csv(file)
        table.assign(trace_p_arrival_sample=table.trace_p_arrival_sample
                     + samples).to_csv(file, index=False)


# fingerprints

def test_a_fingerprint_changes_with_records_labels_and_sizes(both, tmp_path):
    for where in both:
        assert (open_source(str(where)).fingerprint() == open_source(str(where)).fingerprint()
                != open_source(str(where), 'dev').fingerprint())
    was, folder = open_source(str(both[0])).fingerprint(), shutil.copytree(both[0], tmp_path/'copy')
    assert open_source(str(folder)).fingerprint() == was                       # wherever it lies
    def changed(edit):
        shutil.rmtree(folder); shutil.copytree(both[0], folder)
        edit()
        return open_source(str(folder)).fingerprint() != was
    table = pd.read_csv(folder/'metadataB.csv')
    assert changed(lambda: shift(folder, 1))
    assert changed(lambda: table.drop(index=5).to_csv(folder/'metadataB.csv', index=False))
    assert changed(lambda: table[::-1].to_csv(folder/'metadataB.csv', index=False))
    assert changed(lambda: table.assign(trace_sampling_rate_hz=50.).to_csv(
        folder/'metadataB.csv', index=False))
    def longer():
        with open(folder/'waveformsA.hdf5', 'ab') as f: f.write(b'\0')
    assert changed(longer)


SMALL = dict(steps=2, batch_size=2, validation_windows=2, checkpoint_every=1, device='cpu')
COMMANDS = {'pretrain': lambda data,
            **more: pretrain('contrastive-tiny', [data], window=1024, **SMALL, **more),
            'finetune': lambda data,
            **more: finetune('random', 'contrastive-tiny', [data], augment='none', **SMALL, **more),
            'finetune a fraction': lambda data,
            **more: finetune('random', 'contrastive-tiny', [data], fraction=.5, augment='none',
                             **SMALL, **more),
            'finetune a column': lambda data,
            **more: finetune('random', 'contrastive-tiny', [data], 'kind', **SMALL, **more)}


@pytest.mark.parametrize('command', COMMANDS)
def test_a_run_goes_on_with_its_own_data_alone(command, quakes_folder, tmp_path, monkeypatch):
    "P moved by 500 samples: as many records, and another task"
    monkeypatch.setattr('seismodel.training.trainer.draw_run', lambda *a: None)
    table = pd.read_csv(quakes_folder/'metadata.csv')
    table.assign(kind=np.where(np.arange(len(table)) % 3, 'a',
                               'b')).to_csv(quakes_folder/'metadata.csv', index=False)
    run = COMMANDS[command](str(quakes_folder), out=tmp_path/'run')
    resume = pretrain if command == 'pretrain' else finetune
    # as if killed after step 1
    checkpoint_files(run)[0].unlink()
    keep, metadata = shutil.copytree(run, tmp_path/'keep'), quakes_folder/'metadata.csv'
    before = metadata.read_bytes()
    shift(quakes_folder, 500)
    with pytest.raises(UserError,
                       match=r'have changed since it began: quakes \(train\), quakes \(dev\) has '
                             r'other records'):
        resume(resume=run)
    assert ({f.name: f.read_bytes() for f in run.iterdir() if f.is_file()}
            == {f.name: f.read_bytes() for f in keep.iterdir() if f.is_file()})
    metadata.write_bytes(before)
    resume(resume=run)
    names = json.loads((run/'config.json').read_text(encoding='utf-8'))['fingerprints']
    assert [name for name, _ in names['train'] + names['dev']] == ['quakes', 'quakes']


def test_a_source_of_your_own_needs_two_methods():
    "Everything else follows: windows, parts, names"
    class Own(Source):
        name = 'own'
        def __len__(self): return 4
        def record(self, i):
            from seismodel.signals.records import Record
            return Record(np.random.default_rng(i).standard_normal((3000, 3)).astype(np.float32),
                          100., np.nan, f'own {i}', 2)
    data = WindowDataset([Own().subset([3, 1])], 20, window=1024)
    batch = data.batch(range(20))
    assert (batch['x'].shape == (20, 1024, 3) and set(batch['record'].tolist()) == {0, 1}
            and Own().subset([2]).label(0) == 'own 2')

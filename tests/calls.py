"""Calls of `seismodel` with any options, on files that are whole, missing, wrong or damaged: for
test_fuzz.py and scripts/fuzz.py"""
import contextlib
import csv
import io
import json
import shutil
import traceback
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st

from seismodel.cli import COMMANDS, OLD_COMMANDS, described, main
from seismodel.data.sources import open_records, write_synthetic
from seismodel.options import make_parser

STUDY = ('--fractions 1 --seeds 0 --steps 1 --batch-size 2 --validation-windows 2 '
         '--augment none --synthetic 0 --device cpu')
NUMBERS = ['-1', '0', '1', '2', '0.5', '1e-3', 'nan', 'inf', 'x', '', '1,2', '-0.1', '512']
WORDS = ['', 'x', 'train', 'dev', 'test', 'none', 'full', 'all', 'random', 'contrastive-tiny',
         'reconstruction-tiny', 'spectrum-tiny', 'synthetic',
         'int16', 'float16', 'P', 'S', '1,1', '2024-02-30', '2024-02-28', 'CH', '*',
         'trace_category', 'trace_p_arrival_sample', 'up,down', 'PhaseNet', 'PhaseNet:none',
         '\udcff', 'ä b']
FEW = {'steps': '1', 'batch_size': '2', 'validation_windows': '2', 'window': '512', 'device': 'cpu',
       'workers': '0', 'jobs': '1'}
VALUES = [None, [], {}, -1, 0, 1, 'x', '', 1e9, .5, True, [0, 4], [.9], ['a'], {'a': 1}]


def quietly(call):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def make_world(folder, study=False):
    """A data set, others without splits or picks, a store, a waveform file with a catalogue, and a
    run of each kind, one step long; a study on demand"""
    import obspy, pandas as pd
    write_synthetic(folder/'data', dict(train=3, dev=2, test=2), samples=3000)
    for name, drop in (('no_split', 'split'),
                       ('no_picks', 'trace_p_arrival_sample,trace_s_arrival_sample'),
                       ('no_events', 'source_id')):
        shutil.copytree(folder/'data', folder/name)
        table = pd.read_csv(folder/name/'metadata.csv')
        table.drop(columns=drop.split(',')).to_csv(folder/name/'metadata.csv', index=False)
    obspy.read().write(str(folder/'waves.mseed'), format='MSEED')
    (folder/'empty').mkdir()
    (folder/'note.txt').write_text('a note', encoding='utf-8')
    rows = [f'e1,BW,RJOB,{phase},2009-08-24T00:20:{second}' for phase,
            second in (('P', '08'), ('S', '12'))]
    (folder/'picks.csv').write_text('\n'.join(['event,network,station,phase,time', *rows, '']),
                                    encoding='utf-8')
    few = ['--steps', '1', '--batch-size', '2', '--validation-windows', '2', '--device', 'cpu']
    run = lambda *words: quietly(lambda: main([str(w) for w in words]))
    codes = [run('pack', folder/'data', '--window', '512', '--out', folder/'store'),
             run('pretrain', '--preset', 'contrastive-tiny', '--window', '512', *few, '--out',
                 folder/'run'),
             run('finetune', '--from', folder/'run', '--data', folder/'data', *few, '--out',
                 folder/'picker'),
             run('finetune-window', '--from', folder/'run', '--data', folder/'data', '--column',
                 'trace_p_arrival_sample', *few, '--out', folder/'windows'),
             run('pick', folder/'waves.mseed', '--model', folder/'picker', '--out', folder/'picks'),
             run('dataset', folder/'picks.csv', '--waveforms', folder/'waves.mseed', '--before',
                 '5', '--after', '16', '--noise', '0', '--out', folder/'built')]
    if study:
        codes.append(run('study', '--from', folder/'run', '--data', folder/'data', *STUDY.split(),
                         '--out', folder/'study'))
    return codes


def options_of(name):
    "The options of a command, of today or of 0.1"
    name = OLD_COMMANDS.get(name, (name, name))[0]
    return [a for a in make_parser(f'seismodel {name}', described(name))._actions
            if a.dest not in ('help', 'quiet')]


def paths():
    return st.sampled_from(['data', 'no_split', 'no_picks', 'no_events', 'store', 'waves.mseed',
                            'empty', 'note.txt', 'run', 'picker', 'windows', 'picks', 'picks.csv',
                            'built', 'study',
                            'nothing', 'run/model.safetensors',
                            'run/checkpoints/step-00000001.safetensors', 'run/best', '.',
                            'data/metadata.csv'])


def option(action):
    "Words of one option: its name where it has one, and a value that may fit"
    name = action.option_strings[-1:]
    if action.nargs == 0: return st.just(name)
    if action.dest in FEW:
        value = st.sampled_from([FEW[action.dest]]*6 + ['-1', '0', 'x', 'cuda:9', ''])
    elif action.dest in ('data', 'sources', 'where', 'from_run', 'model', 'run', 'runs', 'paths',
                         'resume', 'targets', 'inventory'):
        value = paths() | st.sampled_from(WORDS)
    elif action.dest == 'out':
        value = st.sampled_from(['out', 'out', 'out', 'run', 'picks', 'note.txt', 'note.txt/x',
                                 'out.png'])
    else: value = st.sampled_from(NUMBERS + WORDS)
    return value.map(lambda v: [*name, v])


GOOD = [f'pretrain --data {d} FEW --window 512 --out out'
        for d in ('store', 'data', 'no_split', 'synthetic')] + [
    *(f'finetune --from run --data {d} FEW --out out'
      for d in ('data', 'no_picks', 'no_events', 'store')),
    'finetune --from random --preset spectrum-tiny --data store FEW --out out',
    'finetune-window --from run --data data --column trace_p_arrival_sample FEW --out out',
    'finetune-window --from run --data store --column trace_category FEW --out out',
    *(f'evaluate picker --data {d} --device cpu --out out'
      for d in ('data', 'no_split', 'no_picks', 'no_events')),
    'evaluate-window windows --data data --device cpu',
    'evaluate-window windows --device cpu --out out',
    'pick waves.mseed --model picker --device cpu --out out',
    'pick waves.mseed --model picker --device cpu --out picks',
    'pack data waves.mseed --window 512 --out out', 'pack no_split --out store',
    'inspect store --window 512 --out out.png', 'inspect data --out out.png',
    'embed run store --split test --device cpu --out out',
    'embed run waves.mseed --device cpu --out out',
    *(f'info {r}' for r in ('run', 'picker', 'windows', 'run/best')),
    'plot run --out out', 'plot run picker --out out', 'verify store run picker windows',
    *3*['pretrain --resume run', 'finetune --resume picker', 'finetune-window --resume windows']]
DATASET = '--waveforms waves.mseed --before 5 --after 16 --noise 0'
GOOD += [f'dataset picks.csv {DATASET} --out out',
         f'dataset picks.csv {DATASET} --out built --append', f'dataset data {DATASET} --out out',
         f'dataset picks.csv {DATASET} --check picker --out out',
         *2*[f'study --from run --data data {STUDY} --out study']]
TRAIN = '--steps 1 --batch-size 2 --validation-windows 2 --device cpu'


@st.composite
def calls(draw, good=tuple(GOOD)):
    """Words after `seismodel`: a good call, perhaps with one option more or one word changed, or
    any options of a command"""
    if draw(st.integers(0, 2)):
        words = draw(st.sampled_from(good)).replace('FEW', TRAIN).split()
        how = draw(st.sampled_from(['as it is', 'as it is', 'one more', 'changed']))
        actions = [a for a in options_of(words[0]) if a.option_strings]
        if how == 'one more' and actions: words += draw(option(draw(st.sampled_from(actions))))
        if how == 'changed' and len(words) > 1:
            words[draw(st.integers(1, len(words) - 1))] = draw(
                paths() | st.sampled_from(WORDS + NUMBERS))
        return words
    name = draw(st.sampled_from([*COMMANDS]))
    words, actions = [name], options_of(name)
    for a in actions:
        needed = (not a.option_strings or a.dest in FEW
                  or a.dest in ('data', 'from_run', 'out', 'column'))
        if draw(st.integers(0, 9)) < (9 if needed else 1): words += draw(option(a))
    return words


@st.composite
def damages(draw):
    "What is done to which file: the number of the file, a kind, a number for the place, a value"
    return draw(st.tuples(st.integers(0, 999), st.sampled_from(
        ['nothing', 'field', 'field', 'empty', 'cut', 'bit', 'latin', 'list', 'column']),
                          st.integers(0, 10**6), st.sampled_from(VALUES)))


def change_json(text, place, value):
    "Another value in one field, somewhere"
    what, found = json.loads(text), []
    def walk(x):
        for k in (x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()):
            found.append((x, k))
            walk(x[k])
    walk(what)
    x, k = found[place % len(found)]
    x[k] = value
    return json.dumps(what)


def change_table(text, place, value):
    "Another value in one cell, or a column less"
    rows = list(csv.reader(io.StringIO(text)))
    k = place % len(rows[0])
    if value is None: rows = [row[:k] + row[k + 1:] for row in rows]
    else: rows[-1][k] = str(value)
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def damage(file, kind, place, value):
    blob = file.read_bytes()
    if kind == 'empty': new = b''
    elif kind == 'cut': new = blob[:place % max(len(blob), 1)]
    elif kind == 'bit' and blob:
        new = np.frombuffer(blob, np.uint8).copy()
        new[place % len(blob)] ^= 1 << place % 8; new = new.tobytes()
    elif kind == 'latin': new = blob[:20] + b'\xff\xfe' + blob[20:]
    elif kind == 'list': new = b'[1, 2]'
    elif file.suffix == '.json' and kind != 'nothing':
        new = change_json(blob.decode(), place, value).encode()
    elif file.suffix == '.csv' and kind != 'nothing':
        new = change_table(blob.decode(), place, value).encode()
    else: return
    file.write_bytes(new)


def files_of(world):
    "What may be damaged, each kind alike"
    return sorted(f for f in world.rglob('*') if f.is_file()
                  and f.suffix in ('.json', '.csv', '.npy', '.safetensors', '.jsonl', '.hdf5',
                                   '.mseed'))


def call(world, files, words, how):
    "Damage a file, call, mend it; the traceback, or None where there was a sentence or a result"
    number, *rest = how
    named = [f for f in files if any((world/w) in (f, *f.parents) for w in words[1:]
                                     if w not in ('', '.') and '/' not in w)]
    # rather a file that the call will read
    file = (named or files)[number % len(named or files)]
    before = file.read_bytes()
    damage(file, *rest)
    open_records.cache_clear()
    error = None
    try:
        with patch('seismodel.training.trainer.draw_run', lambda *a: None), \
             patch('seismodel.picking.evaluation.bootstrap', lambda metric, table,
                   draws: (metric(table), 0., 0.)):   # seconds each
            quietly(lambda: main(words))
    except SystemExit: pass
    except Exception: error = traceback.format_exc()
    if file.parent.exists(): file.write_bytes(before)
    for out in ('out', 'out.png'):
        shutil.rmtree(world/out, ignore_errors=True)
        (world/out).unlink(missing_ok=True) if (world/out).is_file() else None
    return error

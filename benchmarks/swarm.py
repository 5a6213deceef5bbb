"""Recall of second and later events in swarms, by the commands that a user has: dataset, finetune,
evaluate

    python benchmarks/swarm.py --out swarm_recall.csv --seeds 2

The generator makes minutes with two to five events at one station. They are written as an archive
and a catalogue, become a data set, and a tiny picker learns from it: once with every pick of every
event in a record, and once from a copy of the table that has one P and one S a record, as data sets
had before. So few steps leave no time to learn from augmented windows. """
import argparse
import re
import shutil
import time
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pandas as pd
from obspy import Stream, Trace, UTCDateTime

from seismodel.cli import main as seismodel
from seismodel.data.catalogue import Catalogue, PhasePick, catalogue_to_obspy
from seismodel.signals.several_events import synthesize_swarm

# s from the beginning of a minute to that of the next
START, EVERY = UTCDateTime('2024-01-01'), 90
WAYS = {'every event': 'every', 'one event': 'one'}


def run(*words):
    "A command; stops where it fails"
    if seismodel([str(w) for w in words]): raise SystemExit(f'seismodel {words[0]} failed')


def write_swarm(folder: Path, count: int, samples: int = 6000):
    "An archive and a QuakeML file of `count` minutes"
    traces, picks = {c: [] for c in 'ZNE'}, []
    for k in range(count):
        swarm, begin = synthesize_swarm([k], 0, samples), START + EVERY*k
        x = swarm.waveforms[0]/swarm.waveforms[0].std()*1000
        for c, component in zip('ZNE', x.T):
            head = dict(network='XX', station='SWARM', channel=f'HH{c}', sampling_rate=100.,
                        starttime=begin)
            traces[c].append(Trace(np.rint(component).astype(np.int32), head))
        for n, event in enumerate(swarm.events[0]):
            picks += [PhasePick(f'smi:local/{k}-{n}', 'XX', 'SWARM', '', f'HH{c}', phase,
                                (begin + t/100).ns, 'manual')
                      for phase, c, t in zip('PS', 'ZN', event.astype(float)) if t == t]
    (folder/'archive').mkdir(parents=True)
    for c, own in traces.items():
        Stream(own).write(str(folder/f'archive/{c}.mseed'), format='MSEED')
    catalogue_to_obspy(Catalogue({}, picks)).write(str(folder/'swarm.xml'), format='QUAKEML')


def forget_others(data: Path, out: Path):
    "A copy of a data set whose table knows one P and one S a record"
    shutil.copytree(data, out)
    for file in out.glob('metadata*.csv'):
        table = pd.read_csv(file, dtype=str)
        other = re.compile(r'trace_[PS](\d+_.*|_unlabelled_samples)')
        table.drop(columns=[c for c in table if other.fullmatch(c)]).to_csv(file, index=False)


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--out', type=Path, default=Path('swarm_recall.csv'))
    options.add_argument('--minutes', type=int, default=150)
    options.add_argument('--steps', type=int, default=260)
    options.add_argument('--batch-size', type=int, default=8)
    options.add_argument('--seeds', type=int, default=1)
    options.add_argument('--lr', type=float, default=2e-3)
    args, tables, folder = options.parse_args(), [], Path(mkdtemp())
    write_swarm(folder, args.minutes)
    run('dataset', folder/'swarm.xml', '--waveforms', folder/'archive', '--out', folder/'every',
        '--noise', 0)
    forget_others(folder/'every', folder/'one')
    for seed in range(args.seeds):
        for name, labels in WAYS.items():
            begin, out = time.time(), folder/f'{labels}-{seed}'
            run('finetune', '--from', 'random', '--preset', 'contrastive-tiny', '--data',
                folder/labels, '--out', out, '--augment', 'none',
                '--steps', args.steps, '--batch-size', args.batch_size, '--lr', args.lr, '--seed',
                seed, '--device', 'cpu', '--workers', 0)
            print(f'{name}, seed {seed}: {time.time() - begin:.0f} s', flush=True)
            for threshold in (.1, .2):
                scores = out/f'at-{threshold}'
                run('evaluate', out, '--data', folder/'every', '--device', 'cpu', '--threshold',
                    threshold, '--out', scores)
                tables.append(pd.read_csv(scores/'matches.csv').assign(labels=name, seed=seed,
                                                                       threshold=threshold))
            pd.concat(tables).round(5).to_csv(args.out, index=False)
    shutil.rmtree(folder)


if __name__ == '__main__': main()

#!/usr/bin/env python
"""What checking the samples of a store costs a training run: its first pass, with and without, in
turn.

    python benchmarks/seals.py [--windows 10000] [--traces 10000] [--rounds 7]
                               [--out nbs/runs/seals.csv]

A store of random traces of 2 minutes (72 kB each) in the page cache. One pass is read as
`seismodel.training.trainer` reads: batches of 32 by a loader in this process, augmented and
normalised by the prefetching thread, one thread of the CPU. Passes with and without the check
follow each other on a fresh `Store`. Given are medians, and the quartiles of the ratio in pairs: in
seconds of the CPU, which other processes disturb less, and of the clock. `inside` is the time in
the check itself, with the reading of pages that would otherwise be read a moment later: more than
it can cost. """
import argparse
import csv
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from zlib import crc32

import numpy as np
import torch

from seismodel.data.prefetch import device_batches
from seismodel.data.store import StoreWriter, finish
from seismodel.data.store_reader import Store, StoreSource
from seismodel.data.windows import WindowDataset
from seismodel.signals.augment import pretrain_augment
from seismodel.signals.records import Record
from seismodel.training.batches import make_dataloader
from seismodel.training.config import TrainConfig

BATCH = 32


def make_store(folder, traces):
    "Random counts, another series in each trace"
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24_000, 3))*1000).round().astype(np.float32)
    plan = dict(dtype='int16', window=4096, shard_samples=256*2**20//6,
                sources=[dict(name='big', where='', weight=None, files=[])])
    with StoreWriter(folder, plan) as writer:
        for k in range(traces):
            writer.add(0, Record(x[k % 12_000:][:12_000], 6000., 7000., f'trace{k}', 2, 2),
                       'train', {}, k)
        finish(writer)


def first_pass(folder, windows, check, augment):
    "Seconds of the CPU, of the clock, and of the CPU inside the check"
    store, inside = Store(folder), [0.]
    if not check: store.checked[:] = True
    def timed(rows, own=store.check):
        start = time.thread_time()
        own(rows)
        inside[0] += time.thread_time() - start
    store.check = timed
    data = WindowDataset([StoreSource(store)], windows)
    order = [list(range(k, k + BATCH)) for k in range(0, windows, BATCH)]
    change = pretrain_augment(torch.zeros(0, 4096, 3)) if augment else None
    loader = make_dataloader(data, order, TrainConfig(workers=0), torch.device('cpu'), raw=True)
    used, start, seen = time.process_time(), time.perf_counter(), 0
    for batch in device_batches(loader, BATCH, augment=change): seen += len(batch['x'])
    assert seen == windows and (not check or store.checked.mean() > .5*min(1, windows/len(store)))
    return time.process_time() - used, time.perf_counter() - start, inside[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', type=int, default=10_000)
    parser.add_argument('--traces', type=int, default=10_000)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=Path, help='a CSV file for the results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = args.windows//BATCH*BATCH
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'store'
        make_store(folder, args.traces)
        store = Store(folder)
        x = store.shard(0)[0][:12_000]
        costs = []
        for _ in range(2000):
            start = time.perf_counter()
            crc32(x)
            costs.append(time.perf_counter() - start)
        print(f'{windows} windows of {args.traces} traces; CRC-32 of one trace '
              f'{1e6*median(costs):.1f} us')
        rows = []
        for augment in (True, False):
            passes = [[first_pass(folder, windows, check, augment)
                       for check in ((True, False) if k % 2 else (False, True))]
                      for k in range(args.rounds + 1)]
            # checked first; the first round warms up
            pairs = [(p if k % 2 else p[::-1]) for k, p in enumerate(passes)][1:]
            inside = median(p[0][2]/p[0][0] for p in pairs)
            for j, clock in enumerate(('CPU', 'clock')):
                with_, without = (median(p[i][j] for p in pairs)/windows*1e6 for i in (0, 1))
                low, extra, high = quantiles((p[0][j]/p[1][j] - 1 for p in pairs), n=4)
                rows.append(dict(windows=windows, traces=args.traces, rounds=args.rounds,
                                 pass_='augmented' if augment else 'plain', seconds=clock,
                                 unchecked_us=round(without, 1), checked_us=round(with_, 1),
                                 extra=round(extra, 4), low=round(low, 4),
                                 high=round(high, 4), inside=round(inside, 4)
                                 if clock == 'CPU' else '', crc32_us=round(1e6*median(costs), 1)))
                print(f"{'augmented' if augment else 'plain':10} {clock:6} {without:7.1f} us a "
                      f"window, checked {with_:7.1f} us: {extra:+.1%} "
                      f"(quartiles {low:+.1%} {high:+.1%})"
                      + f'; inside the check {inside:.1%}'*(clock == 'CPU'), flush=True)
        if args.out:
            with open(args.out, 'w', newline='', encoding='utf-8') as f:
                writer = csv.DictWriter(f, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == '__main__': main()

#!/usr/bin/env python
"""Windows a second from a packed store, beside SeisBench's own generator in the same run, and
memory while reading.

    python benchmarks/loading.py FOLDER    # a SeisBench data set (metadata.csv, waveforms.hdf5)

Each figure is the best of several rounds, since other processes may use the machine; CPU time is
that of this process and its children. A window is 4096 x 3 samples at a random place, normalised
per component, with P and S onsets; SeisBench makes P, S and noise labels with a Gaussian, we leave
that to the picker, and time it here as well. """
import argparse
import mmap
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from seismodel.data.store_reader import Store, StoreSource
from seismodel.data.windows import WindowDataset
from seismodel.data.prefetch import Batches, device_batches, unpack_batch
from seismodel.data.pack import pack
from seismodel.data.store import StoreWriter, finish
from seismodel.signals.records import WINDOW, Record

BATCH = 256


def cpu():
    "Seconds of CPU, of this process and of children that have ended"
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def best(make, windows, rounds=5):
    """Windows a second and a second of CPU, the best of some rounds; `make()` gives an iterator of
    batches"""
    rates, costs = [], []
    for _ in range(rounds):
        start, used, seen = time.perf_counter(), cpu(), 0
        for batch in make():
            seen += len(batch)
            if seen >= windows: break
        rates.append(seen / (time.perf_counter() - start))
        costs.append(seen / max(cpu() - used, 1e-9))
    return max(rates), max(costs)


def seisbench_generator(folder, cache):
    """The generator of a picker's training: random window around a pick, normalised, probabilistic
    labels"""
    import seisbench
    import seisbench.data as sbd
    import seisbench.generate as sbg
    seisbench.logger.setLevel('ERROR')
    data = sbd.WaveformDataset(folder, component_order='ZNE', dimension_order='NCW',
                               sampling_rate=100., cache=cache)
    data = data.train()
    if cache: data.preload_waveforms()
    generator = sbg.GenericGenerator(data)
    phases = {'trace_p_arrival_sample': 'P', 'trace_s_arrival_sample': 'S'}
    generator.add_augmentations([
        sbg.RandomWindow(windowlen=WINDOW, strategy='pad'), sbg.ChangeDtype(np.float32),
        sbg.Normalize(demean_axis=-1, amp_norm_axis=-1, amp_norm_type='std'),
        sbg.ProbabilisticLabeller(label_columns={k: v for k, v in phases.items()
                                                 if k in data.metadata}, sigma=20, dim=0)])
    return generator


def gaussian_labels(batch, sigma=20., reach=110):
    """P, S and noise (B, 3, W) as SeisBench draws them, sigma 0.2 s; below 1e-6 beyond `reach`, and
    not computed"""
    B, margin = len(batch['p_onset']), reach + 1
    y = torch.zeros(B, 3, WINDOW + 2 * margin)
    y[:, 2] = 1
    for row, onset in enumerate((batch['p_onset'], batch['s_onset'])):
        here = onset.isfinite().nonzero()[:, 0]
        # (picked, 2 reach + 1)
        t = torch.arange(-reach, reach + 1) + onset[here].long()[:, None]
        curve = torch.exp(-((t - onset[here, None]) / sigma)**2 / 2)
        y[here[:, None], row, t + margin] = curve
        y[here[:, None], 2, t + margin] -= curve
    return y[:, :, margin:-margin]


def ours(store, labels=True):
    "Batches in this thread, normalised, with labels"
    data, batches = WindowDataset([StoreSource(store)], 10**9), None
    k = 0
    while True:
        batch = data.batch(range(k, k + BATCH))
        if labels: gaussian_labels(batch)
        k += BATCH
        yield batch['x']


def order():
    "Window numbers, batch by batch"
    return (range(k, k + BATCH) for k in count(0, BATCH))


def raw(store):
    "Batches as a GPU gets them"
    return DataLoader(Batches(WindowDataset([StoreSource(store)], 10**9), raw=True),
                      batch_size=None, sampler=order())


class Labelled(Batches):
    def __getitem__(self, numbers):
        batch = super().__getitem__(numbers)
        return {**batch, 'y': gaussian_labels(batch)}


def in_processes(store, workers=2):
    data = WindowDataset([StoreSource(store)], 10**9)
    return (b['x'] for b in DataLoader(Labelled(data), batch_size=None, sampler=order(),
                                       num_workers=workers,
                                        multiprocessing_context='spawn'))


def forget(folder):
    "Drop the samples from the page cache"
    for file in Path(folder).glob('samples-*.npy'):
        with open(file, 'rb') as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(folder):
    "Share of the samples' pages that are in memory, by mincore"
    import ctypes
    libc, seen, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for file in Path(folder).glob('samples-*.npy'):
        x = np.memmap(file, np.uint8, 'r')
        n = -(-len(x) // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * n)()
        libc.mincore(x.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE, len(x), vector)
        seen, pages = seen + sum(v & 1 for v in vector), pages + n
    return seen / pages


def big_store(folder, mib):
    "A store of this size: one random record, over and over, each a little louder"
    x = (np.random.default_rng(0).standard_normal((12_000, 3)) * 1000).round().astype(np.float32)
    plan = dict(dtype='int16', window=WINDOW, shard_samples=64 * 2**20 // 6,
                sources=[dict(name='big', where='', weight=None, files=[])])
    with StoreWriter(folder, plan) as writer:
        for k in range(mib * 2**20 // (12_000 * 6) + 1):
            writer.add(0, Record(x * (1 + k % 9), 6000., 7000., f'trace{k}', 2, 2), 'train', {}, k)
        finish(writer)
    return Store(folder)


def status(field):
    "A line of /proc/self/status, which Linux has, MiB"
    return int(next(line for line in open('/proc/self/status', encoding='utf-8')
                    if line.startswith(field)).split()[1]) / 1024


def bounded(folder, limit_mib, windows):
    "Child process: read from a store with a limit on private memory; prints how much it took"
    source = StoreSource(Store(folder))
    data = WindowDataset([source], 10**9)
    # everything is imported by now
    data.batch(range(64))
    import resource                                              # Linux and macOS
    before, used = status('RssAnon'), status('VmData')
    resource.setrlimit(resource.RLIMIT_DATA, (int((used + limit_mib) * 2**20),) * 2)
    peak, seen = before, set()
    for k in range(64, windows, 64):
        batch = data.batch(range(k, k + 64))
        peak = max(peak, status('RssAnon'))
        seen.update(batch['n'].tolist())
    print(f'{peak - before:.1f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--windows', type=int, default=5120, help='in a round')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--limit-mib', type=int, default=64,
                        help='private memory for reading a store ten times as large')
    parser.add_argument('--bounded', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bounded: return bounded(args.folder, args.limit_mib, args.windows)
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, {os.cpu_count()} CPUs; windows a second, and per second of '
          f'CPU')
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            pack([args.folder], tmp/'store')
        store, peer = Store(tmp/'store'), 0.
        for label, cache in (('SeisBench generator', None),
                             ('SeisBench generator, all in memory', 'full')):
            with redirect_stderr(StringIO()): generator = seisbench_generator(args.folder, cache)
            rng = np.random.default_rng(0)
            one = lambda: (generator[int(rng.integers(len(generator)))]['X'][None]
                           for _ in range(10**9))
            rate, cost = best(one, max(args.windows // 10, 200), args.rounds)
            print(f'  {label:45} {rate:9,.0f} {cost:9,.0f}')
            peer = max(peer, rate)
        loader = lambda: (b['X'] for b in DataLoader(generator, BATCH, num_workers=2))
        rate, cost = best(loader, args.windows // 4, 2)
        print(f'  {"SeisBench generator, in memory, 2 workers":45} {rate:9,.0f}')
        peer = max(peer, rate)
        top = 0.
        for label, make in (('store, one thread', lambda: ours(store)),
                            ('store, one thread, no label curves', lambda: ours(store, False)),
                            ('store, 2 processes', lambda: in_processes(store)),
                            ('store, raw int16 for a GPU, one thread',
                             lambda: (unpack_batch(b['bytes'], b['layout'])['x']
                                      for b in raw(store))),
                            ('store, prefetching thread',
                             lambda: (b['x'] for b in device_batches(raw(store), BATCH)))):
            rate, cost = best(make, args.windows, args.rounds)
            print(f'  {label:45} {rate:9,.0f} {cost:9,.0f}   x {rate / peer:.1f}')
        mib = 10 * args.limit_mib
        big = big_store(tmp/'big', mib)
        for label in ('cold', 'warm'):
            if label == 'cold': forget(tmp/'big')
            share = cached(tmp/'big')
            rate, cost = best(lambda: ours(big), args.windows, 1)
            print(f'  {f"store of {mib} MiB, {label} ({share:.0%} of it in the page cache)":45} '
                  f'{rate:9,.0f} {cost:9,.0f}')
            np.concatenate([np.load(f, mmap_mode='r')[::600].ravel()
                            for f in (tmp/'big').glob('samples-*.npy')])
        out = subprocess.run([sys.executable, __file__, str(tmp/'big'), '--bounded', '--limit-mib',
                              str(args.limit_mib),
                              '--windows', str(3 * len(big))], capture_output=True, text=True,
                             check=True).stdout
        print(f'private memory for {3 * len(big):,} windows of a store of {mib} MiB under a limit '
              f'of {args.limit_mib} MiB: + {out.strip()} MiB')


if __name__ == '__main__': main()

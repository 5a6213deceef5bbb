#!/usr/bin/env python
"""The contrastive step fed from a packed store against the same step fed from batches that lie in GPU memory.

    python benchmarks/loading_gpu.py STORE                      a packed store
    python benchmarks/loading_gpu.py --make-mib 4096            a store of random records of that size, made first

For each preset, both ways take turns, `--rounds` times. Printed are windows a second and the ratio of the two, which
should be 0.95 or more; the exit code says so as well. Neither SeisBench nor ObsPy is imported. With `--device cpu` and
`--preset contrastive-tiny` the script can be tried without a GPU.
"""
import argparse
import os
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from seismodel.reading import Store, StoreSource
from seismodel.loading import WindowDataset, device_batches
from seismodel.pretraining import build, preset
from seismodel.store import StoreWriter, finish
from seismodel.waveforms import WINDOW, Record


def make_store(folder, mib):
    "Random records of two minutes"
    rng = np.random.default_rng(0)
    noise = (1000 * rng.standard_normal((24_000, 3))).round().astype(np.float32)
    plan = dict(dtype='int16', window=WINDOW, shard_samples=256 * 2**20 // 6,
                sources=[dict(name='random', where='', weight=None, files=[])])
    with StoreWriter(folder, plan) as writer:
        for k in range(mib * 2**20 // (12_000 * 6) + 1):
            first = int(rng.integers(12_000))
            writer.add(0, Record(noise[first:first + 12_000], np.nan, np.nan, f'trace{k}'), 'train', {}, k)
        finish(writer)


class Trainer:
    "A model, its optimiser and one step, as in a run"
    def __init__(self, name, device):
        torch.manual_seed(0)
        self.preset, self.device = preset(name), device
        self.model = build(self.preset.model).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == 'cuda')
        self.generator = torch.Generator(device).manual_seed(0)
        self.done = 0

    def step(self, x):
        self.model.set_progress(self.done, 100_000)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == 'cuda'):
            loss, _ = self.model(x, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def timed(trainer, batches, steps, warm):
    "Windows a second over `steps` steps"
    wait = torch.cuda.synchronize if trainer.device.type == 'cuda' else lambda: None
    for batch in islice(batches, warm): trainer.step(batch['x'])
    wait()
    start, seen = time.perf_counter(), 0
    for batch in islice(batches, steps):
        trainer.step(batch['x'])
        seen += len(batch['x'])
    wait()
    return seen / (time.perf_counter() - start)


def compare(name, source, args, device):
    "Both ways in turns; prints a line, returns the median ratio"
    trainer = Trainer(name, device)
    size = args.batch or trainer.preset.batch_size
    data = lambda seed: WindowDataset([source], 10**9, seed=seed)
    first = device_batches(data(0), size, device)
    ready = [{k: v.clone() for k, v in b.items()} for b in islice(first, 8)]
    first.close()
    timed(trainer, cycle(ready), args.warm, args.warm)                              # kernels are compiled and chosen
    memory, store = [], []
    for k in range(args.rounds):
        memory.append(timed(trainer, cycle(ready), args.steps, args.warm))
        batches = device_batches(data(k + 1), size, device, workers=args.workers)
        store.append(timed(trainer, batches, args.steps, args.warm))
        batches.close()
    ratios = [b / a for a, b in zip(memory, store)]
    print(f'{name:22} batch {size:4}: in memory {median(memory):9,.0f}, from the store {median(store):9,.0f} windows/s, '
          f'ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})', flush=True)
    return median(ratios)


def loader_alone(source, size, device, seconds=4.):
    "Windows a second that arrive on the device when nobody trains"
    batches = device_batches(WindowDataset([source], 10**9), size, device)
    for _ in islice(batches, 5): pass
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch['x'])
        if time.perf_counter() - start > seconds: break
    if device.type == 'cuda': torch.cuda.synchronize()
    rate = seen / (time.perf_counter() - start)
    batches.close()
    return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('store', nargs='?')
    parser.add_argument('--make-mib', type=int, default=0)
    parser.add_argument('--preset', action='append', help='contrastive-small and contrastive-base if not given')
    parser.add_argument('--batch', type=int, default=0, help="windows; the preset's if not given")
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--warm', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int, default=0, help='loader processes beside the prefetching thread')
    parser.add_argument('--device', default='cuda')
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as tmp:
        if args.make_mib: make_store(Path(tmp)/'store', args.make_mib)
        elif not args.store: parser.error('give a store, or --make-mib')
        source = StoreSource(Store(args.store or Path(tmp)/'store'))
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
        print(f'{name}, torch {torch.__version__}, {os.cpu_count()} CPUs; {len(source):,} traces, '
              f"{source.store.manifest['samples'] * 3 * source.store.dtype.itemsize / 2**20:,.0f} MiB {source.store.dtype}")
        print(f'loader alone: {loader_alone(source, args.batch or 256, device):,.0f} windows/s in batches of {args.batch or 256}')
        ratios = [compare(p, source, args, device) for p in args.preset or ('contrastive-small', 'contrastive-base')]
    heavy = sorted(m for m in ('seisbench', 'obspy', 'h5py', 'pandas') if m in sys.modules)
    print(f'imported of seisbench, obspy, h5py, pandas: {", ".join(heavy) or "nothing"}')
    return 0 if min(ratios) >= .95 else 1


if __name__ == '__main__': sys.exit(main())

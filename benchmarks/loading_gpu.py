#!/usr/bin/env python
"""The trainer's step fed from a packed store, by the trainer's own path, against the same step fed
from batches that lie in GPU memory.

    python benchmarks/loading_gpu.py STORE              # a packed store
    python benchmarks/loading_gpu.py --make-mib 4096    # a store of that size, made first
    python benchmarks/loading_gpu.py STORE --augment    # as `seismodel finetune` augments

Step and batches are those of a run: `train_step`, recorded on a GPU (`--compile`: with compiled
blocks, as in long runs), and `training_batches`. For each preset, both ways take turns, `--rounds`
times. Printed are windows a second and the ratio of the two, which should be 0.95 or more; the exit
code says so as well. Neither SeisBench nor ObsPy is imported. With `--device cpu --preset
contrastive-tiny --augment --batch 8 --steps 5 --rounds 1` the script can be tried without a GPU.
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

from seismodel.signals.augment import fine_augment
from seismodel.training.distributed import Ranks
from seismodel.data.windows import WindowDataset
from seismodel.models.pretraining import build, preset
from seismodel.data.store_reader import Store, StoreSource
from seismodel.training.config import TrainConfig
from seismodel.training.cuda_graph import Replay, compile_blocks, tensor_float32
from seismodel.data.store import StoreWriter, finish
from seismodel.training.trainer import TrainingRun, train_step, training_batches, update_run
from seismodel.signals.records import WINDOW, Record


def make_store(folder, mib):
    "Random records of two minutes"
    rng = np.random.default_rng(0)
    noise = (1000 * rng.standard_normal((24_000, 3))).round().astype(np.float32)
    plan = dict(dtype='int16', window=WINDOW, shard_samples=256 * 2**20 // 6,
                sources=[dict(name='random', where='', weight=None, files=[])])
    with StoreWriter(folder, plan) as writer:
        for k in range(mib * 2**20 // (12_000 * 6) + 1):
            first = int(rng.integers(12_000))
            writer.add(0, Record(noise[first:first + 12_000], np.nan, np.nan, f'trace{k}'),
                       'train', {}, k)
        finish(writer)


class Trainer:
    "A model, its optimiser and one step, as in a run"
    def __init__(self, name, args, device):
        torch.manual_seed(0)
        self.ranks, on_gpu = Ranks(device), device.type == 'cuda'
        size = args.batch or preset(name).batch_size
        self.c = TrainConfig(steps=10**6, batch_size=size, lr=1e-4, workers=args.workers,
                             device=args.device)
        self.run, self.done = TrainingRun(build(preset(name).model), self.c, Path(), self.ranks), 0
        if args.compile: compile_blocks(self.run.model)
        if on_gpu:
            self.run.replay = Replay(lambda inputs: update_run(self.run, [inputs]),
                                     self.run.generator)

    def step(self, batches):
        "One step; how many windows it took"
        _, _, used = train_step(self.run, batches, self.done)
        self.done += 1
        return sum(len(b['x']) for b in used)


def batches_of(source, trainer, seed, augment=None):
    "The iterator of a run, as a context"
    return training_batches(WindowDataset([source], 10**9, seed=seed), trainer.c, trainer.ranks, 0,
                            augment)


def timed(trainer, batches, steps, warm):
    "Windows a second over `steps` steps"
    wait = torch.cuda.synchronize if trainer.ranks.device.type == 'cuda' else lambda: None
    for _ in range(warm): trainer.step(batches)
    wait()
    start = time.perf_counter()
    seen = sum(trainer.step(batches) for _ in range(steps))
    wait()
    return seen / (time.perf_counter() - start)


def compare(name, source, args, device):
    "Both ways in turns; prints a line, returns the median ratio"
    trainer = Trainer(name, args, device)
    noise = torch.randn(512, WINDOW, 3, generator=torch.Generator().manual_seed(0)).to(device)
    augment = fine_augment(noise) if args.augment else None
    with batches_of(source, trainer, 0, augment) as batches: ready = list(islice(batches, 8))
    ready = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in b.items()}
             for b in ready]
    # kernels are compiled, chosen, recorded
    timed(trainer, cycle(ready), args.warm, args.warm)
    memory, store = [], []
    for k in range(args.rounds):
        memory.append(timed(trainer, cycle(ready), args.steps, args.warm))
        with batches_of(source, trainer, k + 1, augment) as batches:
            store.append(timed(trainer, batches, args.steps, args.warm))
    ratios = [b / a for a, b in zip(memory, store)]
    print(f'{name:22} batch {trainer.c.batch_size:4}: in memory {median(memory):9,.0f}, from the '
          f'store {median(store):9,.0f} windows/s, '
          f'ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})', flush=True)
    return median(ratios)


def loader_alone(source, args, device, seconds=4.):
    "Windows a second that arrive on the device when nobody trains"
    c, start, seen = TrainConfig(steps=10**6, batch_size=args.batch or 256,
                                 workers=args.workers), None, 0
    with training_batches(WindowDataset([source], 10**9), c, Ranks(device)) as batches:
        for k, batch in enumerate(batches):
            if k == 5: start, seen = time.perf_counter(), 0
            seen += len(batch['x'])
            if start and time.perf_counter() - start > seconds: break
        if device.type == 'cuda': torch.cuda.synchronize()
        return seen / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('store', nargs='?')
    parser.add_argument('--make-mib', type=int, default=0)
    parser.add_argument('--preset', action='append',
                        help='contrastive-small and contrastive-base if not given')
    parser.add_argument('--batch', type=int, default=0, help="windows; the preset's if not given")
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--warm', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int,
                        help='loader processes beside the prefetching thread; those of a run if '
                             'not given')
    parser.add_argument('--augment', action='store_true',
                        help='as `seismodel finetune` does, with noise that is random')
    parser.add_argument('--compile', action='store_true',
                        help='compile the blocks, as runs of 2,000 steps and more do')
    parser.add_argument('--device', default='cuda')
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as tmp:
        if args.make_mib: make_store(Path(tmp)/'store', args.make_mib)
        elif not args.store: parser.error('give a store, or --make-mib')
        source = StoreSource(Store(args.store or Path(tmp)/'store'))
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
        print(f'{name}, torch {torch.__version__}, {os.cpu_count()} CPUs; {len(source):,} traces, '
              f"{source.store.manifest['samples'] * 3 * source.store.dtype.itemsize / 2**20:,.0f} "
              f"MiB {source.store.dtype}")
        print(f'loader alone: {loader_alone(source, args, device):,.0f} windows/s in batches of '
              f'{args.batch or 256}')
        with tensor_float32(device):
            ratios = [compare(p, source, args, device) for p in args.preset
                      or ('contrastive-small', 'contrastive-base')]
    heavy = sorted(m for m in ('seisbench', 'obspy', 'h5py', 'pandas') if m in sys.modules)
    print(f'imported of seisbench, obspy, h5py, pandas: {", ".join(heavy) or "nothing"}')
    return 0 if min(ratios) >= .95 else 1


if __name__ == '__main__': sys.exit(main())

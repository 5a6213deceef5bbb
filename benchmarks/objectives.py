"""What pretraining buys, by objective, budget and way of fine-tuning: many trials on one GPU.

    seismodel pack LABELLED --out labelled; seismodel pack UNLABELLED --out unlabelled
    python benchmarks/objectives.py prepare --labelled labelled --unlabelled unlabelled --data data
    python benchmarks/objectives.py run --data data --out results --jobs 14
    python benchmarks/objectives.py table --out results

A plan line names pretrained starts, ways of fine-tuning, fractions of the labelled events and folds, and stands
for all their combinations:

    --plan 'spectrum:480 spectrum:480:1 random | plain decay.65 | .1 1 | 0 1 2'

`spectrum:480:1` is the variant `spectrum` after 480,000 windows, with seed 1. Several `--plan` are worked off in
their order; `VARIANTS` and `WAYS` below list the names, and `PLAN` is the plan if none is given.

Each trial is a process of its own, which is meant to share the GPU with others under NVIDIA MPS. A pretraining
leaves pretrained/NAME.safetensors (float16) and .json, a fine-tuning trials/NAME.json. What is there is not run
again, so the same command goes on after an interruption. `--small` tries everything on a CPU in a few minutes.

The events of `train` and `dev` are divided into five folds; records of `test` do not leave `prepare`. The score
has no threshold: the sample with the highest probability in a window around each manual onset of the fold.
Needs torch, numpy and this package, not SeisBench or ObsPy.
"""
import argparse
import csv
import json
import math
import os
import sys
import time
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from seismodel.data.prefetch import amplitudes, to_model
from seismodel.data.sources import SyntheticSource
from seismodel.data.store import quantize_samples
from seismodel.data.store_reader import Store
from seismodel.finetuning.heads import Picker
from seismodel.models.encoders import BidirAutoregConfig
from seismodel.models.pretraining import (MaskedConfig, ReconstructionConfig, build, config_to_dict,
                                          preset)
from seismodel.signals.augment import Augmentation, fine_augment, pretrain_augment
from seismodel.signals.noise import calm_bank, noise_bank
from seismodel.signals.records import STATUS, WINDOW, Record
from seismodel.signals.source import Source
from seismodel.signals.synthetic import SyntheticConfig
from seismodel.training.config import TrainConfig
from seismodel.training.cuda_graph import Replay, compile_blocks, mixed_precision, tensor_float32
from seismodel.training.distributed import Ranks
from seismodel.training.schedule import lr_at, parameter_groups
from seismodel.training.trainer import optimizer_step, set_lr

FOLDS, MANUAL, ABSENT = 5, STATUS.index('manual'), STATUS.index('absent')
LARGEST = 16 * 2**20     # bytes of a file of weights


# ---------------------------------------------------------------- what is compared

@dataclass(frozen=True)
class Variant:
    "A way of pretraining, without its budget"
    model: object                # configuration of a small model
    lr: float = 3e-3
    weight_decay: float = .1
    batch: int = 256
    augment: bool = False        # as `pretrain --augment full`
    control: str = 'random'      # random start of the same shapes
    memory: float = 14           # GiB, about


def sequential(model, **more):
    "A variant with the sequential backbone, which needs more memory"
    usual = dict(lr=2e-3, weight_decay=.01, batch=128, control='random-sequential', memory=20)
    return Variant(model, **{**usual, **more})


def models(size):
    "The variants and the random starts of a size"
    find = lambda name: preset(f'{name}-{size}').model
    spectrum, joint, contrastive, recon = map(find, ('spectrum', 'joint', 'contrastive', 'reconstruction'))
    recon = replace(recon, target='tokens')                # where the others start from; the preset is recon-spectrum
    encoder = recon.encoder
    mended = replace(encoder, mask_value='learned', activation='gelu')
    changed = lambda **more: replace(recon, encoder=replace(encoder, **more))
    variants = {
        'spectrum': Variant(spectrum),
        'spectrum-aug': Variant(spectrum, augment=True),
        'spectrum-lr1e-3': Variant(spectrum, lr=1e-3),
        'spectrum-lr6e-3': Variant(spectrum, lr=6e-3),
        'joint': Variant(joint),
        'joint-aug': Variant(joint, augment=True),
        'joint-heavy': Variant(replace(joint, contrastive=1.)),
        'contrastive': Variant(contrastive),
        'contrastive-encoder': Variant(
            replace(contrastive, encoder=replace(contrastive.encoder, target_gradients='encoder'))),
        'recon': sequential(recon),
        'recon-spectrum': sequential(replace(recon, target='spectrum')),
        'recon-mended': sequential(replace(recon, encoder=mended, target='spectrum'), control='random-mended'),
        'recon-short': sequential(changed(mask=.5, num_zero_elements=4)),
        'recon-learned': sequential(changed(mask_value='learned')),
        'recon-gelu': sequential(changed(activation='gelu'), control='random-mended'),
    }
    starts = {'random': spectrum, 'random-sequential': recon, 'random-mended': replace(recon, encoder=mended)}
    return variants, starts


@dataclass(frozen=True)
class Way:
    "A way of fine-tuning"
    lr: float = 1e-3
    weight_decay: float = .1
    steps: int = 1000
    freeze: str = 'none'    # none, gradual, or all
    layer_decay: float = 1. # of the learning rate, from one stage of the network to the one below
    average: float = 0.     # decay of the moving average of the weights; 0: the weights themselves
    noise: float = .5       # fraction of the windows with noise added
    probe: bool = False     # a linear head without the waveform


WAYS = {
    'plain': Way(),
    'plain-3000': Way(steps=3000),
    'low': Way(lr=2e-4, weight_decay=.005),           # the recipe of `reconstruction`
    'probe': Way(freeze='all', probe=True, lr=3e-3),
    'gradual': Way(freeze='gradual'),
    'lr3e-4': Way(lr=3e-4),
    'decay.65': Way(layer_decay=.65),
    'decay.8': Way(layer_decay=.8),
    'decay.65-lr3e-4': Way(layer_decay=.65, lr=3e-4),
    'decay.65-gradual': Way(layer_decay=.65, freeze='gradual'),
    'decay.65-gradual-lr3e-4': Way(layer_decay=.65, freeze='gradual', lr=3e-4),
    'decay.65-lr2e-3': Way(layer_decay=.65, lr=2e-3),
    'average': Way(average=.99),
    'decay.65-average': Way(layer_decay=.65, average=.99),
    'quiet': Way(noise=.25),
}

PLAN = (
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 random | decay.65 plain | .1 | 0 1 2',
    'spectrum:480:1 spectrum-aug:480:1 spectrum:80 | decay.65 plain | .1 | 0 1 2',
    'spectrum:1500 | decay.65 plain | .1 | 0 1 2',
    'spectrum:480 random joint:480 spectrum-aug:480 contrastive:480 spectrum:1500 | plain decay.65 | 1 | 0 1',
    'spectrum:480 random | decay.65-gradual-lr3e-4 decay.65-average decay.65-lr3e-4 gradual decay.8 | .1 | 0 1 2',
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 spectrum:80 spectrum:1500 random | probe | 1 | 0',
    'recon:480 recon-mended:480 recon-spectrum:480 random-sequential random-mended | plain low | .1 | 0 1 2',
    'random | plain-3000 | .1 | 0 1 2',
    'spectrum:480 spectrum-aug:480 joint:480 contrastive:480 random | decay.65 plain | .1 | 3 4',
    'joint:1500 spectrum-aug:1500 spectrum:1500:1 | decay.65 plain | .1 | 0 1 2',
)


@dataclass(frozen=True)
class Trial:
    "A pretraining run (no `way`), or a fine-tuning with its score"
    variant: str
    thousands: int = 0      # windows seen in pretraining; 0: a random start
    seed: int = 0           # of the pretraining
    way: str = ''
    fraction: float = 1.
    fold: int = 0

    @property
    def start(self):
        "The name of the start"
        return f'{self.variant}-{self.thousands}k-s{self.seed}' if self.thousands else self.variant

    @property
    def name(self): return f'{self.start}--{self.way}--{self.fraction:g}--{self.fold}' if self.way else self.start

    @property
    def pretraining(self): return replace(self, way='', fraction=1., fold=0) if self.thousands else None

    def file(self, out): return out/('trials' if self.way else 'pretrained')/f'{self.name}.json'

    def memory(self, variants):
        "GiB, about"
        if not self.way: return variants[self.variant].memory
        return 7 if 'sequential' in self.control(variants) or 'mended' in self.control(variants) else 4

    def control(self, variants): return variants[self.variant].control if self.thousands else self.variant


def start_of(text, variants, starts):
    "Variant, thousands of windows and seed of 'NAME:480:1', or a random start"
    name, *numbers = text.split(':')
    if name in starts and not numbers: return name, 0, 0
    if name not in variants or not 1 <= len(numbers) <= 2 or not all(n.isdigit() for n in numbers):
        sys.exit(f"'{text}' is no start: give NAME:THOUSANDS or NAME:THOUSANDS:SEED with one of "
                 f"{', '.join(variants)}, or one of {', '.join(starts)}.")
    return name, *map(int, [*numbers, '0'][:2])


def trials_of(plan, variants, starts):
    "All trials in the order of the plan: of each line first the pretrainings, then the fine-tunings"
    trials = {}
    for line in plan:
        parts = [part.split() for part in line.split('|')]
        if len(parts) != 4: sys.exit(f"'{line}' is no plan line: give STARTS | WAYS | FRACTIONS | FOLDS.")
        for way in parts[1]:
            if way not in WAYS: sys.exit(f"'{way}' is no way of fine-tuning: choose from {', '.join(WAYS)}.")
        some = [Trial(*start_of(text, variants, starts)) for text in parts[0]]
        found = [t for t in some if t.thousands]
        found += [replace(t, way=way, fraction=float(f), fold=int(fold))
                  for fold in parts[3] for f in parts[2] for way in parts[1] for t in some]
        trials.update(dict.fromkeys(found))
    return list(trials)


# ---------------------------------------------------------------- data

def prepare(args):
    "Write the records of two stores as plain arrays: labelled ones without `test`, unlabelled ones of `train`"
    folder = Path(args.data)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, splits in (('labelled', ('train', 'dev')), ('unlabelled', ('train',))):
        store = Store(Path(getattr(args, kind)))
        with open(store.folder/'traces.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
        keep = [i for i, split in enumerate(store.index['split']) if store.manifest['splits'][split] in splits]
        index = store.index[keep]
        samples = [store.shard(r['shard'])[0][r['first']:r['first'] + r['samples']] for r in index]
        length = index['samples'].astype(np.int64)
        event = [row.get('source_id') or row['trace_name'] for row in rows]
        dataset = [row.get('trace_dataset') or '' for row in rows]
        table = np.zeros(len(keep), [('first', 'i8'), ('length', 'i8'), ('scale', 'f4', 3), ('onset', 'f8', 4),
                                     ('status', 'i1', 2), ('event', f'U{max(map(len, event))}'), ('fold', 'i1')])
        table['first'], table['length'], table['scale'] = np.cumsum(length) - length, length, index['scale']
        table['onset'] = np.stack([index[k] for k in ('p_onset', 's_onset', 'p_weak', 's_weak')], 1)
        table['status'] = np.stack([index['p_status'], index['s_status']], 1)
        table['event'], table['fold'] = [event[i] for i in keep], folds_of(event, dataset)[keep]
        np.save(folder/f'{kind}-samples.npy', np.concatenate(samples))
        np.save(folder/f'{kind}-table.npy', table)
        print(f'{kind}: {len(table)} records, {length.sum()/360000:.1f} h')


class Records(Source):
    "Whole records on the device, from which windows are drawn there; a source too, for banks of noise"
    name = 'records'

    def __init__(self, samples, first, length, scale, onset, status, device):
        put = lambda v, dtype: torch.as_tensor(np.array(v), dtype=dtype).to(device)
        self.numbers = samples                                        # (N, 3), on the host
        self.samples = put(samples, torch.int16)
        self.first, self.length = put(first, torch.int64), put(length, torch.int64)
        self.scale, self.onset = put(scale, torch.float32), put(onset, torch.float32)    # (R, 3), (R, 4)
        self.status = put(status, torch.int8)                         # (R, 2)
        self.rows = np.arange(len(self.first))                        # those that `record` knows

    def __len__(self): return len(self.rows)

    def record(self, i):
        "As a source of `noise_bank` has it; records are counted on from any multiple of their number"
        i = self.rows[i % len(self.rows)]
        first, length = int(self.first[i]), int(self.length[i])
        (p, s, p_weak, s_weak), (p_status, s_status) = self.onset[i].tolist(), self.status[i].tolist()
        x = self.numbers[first:first + length]*self.scale[i].cpu().numpy()
        return Record(x.astype(np.float32), p, s, str(i), p_status, s_status, p_weak, s_weak)

    def draw(self, chosen, count, generator):
        "`count` windows of the records whose numbers are `chosen`, every place alike"
        u = torch.rand(2, count, generator=generator, device=self.first.device)
        r = chosen[(u[0]*len(chosen)).long()]
        extra = self.length[r] - WINDOW
        return self.at(r, (u[1]*(extra.abs() + 1)).long()*extra.sign().where(extra != 0, 1))

    def at(self, r, first):
        "Windows (B, W, 3) of records `r` from sample `first` on, as `fine_augment` takes them"
        t = first[:, None] + torch.arange(WINDOW, device=r.device)                 # (B, W)
        there = (t >= 0) & (t < self.length[r, None])
        at = self.first[r, None] + t.clamp_min(0).minimum(self.length[r, None] - 1)
        x = self.samples[at].float()*self.scale[r, None]
        onset = self.onset[r] - first[:, None]
        onset = onset.where((onset >= 0) & (onset < WINDOW), torch.nan)
        valid = torch.stack([(-first).clamp_min(0), (self.length[r] - first).clamp_max(WINDOW)], 1)
        batch = dict(zip(('p_onset', 's_onset', 'p_weak', 's_weak'), onset.unbind(1)))
        batch |= dict(zip(('p_status', 's_status'), self.status[r].unbind(1)))
        ones = torch.ones(len(r), 3, device=r.device)
        return {**batch, 'x': torch.where(there[..., None], x, 0.), 'scale': ones, 'valid': valid.to(torch.int32)}


def records_of(folder, kind, device):
    "The arrays of `prepare`"
    t, samples = np.load(folder/f'{kind}-table.npy'), np.load(folder/f'{kind}-samples.npy', mmap_mode='r')
    return Records(samples, t['first'], t['length'], t['scale'], t['onset'], t['status'], device), t


def synthetic_part(numbers):
    torch.set_num_threads(1)
    source = SyntheticSource(0, SyntheticConfig(samples=3*WINDOW//2))
    source.prefetch(numbers)
    x = np.stack([source.record(i).waveform for i in numbers])
    q, _, scale = zip(*(quantize_samples(y, 'int16') for y in x))
    return np.stack(q), np.stack(scale)


def make_synthetic(out, count, jobs):
    "Write records of the generator, in 16 bits"
    if (out/'synthetic-scale.npy').exists(): return
    parts = [list(range(k, min(k + 50, count))) for k in range(0, count, 50)]
    with get_context('spawn').Pool(jobs) as pool: samples, scale = zip(*pool.map(synthetic_part, parts))
    np.save(out/'synthetic.npy', np.concatenate(samples))
    np.save(out/'synthetic-scale.npy', np.concatenate(scale))


def synthetic_records(out, device):
    "Records (R, L, 3) of the generator"
    q, scale = np.load(out/'synthetic.npy'), np.load(out/'synthetic-scale.npy')
    R, L, _ = q.shape
    nothing = np.full((R, 4), np.nan), np.zeros((R, 2))
    return Records(q.reshape(R*L, 3), np.arange(R)*L, np.full(R, L), scale, *nothing, device)


def folds_of(event, dataset):
    "The fold of each record, 0 to 4: an event's records lie in one, and every dataset is spread over all of them"
    first = dict(zip(event[::-1], dataset[::-1]))
    order = sorted(first, key=lambda e: (first[e], crc32(e.encode())))
    number = {e: k % FOLDS for k, e in enumerate(order)}
    return np.array([number[e] for e in event])


def rows_to_learn(table, held, fraction):
    "Records to learn from: a fraction of the events outside a fold, the same ones for every start and way"
    learn, event = np.flatnonzero(table['fold'] != held), table['event'].tolist()
    events = sorted({event[i] for i in learn}, key=lambda e: crc32(f'{held}/{e}'.encode()))
    kept = set(events[:math.ceil(fraction*len(events))])
    return np.array([i for i in learn if event[i] in kept])


# ---------------------------------------------------------------- one trial

def run(model, draw, c, device, compiled=False):
    """Train; `draw(generator)` makes a batch on the device. On a GPU a step with its windows and their augmentation is
    one recording. Returns 20 rows of metrics and the seconds; averaged weights are put in place at the end."""
    ranks, stop_flag = Ranks(device), torch.zeros((), device=device)
    generator = torch.Generator(device).manual_seed(c.seed)
    torch.manual_seed(c.seed)
    on_gpu = device.type == 'cuda'
    lr = lambda: torch.tensor(c.lr, device=device) if on_gpu else c.lr
    groups = [{**group, 'lr': lr()} for group in parameter_groups(model, c.weight_decay, c.layer_decay)]
    optimizer = torch.optim.AdamW(groups, lr=lr(), betas=c.betas, fused=True, capturable=on_gpu)
    if compiled: compile_blocks(model)
    def step(_):
        metrics, numbers = optimizer_step(model, optimizer, [draw(generator)], generator, c, ranks, stop_flag)
        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}, numbers
    begin, phase, replay, history = time.perf_counter(), None, None, []
    dummy = torch.zeros(1, device=device)
    with tensor_float32(device):
        for k in range(c.steps):
            model.set_progress(k, c.steps)
            now = getattr(model, 'frozen', None)
            if now != phase or replay is None:              # another part is frozen: other operations, a new recording
                if replay is not None and on_gpu:
                    torch.cuda.synchronize()
                    replay.close()
                replay, phase = (Replay(step, generator) if on_gpu else step), now
            set_lr(optimizer, lr_at(k, c))
            metrics, _ = replay(dummy)
            if (k + 1) % max(1, c.steps//20) == 0 or k + 1 == c.steps:
                history.append({'step': k + 1, **{n: round(float(v), 5) for n, v in metrics.items()}})
                if not math.isfinite(history[-1]['loss']): raise ArithmeticError(f'no finite loss in step {k + 1}')
    if on_gpu:
        torch.cuda.synchronize()
        replay.close()
    with torch.no_grad():
        for p, state in optimizer.state.items(): p.copy_(state.get('average', p))
    return history, time.perf_counter() - begin


def pretrain(trial, args, device):
    "Pretrain, and write the weights as float16"
    variant, out = models(args.size)[0][trial.variant], Path(args.out)
    batch = 4 if args.small else variant.batch
    steps = 6 if args.small else round(trial.thousands*1000/batch)
    c = TrainConfig(steps=steps, batch_size=batch, lr=variant.lr, weight_decay=variant.weight_decay, seed=trial.seed)
    real, _ = records_of(Path(args.data), 'unlabelled', device)
    made = synthetic_records(out, device)
    whole = [torch.arange(len(r), device=device) for r in (real, made)]
    change = None
    if variant.augment: change = pretrain_augment(calm_bank([real], 16 if args.small else 256).to(device))
    torch.manual_seed(trial.seed)
    model = build(variant.model).to(device).train()
    def draw(generator):
        parts = real.draw(whole[0], batch - batch//4, generator), made.draw(whole[1], batch//4, generator)
        b = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        if change: b = change(amplitudes(b), generator)
        return to_model(b)['x']
    history, seconds = run(model, draw, c, device, compiled=device.type == 'cuda' and steps > 500)
    weights = {k: v.detach().half().cpu().contiguous() if v.is_floating_point() else v.cpu()
               for k, v in model.state_dict().items()}
    file = out/'pretrained'/f'{trial.name}.safetensors'
    save_file(weights, f'{file}.part')
    if os.path.getsize(f'{file}.part') > LARGEST: print(f'{file.name} has more than {LARGEST} bytes')
    os.replace(f'{file}.part', file)
    return dict(start=trial.start, variant=trial.variant, seed=trial.seed, windows=steps*batch,
                batch=batch, lr=variant.lr, augment=variant.augment, seconds=round(seconds, 1),
                windows_per_second=round(steps*batch/seconds),
                gib=gib(), parameters=sum(p.numel() for p in model.parameters()), history=history,
                model=config_to_dict(variant.model))


def gib(): return round(torch.cuda.max_memory_allocated()/2**30, 1) if torch.cuda.is_available() else 0


def finetune(trial, args, device):
    "Fine-tune on a fraction of the events, and score on those of a fold"
    variants, starts = models(args.size)
    way, out = WAYS[trial.way], Path(args.out)
    torch.manual_seed(trial.fold)
    net = build(variants[trial.variant].model if trial.thousands else starts[trial.variant])
    if trial.thousands:
        weights = load_file(out/'pretrained'/f'{trial.start}.safetensors')
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    torch.manual_seed(trial.fold)
    picker = Picker(net, width=0 if way.probe else 32, raw=not way.probe, freeze=way.freeze).to(device).train()
    labelled, table = records_of(Path(args.data), 'labelled', device)
    labelled.rows = rows_to_learn(table, trial.fold, trial.fraction)
    noise = noise_bank([labelled], count=16 if args.small else 256).to(device)
    change = fine_augment(noise, replace(Augmentation(), noise=way.noise))
    here = torch.as_tensor(labelled.rows, device=device)
    c = TrainConfig(steps=8 if args.small else way.steps, batch_size=4 if args.small else 32,
                    lr=way.lr, seed=trial.fold, weight_decay=way.weight_decay, layer_decay=way.layer_decay,
                    average=way.average)
    def draw(generator):
        return to_model(change(amplitudes(labelled.draw(here, c.batch_size, generator)), generator))
    history, seconds = run(picker, draw, c, device)
    score, onsets = scored(picker.eval(), labelled, table, trial.fold, device, 1 if args.small else 3)
    return dict(start=trial.start, variant=trial.variant, windows=1000*trial.thousands, seed=trial.seed, way=trial.way,
                fraction=trial.fraction, fold=trial.fold, control=trial.control(variants), records=len(labelled.rows),
                events=len(set(table['event'][labelled.rows])), steps=c.steps, seconds=round(seconds, 1), gib=gib(),
                loss=history[-1]['loss'], **score, settings=asdict(way), onsets=onsets)


@torch.no_grad()
def scored(picker, r, table, fold, device, places):
    """Threshold-free scores: a window with the onset anywhere but in the first and last 5 s, the highest probability in
    it. Returns means, and for each onset [phase, event, residuals in seconds]."""
    onset, status = r.onset.cpu().numpy(), r.status.cpu().numpy()
    score, onsets, loud, held = {}, [], [], np.flatnonzero(table['fold'] == fold)
    event = {e: k for k, e in enumerate(sorted(set(table['event'].tolist())))}
    def highest(rows, first):
        "Place and size of the highest P and S probability, (n, 2) each"
        found = [(np.zeros((0, 2), int), np.zeros((0, 2)))]
        size = 16 if device.type == 'cpu' else 128
        for k in range(0, len(rows), size):
            x = r.at(*(torch.as_tensor(v[k:k + size], device=device) for v in (rows, first)))
            with mixed_precision(device), tensor_float32(device): logits = picker.logits(to_model(x)['x'])
            top, place = logits.float().softmax(-1)[..., 1:].max(1)
            found.append((place.cpu().numpy(), top.cpu().numpy()))
        return [np.concatenate(v) for v in zip(*found)]
    rng = np.random.default_rng(fold)
    for k, phase in enumerate('ps'):
        rows = held[(status[held, k] == MANUAL) & np.isfinite(onset[held, k])]
        residual = np.zeros((len(rows), places))
        for j in range(places):
            first = np.rint(onset[rows, k] - rng.uniform(512, WINDOW - 512, len(rows))).astype(np.int64)
            place, size = highest(rows, first)
            residual[:, j] = (place[:, k] + first - onset[rows, k])/100
            if k == 0: loud.append(size[:, 0])
        for within in (.1, .3): score[f'{phase}{within}'] = round(float((abs(residual) <= within).mean()), 4)
        score[f'{phase}_mae'] = round(float(np.minimum(abs(residual), 2).mean()), 4)
        score[f'{phase}_n'] = len(rows)
        onsets += [[phase, event[e], *np.round(v, 3).tolist()] for e, v in zip(table['event'][rows].tolist(), residual)]
    calm = held[(status[held] == ABSENT).all(1)]
    length = r.length.cpu().numpy()
    first = (rng.uniform(0, 1, len(calm))*np.maximum(length[calm] - WINDOW, 0)).astype(np.int64)
    quiet = highest(calm, first)[1][:, 0]
    score['p_auc'] = round(float((np.concatenate(loud)[:, None] > quiet).mean()), 4) if len(quiet) else None
    return score, onsets


def work(trial, args):
    "A process: one trial; what it prints goes into logs/NAME.txt, its result into NAME.json"
    out = Path(args.out)
    with open(out/'logs'/f'{trial.name}.txt', 'a', encoding='utf-8') as log, redirect_stdout(log), redirect_stderr(log):
        torch.set_num_threads(1)
        device = torch.device('cuda' if torch.cuda.is_available() and not args.small else 'cpu')
        begin = time.perf_counter()
        try: result = (finetune if trial.way else pretrain)(trial, args, device)
        except BaseException:
            import traceback
            traceback.print_exc()
            raise SystemExit(1) from None
        result['process_seconds'] = round(time.perf_counter() - begin, 1)
        file = trial.file(out)
        part = file.with_suffix('.part')
        part.write_text(json.dumps(result), encoding='utf-8')
        os.replace(part, file)


# ---------------------------------------------------------------- all trials

def drive(args):
    "Start a process for each trial as soon as its start is there and its memory is free, in the order of the plan"
    begin, out = time.monotonic(), Path(args.out)
    variants, starts = models(args.size)
    todo = trials_of(args.plan or PLAN, variants, starts)
    for name in ('pretrained', 'trials', 'logs'): (out/name).mkdir(parents=True, exist_ok=True)
    (out/'finished').unlink(missing_ok=True)
    make_synthetic(out, 40 if args.small else 2000, args.jobs)
    on_gpu = torch.cuda.is_available() and not args.small
    total = args.memory or (torch.cuda.mem_get_info()[1]/2**30 if on_gpu else 1000)
    done = {t.name for t in todo if t.file(out).exists()}
    todo = [t for t in todo if t.name not in done]
    known = done | {f.stem for f in (out/'pretrained').glob('*.json')}
    say = lambda text: print(f'{time.monotonic() - begin:6.0f} s  {text}', flush=True)
    say(f'{len(todo)} trials to do, {len(done)} done before, {total:.0f} GiB')
    context, busy, tried = get_context('forkserver'), {}, defaultdict(int)
    failed, succeeded = [], 0
    context.set_forkserver_preload(['__main__'])       # imports everything once, without touching the GPU
    def ready(t): return not (t.way and t.thousands) or t.start in known
    def hopeless(t): return t.way and t.thousands and t.pretraining.name in failed
    def fits(t):
        used = sum(.6 + other.memory(variants) for other in busy.values())
        pretrainings = sum(not other.way for other in busy.values())
        return (used + .6 + t.memory(variants) <= .94*total or not busy) and (t.way or pretrainings < args.pretrainings)
    while todo or busy:
        passed = time.monotonic() - begin
        if passed > args.kill:
            for process in busy: process.terminate()
            say(f'stopped {len(busy)} trials')
            break
        todo = [t for t in todo if not hopeless(t)]
        while passed <= args.until and len(busy) < args.jobs:
            trial = next((t for t in todo if ready(t) and fits(t)), None)
            if trial is None: break
            todo.remove(trial)
            process = context.Process(target=work, args=(trial, args))
            process.start()
            busy[process] = trial
        if not busy: break
        time.sleep(.2)
        for process in [p for p in busy if not p.is_alive()]:
            process.join()
            trial = busy.pop(process)
            if trial.file(out).exists():
                known.add(trial.name)
                succeeded += 1
                row = json.loads(trial.file(out).read_text(encoding='utf-8'))
                shown = ('p0.3', 's0.3', 'seconds', 'windows_per_second', 'gib')
                say(f'{trial.name}  ' + '  '.join(f'{k} {row[k]}' for k in shown if k in row))
                continue
            tried[trial] += 1
            log = out/'logs'/f'{trial.name}.txt'
            lines = log.read_text(encoding='utf-8').strip().splitlines() if log.exists() else []
            say(f'{trial.name} FAILED ({process.exitcode}): {lines[-1] if lines else "no output"}')
            if tried[trial] < 2: todo.append(trial)
            else: failed.append(trial.name)
            if succeeded: continue
            context = get_context('spawn')               # in case that it was the fork
            if sum(tried.values()) >= 6: sys.exit('Six processes failed and none succeeded: see logs.')
    write_tables(out)
    say(f'{len(todo)} trials left, {len(failed)} failed')
    (out/'finished').write_text(str(len(todo)), encoding='utf-8')


# ---------------------------------------------------------------- tables

SCORES = ('p0.1', 'p0.3', 's0.1', 's0.3', 'p_mae', 's_mae', 'p_auc')


def hits(row, phase, within=.3):
    "Share of the windows of each onset with the highest probability near it, by (fold, event, number)"
    onsets = [o for o in row['onsets'] if o[0] == phase]
    return {(row['fold'], o[1], k): np.mean(np.abs(o[2:]) <= within) for k, o in enumerate(onsets)}


def difference(rows, others, phase):
    """Points within 0.3 s by which `rows` are above `others`, and the 95 % interval over events; None without a
    common fold"""
    a, b = ({k: v for row in some for k, v in hits(row, phase).items()} for some in (rows, others))
    events = defaultdict(list)
    for key in a.keys() & b.keys(): events[key[1]].append(a[key] - b[key])
    if not events: return None
    total, count = (np.array([f(v) for _, v in sorted(events.items())], float) for f in (sum, len))
    chosen = np.random.default_rng(0).integers(len(total), size=(2000, len(total)))
    means = total[chosen].sum(1)/count[chosen].sum(1)
    return [round(100*v, 1) for v in (total.sum()/count.sum(), *np.quantile(means, (.025, .975)))]


def write_csv(file, rows):
    "Rows with the same keys, or those of the first"
    if not rows: return
    with open(file, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, list(rows[0]), extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)


def write_tables(out):
    "pretrained.csv and trials.csv, a line each, and table.csv: means over the folds, differences to the random start"
    pretrained = {f.stem: json.loads(f.read_text(encoding='utf-8')) for f in sorted((out/'pretrained').glob('*.json'))}
    trials = [json.loads(f.read_text(encoding='utf-8')) for f in sorted((out/'trials').glob('*.json'))]
    last = lambda p: {k: v for k, v in p['history'][-1].items() if k in ('loss', 'spectrum_mse', 'accuracy', 'mse')}
    plain = lambda d: {k: v for k, v in d.items() if not isinstance(v, (dict, list))}
    write_csv(out/'pretrained.csv', [{**plain(p), 'last': json.dumps(last(p))} for p in pretrained.values()])
    write_csv(out/'trials.csv', [plain(t) for t in trials])
    groups = defaultdict(list)
    for t in trials: groups[t['fraction'], t['way'], t['start']].append(t)
    table = []
    for (fraction, way, start), rows in sorted(groups.items()):
        first = rows[0]
        row = dict(start=start, windows=first['windows'], way=way, fraction=fraction, folds=len(rows),
                   minutes=round(pretrained[start]['seconds']/60, 1) if start in pretrained else 0.)
        for name in SCORES:
            values = [r[name] for r in rows if r[name] is not None]
            row[name] = round(float(np.mean(values)), 4) if values else None
        row['p_n'], row['s_n'] = (sum(r[f'{phase}_n'] for r in rows) for phase in 'ps')
        for phase in 'ps':
            for against, other_way in (('same', way), ('plain', 'plain')):
                other = fraction, other_way, first['control']
                itself = way == 'probe' or other == (fraction, way, start)
                found = None if itself else difference(rows, groups.get(other, []), phase)
                for part, value in zip(('', '_low', '_high'), found or [None]*3):
                    row[f'{phase}_gain_{against}{part}'] = value
        table.append(row)
    write_csv(out/'table.csv', table)
    return table


def show(args):
    "Write the tables and print the last one"
    rows = write_tables(Path(args.out))
    if not rows: return print('no trial is scored yet')
    names = ('fraction', 'way', 'start', 'folds', *SCORES)
    def gain(r, phase):
        mean, low, high = (r[f'{phase}_gain_same{part}'] for part in ('', '_low', '_high'))
        return '' if mean is None else f'{phase.upper()} {mean:+.1f} [{low:+.1f}, {high:+.1f}]'
    lines = [[*(str(r[n]) for n in names), gain(r, 'p'), gain(r, 's')] for r in rows]
    lines.insert(0, [*names, 'to random, same way', ''])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines: print('  '.join(v.ljust(w) for v, w in zip(line, widths)).rstrip())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('prepare', 'run', 'table'))
    parser.add_argument('--labelled', help='prepare: packed store with picks')
    parser.add_argument('--unlabelled', help='prepare: packed store')
    parser.add_argument('--data', default='data', help='folder of the arrays that prepare writes')
    parser.add_argument('--out', default='results', help='folder of the results')
    parser.add_argument('--plan', action='append', help='STARTS | WAYS | FRACTIONS | FOLDS; may be given several times')
    parser.add_argument('--size', default='small', help='of the presets: tiny, small or base')
    parser.add_argument('--jobs', type=int, default=12, help='processes at once')
    parser.add_argument('--pretrainings', type=int, default=4, help='of them at most so many that pretrain')
    parser.add_argument('--memory', type=float, help='GiB to share out; those of the GPU if not given')
    parser.add_argument('--until', type=float, default=1e9, help='seconds after which no trial begins')
    parser.add_argument('--kill', type=float, default=1e9, help='seconds after which those that run are stopped')
    parser.add_argument('--small', action='store_true', help='tiny models and a few steps on the CPU')
    args = parser.parse_args()
    if args.small: args.size = 'tiny'
    {'prepare': prepare, 'run': drive, 'table': show}[args.what](args)

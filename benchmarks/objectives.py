"""What pretraining buys, by objective, budget and way of fine-tuning: many trials on one GPU.

    seismodel pack LABELLED --out labelled; seismodel pack UNLABELLED --out unlabelled
    python benchmarks/objectives.py prepare --labelled labelled --unlabelled unlabelled --data data
    python benchmarks/objectives.py run --data data --out results --jobs 14
    python benchmarks/objectives.py table --out results

A plan line names pretrained starts, ways of fine-tuning, fractions of the labelled events and folds, and stands
for all their combinations:

    --plan 'spectrum:480 spectrum:480:1 random | plain decay.65 | .1 1 | 0 1 2'

`spectrum:480:1` is the variant `spectrum` after 480,000 windows, with seed 1. A fifth part may name the seeds of
fine-tuning; a line without ways only pretrains. Several `--plan` are worked off in their order; `models` and `WAYS`
below list the names, and `PLAN` is the plan if none is given.

The study of five folds is another plan over all labelled events, of which a tenth chooses the step of each picker:

    python benchmarks/objectives.py prepare --labelled labelled --unlabelled unlabelled --every-split \
        --peer volpick=FOLDER/phasenet --data data --packed packed
    python benchmarks/objectives.py run --plan study --best --data packed --out results --take home --bring home

Each trial is a process of its own, which is meant to share the GPU with others under NVIDIA MPS. A pretraining
leaves pretrained/NAME.safetensors (float16) and .json, a fine-tuning trials/NAME.json. What is there is not run
again, so the same command goes on after an interruption. `--small` tries everything on a CPU in a few minutes.

The events of `train` and `dev` are divided into five folds; records of `test` do not leave `prepare`, unless
`--every-split` says so. The score has no threshold: the sample with the highest probability in a window around each
onset of the fold. `run` needs torch, numpy and this package, not SeisBench or ObsPy; `packed` holds the arrays in a
third of their size, and `--take` and `--bring` move results between a machine that is lent and one that stays.
"""
import argparse
import bz2
import csv
import gzip
import json
import math
import os
import sys
import time
import zipfile
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
from seismodel.files import read_json
from seismodel.finetuning.heads import LABELS, Picker, batch_onsets, found, label_curves, pick_loss
from seismodel.models.encoders import BidirAutoregConfig
from seismodel.models.pretraining import (MaskedConfig, ReconstructionConfig, Step, build, config_to_dict,
                                          preset)
from seismodel.signals.augment import Augmentation, fine_augment, pretrain_augment
from seismodel.signals.noise import EventsInNoise, calm_bank, noise_bank
from seismodel.signals.records import SAMPLING_RATE, STATUS, WINDOW, Record
from seismodel.signals.source import Source
from seismodel.signals.synthetic import SyntheticConfig, band_power
from seismodel.training.config import TrainConfig
from seismodel.training.cuda_graph import Replay, compile_blocks, mixed_precision, tensor_float32
from seismodel.training.distributed import Ranks
from seismodel.training.schedule import lr_at, parameter_groups
from seismodel.training.trainer import optimizer_step, set_lr

FOLDS, MANUAL, AUTOMATIC, ABSENT = 5, *map(STATUS.index, ('manual', 'automatic', 'absent'))
LARGEST, BUNDLES = 16 * 2**20, 4     # bytes of a file of weights, or of a bundle that is brought; bundles of a call


# ---------------------------------------------------------------- what is compared

@dataclass(frozen=True)
class Variant:
    "A way of pretraining, without its budget"
    model: object                # configuration of a small model
    lr: float = 3e-3
    weight_decay: float = .1
    batch: int = 256
    augment: bool = False        # as `pretrain --augment full`
    data: str = 'windows'        # what it sees: windows, scrambled ones, or events in noise with their onsets
    control: str = 'random'      # random start of the same shapes
    memory: float = 9            # GiB, about


def sequential(model, **more):
    "A variant with the sequential backbone, which needs more memory"
    usual = dict(lr=2e-3, weight_decay=.01, batch=128, control='random-sequential', memory=14)
    return Variant(model, **{**usual, **more})


def reshaped(model, heads, conv=None, dim=None, **more):
    "A model of `spectrum` with other heads, other channels in the frontend, another width"
    e = model.encoder
    encoder = replace(e, conv_features=conv or e.conv_features, out_features=dim or e.out_features)
    return replace(model, encoder=encoder, heads=heads, **more)


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
        'placebo': Variant(spectrum, data='scrambled'),
        'supervised': Variant(spectrum, lr=2e-3, batch=128, data='events', memory=14),
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
    tiny = preset('spectrum-tiny').model
    shapes = {'narrow': reshaped(spectrum, 2, 128), 'shallow': reshaped(spectrum, 2, 128, blocks=1),
              'shallow-wide': reshaped(spectrum, 2, 128, 80, blocks=1), 'tiny': tiny,
              'tiny-4-heads': reshaped(tiny, 4), 'tiny-narrow': reshaped(tiny, 2, 32)}
    variants |= {name: Variant(model, control=f'random-{name}') for name, model in shapes.items()}
    starts = {'random': spectrum, 'random-sequential': recon, 'random-mended': replace(recon, encoder=mended),
              **{f'random-{name}': model for name, model in shapes.items()},
              'volpick': None, 'phasenet': None}               # from the files of `prepare --peer`; fresh weights
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
    synthetic: float = 0.   # fraction of the windows that are synthetic events in real noise
    probe: bool = False     # a linear head without the waveform
    at: str = 'frames'      # where the head works
    width: int = 64         # of the head


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
    'plain-samples': Way(at='samples', width=32),     # the head of version 0.1
    'decay.65-samples': Way(layer_decay=.65, at='samples', width=32),
    'decay.65-frames32': Way(layer_decay=.65, width=32),
    'plain+synthetic': Way(synthetic=.25),
    'decay.65+synthetic': Way(layer_decay=.65, synthetic=.25),
    'peer': Way(weight_decay=0.),                     # of published pickers and their control
    'peer-lr3e-4': Way(weight_decay=0., lr=3e-4),
    'as-it-is': Way(steps=0),
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

def study_plan(thousands=1000):
    "The plan of the study: what matters most comes first, so that whatever time there is gives a table"
    half, every, seeds = thousands//2, '| 0 1 2 3 4 |', range(3)
    few = lambda starts, ways, again='0 1 2': f'{starts} | {ways} | .1 {every} {again}'
    whole = lambda starts, ways: f'{starts} | {ways} | 1 {every} 0'
    best = [f'spectrum:{thousands}:{seed}' for seed in seeds]
    placebo, contrastive, supervised = f'placebo:{thousands}', f'contrastive:{thousands}', f'supervised:{half}'
    spectrum, tokens = f'recon-spectrum:{half}', f'recon:{half}'
    return (f"{' '.join(best)} {placebo} | | |",
            'random | plain plain+synthetic | .1 | 0 | 0', 'volpick | as-it-is peer | 1 | 0 | 0',    # each kind once, early
            f'{contrastive} {supervised} {spectrum} {tokens} | | |',
            few('random', 'plain'), *(few(best[k], 'decay.65', k) for k in seeds),
            whole('random', 'plain'), whole(best[0], 'decay.65'),
            whole('volpick', 'as-it-is'), few('volpick', 'peer'),
            few(placebo, 'decay.65'), few(supervised, 'decay.65'), few(contrastive, 'decay.65'),
            few('random-sequential', 'low'), few(spectrum, 'low'),
            few('random', 'plain-3000'),
            whole(f'{contrastive} {supervised}', 'decay.65'), whole(spectrum, 'low'),
            few('random', 'plain+synthetic'), *(few(best[k], 'decay.65+synthetic', k) for k in seeds),
            few(tokens, 'low'), whole('volpick', 'peer'),
            f"{' '.join(best[:2])} {placebo} {contrastive} {spectrum} {tokens} random random-sequential | probe | 1 | 0",
            few(best[0], 'plain', '0'), whole(best[0], 'plain'),
            few('volpick', 'peer-lr3e-4'), few('phasenet', 'peer'))


def whole_plan(texts):
    "The lines of a plan, in which `study`, or `study:500` for a budget of 500,000 windows, stands for many"
    lines = []
    for text in texts:
        name, _, thousands = text.partition(':')
        lines += study_plan(*map(int, thousands.split())) if name == 'study' else [text]
    return lines


@dataclass(frozen=True)
class Trial:
    "A pretraining run (no `way`), or a fine-tuning with its score"
    variant: str
    thousands: int = 0      # windows seen in pretraining; 0: a random start
    seed: int = 0           # of the pretraining
    way: str = ''
    fraction: float = 1.
    fold: int = 0
    again: int = 0          # seed of the fine-tuning: of events, head, random start and windows

    @property
    def start(self):
        "The name of the start"
        return f'{self.variant}-{self.thousands}k-s{self.seed}' if self.thousands else self.variant

    @property
    def name(self):
        "Of its files"
        if not self.way: return self.start
        return f'{self.start}--{self.way}--{self.fraction:g}--{self.fold}' + f'--{self.again}'*bool(self.again)

    @property
    def pretraining(self): return replace(self, way='', fraction=1., fold=0, again=0) if self.thousands else None

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
        if len(parts) == 4: parts.append(['0'])
        if len(parts) != 5: sys.exit(f"'{line}' is no plan line: give STARTS | WAYS | FRACTIONS | FOLDS | SEEDS.")
        for way in parts[1]:
            if way not in WAYS: sys.exit(f"'{way}' is no way of fine-tuning: choose from {', '.join(WAYS)}.")
        some = [Trial(*start_of(text, variants, starts)) for text in parts[0]]
        found = [t for t in some if t.thousands]
        found += [replace(t, way=way, fraction=float(f), fold=int(fold), again=int(again))
                  for again in parts[4] for fold in parts[3] for f in parts[2] for way in parts[1] for t in some]
        trials.update(dict.fromkeys(found))
    return list(trials)


# ---------------------------------------------------------------- data

def prepare(args):
    "Write the records of two stores as plain arrays: labelled ones, unlabelled ones of `train`; and published pickers"
    folder = Path(args.data)
    folder.mkdir(parents=True, exist_ok=True)
    labelled = ('train', 'dev', 'test') if args.every_split else ('train', 'dev')
    for kind, splits in (('labelled', labelled), ('unlabelled', ('train',))):
        store = Store(Path(getattr(args, kind)))
        with open(store.folder/'traces.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
        keep = [i for i, split in enumerate(store.index['split']) if store.manifest['splits'][split] in splits]
        index = store.index[keep]
        samples = [store.shard(r['shard'])[0][r['first']:r['first'] + r['samples']] for r in index]
        length = index['samples'].astype(np.int64)
        event = [row.get('source_id') or row['trace_name'] for row in rows]
        dataset = [row.get('trace_dataset') or '' for row in rows]
        station = [f"{row.get('station_network_code') or ''}.{row.get('station_code') or ''}" for row in rows]
        table = np.zeros(len(keep), [('first', 'i8'), ('length', 'i8'), ('scale', 'f4', 3), ('onset', 'f8', 4),
                                     ('status', 'i1', 2), ('event', f'U{max(map(len, event))}'), ('fold', 'i1'),
                                     ('tenth', 'i1'), ('dataset', f'U{max(map(len, dataset)) or 1}'),
                                     ('station', 'U16'), ('trace', 'U80'), ('split', 'U5')])
        table['first'], table['length'], table['scale'] = np.cumsum(length) - length, length, index['scale']
        table['onset'] = np.stack([index[k] for k in ('p_onset', 's_onset', 'p_weak', 's_weak')], 1)
        table['status'] = np.stack([index['p_status'], index['s_status']], 1)
        table['event'], table['tenth'] = [event[i] for i in keep], tenths_of(event, dataset)[keep]
        table['fold'] = table['tenth'] % FOLDS
        table['dataset'], table['station'] = [dataset[i] for i in keep], [station[i] for i in keep]
        table['trace'] = [rows[i]['trace_name'] for i in keep]
        table['split'] = [store.manifest['splits'][k] for k in index['split']]
        np.save(folder/f'{kind}-samples.npy', np.concatenate(samples))
        np.save(folder/f'{kind}-table.npy', table)
        names = ('trace', 'dataset', 'station', 'event', 'split', 'fold', 'tenth')
        write_csv(folder/f'{kind}.csv', [{'record': i, **{k: row[k].item() for k in names}} for i, row in enumerate(table)])
        print(f'{kind}: {len(table)} records, {length.sum()/360000:.1f} h')
    for text in args.peer or []: record_peer(folder, *text.split('=', 1))
    if args.packed: pack_arrays(folder, Path(args.packed))


def pack_arrays(folder, to):
    "Copies of what `prepare` wrote: of samples the differences, high bytes apart from low ones, compressed"
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob('*.npy')) + sorted(folder.glob('peer-*.pt')):
        data = file.read_bytes()
        if file.stem.endswith('samples'):
            x = np.load(file)
            step = np.diff(x, axis=0, prepend=np.zeros((1, 3), np.int16)).astype(np.int32)     # 32 bits: no sign is lost
            step = (step + 2**15) % 2**16 - 2**15
            even = ((step << 1) ^ (step >> 31)).astype(np.uint16)                              # small numbers of either sign
            data = np.concatenate([(even >> 8).astype(np.uint8).T, even.astype(np.uint8).T]).tobytes()
        (to/f'{file.name}.bz2').write_bytes(bz2.compress(data))
    print(f"packed: {sum(f.stat().st_size for f in to.glob('*.bz2'))/2**20:.1f} MiB")


def unpack_arrays(folder):
    "What `pack_arrays` packed, beside the packed files"
    for file in sorted(folder.glob('*.bz2')):
        plain = file.with_suffix('')
        if plain.exists(): continue
        data, part = bz2.decompress(file.read_bytes()), plain.with_suffix('.part')
        if plain.stem.endswith('samples'):
            planes = np.frombuffer(data, np.uint8).reshape(6, -1).astype(np.uint16)
            even = (planes[:3] << 8 | planes[3:]).T.astype(np.int32)
            step = (even >> 1) ^ -(even & 1)
            with open(part, 'wb') as f: np.save(f, np.cumsum(step, 0, dtype=np.int32).astype(np.int16))
        else: part.write_bytes(data)
        os.replace(part, plain)


def record_peer(folder, name, stem):
    "Record the network in SeisBench's files STEM.json… and STEM.pt…, so that it runs without SeisBench"
    from seisbench.models import PhaseNet
    about, weights = (next(Path(stem).parent.glob(f'{Path(stem).name}.{end}*')) for end in ('json', 'pt'))
    options = read_json(about, dict(model_args=dict))['model_args']
    model = PhaseNet(**options)
    model.load_state_dict(torch.load(weights, weights_only=True))
    class Logits(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = model
        def forward(self, x): return self.net(x, logits=True)
    order = ['ZNE'.index(c) for c in options.get('component_order', 'ZNE')]
    torch.save({'net': torch.fx.symbolic_trace(Logits()), 'phases': [model.labels.index(c) for c in LABELS],
                'components': order, 'peak': model.norm == 'peak'}, folder/f'peer-{name}.pt')


class Peer(torch.nn.Module):
    "A published picker as `prepare` recorded it, in the place of a `Picker`; or its shapes with fresh weights"
    def __init__(self, folder, name):
        super().__init__()
        file = folder/f"peer-{'volpick' if name == 'phasenet' else name}.pt"
        saved = torch.load(file, map_location='cpu', weights_only=False)         # our own file
        self.net, self.peak = saved['net'], saved['peak']
        for part in ('phases', 'components'):                                    # on the device, as a recording needs them
            self.register_buffer(part, torch.tensor(saved[part]), persistent=False)
        if name != 'phasenet': return
        for part in self.net.modules():
            if hasattr(part, 'reset_parameters'): part.reset_parameters()

    def set_progress(self, step, steps): "Nothing follows from the number of the step"

    def logits(self, x):
        "(B, L, 3) normalised windows to (B, L, 3) of N, P, S, in float32"
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().transpose(1, 2).index_select(1, self.components)
            if self.peak: x = x/(x.abs().amax(-1, keepdim=True) + 1e-10)
            return self.net(x).transpose(1, 2).index_select(-1, self.phases)

    def forward(self, batch, generator=None):
        x, (onset, known) = batch['x'], batch_onsets(batch)
        z = self.logits(x)
        return Step(pick_loss(z, label_curves(*onset.unbind(-1), x.shape[1]), known), found(z, onset))


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


def events_part(number):
    torch.set_num_threads(1)
    made = EventsInNoise(torch.randn(1, WINDOW, 3), 50, number)
    return made.waves, made.onsets


def make_events(out, count, jobs):
    "Write clean synthetic events as `EventsInNoise` has them"
    if (out/'events-onsets.npy').exists(): return
    with get_context('spawn').Pool(jobs) as pool: waves, onsets = zip(*pool.map(events_part, range(-(-count//50))))
    np.save(out/'events.npy', np.concatenate(waves)[:count].astype(np.float16))
    np.save(out/'events-onsets.npy', np.concatenate(onsets)[:count])


class Events:
    "Windows of synthetic events in real noise, put together on the device as `EventsInNoise` does on the host"
    def __init__(self, out, noise, most, device):
        self.waves = torch.as_tensor(np.load(out/'events.npy')[:most], device=device)
        self.onsets = torch.as_tensor(np.load(out/'events-onsets.npy')[:most], device=device, dtype=torch.float32)
        self.noise = noise.to(device)
        level = np.sqrt(band_power(noise.numpy()[:, :1000], SAMPLING_RATE))
        self.level = torch.as_tensor(level, device=device, dtype=torch.float32)

    def draw(self, count, generator):
        "`count` windows, as `fine_augment` takes them"
        device, extra = self.noise.device, self.waves.shape[1] - WINDOW
        u = torch.rand(4, count, generator=generator, device=device)
        event, noise = ((v*n).long() for v, n in zip(u, (len(self.waves), len(self.noise))))
        first, size = (u[2]*(extra + 1)).long(), self.level[noise]*10**((6*u[3] - 3)/20)        # within 3 dB
        t = first[:, None] + torch.arange(WINDOW, device=device)
        x = self.noise[noise] + size[:, None, None]*self.waves[event[:, None], t].float()
        onset = self.onsets[event] - first[:, None]
        onset = onset.where((onset >= 0) & (onset < WINDOW), torch.nan)
        there = onset.isfinite()
        status = (there*STATUS.index('picked') + ~there*ABSENT).to(torch.int8)
        valid = torch.zeros(count, 2, dtype=torch.int32, device=device)
        valid[:, 1] = WINDOW
        none = torch.full((count,), torch.nan, device=device)
        return {'p_onset': onset[:, 0], 's_onset': onset[:, 1], 'p_weak': none, 's_weak': none, 'p_status': status[:, 0],
                's_status': status[:, 1], 'x': x, 'scale': torch.ones(count, 3, device=device), 'valid': valid}


def scramble(x, generator):
    """Windows (B, L, 3) with the spectra of `x` and random phases: one draw for a window, the same for its components, so
    that they stay related as they were. Nothing begins in such a window."""
    spectrum = torch.fft.rfft(x.float(), dim=1)
    turn = 2*math.pi*torch.rand(x.shape[0], spectrum.shape[1], 1, generator=generator, device=x.device)
    return torch.fft.irfft(spectrum*torch.polar(torch.ones_like(turn), turn), n=x.shape[1], dim=1)


def tenths_of(event, dataset):
    "The tenth of each record, 0 to 9: an event's records lie in one, and every dataset is spread over all of them"
    first = dict(zip(event[::-1], dataset[::-1]))
    order = sorted(first, key=lambda e: (first[e], crc32(e.encode())))
    number = {e: k % (2*FOLDS) for k, e in enumerate(order)}
    return np.array([number[e] for e in event])


def folds_of(event, dataset):
    "The fold of each record, 0 to 4, two tenths each"
    return tenths_of(event, dataset) % FOLDS


def rows_of_dev(table, held):
    "Records that choose a picker's step where a fold is held back: the tenth after it"
    return np.flatnonzero(table['tenth'] == held + 1)


def rows_to_learn(table, held, fraction, seed=0, dev=False):
    """Records to learn from: a fraction of the events outside a fold, and outside its dev records if there are any, the
    same ones for every start and way"""
    learn, event = np.flatnonzero(table['fold'] != held), table['event'].tolist()
    if dev: learn = np.setdiff1d(learn, rows_of_dev(table, held))
    key = lambda e: crc32((f'{held}/{e}' + f'/{seed}'*bool(seed)).encode())
    events = sorted({event[i] for i in learn}, key=key)
    kept = set(events[:math.ceil(fraction*len(events))])
    return np.array([i for i in learn if event[i] in kept])


# ---------------------------------------------------------------- one trial

def run(model, draw, c, device, compiled=False, look=None):
    """Train; `draw(generator)` makes a batch on the device. On a GPU a step with its windows and their augmentation is
    one recording. Returns 20 rows of metrics and the seconds; averaged weights are put in place at the end. `look(k)` is
    called ten times along the run, after k steps."""
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
            if look and ((k + 1) % max(1, c.steps//10) == 0 or k + 1 == c.steps): look(k + 1)
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
    change, events = None, None
    calm = calm_bank([real], 16 if args.small else 1024 if variant.data == 'events' else 256)
    if variant.augment: change = pretrain_augment(calm.to(device))
    torch.manual_seed(trial.seed)
    model = build(variant.model).to(device).train()
    if variant.data == 'events':
        model, events = Picker(model).to(device).train(), Events(out, calm, 4000, device)
        change = fine_augment(calm.to(device), Augmentation())
    def draw(generator):
        if events: return to_model(change(amplitudes(events.draw(batch, generator)), generator))
        parts = real.draw(whole[0], batch - batch//4, generator), made.draw(whole[1], batch//4, generator)
        b = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        if change: b = change(amplitudes(b), generator)
        if variant.data == 'scrambled':
            b = amplitudes(b)
            b['x'] = scramble(b['x'], generator)
        return to_model(b)['x']
    history, seconds = run(model, draw, c, device, compiled=device.type == 'cuda' and steps > 500)
    keep(model, out/'pretrained'/f'{trial.name}.safetensors')
    return dict(start=trial.start, variant=trial.variant, seed=trial.seed, windows=steps*batch,
                batch=batch, lr=variant.lr, augment=variant.augment, seconds=round(seconds, 1),
                windows_per_second=round(steps*batch/seconds),
                gib=gib(), parameters=sum(p.numel() for p in model.parameters()), history=history,
                model=config_to_dict(variant.model))


def keep(model, file):
    "Write the weights as float16"
    file.parent.mkdir(exist_ok=True)
    weights = {k: v.detach().half().cpu().contiguous() if v.is_floating_point() else v.cpu()
               for k, v in model.state_dict().items()}
    save_file(weights, f'{file}.part')
    if os.path.getsize(f'{file}.part') > LARGEST: print(f'{file.name} has more than {LARGEST} bytes')
    os.replace(f'{file}.part', file)


def gib(): return round(torch.cuda.max_memory_allocated()/2**30, 1) if torch.cuda.is_available() else 0


def start_of_picker(trial, args, variants, starts):
    "The network of a fine-tuning, before its first step, on the host"
    way, out = WAYS[trial.way], Path(args.out)
    torch.manual_seed(trial.fold + 100*trial.again)
    if not trial.thousands and starts[trial.variant] is None: return Peer(Path(args.data), trial.variant)
    net = build(variants[trial.variant].model if trial.thousands else starts[trial.variant])
    supervised = trial.thousands and variants[trial.variant].data == 'events'
    weights = load_file(out/'pretrained'/f'{trial.start}.safetensors') if trial.thousands else {}
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    if weights and not supervised: net.load_state_dict(weights)
    torch.manual_seed(trial.fold + 100*trial.again)
    picker = Picker(net, width=0 if way.probe else way.width, raw=not way.probe, freeze=way.freeze, at=way.at)
    if supervised and way.probe: weights = {k: v for k, v in weights.items() if not k.startswith('head.')}
    if supervised: picker.load_state_dict(weights, strict=not way.probe)
    return picker


class Best:
    "The weights with the lowest loss over dev windows, which stay the same"
    def __init__(self, picker, r, rows, count, seed, device):
        generator = torch.Generator(device).manual_seed(seed)
        batch = to_model(amplitudes(r.draw(torch.as_tensor(rows, device=device), count, generator)))
        self.batches = [{k: v[i:i + 32] for k, v in batch.items()} for i in range(0, count, 32)]
        self.picker, self.device, self.loss, self.step, self.weights = picker, device, math.inf, 0, None

    @torch.no_grad()
    def look(self, step):
        "Compare, and keep"
        self.picker.eval()
        with mixed_precision(self.device): losses = [self.picker(b).loss.float() for b in self.batches]
        self.picker.train()
        loss = float(torch.stack(losses).mean())
        if loss >= self.loss: return
        self.loss, self.step = loss, step
        self.weights = {k: v.clone() for k, v in self.picker.state_dict().items()}


def finetune(trial, args, device):
    "Fine-tune on a fraction of the events, and score on those of a fold"
    variants, starts = models(args.size)
    way, out, seed = WAYS[trial.way], Path(args.out), trial.fold + 100*trial.again
    picker = start_of_picker(trial, args, variants, starts).to(device).train()
    labelled, table = records_of(Path(args.data), 'labelled', device)
    labelled.rows = rows_to_learn(table, trial.fold, trial.fraction, trial.again, args.best)
    noise = noise_bank([labelled], count=16 if args.small else 256)
    change = fine_augment(noise.to(device), replace(Augmentation(), noise=way.noise))
    here = torch.as_tensor(labelled.rows, device=device)
    c = TrainConfig(steps=min(way.steps, 8) if args.small else way.steps, batch_size=4 if args.small else 32,
                    lr=way.lr, seed=seed, weight_decay=way.weight_decay, layer_decay=way.layer_decay, average=way.average)
    events = Events(out, noise, 1000, device) if way.synthetic else None
    made = round(way.synthetic*c.batch_size)
    def draw(generator):
        b = labelled.draw(here, c.batch_size - made, generator)
        other = events.draw(made, generator) if made else {}
        b = {k: torch.cat([v, other[k]]) if made else v for k, v in b.items()}
        return to_model(change(amplitudes(b), generator))
    dev = rows_of_dev(table, trial.fold)
    best = Best(picker, labelled, dev, 8 if args.small else 128, trial.fold, device) if args.best else None
    history, seconds = run(picker, draw, c, device, look=best and best.look) if c.steps else ([{'loss': None}], 0.)
    if best and best.weights: picker.load_state_dict(best.weights)
    if trial.fraction == 1 and trial.fold == trial.again == 0 and not way.probe:
        keep(picker, out/'pickers'/f'{trial.name}.safetensors')
    onsets = scored(picker.eval(), labelled, table, trial.fold, device, 1 if args.small else 3)
    return dict(start=trial.start, variant=trial.variant, windows=1000*trial.thousands, seed=trial.seed, way=trial.way,
                fraction=trial.fraction, fold=trial.fold, again=trial.again, control=trial.control(variants),
                records=len(labelled.rows), events=len(set(table['event'][labelled.rows])), steps=c.steps,
                best_step=best.step if best else c.steps, dev_loss=best.loss if best and best.weights else None,
                seconds=round(seconds, 1), gib=gib(), loss=history[-1]['loss'], **summary(onsets), settings=asdict(way),
                onsets=onsets)


@torch.no_grad()
def scored(picker, r, table, fold, device, places):
    """A window around each onset of a fold, anywhere in it but in the first and last 5 s, and windows of noise: the same
    ones for every picker. Returns rows [phase p, s or n, record, event, status, known, windows]; `known` says whether the
    picker learned from that station, and a window is [residual in seconds, highest probability of P, of S, of any]."""
    onset, status, length = (v.cpu().numpy() for v in (r.onset, r.status, r.length))
    held = np.flatnonzero(table['fold'] == fold)
    event = {e: k for k, e in enumerate(sorted(set(table['event'].tolist())))}
    stations = set(table['station'][r.rows].tolist())
    place = np.random.default_rng(0).uniform(0, 1, (len(table), 3, places))
    def highest(rows, first):
        "Samples of the highest P and S probability (n, 2), and highest probabilities of P, S and any phase (n, 3)"
        found = [(np.zeros((0, 2), int), np.zeros((0, 3)))]
        size = 16 if device.type == 'cpu' else 128
        for k in range(0, len(rows), size):
            x = r.at(*(torch.as_tensor(v[k:k + size], device=device) for v in (rows, first)))
            with mixed_precision(device), tensor_float32(device): logits = picker.logits(to_model(x)['x'])
            p = logits.float().softmax(-1)
            top, at = p[..., 1:].max(1)
            top = torch.cat([top, 1 - p[..., :1].amin(1)], 1)
            found.append((at.cpu().numpy(), top.cpu().numpy()))
        return [np.concatenate(v) for v in zip(*found)]
    out = []
    def add(phase, rows, k):
        "Rows of one kind"
        windows = np.full((len(rows), places, 4), np.nan)
        for j in range(places):
            u = place[rows, k, j]
            if k < 2: first = np.rint(onset[rows, k] - 512 - u*(WINDOW - 1024)).astype(np.int64)
            else: first = (u*np.maximum(length[rows] - WINDOW, 0)).astype(np.int64)
            at, windows[:, j, 1:] = highest(rows, first)
            if k < 2: windows[:, j, 0] = (at[:, k] + first - onset[rows, k])/SAMPLING_RATE
        for i, w in zip(rows.tolist(), windows):
            said = STATUS[status[i, k]] if k < 2 else 'absent'
            out.append([phase, i, event[table['event'][i]], said, int(table['station'][i] in stations),
                        [[None if math.isnan(v) else round(v, 4) for v in one] for one in w.tolist()]])
    for k, phase in enumerate('ps'):
        add(phase, held[np.isin(status[held, k], (MANUAL, AUTOMATIC)) & np.isfinite(onset[held, k])], k)
    add('n', held[(status[held] == ABSENT).all(1)], 2)
    return out


def summary(onsets):
    "Shares of the manual onsets and capped errors from the rows of `scored`, and how well P stands out of noise"
    mean = lambda v: round(float(v.mean()), 4) if v.size else None
    score, quiet = {}, np.array([w[1] for row in onsets if row[0] == 'n' for w in row[5]])
    for phase in 'ps':
        rows = [row for row in onsets if row[0] == phase and row[3] == 'manual']
        residual = np.array([w[0] for row in rows for w in row[5]], float)
        score |= {f'{phase}{within}': mean(abs(residual) <= within) for within in (.1, .3, .5)}
        score[f'{phase}_mae'] = mean(np.minimum(abs(residual), 2))
        score[f'{phase}_mae0.5'] = mean(np.minimum(abs(residual), .5))
        score[f'{phase}_n'] = len(rows)
        if phase == 'p': loud = np.array([w[1] for row in rows for w in row[5]])
    score['p_auc'] = mean(loud[:, None] > quiet)
    return score


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
    todo = trials_of(whole_plan(args.plan or PLAN), variants, starts)
    for name in ('pretrained', 'trials', 'logs'): (out/name).mkdir(parents=True, exist_ok=True)
    (out/'finished').unlink(missing_ok=True)
    unpack_arrays(Path(args.data))
    home = take(args.take, out)
    make_synthetic(out, 40 if args.small else 2000, args.jobs)
    if any('synthetic' in t.way or t.variant == 'supervised' for t in todo):
        make_events(out, 50 if args.small else 4000, args.jobs)
    on_gpu = torch.cuda.is_available() and not args.small
    total = args.memory or (torch.cuda.mem_get_info()[1]/2**30 if on_gpu else 1000)
    done = {t.name for t in todo if t.file(out).exists()}
    todo = [t for t in todo if t.name not in done]
    known = {f.stem for f in (out/'pretrained').glob('*.safetensors')}
    lost = {t.start for t in todo if t.way and t.thousands and t.start in done and t.start not in known}
    say = lambda text: print(f'{time.monotonic() - begin:6.0f} s  {text}', flush=True)
    say(f'{len(todo)} trials to do, {len(done)} done before, {total:.0f} GiB')
    if lost: say(f"the weights of {', '.join(sorted(lost))} are not here: --take a folder with their bundles")
    brought = begin
    context, busy, tried = get_context('forkserver'), {}, defaultdict(int)
    failed, succeeded = [], 0
    context.set_forkserver_preload(['__main__'])       # imports everything once, without touching the GPU
    def ready(t): return not (t.way and t.thousands) or t.start in known
    def hopeless(t): return t.way and t.thousands and t.pretraining.name in failed
    def fits(t):
        used = sum(.6 + other.memory(variants) for other in busy.values())
        pretrainings = sum(not other.way for other in busy.values())
        if t.way and pretrainings and len(busy) - pretrainings >= args.beside: return False
        if not t.way and (pretrainings >= args.pretrainings or passed > args.pretrain_until): return False
        return used + .6 + t.memory(variants) <= .94*total or not busy
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
        if args.bring and time.monotonic() - brought > 60:
            bring(out, args.bring, home)
            brought = time.monotonic()
        for process in [p for p in busy if not p.is_alive()]:
            process.join()
            trial = busy.pop(process)
            if trial.file(out).exists():
                known.add(trial.name)
                succeeded += 1
                row = read_json(trial.file(out))
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
    if args.bring: bring(out, args.bring, home)
    say(f'{len(todo)} trials left, {len(failed)} failed')
    (out/'finished').write_text(str(len(todo)), encoding='utf-8')


def take(folder, out):
    "Results of earlier calls; returns the names of the weights that were brought before, be they here or not"
    names = set()
    for file in sorted(Path(folder).glob('*.zip')) if folder else []:
        with zipfile.ZipFile(file) as z:
            for name in z.namelist():
                if name == 'home.txt': names |= set(z.read(name).decode().split())
                where = out/Path(name).parent.name/Path(name).name           # two levels, never outside
                if name == 'home.txt' or where.exists(): continue
                where.parent.mkdir(parents=True, exist_ok=True)
                where.write_bytes(z.read(name))
    return names


def bring(out, folder, home):
    "Bundle results, and weights that are not at home yet: `BUNDLES` files of at most `LARGEST` bytes, the rest next time"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bundles = sorted(folder.glob('weights-*.zip'))
    there = home.union(*(zipfile.ZipFile(f).namelist() for f in bundles))
    for file in [f for name in ('pretrained', 'pickers') for f in sorted((out/name).glob('*.safetensors'))]:
        name = f'{file.parent.name}/{file.name}'
        if name in there: continue
        if not bundles or bundles[-1].stat().st_size + file.stat().st_size > .98*LARGEST:
            if len(bundles) == BUNDLES: break
            bundles.append(folder/f'weights-{len(bundles) + 1}.zip')
        with zipfile.ZipFile(bundles[-1], 'a') as z: z.write(file, name)
        there.add(name)
    with zipfile.ZipFile(folder/'results.part', 'w', zipfile.ZIP_DEFLATED) as z:
        for file in sorted(f for name in ('trials', 'pretrained', 'logs') for f in (out/name).glob('*')):
            if file.suffix in ('.json', '.txt'): z.write(file, f'{file.parent.name}/{file.name}')
        z.writestr('home.txt', '\n'.join(sorted(there)))
    os.replace(folder/'results.part', folder/'results.zip')


# ---------------------------------------------------------------- tables

SCORES = ('p0.1', 'p0.3', 's0.1', 's0.3', 'p_mae', 's_mae', 'p_auc')
PRETRAINED = dict(start=str, seconds=float, history=list[dict])                       # fields of pretrained/NAME.json
SCORED = dict(start=str, variant=str, windows=int, way=str, fraction=float, fold=int, again=int, control=str, onsets=list[list],
              p_n=int, s_n=int, **dict.fromkeys(SCORES, float | None))                # and of trials/NAME.json


def hits(row, phase, within=.3):
    "Share of the windows of each onset with the highest probability near it, by (fold, event, record)"
    onsets = [o for o in row['onsets'] if o[0] == phase and o[3] == 'manual']
    return {(row['fold'], o[2], o[1]): np.mean([abs(w[0]) <= within for w in o[5]]) for o in onsets}


def difference(rows, others, phase):
    """Points within 0.3 s by which `rows` are above `others`, and the 95 % interval over events; None without a
    common fold"""
    a, b = defaultdict(list), defaultdict(list)                        # an onset: its hits with all seeds
    for mean, some in ((a, rows), (b, others)):
        for row in some:
            for k, v in hits(row, phase).items(): mean[k].append(v)
    events = defaultdict(list)
    for key in a.keys() & b.keys(): events[key[1]].append(np.mean(a[key]) - np.mean(b[key]))
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


def write_onsets(file, trials):
    "A line for each onset, and each record of noise, of each trial: see `scored`, and `seismodel.study.paired`"
    if not trials: return
    places = len(trials[0]['onsets'][0][5])
    columns = [f'{name}_{j}' for j in range(places) for name in ('residual', 'p', 's', 'any')]
    with gzip.open(file, 'wt', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        arm = 'method', 'fraction', 'seed', 'fold', 'start'
        writer.writerow([*arm, 'phase', 'record', 'event', 'status', 'known', *columns])
        for t in trials:
            arm = f"{t['variant']} {t['way']}", t['fraction'], t['again'], t['fold'], t['start']
            for *about, windows in t['onsets']: writer.writerow([*arm, *about, *(v for w in windows for v in w)])


def write_tables(out):
    """pretrained.csv and trials.csv, a line each, onsets.csv.gz, and table.csv: means over folds and seeds, differences to
    the random start"""
    again = 'remove it, and it is made again'
    pretrained = {f.stem: read_json(f, PRETRAINED, again) for f in sorted((out/'pretrained').glob('*.json'))}
    trials = [read_json(f, SCORED, again) for f in sorted((out/'trials').glob('*.json'))]
    last = lambda p: {k: v for k, v in p['history'][-1].items() if k in ('loss', 'spectrum_mse', 'accuracy', 'mse')}
    plain = lambda d: {k: v for k, v in d.items() if not isinstance(v, (dict, list))}
    write_csv(out/'pretrained.csv', [{**plain(p), 'last': json.dumps(last(p))} for p in pretrained.values()])
    write_csv(out/'trials.csv', [plain(t) for t in trials])
    write_onsets(out/'onsets.csv.gz', trials)
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


def against(out, reference):
    "Write study_scores.csv, study_gains.csv and study_detection.csv, and print the gains within 0.3 s"
    from seismodel.study.paired import arm_scores, compare, detection, read_onsets
    onsets = read_onsets(out/'onsets.csv.gz')
    found = {'scores': arm_scores(onsets), 'gains': compare(onsets, reference), 'detection': detection(onsets).reset_index()}
    for name, table in found.items(): table.round(5).to_csv(out/f'study_{name}.csv', index=False)
    gains = found['gains']
    if len(gains): print(gains[gains['metric'] == 'within 0.3 s'].round(3).to_string(index=False))


def show(args):
    "Write the tables and print the last one"
    rows = write_tables(Path(args.out))
    if not rows: return print('no trial is scored yet')
    if args.against: return against(Path(args.out), args.against)
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
    parser.add_argument('--every-split', action='store_true', help='prepare: labelled records of test as well')
    parser.add_argument('--peer', action='append', help="prepare: NAME=STEM, a PhaseNet in SeisBench's STEM.json, STEM.pt")
    parser.add_argument('--packed', help='prepare: folder for small copies of the arrays, which `run --data` takes as well')
    parser.add_argument('--data', default='data', help='folder of the arrays that prepare writes')
    parser.add_argument('--out', default='results', help='folder of the results')
    parser.add_argument('--plan', action='append', help='STARTS | WAYS | FRACTIONS | FOLDS | SEEDS, study, or '
                        'study:THOUSANDS; may be given several times')
    parser.add_argument('--best', action='store_true', help='a tenth of the events chooses the step of each picker')
    parser.add_argument('--take', help='folder with bundles of earlier results')
    parser.add_argument('--bring', help='folder for bundles of results, renewed every minute')
    parser.add_argument('--against', help="table: compare all with this one, such as 'random plain', as the study does")
    parser.add_argument('--size', default='small', help='of the presets: tiny, small or base')
    parser.add_argument('--jobs', type=int, default=12, help='processes at once')
    parser.add_argument('--pretrainings', type=int, default=4, help='of them at most so many that pretrain')
    parser.add_argument('--beside', type=int, default=100, help='fine-tunings at most while any process pretrains')
    parser.add_argument('--pretrain-until', type=float, default=1e9, help='seconds after which no pretraining begins')
    parser.add_argument('--memory', type=float, help='GiB to share out; those of the GPU if not given')
    parser.add_argument('--until', type=float, default=1e9, help='seconds after which no trial begins')
    parser.add_argument('--kill', type=float, default=1e9, help='seconds after which those that run are stopped')
    parser.add_argument('--small', action='store_true', help='tiny models and a few steps on the CPU')
    args = parser.parse_args()
    if args.small: args.size = 'tiny'
    {'prepare': prepare, 'run': drive, 'table': show}[args.what](args)

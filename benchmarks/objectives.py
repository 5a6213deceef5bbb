"""What pretraining buys, by objective, budget and way of fine-tuning, on one GPU (or, with --small, on a CPU in minutes).

    seismodel pack LABELLED --out labelled; seismodel pack UNLABELLED --out unlabelled
    python benchmarks/objectives.py --labelled labelled --unlabelled unlabelled --out results --jobs 10 --until 1200
    python benchmarks/objectives.py --out results --table

Every arm is pretrained on unlabelled records and synthetic ones (3 : 1), then fine-tuned on a share of the labelled events
and scored on events that it has not seen: five folds of the events in `train` and `dev`; `test` is never read. The score needs
no threshold: the sample with the highest probability in a window around each manual onset. One line of rows.csv an arm, share
and fold, written when it is known; the same command goes on where it was stopped. Data live on the GPU, and a step, with its
windows and their augmentation, is one recording.
"""
import argparse
import csv
import gc
import json
import math
import os
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from seismodel.signals.augment import Augmentation, fine_augment
from seismodel.training.distributed import Ranks
from seismodel.finetuning.heads import Picker
from seismodel.data.windows import amplitudes, to_model
from seismodel.signals.noise import noise_bank
from seismodel.models.pretraining import MaskedConfig, ReconstructionConfig, build, config_to_dict, preset
from seismodel.data.store_reader import Store, StoreSource
from seismodel.training.config import TrainConfig, lr_at, parameter_groups, precision
from seismodel.training.cuda_graph import Replay, compile_blocks, tensor_float32
from seismodel.data.sources import SyntheticSource
from seismodel.data.store import quantize
from seismodel.signals.synthetic import SyntheticConfig
from seismodel.training.trainer import set_lr, update
from seismodel.signals.records import STATUS, WINDOW

FOLDS, MANUAL = 5, STATUS.index('manual')


# ---------------------------------------------------------------- arms

def small(name): return preset(f'{name}-small').model

UNET = small('spectrum')
SEQUENTIAL = small('reconstruction')
ENCODER = SEQUENTIAL.encoder
GENTLE = Augmentation(rotate=.5, flip=.5, flip_one=0., shift=0., noise=.3, drop=.05, gap=.05)


@dataclass(frozen=True)
class Arm:
    "A pretraining run"
    model: object          # configuration
    windows: float         # seen, thousands
    lr: float = 3e-3
    weight_decay: float = .1
    batch: int = 256
    seed: int = 0
    augment: Augmentation | None = None
    memory: float = 14     # GiB, about


def recon(model, windows=480, **more): return Arm(model, windows, **{**dict(lr=2e-3, weight_decay=.01, batch=128, memory=20), **more})

mended = replace(ENCODER, mask_value='learned', activation='gelu')
ARMS = {    # in the order in which they are wanted
    'spectrum-480k': Arm(UNET, 480),
    'recon-480k': recon(SEQUENTIAL),
    'recon-spectrum-480k': recon(replace(SEQUENTIAL, target='spectrum')),
    'joint-1.5m': Arm(small('joint'), 1500),
    'spectrum-1.5m': Arm(UNET, 1500),
    'contrastive-1.5m': Arm(small('contrastive'), 1500),
    'recon-mended-480k': recon(replace(SEQUENTIAL, encoder=mended, target='spectrum')),
    'recon-short-480k': recon(replace(SEQUENTIAL, encoder=replace(ENCODER, mask=.5, num_zero_elements=4))),
    'bidir-unet-480k': Arm(MaskedConfig(replace(mended, d_model=64), 'unet', 2), 480),
    'spectrum-aug-480k': Arm(UNET, 480, augment=GENTLE),
    'joint-480k': Arm(small('joint'), 480),
    'spectrum-lr1e-3-480k': Arm(UNET, 480, lr=1e-3),
    'recon-learned-480k': recon(replace(SEQUENTIAL, encoder=replace(ENCODER, mask_value='learned'))),
    'recon-gelu-480k': recon(replace(SEQUENTIAL, encoder=replace(ENCODER, activation='gelu'))),
    'recon-conv-480k': recon(MaskedConfig(replace(UNET.encoder, out_features=128), 'sequential', 12, ff=4.)),
    'contrastive-480k': Arm(small('contrastive'), 480),
    'joint-heavy-480k': Arm(replace(small('joint'), contrastive=1.), 480),
    'spectrum-lr6e-3-480k': Arm(UNET, 480, lr=6e-3),
    'spectrum-seed1-1.5m': Arm(UNET, 1500, seed=1),
    'spectrum-aug-1.5m': Arm(UNET, 1500, augment=GENTLE),
    'spectrum-5m': Arm(UNET, 5000),
}
RANDOM = {'random-unet': UNET, 'random-sequential': SEQUENTIAL, 'random-mended': replace(SEQUENTIAL, encoder=mended)}


@dataclass(frozen=True)
class Fine:
    "A way of fine-tuning"
    lr: float = 1e-3
    weight_decay: float = .1
    steps: int = 1000
    freeze: str = 'none'    # none, gradual, or all
    layer_decay: float = 1. # of the learning rate, from one stage of the network to the one below
    average: float = 0.     # decay of the moving average of the weights; 0: the weights themselves
    noise: float = .5       # share of the windows with noise added
    probe: bool = False     # a linear head without the waveform


FINE = {
    'usual': Fine(),
    'recon': Fine(lr=2e-4, weight_decay=.005),
    'probe': Fine(freeze='all', probe=True, lr=3e-3),
    'gradual': Fine(freeze='gradual'),
    'lr3e-4': Fine(lr=3e-4),
    'decay.65': Fine(layer_decay=.65),
    'average': Fine(average=.99),
    'quiet': Fine(noise=.25),
    'gradual-average': Fine(freeze='gradual', average=.99),
    'decay.65-average': Fine(layer_decay=.65, average=.99),
    'gradual-decay-average': Fine(freeze='gradual', layer_decay=.75, average=.99),
}


@dataclass(frozen=True)
class Job:
    "A pretraining run (no fine), or a fine-tuning with its score"
    arm: str
    fine: str = ''
    share: float = 1.
    fold: int = 0
    first: int = 0          # order: smaller ones earlier

    @property
    def name(self): return f'{self.arm}--{self.fine}--{self.share:g}--{self.fold}' if self.fine else self.arm

    @property
    def memory(self):
        arm = ARMS.get(self.arm)
        if not self.fine: return arm.memory
        return 7 if 'recon' in self.arm or 'sequential' in self.arm or 'mended' in self.arm else 4


WAYS = ('gradual', 'lr3e-4', 'decay.65', 'average', 'quiet', 'gradual-average', 'decay.65-average', 'gradual-decay-average')


def plan():
    "All jobs, in the order of their importance"
    jobs = []
    def add(arm, fine, shares=((.1, (0, 1, 2)), (1., (0, 1))), first=0):
        jobs.extend(Job(arm, fine, share, fold, first) for share, folds in shares for fold in folds)
    few, probe = ((.1, (0, 1, 2)),), ((1., (0,)),)
    for rank, arm in enumerate(ARMS):
        first, sequential = 10*rank, arm.startswith('recon')
        jobs.append(Job(arm, first=first))
        add(arm, 'recon' if sequential else 'usual', first=first + 1)
        if sequential: add(arm, 'usual', few, first + 2)
        add(arm, 'probe', probe, first + 2)
    for arm in RANDOM:
        first, sequential = 75 if arm == 'random-mended' else 5, arm != 'random-unet'
        add(arm, 'recon' if sequential else 'usual', first=first)
        if sequential: add(arm, 'usual', few, first + 10)
        add(arm, 'probe', probe, first + 10)
    for k, fine in enumerate(WAYS):
        for arm in ('spectrum-480k', 'random-unet'): add(arm, fine, few, 51 + k)
    for fine in ('gradual', 'decay.65', 'average', 'gradual-average', 'gradual-decay-average'):
        for arm in ('spectrum-1.5m', 'joint-1.5m'): add(arm, fine, first=101)
    return sorted(jobs, key=lambda j: j.first)


# ---------------------------------------------------------------- data on the device

class Records:
    "Whole records on the device, from which windows are drawn there"
    def __init__(self, samples, first, length, scale, onset, status, device):
        put = lambda v, dtype: torch.as_tensor(np.array(v), dtype=dtype).to(device)
        self.samples = put(samples, torch.int16)                      # (N, 3)
        self.first, self.length = put(first, torch.int64), put(length, torch.int64)
        self.scale, self.onset = put(scale, torch.float32), put(onset, torch.float32)    # (R, 3), (R, 4)
        self.status = put(status, torch.int8)                         # (R, 2)

    def __len__(self): return len(self.first)

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
        x = self.samples[self.first[r, None] + t.clamp_min(0).minimum(self.length[r, None] - 1)].float()*self.scale[r, None]
        onset = self.onset[r] - first[:, None]
        onset = onset.where((onset >= 0) & (onset < WINDOW), torch.nan)
        valid = torch.stack([(-first).clamp_min(0), (self.length[r] - first).clamp_max(WINDOW)], 1).to(torch.int32)
        batch = dict(zip(('p_onset', 's_onset', 'p_weak', 's_weak'), onset.unbind(1)))
        batch |= dict(zip(('p_status', 's_status'), self.status[r].unbind(1)))
        return {**batch, 'x': torch.where(there[..., None], x, 0.), 'scale': torch.ones(len(r), 3, device=r.device), 'valid': valid}


def records_of(store, device):
    "A whole store, of one file of 16-bit samples"
    index, samples = store.index, store.shard(0)[0]
    assert len(store.manifest['shards']) == 1 and samples.dtype == np.int16
    onset = np.stack([index[k] for k in ('p_onset', 's_onset', 'p_weak', 's_weak')], 1)
    return Records(samples, index['first'], index['samples'], index['scale'], onset, np.stack([index['p_status'], index['s_status']], 1), device)


def made(records, device):
    "Synthetic records (R, L, 3)"
    R, L, _ = records.shape
    q, _, scale = zip(*(quantize(x, 'int16') for x in records))
    nothing = np.full((R, 4), np.nan)
    return Records(np.concatenate(q), np.arange(R)*L, np.full(R, L), np.stack(scale), nothing, np.zeros((R, 2)), device)


def synthetic_part(numbers):
    torch.set_num_threads(1)
    source = SyntheticSource(0, SyntheticConfig(samples=3*WINDOW//2))
    source.prefetch(numbers)
    x = np.stack([source.record(i).waveform for i in numbers])
    return (x/np.abs(x).max((1, 2), keepdims=True).clip(1e-30)).astype(np.float16)


def make_synthetic(file, count, jobs):
    "Write records of the generator, each with a largest amplitude of 1"
    if file.exists(): return
    parts = [list(range(k, min(k + 50, count))) for k in range(0, count, 50)]
    with get_context('spawn').Pool(jobs) as pool: whole = np.concatenate(pool.map(synthetic_part, parts))
    np.save(file, whole)


def folds_of(store):
    "The fold of each record, 0 to 4 by event and alike in every source; -1 for records of `test`"
    import pandas as pd
    table = pd.read_csv(store.folder/'traces.csv', dtype=str)
    event = table['source_id'].fillna(table['trace_name'])
    first = table.assign(event=event).groupby('event')['trace_dataset'].first()
    order = sorted(first.index, key=lambda e: (first[e], crc32(e.encode())))
    number = {e: k % FOLDS for k, e in enumerate(order)}
    fold = event.map(number).to_numpy().copy()
    fold[(table['split'] == 'test').to_numpy()] = -1
    return fold, event.to_numpy()


def chosen_rows(fold, event, held, share):
    "Records to learn from: a share of the events outside a fold, the same ones for every arm"
    learn = np.flatnonzero((fold != held) & (fold >= 0))
    events = sorted(set(event[learn]), key=lambda e: crc32(f'{held}/{e}'.encode()))
    kept = set(events[:math.ceil(share*len(events))])
    return np.array([i for i in learn if event[i] in kept])


class Data:
    "What all jobs of a process share"
    def __init__(self, args, device):
        self.store = Store(Path(args.labelled))
        self.labelled, (self.fold, self.event) = records_of(self.store, device), folds_of(self.store)
        unlabelled = Store(Path(args.unlabelled))
        self.unlabelled = records_of(unlabelled, device)
        self.train = torch.as_tensor(np.flatnonzero(unlabelled.index['split'] == unlabelled.manifest['splits'].index('train')), device=device)
        self.synthetic = made(np.load(Path(args.out)/'synthetic.npy').astype(np.float32), device)
        self.banks = {}

    def bank(self, rows, key):
        "Noise from the quiet parts of labelled records"
        if key not in self.banks:
            source = StoreSource(self.store, 'train')
            source.rows = rows
            source._look_up()
            self.banks[key] = noise_bank([source], count=256)
        return self.banks[key]

    def quiet(self, device, count=256):
        "Noise for pretraining: unlabelled windows without anything that stands out"
        g = torch.Generator(device).manual_seed(0)
        kept = []
        for _ in range(64):
            x = amplitudes(self.unlabelled.draw(self.train, 64, g))['x']
            size = x.square().mean(1).sqrt()                                                    # (64, 3)
            calm = (x.abs().amax(1) < 5*size).all(1) & (size > 0).all(1)
            kept.append((x/size.mean(1)[:, None, None].clamp_min(1e-20))[calm])
            if sum(map(len, kept)) >= count: break
        return torch.cat(kept)[:count]


# ---------------------------------------------------------------- training

def run(model, draw, c, device, compiled=False):
    "Train; `draw(generator)` makes a batch on the device. Returns the last measures and seconds; the weights are the moving average, if one is asked for"
    ranks, told = Ranks(device), torch.zeros((), device=device)
    generator = torch.Generator(device).manual_seed(c.seed)
    torch.manual_seed(c.seed)
    on_gpu = device.type == 'cuda'
    lr = lambda: torch.tensor(c.lr, device=device) if on_gpu else c.lr
    groups = [{**group, 'lr': lr()} for group in parameter_groups(model, c.weight_decay, c.layer_decay)]
    optimizer = torch.optim.AdamW(groups, lr=lr(), betas=c.betas, fused=True, capturable=on_gpu)
    if compiled: compile_blocks(model)
    def step(_):
        metrics, numbers = update(model, optimizer, [draw(generator)], generator, c, ranks, told)
        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}, numbers
    begin, phase, replay, begun, history = time.perf_counter(), None, None, None, []
    dummy = torch.zeros(1, device=device)
    with tensor_float32(device):
        for k in range(c.steps):
            model.set_progress(k, c.steps)
            now = getattr(model, 'frozen', None)
            if now != phase or replay is None:              # what is frozen changes the operations: record again
                if replay is not None and on_gpu:
                    torch.cuda.synchronize()
                    replay.close()
                replay, phase = (Replay(step, generator) if on_gpu else step), now
            set_lr(optimizer, lr_at(k, c))
            metrics, numbers = replay(dummy)
            if k == 10:
                if on_gpu: torch.cuda.synchronize()
                begun = time.perf_counter()
            if (k + 1) % max(1, c.steps//20) == 0: history.append({n: float(v) for n, v in metrics.items()})
    if on_gpu:
        torch.cuda.synchronize()
        replay.close()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        for p, state in optimizer.state.items(): p.copy_(state.get('average', p))
    speed = (c.steps - 11)*c.batch_size/max(time.perf_counter() - (begun or begin), 1e-9)
    return history, seconds, speed


def pretrain(job, data, out, device, quick):
    "Pretrain an arm, and write its weights as float16"
    arm = ARMS[job.arm]
    batch = 4 if quick else arm.batch
    c = TrainConfig(steps=12 if quick else round(arm.windows*1000/batch), batch_size=batch, lr=arm.lr, weight_decay=arm.weight_decay, seed=arm.seed)
    torch.manual_seed(arm.seed)
    model = build(arm.model).to(device).train()
    whole = torch.arange(len(data.synthetic), device=device)
    change = fine_augment(data.quiet(device), arm.augment) if arm.augment else None
    def draw(generator):
        real, made = data.unlabelled.draw(data.train, batch - batch//4, generator), data.synthetic.draw(whole, batch//4, generator)
        b = {k: torch.cat([real[k], made[k]]) for k in real}
        if change: b = change(amplitudes(b), generator)
        return to_model(b)['x']
    history, seconds, speed = run(model, draw, c, device, compiled=device.type == 'cuda' and arm.windows > 100)
    weights = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}
    about = dict(windows=c.steps*batch, seconds=seconds, speed=speed, history=history, model=config_to_dict(arm.model))
    (out/'pretrained'/f'{job.name}.json').write_text(json.dumps(about))
    save_file(weights, out/'pretrained'/f'{job.name}.part')
    os.replace(out/'pretrained'/f'{job.name}.part', out/'pretrained'/f'{job.name}.safetensors')
    return dict(seconds=round(seconds), speed=round(speed), memory=gib(), **{k: round(v, 4) for k, v in history[-1].items()})


def gib(): return round(torch.cuda.max_memory_allocated()/2**30, 1) if torch.cuda.is_available() else 0


def finetune(job, data, out, device, quick):
    "Fine-tune on a share of the events, and score on those of a fold"
    fine, model = FINE[job.fine], ARMS[job.arm].model if job.arm in ARMS else RANDOM[job.arm]
    torch.manual_seed(job.fold)
    net = build(model)
    if job.arm in ARMS:
        weights = load_file(out/'pretrained'/f'{job.arm}.safetensors')
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    torch.manual_seed(job.fold)
    picker = Picker(net, width=0 if fine.probe else 32, raw=not fine.probe, freeze=fine.freeze).to(device).train()
    rows = chosen_rows(data.fold, data.event, job.fold, job.share)
    noise = data.bank(rows, (job.fold, job.share)).to(device)
    change = fine_augment(noise, replace(Augmentation(), noise=fine.noise))
    here = torch.as_tensor(rows, device=device)
    c = TrainConfig(steps=8 if quick else fine.steps, batch_size=4 if quick else 32, lr=fine.lr, weight_decay=fine.weight_decay, seed=job.fold,
                    layer_decay=fine.layer_decay, average=fine.average)
    def draw(generator): return to_model(change(amplitudes(data.labelled.draw(here, c.batch_size, generator)), generator))
    history, seconds, speed = run(picker, draw, c, device)
    score, residuals = scored(picker.eval(), data, job.fold, device, 1 if quick else 3)
    np.save(out/'residuals'/f'{job.name}.npy', residuals)
    return dict(records=len(rows), seconds=round(seconds, 1), memory=gib(), loss=round(history[-1]['loss'], 4), **score)


@torch.no_grad()
def scored(picker, data, fold, device, places):
    "Threshold-free scores of the events of a fold: a window with the onset anywhere but in the first and last 5 s, the highest probability in it"
    r = data.labelled
    held = np.flatnonzero(data.fold == fold)
    onset, status = r.onset.cpu().numpy(), r.status.cpu().numpy()
    score, table, top = {}, [], {}
    def highest(rows, first):
        "Place and size of the highest P and S probability, (n, 2) each"
        found = []
        for k in range(0, len(rows), 128):
            x = to_model(r.at(torch.as_tensor(rows[k:k + 128], device=device), torch.as_tensor(first[k:k + 128], device=device)))['x']
            with precision(device), tensor_float32(device): p = picker.logits(x).float().softmax(-1)[..., 1:]
            size, place = p.max(1)
            found.append((place.cpu().numpy(), size.cpu().numpy()))
        return [np.concatenate(v) for v in zip(*found)]
    rng = np.random.default_rng(fold)
    for k, phase in enumerate('ps'):
        rows = np.array([i for i in held if status[i, k] == MANUAL and np.isfinite(onset[i, k])])
        residual = np.zeros((len(rows), places))
        for j in range(places):
            first = np.rint(onset[rows, k] - rng.uniform(512, WINDOW - 512, len(rows))).astype(np.int64)
            place, size = highest(rows, first)
            residual[:, j] = (place[:, k] + first - onset[rows, k])/100
            if k == 0: top.setdefault('event', []).append(size[:, 0])
        for within in (.1, .3, .5): score[f'{phase}{within}'] = round(float((abs(residual) <= within).mean()), 4)
        score[f'{phase}_mae'] = round(float(np.minimum(abs(residual), 2).mean()), 4)
        score[f'{phase}_n'] = len(rows)
        table += [(k, i, *v) for i, v in zip(rows, residual)]
    calm = np.array([i for i in held if (status[i] == STATUS.index('absent')).all()])
    length = r.length.cpu().numpy()
    first = (rng.uniform(0, 1, len(calm))*np.maximum(length[calm] - WINDOW, 0)).astype(np.int64)
    loud, quiet = np.concatenate(top['event']), highest(calm, first)[1][:, 0]
    score['p_auc'] = round(float((loud[:, None] > quiet).mean()), 4)
    return score, np.array(table, np.float32)


# ---------------------------------------------------------------- many jobs, several processes

def serve(pipe, args):
    "A process: job after job"
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() and not args.small else 'cpu')
    out, data = Path(args.out), None
    try:
        while True:
            job = pipe.recv()
            try:
                if data is None: data = Data(args, device)
                if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
                result = (finetune if job.fine else pretrain)(job, data, out, device, args.small)
            except Exception as e:
                (out/'errors.txt').open('a').write(f'{job.name}\n{traceback.format_exc()}\n')
                result = f'{type(e).__name__}: {str(e)[:200]}'
            torch.compiler.reset()
            gc.collect()
            if device.type == 'cuda': torch.cuda.empty_cache()
            pipe.send(result)
    except (EOFError, BrokenPipeError): pass


def write(file, row):
    "Append a line at once, with a header if it is the first"
    new = not file.exists()
    with open(file, 'a', newline='') as f:
        w = csv.writer(f)
        if new: w.writerow(row)
        w.writerow(row.values())
        f.flush()


def done_before(out):
    "Names of jobs that need not run"
    done = {f.stem for f in (out/'pretrained').glob('*.safetensors')}
    done |= {f.name[:-4] for f in (out/'residuals').glob('*.npy')}
    return done


def drive(args):
    "Give jobs to processes: the first one whose weights are there and whose memory is free"
    begin, out = time.monotonic(), Path(args.out)
    for name in ('pretrained', 'residuals'): (out/name).mkdir(parents=True, exist_ok=True)
    make_synthetic(out/'synthetic.npy', 40 if args.small else 2000, args.jobs)
    total = torch.cuda.mem_get_info()[1]/2**30 if torch.cuda.is_available() and not args.small else 100
    done, context, tried = done_before(out), get_context('spawn'), {}
    todo = [j for j in plan() if j.name not in done and (not args.only or any(w in j.name for w in args.only.split(',')))]
    if args.limit: todo = todo[:args.limit]
    busy, free = {}, []
    say = lambda text: print(f'{time.monotonic() - begin:6.0f} s  {text}', flush=True)
    say(f'{len(todo)} jobs, {len(done)} done before, {total:.0f} GiB')
    for _ in range(args.jobs):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, args))
        process.start()
        there.close()
        free.append((here, process))
    def fits(job):
        used = sum(j.memory for _, j in busy.values()) + .6*args.jobs
        return used + job.memory <= .94*total
    def ready(job): return not job.fine or job.arm in RANDOM or job.arm in done
    while todo or busy:
        late = time.monotonic() - begin > args.until
        while free and todo and not late:
            pretraining = sum(not j.fine for _, j in busy.values())
            job = next((j for j in todo if ready(j) and fits(j) and (j.fine or pretraining < args.pretrainings)), None)
            if job is None: break
            todo.remove(job)
            pipe, process = free.pop(0)
            busy[pipe] = process, job
            pipe.send(job)
        if not busy and (late or todo): break
        for pipe in wait(list(busy), timeout=1):
            process, job = busy.pop(pipe)
            try: result = pipe.recv()
            except EOFError:
                say(f'{job.name}: its process ended'); continue
            free.append((pipe, process))
            if isinstance(result, str):
                say(f'{job.name} FAILED {result}')
                tried[job.name] = tried.get(job.name, 0) + 1
                if tried[job.name] < 2: todo.append(job)
                continue
            done.add(job.name)
            about = dict(arm=job.arm, fine=job.fine, share=job.share, fold=job.fold) if job.fine else dict(arm=job.arm)
            write(out/('rows.csv' if job.fine else 'pretrained.csv'), {**about, **result} if job.fine else {**about, 'result': json.dumps(result)})
            say(f'{job.name}  ' + ' '.join(f'{k} {v}' for k, v in result.items() if k not in ('p_n', 's_n')))
    say(f'{len(todo)} jobs left')
    (out/'finished').write_text(str(len(todo)))
    for pipe, process in free: pipe.close()


def on_unet(arm):
    "Whether an arm has the U-Net, and with it the control of that"
    c = ARMS[arm].model
    return getattr(c, 'backbone', 'unet' if c.method == 'contrastive' else 'sequential') == 'unet'


def table(out):
    "Means over the folds, and differences to the random start that was fine-tuned in the same way, with intervals over events"
    import pandas as pd
    if not (out/'rows.csv').exists(): return print('no arm is scored yet')
    rows = pd.read_csv(out/'rows.csv')
    names = ['p0.1', 'p0.3', 's0.1', 's0.3', 'p_mae', 's_mae', 'p_auc']
    shown = rows.groupby(['share', 'fine', 'arm'], sort=False)[names].mean().round(3)
    shown.insert(0, 'folds', rows.groupby(['share', 'fine', 'arm'], sort=False).size())
    print(shown.sort_index(level=[0, 1], sort_remaining=False).to_string())
    rng = np.random.default_rng(0)
    def hits(name, phase, within):
        t = np.load(out/'residuals'/f'{name}.npy')
        t = t[t[:, 0] == phase]
        return dict(zip(t[:, 1].astype(int), (abs(t[:, 2:]) <= within).mean(1)))
    print('\ndifference to random within 0.3 s (95 % over onsets)')
    for (share, fine, arm), part in rows.groupby(['share', 'fine', 'arm'], sort=False):
        if arm.startswith('random') or fine == 'probe': continue
        control = 'random-unet' if on_unet(arm) else 'random-sequential'
        line = f'{share:4g} {fine:22} {arm:24}'
        for phase in (0, 1):
            diff = []
            for fold in part['fold']:
                pair = [out/'residuals'/f'{a}--{fine}--{share:g}--{fold}.npy' for a in (arm, control)]
                if not all(f.exists() for f in pair): continue
                a, b = (hits(f.name[:-4], phase, .3) for f in pair)
                diff += [a[i] - b[i] for i in a]
            if not diff: line += '   -'; continue
            diff = np.array(diff)
            spread = rng.choice(diff, (1000, len(diff))).mean(1)
            line += f'   {"PS"[phase]} {100*diff.mean():+5.1f} [{100*np.quantile(spread, .025):+5.1f}, {100*np.quantile(spread, .975):+5.1f}]'
        print(line)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--labelled', help='packed store')
    parser.add_argument('--unlabelled', help='packed store')
    parser.add_argument('--out', required=True)
    parser.add_argument('--jobs', type=int, default=10, help='processes')
    parser.add_argument('--pretrainings', type=int, default=3, help='of them at once that pretrain')
    parser.add_argument('--until', type=float, default=1e9, help='seconds after which no job begins')
    parser.add_argument('--only', help='jobs whose name contains one of these, with commas between')
    parser.add_argument('--limit', type=int, help='the first jobs alone')
    parser.add_argument('--small', action='store_true', help='a few steps of a few windows on the CPU: does it run?')
    parser.add_argument('--table', action='store_true', help='what is known so far')
    args = parser.parse_args()
    table(Path(args.out)) if args.table else drive(args)

"""Pretraining on several GPUs: speed, the same losses, a kill and a resumption, and where the time
goes. Started by benchmarks/scaling.sh.

Windows are made on the device, so that speed is that of the step. Two ways to take a step on
several ranks are timed side by side: `ddp` sends gradients in buckets by DistributedDataParallel,
and cannot be recorded; `recorded` sends them in one message and replays the step. On one rank
`recorded` is the trainer's step, and `recorded, with NCCL` has one rank do what several do: what
the messages cost without peers. """
import argparse
import csv
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from threading import Lock, Semaphore

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from seismodel.core import pick_device
from seismodel.data.windows import WindowDataset
from seismodel.files import read_json
from seismodel.models.infonce import masked_frames, negatives
from seismodel.models.masking import max_masked
from seismodel.models.pretraining import all_reduce_mean, build, preset
from seismodel.kernels.choice import kernels_for
from seismodel.training.checkpoints import checkpoint_files, read_checkpoint
from seismodel.training.config import TrainConfig
from seismodel.training.cuda_graph import Replay, compile_blocks, mixed_precision, tensor_float32
from seismodel.training.distributed import MeanOverRanks, Ranks, WholeBatchDraws, join_ranks
from seismodel.training.monitoring import skip_step_if_nonfinite
from seismodel.training.schedule import parameter_groups, seed_step
from seismodel.training.runlog import read_metrics
from seismodel.data.sources import open_source
from seismodel.training.trainer import training_batches

root = Path(__file__).resolve().parents[1]
FULL = dict(models=('contrastive-base', 'reconstruction-base'), weak=256, strong=512, window=4096,
            rounds=20, fed=40,
            curves=('contrastive-small', 'reconstruction-small'), batch=64, steps=200, fault_at=60,
            device='auto')
SMALL = dict(models=('contrastive-tiny', 'reconstruction-tiny'), weak=2, strong=8, window=512,
             rounds=2, fed=4,
             curves=('contrastive-tiny', 'reconstruction-tiny'), batch=8, steps=60, fault_at=30,
             device='cpu')
FIELDS = {'speed': ('preset', 'ranks', 'windows_a_rank', 'how', 'ms', 'again_ms',
                    'windows_per_second', 'GiB', 'note'),
          'store': ('preset', 'ranks', 'windows_a_rank', 'source', 'ms', 'again_ms',
                    'windows_per_second'),
          'losses': ('preset', 'ranks', 'time', 'step', 'loss', 'code_perplexity'),
          'resume': ('preset', 'start', 'ranks', 'from_step', 'upto_step', 'end',
                     'largest_difference', 'at_step'),
          'faults': ('fault', 'ranks', 'rank', 'said', 'tracebacks', 'seconds', 'checkpoint',
                     'whole'),
          'profile': ('preset', 'ranks', 'windows_a_rank', 'how', 'what', 'ms')}


class Failed(RuntimeError):
    "A part did not come to its end; the next one is tried"


# What one rank does
# --------------------------------------------------------------------------------------------------

class OneOfMany(Ranks):
    "A single rank that does what several do: its messages go through NCCL, to itself"
    def average(self, x): return MeanOverRanks.apply(x)
    def draws(self): return WholeBatchDraws(0, 1)
    def average_gradients(self, model):
        grads = [p.grad for p in model.parameters()]
        torch._foreach_copy_(grads, all_reduce_mean(self.average, grads))


class Step:
    "The trainer's step on windows made on the device"
    def __init__(self, name, batch, window, ranks, how):
        torch.manual_seed(0)
        torch.compiler.reset()
        self.ranks, cuda, self.by_ddp = ranks, ranks.device.type == 'cuda', how == 'ddp'
        self.net = self.model = build(preset(name).model).to(ranks.device).train()
        self.model.average, self.batch, self.n = ranks.average, batch, 0
        if cuda: compile_blocks(self.model)                              # as in long runs
        if self.by_ddp: self.net = DistributedDataParallel(self.model)
        else: self.model.draws = ranks.draws
        self.x, self.generator = torch.empty(batch, window, 3,
                                             device=ranks.device), torch.Generator(ranks.device)
        lr = torch.tensor(1e-3, device=ranks.device) if cuda else 1e-3
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, .1), lr=lr, fused=True,
                                           capturable=cuda)
        self.run = Replay(self.update, self.generator) if cuda and not self.by_ddp else self.update
        # three as they are, then recorded
        for _ in range(4): self()

    def update(self, x):
        with mixed_precision(self.ranks.device):
            if self.by_ddp:
                with self.ranks.draws(): loss, _ = self.net(x, self.generator)
            else: loss, _ = self.net(x, self.generator)
        loss.backward()
        if not self.by_ddp: self.ranks.average_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        loss = self.ranks.average(loss.detach().float())
        skip_step_if_nonfinite(loss.isfinite() & norm.isfinite(), self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def __call__(self, batches=None):
        seed_step(self.generator, 0, self.n)
        self.n += 1
        if batches is None: self.x.normal_()
        return self.run(self.x if batches is None else next(batches)['x'])


def wait(ranks):
    "Until the device, and then all ranks, have done what they were told"
    if ranks.device.type == 'cuda': torch.cuda.synchronize()
    ranks.gather(None)


def milliseconds(step, rounds, batches=None):
    "Of one step, on the rank that takes longest"
    wait(step.ranks)
    since = time.perf_counter()
    for _ in range(rounds): step(batches)
    if step.ranks.device.type == 'cuda': torch.cuda.synchronize()
    return max(step.ranks.gather((time.perf_counter() - since)/rounds*1e3))


def two_rows(out, part, row, ms, again):
    "A row with two times and the rate of the better one, written by rank 0"
    row |= dict(ms=round(ms, 3), again_ms=round(again, 3),
                windows_per_second=round(row['windows_a_rank']*row['ranks']/min(ms, again)*1e3))
    append(out, part, row)


def measure(out, p, ranks, parts, rest):
    """Every model; rank 0 writes the rows. `rest`: what is less urgent, DistributedDataParallel,
    NCCL on one rank, and the batch of strong scaling"""
    if 'speed' in parts and ranks.world > 1 and not rest: measure_machine(out, p, ranks)
    todo = [(p['weak'], 'recorded')]
    if rest:
        todo = ([(b, 'recorded') for b in (p['strong']//ranks.world,) if b != p['weak']]
                + [(p['weak'], 'ddp' if ranks.world > 1 else 'recorded, with NCCL')])
    for name, (batch, how) in ((name, job) for job in todo for name in p['models']):
        measure_one(out, p, ranks, parts, name, batch, how)
        gc.collect()
        if ranks.device.type == 'cuda': torch.cuda.empty_cache()


def measure_one(out, p, ranks, parts, name, batch, how):
    "Speed, and for the recorded step of weak scaling where its time goes and how a store feeds it"
    cuda, row = ranks.device.type == 'cuda', dict(preset=name, ranks=ranks.world,
                                                  windows_a_rank=batch, how=how)
    if how == 'recorded, with NCCL':
        if not dist.is_initialized():
            dist.init_process_group('nccl' if cuda else 'gloo', store=dist.HashStore(), rank=0,
                                    world_size=1)
        ranks = OneOfMany(ranks.device)
    known = [float(r['GiB']) for r in rows_of(out, 'speed') if r['preset'] == name
             and int(r['windows_a_rank']) == p['weak'] and r['GiB']]
    if cuda and known and known[
        0]*batch/p['weak'] > torch.cuda.get_device_properties(ranks.device).total_memory/2**30:
        return append(out, 'speed', row | dict(note='does not fit'))
    if cuda: torch.cuda.reset_peak_memory_stats()
    since = time.perf_counter()
    step = Step(name, batch, p['window'], ranks, how)
    ready = max(ranks.gather(time.perf_counter() - since))
    say(ranks, f'{name}, {batch} windows, {ranks.world} ranks, {how}: ready after {ready:.0f} s')
    if 'speed' in parts:
        ms, again = (milliseconds(step, p['rounds']) for _ in range(2))
        if cuda: row['GiB'] = round(torch.cuda.max_memory_allocated()/2**30, 1)
        if ranks.rank == 0: two_rows(out, 'speed', row, ms, again)
    if how != 'recorded' or batch != p['weak']: return
    if 'store' in parts: measure_store(out, p, ranks, step, name)
    if 'profile' in parts: measure_profile(out, p, ranks, step, name, how)


def say(ranks, sentence):
    if ranks.rank == 0: print(sentence, flush=True)


def measure_store(out, p, ranks, step, name):
    """Windows of a packed store by the trainer's own path, and the same number from the device's
    memory"""
    c = TrainConfig(steps=10**6, batch_size=p['weak']*ranks.world)
    windows = WindowDataset([open_source(p['store'], 'train', p['window'])], c.steps*c.batch_size,
                            window=p['window'])
    with training_batches(windows, c, ranks) as batches:
        kept = [{'x': next(batches)['x'].clone()} for _ in range(4)]
        found = {'memory': [], 'store': []}
        for _ in range(2):
            milliseconds(step, p['fed']//4, cycle(kept))
            found['memory'].append(milliseconds(step, p['fed'], cycle(kept)))
            # until what lay ready is used up
            milliseconds(step, p['fed'], batches)
            found['store'].append(milliseconds(step, p['fed'], batches))
    for source, times in found.items():
        if ranks.rank == 0:
            two_rows(out, 'store', dict(preset=name, ranks=ranks.world, windows_a_rank=p['weak'],
                                        source=source), *times)


def measure_machine(out, p, ranks):
    "How fast messages are, and that ranks draw the numbers of one: into scaling_machine.json"
    cuda, sums = ranks.device.type == 'cuda', []
    for mib in (1, 16, 80, 1024) if cuda else (1,):
        x = torch.zeros(mib*2**18, device=ranks.device)
        for _ in range(3): dist.all_reduce(x)
        wait(ranks)
        since = time.perf_counter()
        for _ in range(10): dist.all_reduce(x)
        if cuda: torch.cuda.synchronize()
        seconds = max(ranks.gather((time.perf_counter() - since)/10))
        sums.append(dict(MiB=mib, ms=round(seconds*1e3, 4),
                         bus_GB_per_second=round(2*(ranks.world
                                                    - 1)/ranks.world*mib*2**20/seconds/1e9, 1)))
        del x
    unlike = compare_draws(p, ranks)
    if ranks.rank: return
    about = read_json(out/'scaling_machine.json')
    (out/'scaling_machine.json').write_text(json.dumps(about | dict(all_reduce=sums, draws=unlike),
                                                       indent=1), encoding='utf-8')
    print(json.dumps(dict(all_reduce=sums, draws=unlike)), flush=True)


@torch.no_grad()
def compare_draws(p, ranks):
    """Masks, codes and negatives that the ranks draw for their windows, and that one process draws
    for all: how many were compared, how many differ"""
    torch.manual_seed(0)
    model, cuda = build(
        preset(p['curves'][0]).model).to(ranks.device).train(), ranks.device.type == 'cuda'
    encoder, k = model.encoder, model.config.encoder
    with mixed_precision(ranks.device):
        # seeded alike on all ranks
        clean = encoder.frontend(torch.randn(8*ranks.world, p['window'], 3, device=ranks.device))
        def drawn(clean, context):
            generator = torch.Generator(ranks.device).manual_seed(1)
            with context: mask = encoder.mask_features(encoder.projection(clean), generator)[1]
            indices, valid = masked_frames(mask, max_masked(mask.shape[1], k.mask_prob,
                                                            k.mask_length, k.mask_mode))
            with context:
                codes = encoder.masked_targets(clean, indices, valid, generator)[1]
                kernels, ids = kernels_for(
                    clean), torch.zeros_like(indices) + torch.arange(indices.shape[1],
                                                                     device=indices.device)
                times = (kernels.draw_negatives(ids, valid, 100, generator)[0]
                         if kernels else negatives(valid, 100, generator))
            return dict(masks=mask, codes=codes, negatives=times*valid[..., None])
        whole, own = drawn(clean,
                           nullcontext()), drawn(clean.unflatten(0, (ranks.world, -1))[ranks.rank],
                                                 ranks.draws())
    pairs = {what: (value, whole[what].unflatten(0, (ranks.world, -1))[ranks.rank]) for what,
             value in own.items()}
    found = ranks.gather({what: (a.numel(), int((a != b).sum())) for what, (a, b) in pairs.items()})
    return {what: dict(compared=sum(f[what][0] for f in found),
                       different=sum(f[what][1] for f in found)) for what in pairs}


def covered(intervals):
    "Length of the union of intervals"
    total, upto = 0., float('-inf')
    for begin, end in sorted(intervals):
        total, upto = total + max(0., end - max(begin, upto)), max(upto, end)
    return total


def where_time_goes(messages, kernels, steps):
    """ms a step: kernels; messages beside kernels and alone, waiting for other ranks included;
    nothing"""
    both = [*messages, *kernels]
    whole = max(end for _, end in both) - min(begin for begin, _ in both)
    alone = covered(both) - covered(kernels)
    parts = {'kernels': covered(kernels), 'messages alone': alone,
             'messages beside kernels': covered(messages) - alone, 'nothing': whole - covered(both),
             'all': whole}
    return {what: us/steps/1e3 for what, us in parts.items()}


def measure_profile(out, p, ranks, step, name, how):
    "Where the time of a step goes on rank 0, by the profiler"
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    cuda, rounds = ranks.device.type == 'cuda', min(10, p['rounds'])
    wait(ranks)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(rounds): step()
        if cuda: torch.cuda.synchronize()
    wait(ranks)
    if ranks.rank: return
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # a note around the kernel
    events = [e for e in found.events() if e.device_type == kind and not e.name.startswith('nccl:')]
    sends = [any(word in e.name.lower() for word in ('nccl', 'allreduce', 'all_reduce'))
             for e in events]
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    parts = where_time_goes([s for s, m in zip(spans, sends) if m],
                            [s for s, m in zip(spans, sends) if not m], rounds)
    for what, ms in parts.items():
        append(out, 'profile', dict(preset=name, ranks=ranks.world, windows_a_rank=p['weak'],
                                    how=how, what=what, ms=round(ms, 3)))


def train_poisoned(number, words):
    """`seismodel pretrain` where the window of this number is not a number; below 0: where every
    window is larger by a millionth"""
    from seismodel import cli
    from seismodel.training import pretrain
    right = pretrain.WindowDataset.batch
    def batch(self, numbers, raw=False):
        found = right(self, numbers, raw)
        for k, n in enumerate(numbers):
            if n == number: found['x'][k] = float('nan')
        if number < 0: found['x'] *= 1 + 1e-6
        return found
    pretrain.WindowDataset.batch = batch
    return cli.main(['pretrain', *words])


# What the script does
# --------------------------------------------------------------------------------------------------

WRITING = Lock()

def append(out, part, row):
    "A row to the table of a part"
    path = out/f'scaling_{part}.csv'
    with WRITING, open(path, 'a', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, FIELDS[part], lineterminator='\n')
        if not f.tell(): table.writeheader()
        table.writerow(row)
    if part != 'losses': print('  '.join(f'{v}' for v in row.values()), flush=True)


def rows_of(out, part):
    "The table of a part, empty where it has not been made"
    path = out/f'scaling_{part}.csv'
    return list(csv.DictReader(open(path, encoding='utf-8'))) if path.exists() else []


def drop_rows(out, part, counts):
    "Forget what an earlier call found for these counts of ranks"
    kept = [r for r in rows_of(out, part) if part == 'speed' and int(r['ranks']) not in counts]
    (out/f'scaling_{part}.csv').unlink(missing_ok=True)
    for r in kept: append(out, part, r)


def descendants(pid):
    "Process numbers of all that a process has started, and those started by them"
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            rest = stat.read_text(encoding='utf-8').rsplit(')', 1)[1].split()
            number = int(stat.parent.name)
        except (OSError, IndexError): continue
        parents.setdefault(int(rest[1]), []).append(number)
    found, ahead = [], [pid]
    while ahead:
        ahead += (below := parents.get(ahead.pop(), []))
        found += below
    return found


def kill_all(process):
    "SIGKILL, at one moment, to a process and all that it started, its ranks and their loaders"
    for pid in [process.pid, *descendants(process.pid)]:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    process.wait()


LIVE = set()     # what the script has started and not yet seen end

def start(ranks, *words, log, cpu, gpu=None, apart=None):
    "torchrun over so many ranks; `gpu`: the one to take; `apart`: a folder for what each rank says"
    env = {**os.environ, **({'CUDA_VISIBLE_DEVICES': ''} if cpu else {}
                            if gpu is None else {'CUDA_VISIBLE_DEVICES': str(gpu)})}
    more = ['--redirects', '3', '--log-dir', str(apart)] if apart else []
    process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                                '--nproc-per-node', str(ranks), *more, *map(str, words)],
                               cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)
    LIVE.add(process)
    return process


def end(process):
    kill_all(process)
    LIVE.discard(process)


def run(ranks, *words, cpu, deadline, gpu=None, until=lambda: False):
    """To its end, or until something is true and it is killed; what it said last is raised where it
    fails"""
    with tempfile.TemporaryFile('w+') as log:
        process = start(ranks, *words, log=None if words[1:2] == ('work',) else log, cpu=cpu,
                        gpu=gpu)
        try:
            while process.poll() is None and time.monotonic() < deadline and not until():
                time.sleep(.02)
            if process.poll() is None and not until():
                raise Failed(f'{ranks} ranks did not end in time: {words}')
            if process.poll():
                log.seek(0)
                raise Failed(f'{ranks} ranks failed: {words}\n{log.read()[-2500:]}')
        finally: end(process)


def settings(p, name, steps=None):
    "Words of `seismodel pretrain` for a short run"
    every = ('--log-every', 1, '--validate-every', steps or p['steps'], '--validation-windows', 8,
             '--checkpoint-every', p['steps']//10)
    return ('--preset', name, '--steps', steps or p['steps'], '--batch-size', p['batch'],
            '--window', p['window'], *every, '--device', p['device'],
            '--workers', 0 if p['device'] == 'cpu' else 2)


def lines(folder):
    path = folder/'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


PRETRAIN, NUDGED = ('-m', 'seismodel', 'pretrain'), 3


class Runs:
    "Short training runs, each made once and kept for whoever compares with it; few at a time"
    def __init__(self, p, folder, deadline):
        self.p, self.folder, self.deadline, self.cpu = p, Path(
            folder), deadline, p['device'] == 'cpu'
        self.places, self.own = Semaphore(1 if self.cpu else 5), {}

    def run(self, n, *words, **more):
        with self.places: run(n, *words, cpu=self.cpu, deadline=self.deadline, **more)

    def whole(self, name, n, again):
        """Folder of a run that nobody disturbed; the windows of NUDGED are larger by a millionth,
        which shows how training amplifies rounding"""
        folder = self.folder/f'{name}-on-{n}-{again}'
        with self.own.setdefault(folder, Lock()):
            if not (folder/'figures').exists():
                self.run(n, *((__file__, 'poisoned', -1) if again == NUDGED else PRETRAIN),
                         *settings(self.p, name), '--out', folder,
                         gpu=None if n > 1 or self.cpu else again%2)
        return folder


def losses(out, p, n, runs, name):
    """A run on one rank and one on all, each twice, with the same windows; and on one rank with
    windows larger by a millionth"""
    def one(job):
        for r in read_metrics(runs.whole(name, *job)):
            append(out, 'losses', dict(preset=name, ranks=job[0], time=job[1], step=r['step'],
                                       loss=f"{r['loss']:.9g}",
                                       code_perplexity=f"{r['code_perplexity']:.9g}"
                                       if 'code_perplexity' in r else ''))
        print(f'{name} on {job[0]}, time {job[1]}: trained', flush=True)
    together([lambda job=job: one(job) for job in ((1, 1), (n, 1), (1, 2), (n, 2), (1, NUDGED))])
    for who, (loss, codes) in differences(rows_of(out, 'losses')).get(name, {}).items():
        print(sentence(name, who, loss, codes), flush=True)


def resume(out, p, n, runs, name):
    """SIGKILL to all at five random moments; the run goes on on all ranks, then on one, then on all
    again, and so on"""
    rng, killed, rows, begin = random.Random(name), runs.folder/f'{name}-killed', [], 0
    # the first after the first checkpoint
    moments = [round(p['steps']*(k + rng.uniform(.6, 1))/5.5) for k in range(5)] + [None]
    try:
        for k, (m, moment) in enumerate(zip((n, n, 1, n, 1, n), moments)):
            words = ('--resume', killed) if k else (*settings(p, name), '--out', killed)
            runs.run(m, *PRETRAIN, *words, gpu=None if m > 1 or runs.cpu else 1,
                     until=lambda: moment is not None and lines(killed) >= moment)
            upto, files = lines(killed), checkpoint_files(killed)
            rows.append(dict(preset=name, start=k + 1, ranks=m, from_step=begin, upto_step=upto,
                             end='killed' if upto < p['steps'] else 'done'))
            print(*rows[-1].values(), flush=True)
            begin = read_checkpoint(files[0]).state['step'] if files else 0
        whole, found = read_metrics(runs.whole(name, n, 1)), read_metrics(killed)
        if [r['step'] for r in whole] != [r['step'] for r in found]:
            raise Failed(f'{name}, killed and resumed: steps are missing, or twice')
        # a later start writes over what came after its checkpoint
        for row, after in zip(rows, [*rows[1:], dict(from_step=p['steps'])]):
            kept = range(row['from_step'] + 1, after['from_step'] + 1)
            apart = [(abs(a['loss'] - b['loss']), a['step']) for a, b in zip(whole, found)
                     if a['step'] in kept]
            if apart: row.update(largest_difference=f'{max(apart)[0]:.3g}', at_step=max(apart)[1])
    finally:
        for row in rows: append(out, 'resume', row)


def fault(out, p, n, runs, what):
    """One rank, the last, meets with something: what each rank says, when the last one ends, and
    whether the checkpoint is whole"""
    folder, apart = (runs.folder/f"{word}-{what.replace(' ', '-')}" for word in ('fault', 'said'))
    words, at = (*settings(p, p['curves'][0], 20*p['steps']), '--out', folder), p['fault_at']
    # the last window of that step
    how = (__file__, 'poisoned', at*p['batch'] - 1) if what == 'nan' else PRETRAIN
    with runs.places, tempfile.TemporaryFile('w+') as log:
        process = start(n, *how, *words, log=log, cpu=runs.cpu, apart=apart)
        try:
            while process.poll() is None and lines(
                folder) < at - 2 and time.monotonic() < runs.deadline:
                time.sleep(.02)
            since = time.monotonic()
            number = {'killed': signal.SIGKILL, 'told to stop': signal.SIGTERM}.get(what)
            if number and process.poll() is None: os.kill(rank_process(process.pid, n - 1), number)
            while process.poll() is None and time.monotonic() < min(since + 90, runs.deadline):
                time.sleep(.05)
            seconds, ended = time.monotonic() - since, process.poll() is not None
        finally: end(process)
    files = checkpoint_files(folder)
    kept = read_checkpoint(files[0]) if files else None
    whole = (bool(kept)
             and all(t.isfinite().all() for t in kept.tensors.values() if t.is_floating_point()))
    for rank in range(n):
        text = '\n'.join(f.read_text(errors='replace', encoding='utf-8')
                         for f in apart.glob(f'*/attempt_0/{rank}/stderr.log'))
        said = re.findall(r'seismodel(?:, rank \d+)?: .*', text)
        append(out, 'faults', dict(fault=what, ranks=n, rank=rank,
                                   said=' / '.join(said).replace(str(runs.folder), ''),
                                   tracebacks=text.count('Traceback'),
                                   seconds=round(seconds, 1) if ended else 'not ended',
                                   checkpoint=kept.state['step'] if kept else '', whole=whole))
        if not said and not (what == 'killed' and rank == n - 1): print(text[-1500:], flush=True)


def rank_process(pid, rank):
    "Number of the process that torchrun `pid` has started for a rank"
    for child in descendants(pid):
        try:
            # a parent comes before its children
            if f'RANK={rank}'.encode() in Path(f'/proc/{child}/environ').read_bytes().split(b'\0'):
                return child
        except OSError: pass
    raise Failed(f'no process has rank {rank}')


def together(jobs):
    "Functions side by side; the first exception is raised when all have ended"
    with ThreadPoolExecutor(len(jobs)) as pool: futures = [pool.submit(job) for job in jobs]
    for f in futures: f.result()


def measured(out, p, counts, parts, rest, deadline):
    """Speed, store and profile, count by count, with the machine for themselves; where one count
    fails the others are tried"""
    cpu, more, failed = p['device'] == 'cpu', ['--rest'] if rest else [], []
    def attempt(job):
        try: job()
        except Failed as e: failed.append(str(e))
    def warm(k, turn):
        attempt(lambda: run(1, __file__, 'work', 'warm', out, '--model',
                            p['models'][(turn + k) % 2], '--at', f'cuda:{k}', cpu=cpu,
                            deadline=deadline))
    # compilers first, the two models side by side: what they find lies in a cache
    if not cpu and not rest and 'speed' in parts:
        for turn in range(2):
            together([lambda k=k: warm(k, turn) for k in range(min(2, counts[-1]))])
        print('compiled', flush=True)
    for n in counts:
        own = [part for part in parts if part != 'store' or n == counts[-1]]
        if own:
            attempt(lambda: run(n, __file__, 'work', ','.join(own), out, *p['flag'], *more,
                                '--store', p['store'] or '', cpu=cpu, deadline=deadline))
    if failed: raise Failed('\n'.join(failed))


def differences(rows):
    """preset -> (ranks, time) -> largest differences of loss and code perplexity from the first run
    on one rank"""
    runs = {}
    for r in rows:
        runs.setdefault(r['preset'], {}).setdefault((int(r['ranks']), int(r['time'])), []).append(r)
    apart = lambda a, b, name: max((abs(float(x[name]) - float(y[name])) for x,
                                    y in zip(a, b) if x[name]), default=None)
    return {key: {who: (apart(found[1, 1], r, 'loss'), apart(found[1, 1], r, 'code_perplexity'))
                  for who, r in sorted(found.items()) if who != (1, 1)}
            for key, found in runs.items() if (1, 1) in found}


def sentence(name, who, loss, codes):
    other = ('one, windows larger by a millionth'
             if who == (1, NUDGED) else f'{who[0]}, time {who[1]}')
    return (f'{name}: one rank and {other}: loss differs by at most {loss:.2g}'
            + (f', code perplexity by {codes:.2g}' if codes is not None else ''))


def report(out, p):
    "The tables, in words"
    speed = {(r['preset'], int(r['windows_a_rank']), int(r['ranks']), r['how']): r
             for r in rows_of(out, 'speed')}
    for kind in ('weak', 'strong'):
        print(f"\n{kind} scaling, {p[kind]} windows {'a rank' if kind == 'weak' else 'in all'}\n\n"
              '| preset | ranks | step | windows/s | of linear | GiB |\n|---|---|---|---|---|---|')
        for (name, batch, n, how), r in speed.items():
            if batch != (p['weak'] if kind == 'weak' else p['strong']//n): continue
            one = speed.get((name, p['weak'] if kind == 'weak' else p['strong'], 1, 'recorded'), {})
            # one rank may not hold 512
            one = (one.get('windows_per_second')
                   or speed.get((name, p['weak'], 1, 'recorded'), {}).get('windows_per_second'))
            w = r['windows_per_second']
            linear = f'{int(w)/n/int(one):.1%}' if w and one else ''
            print(f"| {name} | {n} | {how} | {w or r['note']} | {linear} | {r['GiB']} |")
    fed = {(r['preset'], r['source']): float(r['windows_per_second'])
           for r in rows_of(out, 'store')}
    for (name, source), w in fed.items():
        if source == 'store':
            print(f"\n{name}: from the store {w/fed[name, 'memory']:.3f} of the speed from memory")
    for name, found in differences(rows_of(out, 'losses')).items():
        for who, (loss, codes) in found.items(): print(sentence(name, who, loss, codes))
    for part in ('resume', 'faults', 'profile'):
        print(f'\n{part}')
        for r in rows_of(out, part): print('  ' + ', '.join(f'{k} {v}' for k, v in r.items()))


def work(args, out, p):
    "What a rank is told"
    if args.parts == 'warm':
        own = pick_device(args.at)
        torch.cuda.set_device(own)
        with tensor_float32(own): Step(args.model, p['weak'], p['window'], Ranks(own), 'recorded')
        return
    with join_ranks(p['device']) as ranks, tensor_float32(ranks.device):
        measure(out, p, ranks, args.parts.split(','), args.rest)
        if ranks.world == 1 and dist.is_initialized(): dist.destroy_process_group()


def main():
    if sys.argv[1] == 'poisoned': sys.exit(train_poisoned(int(sys.argv[2]), sys.argv[3:]))
    worker = sys.argv[1] == 'work'
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    if worker:
        for name in ('work', 'parts'): parser.add_argument(name)
        for name in ('--model', '--at', '--store'): parser.add_argument(name)
        parser.add_argument('--rest', action='store_true')
    parser.add_argument('out', type=Path, help='folder of the tables')
    if not worker: parser.add_argument('parts', nargs='*', default=list(FIELDS))
    parser.add_argument('--small', action='store_true',
                        help='tiny models on a CPU, to see that everything runs')
    args = parser.parse_args()
    out, p = args.out.resolve(), {**(SMALL if args.small else FULL), 'flag': ['--small']
                                  if args.small else []}
    p['store'] = args.store if worker else os.environ.get('STORE')
    if worker: return work(args, out, p)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that no rank is left behind
    found = 2 if args.small else torch.cuda.device_count()
    if not found: sys.exit('There is no GPU here; SMALL=1 tries the script on a CPU.')
    counts = [n for n in map(int, os.environ.get('RANKS', '1 2 4 8').split()) if n <= found]
    if not counts: sys.exit(f'There are {found} devices, and RANKS asks for more.')
    if unknown := set(args.parts) - FIELDS.keys():
        sys.exit(f"There is no part {', '.join(unknown)}; choose from {', '.join(FIELDS)}.")
    if not p['store']: args.parts = [part for part in args.parts if part != 'store']
    out.mkdir(parents=True, exist_ok=True)
    device = 'CPU' if args.small else torch.cuda.get_device_name()
    nccl = None if args.small else '.'.join(map(str, torch.cuda.nccl.version()))
    (out/'scaling_machine.json').write_text(json.dumps(dict(device=device, devices=found,
                                                            torch=torch.__version__, nccl=nccl),
                                                       indent=1), encoding='utf-8')
    for part in args.parts: drop_rows(out, part, counts)
    begin = time.monotonic()
    deadline, failed = begin + float(os.environ.get('LIMIT', 3600)), []
    def stage(name, job):
        since = time.monotonic()
        try: job()
        except Exception as e:
            failed.append(name)
            print(f'{name} FAILED: {e}', flush=True)
        print(f'{name}: {time.monotonic() - since:.0f} s, '
              f'{time.monotonic() - begin:.0f} s in all\n', flush=True)
    alone = [part for part in args.parts if part in ('speed', 'store', 'profile')]
    try:
        with tempfile.TemporaryDirectory() as tmp:
            n, runs = counts[-1], Runs(p, tmp, deadline)
            if alone:
                stage(' and '.join(alone), lambda: measured(out, p, counts, alone, False, deadline))
            jobs = []
            if 'resume' in args.parts:
                jobs += [(f'resume {name}', lambda name=name: resume(out, p, n, runs, name))
                         for name in reversed(p['curves'])]
            if 'losses' in args.parts:
                jobs += [(f'losses {name}', lambda name=name: losses(out, p, n, runs, name))
                         for name in p['curves']]
            if 'faults' in args.parts and n > 1:
                jobs += [(f'fault: {what}', lambda what=what: fault(out, p, n, runs, what))
                         for what in ('killed', 'nan', 'told to stop')]
            if jobs: together([lambda job=job: stage(*job) for job in jobs])
            if 'speed' in args.parts:
                stage('the rest of speed',
                      lambda: measured(out, p, counts, ['speed'], True, deadline))
    finally:
        for process in list(LIVE): end(process)
    report(out, p)
    if failed: sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == '__main__': main()

"""Pretraining on several GPUs: speed, the same losses, a kill and a resumption, and where the time goes. Started by benchmarks/scaling.sh.

Windows are made on the device, so that speed is that of the step. Two ways to take a step on several ranks are timed side by side:
`ddp` sends gradients in buckets by DistributedDataParallel, and cannot be recorded; `recorded` sends them in one message and replays the step.
On one rank `recorded` is the trainer's step, and `recorded, with NCCL` has one rank do what several do: what the messages cost without peers.
"""
import argparse
import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from seismodel.training.distributed import MeanOverRanks, Ranks, WholeBatchDraws, join_ranks
from seismodel.training.monitoring import skip_step_if_nonfinite
from seismodel.models.pretraining import all_reduce_mean, build, preset
from seismodel.training.schedule import parameter_groups, seed_step
from seismodel.training.cuda_graph import Replay, compile_blocks, mixed_precision, tensor_float32
from seismodel.training.runlog import read_metrics

root = Path(__file__).resolve().parents[1]
FULL = dict(models=('contrastive-base', 'reconstruction-base'), weak=256, strong=512, window=4096, rounds=10, curves=('contrastive-small', 'reconstruction-small'),
            batch=64, steps=200, device='auto')
SMALL = dict(models=('contrastive-tiny', 'reconstruction-tiny'), weak=2, strong=8, window=512, rounds=2, curves=('contrastive-tiny', 'reconstruction-tiny'),
             batch=8, steps=20, device='cpu')
FIELDS = {'speed': ('preset', 'ranks', 'windows_a_rank', 'how', 'ms', 'again_ms', 'windows_per_second', 'GiB', 'note'),
          'losses': ('preset', 'draws', 'ranks', 'time', 'step', 'loss', 'code_perplexity'),
          'resume': ('preset', 'begun_on', 'killed_after', 'resumed_on', 'from_step', 'steps', 'largest_difference', 'at_step'),
          'profile': ('preset', 'ranks', 'windows_a_rank', 'how', 'what', 'ms')}


# What one rank does --------------------------------------------------------------------------------------------------------

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
        self.x, self.generator = torch.empty(batch, window, 3, device=ranks.device), torch.Generator(ranks.device)
        lr = torch.tensor(1e-3, device=ranks.device) if cuda else 1e-3
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, .1), lr=lr, fused=True, capturable=cuda)
        self.run = Replay(self.update, self.generator) if cuda and not self.by_ddp else self.update
        for _ in range(4): self()                                        # three as they are, then recorded

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

    def __call__(self):
        seed_step(self.generator, 0, self.n)
        self.n += 1
        self.x.normal_()
        return self.run(self.x)


def wait(ranks):
    "Until the device, and then all ranks, have done what they were told"
    if ranks.device.type == 'cuda': torch.cuda.synchronize()
    ranks.gather(None)


def milliseconds(step, rounds):
    "Of one step, on the rank that takes longest"
    wait(step.ranks)
    since = time.perf_counter()
    for _ in range(rounds): step()
    if step.ranks.device.type == 'cuda': torch.cuda.synchronize()
    return max(step.ranks.gather((time.perf_counter() - since)/rounds*1e3))


def ways(ranks):
    "How a step can be taken here: name -> ranks"
    if ranks.world > 1: return {'ddp': ranks, 'recorded': ranks}
    if not dist.is_initialized():
        dist.init_process_group('nccl' if ranks.device.type == 'cuda' else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    return {'recorded': ranks, 'recorded, with NCCL': OneOfMany(ranks.device)}


def measure_speed(out, p, ranks):
    "Every model, batch and way; rank 0 writes the rows"
    cuda = ranks.device.type == 'cuda'
    for name in p['models']:
        for batch in dict.fromkeys((p['weak'], p['strong']//ranks.world)):
            for how, who in ways(ranks).items():
                if how != 'recorded' and batch != p['weak']: continue    # every way where every count has the same batch
                row = dict(preset=name, ranks=ranks.world, windows_a_rank=batch, how=how)
                if cuda: torch.cuda.reset_peak_memory_stats()
                try:
                    step = Step(name, batch, p['window'], who, how)
                    ms, again = (milliseconds(step, p['rounds']) for _ in range(2))
                    row.update(ms=round(ms, 3), again_ms=round(again, 3), windows_per_second=round(batch*ranks.world/min(ms, again)*1e3))
                except torch.OutOfMemoryError:
                    if ranks.world > 1: raise                            # its peers would wait for it
                    row.update(note='does not fit')
                if cuda: row.update(GiB=round(torch.cuda.max_memory_allocated()/2**30, 1))
                if ranks.rank == 0: append(out, 'speed', row)
                step = None
                gc.collect()
                if cuda: torch.cuda.empty_cache()


def covered(intervals):
    "Length of the union of intervals"
    total, upto = 0., float('-inf')
    for begin, end in sorted(intervals):
        total, upto = total + max(0., end - max(begin, upto)), max(upto, end)
    return total


def where_time_goes(messages, kernels, steps):
    "ms a step: kernels; messages beside kernels and alone, waiting for other ranks included; nothing"
    both = [*messages, *kernels]
    whole = max(end for _, end in both) - min(begin for begin, _ in both)
    alone = covered(both) - covered(kernels)
    parts = {'kernels': covered(kernels), 'messages alone': alone, 'messages beside kernels': covered(messages) - alone, 'nothing': whole - covered(both), 'all': whole}
    return {what: us/steps/1e3 for what, us in parts.items()}


def measure_profile(out, p, ranks):
    "Where the time of a step goes on rank 0, by the profiler"
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    cuda = ranks.device.type == 'cuda'
    for name in p['models']:
        for how, who in ways(ranks).items():
            step = Step(name, p['weak'], p['window'], who, how)
            wait(ranks)
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
                for _ in range(p['rounds']): step()
                if cuda: torch.cuda.synchronize()
            wait(ranks)
            if ranks.rank == 0:
                kind = DeviceType.CUDA if cuda else DeviceType.CPU
                events = [e for e in found.events() if e.device_type == kind and not e.name.startswith('nccl:')]     # a note around the kernel
                sends = [any(word in e.name.lower() for word in ('nccl', 'allreduce', 'all_reduce')) for e in events]
                spans = [(e.time_range.start, e.time_range.end) for e in events]
                parts = where_time_goes([s for s, m in zip(spans, sends) if m], [s for s, m in zip(spans, sends) if not m], p['rounds'])
                for what, ms in parts.items():
                    append(out, 'profile', dict(preset=name, ranks=ranks.world, windows_a_rank=p['weak'], how=how, what=what, ms=round(ms, 3)))
            step = None
            gc.collect()


def train_without_loss_kernels(words):
    "`seismodel pretrain` with noise and negatives drawn by PyTorch, the same on any number of ranks"
    from seismodel import cli
    from seismodel.models import infonce, quantizer
    for module in (quantizer, infonce): module.kernels_for = lambda x: None
    return cli.main(['pretrain', *words])


# What the script does ------------------------------------------------------------------------------------------------------

def append(out, part, row):
    "A row to the table of a part"
    path, fresh = out/f'scaling_{part}.csv', not (out/f'scaling_{part}.csv').exists()
    with open(path, 'a', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, FIELDS[part], lineterminator='\n')
        if fresh: table.writeheader()
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
        try: number, rest = int(stat.parent.name), stat.read_text(encoding='utf-8').rsplit(')', 1)[1].split()
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


def start(ranks, *words, log, cpu):
    "torchrun over so many ranks"
    env = {**os.environ, **({'CUDA_VISIBLE_DEVICES': ''} if cpu else {})}
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks), *map(str, words)],
                            cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)


def run(ranks, *words, cpu, limit=480, until=lambda: False):
    "To its end, or until something is true and it is killed; what it said is printed where it fails"
    with tempfile.TemporaryFile('w+') as log:
        process, since = start(ranks, *words, log=None if words[1:2] == ('work',) else log, cpu=cpu), time.monotonic()
        try:
            while process.poll() is None and time.monotonic() < since + limit and not until(): time.sleep(.02)
            if process.poll() is None and not until(): raise SystemExit(f'{ranks} ranks did not end within {limit} s: {words}')
            if process.poll():
                log.seek(0)
                raise SystemExit(f'{ranks} ranks failed: {words}\n{log.read()[-4000:]}')
        finally: kill_all(process)


def settings(p, name):
    "Words of `seismodel pretrain` for a short run"
    return ('--preset', name, '--steps', p['steps'], '--batch-size', p['batch'], '--window', p['window'], '--log-every', 1, '--validate-every', p['steps'],
            '--validation-windows', 8, '--checkpoint-every', p['steps']//10, '--device', p['device'])


def lines(folder):
    path = folder/'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def part_speed(out, p, counts):
    for n in counts: run(n, __file__, 'work', 'speed', out, *p['flag'], cpu=p['device'] == 'cpu')


def part_profile(out, p, counts):
    "The step at the largest count, and beside it the trainer with the windows that its loaders bring"
    cpu, n = p['device'] == 'cpu', counts[-1]
    run(n, __file__, 'work', 'profile', out, *p['flag'], cpu=cpu)
    name, batch, every = p['models'][0], p['weak']*n, 2*p['rounds']
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'run'
        words = ('--preset', name, '--steps', 2000, '--batch-size', batch, '--window', p['window'], '--log-every', every, '--validate-every', 2000,
                 '--validation-windows', 8, '--checkpoint-every', 2000, '--device', p['device'])
        run(n, '-m', 'seismodel', 'pretrain', *words, '--out', folder, cpu=cpu, until=lambda: lines(folder) >= 4)     # the first step, then thrice `every`
        ms = batch/read_metrics(folder)[3]['windows_per_second']*1e3
    append(out, 'profile', dict(preset=name, ranks=n, windows_a_rank=p['weak'], how='trainer, windows from its loaders', what='all', ms=round(ms, 3)))


def part_losses(out, p, counts):
    "Runs on one rank, twice, and on the most, with the same windows"
    contrastive, reconstruction = p['curves']
    for name, draws in ((contrastive, 'PyTorch'), (contrastive, 'as usual'), (reconstruction, 'as usual')):
        for n, again in dict.fromkeys(((1, 1), (1, 2), (counts[-1], 1))):
            with tempfile.TemporaryDirectory() as tmp:
                how = ('-m', 'seismodel', 'pretrain') if draws == 'as usual' else (__file__, 'train')
                run(n, *how, *settings(p, name), '--out', Path(tmp)/'run', cpu=p['device'] == 'cpu')
                for r in read_metrics(Path(tmp)/'run'):
                    append(out, 'losses', dict(preset=name, draws=draws, ranks=n, time=again, step=r['step'], loss=f"{r['loss']:.9g}",
                                               code_perplexity=f"{r['code_perplexity']:.9g}" if 'code_perplexity' in r else ''))
            print(f'{name}, {n} ranks, draws {draws}, time {again}', flush=True)


def part_resume(out, p, counts):
    "Killed with SIGKILL on all ranks, and resumed on half of them and on one"
    n, name, cpu = counts[-1], p['curves'][1], p['device'] == 'cpu'
    command = '-m', 'seismodel', 'pretrain'
    with tempfile.TemporaryDirectory() as tmp:
        whole, killed = Path(tmp)/'whole', Path(tmp)/'killed'
        run(n, *command, *settings(p, name), '--out', whole, cpu=cpu)
        run(n, *command, *settings(p, name), '--out', killed, cpu=cpu, until=lambda: lines(killed) >= p['steps']*.55)
        seen = lines(killed)
        if seen >= p['steps']: raise SystemExit('The run ended before it could be killed.')
        newest = max(int(f.stem[5:]) for f in (killed/'checkpoints').glob('step-*.safetensors'))
        for m in dict.fromkeys((max(1, n//2), 1)):
            folder = Path(tmp)/f'on-{m}'
            shutil.copytree(killed, folder)
            run(m, *command, '--resume', folder, cpu=cpu)
            a, b = read_metrics(whole), read_metrics(folder)
            if [r['step'] for r in a] != [r['step'] for r in b]: raise SystemExit(f'resumed on {m}: steps are missing')
            apart, step = max((abs(x['loss'] - y['loss']), x['step']) for x, y in zip(a, b))
            append(out, 'resume', dict(preset=name, begun_on=n, killed_after=seen, resumed_on=m, from_step=newest, steps=len(b),
                                       largest_difference=f'{apart:.2g}', at_step=step))


def differences(rows):
    "(preset, draws) -> ranks -> largest differences of loss and code perplexity from the first run on one rank; 'again': its repetition"
    runs = {}
    for r in rows: runs.setdefault((r['preset'], r['draws']), {}).setdefault((int(r['ranks']), int(r['time'])), []).append(r)
    apart = lambda a, b, name: max((abs(float(x[name]) - float(y[name])) for x, y in zip(a, b) if x[name]), default=None)
    return {key: {'again' if time == 2 else n: (apart(found[1, 1], r, 'loss'), apart(found[1, 1], r, 'code_perplexity'))
                  for (n, time), r in found.items() if (n, time) != (1, 1)} for key, found in runs.items()}


def report(out, p):
    "The tables, in words"
    speed = {(r['preset'], int(r['windows_a_rank']), int(r['ranks']), r['how']): r for r in rows_of(out, 'speed')}
    for kind in ('weak', 'strong'):
        print(f"\n{kind} scaling, {p[kind]} windows {'a rank' if kind == 'weak' else 'in all'}\n\n| preset | ranks | step | windows/s | of linear | GiB |\n|---|---|---|---|---|---|")
        for (name, batch, n, how), r in speed.items():
            if batch != (p['weak'] if kind == 'weak' else p['strong']//n): continue
            one = speed.get((name, p['weak'] if kind == 'weak' else p['strong'], 1, 'recorded'), {})
            one = one.get('windows_per_second') or speed.get((name, p['weak'], 1, 'recorded'), {}).get('windows_per_second')    # one rank may not hold 512
            w = r['windows_per_second']
            print(f"| {name} | {n} | {how} | {w or r['note']} | {f'{int(w)/n/int(one):.0%}' if w and one else ''} | {r['GiB']} |")
    for (name, draws), found in differences(rows_of(out, 'losses')).items():
        for n, (loss, codes) in found.items():
            print(f"\n{name}, draws {draws}: one rank {'twice' if n == 'again' else f'and {n}'}: loss differs by at most {loss:.2g}"
                  + (f', code perplexity by {codes:.2g}' if codes is not None else ''))
    for part in ('resume', 'profile'):
        print(f'\n{part}')
        for r in rows_of(out, part): print('  ' + ', '.join(f'{k} {v}' for k, v in r.items()))


def main():
    if sys.argv[1] == 'train': sys.exit(train_without_loss_kernels(sys.argv[2:]))
    worker = sys.argv[1] == 'work'
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    if worker: parser.add_argument('work')
    if worker: parser.add_argument('part', choices=('speed', 'profile'))
    parser.add_argument('out', type=Path, help='folder of the tables')
    if not worker: parser.add_argument('parts', nargs='*', default=['speed', 'losses', 'resume', 'profile'])
    parser.add_argument('--small', action='store_true', help='tiny models on a CPU, to see that everything runs')
    args = parser.parse_args()
    out, p = args.out.resolve(), {**(SMALL if args.small else FULL), 'flag': ['--small'] if args.small else []}
    if worker:
        with join_ranks(p['device']) as ranks, tensor_float32(ranks.device):
            (measure_speed if args.part == 'speed' else measure_profile)(out, p, ranks)
            if ranks.world == 1 and dist.is_initialized(): dist.destroy_process_group()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that no rank is left behind
    found = 2 if args.small else torch.cuda.device_count()
    if not found: sys.exit('There is no GPU here; SMALL=1 tries the script on a CPU.')
    counts = [n for n in map(int, os.environ.get('RANKS', '1 2 4 8').split()) if n <= found]
    if not counts: sys.exit(f'There are {found} devices, and RANKS asks for more.')
    out.mkdir(parents=True, exist_ok=True)
    device = 'CPU' if args.small else torch.cuda.get_device_name()
    nccl = None if args.small else '.'.join(map(str, torch.cuda.nccl.version()))
    (out/'scaling_machine.json').write_text(json.dumps(dict(device=device, devices=found, torch=torch.__version__, nccl=nccl), indent=1), encoding='utf-8')
    for part in args.parts:
        drop_rows(out, part, counts)
        since = time.monotonic()
        {'speed': part_speed, 'losses': part_losses, 'resume': part_resume, 'profile': part_profile}[part](out, p, counts)
        print(f'{part}: {time.monotonic() - since:.0f} s\n', flush=True)
    report(out, p)


if __name__ == '__main__': main()

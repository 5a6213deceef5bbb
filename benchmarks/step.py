"""Windows a second of a whole pretraining step on one GPU: forward, backward, clipping and AdamW,
as the trainer takes it.

    python benchmarks/step.py                              # every preset of size base, three modes
    python benchmarks/step.py contrastive-small:64 --profile 20
    python benchmarks/step.py reconstruction-base/256,4,12,3.25:256     # width, heads, blocks, ff
"""
import argparse
import statistics
import time
from dataclasses import replace

import torch

from seismodel.models.pretraining import build, preset
from seismodel.training.schedule import parameter_groups
from seismodel.training.cuda_graph import Replay, compile_blocks, tensor_float32


def model_config(what):
    "The model of a preset; for reconstruction also of another shape, PRESET/WIDTH,HEADS,BLOCKS,FF"
    name, _, shape = what.partition('/')
    model = preset(name).model
    if not shape: return model
    width, heads, blocks, ff = shape.split(',')
    return replace(model, encoder=replace(model.encoder, d_model=int(width)), heads=int(heads),
                   blocks=int(blocks), ff=float(ff))


class Step:
    "One training step of a preset on windows made on the device"
    def __init__(self, name, batch, compiled=False, replay=False):
        torch.manual_seed(0)
        torch.compiler.reset()
        self.model = build(model_config(name)).cuda()
        if compiled: compile_blocks(self.model)
        self.x = torch.randn(batch, 4096, 3, device='cuda')
        self.generator = torch.Generator('cuda').manual_seed(0)
        self.lr = torch.tensor(1e-3, device='cuda')
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, .1), lr=self.lr, fused=True,
                                           capturable=True)
        self.run = Replay(self.update, self.generator) if replay else self.update
        for _ in range(4): self.run(self.x)
        torch.cuda.synchronize()

    def update(self, x):
        with torch.autocast('cuda', torch.bfloat16): loss, _ = self.model(x, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(name, batch, repeats=12, profile=False, **mode):
    start = time.time()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = Step(name, batch, **mode)
    warm = time.time() - start
    halves = []
    for _ in range(2):
        times = []
        for n in range(repeats // 2):
            step.generator.manual_seed(n)
            step.x.normal_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(); loss = step.run(step.x); end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        halves.append(statistics.median(times))
    mode = '+'.join(k for k, on in mode.items() if on) or 'eager'
    weights = sum(p.numel() for p in step.model.parameters())
    print(f'{name:20} {weights/1e6:6.3f} M  batch {batch:4}  {mode:16} {halves[0]:7.2f} '
          f'{halves[1]:7.2f} ms  '
          f'{batch/min(halves)*1e3:7.0f} windows/s  '
          f'{torch.cuda.max_memory_allocated()/2**30:5.1f} GiB  ready after {warm:4.0f} s  loss '
          f'{loss.item():.3f}', flush=True)
    if profile:
        from torch.profiler import ProfilerActivity, profile as record
        with record(activities=[ProfilerActivity.CUDA]) as p:
            step.run(step.x)
            torch.cuda.synchronize()
        rows = sorted((e for e in p.key_averages() if e.self_device_time_total > 0),
                      key=lambda e: -e.self_device_time_total)
        print(f'  kernels {sum(e.self_device_time_total for e in rows)/1e3:.1f} ms in '
              f'{sum(e.count for e in rows)} launches')
        for e in rows[:profile]:
            print(f'  {e.self_device_time_total/1e3:8.3f} ms {e.count:4}  {e.key[:100]}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['contrastive-base:256',
                                                    'reconstruction-base:256'],
                        help='PRESET:BATCH or PRESET/WIDTH,HEADS,BLOCKS,FF:BATCH')
    parser.add_argument('--modes', default='eager,compiled,compiled+replay',
                        help='compiled: blocks and frontend, as the trainer does in long runs; '
                             'replay: recorded')
    parser.add_argument('--profile', type=int, default=0, help='kernels to list')
    args = parser.parse_args()
    for what in args.what:
        name, batch = what.split(':')
        for mode in args.modes.split(','):
            try:
                with tensor_float32(torch.device('cuda')):
                    measure(name, int(batch), profile=args.profile,
                            **{k: k in mode for k in ('compiled', 'replay')})
            except torch.OutOfMemoryError: print(f'{name:20} batch {batch}  {mode}: out of memory')

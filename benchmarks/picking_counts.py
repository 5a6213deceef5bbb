"""Multiply-adds and processor time of pickers for 1000 s of record, on one thread.

    python benchmarks/picking_counts.py nbs/runs/picking_counts.csv

Each picker runs with the window and the overlap of its `annotate`, so the windows of 1000 s of new
record cost what is counted here; SeisBench's cutting and stacking are left out. The last rows are
what this processor reaches in a matrix product and in passes over memory (numbers a second). Time
is that of the process, median of seven: other programs on the machine change it little. """
import argparse
import time

import numpy as np
import seisbench.models
import torch
import torch.nn.functional as F

from seismodel.files import write_csv
from seismodel.models.frontend import multiply_adds
from seismodel.picking.seisbench_model import OVERLAP, READ_WINDOW, SeisModelPicker


def seconds_of(f):
    "Median processor time of a call"
    times = []
    for _ in range(8):
        since = time.process_time()
        f()
        times.append(time.process_time() - since)
    return float(np.median(times[1:]))


def parts_of(name):
    "Parts of a picker, each a name, a module and its inputs; new samples of a batch"
    if name in ('PhaseNet', 'EQTransformer'):
        model = getattr(seisbench.models, name)().eval()
        overlap = model._get_overlap(model.in_samples, {})
        x = torch.randn(16, 3, model.in_samples)
        return [('all', model, (x,))], 16*(model.in_samples - overlap)
    picker = SeisModelPicker.from_pretrained(name).picker
    x = torch.randn(2, READ_WINDOW, 3)
    frames = picker.encoder.encode(x)
    head = (picker.backbone(frames), x)
    return [('frontend', Encode(picker.encoder), (x,)), ('backbone', picker.backbone, (frames,)),
            ('head', picker.head, head)], 2*(READ_WINDOW - OVERLAP)


class Encode(torch.nn.Module):
    "The encoder without a mask as a module"
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x): return self.encoder.encode(x)


def rates():
    "Row of each operation that bounds a picker"
    a, b, x = torch.randn(2048, 768), torch.randn(768, 512), torch.randn(8192, 64)
    yield 'matrix product', 2048*768*512, seconds_of(lambda: a @ b)
    for name, f in dict(add=lambda: x + x, gelu=lambda: F.gelu(x), silu=lambda: F.silu(x),
                        layer_norm=lambda: F.layer_norm(x, (64,)),
                        rms_norm=lambda: F.rms_norm(x, (64,))).items():
        yield name, x.numel(), seconds_of(f)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('out', help='CSV file')
    out, rows = p.parse_args().out, []
    torch.set_num_threads(1)
    for name in ('PhaseNet', 'tiny-picker', 'EQTransformer', 'small-picker'):
        parts, samples = parts_of(name)
        for part, module, inputs in parts:
            scale = 100_000/samples
            count = multiply_adds(module, *inputs)*scale/1e9
            seconds = seconds_of(lambda: module(*inputs))*scale
            rows.append([name, part, count, seconds, count/seconds])
    rows += [['one thread', name, n/1e9, s, n/1e9/s] for name, n, s in rates()]
    write_csv(out, ('model', 'part', 'billions', 'seconds', 'billions_per_second'),
              [[*row[:2], *(f'{v:.4g}' for v in row[2:])] for row in rows])


if __name__ == '__main__': main()

"""How long does one station-day take on two CPU cores? Ours beside SeisBench's PhaseNet and
EQTransformer, all in one run.

    python benchmarks/annotate_day.py                       # three components, 24 h at 100 Hz
    python benchmarks/annotate_day.py --hours 4 --repeat 3 --models PhaseNet contrastive-tiny

Weights are random: they do not change the time. Each model annotates with its own defaults (window,
overlap, batch), in the order given, `--repeat` times round; the best round counts. The day is noise
with an event every few minutes. """
import argparse
import logging
import time

import numpy as np
import obspy
import seisbench.models
import torch

from seismodel.core import count_parameters
from seismodel.finetuning.heads import Picker
from seismodel.picking.seisbench_model import SeisModelPicker
from seismodel.models.pretraining import PRESETS, build


def station_day(hours, seed=0):
    "Three components of red noise with bursts, 100 Hz"
    rng, n = np.random.default_rng(seed), round(hours*360_000)
    x = rng.standard_normal((3, n)).cumsum(1)*.01 + rng.standard_normal((3, n))
    for at in rng.integers(0, n - 3000, round(hours*12)):
        x[:, at:at + 3000] += 30*np.exp(-np.arange(3000)/400)*rng.standard_normal((3, 3000))
    stats = dict(network='XX', station='DAY', sampling_rate=100.,
                 starttime=obspy.UTCDateTime(2020, 1, 1))
    return obspy.Stream([obspy.Trace(row, {**stats, 'channel': f'HH{c}'}) for row,
                         c in zip(x, 'ZNE')])


def make(name):
    if name in PRESETS: return SeisModelPicker.of(Picker(build(PRESETS[name].model)).eval())
    return getattr(seisbench.models, name)().eval()


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--hours', type=float, default=24.)
    p.add_argument('--repeat', type=int, default=1)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--models', nargs='+', default=['PhaseNet', 'contrastive-tiny',
                                                   'reconstruction-tiny', 'EQTransformer',
                                                   'contrastive-small'])
    p.add_argument('--window', type=int,
                   help='samples that ours reads in one pass, instead of its default')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    logging.disable(logging.WARNING)
    stream, models, best = station_day(a.hours), {name: make(name) for name in a.models}, {}
    for model in models.values():
        if a.window and isinstance(model, SeisModelPicker): model.window = a.window
        model.annotate(station_day(.1))                          # whatever the first call sets up
    for _ in range(a.repeat):
        for name, model in models.items():
            since = time.perf_counter()
            model.annotate(stream)
            best[name] = min(best.get(name, np.inf), time.perf_counter() - since)
            print(f'{name:22}{best[name]:8.1f} s', flush=True)
    print(f'\n{a.hours:g} h, {a.threads} threads, torch {torch.__version__}\n\n| model | '
          f'parameters | seconds | over PhaseNet | over EQTransformer |\n|---|---|---|---|---|')
    for name, seconds in best.items():
        ratios = [f'{seconds/best[peer]:.2f}' if peer in best else ''
                  for peer in ('PhaseNet', 'EQTransformer')]
        print(f'| {name} | {count_parameters(models[name]):,} | {seconds:.1f} | {ratios[0]} | '
              f'{ratios[1]} |')


if __name__ == '__main__': main()

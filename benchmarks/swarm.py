"Recall of second and later events in swarms: a tiny picker that learned every onset of a window, and one that learned the first event alone"
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from seismodel.finetuning.heads import Picker
from seismodel.models.pretraining import build, preset
from seismodel.finetuning.calibration import peaks_of
from seismodel.picking.matching import WindowLabels, score_windows, summarise_matches
from seismodel.signals.normalize import normalize
from seismodel.signals.several_events import synthesize_swarm


def batch_of(windows, several):
    "Windows with all of their onsets, or with those of the first event alone"
    x = normalize(torch.from_numpy(windows.waveforms))
    events = torch.from_numpy(windows.events)
    own = events[:, 0]
    status = torch.full((len(x),), 2)
    labels = {'events': events} if several else {}
    return dict(x=x, p_onset=own[:, 0], s_onset=own[:, 1], p_status=status, s_status=status, **labels)


def train(windows, several, steps, size, seed, lr):
    "A tiny picker from random weights"
    torch.manual_seed(seed)
    picker = Picker(build(preset('contrastive-tiny').model)).train()
    optimizer = torch.optim.AdamW(picker.parameters(), lr, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=.1)
    batch, rng = batch_of(windows, several), np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.from_numpy(rng.choice(len(batch['x']), size, replace=False))
        loss = picker({k: v[rows] for k, v in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(picker.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if step % 50 == 49: print(f'step {step + 1} of {steps}: loss {loss.item():.4f}', flush=True)
    return picker.eval()


@torch.no_grad()
def score(picker, windows, threshold):
    "Matched picks of windows"
    x = normalize(torch.from_numpy(windows.waveforms))
    p = torch.cat([picker.logits(part).softmax(-1) for part in x.split(16)]).numpy()
    picks = [{phase: peaks_of(q[:, k], threshold)[:, 0] for k, phase in ((1, 'P'), (2, 'S'))} for q in p]
    labels = [WindowLabels(e, samples=x.shape[1]) for e in windows.events]
    return summarise_matches(score_windows(picks, labels), x.shape[0]*x.shape[1]/360_000)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--out', type=Path, default=Path('swarm_recall.csv'))
    options.add_argument('--steps', type=int, default=400)
    options.add_argument('--batch-size', type=int, default=16)
    options.add_argument('--samples', type=int, default=4096)
    options.add_argument('--train', type=int, default=1500)
    options.add_argument('--test', type=int, default=200)
    options.add_argument('--seeds', type=int, default=1)
    options.add_argument('--lr', type=float, default=2e-3)
    args, tables = options.parse_args(), []
    windows = synthesize_swarm(range(args.train), 0, args.samples)
    test = synthesize_swarm(range(args.test), 1, args.samples)
    for seed in range(args.seeds):
        for name, several in (('first event', False), ('every event', True)):
            begin = time.time()
            picker = train(windows, several, args.steps, args.batch_size, seed, args.lr)
            print(f'{name}, seed {seed}: {time.time() - begin:.0f} s', flush=True)
            for threshold in (.1, .3):
                table = score(picker, test, threshold).assign(labels=name, seed=seed, threshold=threshold)
                tables.append(table)
                print(table.round(3).to_string(index=False), flush=True)
            pd.concat(tables).to_csv(args.out, index=False)


if __name__ == '__main__': main()

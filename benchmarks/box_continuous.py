"""Pickers of the box on continuous records, beside a published one: what they find, and what else

    python benchmarks/box_continuous.py FOLDER --peer NAME=PATH --out nbs/runs/box_continuous.csv

FOLDER holds streams that ObsPy reads, an instrument a file, and perhaps tables picks*.csv of
analysts with station, phase and time. A peer is a PhaseNet in the two files of SeisBench's cache,
PATH.json.v1 and PATH.pt.v1, at its own thresholds; it is asked, and nothing of it is kept. A
catalogue is never complete, so a pick that no analyst made may be right: the column `confirmed`
says for how many of those another picker here has a probability of 0.1 or more of the same phase
within 0.5 s. """
import argparse
import json
import time
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import torch
from seisbench.models import PhaseNet

from seismodel.models.box import box_models
from seismodel.picking.seisbench_model import SeisModelPicker

LOW, NEAR = .1, .5     # probability of another picker that confirms a pick; seconds


def open_peer(path: str) -> PhaseNet:
    "A published PhaseNet from its two files"
    known = json.loads(Path(f'{path}.json.v1').read_text(encoding='utf-8'))
    net = PhaseNet(**known['model_args'])
    net.load_state_dict(torch.load(f'{path}.pt.v1', weights_only=True))
    net.default_args = known['default_args']
    return net.eval()


def picks_of(net, stream: obspy.Stream, **args) -> dict[str, np.ndarray]:
    "Times of P and of S, seconds since 1970"
    picks = net.classify(stream.copy(), **args).picks
    return {phase: np.array([p.peak_time.timestamp for p in picks if p.phase == phase])
            for phase in 'PS'}


def near(times: np.ndarray, others: np.ndarray, seconds: float) -> np.ndarray:
    "Whether each time has one of the others so near"
    if not len(others): return np.zeros(len(times), bool)
    return np.abs(np.subtract.outer(times, others)).min(1) <= seconds


def analyst_picks(folder: Path) -> pd.DataFrame:
    "All tables in a folder"
    tables = [pd.read_csv(f) for f in sorted(folder.glob('picks*.csv'))]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=['station', 'phase', 'time'])
    return table.assign(at=[obspy.UTCDateTime(t).timestamp for t in table['time']])


def score(mine: np.ndarray, known: np.ndarray, others: list[np.ndarray], hours: float) -> dict:
    "Picks of a phase against those of analysts, and of other pickers"
    late = [mine[np.abs(mine - t).argmin()] - t for t in known] if len(mine) else []
    other = mine[~near(mine, known, NEAR)]
    seen = [near(other, times, NEAR) for times in others]
    confirmed = int(np.any(seen, 0).sum()) if seen else 0
    return dict(analyst=len(known), found=int(near(known, mine, .3).sum()),
                late=' '.join(f'{x:+.2f}' for x in late if abs(x) <= 2), other=len(other),
                confirmed=confirmed, unconfirmed_per_hour=round((len(other) - confirmed)/hours, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--peer', action='append', default=[], help='NAME=PATH')
    parser.add_argument('--out', type=Path, required=True)
    a = parser.parse_args()
    pickers = [name for name in box_models() if name.endswith('picker')]
    nets = {name: SeisModelPicker.from_pretrained(name) for name in pickers}
    nets |= {name: open_peer(path) for name, _, path in (text.partition('=') for text in a.peer)}
    table, rows = analyst_picks(a.folder), []
    for file in sorted(a.folder.glob('*.mseed')):
        stream = obspy.read(str(file))
        station, hours = stream[0].stats.station, stream[0].stats.npts*stream[0].stats.delta/3600
        low = {n: picks_of(net, stream, P_threshold=LOW, S_threshold=LOW) for n,
               net in nets.items()}
        for name, net in nets.items():
            since = time.perf_counter()
            found = picks_of(net, stream)
            seconds = round(time.perf_counter() - since, 1)
            for phase in 'PS':
                known = table.query('station == @station and phase == @phase')['at'].to_numpy(float)
                others = [low[n][phase] for n in nets if n != name]
                row = score(found[phase], known, others, hours)
                about = dict(picker=name, station=station, hours=round(hours, 2), phase=phase)
                rows.append({**about, **row, 'seconds': seconds})
    pd.DataFrame(rows).to_csv(a.out, index=False)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == '__main__': main()

"""Write tests/golden_picks.json: picks of the pickers in the box on records that everyone has.

    python scripts/golden_picks.py          # after a wanted change: say so in the changelog
    python scripts/golden_picks.py --check  # compare only, for example on a GPU: --device cuda

The same weights give the same picks: times to the sample, probabilities to 0.001. tests/test_box.py
holds every version to that, with 1, 2 and 4 threads. The records are those that ObsPy brings with
it, and generated ones.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import obspy

from seismodel.models.box import box_models
from seismodel.picking.seisbench_model import SeisModelPicker

GOLDEN = Path(__file__).resolve().parents[1]/'tests/golden_picks.json'
OBSPY = {   # records that come with ObsPy, of one instrument each; None: its example
    'obspy RJOB 2009': [None],
    'obspy RJOB 2005': ['loc_RJOB20050831023349.z'],
    'obspy RNON 2004': ['loc_RNON20040609200559.z'],
    'obspy CER 2005': ['2005-07-23-1452-04S.CER___030'],
    'obspy UH3 2010': [f'BW.UH3._.SH{c}.D.2010.147.cut.slist.gz' for c in 'ZNE'],
    'obspy UH1 2010': ['BW.UH1._.SHZ.D.2010.147.cut.slist.gz'],
    'obspy UH4 2010': ['BW.UH4._.EHZ.D.2010.147.cut.slist.gz']}


def generated(seed: int) -> obspy.Stream:
    "200 s at 100 Hz, longer than a window of annotate: noise, and events of three sizes"
    rng, n = np.random.RandomState(seed), 20_000     # whose numbers no version of NumPy may change
    x = rng.standard_normal((3, n))
    for p, size in ((3000, 8.), (9000, 3.), (15_500, 40.)):
        for onset, gain, decay in ((p, (1., .3, .3), 150.),
                                   (p + 400 + 100*seed, (.5, 1.5, 1.5), 300.)):
            t = np.arange(n) - onset
            burst = np.where(t >= 0, np.exp(-np.maximum(t, 0)/decay), 0)
            x += size*np.array(gain)[:, None]*burst*rng.standard_normal((3, n))
    head = dict(network='XX', station=f'GEN{seed}', sampling_rate=100.)
    traces = [obspy.Trace(row.astype(np.float32), head | {'channel': f'HH{c}'})
              for row, c in zip(x, 'ZNE')]
    return obspy.Stream(traces)


def records() -> dict[str, obspy.Stream]:
    "Every record by name"
    found = {}
    for name, files in OBSPY.items():
        streams = [obspy.read(f'/path/to/{file}') if file else obspy.read() for file in files]
        found[name] = sum(streams, obspy.Stream())
    return found | {f'generated {seed}': generated(seed) for seed in (1, 2)}


def picks_of_box(name: str, device: str = 'cpu') -> dict[str, list[dict]]:
    "Picks of a picker on every record"
    net = SeisModelPicker.from_pretrained(name).to(device)
    as_dict = lambda p: dict(phase=p.phase, time=str(p.peak_time),
                             probability=round(float(p.peak_value), 4))
    return {record: [as_dict(p) for p in net.classify(stream).picks]
            for record, stream in records().items()}


def differences(want: dict, got: dict) -> list[str]:
    "What differs, a line for each record"
    lines = []
    for record in sorted(want.keys() | got.keys()):
        a, b = (found.get(record, []) for found in (want, got))
        places = [[(p['phase'], p['time']) for p in picks] for picks in (a, b)]
        far = any(abs(p['probability'] - q['probability']) > 1e-3 for p, q in zip(a, b))
        if places[0] != places[1] or far: lines.append(f'{record}: {a} became {b}')
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='compare, write nothing')
    parser.add_argument('--device', default='cpu')
    a = parser.parse_args()
    pickers = [name for name in box_models() if name.endswith('picker')]
    found = {name: picks_of_box(name, a.device) for name in pickers}
    for name, picks in found.items():
        print(f'{name}: {sum(map(len, picks.values()))} picks on {len(picks)} records')
    if not a.check:
        GOLDEN.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
        return 0
    golden = json.loads(GOLDEN.read_text(encoding='utf-8'))
    wrong = [f'{name}, {line}' for name in golden
             for line in differences(golden[name], found.get(name, {}))]
    print('\n'.join(wrong) or 'the same picks as before')
    return bool(wrong)


if __name__ == '__main__': sys.exit(main())

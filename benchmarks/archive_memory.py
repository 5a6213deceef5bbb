"""Peak memory of `pick` and `pack` on continuous data of three components at 100 Hz: an hour, and a
week as one file and as seven

    python benchmarks/archive_memory.py                 # a few minutes of CPU per day of data
    python benchmarks/archive_memory.py --hours 24
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from obspy import Stream, Trace, UTCDateTime

DAY = 86_400


def day_of(k: int, hours: int) -> Stream:
    "Counts of a day: noise, and a burst every ten minutes"
    rng, samples = np.random.default_rng(k), 360_000*hours
    burst = np.exp(-(np.arange(60_000) - 3000.).clip(0)/800)*(np.arange(60_000) >= 3000)
    size = np.tile(1 + 30*burst, samples//60_000).astype(np.float32)
    head = dict(network='XX', station='WEEK', location='00', sampling_rate=100.,
                starttime=UTCDateTime(2024, 1, 1) + k*DAY)
    return Stream([Trace((100*size*rng.standard_normal(samples, np.float32)).astype(np.int32),
                         {**head, 'channel': c})
                   for c in ('HHZ', 'HHN', 'HHE')])


def write(folder: Path, hours: int, one_file: bool) -> Path:
    "A record of so many hours, each day by itself or all in one file"
    folder.mkdir()
    for k in range(-(-hours//24)):
        day = day_of(k, min(24, hours - 24*k))
        with open(folder/('all.mseed' if one_file else f'{k}.mseed'), 'ab') as f:
            day.write(f, format='MSEED')
    return folder


MEASURED = '''
import re, sys
from pathlib import Path
from seismodel.cli import main
code = main(sys.argv[1:])
print('peak', re.search(r'VmHWM:\\s*([0-9]+) kB',
                        Path('/proc/self/status').read_text(encoding='utf-8'))[1])
sys.exit(code)
'''

def measured(*words: str) -> dict:
    "Run a command of the package; seconds, and peak memory of its process in MB (Linux)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', MEASURED, *map(str, words)], capture_output=True,
                          text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return dict(seconds=round(time.perf_counter() - began),
                MB=round(int(done.stdout.rsplit('peak', 1)[1])/1024))


def tiny_picker(folder: Path) -> Path:
    "A picker with random weights: memory does not depend on what it has learnt"
    from seismodel.finetuning.heads import Picker
    from seismodel.models.pretraining import build, preset
    Picker(build(preset('contrastive-tiny').model)).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hours', type=int, default=168, help='of the long record')
    parser.add_argument('--model', help='a picker; a tiny one with random weights if not given')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = args.model or tiny_picker(folder/'picker')
        layouts = [('hour', 1, True), ('one file', args.hours, True),
                   ('files of a day', args.hours, False)]
        for name, hours, one_file in layouts:
            source = write(folder/name, hours, one_file)
            size = sum(f.stat().st_size for f in source.iterdir())/1e6
            for command in (('pick', source, '--model', model, '--p-threshold', .9, '--s-threshold',
                             .9, '--device', 'cpu'), ('pack', source)):
                found = measured(*command, '--out', folder/f'{command[0]} {name}')
                print(json.dumps(dict(layout=name, hours=hours, file_MB=round(size),
                                      command=command[0], **found)), flush=True)


if __name__ == '__main__': main()

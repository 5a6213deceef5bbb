"""Station-days a second of `seismodel pick`, where its time goes, and whether a GPU finds the picks
of the CPU

    # on a GPU
    python benchmarks/pick_gpu.py FOLDER --days 48 --models random:spectrum-small tiny-picker
    # tries it anywhere
    python benchmarks/pick_gpu.py FOLDER --days 2 --hours 1 --device cpu --models tiny-picker

FOLDER gets an SDS archive of synthetic station-days (three components, 100 Hz, Steim-2 miniSEED,
200 events a day, one seed), which a second call takes as it is. A model is a name that `seismodel
pick` takes, or random:PRESET for random weights. Every part prints as it goes, and one that fails
does not stop the others. """
import argparse
import io
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))

import numpy as np   # noqa: E402
import torch   # noqa: E402
from obspy import Stream, Trace, UTCDateTime   # noqa: E402
from scipy.signal import butter, sosfilt   # noqa: E402

from seismodel.finetuning.heads import Picker   # noqa: E402
from seismodel.models.pretraining import build, preset   # noqa: E402
from seismodel.picking import pick as picking   # noqa: E402
from seismodel.picking import pieces   # noqa: E402
from seismodel.picking.output import read_picks   # noqa: E402
from seismodel.picking.seisbench_model import open_picker   # noqa: E402

RATE, EVENTS, START = 100, 200, UTCDateTime(2024, 2, 26)
SEA = butter(1, (.12, .3), 'bandpass', fs=RATE, output='sos')
BAND = butter(2, (2, 15), 'bandpass', fs=RATE, output='sos')


def say(*words): print(*words, flush=True)


# the archive

def waves(seed: int) -> np.ndarray:
    "(3, n) counts of a day: microseism, noise, P and S of each event"
    rng, n = np.random.default_rng(seed), 86_400*RATE
    x = np.stack([2000*sosfilt(SEA, rng.standard_normal(n)) + 30*rng.standard_normal(n)
                  for _ in range(3)])
    t = np.arange(25*RATE)/RATE
    for at in rng.integers(10*RATE, n - 60*RATE, EVENTS):
        size, lag = 10**rng.uniform(2.5, 4.5), rng.integers(2*RATE, 12*RATE)
        for first, gains in ((at, (1., .4, .4)), (at + lag, (.8, 2., 2.))):
            burst = sosfilt(BAND,
                            rng.standard_normal((3, len(t))))*np.exp(-t/4)*(1 - np.exp(-t/.04))
            x[:, first:first + len(t)] += size*np.array(gains)[:, None]*burst
    return np.round(x).astype(np.int32)


def write_day(folder: Path, k: int) -> None:
    "Station-day number k in an SDS archive, unless it is there"
    code, (day, station) = 'SYN', divmod(k, 16)
    start, station = START + 86_400*day, f'S{station:02}'
    path = lambda c: (folder/str(start.year)/code/station/f'HH{c}.D' /
                      f'{code}.{station}..HH{c}.D.{start.year}.{start.julday:03}')
    if all(path(c).exists() for c in 'ZNE'): return
    for c, row in zip('ZNE', waves(k)):
        path(c).parent.mkdir(parents=True, exist_ok=True)
        head = dict(network=code, station=station, channel=f'HH{c}', sampling_rate=RATE,
                    starttime=start)
        Stream([Trace(row, head)]).write(str(path(c)), format='MSEED', encoding='STEIM2',
                                         reclen=512)


def make_archive(folder: Path, days: int) -> None:
    "All station-days, in as many processes as there are cores"
    since = time.perf_counter()
    with ProcessPoolExecutor(min(days, picking.cores(), 16)) as pool:
        list(pool.map(write_day, [folder]*days, range(days)))
    size = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())/2**20
    say(f'{days} station-days, {size:.0f} MiB, in {time.perf_counter() - since:.0f} s')


def named(model: str, folder: Path) -> str:
    "A name that `pick` takes; a folder with random weights for random:PRESET"
    if not model.startswith('random:'): return model
    torch.manual_seed(0)
    where = folder/model.replace(':', '-')
    if not where.exists():
        Picker(build(preset(model.partition(':')[2]).model)).save_pretrained(where)
    return str(where)


# the same picks?

def picks_of(sources: Path, model: str, out: Path, device: str, **selection):
    "The table of picks, and seconds"
    rmtree(out, ignore_errors=True)
    since = time.perf_counter()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        table = picking.pick([sources], model, out, device=device, **selection)
    return read_picks(table), time.perf_counter() - since


def compared(a, b) -> str:
    "How far the picks of two tables agree; those of one that have no partner within half a second"
    gaps, odds, alone = [], [], 0
    for phase in 'PS':
        one, two = (t[t.phase == phase].sort_values('epoch') for t in (a, b))
        if not len(one) or not len(two):
            alone += len(one) + len(two)
            continue
        at = two.epoch.to_numpy()
        near = np.array([np.abs(at - e).argmin() for e in one.epoch])
        gap = np.abs(at[near] - one.epoch.to_numpy())
        good = gap < .5
        gaps += list(gap[good])
        odds += list(np.abs(two.probability.to_numpy()[near] - one.probability.to_numpy())[good])
        alone += (~good).sum() + len(two) - len(set(near[good]))
    if not gaps: return f'{len(a)} and {len(b)} picks, none in common'
    gaps, odds = np.array(gaps), np.array(odds)
    return (f'{len(a)} and {len(b)} picks, {len(gaps)} in common, {alone} alone; times the same '
            f'for {(gaps < .005).mean():.2%}, '
            f'within a sample for {(gaps < .015).mean():.2%}, at most {gaps.max():.2f} s apart; '
            f'probabilities at most {odds.max():.4f} apart')


def same_picks(a, archive: Path, model: str):
    "CPU in float32 beside the device"
    some = dict(station='S00', start=str(START), end=str(START + 3600*a.hours))
    cpu, seconds = picks_of(archive, model, a.folder/'cpu', 'cpu', **some)
    say(f'{a.hours:g} h on the CPU: {seconds:.1f} s, {len(cpu)} picks')
    for name, way in WAYS.items():
        if name != 'float32' and not a.device.startswith('cuda'): continue
        try:
            with way():
                # whatever the first call sets up
                table, _ = picks_of(archive, model, a.folder/'device', a.device, **some)
                table, seconds = picks_of(archive, model, a.folder/'device', a.device, **some)
            say(f'{a.hours:g} h on {a.device} in {name}: {seconds:.2f} s; {compared(cpu, table)}')
        except Exception: say(name, traceback.format_exc())


# precision and batches

@contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try: yield
    finally: torch.set_float32_matmul_precision(before)


@contextmanager
def exact():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try: yield
    finally: torch.backends.cudnn.allow_tf32 = before


WAYS = {'float32': lambda: torch.autocast('cuda', enabled=False),
        'float32, convolutions too': exact, 'TF32': tf32,
        'bfloat16': lambda: torch.autocast('cuda', torch.bfloat16)}


def speed(a, model: str):
    "Windows a second of the network alone"
    net = open_picker(model).to(a.device)
    if not a.device.startswith('cuda'): return
    s = pieces.settings_of(net, {})
    day = 86_400*RATE/s.step                             # windows
    for name, way in WAYS.items():
        for batch in (16, 64, 128, 256):
            try:
                with way(): rate = windows_a_second(net, batch, s, a.device)
                say(f'network in {name}, {batch} windows at a time: {rate/day:.2f} station-days a '
                    f'second, '
                    f'{torch.cuda.max_memory_allocated()/2**30:.1f} GiB')
            except Exception: say(name, batch, traceback.format_exc())


def windows_a_second(net, batch: int, s, device: str, rounds: int = 3) -> float:
    "Of normalising and the network, after two rounds that do not count"
    x = torch.randn(batch, s.window, 3, dtype=torch.float64, device=device)
    for _ in range(2): pieces.window_probabilities(net, x, s.args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    since = time.perf_counter()
    for _ in range(rounds): pieces.window_probabilities(net, x, s.args)
    torch.cuda.synchronize()
    return rounds*batch/(time.perf_counter() - since)


# where the time goes

class Clock(dict):
    "Seconds inside of some functions"
    def around(self, owner, name: str, label: str, device: str):
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            if device.startswith('cuda'): torch.cuda.synchronize()
            since = time.perf_counter()
            try: return inner(*args, **kwargs)
            finally:
                if device.startswith('cuda'): torch.cuda.synchronize()
                self[label] = self.get(label, 0.) + time.perf_counter() - since
        setattr(owner, name, timed)
        return lambda: setattr(owner, name, inner)


def shares(a, archive: Path, model: str):
    "One process, a few station-days: seconds a day in each part"
    from seismodel.data.archive import Instrument
    from seismodel.picking.seisbench_model import SeisModelPicker
    clock = Clock()
    some = dict(station='S00,S01', start=str(START),
                end=str(START + (86_400 if a.device.startswith('cuda') else 3600*a.hours)))
    undo = [clock.around(*row, a.device) for row in (
        (picking, 'index_files', 'headers'), (Instrument, 'read', 'reading'),
        (SeisModelPicker, 'forward', 'network'),
        (pieces, 'probability_curves', 'network and cutting'),
        (pieces, 'pick_piece', 'all of a piece'),
        (picking, 'measure', 'amplitudes'), (picking, 'pick_each', 'all days'),
        (picking, 'join_days', 'tables'))]
    try: _, seconds = picks_of(archive, model, a.folder/'shares', a.device, **some)
    finally:
        for back in undo: back()
    c = {name: clock.get(name, 0.) for name in ('headers', 'reading', 'network',
                                                'network and cutting', 'all of a piece',
                                                'amplitudes', 'all days', 'tables')}
    rows = {'reading headers': c['headers'], 'reading samples': c['reading'],
            'cutting, normalising, stacking': c['network and cutting'] - c['network'],
            'network': c['network'],
            'peaks': c['all of a piece'] - c['reading'] - c['network and cutting'],
            'amplitudes': c['amplitudes'],
            'results of days': c['all days'] - c['all of a piece'] - c['amplitudes'],
            'tables': c['tables']}
    rows['opening the model'] = seconds - sum(rows.values())
    days = 2*(1 if a.device.startswith('cuda') else a.hours/24)
    say(f'one process, {days:g} station-days in {seconds:.1f} s; seconds a station-day:')
    for name, value in rows.items(): say(f'    {name:32}{value/days:8.3f} {value/seconds:7.1%}')


# the command

def command(a, archive: Path, model: str):
    "Station-days a second of the whole command"
    out = a.folder/'picks'
    rmtree(out, ignore_errors=True)
    words = [sys.executable, '-m', 'seismodel', 'pick', str(archive), '--model', model, '--device',
             a.device, '--out', str(out)]
    if not a.device.startswith('cuda'):
        words += ['--station', 'S00,S01', '--end', str(START + 3600*a.hours)]
    say(' '.join(words[1:]))
    since, wall = time.perf_counter(), time.time()
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=a.timeout)
    seconds = time.perf_counter() - since
    say(done.stdout.replace('\r', '\n').strip()[-600:])
    written = sorted(f.stat().st_mtime - wall for f in out.glob('days/*/*.json'))
    say(f'{model}: {len(written)} station-days in {seconds:.1f} s, {len(written)/seconds:.2f} a '
        f'second with the start; exit {done.returncode}')
    skip = min(8, len(written)//2)                       # those with which all processes begin
    if len(written) - skip < 2: return
    rate = (len(written) - 1 - skip)/max(1e-9, written[-1] - written[skip])
    say(f'{model}: the first after {written[0]:.1f} s, the last after {written[-1]:.1f} s, tables '
        f'{seconds - written[-1]:.1f} s; '
        f'{rate:.2f} station-days a second in between')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('folder', type=Path, help='gets the archive and the picks')
    p.add_argument('--days', type=int, default=48, help='station-days')
    p.add_argument('--models', nargs='+', default=['random:spectrum-small', 'tiny-picker'])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--hours', type=float, default=6.,
                   help='of the comparison with the CPU, and of everything on a CPU')
    p.add_argument('--timeout', type=float, default=300., help='s, of one command')
    a = p.parse_args()
    archive = a.folder/'sds'
    make_archive(archive, a.days)                        # its processes fork before CUDA begins
    name = torch.cuda.get_device_name() if a.device.startswith('cuda') else 'no GPU'
    say(f'{name}, {picking.cores()} cores, torch {torch.__version__}')
    for model in a.models:
        say(f'\n{model}')
        try: where = named(model, a.folder)
        except Exception: say(traceback.format_exc())
        else:
            for part in (lambda: command(a, archive, where), lambda: same_picks(a, archive, where),
                         lambda: shares(a, archive, where), lambda: speed(a, where)):
                try: part()
                except Exception: say(traceback.format_exc())


if __name__ == '__main__': main()

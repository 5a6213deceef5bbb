"""A synthetic network of ten stations, picked and associated: events found and false, minutes, peak
memory

    scripts/associators.sh    # once: PyOcto in an environment of its own
    python benchmarks/network_week.py --model runs/picker \\
        --pyocto ~/.cache/seismodel/associators/pyocto/bin/python
    # the first two hours of one day
    python benchmarks/network_week.py … --days 1 --hours 2 --events 14 --out hours

An SDS archive of noise with a microseism, and planted events: P and S as decaying bursts of
band-limited noise at the times that straight rays give. Everything is drawn from one seed. A found
event has an origin time within two seconds of a planted one and lies within 20 km of it; all others
are false. """
import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from obspy import Stream, Trace, UTCDateTime
from obspy.core.inventory import Channel, Inventory, Network, Response, Station
from scipy.signal import butter, sosfilt

DAY, RATE, KM = 86_400, 100, 111.19
START = UTCDateTime(2024, 2, 26)             # the week of the leap day
SPEED = {'P': 6., 'S': 6./1.73}              # km/s
COUNTS = 1e9                                 # per m/s
BAND = butter(2, (2, 15), 'bandpass', fs=RATE, output='sos')
SEA = butter(1, (.12, .3), 'bandpass', fs=RATE, output='sos')


def stations(rng) -> list:
    "Code, latitude, longitude of ten stations within 40 km"
    return [(f'S{k:02}', 46 + .3*a, 7 + .4*b) for k,
            (a, b) in enumerate(rng.uniform(-1, 1, (10, 2)))]


def planted(rng, days: int, hours: int, count: int) -> pd.DataFrame:
    """Events: time (s after the start), latitude, longitude, depth (km), size; at least half a
    minute apart"""
    slots = np.sort(rng.choice(days*(hours*120 - 4), count, replace=False))
    # none in the last two minutes
    begin = slots//(hours*120 - 4)*DAY + 30.*(slots % (hours*120 - 4))
    return pd.DataFrame(dict(time=begin + 30 + rng.uniform(0, 5, count),
                             latitude=46 + rng.uniform(-.25, .25, count),
                             longitude=7 + rng.uniform(-.35, .35, count),
                             depth=rng.uniform(4, 15, count),
                             size=10**rng.uniform(1.2, 2.6, count)))


def distance(event, lat: float, lon: float) -> float:
    "Hypocentral distance, km"
    east = (lon - event.longitude)*KM*np.cos(np.radians(46))
    return float(np.hypot(np.hypot((lat - event.latitude)*KM, east), event.depth))


def day_of(seed, day: int, hours: int, events: pd.DataFrame, lat: float, lon: float) -> np.ndarray:
    "(3, n) counts of a station and day: Z, N, E"
    rng, n = np.random.default_rng(seed), hours*3600*RATE
    x = np.stack([2000*sosfilt(SEA, rng.standard_normal(n)) + 100*rng.standard_normal(n)
                  for _ in range(3)])
    for event in events.itertuples():
        km = distance(event, lat, lon)
        for phase, gains, rise in (('P', (1., .4, .4), .03), ('S', (.6, 1.6, 1.6), .06)):
            first = round((event.time + km/SPEED[phase] - day*DAY)*RATE)
            if not 0 <= first < n - 1: continue
            t = np.arange(min(40*RATE, n - first))/RATE
            shape = (1 - np.exp(-t/rise))*np.exp(-t/(1.5 + km/20))*event.size*1000/km
            for c, gain in enumerate(gains):
                x[c, first:first + len(t)] += gain*shape*sosfilt(BAND, rng.standard_normal(len(t)))
    return np.round(x).astype(np.int32)


def write_archive(folder: Path, days: int, hours: int, events: pd.DataFrame, places: list):
    "SDS, and an inventory"
    response = Response.from_paz(zeros=[0j, 0j], poles=[-.037 + .037j, -.037 - .037j],
                                 stage_gain=COUNTS)
    for k, (code, lat, lon) in enumerate(places):
        for day in range(days):
            t = START + day*DAY
            for c, x in zip(('HHZ', 'HHN', 'HHE'),
                            day_of((1, k, day), day, hours, events, lat, lon)):
                name = f'XX.{code}.00.{c}.D.{t.year}.{t.julday:03}'
                name = folder/f'sds/{t.year}/XX/{code}/{c}.D'/name
                name.parent.mkdir(parents=True, exist_ok=True)
                head = dict(network='XX', station=code, location='00', channel=c,
                            sampling_rate=RATE, starttime=t)
                Stream([Trace(x, head)]).write(str(name), format='MSEED')
    channels = lambda lat, lon: [Channel(c, '00', lat, lon, 0., 0., response=response,
                                         start_date=START - DAY)
                                 for c in ('HHZ', 'HHN', 'HHE')]
    network = Network('XX', [Station(code, lat, lon, 0., channels=channels(lat, lon)) for code, lat,
                             lon in places])
    Inventory([network]).write(str(folder/'inventory.xml'), format='STATIONXML')


MEASURED = '''
import re, sys
from pathlib import Path
from seismodel.cli import main
code = main(sys.argv[1:])
print('peak', re.search(r'VmHWM:\\s*([0-9]+) kB',
                        Path('/proc/self/status').read_text(encoding='utf-8'))[1])
sys.exit(code)
'''

ASSOCIATE = '''
import sys
import pandas as pd, pyocto
folder = sys.argv[1]
stations = pd.read_csv(f'{folder}/stations.pyocto.csv')
picks = pd.read_csv(f'{folder}/picks.pyocto.csv')
stations = stations[stations.id.str.endswith('.00')].reset_index(drop=True)
velocity = pyocto.VelocityModel0D(p_velocity=6.0, s_velocity=6.0/1.73, tolerance=1.0)
associator = pyocto.OctoAssociator.from_area(
    lat=(45.4, 46.6), lon=(6.2, 7.8), zlim=(0, 30), velocity_model=velocity,
    time_before=60, n_picks=8, n_p_picks=3, n_s_picks=3, n_p_and_s_picks=3)
associator.transform_stations(stations)
events, assigned = associator.associate(picks, stations)
associator.transform_events(events).to_csv(f'{folder}/events.csv', index=False)
print(len(assigned))
'''


def pick(folder: Path, model: str, more: list) -> dict:
    "Run the command; minutes and peak memory"
    words = ['pick', folder/'sds', '--model', model, '--out', folder/'picks', '--inventory',
             folder/'inventory.xml',
             *(f'--format={name}' for name in ('pyocto', 'gamma', 'real', 'hypoinverse',
                                               'nonlinloc')), *more]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', MEASURED, *map(str, words)], capture_output=True,
                          text=True)
    if done.returncode: raise SystemExit(done.stderr)
    peak = int(re.search(r'peak (\d+)', done.stdout)[1])
    return dict(said=done.stdout.splitlines()[0],
                minutes=round((time.perf_counter() - began)/60, 1), peak_MB=round(peak/1024))


def score(events: pd.DataFrame, found: pd.DataFrame) -> dict:
    "Which planted events are found, and what is false"
    hits = []
    for e in found.itertuples():
        late = np.abs(events['time'] - (e.time - START.timestamp))
        k = int(late.argmin())
        lat, lon = events.latitude[k], events.longitude[k]
        km = np.hypot((e.latitude - lat)*KM, (e.longitude - lon)*KM*np.cos(np.radians(46)))
        if late[k] <= 2 and km <= 20 and k not in hits: hits.append(k)
    weak = events['size'].rank(pct=True) <= .5
    return dict(planted=len(events), found=len(hits), of_the_weaker_half=int(weak[hits].sum()),
                false=len(found) - len(hits))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True)
    parser.add_argument('--pyocto', required=True, help='a python that has PyOcto')
    parser.add_argument('--days', type=int, default=7)
    parser.add_argument('--hours', type=int, default=24, help='recorded of each day')
    parser.add_argument('--events', type=int, default=100)
    parser.add_argument('--out', type=Path, default=Path('network_week'))
    args, more = parser.parse_known_args()         # the rest goes to `seismodel pick`
    rng = np.random.default_rng(0)
    places, events = stations(rng), planted(rng, args.days, args.hours, args.events)
    args.out.mkdir(parents=True, exist_ok=True)
    events.to_csv(args.out/'planted.csv', index=False)
    if not (args.out/'inventory.xml').exists():
        write_archive(args.out, args.days, args.hours, events, places)
    row = (dict(model=args.model, days=args.days, hours=args.hours, stations=len(places))
           | pick(args.out, args.model, more))
    began = time.perf_counter()
    subprocess.run([args.pyocto, '-c', ASSOCIATE, str(args.out/'picks')], check=True, env={})
    row |= score(events, pd.read_csv(args.out/'picks/events.csv'))
    print(json.dumps(row | dict(association_s=round(time.perf_counter() - began, 1)), indent=1))


if __name__ == '__main__': main()

"""Two events at ten synthetic stations, written by our formats, associated by PyOcto and by GaMMA
themselves: see scripts/associators.sh"""
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from obspy import UTCDateTime
from obspy.core.inventory import Channel, Inventory, Network, Station

from seismodel.picking.formats import write_format
from seismodel.picking.output import PICK_COLUMNS, write_picks

FOLDER = Path(os.environ.get('SEISMODEL_ASSOCIATORS', Path.home()/'.cache/seismodel/associators'))
SPEED = {'P': 6., 'S': 6./1.73}       # km/s, the same everywhere
EVENTS = [(46.02, 7.03, 8., UTCDateTime('2024-02-29T23:59:40')),
          (45.93, 6.88, 12., UTCDateTime('2024-03-01T00:03:10'))]

PYOCTO = '''
import json, sys
from pathlib import Path
import pandas as pd, pyocto
folder = sys.argv[1]
stations = pd.read_csv(f'{folder}/stations.pyocto.csv')
picks = pd.read_csv(f'{folder}/picks.pyocto.csv')
velocity = pyocto.VelocityModel0D(p_velocity=6.0, s_velocity=6.0/1.73, tolerance=1.0)
associator = pyocto.OctoAssociator.from_area(
    lat=(45.5, 46.5), lon=(6.5, 7.5), zlim=(0, 30), velocity_model=velocity,
    time_before=60, n_picks=10, n_p_picks=4, n_s_picks=4, n_p_and_s_picks=4)
if sys.argv[2] == 'real':
    days = [day for day in sorted(Path(folder, 'real').iterdir()) if day.is_dir()]
    picks = pd.concat(associator._real_parse_picks(day).assign(
        time=lambda t, day=day: t.time + pd.Timestamp(day.name).timestamp()) for day in days)
    picks = picks.reset_index()
    stations = associator._real_parse_stations(f'{folder}/real/station.dat')
associator.transform_stations(stations)
events, assigned = associator.associate(picks, stations)
events = associator.transform_events(events)
sizes = assigned.groupby('event_idx').size().tolist()
print(json.dumps(dict(time=events.time.tolist(), latitude=events.latitude.tolist(), picks=sizes)))
'''

GAMMA = '''
import json, sys
import pandas as pd
from gamma.utils import association
folder = sys.argv[1]
stations = pd.read_csv(f'{folder}/stations.gamma.csv')
picks = pd.read_csv(f'{folder}/picks.gamma.csv', parse_dates=['timestamp'])
config = {
    'dims': ['x(km)', 'y(km)', 'z(km)'], 'ncpu': 1, 'use_dbscan': True,
    'use_amplitude': sys.argv[2] == 'amplitude', 'method': 'BGMM',
    'x(km)': (-60, 60), 'y(km)': (-60, 60), 'z(km)': (0, 30), 'vel': {'p': 6.0, 's': 6.0/1.73},
    'oversample_factor': 4, 'dbscan_eps': 25, 'dbscan_min_samples': 3,
    'min_picks_per_eq': 10, 'min_p_picks_per_eq': 4, 'min_s_picks_per_eq': 4,
    'min_stations': 5, 'max_sigma11': 2.0, 'max_sigma22': 1.0, 'max_sigma12': 1.0,
    'bfgs_bounds': ((-61, 61), (-61, 61), (0, 31), (None, None))}
events, assigned = association(picks, stations, config, method='BGMM')
sizes = pd.Series([a[1] for a in assigned]).value_counts().sort_index().tolist()
print(json.dumps(dict(time=[pd.Timestamp(e['time']).timestamp() for e in events], picks=sizes)))
'''


def network():
    "Ten stations within 30 km, as (code, latitude, longitude)"
    rng = np.random.default_rng(3)
    return [(f'S{k:02}', 46 + .25*a, 7 + .35*b) for k,
            (a, b) in enumerate(rng.uniform(-1, 1, (10, 2)))]


def pick_of(code, phase, time, size):
    codes = dict(network='XX', station=code, location='00', instrument='HH',
                 channel='HHZ' if phase == 'P' else 'HHE')
    numbers = dict(epoch=f'{time.timestamp:.6f}', probability=.9, uncertainty=.05, amplitude='900',
                   velocity=f'{size:.6g}', wood_anderson='.2')
    return {**dict.fromkeys(PICK_COLUMNS, ''), **codes, 'phase': phase, 'time': str(time),
            **numbers, 'clipped': False}


def write_all(folder):
    "40 picks in all formats"
    rows, km = [], 111.19
    for lat, lon, depth, origin in EVENTS:
        for code, y, x in network():
            distance = np.hypot(np.hypot((y - lat)*km, (x - lon)*km*np.cos(np.radians(46))), depth)
            rows += [pick_of(code, phase, origin + float(distance/SPEED[phase]), 1e-4/distance)
                     for phase in 'PS']
    stations = [Station(code, lat, lon, 0., channels=[Channel('HHZ', '00', lat, lon, 0., 0.)])
                for code, lat, lon in network()]
    inventory = Inventory([Network('XX', stations)])
    rows.sort(key=lambda row: (row['station'], row['time']))
    write_picks(rows, folder/'picks.csv')
    for name in ('pyocto', 'gamma', 'real'): write_format(name, rows, folder, inventory)
    return rows


def associated(program, code, folder, how):
    "What a program makes of the files, or skip"
    python = FOLDER/program/'bin/python'
    if not python.exists():
        pytest.skip(f'{program} is not installed in {FOLDER.name}: scripts/associators.sh makes '
                    f'its environment')
    done = subprocess.run([python, '-c', code, str(folder), how], capture_output=True, text=True,
                          env={'PATH': os.environ['PATH']})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.rindex('{'):])           # GaMMA prints dots before


@pytest.mark.parametrize('program, code, how', [('pyocto', PYOCTO, 'csv'), (
    'pyocto', PYOCTO, 'real'), ('gamma', GAMMA, 'times'), ('gamma', GAMMA, 'amplitude')],
                         ids=['pyocto', 'pyocto reads REAL', 'gamma', 'gamma with amplitudes'])
def test_both_events_with_all_picks(tmp_path, program, code, how):
    assert len(write_all(tmp_path)) == 40
    found = associated(program, code, tmp_path, how)
    assert found['picks'] == [20, 20]
    for (lat, _, _, origin), time in zip(EVENTS, sorted(found['time'])):
        assert abs(time - origin.timestamp) < 1.
    for (lat, *_), found_lat in zip(EVENTS, found.get('latitude', [])):
        assert abs(found_lat - lat) < .05

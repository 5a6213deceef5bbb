"""Picks for the next program: identity of results, thresholds, uncertainties, amplitudes, parts,
pages and formats"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
from conftest import eager_picker
from hypothesis import given, settings, strategies as st
from obspy.core.inventory import Channel, Inventory, Network, Response, Station

from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.archive import open_archive
from seismodel.finetuning.calibration import (fit_uncertainty, peak_sigma, peaks_of,
                                              store_calibration, uncertainty_of)
from seismodel.picking import pick as picking
from seismodel.picking.amplitude import GAIN_ONLY, NO_EPOCH, is_clipped, measure
from seismodel.picking.formats import PICK_FORMATS, hypoinverse_line
from seismodel.picking.output import read_picks
from seismodel.picking.pages import page_key
from seismodel.picking.pick import check_settings, pick, pick_archive
from seismodel.picking.seisbench_model import SeisModelPicker

T0 = obspy.UTCDateTime('2024-02-28T23:59:20')
ARGS = {'P_threshold': .3, 'S_threshold': .3}


@pytest.fixture(scope='module')
def model(): return eager_picker()


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    model.picker.save_pretrained(folder)
    return folder


def write_network(folder, stations=('AAA', 'BBB'), location='00', seed=0):
    "Eighty seconds across midnight, with bursts"
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for station in stations:
        for c in ('HHZ', 'HHN', 'HHE'):
            x = (100*rng.standard_normal(8000)*(1 + 20*(np.arange(8000) % 1700 < 300))).astype(
                np.int32)
            head = dict(network='XX', station=station, location=location, channel=c,
                        sampling_rate=100., starttime=T0)
            obspy.Trace(x, head).write(str(folder/f'{station}.{c}.mseed'), format='MSEED')
    return folder


def inventory_of(folder, response, start='2020-01-01', stations=('AAA', 'BBB')):
    channels = [Channel(c, '00', 46., 7., 900., 0., response=response,
                        start_date=obspy.UTCDateTime(start)) for c in ('HHZ', 'HHN', 'HHE')]
    network = Network('XX', [Station(s, 46., 7., 900., channels=channels) for s in stations])
    Inventory([network]).write(str(folder/'inventory.xml'), format='STATIONXML')
    return folder/'inventory.xml'


RESPONSE = Response.from_paz(zeros=[0j, 0j], poles=[-.037 + .037j, -.037 - .037j], stage_gain=1e9)


# identity

def test_a_file_of_the_same_size_and_time_is_told_apart_by_its_head(model, tmp_path):
    files = write_network(tmp_path/'in', ['AAA'])
    pick_archive(model, open_archive(files), tmp_path/'out', ARGS)
    before = read_picks(tmp_path/'out/picks.csv')
    stats = {f.name: f.stat() for f in files.iterdir()}
    write_network(files, ['AAA'], seed=1)
    for f in files.iterdir():
        assert f.stat().st_size == stats[f.name].st_size
        os.utime(f, ns=(stats[f.name].st_mtime_ns,)*2)
    pick_archive(model, open_archive(files), tmp_path/'out', ARGS)
    assert read_picks(tmp_path/'out/picks.csv').amplitude.tolist() != before.amplitude.tolist()


def test_another_inventory_gives_other_amplitudes(model, tmp_path):
    files = write_network(tmp_path/'in', ['AAA'])
    path, gains = inventory_of(tmp_path, RESPONSE), []
    for gain in (1., 2.):
        inventory = obspy.read_inventory(str(path))
        for channel in inventory[0][0]: channel.response.response_stages[0].stage_gain = 1e9*gain
        for channel in inventory[0][0]: channel.response.instrument_sensitivity.value = 1e9*gain
        inventory.write(str(path), format='STATIONXML')
        pick_archive(model, open_archive(files), tmp_path/'out', ARGS, inventory=path)
        gains.append(read_picks(tmp_path/'out/picks.csv'))
    assert len(gains[0]) == len(gains[1]) > 0
    np.testing.assert_allclose(gains[0].velocity, 2*gains[1].velocity, rtol=1e-3)
    np.testing.assert_array_equal(gains[0].amplitude, gains[1].amplitude)


def test_settings_begun_twice_at_once(tmp_path):
    "The second of two processes finds a folder that the first one has just filled"
    check_settings({'a': 1}, tmp_path/'out')
    (tmp_path/'out/days').mkdir()
    check_settings({'a': 1}, tmp_path/'out')
    (tmp_path/'new').mkdir()
    (tmp_path/'new/.settings.x.part').write_text('', encoding='utf-8')
    check_settings({'a': (1, 2)}, tmp_path/'new')
    check_settings({'a': [1, 2]}, tmp_path/'new')


# columns

def test_columns_and_locations(model, tmp_path):
    files = write_network(tmp_path/'in', ['AAA'])
    _, left = pick_archive(model, open_archive(files), tmp_path/'out', ARGS,
                           inventory=inventory_of(tmp_path, RESPONSE))
    table = read_picks(tmp_path/'out/picks.csv')
    assert set(table.location) == {'00'} and not left
    assert (set(table.channel[table.phase == 'P']) == {'HHZ'}
            and set(table.channel[table.phase == 'S']) <= {'HHN', 'HHE'})
    assert (table[['uncertainty', 'amplitude', 'velocity', 'wood_anderson']] > 0).all().all()
    assert all(abs(obspy.UTCDateTime(t).timestamp - e) < 1e-6 for t,
               e in zip(table.time, table.epoch))
    picks = [p for e in obspy.read_events(str(tmp_path/'out/picks.xml')) for p in e.picks]
    assert sorted(p.waveform_id.channel_code for p in picks) == sorted(table.channel)
    np.testing.assert_allclose(sorted(p.time_errors.uncertainty for p in picks),
                               sorted(table.uncertainty))


@pytest.mark.parametrize('response, start, why', [(RESPONSE, '2025-01-01', NO_EPOCH), (
    Response(instrument_sensitivity=RESPONSE.instrument_sensitivity), '2020-01-01', GAIN_ONLY)])
def test_what_an_inventory_does_not_know_is_said(model, tmp_path, response, start, why):
    files = write_network(tmp_path/'in', ['AAA'])
    _, left = pick_archive(model, open_archive(files), tmp_path/'out', ARGS,
                           inventory=inventory_of(tmp_path, response, start))
    table = read_picks(tmp_path/'out/picks.csv')
    assert why in left.values() and table.wood_anderson.isna().all() and (table.amplitude > 0).all()
    assert table.velocity.isna().all() == (why == NO_EPOCH)


def test_clipped_amplitudes_are_flagged(tmp_path):
    rng = np.random.default_rng(0)
    x = 1000*rng.standard_normal(6000)
    for code, y in (('HHZ', x.clip(-900, 900)), ('HHN', x), ('HHE', .5*x)):
        head = dict(network='XX', station='AAA', channel=code, sampling_rate=100., starttime=T0)
        obspy.Trace(np.round(y).astype(np.int32),
                    head).write(str(tmp_path/f'{code}.mseed'), format='MSEED')
    instrument, = open_archive(tmp_path).instruments
    found = {phase: measure(instrument, phase, (T0 + 20).ns) for phase in 'PS'}
    assert ((found['P'].clipped, found['P'].counts, found['S'].clipped, found['S'].channel)
            == (True, 1800, False, 'HHN'))
    assert not is_clipped(np.zeros(0))


def test_amplitudes_beside_a_gap(tmp_path):
    "What lies beyond a gap is another record"
    head = dict(network='XX', station='AAA', channel='HHZ', sampling_rate=100.)
    small, large = np.arange(3000) % 7, 1000*(np.arange(3000) % 2)
    for start, y in ((T0, small), (T0 + 31, large)):
        obspy.Trace(y.astype(np.int32), {**head, 'starttime': start}).write(
            str(tmp_path/f'{start.ns}.mseed'), format='MSEED')
    instrument, = open_archive(tmp_path, selection=picking.Selection(z_only=True)).instruments
    assert (measure(instrument, 'P', (T0 + 28).ns).counts == 6
            and measure(instrument, 'P', (T0 + 32).ns).counts == 1000)
    assert measure(instrument, 'P', (T0 + 30.5).ns).counts is None


# thresholds and uncertainties

@settings(max_examples=20, deadline=None)
@given(st.floats(.05, .5), st.floats(.35, 1.), st.floats(.1, .3))
def test_the_width_of_a_gaussian(sigma, height, threshold):
    half = sigma*np.sqrt(2*np.log(2*height/threshold))
    assert abs(float(peak_sigma(2*half, height, threshold)) - sigma) < 1e-9


def test_uncertainties_cover_what_they_say():
    rng = np.random.default_rng(1)
    sigma = rng.uniform(.02, .3, 3000)
    residual = rng.laplace(size=3000)*(.02 + .4*sigma)
    line = fit_uncertainty(sigma[::2], residual[::2])
    within = np.abs(residual[1::2]) <= uncertainty_of(sigma[1::2], line)
    assert abs(within.mean() - .68) < .04 and abs(within[sigma[1::2] > .2].mean() - .68) < .06
    assert uncertainty_of(.0001, None) == .01


def test_stored_thresholds_are_used_unless_told_otherwise(model, tmp_path, capsys):
    model.picker.save_pretrained(tmp_path/'run')
    store_calibration(tmp_path/'run', {'P_threshold': .6, 'S_threshold': .7,
                                       'P_uncertainty': [.5, 0.], 'S_uncertainty': [.25, 0.]}, {})
    files = write_network(tmp_path/'in', ['AAA'])
    table = read_picks(pick(files, str(tmp_path/'run'), tmp_path/'out', device='cpu'))
    assert (table.probability[table.phase == 'P'].min() >= .6
            and table.probability[table.phase == 'S'].min() >= .7)
    assert (set(table.uncertainty[table.phase == 'P']) <= {.5}
            and set(table.uncertainty[table.phase == 'S']) <= {.25})
    assert 'thresholds P 0.6, S 0.7' in capsys.readouterr().out
    told = read_picks(pick(files, str(tmp_path/'run'), tmp_path/'told', p_threshold=.3,
                           device='cpu'))
    assert (sum(told.phase == 'P') > sum(table.phase == 'P')
            and sum(told.phase == 'S') == sum(table.phase == 'S'))
    again = SeisModelPicker.from_pretrained(tmp_path/'run')
    again.save(tmp_path/'pair')
    assert SeisModelPicker.load(tmp_path/'pair').default_args == again.default_args != {}


def test_options_of_seisbench_work_or_are_refused(model):
    stream = obspy.read()
    with pytest.raises(UserError, match='zerophase_resample=False is not possible'):
        model.annotate(stream, zerophase_resample=False)
    filtered = SeisModelPicker.of(model.picker)
    filtered.filter_args, filtered.filter_kwargs = ('highpass',), {'freq': 5.}
    by_hand = stream.copy()
    for trace in by_hand: trace.data = trace.data - trace.data.mean()
    want = model.annotate(by_hand.filter('highpass', freq=5.))
    got = filtered.annotate(stream)
    np.testing.assert_allclose(got[1].data, want[1].data, atol=1e-3)
    assert np.abs(got[1].data - model.annotate(stream)[1].data).max() > .05


# parts

def test_four_processes_give_the_table_of_one(run, tmp_path):
    files = write_network(tmp_path/'in', ('AAA', 'BBB', 'CCC'))
    command = [sys.executable, '-m', 'seismodel', 'pick', str(files), '--model', str(run),
               '--device', 'cpu', '--p-threshold', '.3', '--s-threshold', '.3', '--out']
    jobs = [subprocess.Popen([*command, str(tmp_path/'out'), '--part', f'{k}/4'],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for k in (1, 2, 3, 4)]
    for job in jobs: assert not job.wait(), job.stderr.read()
    assert ([f.name for f in sorted((tmp_path/'out/parts').iterdir())]
            == [f'{k}-of-4' for k in (1, 2, 3, 4)])
    assert (len(list((tmp_path/'out/days').rglob('*.json'))) == 6
            and not (tmp_path/'out/picks.csv').exists())
    assert main([*command[3:], str(tmp_path/'out'), '--collect']) == 0
    assert main([*command[3:], str(tmp_path/'one')]) == 0
    for name in ('picks.csv', 'left_out.csv'):
        assert (tmp_path/'out'/name).read_bytes() == (tmp_path/'one'/name).read_bytes()


def test_collect_refuses_while_a_part_is_missing(run, tmp_path, capsys):
    files = write_network(tmp_path/'in')
    call = dict(model=str(run), out=tmp_path/'out', device='cpu')
    for part in ('1/3', '3/3'): pick(files, **call, part=part)
    with pytest.raises(UserError,
                       match='1 of 4 station-days are not picked yet, the first XX.AAA.00.HH '
                             '2024-02-29; not finished: part 2/3'):
        pick(files, **call, collect=True)
    pick(files, **call, part='2/3')
    pick(files, **call, collect=True)
    os.utime(files/'AAA.HHZ.mseed', (1e9, 1e9))
    with pytest.raises(UserError, match='2 of 4 station-days'): pick(files, **call, collect=True)
    with pytest.raises(UserError, match='give one of them'):
        pick(files, **call, collect=True, part='1/2')


# pages and formats

def test_pages_follow_their_results(model, tmp_path):
    files = write_network(tmp_path/'in', ['AAA'])
    pick_archive(model, open_archive(files), tmp_path/'out', ARGS, figures=True)
    pages = sorted((tmp_path/'out/figures').iterdir())
    keys = [page_key(p) for p in pages]
    assert (keys == [f.stem for f in sorted((tmp_path/'out/days').rglob('*.json'))]
            and len(keys) == 2)
    os.utime(files/'AAA.HHZ.mseed', (1e9, 1e9))
    pick_archive(model, open_archive(files), tmp_path/'out', ARGS)
    assert [page_key(p) for p in pages] == keys
    pick_archive(model, open_archive(files), tmp_path/'out', ARGS, figures=True)
    assert not set(page_key(p) for p in pages) & set(keys)


def test_all_formats_by_the_command(run, tmp_path, capsys):
    files = write_network(tmp_path/'in')
    words = ['pick', str(files), '--model', str(run), '--device', 'cpu', '--out',
             str(tmp_path/'out'), '--inventory', str(inventory_of(tmp_path, RESPONSE))]
    assert main([*words, *(f'--format={name}' for name in PICK_FORMATS)]) == 0
    out, table = tmp_path/'out', read_picks(tmp_path/'out/picks.csv')
    assert (len(pd.read_csv(out/'picks.pyocto.csv')) == len(pd.read_csv(out/'picks.gamma.csv'))
            == len(table) > 0)
    assert (set(pd.read_csv(out/'picks.pyocto.csv').station)
            <= set(pd.read_csv(out/'stations.pyocto.csv').id))
    assert (sum(len(f.read_text(encoding='utf-8').splitlines()) for f in out.glob('real/*/*.txt'))
            == len(table))
    assert sum('GAU' in line
               for line in (out/'picks.nonlinloc.obs').read_text(
        encoding='utf-8').splitlines()) == len(table)
    assert sum(bool(line[:1].strip()) for line in (out/'picks.hypoinverse.arc').read_text(
        encoding='utf-8').splitlines()) == len(table)
    assert (main([*words, '--format', 'hypo']) == 2
            and "--format is 'hypo'" in capsys.readouterr().err)


def test_hypoinverse_columns():
    "Columns of the year-2000 format, counted from 1, as its manual lists them"
    row = dict(network='XX', station='ABCD', location='10', channel='HHN', phase='S',
               uncertainty=.3, time='2024-12-31T23:59:05.678000Z')
    line = hypoinverse_line(row)
    at = lambda first, last: line[first - 1:last]
    assert (at(1, 5), at(6, 7), at(9, 9), at(10, 12)) == ('ABCD ', 'XX', 'N', 'HHN')
    assert ((at(18, 29), float(at(42, 46)), at(47, 48), at(50, 50), at(112, 113))
            == ('202412312359', 5.68, 'ES', '3', '10'))
    line = hypoinverse_line({**row, 'phase': 'P', 'channel': 'HHZ', 'uncertainty': .02})
    assert (at(14, 15), at(17, 17), float(at(30, 34)), at(42, 50).strip()) == ('IP', '0', 5.68, '')


@pytest.mark.parametrize('threshold', [.1, .3, .7])
def test_peaks_are_those_of_obspy(threshold):
    "`trigger_onset` as oracle, with stretches that begin or end with the curve"
    from obspy.signal.trigger import trigger_onset
    rng = np.random.default_rng(0)
    found = 0
    for n in (1, 2, 50, 3000):
        p = np.convolve(rng.random(n + 8), np.ones(9)/9, 'valid')**2*1.8
        want = [(a + p[a:b + 1].argmax(), p[a:b + 1].max(), b - a) for a,
                b in trigger_onset(p, threshold, threshold/2)]
        got = peaks_of(p, threshold)
        assert got.shape == (len(want), 3)
        np.testing.assert_array_equal(got, np.array(want).reshape(-1, 3))
        found += len(want)
    assert found > 3

"""miniSEED files that are cut off inside a record: named with one sentence, wherever the cut is;
whole files never"""
import os
from functools import lru_cache
from glob import glob
from pathlib import Path

import numpy as np
import obspy
import pytest
from hypothesis import given, settings, strategies as st
from obspy import Stream, Trace, UTCDateTime

from seismodel.cli import main
from seismodel.data.archive import open_archive
from seismodel.data.formats import (BLOCK, Cut, _equal_records, blocks_of, cut_records,
                                    cut_sentence, format_of, record_length)

T0 = UTCDateTime(2024, 2, 28, 23, 30)
KINDS = [('STEIM1', np.int32), ('STEIM2', np.int32), ('INT32', np.int32), ('FLOAT32', np.float32),
         ('FLOAT64', np.float64)]
LENGTHS = [256, 512, 1024, 4096]


@lru_cache(maxsize=64)
def written(kind=1, length=512, order='>', seconds=60, later=0, seed=0):
    "Bytes of a file of three channels, and their samples"
    import io
    rng, (encoding, dtype) = np.random.default_rng(seed), KINDS[kind]
    stream = Stream([Trace((1e3*rng.standard_normal(seconds*100)).astype(dtype), dict(
        network='XX', station='ABC', location='00', channel=f'HH{c}', sampling_rate=100.,
        starttime=T0 + later)) for c in 'ZNE'])
    out = io.BytesIO()
    stream.write(out, format='MSEED', encoding=encoding, reclen=length, byteorder=order)
    return out.getvalue(), stream


def used(path):
    "The whole record, Z N E, its first time, and what was left out"
    archive = open_archive(path)
    if not archive.instruments: return None, None, archive
    instrument, = archive.instruments
    spans = instrument.spans()
    return [instrument.read(s, 0, s.count) for s in spans], [s.start for s in spans], archive


def only_true_samples(path, streams):
    "Each sample that is read is one that was recorded at that time; how many there are"
    parts, starts, archive = used(path)
    count = 0
    for x, start in zip(parts or [], starts or []):
        true = np.full(x.shape, np.nan)
        for stream in streams:
            for k, tr in enumerate(stream):
                i = round((tr.stats.starttime.ns - start)/1e7)
                a, b = max(0, i), min(len(x), i + tr.stats.npts)
                if a < b: true[a:b, k] = tr.data[a - i:b - i]
        there = ~np.isnan(x)
        np.testing.assert_array_equal(x[there], true[there])
        count += int(there.sum())
    return count, archive


files = st.tuples(st.integers(0, len(KINDS) - 1), st.sampled_from(LENGTHS), st.sampled_from('><'))
# bytes of the last record that are left: each part of its header, one by one, and anything behind
# it
left = st.one_of(st.integers(1, 64), st.integers(65, 127), st.integers(128, 4095),
                 st.sampled_from([-1, -8, -64]))


@settings(max_examples=150, deadline=None)
@given(files, left, st.integers(1, 5))
def test_a_cut_inside_a_record_is_named(tmp_path_factory, how, part, before):
    whole, stream = written(*how)
    length, path = how[1], tmp_path_factory.mktemp('cut')/'day.mseed'
    part = part % length or 1
    size = len(whole) - before*length + part
    path.write_bytes(whole[:size])
    known = length if part >= 56 else 0                  # the byte with the length is the 55th
    cut, = cuts = cut_records(path)
    assert cut == Cut(size - part, part, cut.length) and cut.length in (known, length)
    assert known == 0 or cut.length == length
    count, archive = only_true_samples(path, [stream])
    assert archive.left_out == {str(path): cut_sentence(cuts, size)}
    path.write_bytes(whole[:size - part])                # the same without the part of a record
    assert cut_records(path) == [] and only_true_samples(path, [stream])[0] == count > 0


@settings(max_examples=100, deadline=None)
@given(files, files, left, st.integers(1, 5), st.booleans())
def test_a_cut_with_more_behind_it_is_named_and_no_sample_is_made_up(tmp_path_factory, how, other,
                                                                     part, before, twice):
    (a, first), (b, second) = written(*how), written(*other, later=60, seed=1)
    length, path = how[1], tmp_path_factory.mktemp('cut')/'day.mseed'
    part = part % length or 1
    size = len(a) - before*length + part
    again = b[:-other[1] + 100] if twice else b
    path.write_bytes(a[:size] + again)
    cuts = cut_records(path)
    assert [c[:2] for c in cuts] == [(size - part, part)] + [(size + len(again) - 100, 100)]*twice
    count, archive = only_true_samples(path, [first, second])
    assert archive.left_out == {str(path): cut_sentence(cuts, size + len(again))}
    path.write_bytes(a[:size - part] + again[:len(again) - 100*twice])
    assert only_true_samples(path, [first, second])[0] == count


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(files, st.sampled_from([0, 0, 1, 64, 128, 511, 512, 5000]),
                          st.sampled_from([b'\0', b' '])), min_size=1, max_size=4))
def test_a_whole_file_is_never_named(tmp_path_factory, parts):
    """Records of any lengths one after another, with zeros or blanks, or empty records, between
    them or at the end"""
    path = tmp_path_factory.mktemp('whole')/'day.mseed'
    path.write_bytes(b''.join(written(*how, later=60*k, seed=k)[0] + fill*n for k,
                              (how, n, fill) in enumerate(parts)))
    assert cut_records(path) == [] and open_archive(path).left_out == {}


def test_records_of_obspy_are_not_named():
    "All but one, in which records do lie over one another"
    folder = Path(obspy.__file__).parent/'io/mseed/tests/data'
    files = [f for f in map(Path, glob(f'{folder}/**', recursive=True)) if f.is_file()
             and format_of(f) == 'MSEED']
    if not files: pytest.skip('ObsPy was installed without its test data')
    assert {f.name for f in files if cut_records(f)} <= {'infinite-loop.mseed'}


def test_records_of_obspy_that_are_cut_are_named(tmp_path):
    "Each of its files that has records of one length only"
    folder, number = Path(obspy.__file__).parent/'io/mseed/tests/data', 0
    for file in map(Path, sorted(glob(f'{folder}/**', recursive=True))):
        if not file.is_file() or format_of(file) != 'MSEED': continue
        data = file.read_bytes()
        length = record_length(data[:128])
        if not length or len(data) % length or len(data) < 2*length: continue
        if any(record_length(data[k:k + 128]) != length for k in range(0, len(data), length)):
            continue
        for lost in (1, 64, length//2):
            path = tmp_path/'cut.mseed'
            path.write_bytes(data[:-lost])
            assert cut_records(path) == [Cut(len(data) - length, length - lost, length)], file
        number += 1
    assert number > 20 or not folder.exists()


def test_noise_records_are_padding(tmp_path):
    data, path = written()[0], tmp_path/'day.mseed'
    empty = b'000009 ' + b' '*505
    path.write_bytes(data[:1024] + empty + data[1024:] + empty[:128])
    assert cut_records(path) == []


def test_samples_that_look_like_a_header_are_none(tmp_path):
    "Zeros and the number 0x4400 are the bytes of an empty record number and of quality D"
    x = np.zeros(6000, np.int32)
    x[1::2] = 0x4400
    path = tmp_path/'day.mseed'
    Stream([Trace(x, dict(station='ABC', channel='HHZ', sampling_rate=100.))]).write(
        str(path), format='MSEED', encoding='INT32', reclen=512)
    size = path.stat().st_size
    os.truncate(path, size - 12)
    assert cut_records(path) == [Cut(size - 512, 500, 512)]


def test_a_large_file_is_read_in_blocks_around_its_cuts(tmp_path):
    data, stream = written(3, 512, '>', seconds=3600)
    path, size = tmp_path/'day.mseed', 2*len(data) - 300 - 100
    path.write_bytes(data[:-300] + data[:-100])
    cuts = cut_records(path)
    assert cuts == [Cut(len(data) - 512, 212, 512), Cut(size - 412, 412, 512)]
    blocks = blocks_of(str(path), 'MSEED', cuts)
    assert len(blocks) > 8 and all(0 < b.length <= BLOCK for b in blocks)
    at = 0
    for b in blocks:                                     # all bytes but those of the cut records
        at += sum(c.there for c in cuts if c.first == at)
        assert b.first == at
        at += b.length
    assert at == cuts[-1].first
    assert blocks_of(str(path), 'MSEED', cuts)[0] == (str(path), 'MSEED', 0, BLOCK)
    assert only_true_samples(path, [stream])[0] > 3*359_000


def test_a_small_file_is_one_block(tmp_path):
    "Read as a whole up to the size of a block, and in parts from there on"
    path, data = tmp_path/'day.mseed', written(3, 512, '>', seconds=600)[0]
    for size, number in ((512, 1), (BLOCK - 512, 1), (BLOCK, 1), (BLOCK + 512, 2)):
        path.write_bytes((data*(size//len(data) + 1))[:size])
        blocks = blocks_of(str(path), 'MSEED')
        assert (len(blocks) == number
                and (blocks == [(str(path), 'MSEED', 0, -1)]) == (size <= BLOCK))


@pytest.mark.parametrize('size, says', [(300, 'its only record is cut off (300 of 512 bytes)'),
                                        (50, 'damaged MSEED'), (6, 'no waveform format')])
def test_a_file_without_a_whole_record(size, says, tmp_path):
    path = tmp_path/'day.mseed'
    path.write_bytes(written()[0][:size])
    archive = open_archive(path)
    assert not archive.instruments and says in archive.left_out[str(path)]


def test_commands_say_it(tmp_path, capsys, monkeypatch):
    "inspect, pack, embed and pick: what is left is used, and the exit code is 0"
    from seismodel.models.encoders import BidirAutoregConfig
    from seismodel.models.pretraining import ReconstructionConfig, build
    monkeypatch.chdir(tmp_path)
    Path('data').mkdir()
    data = written(1, 512, '>', seconds=120)[0]
    Path('data/day.mseed').write_bytes(data[:-512 + 300])
    says = 'the last record is cut off (300 of 512 bytes); the samples before it are used'
    build(ReconstructionConfig(BidirAutoregConfig(d_model=8), blocks=1, ff=1.)).save_pretrained(
        'run')
    assert main(['inspect', 'data', '--out', 'page.png']) == 0 and says in capsys.readouterr().out
    assert main(['pack', 'data', '--out', 'store']) == 0
    assert (says in Path('store/left_out.csv').read_text(encoding='utf-8')
            and says in capsys.readouterr().out)
    assert main(['embed', 'run', 'data', '--device', 'cpu', '--out', 'a.npz']) == 0
    assert f"left out: {Path('data/day.mseed')}: {says}" in capsys.readouterr().err
    assert (main(['pick', 'data', '--model', 'tiny-picker', '--device', 'cpu', '--out', 'picks'])
            == 0)
    assert f"left out: {Path('data/day.mseed')}: {says}" in capsys.readouterr().err
    assert says in Path('picks/left_out.csv').read_text(encoding='utf-8')


@pytest.mark.parametrize('number, equal', [(b'000002', True), (b'00000A', False)])
def test_the_number_of_a_record_has_digits_alone(number, equal, tmp_path):
    whole = written()[0]
    (tmp_path/'x.mseed').write_bytes(whole[:512] + number + whole[518:])
    with open(tmp_path/'x.mseed', 'rb') as f: assert _equal_records(f, len(whole)) == equal

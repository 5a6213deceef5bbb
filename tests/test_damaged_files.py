"""Files that other commands of ours left: a damaged one is named in a sentence, or made again where
that is possible"""
import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.build_dataset import read_existing
from seismodel.data.catalogue import read_catalogue
from seismodel.data.inspection import inspect
from seismodel.data.sources import open_folder
from seismodel.data.waveform import read_waveform
from seismodel.finetuning.calibration import store_calibration
from seismodel.files import read_table, row_fault
from seismodel.picking.evaluation import read_targets
from seismodel.picking.output import PICK_COLUMNS, read_picks
from seismodel.picking.pick import _result
from seismodel.study.arrays import analyst_rows, write_continuous
from seismodel.study.fold_report import read_reports
from seismodel.study.fold_trial import record_baseline
from seismodel.study.paired import read_onsets
from seismodel.study.tables import results
from seismodel.study.trial import refuse_others
from seismodel.training.settings import read_field_file

WRONG = [b'', b'[1]', b'{"cell": 3}', b'{', b'\xff\xfe', b'['*20_000]


@pytest.mark.parametrize('content', WRONG)
def test_json(content, tmp_path):
    "Settings of a trial, of a picker, of a file by hand"
    (tmp_path/'config.json').write_bytes(content)
    with pytest.raises(UserError, match='config.json'):
        refuse_others(tmp_path, {'cell': {}, 'train': {}})
    if b'cell' not in content:
        with pytest.raises(UserError, match='config.json'): store_calibration(tmp_path, {}, {})
    with pytest.raises(UserError, match='config.json'): read_field_file(tmp_path/'config.json')


GOOD = dict(picks=[dict(network='XX', station='ABC', location='', instrument='HH', phase='P',
                        time='2024-01-01T00:00:00Z')], notes=[], samples=5)


@pytest.mark.parametrize('change', [None, {'picks': 3}, {'picks': [3]}, {'picks': [{'phase': 'P'}]},
                                    {'samples': 'x'}, {'notes': {}}])
def test_the_result_of_a_day_that_is_damaged_is_made_again(change, tmp_path):
    file = tmp_path/'day.json'
    assert _result(file) is None
    file.write_text(json.dumps(GOOD), encoding='utf-8')
    assert _result(file) == GOOD
    text = json.dumps(GOOD | change) if change else json.dumps(GOOD)[:-5]
    file.write_text(text, encoding='utf-8')
    assert _result(file) is None


def table(file, /, **columns):
    pd.DataFrame(columns).to_csv(file, index=False)
    return file


def test_onsets(tmp_path):
    file = tmp_path/'onsets.csv.gz'
    row = dict(record=0, event='e', method='a', fraction=.1, seed=0, fold=0, phase='p',
               status='manual', residual_0=.1, p_0=.5)
    assert len(read_onsets(table(file, **{k: [v] for k, v in row.items()}))) == 1
    for column in ('fraction', 'residual_0', 'p_0'):
        with pytest.raises(UserError, match=f"column '{column}' has 'x' in row 2"):
            read_onsets(table(file, **{k: [v, 'x' if k == column else v] for k, v in row.items()}))
    whole = table(file, **{k: [v]*500 for k, v in row.items()}).read_bytes()
    for content in (whole[:60], b'', b'\xff\xfe\x00', whole[:50] + b'\x00\x00\x00\x00'
                    + whole[54:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match='onsets.csv.gz'): read_onsets(file)
    file.unlink()
    with pytest.raises(UserError, match='cannot be read'): read_onsets(file)


def test_picks(tmp_path):
    row = (dict.fromkeys(PICK_COLUMNS, '')
           | dict(network='01', location='00', phase='P', epoch='1.5', probability='.5',
                  uncertainty='', clipped='False'))
    found = read_picks(table(tmp_path/'picks.csv', **{k: [v] for k, v in row.items()}))
    assert (found.epoch[0] == 1.5 and np.isnan(found.uncertainty[0]) and found.network[0] == '01'
            and found.location[0] == '00' and found.station[0] == '')
    with pytest.raises(UserError, match="column 'probability' has 'x' in row 1"):
        read_picks(table(tmp_path/'picks.csv',
                         **{k: [v] for k, v in (row | dict(probability='x')).items()}))
    with pytest.raises(UserError, match="no column 'phase'"):
        read_picks(table(tmp_path/'picks.csv', **{k: [v] for k, v in row.items() if k != 'phase'}))


def test_targets(tmp_path):
    data = pd.DataFrame(dict(trace_name=['t'], trace_chunk=['']))
    row = dict(start_sample=[0], end_sample=[9], trace_name=['t'], trace_split=['dev'],
               trace_type=['noise'])
    read_targets(table(tmp_path/'task1.csv', **row), data.assign(trace_chunk=''))
    with pytest.raises(UserError, match="'start_sample' has 'x' in row 1"):
        read_targets(table(tmp_path/'task1.csv', **row | dict(start_sample=['x'])), data)
    with pytest.raises(UserError, match="no column 'trace_type'"):
        read_targets(table(tmp_path/'task1.csv',
                           **{k: v for k, v in row.items() if k != 'trace_type'}), data)


def test_a_data_set_that_is_added_to(tmp_path):
    row = dict(trace_name=['t'], split=['dev'], trace_start_time=['2024-01-01T00:00:00Z'],
               trace_npts=['9'], station_network_code=['XX'], station_code=['A'])
    file = tmp_path/'metadata_001.csv'
    table(file, **row)
    assert read_existing(tmp_path, ['001']).names == {'t'}
    for column, value in (('trace_start_time', 'x'), ('trace_npts', ''), ('trace_npts', '9.5')):
        table(file, **row | {column: [value]})
        with pytest.raises(UserError,
                           match=r"metadata_001.csv': row 1 cannot be read .*name another --out"):
            read_existing(tmp_path, ['001'])
    table(file, **{k: v for k, v in row.items() if k != 'split'})
    with pytest.raises(UserError, match="no column 'split'"): read_existing(tmp_path, ['001'])


def test_an_empty_word_is_too_much(capsys):
    with pytest.raises(SystemExit) as e: main(['pretrain', '', '--steps', '1'])
    assert e.value.code == 2
    assert "'' is too much; 'seismodel pretrain --help'" in capsys.readouterr().err


TABLE = ('name,time,residual\r\n"a, b",2024-01-01,0.25\r\n"two\nlines",2024-01-02,-1.5\r\n'
         '"the ""last""",2024-01-03,12.75\r\n')


def test_a_table_cut_at_any_byte(tmp_path):
    """Inside a row: refused with its line. What looks whole, at the end of a line and inside the
    last field, cannot be told"""
    for name, packed in (('t.csv', bytes), ('t.csv.gz', gzip.compress)):
        file, whole = tmp_path/name, TABLE.encode()
        # of rows
        starts = [0, *(k for k in range(len(whole)) if whole[:k].endswith(b'\r\n')), len(whole)]
        lines = [1, 2, 3, 5]
        for cut in range(1, len(whole) + 1):
            file.write_bytes(packed(whole[:cut]))
            row = sum(cut > k for k in starts) - 1
            part = whole[starts[row]:cut].decode()
            fields = part.replace('"a, b"', 'x').count(',') + 1 if part.count('"') % 2 == 0 else 0
            fault = row_fault(file)
            if row == 0 or fields == 3:
                assert fault == ''
                continue
            assert f'in line {lines[row]}' in fault and ('quote' in fault) == (fields == 0), (
                cut, part, fault)
            said = f"{name}' has .* line {lines[row]}.*probably cut off; copy it"
            with pytest.raises(UserError, match=said):
                read_table(file, cure='copy it')


@pytest.mark.parametrize('text, says', [
    ('a,b\n1,2\n3\n4,5\n', 'has 1 field in line 3 and 2 in its header'),
    ('a,b\n1,2,3\n4,5,6\n', 'has 3 fields in line 2 and 2 in its header'),
    ('a,b\n\n1,2\n  \n3,4,\n5,6\n', 'has 3 fields in line 5 and 2 in its header'),
    ('a,b\n1,"2\n3,4\n5,6\n', 'a quote in line 2 that does not end'),
    ('a,b\n1,"' + 'x'*200_000, 'a quote in line 2 that does not end'),
    ('\ufeff"a, b",c\n1,2\n', ''), ('a,b\n1,2', ''), ('a,b\n1,5" pipe\n\n', ''), ('a,b\n,\n', '')])
def test_rows(text, says, tmp_path):
    file = tmp_path/'t.csv'
    file.write_text(text, encoding='utf-8', newline='')
    fault = row_fault(file)
    assert says in fault and bool(says) == bool(fault)
    # more rows follow the others
    assert ('cut off' in fault) == ('quote' in says)


def test_tables_of_a_study_with_several_headers(tmp_path):
    columns = pd.MultiIndex.from_tuples([('a', .1, 0), ('b', 1., 1)],
                                        names=['method', 'fraction', 'seed'])
    index = pd.MultiIndex.from_tuples([('d', 't1', 'e', 'P', 'p'), ('d', 't2', 'e', 'P', 'p')])
    from seismodel.study.tables import RECORD_COLUMNS
    index = pd.MultiIndex.from_tuples([t[:len(RECORD_COLUMNS)] for t in index],
                                      names=RECORD_COLUMNS)
    file = tmp_path/'wide.csv'
    pd.DataFrame([[.1, .2], [.3, .4]], index, columns).to_csv(file)
    assert results(file).shape == (2, 2)
    file.write_text(file.read_text(encoding='utf-8')[:-6], encoding='utf-8')
    with pytest.raises(UserError, match='line 6, .*cut off; write it again'): results(file)


def cut_row(file, fields=2):
    "Cut a table inside its last row, so that it has so many fields"
    text = file.read_text(encoding='utf-8').rstrip('\n')
    start = text.rindex('\n') + 1
    file.write_text(text[:start] + ','.join(text[start:].split(',')[:fields])[:-1],
                    encoding='utf-8')
    return text.count('\n') + 1


def test_tables_of_picks(tmp_path):
    "One that is cut is left out with its line, and is refused where there is no other"
    good, cut = tmp_path/'a.csv', tmp_path/'b.csv'
    for file in (good, cut):
        file.write_text(
            'network,station,phase,time\nXX,A,P,2024-01-01T00:00:01\nXX,A,S,2024-01-01T00:00:09\n',
            encoding='utf-8')
    assert cut_row(cut, 3) == 3
    with pytest.raises(UserError,
                       match=r'No pick in .* can be read; .*b.csv has 3 fields in line 3, where '
                             r'it ends, and 4 in its header: it was probably cut off'):
        read_catalogue([cut])
    catalogue = read_catalogue([good, cut])
    assert len(catalogue.picks) == 2 and 'line 3' in catalogue.left_out[str(cut)]


def test_reports_and_targets(tmp_path):
    pd.DataFrame(dict(method=['a', 'b'], seed=[0, 1], residual=[.5, .25])).to_csv(
        tmp_path/'folds_scores.csv', index=False)
    assert len(read_reports(tmp_path)['scores']) == 2
    cut_row(tmp_path/'folds_scores.csv')
    with pytest.raises(UserError, match=r"folds_scores.csv' has 2 fields in line 3, .* and 3"):
        read_reports(tmp_path)


CALLS = ['evaluate tiny-picker --data {}',
         'pretrain --preset spectrum-tiny --data {} --steps 1 --out new',
         'finetune --from tiny --data {} --steps 1 --out new',
         'pack {} --out new', 'inspect {}', 'embed tiny {} --out new.npz',
         'dataset {} --waveforms archive --out new', 'study --from a=tiny --data {} --out new',
         'study --folds 2 --data {} --unlabelled {} --only prepare --out new']


@pytest.mark.parametrize('call', CALLS)
def test_each_command_refuses_a_data_set_that_is_cut(call, quakes_folder, tmp_path, monkeypatch,
                                                     capsys):
    "The table inside its last row; the HDF5 file anywhere"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'archive').mkdir()
    (tmp_path/'archive/a.mseed').write_bytes(MSEED)
    table, waves = quakes_folder/'metadata.csv', quakes_folder/'waveforms.hdf5'
    whole = table.read_bytes()
    for last in (2, 8):
        table.write_bytes(whole)
        line = cut_row(table, last)
        said = sentence(call, capsys)
        assert 'metadata.csv' in said, said
        assert f'has {last} fields in line {line}, where it ends, and' in said, said
    table.write_bytes(whole)
    if call.startswith('dataset'): return                                  # reads the table alone
    for size in (0, 100, waves.stat().st_size//2, waves.stat().st_size - 1):
        with open(waves, 'r+b') as f: f.truncate(size)
        said = sentence(call, capsys)
        assert 'waveforms.hdf5 is not a readable HDF5 file' in said, said


def sentence(call, capsys):
    "The one line that a command which is refused says"
    capsys.readouterr()
    assert main([w.format('quakes') for w in call.split()]) == 2
    out, err = capsys.readouterr()
    line, = err.strip().splitlines()
    return line


def test_a_chunk_that_is_cut(quakes_folder):
    for name in ('metadata.csv', 'waveforms.hdf5'):
        file = quakes_folder/name
        for chunk in ('_1', '_2'):
            shutil.copy(file, quakes_folder/f'{file.stem}{chunk}{file.suffix}')
        file.unlink()
    assert len(open_folder(quakes_folder)) == 96
    line = cut_row(quakes_folder/'metadata_2.csv', 3)
    with pytest.raises(UserError,
                       match=f"metadata_2.csv' has 3 fields in line {line}, .*copy it again"):
        open_folder(quakes_folder)


def miniseed():
    "Three components, the last record of E cut off"
    import io
    import obspy
    f = io.BytesIO()
    stream = obspy.read()
    for tr in stream: tr.data = np.tile(tr.data, 5)
    stream.write(f, format='MSEED', reclen=512)
    return f.getvalue()[:-100]


MSEED = miniseed()


@pytest.fixture
def cut_day(tmp_path):
    (tmp_path/'day.mseed').write_bytes(MSEED)
    return tmp_path/'day.mseed'


def warned(caplog, file):
    "The warnings that name a file"
    return [r.getMessage() for r in caplog.records if r.levelname == 'WARNING'
            and str(file) in r.getMessage()]


def test_read_waveform_names_the_record_that_is_cut_off(cut_day, caplog):
    assert read_waveform(cut_day).components == 'ZNE'
    said, = warned(caplog, cut_day)
    assert 'the last record is cut off (412 of 512 bytes)' in said


def test_continuous_data_of_a_study(cut_day, tmp_path, caplog):
    "What is left out is named; nothing that can be used is a sentence"
    write_continuous(tmp_path, [str(cut_day)])
    said, = warned(caplog, cut_day)
    assert 'the last record is cut off' in said
    (tmp_path/'notes.txt').write_text('x', encoding='utf-8')
    with pytest.raises(UserError, match='No file of .*notes.txt can be used'):
        write_continuous(tmp_path, [str(tmp_path/'notes.txt')])
    (tmp_path/'picks').mkdir()
    for name in 'ab':
        (tmp_path/f'picks/{name}.csv').write_text(
            'network,station,phase,time\nBW,RJOB,P,2009-08-24T00:20:10\nBW,RJOB,S',
            encoding='utf-8')
    (tmp_path/'picks/a.csv').write_text(
        'network,station,phase,time\nBW,RJOB,P,2009-08-24T00:20:10\n', encoding='utf-8')
    assert len(analyst_rows(np.load(tmp_path/'continuous-table.npy'), tmp_path/'picks')) == 1
    said, = warned(caplog, tmp_path/'picks/b.csv')
    assert 'line 3' in said


def test_inspect_names_the_file(cut_day, quakes_folder, tmp_path, capsys):
    inspect([str(cut_day)], out=tmp_path/'page.png')
    line, = [line for line in capsys.readouterr().out.splitlines() if 'cut off' in line]
    assert f'({cut_day})' in line


@pytest.mark.parametrize('content, says', [('{"model_args": {', 'is not valid JSON'),
                                           ('[]', 'holds no object'), (
    '{"model_args": {"phases": 3}}', 'holds no PhaseNet'), ('{}', 'holds no PhaseNet')])
def test_a_published_picker_that_is_damaged(content, says, tmp_path):
    (tmp_path/'net.json.v1').write_text(content, encoding='utf-8')
    (tmp_path/'net.pt.v1').write_bytes(b'cut')
    with pytest.raises(UserError, match=f'net.*{says}'):
        record_baseline(tmp_path, 'x', str(tmp_path/'net'))

"Files that other commands of ours left: a damaged one is named in a sentence, or made again where that is possible"
import json

import numpy as np
import pandas as pd
import pytest

from seismodel.cli import main
from seismodel.core import UserError
from seismodel.data.build_dataset import read_existing
from seismodel.finetuning.calibration import store_calibration
from seismodel.picking.evaluation import read_targets
from seismodel.picking.output import PICK_COLUMNS, read_picks
from seismodel.picking.pick import _result
from seismodel.study.paired import read_onsets
from seismodel.study.trial import refuse_others
from seismodel.training.settings import read_field_file

WRONG = [b'', b'[1]', b'{"cell": 3}', b'{', b'\xff\xfe', b'['*20_000]


@pytest.mark.parametrize('content', WRONG)
def test_json(content, tmp_path):
    "Settings of a trial, of a picker, of a file by hand"
    (tmp_path/'config.json').write_bytes(content)
    with pytest.raises(UserError, match='config.json'): refuse_others(tmp_path, {'cell': {}, 'train': {}})
    if b'cell' not in content:
        with pytest.raises(UserError, match='config.json'): store_calibration(tmp_path, {}, {})
    with pytest.raises(UserError, match='config.json'): read_field_file(tmp_path/'config.json')


GOOD = dict(picks=[dict(network='XX', station='ABC', location='', instrument='HH', phase='P', time='2024-01-01T00:00:00Z')], notes=[], samples=5)


@pytest.mark.parametrize('change', [None, {'picks': 3}, {'picks': [3]}, {'picks': [{'phase': 'P'}]}, {'samples': 'x'}, {'notes': {}}])
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
    row = dict(record=0, event='e', method='a', fraction=.1, seed=0, fold=0, phase='p', status='manual', residual_0=.1, p_0=.5)
    assert len(read_onsets(table(file, **{k: [v] for k, v in row.items()}))) == 1
    for column in ('fraction', 'residual_0', 'p_0'):
        with pytest.raises(UserError, match=f"column '{column}' has 'x' in row 2"):
            read_onsets(table(file, **{k: [v, 'x' if k == column else v] for k, v in row.items()}))
    whole = table(file, **{k: [v]*500 for k, v in row.items()}).read_bytes()
    for content in (whole[:60], b'', b'\xff\xfe\x00', whole[:50] + b'\x00\x00\x00\x00' + whole[54:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match='onsets.csv.gz'): read_onsets(file)
    file.unlink()
    with pytest.raises(UserError, match='cannot be read'): read_onsets(file)


def test_picks(tmp_path):
    row = dict.fromkeys(PICK_COLUMNS, '') | dict(network='01', location='00', phase='P', epoch='1.5', probability='.5', uncertainty='', clipped='False')
    found = read_picks(table(tmp_path/'picks.csv', **{k: [v] for k, v in row.items()}))
    assert found.epoch[0] == 1.5 and np.isnan(found.uncertainty[0]) and found.network[0] == '01' and found.location[0] == '00' and found.station[0] == ''
    with pytest.raises(UserError, match="column 'probability' has 'x' in row 1"): read_picks(table(tmp_path/'picks.csv', **{k: [v] for k, v in (row | dict(probability='x')).items()}))
    with pytest.raises(UserError, match="no column 'phase'"): read_picks(table(tmp_path/'picks.csv', **{k: [v] for k, v in row.items() if k != 'phase'}))


def test_targets(tmp_path):
    data = pd.DataFrame(dict(trace_name=['t'], trace_chunk=['']))
    row = dict(start_sample=[0], end_sample=[9], trace_name=['t'], trace_split=['dev'], trace_type=['noise'])
    read_targets(table(tmp_path/'task1.csv', **row), data.assign(trace_chunk=''))
    with pytest.raises(UserError, match="'start_sample' has 'x' in row 1"): read_targets(table(tmp_path/'task1.csv', **row | dict(start_sample=['x'])), data)
    with pytest.raises(UserError, match="no column 'trace_type'"): read_targets(table(tmp_path/'task1.csv', **{k: v for k, v in row.items() if k != 'trace_type'}), data)


def test_a_data_set_that_is_added_to(tmp_path):
    row = dict(trace_name=['t'], split=['dev'], trace_start_time=['2024-01-01T00:00:00Z'], trace_npts=['9'], station_network_code=['XX'], station_code=['A'])
    file = tmp_path/'metadata_001.csv'
    table(file, **row)
    assert read_existing(tmp_path, ['001']).names == {'t'}
    for column, value in (('trace_start_time', 'x'), ('trace_npts', ''), ('trace_npts', '9.5')):
        table(file, **row | {column: [value]})
        with pytest.raises(UserError, match=r"metadata_001.csv': row 1 cannot be read .*name another --out"): read_existing(tmp_path, ['001'])
    table(file, **{k: v for k, v in row.items() if k != 'split'})
    with pytest.raises(UserError, match="no column 'split'"): read_existing(tmp_path, ['001'])


def test_an_empty_word_is_too_much(capsys):
    with pytest.raises(SystemExit) as e: main(['pretrain', '', '--steps', '1'])
    assert e.value.code == 2
    assert "'' is too much; 'seismodel pretrain --help'" in capsys.readouterr().err

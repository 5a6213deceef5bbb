"Models that come with the package: names, cards, files for SeisBench, and golden picks"
import json
import logging
import re
import sys
from pathlib import Path

import obspy
import pandas as pd
import pytest
import seisbench
import torch
from conftest import root

import seismodel
from seismodel.cli import main
from seismodel.core import UserError
from seismodel.finetuning.finetune import fine_plan, start_model
from seismodel.finetuning.heads import Picker
from seismodel.models import box
from seismodel.models.box import BOX, best_picker, box_models, in_box, model_card, model_folder
from seismodel.models.pretraining import build, from_pretrained, preset, read_config
from seismodel.picking.output import read_picks
from seismodel.picking.pick import weights_checksum
from seismodel.picking.seisbench_model import SeisModelPicker, open_picker
from seismodel.study.trial import candidates_of

sys.path.insert(0, str(root/'scripts'))
import build_box   # noqa: E402
import golden_picks   # noqa: E402

PICKERS = [name for name in box_models() if name.endswith('picker')]


@pytest.fixture
def folder_named_tiny(tmp_path, monkeypatch):
    "A working directory with a model in the folder `tiny`, which is not the one of the box"
    monkeypatch.chdir(tmp_path)
    box._say_both.cache_clear()
    build(preset('reconstruction-tiny').model).save_pretrained('tiny')
    return tmp_path


def test_a_word_is_the_box_and_a_slash_is_a_folder(folder_named_tiny, caplog):
    said = ('tiny', './tiny', Path('tiny'), str(folder_named_tiny/'tiny'), 'tiny')
    with caplog.at_level(logging.WARNING, 'seismodel'):
        methods = [from_pretrained(where).config.method for where in said]
    assert methods == ['masked', 'reconstruction', 'reconstruction', 'reconstruction', 'masked']
    warning = ("'tiny' is the model of that name that comes with seismodel; "
               "the folder here is './tiny'.")
    assert [r.getMessage() for r in caplog.records] == [warning]      # once
    assert in_box('tiny') and not in_box('./tiny') and not in_box('contrastive-tiny')
    assert model_folder('runs/x') == Path('runs/x')


def test_fine_tuning_starts_from_the_box(folder_named_tiny):
    plan = fine_plan(from_run='tiny', data=['synthetic'])
    assert plan['from'] == 'tiny'
    assert fine_plan(from_run='./tiny', data=['synthetic'])['from'] == str(folder_named_tiny/'tiny')
    start, own = start_model('tiny'), from_pretrained(BOX/'tiny')
    assert all(torch.equal(w, own.state_dict()[k]) for k, w in start.state_dict().items())
    pair = candidates_of(['tiny'], None)
    assert [c.name for c in pair] == ['tiny', 'tiny-random'] and Path(pair[0].source) == BOX/'tiny'


def test_each_opener_takes_names():
    opened = {name: seismodel.load(name) for name in box_models()}
    assert {name for name, model in opened.items() if type(model) is Picker} == set(PICKERS)
    assert not any(model.training for model in opened.values())
    ours, other = SeisModelPicker.from_pretrained('tiny-picker'), open_picker('tiny-picker')
    assert ours.default_args == other.default_args == read_config('tiny-picker')['default_args']
    assert ({'P_threshold', 'S_threshold', 'P_uncertainty', 'S_uncertainty'}
            == set(ours.default_args))
    wrong = ('tiny', 'seismodel finetune --from tiny'), ('huge', r'not in the box \(.*tiny-picker')
    for name, says in wrong:
        with pytest.raises(UserError, match=says): SeisModelPicker.from_pretrained(name)
    with pytest.raises(UserError, match='holds a fine-tuned model'): from_pretrained('tiny-picker')


def test_pick_needs_no_model(tmp_path, capsys):
    obspy.read().write(str(tmp_path/'a.mseed'), format='MSEED')
    words = ['pick', str(tmp_path/'a.mseed'), '--device', 'cpu', '--out']
    assert main([*words, str(tmp_path/'one')]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f'picker {best_picker()}, which comes with seismodel')
    assert 'not calibrated' not in said.err
    assert main([*words, str(tmp_path/'two'), '--model', best_picker()]) == 0
    assert 'which comes with seismodel' not in capsys.readouterr().out
    one, two = (read_picks(tmp_path/f'{k}/picks.csv') for k in ('one', 'two'))
    assert len(one) and one.drop(columns='file').equals(two.drop(columns='file'))
    settings = json.loads((tmp_path/'one/settings.json').read_text(encoding='utf-8'))
    assert settings['weights'] == weights_checksum(SeisModelPicker.from_pretrained(best_picker()))


def test_the_best_picker(monkeypatch):
    for there in (('tiny', 'tiny-picker'), ('small-picker', 'tiny', 'tiny-picker')):
        monkeypatch.setattr(box, 'box_models', lambda there=there: there)
        assert box.best_picker() == ('small-picker' if 'small-picker' in there else 'tiny-picker')
    monkeypatch.setattr(box, 'box_models', lambda: ('tiny',))
    with pytest.raises(UserError, match='--model FOLDER'): box.best_picker()


@pytest.mark.parametrize('name', PICKERS)
def test_files_for_seisbench(name, tmp_path, monkeypatch):
    """to_seisbench writes the pair that SeisBench finds in its cache by name, with weights and
    default arguments"""
    monkeypatch.setattr(seisbench, 'cache_model_root', tmp_path)
    monkeypatch.setattr(seisbench.util, 'ls_webdav', lambda *a: pytest.fail('asked the network'))
    net = SeisModelPicker.from_pretrained(name)
    files = net.to_seisbench(tmp_path/'seismodelpicker', 'alps')
    assert sorted((tmp_path/'seismodelpicker').iterdir()) == sorted(files)
    assert [f.name for f in files] == ['alps.json.v1', 'alps.pt.v1']
    again = SeisModelPicker.from_pretrained('alps')
    assert again.default_args == net.default_args
    assert weights_checksum(again) == weights_checksum(net)


def test_info_lists_the_box_and_shows_cards(capsys):
    assert main(['info']) == 0
    said = capsys.readouterr().out
    for name in ('tiny', 'tiny-picker'):
        assert re.search(rf'^{name} +0\.\d+ M parameters', said, re.M)
    assert 'contrastive-tiny' in said
    assert main(['info', 'tiny-picker', 'tiny']) == 0
    said = capsys.readouterr().out
    parts = ('tiny-picker\n', 'ncedc_phasenet', 'left out:', 'swchina_tlpn', '95 % intervals',
             'not for:')
    for part in parts: assert part in said, part


@pytest.mark.parametrize('name', box_models())
def test_cards(name):
    """Every source has a licence and may be used, scores have intervals, and no file has a path in
    it"""
    card, config = model_card(name), (BOX/name/'config.json').read_text(encoding='utf-8')
    used = [row for title, rows in card.items() if 'on, with' in title for row in rows]
    for row in used:
        assert row['licence'] and 'none' not in row['licence'] and row['repository'], row
    left = {row['source'] for row in card['left out']}
    assert used and {'swchina_tlpn', 'ok_2013', 'sc_pnsn'} <= left - {row['source'] for row in used}
    assert not re.search(r'"/|/(home|root|tmp|work|mnt)/|_model_sample', config)
    if name not in PICKERS: return
    scores = pd.DataFrame(read_config(name)['scores'])
    assert ((0 <= scores.low) & (scores.low <= scores.value) & (scores.value <= scores.high)).all()
    assert scores.high.max() <= 1
    assert {'P', 'S', 'noise'} == set(scores[scores.records == 'all test records'].kind)


def test_the_box_is_small():
    files = list(BOX.glob('*/*'))
    assert sum(f.stat().st_size for f in files) < 20e6
    assert {f.name for f in files} == {'config.json', 'model.safetensors'}


def test_what_may_be_trained_on(tmp_path, quakes_folder):
    "No licence, picks of other pickers: left out, with a reason; test stays whole"
    table = pd.read_csv(quakes_folder/'metadata.csv')
    table = table.assign(trace_license='MIT (repository)', trace_redistribution='ok',
                         trace_p_status='manual', trace_p_model_sample=7.)
    rows = {split: table.index[table.split == split] for split in ('train', 'dev', 'test')}
    for split in rows:
        table.loc[rows[split][0], 'trace_license'] = 'none stated; network data open'
        table.loc[rows[split][1], 'trace_redistribution'] = 'unclear'
        table.loc[rows[split][2], 'trace_p_status'] = 'auto'
        table.loc[rows[split][3], 'trace_redistribution'] = 'ok, keep notice'
    table.to_csv(quakes_folder/'metadata.csv', index=False)
    whole = build_box.write_subset(quakes_folder, tmp_path/'subset', ['train', 'dev'])
    reasons = [build_box.NO_LICENCE, build_box.NO_LICENCE, build_box.OTHER_PICKERS, '']
    assert whole.why[rows['train'][:4]].tolist() == reasons
    kept = pd.read_csv(tmp_path/'subset/metadata.csv')
    assert kept.split.value_counts().to_dict() == {'train': 21, 'dev': 9, 'test': 12}
    assert not [c for c in kept if 'model' in c]
    assert (tmp_path/'subset/waveforms.hdf5').samefile(quakes_folder/'waveforms.hdf5')


@pytest.mark.parametrize('threads', [1, 2, 4])
@pytest.mark.parametrize('name', PICKERS)
def test_golden_picks(name, threads):
    "The picks of the first version with these weights, in this one"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: found = golden_picks.picks_of_box(name)
    finally: torch.set_num_threads(before)
    want = json.loads(golden_picks.GOLDEN.read_text(encoding='utf-8'))[name]
    assert sum(map(len, want.values())) >= 10
    assert golden_picks.differences(want, found) == []


def test_differences_of_picks_are_seen():
    pick = dict(phase='P', time='2020-01-01T00:00:30.000000Z', probability=.8)
    same = lambda **new: golden_picks.differences({'a': [pick]}, {'a': [{**pick, **new}]})
    assert same() == same(probability=.8009) == []
    others = dict(phase='S'), dict(time='2020-01-01T00:00:30.010000Z'), dict(probability=.802)
    assert [len(same(**new)) for new in others] == [1, 1, 1]
    for want, got in (({'a': [pick]}, {'a': []}), ({}, {'a': [pick]})):
        assert len(golden_picks.differences(want, got)) == 1

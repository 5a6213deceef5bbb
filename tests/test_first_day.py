"""The mistakes of a first day: settings edited by hand, numbers out of range, paths that are none.
One sentence, exit code 2, nothing half-written"""
import json

import pytest
import torch

from seismodel import info
from seismodel.cli import main
from seismodel.finetuning.heads import Picker
from seismodel.data.pack import pack
from seismodel.models.pretraining import (build, config_from_dict, config_to_dict, from_pretrained,
                                          preset)
from seismodel.training.config import TrainConfig, check_config, train_from_dict
from seismodel.core import UserError


def said(words, capsys):
    "What `seismodel` says on the way out with code 2"
    assert main(list(map(str, words))) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith('seismodel: ')
    return err


@pytest.mark.parametrize('where, value', [('heads', 'four'), ('heads', -4), ('heads', 3),
                                          ('heads', True), ('encoder', None), ('pooling', 5),
                                          ('blocks', 1.5),
    ('direction', 'up'), ('dropout', 7), ('blocks', 0), ('temperature', -1), ('negatives', 'x'),
                                          ('bogus', 1),
    ('encoder.conv_features', -2), ('encoder.conv_features', '64'), ('encoder.mask_prob', 2),
                                          ('encoder.bogus', 1)])
def test_a_model_configuration_edited_by_hand(where, value):
    config = json.loads(json.dumps(config_to_dict(preset('contrastive-tiny').model)))
    *inside, name = where.split('.')
    (config[inside[0]] if inside else config)[name] = value
    with pytest.raises(UserError, match=name.split('_')[0]): build(config_from_dict(config))


def test_whole_numbers_may_stand_for_numbers():
    config = json.loads(json.dumps(config_to_dict(preset('contrastive-tiny').model)))
    assert (config_from_dict({**config, 'ff': 3}).ff == 3
            and config_from_dict(config) == preset('contrastive-tiny').model)


@pytest.mark.parametrize('saved', [4, {'steps': 'x'}, {'betas': 3}, {'keep': 'x'},
                                   {'batch_size': 4.5}, {'bogus': 1}, {'workers': 'all'}])
def test_a_recipe_edited_by_hand(saved):
    with pytest.raises(UserError, match=f"config field 'train.{next(iter(saved))}'"
                       if isinstance(saved, dict) else "config field 'train'"):
        train_from_dict(saved)


@pytest.mark.parametrize('name, value', [('lr', float('inf')), ('weight_decay', float('inf')),
                                         ('seed', 10**26), ('workers', -1)])
def test_numbers_that_no_run_can_use(name, value):
    with pytest.raises(UserError, match=name.replace('_', '-')):
        check_config(TrainConfig(**{name: value}))


@pytest.mark.parametrize('field, value', [('train', 4), ('data', None), ('data', 'synthetic'),
                                          ('window', 'a'), ('weights', 'a')])
def test_a_run_whose_settings_were_edited(field, value, tmp_path, capsys):
    config = {'preset': 'contrastive-tiny', 'data': ['synthetic'], 'weights': None, 'window': 4096,
              'model': config_to_dict(preset('contrastive-tiny').model), 'train': {'steps': 2}}
    (tmp_path/'config.json').write_text(json.dumps({**config, field: value}), encoding='utf-8')
    assert f"'{field}' is" in said(['pretrain', '--resume', tmp_path], capsys)
    assert [f.name for f in tmp_path.iterdir()] == ['config.json']


def test_a_picker_is_no_start_for_pretraining(tmp_path):
    Picker(build(preset('reconstruction-tiny').model), width=0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='fine-tuned model'): from_pretrained(tmp_path)


def test_a_folder_below_a_file_is_named(tmp_path, capsys):
    (tmp_path/'file').write_text('mine', encoding='utf-8')
    words = ['pretrain', '--preset', 'reconstruction-tiny', '--steps', 1, '--batch-size', 1,
             '--validation-windows', 1, '--device', 'cpu', '--out', tmp_path/'file/run']
    assert ('file/run' in said(words, capsys)
            and (tmp_path/'file').read_text(encoding='utf-8') == 'mine')


def test_ctrl_c_where_nobody_listens(monkeypatch, capsys):
    def interrupted(): raise KeyboardInterrupt
    monkeypatch.setattr(info, 'info', interrupted)
    assert main(['info']) == 130 and 'stopped by Ctrl-C' in capsys.readouterr().err


@pytest.mark.parametrize('words', [('inspect', '--window', 0), ('inspect', '--out', 'page.banana'),
                                   ('inspect', '--out', 'page'), ('pack', '--window', -10)])
def test_looking_and_packing_out_of_range(words, quakes_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words[1] in said([words[0], quakes_folder, *words[1:]], capsys)
    assert [f.name for f in tmp_path.iterdir()] == ['quakes']


def test_a_page_goes_into_a_new_folder(quakes_folder, tmp_path, capsys):
    assert main(['inspect', str(quakes_folder), '--records', '4', '--out',
                 str(tmp_path/'new/page.png')]) == 0
    assert (tmp_path/'new/page.png').stat().st_size > 1000


def test_a_source_is_packed_once(quakes_folder, tmp_path):
    with pytest.raises(UserError, match='named twice'):
        pack([quakes_folder, quakes_folder.parent/'.'/'quakes'], tmp_path/'store')
    assert not (tmp_path/'store').exists()


@pytest.mark.parametrize('option', [('--steps', '500'), ('--seed', '0'), ('--data', 'synthetic'),
                                    ('--out', 'other'), ('--fraction', '1'), ('--freeze', 'none'),
                                    ('--from', 'random'), ('--column', 'trace_category')])
def test_a_resumed_run_does_not_pretend_to_listen(option, tmp_path, capsys):
    assert (f'{option[0]} cannot change with --resume'
            in said(['finetune', '--resume', tmp_path, *option], capsys))


def test_a_store_is_no_folder_to_evaluate_on(quakes_folder, tmp_path, capsys):
    pack([quakes_folder], tmp_path/'store')
    capsys.readouterr()
    assert ('is a packed store'
            in said(['evaluate', 'tiny-picker', '--data', tmp_path/'store'], capsys))


def unlabelled(records):
    "The same records without what anybody found on them"
    for metadata, x in records:
        yield {k: v for k, v in metadata.items() if 'arrival' not in k and k != 'trace_category'}, x


@pytest.mark.parametrize('packed', [False, True])
def test_records_that_nobody_has_picked_teach_no_picker(packed, tmp_path, write_dataset,
                                                        quake_records, capsys):
    data = write_dataset(tmp_path/'plain', unlabelled(quake_records(16)))
    if packed: data = pack([str(data)], tmp_path/'store') and tmp_path/'store'
    capsys.readouterr()
    words = ['finetune', '--from', 'random', '--preset', 'contrastive-tiny', '--data', data,
             '--out', tmp_path/'run', '--steps', '2', '--device', 'cpu']
    assert 'nothing to teach a picker' in said(words, capsys)
    assert not (tmp_path/'run').exists()


def test_a_fine_tuning_run_on_its_first_day(tmp_path, capsys):
    """It leaves a folder of somebody else alone, is described by info, and goes on with another
    number of workers"""
    words = lambda out: ['finetune', '--from', 'random', '--preset', 'contrastive-tiny', '--data',
                         'synthetic', '--out', str(out), '--steps', '2',
                         '--batch-size', '2', '--validation-windows', '2', '--checkpoint-every',
                         '1', '--device', 'cpu']
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'chapter.tex').write_text('mine', encoding='utf-8')
    assert 'is not empty and holds no run' in said(words(tmp_path/'thesis'), capsys)
    assert [f.name for f in (tmp_path/'thesis').iterdir()] == ['chapter.tex']
    assert main(words(tmp_path/'run')) == 0 and main(['info', str(tmp_path/'run')]) == 0
    out = capsys.readouterr().out
    assert 'picker from random: ' in out and 'step 2 of 2' in out and 'data: synthetic' in out
    (tmp_path/'run'/'checkpoints'/'step-00000002.safetensors').unlink()
    assert (main(['finetune', '--resume', str(tmp_path/'run'), '--workers', '0', '--device', 'cpu'])
            == 0)
    assert 'Going on from step 1' in capsys.readouterr().out

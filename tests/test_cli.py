"""The command line as a user meets it: a process, its exit code, what it says and what it leaves
behind"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from seismodel.cli import main
from seismodel.models.pretraining import PRESETS, from_pretrained, preset


def seismodel(*words, cwd):
    "Run `python -m seismodel` in a folder"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, '-m', 'seismodel', *map(str, words)], cwd=cwd, env=env,
                          capture_output=True, text=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of two steps"
    folder = tmp_path_factory.mktemp('cli')
    done = seismodel('pretrain', '--preset', 'reconstruction-tiny', '--steps', 2, '--batch-size', 2,
                     '--validation-windows', 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_end_of_a_run_says_where_everything_lies(trained):
    folder, done = trained
    run = folder/'runs/reconstruction-tiny-1'
    for line, path in zip(done.stdout.splitlines()[-3:],
                          ('model.safetensors', 'metrics.jsonl', 'figures')):
        assert (folder/line.split()[-1]).samefile(run/path)
    assert '2/2' in done.stderr   # the progress bar
    config = json.loads((run/'config.json').read_text(encoding='utf-8'))
    assert (config['preset'] == 'reconstruction-tiny' and config['train']['steps'] == 2
            and config['data'] == ['synthetic'])
    assert from_pretrained(run).config == preset('reconstruction-tiny').model


def test_datasets_are_mixed_by_folder(quakes_folder, tmp_path):
    assert main(['pretrain', '--preset', 'contrastive-tiny', '--data', str(quakes_folder), '--data',
                 'synthetic', '--data-weights', '3,1', '--steps', '1',
                 '--batch-size', '2', '--validation-windows', '2', '--device', 'cpu', '--workers',
                 '0', '--out', str(tmp_path/'run')]) == 0
    assert (json.loads((tmp_path/'run/config.json').read_text(encoding='utf-8'))['weights']
            == [3., 1.])


def test_options_of_version_01_still_work_and_say_their_new_names(quakes_folder, tmp_path, capsys):
    words = ['pretrain', '--preset', 'contrastive-tiny', '--data', str(quakes_folder), '--data',
             'synthetic', '--steps', '1', '--batch-size', '2',
             '--validation-windows', '2', '--device', 'cpu', '--workers', '0', '--out',
             str(tmp_path/'run'), '--weights', '3,1']
    assert main(words) == 0
    assert (json.loads((tmp_path/'run/config.json').read_text(encoding='utf-8'))['weights']
            == [3., 1.])
    assert 'seismodel: --weights is called --data-weights now' in capsys.readouterr().err
    assert main(['study', '--peer=GPD', '--data', 'x', '--out', str(tmp_path/'s')]) == 2
    said = capsys.readouterr().err
    assert '--peer is called --baseline now' in said and 'choose PhaseNet or EQTransformer' in said
    assert (main(['finetune', '--from-run', 'random', '--data', 'x', '--out', str(tmp_path/'f')])
            == 2)
    said = capsys.readouterr().err
    assert '--from-run is called --from now' in said and 'needs --preset' in said


@pytest.mark.parametrize('words, says', [
    (('pretrain', '--preset', 'contrastive-huge'), 'contrastive-huge'),
    (('pretrain', '--data', 'missing/folder'), 'missing/folder'),
    (('pretrain', '--data', 'NoSuchDataset'), 'NoSuchDataset'),
    (('pretrain', '--data', 'empty'), 'empty'),
    (('pretrain', '--steps', '-5'), '-5'),
    (('pretrain', '--batch-size', '0'), '--batch-size is 0'),
    (('pretrain', '--lr', 'nan'), 'lr'),
    (('pretrain', '--device', 'cuda'), 'cuda'),
    (('pretrain', '--data-weights', '1,2'), 'one positive number for each dataset (1)'),
    (('info', 'nothing/here'), 'nothing/here'),
    (('embed', 'nothing/here', 'x.mseed'), 'nothing/here'),
    (('prtrain',), 'prtrain'),
], ids=lambda v: ' '.join(v) if isinstance(v, tuple) else '')
def test_what_a_user_can_mend_is_one_sentence_and_code_2(words, says, tmp_path, monkeypatch,
                                                         capsys):
    """A process of its own says what is said here: two of them are asked, the others would take
    five seconds each"""
    (tmp_path/'empty').mkdir()
    if words[-1] in ('prtrain', 'cuda'):
        done = seismodel(*words, cwd=tmp_path)
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        code, said = main(list(words)), capsys.readouterr().err
    assert code == 2
    assert 'Traceback' not in said and says in said
    assert len(said.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['empty']   # nothing half-written


def test_a_batch_larger_than_the_data_is_refused(quakes_folder, tmp_path, capsys):
    assert main(['pretrain', '--data', str(quakes_folder), '--batch-size', '1000', '--device',
                 'cpu', '--out', str(tmp_path/'run')]) == 2
    assert 'batch size is 1000' in capsys.readouterr().err and not (tmp_path/'run').exists()


def test_an_existing_folder_is_not_written_into(tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine', encoding='utf-8')
    assert main(['pretrain', '--out', str(tmp_path)]) == 2
    assert ('not empty' in capsys.readouterr().err
            and [p.name for p in tmp_path.iterdir()] == ['notes.txt'])


def test_embed_writes_features_of_a_dataset_and_of_a_file(trained, quakes_folder, tmp_path, capsys):
    import obspy
    folder, _ = trained
    run = str(folder/'runs/reconstruction-tiny-1')
    assert main(['embed', run, str(quakes_folder), '--split', 'dev', '--device', 'cpu', '--out',
                 str(tmp_path/'a.npz')]) == 0
    a = np.load(tmp_path/'a.npz')
    assert (a['features'].shape[1] == 64
            and len(a['name']) == len(a['start_sample']) == len(a['features'])
            and np.isfinite(a['features']).all())
    obspy.read().write(str(tmp_path/'r.sac.mseed'), format='MSEED')
    assert main(['embed', run, str(tmp_path/'r.sac.mseed'), '--frames', '--device', 'cpu', '--out',
                 str(tmp_path/'b.npz')]) == 0
    assert np.load(tmp_path/'b.npz')['features'].shape == (1, 1024, 64)
    assert main(['embed', run, str(tmp_path/'a.npz'), '--out', str(tmp_path/'c.npz')]) == 2
    assert 'no waveform format' in capsys.readouterr().err and not (tmp_path/'c.npz').exists()


def test_embed_and_inspect_read_archives_in_any_layout(trained, tmp_path, capsys):
    """Two hours with a gap, whole and as an hour and channel per file: the same features; another
    station is left away"""
    import obspy
    rng, t0 = np.random.default_rng(0), obspy.UTCDateTime('2024-02-28T22:30')
    st = obspy.Stream(
        [obspy.Trace((1e3*rng.standard_normal(720_000)).astype(np.float32) + 5000, dict(
        network='XX', station='ABC', channel=f'HH{c}', sampling_rate=100., starttime=t0))
         for c in 'ZNE'])
    # no ground motion: nothing was recorded there
    for tr in st: tr.data[300_000:320_000] = 1e30
    st = st.cutout(t0 + 2000, t0 + 2400)
    for name in ('whole', 'parts'): (tmp_path/name).mkdir()
    st.write(str(tmp_path/'whole/all.mseed'), format='MSEED')
    for k in range(2):
        for tr in st.slice(t0 + 3600*k, t0 + 3600*(k + 1) - .01):
            tr.write(str(tmp_path/f'parts/{k}{tr.id}{tr.stats.starttime.ns}'), format='MSEED')
    for tr in (other := obspy.read()): tr.stats.station = 'OTHER'
    other.write(str(tmp_path/'parts/other.mseed'), format='MSEED')
    made, run = {}, str(trained[0]/'runs/reconstruction-tiny-1')
    for name in ('whole', 'parts'):
        words = ['embed', run, str(tmp_path/name), '--station', 'A?C', '--device', 'cpu', '--out',
                 str(tmp_path/f'{name}.npz')]
        assert main(words) == 0
        made[name] = np.load(tmp_path/f'{name}.npz')
    names, starts = made['whole']['name'].tolist(), made['whole']['start_sample'].tolist()
    assert dict.fromkeys(names) == {f'XX.ABC..HH {t0}': None, f'XX.ABC..HH {t0 + 2400}': None}
    lost = {k for k in range(0, 480_000, 4096) if 60_000 <= k and k + 4096 <= 80_000}
    assert (starts
            == [*range(0, 200_000, 4096), *(k for k in range(0, 480_000, 4096) if k not in lost)]
            and len(lost) == 4)
    for key in ('features', 'name', 'start_sample', 'true_frames'):
        assert made['parts'][key].shape == made['whole'][key].shape
        np.testing.assert_array_equal(made['parts'][key], made['whole'][key])
    capsys.readouterr()
    assert main(['inspect', str(tmp_path/'parts'), '--station', 'OTHER', '--out',
                 str(tmp_path/'page.png')]) == 0
    said = capsys.readouterr().out
    assert '1 usable traces' in said and '100 Hz (3)' in said and (tmp_path/'page.png').exists()
    assert main(['embed', run, str(tmp_path/'parts'), '--station', 'NONE', '--out',
                 str(tmp_path/'none.npz')]) == 2
    assert 'none has a channel' in capsys.readouterr().err


def test_plot_draws_one_run_or_several(trained, tmp_path, capsys):
    folder, _ = trained
    run = str(folder/'runs/reconstruction-tiny-1')
    assert (main(['plot', run]) == 0
            and main(['plot', run, run, '--out', str(tmp_path/'both.png')]) == 0)
    assert (tmp_path/'both.png').read_bytes().startswith(b'\x89PNG')
    assert main(['plot', str(tmp_path)]) == 2 and 'holds no run' in capsys.readouterr().err


def test_a_resumed_run_needs_nothing_else_and_names_what_differs(trained, capsys):
    folder, _ = trained
    run = str(folder/'runs/reconstruction-tiny-1')
    assert main(['pretrain', '--resume', run]) == 0
    assert main(['pretrain', '--resume', run, '--lr', '9', '--preset', 'contrastive-tiny']) == 2
    assert ('preset was reconstruction-tiny and is contrastive-tiny; lr was 0.003 and is 9.0'
            in capsys.readouterr().err)


@pytest.mark.parametrize('command', ['pretrain', 'info', 'plot', 'embed', 'finetune', 'study'])
def test_help_comes_from_the_comments(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, '--help'])
    said = capsys.readouterr().out
    assert e.value.code == 0 and f'usage: seismodel {command}' in said
    assert '--from-run' not in said and ('--from ' in said) == (command in ('finetune', 'study'))
    if command == 'pretrain': assert 'peak learning rate' in said and '--batch-size' in said


def test_every_preset_starts_and_its_features_have_their_width():
    from seismodel.models.pretraining import build
    for name in (n for n in PRESETS if n.endswith('tiny')):
        with torch.no_grad():
            assert (build(PRESETS[name].model).eval().features(torch.randn(1, 100, 3)).shape[:2]
                    == (1, 25))

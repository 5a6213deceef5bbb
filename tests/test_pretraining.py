"The methods as modules: determinism, gradients, saving and what is wrong with damaged files"
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from seismodel.models.encoders import BidirAutoregConfig, ConvDownConfig
from seismodel.models.pretraining import (ContrastiveConfig, ReconstructionConfig, build,
                                          config_from_dict, config_to_dict, from_pretrained, preset)
from seismodel.files import write_atomically
from seismodel.core import UserError

CONTRASTIVE = ContrastiveConfig(ConvDownConfig(conv_features=16, out_features=16, codevector_dim=16,
                                               target_features=16), blocks=1, pooling=(4,),
                                negatives=20)
TOKENS = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1)
PATCH = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1, target='patch')
SPECTRUM = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1, target='spectrum')
every = pytest.mark.parametrize('config', [CONTRASTIVE, TOKENS, PATCH, SPECTRUM],
                                ids=['contrastive', 'tokens', 'patch', 'spectrum'])


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_reconstruction_presets_predict_spectra_and_saved_models_what_they_did(size):
    """The target of a saved configuration is its own; one that names none has tokens, as the
    specification says"""
    model = preset(f'reconstruction-{size}').model
    assert (model.target == 'spectrum'
            and (model.encoder.mask_value, model.encoder.activation) == ('zero', 'relu'))
    assert config_from_dict(config_to_dict(replace(model, target='tokens'))).target == 'tokens'
    bare = {k: v for k, v in config_to_dict(model).items() if k != 'target'}
    assert config_from_dict(bare).target == 'tokens'


@every
def test_the_generator_decides_everything(config):
    torch.manual_seed(0)
    model, x = build(config), torch.randn(4, 512, 3)
    torch.manual_seed(1)
    a = model(x, torch.Generator().manual_seed(5)).loss
    torch.manual_seed(2)
    assert torch.equal(a, model(x, torch.Generator().manual_seed(5)).loss)
    assert not torch.equal(a, model(x, torch.Generator().manual_seed(6)).loss)


@every
def test_any_length_has_features_and_they_are_finite(config):
    model = build(config).eval()
    for samples in (1, 3, 40, 1001, 4096, 9000):
        f = model.features(torch.randn(2, samples, 3))
        assert f.shape == (2, -(-samples//4), 16) and f.isfinite().all()


@every
def test_dead_windows_have_a_finite_loss_and_gradient(config):
    model, x = build(config), torch.zeros(4, 512, 3)
    x[0] = torch.randn(512, 3)
    step = model(x, torch.Generator().manual_seed(0))
    step.loss.backward()
    assert (step.loss.isfinite()
            and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()))


@every
def test_the_conv_stack_learns(config):
    model = build(config)
    model(torch.randn(4, 512, 3), torch.Generator().manual_seed(0)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.encoder.named_parameters() if 'conv' in n
               and n.endswith('weight'))


@every
def test_a_saved_model_is_the_same_model(config, tmp_path):
    model, x = build(config).eval(), torch.randn(2, 512, 3)
    model.save_pretrained(tmp_path, {'note': 'kept'})
    again = from_pretrained(tmp_path)
    assert again.config == config and not again.training
    assert torch.equal(again.features(x), model.features(x))
    assert json.loads((tmp_path/'config.json').read_text(encoding='utf-8'))['note'] == 'kept'


def unsealed(folder):
    "Weights as version 0.1 wrote them: only config.json says which model they belong to"
    (folder/'model.safetensors').write_bytes(save(load((folder/'model.safetensors').read_bytes())))


@pytest.mark.parametrize('file, content, says', [
    ('model.safetensors', b'', 'truncated'), ('model.safetensors', b'\x00'*100, 'truncated'),
    ('model.safetensors', None, 'missing'),
    ('config.json', b'{', 'not valid JSON'), ('config.json', b'[]', 'no object'),
    ('config.json', b'{}', "no field 'model'"),
    ('config.json', b'{"model": {"method": "guess"}}', "'guess'"),
    ('config.json', b'{"model": {"method": "reconstruction", "encoder": {"width": 3}}}',
     'encoder.width'), ('config.json', None, 'missing')])
def test_a_damaged_model_is_refused_in_one_sentence(file, content, says, tmp_path):
    build(TOKENS).save_pretrained(tmp_path)
    unsealed(tmp_path)
    (tmp_path/file).unlink()
    if content is not None: (tmp_path/file).write_bytes(content)
    with pytest.raises(UserError, match=says) as e: from_pretrained(tmp_path)
    assert ('\n' not in str(e.value) and str(tmp_path) in str(e.value)
            or 'config field' in str(e.value))


def test_truncated_weights_are_refused_wherever_the_cut(tmp_path):
    build(TOKENS).save_pretrained(tmp_path)
    whole = (tmp_path/'model.safetensors').read_bytes()
    for cut in range(0, len(whole), len(whole)//13):
        (tmp_path/'model.safetensors').write_bytes(whole[:cut])
        with pytest.raises(UserError): from_pretrained(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path):
    build(TOKENS).save_pretrained(tmp_path/'a')
    build(PATCH).save_pretrained(tmp_path/'b')
    unsealed(tmp_path/'b')
    (tmp_path/'a/model.safetensors').write_bytes((tmp_path/'b/model.safetensors').read_bytes())
    with pytest.raises(UserError, match=r"'head.1.(weight|bias)' has shape"):
        from_pretrained(tmp_path/'a')


@every
def test_configurations_go_through_json(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path/'f').write_text('old', encoding='utf-8')
    def fail(path):
        path.write_text('half', encoding='utf-8')
        raise OSError('disk full')
    with pytest.raises(OSError): write_atomically(tmp_path/'f', fail)
    assert ([p.name for p in tmp_path.iterdir()] == ['f']
            and (tmp_path/'f').read_text(encoding='utf-8') == 'old')

"Damage is seen: a bit that flipped in weights, a store or a table is refused in a sentence, and a kill leaves what can be used"
import json
import logging
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from seismodel.core import UserError
from seismodel.files import sealed_tensors
from seismodel.models.encoders import BidirAutoregConfig
from seismodel.models.pretraining import ReconstructionConfig, build, from_pretrained, read_model

SMALL = ReconstructionConfig(BidirAutoregConfig(d_model=8), blocks=1, ff=1.)
OTHER = ReconstructionConfig(BidirAutoregConfig(d_model=16), blocks=1, ff=1.)


def flipped(blob, bit):
    "The same bytes, but for one bit"
    blob = bytearray(blob)
    blob[bit//8] ^= 1 << bit % 8
    return bytes(blob)


def test_exponent_bits_of_weights_are_refused(tmp_path):
    build(SMALL).save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    blob = file.read_bytes()
    numbers = sum(w.numel() for w in load(blob).values())
    for k in np.random.default_rng(0).integers(1, numbers, 20):
        file.write_bytes(flipped(blob, 8*len(blob) - 32*int(k) + 30))    # the highest bit of an exponent
        with pytest.raises(UserError, match='checksum does not match'): from_pretrained(tmp_path)


def test_bits_of_the_header_of_weights_are_refused(tmp_path):
    build(SMALL).save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    blob = file.read_bytes()
    header = 8*(8 + int.from_bytes(blob[:8], 'little'))
    for bit in range(0, header, 7):
        file.write_bytes(flipped(blob, bit))
        with pytest.raises(UserError): from_pretrained(tmp_path)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    model = build(SMALL)
    for name in 'ab': model.save_pretrained(tmp_path/name)
    a, b = ((tmp_path/name/'model.safetensors').read_bytes() for name in 'ab')
    assert a == b
    tensors = {'w': torch.arange(3.), 'é': torch.zeros(2, 2, dtype=torch.bfloat16)}
    again = load(sealed_tensors(tensors, {'z': 'ä"\n', 'a': '1'}))
    assert all(torch.equal(again[name], t) for name, t in tensors.items())


def test_a_kill_between_the_two_files_leaves_a_model(tmp_path, caplog):
    "The new config.json lies beside the old weights, which say themselves what they are"
    old = build(SMALL).eval()
    old.save_pretrained(tmp_path, {'picker': {'width': 0}})
    class Killed(BaseException): pass
    def replace(part, path, real=Path.replace):
        if path.name == 'model.safetensors': raise Killed
        return real(part, path)
    with patch('seismodel.files.replace_durably', replace), pytest.raises(Killed):
        build(OTHER).save_pretrained(tmp_path, {'picker': {'width': 8}})
    with caplog.at_level(logging.WARNING, 'seismodel'): config, weights = read_model(tmp_path)
    assert config['model']['encoder']['d_model'] == 8 and config['picker'] == {'width': 0}
    assert all(torch.equal(weights[name], w) for name, w in old.state_dict().items())
    assert "field 'model' is not that of the weights" in caplog.text


def test_a_kill_before_the_first_weights_leaves_a_sentence(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps({'model': {}}), encoding='utf-8')
    with pytest.raises(UserError, match='model.safetensors is missing'): from_pretrained(tmp_path)


def test_weights_of_0_1_still_load(tmp_path):
    model = build(SMALL)
    model.save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    file.write_bytes(save(load(file.read_bytes())))                      # no checksum, no configuration
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in from_pretrained(tmp_path).state_dict().items())

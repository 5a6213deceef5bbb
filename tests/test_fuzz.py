"Any call ends in a result or in a sentence; scripts/fuzz.py does 2,000"
import shutil

import pytest
from calls import GOOD, call, calls, damages, files_of, make_world
from hypothesis import HealthCheck, Phase, given, settings


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Files of each kind"
    folder = tmp_path_factory.mktemp('world')/'world'
    folder.mkdir()
    assert make_world(folder) == [0]*6
    return folder


def test_no_call_ends_in_a_traceback(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path/'world')
    monkeypatch.chdir(tmp_path/'world')
    files = files_of(tmp_path/'world')

    @settings(max_examples=25, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    # which takes seconds
    @given(calls([words for words in GOOD if not words.startswith('study')]), damages())
    def attack(words, how):
        error = call(tmp_path/'world', files, words, how)
        assert error is None, f'seismodel {words}, damaged by {how}:\n{error}'

    attack()

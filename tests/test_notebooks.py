"Every notebook in nbs/ runs from top to bottom: one case per notebook"
import logging

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import name_of, nbs, root
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb   # renamed, or pytest collects it as a test


@pytest.mark.parametrize('nb', nbs, ids=name_of)
def test_notebook(nb, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg')
    # chapters hush them for their readers
    loggers = [logging.getLogger(name) for name in ('seismodel', 'seisbench')]
    # and some count with one thread
    levels, threads = [log.level for log in loggers], torch.get_num_threads()
    ok, _ = run_nb(nb, skip_flags=get_config(root).tst_flags.split(), basepath=root)
    for log, level in zip(loggers, levels): log.setLevel(level)
    torch.set_num_threads(threads)
    plt.close('all')
    assert ok, f'{nb.name} failed: the traceback is above'

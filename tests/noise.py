"""Windows of noise, and what may happen when one is asked for; in a module that loader processes
import quickly"""
import numpy as np
import torch
from torch.utils.data import Dataset

from seismodel.core import UserError


class Noise(Dataset):
    """Windows of noise, item n a function of n alone; `at` maps the number of a window to what
    happens when it is asked for"""
    def __init__(self, length=48, at={}): self.length, self.at = length, at
    def __len__(self): return self.length
    def __getitem__(self, n):
        if n in self.at: self.at[n]()
        x = torch.from_numpy(np.random.default_rng(n).standard_normal((256, 3)).astype(np.float32))
        return {'x': x, 'n': torch.tensor(n), 'source': torch.tensor(0), 'redrawn': torch.tensor(0)}


def crash(): raise ZeroDivisionError('the machine is gone')
def draw(): torch.rand(5)
def nothing_usable(): raise UserError('no usable record in few')

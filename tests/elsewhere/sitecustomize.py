"""Makes a Python on Linux resemble one on Windows: with this folder in PYTHONPATH it is run before
anything else, in every process that is begun as well. Gone are the modules and signals that Windows
lacks, and `fork`; processes can only be spawned. Folders are not opened, only what is open for
writing is forced out, and nothing that this process has open or mapped is renamed or deleted.
Triton is gone as well."""
import asyncio     # that of Python 3.13 on Linux looks at os.sysconf
import errno
import fcntl
import multiprocessing
import os
import signal
import sys

import lacking

GONE = {*lacking.MODULES, 'triton'}
mode_of = lambda handle: fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
plain = {name: getattr(os, name) for name in ('open', 'fsync', 'replace', 'rename', 'unlink',
                                              'remove', 'rmdir')}


class Without:
    "A finder of modules that finds none of those that are gone"
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in GONE else self.finder.find_spec(name, path, target)


def in_use(path):
    "Whether this process has a file open or mapped that is `path`, or lies in it"
    path = os.path.abspath(os.fsdecode(path))
    links = []
    for handle in os.listdir('/proc/self/fd'):
        try: links.append(os.readlink(f'/proc/self/fd/{handle}'))
        except OSError: pass
    with open('/proc/self/maps', encoding='utf-8') as f:
        links += [line.split(maxsplit=5)[-1].strip() for line in f]
    return any(link == path or link.startswith(path + '/') for link in links)


def refusing(name):
    "A function of `os` that refuses what is in use"
    def function(*paths, **how):
        for path in paths:
            if not isinstance(path, int) and not how and in_use(path):
                raise PermissionError(errno.EACCES,
                                      'The process cannot access the file because it is in use',
                                      path)
        return plain[name](*paths, **how)
    return function


def open_file(path, flags, mode=0o777, *, dir_fd=None):
    if dir_fd is None and os.path.isdir(path):
        raise PermissionError(errno.EACCES, 'Permission denied', path)
    return plain['open'](path, flags, mode, dir_fd=dir_fd)


def fsync(handle):
    handle = handle if isinstance(handle, int) else handle.fileno()
    if mode_of(handle) == os.O_RDONLY: raise OSError(errno.EBADF, 'Bad file descriptor')
    plain['fsync'](handle)


os.open, os.fsync = open_file, fsync
for name in ('replace', 'rename', 'unlink', 'remove', 'rmdir'): setattr(os, name, refusing(name))
for name in lacking.OS:
    if hasattr(os, name): delattr(os, name)
KEPT = {*lacking.SIGNALS, 'SIG_DFL', 'SIG_IGN', 'SIGCHLD'}     # PyTorch on Linux needs the last one
for name in [n for n in dir(signal) if n.startswith('SIG') and n not in KEPT]: delattr(signal, name)
for name in lacking.SIGNAL:
    if hasattr(signal, name): delattr(signal, name)
for name in GONE: sys.modules.pop(name, None)
sys.meta_path[:] = map(Without, sys.meta_path)
multiprocessing.get_all_start_methods = lambda: ['spawn']

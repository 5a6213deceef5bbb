"What Linux has and Windows lacks, as far as a package like this one might want it"
MODULES = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'syslog'}
OS = {'fork', 'forkpty', 'killpg', 'getuid', 'geteuid', 'getgid', 'setsid', 'nice', 'chown',
      'mkfifo', 'sysconf', 'sync', 'statvfs',
      'posix_fadvise', 'sched_getaffinity', 'O_DIRECTORY', 'O_NOFOLLOW'}
SIGNAL = {'alarm', 'pause', 'setitimer', 'getitimer', 'pthread_sigmask', 'pthread_kill', 'sigwait',
          'siginterrupt'}
# those that Windows has
SIGNALS = {'SIGINT', 'SIGTERM', 'SIGABRT', 'SIGFPE', 'SIGILL', 'SIGSEGV'}

"`python -m seismodel` is the command `seismodel`"
import sys

from seismodel.cli import main

sys.exit(main())

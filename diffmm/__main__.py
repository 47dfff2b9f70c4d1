"""`python -m diffmm`: the command line, where the script `diffmm` is not on the path."""

import sys

from diffmm.cli import main

sys.exit(main())

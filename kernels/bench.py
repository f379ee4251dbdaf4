"""How fast, large and exact these kernels are: `python -m kernels.bench --help`. The work is bench/head.py's."""

import sys

from bench.head import main

if __name__ == "__main__":
    sys.exit(main())

"""How fast, large and exact these kernels are: `python -m kernels.bench --help`, which is bench/head.py."""

import sys

from bench.head import main

if __name__ == "__main__":
    sys.exit(main())

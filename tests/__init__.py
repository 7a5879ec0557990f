"""The tests; what the libraries' threads cost is set here, before any of these is imported.

The artifacts of the tests are so small that a second thread only waits, and two workers of pytest-xdist share
two cores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also NumPy's BLAS, and the processes that tests start

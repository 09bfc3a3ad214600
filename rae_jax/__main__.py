"""`python -m rae_jax VERB`."""

import sys

from rae_jax import main

sys.exit(main.main())

"""`python -m rae_jax VERB`."""

import sys

from rae_jax.main import main

sys.exit(main())

"""`python -m tests.model`."""

import sys

from tests.model.explore import main

sys.exit(main())

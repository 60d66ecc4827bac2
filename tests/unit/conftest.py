from __future__ import annotations

from hypothesis import settings

# No deadline: the machine is shared, and a slow example is not a wrong one.
settings.register_profile("unit", deadline=None, max_examples=80)
settings.load_profile("unit")

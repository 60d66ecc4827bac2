"""Redis: the only package that imports its driver. Its errors leave here as errors of ours."""

"""Tools for developers and owners of GPUs: verify, tune, kernel variants, workloads."""

"""Tests of model families: tiny random models of each architecture, compared with slow, obvious computations."""

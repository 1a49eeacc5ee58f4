import importlib.metadata

import pytest

import kernels


def test_the_other_kernels_distribution_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.2")
    with pytest.raises(ImportError, match="pip uninstall kernels"):
        kernels._refuse_namesake()


def test_nothing_is_said_without_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    kernels._refuse_namesake()

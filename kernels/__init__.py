"""Attention functions of the Flamingo family. Imports torch (and triton) and nothing else of the project.

`kernels.dispatch` holds the functions that the network calls; each folder holds one function's
implementations, its README and its mathematics.
"""

import importlib.metadata


def _refuse_namesake() -> None:
    """Fail if the Hugging Face distribution `kernels`, which has the same top-level name, is installed.

    Raises:
        ImportError: it is installed: which of the two `import kernels` finds would depend on the path.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"The distribution 'kernels' {version} (Hugging Face) is installed in this environment and has "
        "the same top-level name as the 'kernels' package of flamingo-dist. Only one of them can be "
        "imported: run 'pip uninstall kernels' and reinstall flamingo-dist, or use a separate environment."
    )


_refuse_namesake()

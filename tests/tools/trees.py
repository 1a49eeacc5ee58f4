"""Small source trees for the checkers to judge."""

from pathlib import Path


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write the files and an empty __init__.py into every folder of theirs that has none."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        folder = path.parent
        while folder != root:
            init = folder / "__init__.py"
            if not init.exists():
                init.write_text("", encoding="utf-8")
            folder = folder.parent
    return root
